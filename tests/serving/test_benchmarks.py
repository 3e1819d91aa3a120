"""Benchmarks that are asked for what the repository does not serve say so: no error of a client library."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import run_module


@pytest.mark.parametrize("bench", ["kills", "bad-requests"])
def test_a_repository_without_a_tile_classifier_is_refused(bench: str, tiny_repository: Path) -> None:
    done = run_module("serving.benchmarks", bench, "--repository", tiny_repository)
    assert done.returncode == 1
    assert "--repository serves no tile_classifier, which is to be asked" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("wrong", [("--slides", "9"), ("--rounds", "0"), ("--concurrency", "0")])
def test_kills_that_cannot_be_meant_are_refused(wrong: tuple[str, str], tiny_repository: Path) -> None:
    done = run_module("serving.benchmarks", "kills", "--repository", tiny_repository, *wrong)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --rounds and --concurrency must be 1 or more")
