"""What figures were measured on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(cpuinfo: Path = Path("/proc/cpuinfo"), meminfo: Path = Path("/proc/meminfo")) -> dict[str, Any]:
    """CPU, cores and memory; None for what the system does not say."""
    return {"cpu": _value(cpuinfo, "model name"), "cores": cores(), "ram_gb": _ram_gb(meminfo)}


def _value(path: Path, key: str) -> str | None:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return None


def _ram_gb(meminfo: Path) -> float | None:
    value = _value(meminfo, "MemTotal")
    return round(int(value.split()[0]) / 1024 / 1024, 1) if value else None
