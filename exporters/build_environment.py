"""What a release was built with, and on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from exporters.acceptance import machine_name
from training.provenance import git_commit

PACKAGES = (
    "clotline",
    "torch",
    "torchvision",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "nvidia-modelopt",
    "tritonclient",
    "mlflow",
)
"""Packages that decide what an export writes, or who can read it."""


def versions() -> dict[str, str]:
    """Versions of Python and of those PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU, cores, memory in GB (10^9 bytes), and the GPU's name or None."""
    import torch

    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": machine_name().rpartition(", ")[0],
        "cores": os.cpu_count(),
        "ram_gb": round(memory_bytes / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> tuple[str, bool]:
    """The commit of this code ("unknown" outside a checkout), and whether files differ from it."""
    told = git_commit()
    return told.removesuffix("-dirty"), told.endswith("-dirty")
