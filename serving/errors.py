"""Errors of `serving`.

ServingError
  UsageError             options that cannot be meant (exit code 2)
  RepositoryError        the model repository is missing, unreadable, or holds no model
  InstallError           the embedded server cannot be installed or is incomplete
  ServerNotFound         no tritonserver on PATH, in /opt/tritonserver, or embedded
  PortInUse              a port that was asked for is taken
  InstanceError          a server of that name is already up, or a name is not valid
  StartError             tritonserver ended, or a model could not be loaded
  ProofError             the server runs but did not compute what it must: it is stopped
"""

from __future__ import annotations


class ServingError(Exception):
    """Root of all errors of `serving`. `exit_code` is what the command line ends with: 2 for bad usage or input."""

    exit_code = 1


class UsageError(ServingError):
    """Options that cannot be meant together, or a file they name that does not do."""

    exit_code = 2


class RepositoryError(ServingError):
    """The model repository is missing, unreadable, or holds no model."""


class InstallError(ServingError):
    """The embedded server cannot be installed or is incomplete."""


class ServerNotFound(ServingError):
    """No tritonserver on PATH, in /opt/tritonserver, or embedded."""


class PortInUse(ServingError):
    """A port that was asked for is taken."""


class InstanceError(ServingError):
    """A server of that name is already up, or a name is not valid."""


class StartError(ServingError):
    """tritonserver ended during the start, or a model could not be loaded."""


class ProofError(ServingError):
    """The server runs but did not compute what it must."""
