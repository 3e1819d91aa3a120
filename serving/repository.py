"""What can be said of a model repository before a server reads it."""

from __future__ import annotations

import os
from pathlib import Path

from serving.errors import RepositoryError

HOW_TO_EXPORT = (
    "export one: python -m exporters export runs/x/checkpoint --repository DIR --formats onnx,torchscript"
)


def check_repository(repository: Path) -> Path:
    """Resolve the path of a model repository that holds at least one model with a config.pbtxt.

    Raises RepositoryError if it is missing, not a directory, not readable, empty, or a model has no version.
    """
    if not repository.exists():
        raise RepositoryError(f"model repository {repository} does not exist; {HOW_TO_EXPORT}")
    if not repository.is_dir():
        raise RepositoryError(f"model repository {repository} is not a directory; {HOW_TO_EXPORT}")
    try:
        entries = sorted(entry for entry in repository.iterdir() if entry.is_dir())
        configured = [entry for entry in entries if (entry / "config.pbtxt").exists()]
        for model in configured:
            if not os.access(model / "config.pbtxt", os.R_OK):
                raise RepositoryError(f"{model / 'config.pbtxt'} is not readable; check its permissions.")
            versions = [v for v in model.iterdir() if v.is_dir() and v.name.isdigit()]
            if not versions:
                raise RepositoryError(f"model {model} has no version directory (1, 2, ...); export it again.")
    except OSError as error:
        raise RepositoryError(f"model repository {repository} is not readable: {error.strerror}.") from error
    if not configured:
        found = (
            f"only {', '.join(e.name for e in entries)} without a config.pbtxt" if entries else "no directory"
        )
        raise RepositoryError(f"model repository {repository} holds no model ({found}); {HOW_TO_EXPORT}")
    return repository.resolve()
