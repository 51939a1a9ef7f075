"""The quickstart: trains a model that thinks from scratch, on a CPU, in a few minutes."""
