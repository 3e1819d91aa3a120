from __future__ import annotations

import inspect
import pickle

import pytest

from slides import errors


def test_one_root() -> None:
    kinds = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == "slides.errors"
    ]
    assert len(kinds) >= 9
    assert all(issubclass(kind, errors.SlidesError) for kind in kinds)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds), (
        "the tree in the docstring names all"
    )


@pytest.mark.parametrize(
    "error", [errors.LabelsError("train.csv", ["a", "b"]), errors.TileDecodeError("empty", "no bytes")]
)
def test_errors_come_back_from_another_process_unchanged(error: errors.SlidesError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  (our own bytes; worker processes send errors so)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
