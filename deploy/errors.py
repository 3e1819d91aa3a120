"""Errors of `deploy`.

DeployError              a ServingError, so that the command line tells it in one line
  UsageError             options or settings that cannot be meant (exit code 2)
  ProgramNotFound        nginx, prometheus or another program is not installed; says how to get it
"""

from __future__ import annotations

from serving.errors import ServingError


class DeployError(ServingError):
    """Root of all errors of `deploy`."""


class UsageError(DeployError):
    """Options or settings that cannot be meant."""

    exit_code = 2


class ProgramNotFound(DeployError):
    """A program that is not installed here."""
