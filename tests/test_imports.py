"""Imports go one way (CONTRIBUTING.md), and nothing heavy is loaded where it is not wanted."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"slides", "training", "exporters", "serving", "clients", "demo", "perf", "deploy"}
MAY_IMPORT = {
    "slides": set(),
    "training": {"slides"},
    "exporters": {"slides", "training"},
    "serving": {"slides"},
    "clients": {"slides"},
    "model_repository": {"slides"},
    "perf": {"slides", "clients", "serving", "training", "exporters"},
    "deploy": {"slides", "clients", "serving", "perf"},
    "demo": OURS,
}
NEVER = {
    "slides": {"torch", "torchvision", "pydantic", "tritonclient", "onnxruntime"},
    "clients": {"torch", "torchvision", "onnxruntime"},
    "serving": {"torch", "torchvision", "onnxruntime"},
    "deploy": {"torch", "torchvision", "onnxruntime", "mlflow"},
}
RUNS_IN_THE_SERVER = ROOT / "serving" / "backends"


def imported(path: Path) -> set[str]:
    """First components of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        names = imported(path)
        wrong = (names & OURS) - MAY_IMPORT[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
        if not path.is_relative_to(RUNS_IN_THE_SERVER):
            assert not names & NEVER.get(package, set()), f"{path.relative_to(ROOT)} imports {names}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("slides.decode", ("torch", "openslide", "tifffile")),
        ("clients", ("torch",)),
        ("clients.slide_client", ("torch",)),
        ("perf.bench", ("torch", "onnxruntime")),
        ("exporters.preflight", ("torch", "onnx", "tritonclient", "matplotlib")),
        ("serving.releases.release_command", ("torch", "tritonclient", "onnx")),
        ("deploy.access_metrics", ("torch", "tritonclient", "cv2")),
        ("serving.launcher", ("torch", "gevent", "tritonclient")),
        ("training.train", ("sklearn", "scipy", "pandas", "mlflow")),
        ("exporters.parity", ("sklearn", "scipy", "pandas")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
