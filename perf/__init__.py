"""How fast the served models are, against what this machine can do at all: `python -m perf --help`."""
