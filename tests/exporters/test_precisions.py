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
import torch

from exporters import acceptance
from exporters.acceptance import Speed, judge
from exporters.comparison_tiles import Truth, calibration_tiles, comparison_tiles
from exporters.errors import (
    DamagedArtifactError,
    FormatError,
    GoldenTilesError,
    ParityError,
    RefusedError,
    UnavailableError,
)
from exporters.formats import formats_named
from exporters.formats.folded_normalisation import fold_normalisation
from exporters.formats.interface import Answer, Artifact, Network
from exporters.formats.onnx_int8 import has_vnni
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
    assert floating[:2] == ["Transpose", "Conv"]  # the tile's bytes go into the first convolution as they are
    assert artifact.notes["folded_normalisation"]
    assert not {"Cast", "Mul", "Sub"} & set(operators)
    assert artifact.notes["onnx"] == {"opset": 18, "ir_version": 10}
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


def test_missing_normalisation_is_stopped_in_int8_too(
    calibrated: Network, tiles_NHWC: np.ndarray, expected: Answer, tmp_path: Path
) -> None:
    raw = dataclasses.replace(calibrated, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    run = opened("onnx-int8", formats_named(["onnx-int8"])[0].build(raw), tmp_path)
    with pytest.raises(ParityError):
        check_parity("onnx-int8", run, tiles_NHWC, expected, max_batch=8, precision="int8")


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
        acceptance, "measure_speed", lambda *args, **named: Speed(8, 100.0 * ratio, 100.0, "this CPU")
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
        export_checkpoint(source, repository, ["onnx-fp16"], served=False)
    assert not repository.exists()
    release = export_checkpoint(source, repository, ["onnx", "onnx-fp16"], served=False)
    assert release.formats["onnx-fp16"].acceptance.status == "unproven"
    assert not (repository / "tile_network_onnx_fp16").exists()
    export_checkpoint(source, repository, ["onnx", "onnx-fp16"], publish_unproven=True, served=False)
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
        export_checkpoint(checkpoint_dir, tmp_path / "models", ["onnx", "onnx-int8"], served=False)


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


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_folded_normalisation_changes_nothing_but_the_rounding_of_the_border(padding: int) -> None:
    import onnxruntime
    from torch import nn

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, bias=padding != 1), nn.ReLU(), nn.Flatten())
    backbone.append(nn.Linear(4 * (14 + 2 * padding) ** 2, 2)).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    network = Network(backbone, mean, std, 16)
    model = onnx.load_from_string(network.onnx)
    assert fold_normalisation(model, mean, std) == 114
    onnx.checker.check_model(model, full_check=True)
    tiles = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    before, after = (
        onnxruntime.InferenceSession(written).run(None, {"tiles": tiles})[0]
        for written in (network.onnx, model.SerializeToString())
    )
    # A border that is not rounded to a whole byte would be 0.3 of 58 levels away.
    assert np.abs(before - after).max() <= (1e-6 if padding == 0 else 3e-3)
    assert np.ptp(before) > 0.01


def test_what_does_not_begin_with_a_convolution_is_left_as_it_is() -> None:
    from torch import nn

    network = Network(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval(), (0.5,) * 3, (0.2,) * 3, 4)
    model = onnx.load_from_string(network.onnx)
    assert fold_normalisation(model, network.mean, network.std) is None
    assert model.SerializeToString(deterministic=True) == network.onnx


@pytest.mark.parametrize(
    "names", [("CPUExecutionProvider",), ("CUDAExecutionProvider", "CPUExecutionProvider")]
)
def test_fp16_and_what_it_has_to_beat_run_on_the_same_device(
    names: tuple[str, ...], calibrated: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    (tmp_path / "model.onnx").write_bytes(calibrated.onnx)
    asked = []

    class Session:
        """Notes the providers asked for; this machine has no CUDA."""

        def __init__(self, path: str, options: Any, providers: list[str]) -> None:
            asked.append(providers)

        def get_providers(self) -> list[str]:
            return list(names)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(names))
    (fmt,) = formats_named(["onnx-fp16"])
    fmt.open(tmp_path / "model.onnx")
    fmt.open_baseline(tmp_path / "model.onnx")
    assert asked == [[names[0]], [names[0]]]
    assert (fmt.unproven_here() is None) == (names[0] == "CUDAExecutionProvider")


def test_cuda_that_does_not_start_is_not_replaced_by_the_cpu(
    calibrated: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    (tmp_path / "model.onnx").write_bytes(calibrated.onnx)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(DamagedArtifactError, match=r"CUDAExecutionProvider"):
        formats_named(["onnx-fp16"])[0].open(tmp_path / "model.onnx")
