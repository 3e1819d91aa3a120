"""training/mil/options.py"""

from __future__ import annotations

import subprocess
import sys

import pydantic
import pytest

from training.mil.options import BagOptions


def test_json_types_there_and_back() -> None:
    options = BagOptions(tiles=8, choice="random", encoder="frozen", views=3, dropout=0.5)
    assert BagOptions.model_validate(options.as_dict()) == options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tile": 4}, "tile\n  Extra inputs are not permitted"),
        ({"tiles": 0}, "greater than or equal to 1"),
        ({"tiles": "4"}, "valid integer"),
        ({"choice": "lightest"}, "'darkest' or 'random'"),
        ({"dropout": 1.0}, "less than 1"),
        ({"views": 2}, 'views are for encoder = "frozen"'),
    ],
)
def test_what_cannot_be_meant(values: dict[str, object], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        BagOptions.model_validate(values)


def test_torch_is_not_needed() -> None:
    code = "import sys, training.mil.options; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
