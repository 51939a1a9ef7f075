"""Tables and plots from the results of the benchmarks."""

FORMAT = 1  # of the JSON that `pytest benchmarks --benchmark-json` writes; raise it when a reader would misunderstand
