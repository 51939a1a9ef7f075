"""The quickstart: from nothing to a model that thinks, on a CPU, in a few minutes."""
