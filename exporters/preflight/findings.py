"""What is found about a model, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LOADS = "loads"
DOES_NOT_LOAD = "does not load"
UNKNOWN = "unknown"
NOTE = "note"


class Finding(NamedTuple):
    """One thing that was found.

    Attributes:
        kind: DOES_NOT_LOAD: reason enough not to; UNKNOWN: what would have to be known; NOTE: worth saying.
        text: what, which value, and what to do.
        source: address of what it rests on; "" where that is the file itself.
    """

    kind: str
    text: str
    source: str = ""


def verdict(findings: Sequence[Finding]) -> str:
    """LOADS, DOES_NOT_LOAD or UNKNOWN."""
    kinds = {finding.kind for finding in findings}
    return DOES_NOT_LOAD if DOES_NOT_LOAD in kinds else UNKNOWN if UNKNOWN in kinds else LOADS


def blocks(text: str, source: str = "") -> Finding:
    """It does not load."""
    return Finding(DOES_NOT_LOAD, text, source)


def unknown(text: str, source: str = "") -> Finding:
    """It is not known whether it loads."""
    return Finding(UNKNOWN, text, source)


def note(text: str, source: str = "") -> Finding:
    """It loads all the same."""
    return Finding(NOTE, text, source)
