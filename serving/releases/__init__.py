"""Releases on a running server: `python -m serving release|rollback|follow`."""
