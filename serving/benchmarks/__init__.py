"""Measurements of `serving` on a real server: `python -m serving.benchmarks`."""
