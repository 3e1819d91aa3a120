"""Three tiny releases whose answers cannot be mistaken for one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.benchmarks.tiny_release import make_release


@pytest.fixture(scope="session")
def tiny_releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`a`; `b`, of another input size, batch and formats; `c`, of other classes. In a path with a space. Not to be written to."""
    top = tmp_path_factory.mktemp("tiny releases")
    return {
        "a": make_release(top / "a", bias=-1.0),
        "b": make_release(top / "b", bias=1.0, input_px=48, max_batch=8, formats=("onnx", "second")),
        "c": make_release(top / "c", bias=2.0, class_names=("CE", "LAA", "other")),
    }
