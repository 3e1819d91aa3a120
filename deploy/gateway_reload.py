"""Which gateways of a state directory run, and letting them read keys and certificates again."""

from __future__ import annotations

from pathlib import Path

from deploy.gateway import reload, running_pid


def running_gateways(state: Path) -> list[Path]:
    """nginx.conf of each gateway below a state directory that runs."""
    found = [*state.glob("nginx.conf"), *state.glob("*/nginx.conf"), *state.glob("*/*/nginx.conf")]
    return [conf for conf in sorted(found) if running_pid(conf) is not None]


def reload_gateways(state: Path) -> list[str]:
    """Reload them; returns their configurations. Raises GatewayError, after which the old settings hold."""
    confs = running_gateways(state)
    for conf in confs:
        reload(conf)
    return [str(conf) for conf in confs]
