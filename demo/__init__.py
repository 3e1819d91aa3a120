"""The whole path on real parts, once: slides, training, export, serving, prediction, and a report about it.

Only the command lines that a user would type are run (`python -m demo --help`); nothing imports this package.
"""
