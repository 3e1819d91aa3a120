"""Lower precisions: what they are calibrated and compared with, when they are accepted, and which faults are caught."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters import acceptance
from exporters.acceptance import Speed, judge
from exporters.comparison_tiles import Truth, calibration_tiles, comparison_tiles
from exporters.errors import (
    DamagedArtifactError,
    FormatError,
    GoldenTilesError,
    ParityError,
    PrecisionError,
    RefusedError,
    UnavailableError,
)
from exporters.formats import formats_named, onnx_int8
from exporters.formats.interface import Answer, Artifact, Network
from exporters.formats.onnx_int8 import has_vnni
from exporters.formats.tensorrt import check_inspected
from exporters.parity import Parity, check_parity, problems_of, reference_answer
from exporters.release import export_checkpoint
from exporters.tolerances import TOLERANCES
from slides.decode import encode_tile
from training import checkpoint

SIZE_PX = 64
MakeCheckpoint = Callable[..., Path]


def blotches(count: int, seed: int) -> np.ndarray:
    """uint8 [count, 64, 64, 3]."""
    grid = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return np.kron(grid, np.ones((1, 8, 8, 1), np.uint8))


@pytest.fixture(scope="module")
def calibrated(network_of: Network) -> Network:
    return dataclasses.replace(network_of, calibration_NHWC=blotches(32, seed=1))


@pytest.fixture(scope="module")
def tiles_NHWC() -> np.ndarray:
    return blotches(32, seed=2)


@pytest.fixture(scope="module")
def expected(loaded: checkpoint.Checkpoint, tiles_NHWC: np.ndarray) -> Answer:
    return reference_answer(loaded.model, tiles_NHWC)


def opened(name: str, artifact: Artifact, directory: Path) -> Any:
    (fmt,) = formats_named([name])
    for filename, content in artifact.files.items():
        (directory / filename).write_bytes(content)
    return fmt.open(directory / fmt.artifact_filename)


@pytest.mark.parametrize("name", ["onnx-fp16", "onnx-int8", "openvino", "openvino-bf16", "openvino-int8"])
def test_a_lower_precision_follows_pytorch_at_every_batch(
    name: str, calibrated: Network, tiles_NHWC: np.ndarray, expected: Answer, tmp_path: Path
) -> None:
    if name.startswith("openvino"):
        pytest.importorskip("openvino", reason="an extra of the exporters")
    (fmt,) = formats_named([name])
    fmt.require()
    artifact = fmt.build(calibrated)
    run = opened(name, artifact, tmp_path)
    measured = check_parity(name, run, tiles_NHWC, expected, max_batch=8, precision=fmt.precision)
    assert measured.batches == (1, 2, 8)
    if fmt.baseline is not None:
        (fp32,) = formats_named([fmt.baseline])
        assert artifact.size_bytes < fp32.build(calibrated).size_bytes


def test_int8_is_int8_with_a_scale_a_channel_and_says_how_it_was_calibrated(calibrated: Network) -> None:
    artifact = formats_named(["onnx-int8"])[0].build(calibrated)
    model = onnx.load_from_string(artifact.files["model.onnx"])
    operators = [node.op_type for node in model.graph.node]
    assert "QuantizeLinear" in operators
    floating = [name for name in operators if name not in ("QuantizeLinear", "DequantizeLinear")]
    assert floating[:5] == ["Transpose", "Cast", "Mul", "Add", "Conv"]
    assert operators.index("QuantizeLinear") > operators.index("Add")  # normalisation stays FP32
    weights = [
        t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    ]
    scales = {t.name: t for t in model.graph.initializer}
    assert weights
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in {t.name for t in weights}:
            assert list(scales[node.input[1]].dims) == [scales[node.input[0]].dims[0]]
    notes = artifact.notes
    assert set(notes["divergence"]) == {"MinMax", "Entropy", "Percentile"}
    assert notes["divergence"][notes["calibration"]] == min(notes["divergence"].values())
    assert (notes["calibration_tiles"], notes["choice_tiles"]) == (24, 8)


def test_weights_get_seven_bits_without_vnni(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu avx2 avx512f\n")
    assert not has_vnni(cpuinfo)
    cpuinfo.write_text("processor : 0\nflags : fpu avx512_vnni\n")
    assert has_vnni(cpuinfo)


def test_int8_calibrated_on_noise_is_stopped(
    network_of: Network, tiles_NHWC: np.ndarray, expected: Answer, tmp_path: Path
) -> None:
    noise = np.random.default_rng(3).integers(118, 138, (32, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    artifact = formats_named(["onnx-int8"])[0].build(dataclasses.replace(network_of, calibration_NHWC=noise))
    with pytest.raises(ParityError, match=r"differ from PyTorch|follow PyTorch"):
        check_parity(
            "onnx-int8", opened("onnx-int8", artifact, tmp_path), tiles_NHWC, expected,
            max_batch=8, precision="int8",
        )  # fmt: skip


def test_missing_normalisation_is_stopped_in_int8_too(
    calibrated: Network, tiles_NHWC: np.ndarray, expected: Answer, tmp_path: Path
) -> None:
    raw = dataclasses.replace(calibrated, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    run = opened("onnx-int8", formats_named(["onnx-int8"])[0].build(raw), tmp_path)
    with pytest.raises(ParityError):
        check_parity("onnx-int8", run, tiles_NHWC, expected, max_batch=8, precision="int8")


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_weights_of_another_epoch_are_stopped(
    name: str, make_checkpoint: MakeCheckpoint, tiles_NHWC: np.ndarray, expected: Answer, tmp_path: Path
) -> None:
    if name == "openvino":
        pytest.importorskip("openvino", reason="an extra of the exporters")
    other = checkpoint.load(make_checkpoint(seed=1))
    network = Network(other.model.backbone, other.spec.mean, other.spec.std, other.spec.input_size_px)
    run = opened(name, formats_named([name])[0].build(network), tmp_path)
    with pytest.raises(ParityError, match="differ from PyTorch"):
        check_parity(name, run, tiles_NHWC, expected, max_batch=8)


def test_missing_weights_beside_the_file_are_named(calibrated: Network, tmp_path: Path) -> None:
    model = onnx.load_from_string(calibrated.onnx)
    onnx.save_model(
        model,
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(DamagedArtifactError, match=r"model\.onnx"):
        formats_named(["onnx"])[0].open(tmp_path / "model.onnx")


def test_too_few_tiles_prove_no_lower_precision(tiles_NHWC: np.ndarray, expected: Answer) -> None:
    few = Answer(*(column[:8] for column in expected))
    with pytest.raises(GoldenTilesError, match="at least 32 tiles"):
        check_parity("x", lambda tiles: few, tiles_NHWC[:8], few, max_batch=8, precision="int8")


def test_what_patients_lose_is_measured_and_limited(tiles_NHWC: np.ndarray, expected: Answer) -> None:
    labels = tuple(("CE", "LAA")[k] for k in expected.label_index[:, 0])
    ids = tuple(f"p{number}" for number in range(32))
    truth = Truth(("CE", "LAA"), labels, ids, ids)
    where = {tile.tobytes(): number for number, tile in enumerate(tiles_NHWC)}

    def run(tiles: np.ndarray) -> Answer:
        rows = [where[tile.tobytes()] for tile in tiles]
        return Answer(*(column[rows] for column in expected))

    measured = check_parity("x", run, tiles_NHWC, expected, max_batch=2, precision="int8", truth=truth)
    assert measured.patients == 32
    if len(set(labels)) == 2:
        assert measured.patient_auc == (1.0, 1.0)
    assert measured.log_snr_db is None
    worse = dataclasses.replace(
        measured, label_flips=1, patient_auc=(0.9, 0.89), patient_log_loss=(0.2, 0.3), log_snr_db=3.0
    )
    said = "; ".join(problems_of(worse, TOLERANCES["int8"]))
    for part in ("1 labels of 32", "falls from 0.9000 to 0.8900", "rises from 0.2000 to 0.3000", "3.0 dB"):
        assert part in said


def parity(**changes: Any) -> Parity:
    return dataclasses.replace(
        Parity("int8", 64, (1, 2, 8), 0.01, 0.1, 0.001, 30.0, 0, 32, (0.9, 0.9), (0.3, 0.3)), **changes
    )


@pytest.mark.parametrize(
    ("ratio", "size_bytes", "message"), [(0.9, 10, "is not faster"), (3.0, 200, "is not smaller")]
)
def test_what_is_not_worth_its_loss_is_refused_with_the_figures(
    ratio: float, size_bytes: int, message: str, monkeypatch: pytest.MonkeyPatch, tiles_NHWC: np.ndarray
) -> None:
    monkeypatch.setattr(
        acceptance, "compare_speed", lambda *args, **named: Speed(8, 100.0 * ratio, 100.0, "this CPU")
    )
    (fmt,) = formats_named(["onnx-int8"])
    with pytest.raises(RefusedError, match=message):
        judge(fmt, Artifact({"model.onnx": b"x" * size_bytes}), parity(), run=print,  # type: ignore[arg-type]
              baseline=(Artifact({"model.onnx": b"x" * 100}), print),  # type: ignore[arg-type]
              tiles_NHWC=tiles_NHWC, max_batch=8)  # fmt: skip


def test_what_this_machine_cannot_show_is_unproven(tiles_NHWC: np.ndarray) -> None:
    (fmt,) = formats_named(["onnx-fp16"])
    found = judge(fmt, Artifact({"model.onnx": b"x"}), parity(precision="fp16", patient_auc=None), run=None,
                  baseline=(Artifact({"model.onnx": b"xx"}), None), tiles_NHWC=tiles_NHWC, max_batch=8)  # fmt: skip
    assert found.status == "unproven"
    assert any("labels" in reason for reason in found.reasons)


def test_unproven_formats_are_published_only_by_name_and_never_first(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, repository = make_checkpoint(tiles=32), tmp_path / "models"
    with pytest.raises(ParityError, match="onnx-fp16 cannot be tile_classifier"):
        export_checkpoint(source, repository, ["onnx-fp16"])
    assert not repository.exists()
    release = export_checkpoint(source, repository, ["onnx", "onnx-fp16"])
    assert release.formats["onnx-fp16"].acceptance.status == "unproven"
    assert not (repository / "tile_network_onnx_fp16").exists()
    export_checkpoint(source, repository, ["onnx", "onnx-fp16"], publish_unproven=True)
    written = json.loads((repository / "tile_classifier_onnx_fp16/2/release.json").read_text())
    assert written["acceptance"]["status"] == "unproven"
    assert "clotline_unproven" in (repository / "tile_classifier_onnx_fp16/config.pbtxt").read_text()


def test_calibration_never_sees_held_out_tiles(loaded: checkpoint.Checkpoint, tmp_path: Path) -> None:
    for tile in loaded.golden_tiles:
        (tmp_path / f"{tile.image_id}.jpg").write_bytes(tile.data)
    with pytest.raises(GoldenTilesError, match="6 of them held-out tiles"):
        calibration_tiles(loaded, tmp_path)
    for number, tile in enumerate(blotches(20, seed=4)):
        (tmp_path / f"{number}.jpg").write_bytes(encode_tile(tile, 90))
    assert calibration_tiles(loaded, tmp_path).shape == (20, SIZE_PX, SIZE_PX, 3)


def test_a_data_set_is_divided_by_patient(loaded: checkpoint.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    rows = ["image_id,center_id,patient_id,image_num,label"]
    for number, tile in enumerate(blotches(24, seed=5)):
        rows.append(f"q{number}_0,1,q{number},0,{('CE', 'LAA')[number % 2]}")
        (tmp_path / "train" / f"q{number}_0.jpg").write_bytes(encode_tile(tile, 90))
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    data = {"held_out_patients": [f"q{number}" for number in range(6)]}
    source = dataclasses.replace(loaded, manifest={**loaded.manifest, "data": data})
    held_out = comparison_tiles(source, tmp_path)
    assert held_out.truth.patients_N == tuple(f"q{number}" for number in range(6))
    assert len(calibration_tiles(source, tmp_path)) == 18


def test_int8_without_calibration_tiles_is_bad_usage(checkpoint_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="--calibration-tiles"):
        export_checkpoint(checkpoint_dir, tmp_path / "models", ["onnx", "onnx-int8"])


def test_a_format_that_cannot_be_built_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, needs in (
        ("tensorrt-fp16", "container"),
        ("tensorrt-rtx", "pip install tensorrt-rtx-cu13"),
        ("openvino", "pip install openvino"),
    ):
        with pytest.raises(UnavailableError, match=needs):
            formats_named([name])[0].require()


@pytest.mark.parametrize(("name", "kind"), [("", "FLOAT"), ("-fp16", "HALF"), ("-int8", "INT8")])
def test_tensorrt_rtx_builds_in_the_precision_asked_for(name: str, kind: str, calibrated: Network) -> None:
    pytest.importorskip("tensorrt_rtx", reason="an extra of the exporters")
    artifact = formats_named([f"tensorrt-rtx{name}"])[0].build(calibrated)
    assert set(artifact.notes["products_by_type"]) == {kind}
    assert artifact.size_bytes > 100_000


def test_a_plan_that_is_silently_fp32_is_refused(
    calibrated: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="an extra of the exporters")
    (fmt,) = formats_named(["tensorrt-rtx-fp16"])
    monkeypatch.setattr(fmt, "_graph", lambda network: (network.onnx, {}))
    with pytest.raises(PrecisionError, match=r"compute in \{'FLOAT'"):
        fmt.build(calibrated)
    layers = [{"Name": "conv", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]}]
    with pytest.raises(PrecisionError, match="no layer in fp16"):
        check_inspected("x", "fp16", layers)
    assert check_inspected("x", "fp32", layers) == {"Row major linear FP32": 1}


def test_the_same_network_gives_the_same_bytes(calibrated: Network) -> None:
    again = dataclasses.replace(calibrated)
    assert again.onnx == calibrated.onnx
    assert onnx_int8.quantise(again)[0] == onnx_int8.quantise(calibrated)[0]
