"""python -m exporters COMMAND

Checkpoints to releases: models for Triton that were shown to answer as PyTorch does. The last line of stdout is one
JSON document; `COMMAND --help` says more. Exit code: 0 done; 1 not done, because an artefact, a server or the disk
failed, or because something is not as it should be; 2 the request cannot be fulfilled; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from exporters.errors import ExportError
from exporters.interruption import interruptible
from training import commands
from training.commands import Command
from training.errors import TrackingError, TrainingError

COMMANDS = {
    "export": Command(
        "exporters.export_command", "write a checkpoint as a release or into a model repository"
    ),
    "verify": Command("exporters.verify_command", "find changed, missing and extra files of a release"),
    "preflight": Command("exporters.preflight", "say whether a release would load in a Triton container"),
    "register": Command(
        "exporters.registry.register_command", "register a release as a model version in MLflow"
    ),
    "alias": Command(
        "exporters.registry.alias_command", "let an alias point to a model version, and record it"
    ),
    "fetch-release": Command("exporters.registry.fetch_command", "copy a registered release to a directory"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        with interruptible():
            return commands.main(
                "python -m exporters",
                __doc__,
                COMMANDS,
                arguments,
                exit_code_of=exit_code_of,
                extras="export,track",
            )
    except KeyboardInterrupt:  # before the command began
        return 130


def exit_code_of(error: Exception) -> int | None:
    """Exit code of an error of ours, None of any other."""
    if isinstance(error, TrackingError):
        return 2 if isinstance(error, ValueError) else 1
    if isinstance(error, TrainingError):
        return 2  # all that an export asks of `training` is to read what it was given
    if isinstance(error, ExportError):
        return 2 if isinstance(error, ValueError) else 1
    return commands.exit_code_of(error)


if __name__ == "__main__":
    sys.exit(main())
