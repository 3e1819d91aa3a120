"""Starts, proves and stops Triton Inference Server: `python -m serving install|up|down|status`."""
