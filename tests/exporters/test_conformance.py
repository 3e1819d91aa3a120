"""Two architectures through the gate by the one command that does all of them."""

from __future__ import annotations

import json

import pytest

from exporters.conformance import main


def test_two_architectures_pass_in_both_formats(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--architectures", "resnet18,vit_b_16", "--size-px", "64", "--max-batch", "4"])
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert code == 0, captured.err
    assert [(pair["architecture"], pair["format"]) for pair in document["pairs"]] == [
        ("resnet18", "onnx"),
        ("resnet18", "torchscript"),
        ("vit_b_16", "onnx"),
        ("vit_b_16", "torchscript"),
    ]
    assert all(pair["max_abs_diff"] <= 1e-4 for pair in document["pairs"])


def test_what_does_not_fit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--architectures", "no_such_network"]) == 2
    assert "no_such_network" in capsys.readouterr().err
