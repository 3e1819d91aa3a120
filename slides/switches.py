"""What a user can switch off by a variable of the environment."""

from __future__ import annotations

import os


def is_off(variable: str) -> bool:
    """True where the variable says off, 0, no or false, in letters of either case; unset, it is on."""
    return os.environ.get(variable, "").lower() in ("off", "0", "no", "false")
