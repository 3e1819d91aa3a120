"""Benchmarks of the training library: `python -m training.benchmarks NAME` prints one JSON line."""
