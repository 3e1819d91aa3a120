"""The files of docker/, read once for the tests that compare them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deploy import containers
from serving.embedded import CHECKOUT

DOCKER = CHECKOUT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = containers.read_env(DOCKER / ".env.example")
VARIABLE = re.compile(r"\$\{(\w+)(:?[-?][^}]*)?\}")
MOUNT = re.compile(r"^((?:\$\{[^}]*\}|[^:$])+):(/[^:]*)(?::(ro|rw))?$")
SECRET_WORDS = re.compile(r"password|token|secret", re.IGNORECASE)


def texts(value: Any) -> Iterator[str]:
    """All strings of a document, keys too."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from texts(key)
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


def mounts(service: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Source, target, and whether read-only, of each volume of a service."""
    for volume in service.get("volumes", []):
        match = MOUNT.match(volume)
        assert match, volume
        yield match[1], match[2], match[3] == "ro"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Keyword and rest of each instruction, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines())
        if word
    ]


def environment(service: str) -> dict[str, str]:
    return dict(SERVICES[service].get("environment", {}))
