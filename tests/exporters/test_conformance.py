"""Two architectures through the gate, in process and through one tritonserver, by the one command that does all of them."""

from __future__ import annotations

import json

import pytest

from exporters.conformance import main


def test_two_architectures_pass_in_both_formats_and_are_served(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--architectures", "resnet18,efficientnet_b0", "--size-px", "64", "--max-batch", "16"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    document = json.loads(captured.out.splitlines()[-1])
    assert [(pair["architecture"], pair["format"]) for pair in document["pairs"]] == [
        ("resnet18", "onnx"),
        ("resnet18", "torchscript"),
        ("efficientnet_b0", "onnx"),
        ("efficientnet_b0", "torchscript"),
    ]
    for pair in document["pairs"]:
        assert pair["batches"] == [1, 2, 16]
        assert pair["max_abs_diff"] <= 1e-4
        assert max(pair["served"]["http"], pair["served"]["grpc"]) <= 1e-4
    assert "resnet18 as onnx: max |dp|" in captured.err


def test_an_unsupported_pair_is_refused_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--formats", "onnx-fp16", "--size-px", "64", "--max-batch", "2", "--without-server"]
    assert main(["--architectures", "resnet18", *more]) in (0, 1)
    captured = capsys.readouterr()
    (pair,) = json.loads(captured.out.splitlines()[-1])["pairs"]
    assert "at least 32 tiles" in pair["refused"]
    assert pair["refused"] in captured.err


def test_what_cannot_be_asked_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--architectures", "no_such_network"]) == 2
    assert "no_such_network" in capsys.readouterr().err
    assert main(["--formats", "onnx,coreml"]) == 2
    assert "coreml" in capsys.readouterr().err
    assert main(["--max-batch", "0"]) == 2
    assert "max_batch" in capsys.readouterr().err
    assert main(["--architectures", "squeezenet1_1", "--size-px", "64"]) == 2
    assert "linear layer" in capsys.readouterr().err
