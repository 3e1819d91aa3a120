"""Turns a Checkpoint into Triton models, and publishes them only when they answer as PyTorch does.

The command is ``python -m exporters export CHECKPOINT --release DIR --formats onnx,torchscript``;
in Python it is :func:`exporters.release.export_release`. Importing the package imports nothing heavy.
"""
