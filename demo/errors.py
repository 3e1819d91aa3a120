"""Errors of the package `demo`.

DemoError
 +- UsageProblem      options that cannot be (exit code 2)
 +- StageFailed       a command of the path failed; carries the end of its log
"""

from __future__ import annotations

from pathlib import Path


class DemoError(Exception):
    """Root of the errors of this package."""


class UsageProblem(DemoError):
    """Options that cannot be."""


class StageFailed(DemoError):
    """A command of the path failed.

    Attributes:
        log: file with everything that it printed.
    """

    def __init__(self, title: str, reason: str, log: Path, tail: list[str]) -> None:
        self.log = log
        said = "\n".join(f"  | {line}" for line in tail) or "  | (it printed nothing)"
        super().__init__(f"{title}: {reason}. The end of {log}:\n{said}")
