"""Measurements of the exporters, each with the bar that it is held to: `python -m exporters.benchmarks NAME`."""
