"""The benchmarks' metrics as pure functions, each equal to its official scorer."""
