"""Errors of releases on a running server.

ServingError
  ReleaseError           root: the release did not take place; what served before still does
    BadRelease           the directory is no release, or its files are not what its manifest says (exit code 2)
    NotLive              the server, or the directory, is not one that takes releases (exit code 2)
    LiveBusy             another release, rollback or start holds the live directory
    ServerRefused        tritonserver refused a request, or did not answer in time
    WrongAnswer          the staged models do not answer as the release's golden examples say
    NothingToRollBackTo  no previous release is resident (exit code 2)
    SourceUnavailable    the registry that is followed could not be asked
"""

from __future__ import annotations

from serving.errors import ServingError


class ReleaseError(ServingError):
    """The release did not take place; what served before still does."""


class BadRelease(ReleaseError):
    """The directory is no release, or its files are not what its manifest says."""

    exit_code = 2


class NotLive(ReleaseError):
    """The server, or the directory, is not one that takes releases."""

    exit_code = 2


class LiveBusy(ReleaseError):
    """Another release, rollback or start holds the live directory."""


class ServerRefused(ReleaseError):
    """tritonserver refused a request, or did not answer in time."""


class WrongAnswer(ReleaseError):
    """The staged models do not answer as the release's golden examples say."""


class NothingToRollBackTo(ReleaseError):
    """No previous release is resident."""

    exit_code = 2


class SourceUnavailable(ReleaseError):
    """The registry that is followed could not be asked."""
