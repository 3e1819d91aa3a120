"""Measurements of the gateway, on real servers that they start themselves."""
