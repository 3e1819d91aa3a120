"""What a run was computed by: versions, commit, command line, hardware."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.tracking.options import redacted

PACKAGES = (
    *("torch", "torchvision", "accelerate", "safetensors", "numpy", "opencv-python-headless", "simplejpeg"),
    *("openslide-python", "openslide-bin", "tifffile", "pyarrow", "torchstain", "scikit-learn", "mlflow"),
)
GIT_TIMEOUT_S = 5


def describe(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """JSON types: command_line, folder, git_commit, user, host, python, platform, packages, hardware, processes."""
    words = list(sys.orig_argv if command_line is None else command_line)
    return {
        "command_line": [redacted(word) for word in words],
        "folder": os.getcwd(),
        "git_commit": git_commit(),
        "user": _user(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "hardware": hardware(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def hardware() -> dict[str, Any]:
    """cpu (its name), cores that this process may use, memory_bytes, gpus (names, where torch is loaded and sees any)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus: list[str] = []
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"cpu": _cpu_name(), "cores": cores, "memory_bytes": memory_bytes, "gpus": gpus}


def git_commit() -> str:
    """The commit of this code, "-dirty" added where files differ from it; "unknown" outside a git checkout."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    folder = str(Path(__file__).resolve().parent)
    command = [git, "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
