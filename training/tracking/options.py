"""What a command line says about tracking; everything here is known without MLflow and without a server."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import sys
import urllib.parse
from pathlib import Path

from training.errors import TrackingError, TrackingOptionsError

DEFAULT_URI = "sqlite:///runs/mlflow.db"
DEFAULT_EXPERIMENT = "clotline"
TRACKERS = ("mlflow", "tensorboard")
DATABASES = ("postgresql", "mysql", "mssql")

_ALIAS = re.compile(r"[A-Za-z0-9_-]{1,255}")
_VERSION_ALIAS = re.compile(r"[vV]\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Where a run is tracked.

    Attributes:
        trackers: some of TRACKERS, in that order; empty for none.
        uri: of the MLflow store, absolute where it is a file; "" without MLflow.
        uri_told: the URI was given and is no default: a resumed run moves to it.
        experiment: MLflow's name for a group of runs.
        register: name in MLflow's model registry under which the checkpoint becomes a version; None for not at all.
    """

    trackers: tuple[str, ...] = ()
    uri: str = ""
    uri_told: bool = False
    experiment: str = DEFAULT_EXPERIMENT
    register: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --track, --tracking-uri, --experiment and --register."""
    group = parser.add_argument_group("tracking")
    group.add_argument(
        "--track",
        metavar="TRACKERS",
        help="mlflow, tensorboard, both with a comma, or none (default: mlflow where it is installed)",
    )
    group.add_argument(
        "--tracking-uri",
        metavar="URI",
        help=f"MLflow store: sqlite:///FILE, http(s)://HOST:PORT, postgresql://... (default: MLFLOW_TRACKING_URI, or {DEFAULT_URI})",
    )
    group.add_argument(
        "--experiment",
        metavar="NAME",
        default=DEFAULT_EXPERIMENT,
        help="group of runs in MLflow (default: %(default)s)",
    )
    group.add_argument(
        "--register",
        metavar="NAME",
        help="make the checkpoint a version of this model in MLflow's registry, with the alias challenger",
    )


def read_options(arguments: argparse.Namespace) -> TrackingOptions:
    """Check what was said; needs no server, and gives the same on every process.

    Raises:
        TrackingOptionsError: an unknown tracker, one that is not installed, a URI that MLflow 3 cannot use, a name that
            its registry refuses, `--register` without MLflow.
    """
    trackers = _trackers(arguments.track)
    if "mlflow" not in trackers:
        for flag, value in (
            ("--register", arguments.register),
            ("--tracking-uri", arguments.tracking_uri),
        ):
            if value and arguments.track is not None:
                raise TrackingOptionsError(
                    f"{flag} {value} needs MLflow, but --track is {arguments.track}; use --track mlflow"
                )
        return TrackingOptions(trackers=trackers)
    if not arguments.experiment or len(arguments.experiment) > 500:
        raise TrackingOptionsError(
            f"--experiment must have 1 to 500 characters, not {len(arguments.experiment)}"
        )
    if arguments.register is not None:
        check_model_name(arguments.register)
    return TrackingOptions(
        trackers=trackers,
        uri=resolve_uri(arguments.tracking_uri),
        uri_told=arguments.tracking_uri is not None,
        experiment=arguments.experiment,
        register=arguments.register,
    )


def _trackers(told: str | None) -> tuple[str, ...]:
    if told is None:
        if importlib.util.find_spec("mlflow") is not None:
            return ("mlflow",)
        if os.environ.get("RANK", "0") == "0":
            print(
                'mlflow is not installed, this run is not tracked (pip install "clotline[track]")',
                file=sys.stderr,
            )
        return ()
    names = [name.strip() for name in told.split(",")]
    unknown = [name for name in names if name not in (*TRACKERS, "none")]
    if unknown or ("none" in names and len(names) > 1):
        raise TrackingOptionsError(
            f"--track {told!r} is not known; use {', '.join(TRACKERS)}, {','.join(TRACKERS)} or none"
        )
    chosen = tuple(name for name in TRACKERS if name in names)
    for name in chosen:
        if importlib.util.find_spec(name) is None:
            raise TrackingOptionsError(
                f'--track {name}: the package {name} is not installed; pip install "clotline[track]"'
            )
    return chosen


def resolve_uri(told: str | None) -> str:
    """The URI told, MLFLOW_TRACKING_URI or DEFAULT_URI, a file's path made absolute.

    Raises:
        TrackingOptionsError: MLflow 3 cannot use it, or it holds a password in an http URI.
    """
    source = "--tracking-uri"
    if told is None:
        told, source = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI, "MLFLOW_TRACKING_URI"
    uri = told.strip()
    scheme, _, rest = uri.partition(":")
    engine = scheme.lower().split("+")[0]
    usable = f"use {DEFAULT_URI}, sqlite:////absolute/path.db or http://HOST:PORT"
    if engine == "sqlite":
        if not rest.startswith("///") or rest == "///" or rest.startswith("///:memory:"):
            raise TrackingOptionsError(f"{source} {uri!r} names no file; {usable}")
        if any(character in rest for character in "?#%"):
            raise TrackingOptionsError(
                f"{source} {uri!r}: a path with ?, # or % cannot be told apart from options; {usable}"
            )
        return f"{scheme.lower()}:///{Path(rest[3:]).expanduser().absolute()}"
    if engine in ("http", "https"):
        try:
            parts = urllib.parse.urlsplit(uri)
            host, _ = parts.hostname, parts.port  # reading a port that is no number raises
        except ValueError as error:
            raise TrackingOptionsError(f"{source} {redacted(uri)!r} is no URL: {error}; {usable}") from None
        if not rest.startswith("//") or not host or any(character.isspace() for character in uri):
            raise TrackingOptionsError(f"{source} {redacted(uri)!r} names no host; {usable}")
        if parts.username or parts.password:
            raise TrackingOptionsError(
                f"{source} {redacted(uri)!r} holds credentials, which would end up in records and logs; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) instead"
            )
        return uri.rstrip("/")
    if engine in DATABASES and rest.startswith("//"):
        return uri
    if engine == "databricks":
        return uri
    if engine == "file" or "://" not in uri:
        raise TrackingOptionsError(
            f"{source} {uri!r}: MLflow 3 no longer keeps runs in plain folders; {usable}"
        )
    raise TrackingOptionsError(
        f"{source} {redacted(uri)!r}: MLflow has no store of scheme {scheme!r}; {usable}"
    )


def redacted(uri: str) -> str:
    """The URI with *** in place of a password."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", uri)


def sqlite_path(uri: str) -> Path | None:
    """The database file of a URI of `resolve_uri`, None for a server."""
    scheme, _, rest = uri.partition(":///")
    return Path(rest) if scheme.split("+")[0] == "sqlite" else None


def prepare_store(uri: str) -> None:
    """Make the folder of a SQLite store.

    Raises:
        TrackingError: it cannot be made or written to, or the file is no SQLite database.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise TrackingError(
                f"the tracking store {path} is a folder; name a file, such as {path}/mlflow.db"
            )
        if path.exists():
            with path.open("rb") as stream:
                head = stream.read(16)
            if head and head != b"SQLite format 3\x00":
                raise TrackingError(f"the tracking store {path} is no SQLite database; name another file")
    except OSError as error:
        raise TrackingError(
            f"the tracking store {path} cannot be used: {error}; name another file with --tracking-uri"
        ) from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise TrackingError(
            f"the tracking store {path} cannot be written to; name another with --tracking-uri"
        )


def check_model_name(name: str) -> None:
    """Raise TrackingOptionsError for a name that MLflow's registry refuses."""
    if (
        not name.strip()
        or any(character in name for character in "/:%\\@'\"`")
        or len(name) > 256
        or not name.isprintable()
        or name in (".", "..")
    ):
        raise TrackingOptionsError(
            f"the registry cannot take the model name {name!r}: 1 to 256 characters without / : % @ \\ and quotes, such as clotline"
        )


def check_alias(alias: str) -> None:
    """Raise TrackingOptionsError for an alias that MLflow's registry refuses."""
    if not _ALIAS.fullmatch(alias) or alias.lower() == "latest" or _VERSION_ALIAS.fullmatch(alias):
        raise TrackingOptionsError(
            f"the registry cannot take the alias {alias!r}: letters, digits, _ and -, neither latest nor like v3; "
            "such as champion or challenger"
        )
