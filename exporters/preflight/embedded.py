"""What the embedded server of this checkout has: asked of `python -m serving backends` and read from its installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from exporters.errors import FormatError
from exporters.preflight.table import EMBEDDED, Container, Fact

_CHECKOUT = Path(__file__).resolve().parents[2]
_DISTRIBUTIONS = {"onnxruntime": "onnxruntime", "torch": "pytorch", "openvino": "openvino"}
_TIMEOUT_S = 60.0


def embedded_server() -> Container:
    """The embedded server that `python -m serving up` would start.

    Raises:
        FormatError: it is not installed, or a native tritonserver would be started in its place.
    """
    command = [sys.executable, "-m", "serving", "backends"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=_CHECKOUT, timeout=_TIMEOUT_S, check=False
        )
        told = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        raise FormatError(f"`python -m serving backends` gave no answer: {error}") from error
    if told.get("server") != EMBEDDED:
        why = done.stderr.strip().splitlines()
        raise FormatError(
            f"There is no embedded server to look at: {why[-1] if why else f'serving would start {told}'}. "
            "Run `python -m serving install`, or name a container."
        )
    home = Path(os.environ.get("CLOTLINE_TRITON_HOME") or _CHECKOUT / ".triton")
    said_by = "python -m serving backends"
    paths = _search_path(home)
    facts = {"triton": Fact(str(told["version"]), said_by)}
    if paths:
        facts["python"] = Fact(paths[0].parent.name.removeprefix("python"), str(paths[0]))
    for directory in reversed(paths):  # what comes first on the path wins
        for distribution, name in _DISTRIBUTIONS.items():
            for found in sorted(directory.glob(f"{distribution}-*.dist-info")):
                facts[name] = Fact(found.name.removesuffix(".dist-info").split("-")[1], str(found))
    return Container(
        EMBEDDED, "", True, facts, backends=frozenset({"ensemble", *told["backends"]}), modules=frozenset(),
        modules_source=str(paths[0]) if paths else said_by, search_path=paths,
    )  # fmt: skip


def _search_path(home: Path) -> list[Path]:
    """Where the Python of the server's stubs looks for modules: its own, then what its .pth files append."""
    paths = []
    for own in sorted((home / "python" / "lib").glob("python3.*/site-packages")):
        paths.append(own)
        for file in sorted(own.glob("*.pth")):
            lines = file.read_text("utf-8").splitlines()
            paths += [
                Path(line) for line in lines if line and not line.startswith(("import ", "import\t", "#"))
            ]
    return paths
