"""Errors of `deploy`.

DeployError              a ServingError, so that the command line tells it in one line
  UsageError             options or settings that cannot be meant (exit code 2)
  ProgramNotFound        nginx, prometheus or another program is not installed; says how to get it
  GatewayError           nginx does not take a configuration, or does not do what it is told
  KeysError              API keys that cannot be read, written, or are not there
  CertificateError       a certificate or key that cannot be made or used
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


class GatewayError(DeployError):
    """nginx does not take a configuration, or does not do what it is told."""


class KeysError(DeployError):
    """API keys that cannot be read, written, or are not there."""


class CertificateError(DeployError):
    """A certificate or key that cannot be made or used."""
