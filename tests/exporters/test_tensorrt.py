"""TensorRT: what is built is what was asked for, shown by the engine itself; and engines of another version are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.errors import DamagedArtifactError, FormatError, PrecisionError
from exporters.formats import formats_named, tensorrt
from exporters.formats.engine_file import (
    EngineVersion,
    check_engine_version,
    check_program,
    engine_program,
    engine_version,
)
from exporters.formats.interface import Answer, Network
from exporters.triton_config import OUTPUTS

WORDS = {"": "float", "-fp16": "half", "-int8": "int8"}


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="an extra of the exporters")


@pytest.fixture(scope="module")
def calibrated(network_of: Network) -> Network:
    grid = np.random.default_rng(1).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    return dataclasses.replace(network_of, calibration_NHWC=np.kron(grid, np.ones((1, 8, 8, 1), np.uint8)))


@pytest.fixture(scope="module")
def plans(rtx: Any, calibrated: Network) -> dict[str, Any]:
    """Artefact of each precision."""
    return {name: formats_named([f"tensorrt-rtx{name}"])[0].build(calibrated) for name in WORDS}


@pytest.mark.parametrize(("name", "kind"), [("", "FLOAT"), ("-fp16", "HALF"), ("-int8", "INT8")])
def test_the_built_engine_shows_the_precision_that_was_asked_for(
    name: str, kind: str, plans: dict[str, Any]
) -> None:
    notes, word = plans[name].notes, WORDS[name]
    assert set(notes["products_by_type"]) == {kind}
    assert set(notes["engine"]["products"]) == {f"{word} x {word}"}
    assert sum(notes["engine"]["products"].values()) >= 20  # the convolutions of a squeezenet
    assert set(notes["engine"]["weight_bytes"]) == {word}
    if not torch.cuda.is_available():
        assert notes["inspected"] is None


def test_weights_take_the_bytes_of_their_type(plans: dict[str, Any]) -> None:
    (fp32,), (fp16,), (int8,) = (plans[name].notes["engine"]["weight_bytes"].values() for name in WORDS)
    # Not exactly: constants below 4 kB are not counted, and those of fewer bytes are more often below.
    assert fp32 == pytest.approx(2 * fp16, rel=0.1)
    assert fp32 == pytest.approx(4 * int8, rel=0.1)
    assert plans[""].size_bytes > plans["-fp16"].size_bytes


def test_a_network_in_another_type_is_refused_before_it_is_built(
    rtx: Any, calibrated: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fmt,) = formats_named(["tensorrt-rtx-fp16"])
    monkeypatch.setattr(fmt, "_graph", lambda network: (network.onnx, {}))
    with pytest.raises(PrecisionError, match=r"compute in \{'FLOAT'"):
        fmt.build(calibrated)


@pytest.mark.parametrize("name", ["-fp16", "-int8"])
def test_an_engine_that_is_silently_fp32_is_refused(
    name: str, rtx: Any, calibrated: Network, plans: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder that is given FP16 or INT8 and hands back FP32, as one of the old precision flags does."""
    (fmt,) = formats_named([f"tensorrt-rtx{name}"])
    fp32 = plans[""].files["model.plan"]
    monkeypatch.setattr(tensorrt, "_built", lambda *args: (fp32, {"HALF": 26}))
    monkeypatch.setattr(fmt, "_graph", lambda network: (b"", {}))
    with pytest.raises(PrecisionError, match=r"keeps weights as \{'float': [0-9]+\}"):
        fmt.build(calibrated)


def test_an_engine_of_which_a_part_is_fp32_is_refused(plans: dict[str, Any]) -> None:
    program = engine_program(plans["-fp16"].files["model.plan"])
    assert program is not None
    check_program("x", "fp16", program)
    part = dataclasses.replace(program, products={**program.products, "float x float": 1})
    with pytest.raises(PrecisionError, match="float x float"):
        check_program("x", "fp16", part)


def test_an_engine_that_shows_nothing_proves_nothing(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PrecisionError, match="neither the engine's file nor an engine inspector"):
        tensorrt.proven(rtx, "x", "fp16", b"vtrt" + bytes(1000))


def test_the_inspector_is_held_to_the_same() -> None:
    layers = [{"Name": "conv", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]}]
    with pytest.raises(PrecisionError, match="no layer in fp16"):
        tensorrt.check_inspected("x", "fp16", layers)
    assert tensorrt.check_inspected("x", "fp32", layers) == {"Row major linear FP32": 1}


def test_the_version_is_read_from_the_file(rtx: Any, plans: dict[str, Any]) -> None:
    plan = plans[""].files["model.plan"]
    assert engine_version(plan) == EngineVersion("tensorrt_rtx", rtx.__version__)
    check_engine_version(plan, "tensorrt_rtx", rtx.__version__)
    assert engine_version(b"ftrt" + bytes(20) + bytes([10, 9, 0, 34])) == EngineVersion(
        "tensorrt", "10.9.0.34"
    )
    assert engine_version(b"ONNX" + bytes(40)) is None
    assert engine_version(b"ftrt") is None


def test_an_engine_of_another_version_is_refused_before_its_runtime_sees_it(
    rtx: Any, plans: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fmt,) = formats_named(["tensorrt-rtx"])
    monkeypatch.setattr(tensorrt, "deserialised", lambda *args: pytest.fail("the runtime saw it"))
    other = bytearray(plans[""].files["model.plan"])
    other[25] += 1
    (tmp_path / "model.plan").write_bytes(other)
    with pytest.raises(
        DamagedArtifactError, match=rf"built by tensorrt_rtx 1\.8.*, this is tensorrt_rtx {rtx.__version__}"
    ):
        fmt.open(tmp_path / "model.plan")
    (tmp_path / "model.plan").write_bytes(b"ftrt" + bytes(other[4:]))
    with pytest.raises(DamagedArtifactError, match=r"built by tensorrt 1\."):
        fmt.open(tmp_path / "model.plan")
    (tmp_path / "model.plan").write_bytes(b"nothing of the kind")
    with pytest.raises(DamagedArtifactError, match="no engine of tensorrt_rtx"):
        fmt.open(tmp_path / "model.plan")


def test_what_was_timed_is_kept_where_that_is_asked_for(
    rtx: Any, network_of: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fmt,) = formats_named(["tensorrt-rtx"])
    monkeypatch.setenv(tensorrt.TIMING_CACHE_VARIABLE, str(tmp_path / "timing.cache"))
    fmt.build(network_of)
    assert [path.name for path in tmp_path.iterdir()] == ["timing.cache"]
    monkeypatch.setenv(tensorrt.TIMING_CACHE_VARIABLE, str(tmp_path / "missing/timing.cache"))
    with pytest.raises(FormatError, match="cannot be used"):
        fmt.build(network_of)


class FakeEngine:
    """Stands in for an engine on a GPU, which this machine does not have; answers what it was asked, on the CPU."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()

    def create_execution_context(self) -> FakeEngine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], 2 if name == "probabilities" else 1)

    def get_tensor_dtype(self, name: str) -> str:
        return "DataType.INT64" if name == "label_index" else "DataType.FLOAT"

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        return set(self.addresses) == {"tiles", *OUTPUTS}


def test_an_engine_gets_its_shapes_and_addresses_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        cuda_stream = 0

        def synchronize(self) -> None: ...

    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    engine = FakeEngine()
    run = tensorrt.runner(engine, OUTPUTS)
    for batch in (1, 5):
        answer = run(np.zeros((batch, 8, 8, 3), np.uint8))
        assert isinstance(answer, Answer)
        assert answer.probabilities.shape == (batch, 2)
        assert (answer.confidence.shape, answer.confidence.dtype) == ((batch, 1), np.float32)
        assert answer.label_index.dtype == np.int64
    monkeypatch.setattr(engine, "execute_async_v3", lambda stream: False)
    with pytest.raises(RuntimeError, match="did not run"):
        run(np.zeros((1, 8, 8, 3), np.uint8))
