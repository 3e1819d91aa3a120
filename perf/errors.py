"""Errors of `perf`:

PerfError
├── PerfInputError      what was asked for or given cannot be measured (exit code 2)
├── AnalyzerError       perf_analyzer cannot be installed or failed
└── LoadError           the server refused, broke off, or answered wrongly
"""

from __future__ import annotations


class PerfError(Exception):
    """Root of the tree; the message says what would work."""


class PerfInputError(PerfError, ValueError):
    """A value, file or model that cannot be measured."""


class AnalyzerError(PerfError):
    """perf_analyzer cannot be installed, or its run failed."""


class LoadError(PerfError):
    """Under load the server refused a request, broke a connection, or gave an answer that is not the limit's."""
