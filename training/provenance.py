"""Where a checkpoint comes from: versions, commit, time."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what comes out of training."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def provenance() -> dict[str, Any]:
    """created_utc, git_commit and versions, for a manifest."""
    return {
        "created_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": versions(),
    }


def git_commit() -> str:
    """The commit of this code, "-dirty" added where files differ from it; "unknown" outside a git checkout."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    here = str(Path(__file__).resolve().parent)
    command = [git, "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip()
