"""Verdicts about NVIDIA's containers, from files made for each rule."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from exporters.errors import FormatError, ReleaseVersionError
from exporters.preflight.findings import DOES_NOT_LOAD, LOADS, NOTE, UNKNOWN
from exporters.preflight.report import as_json, as_text, preflight
from exporters.preflight.repository import ModelReport

GPU = "KIND_GPU"


def only(repository: Any, tag: str, **words: Any) -> ModelReport:
    """The report of the one model."""
    (report,) = preflight(repository.root, tag, **words).models
    return report


def texts(report: ModelReport, kind: str) -> str:
    return " | ".join(finding.text for finding in report.findings if finding.kind == kind)


@pytest.mark.parametrize(
    ("tag", "ir_version", "opset", "verdict"),
    [
        ("24.08", 10, 21, LOADS),
        ("24.08", 11, 18, DOES_NOT_LOAD),
        ("25.07", 10, 23, DOES_NOT_LOAD),
        ("25.08", 11, 23, UNKNOWN),  # a commit between 1.22 and 1.23
        ("25.09", 11, 23, LOADS),
        ("26.07", 13, 26, LOADS),
        ("26.07", 14, 18, DOES_NOT_LOAD),
        ("26.11", 13, 26, LOADS),  # its ONNX Runtime is not known, but no older than 26.08's
        ("26.11", 14, 18, UNKNOWN),
        ("27.01", 10, 18, UNKNOWN),
        ("26.07-py3-min", 10, 18, DOES_NOT_LOAD),
        ("26.07-vllm-python-py3", 10, 18, DOES_NOT_LOAD),
    ],
)
def test_onnx(repository: Any, tag: str, ir_version: int, opset: int, verdict: str) -> None:
    repository.onnx("network", ir_version=ir_version, opset=opset)
    assert only(repository, tag).verdict == verdict


def test_a_newer_onnx_is_told_what_to_do_and_where_that_is_said(repository: Any) -> None:
    repository.onnx("network", ir_version=13, opset=26)
    report = only(repository, "25.07")
    found = [finding for finding in report.findings if finding.kind == DOES_NOT_LOAD]
    assert "--container 25.07" in found[0].text
    assert "from 26.07 on" in found[0].text
    assert found[0].source.startswith("https://pypi.org/project/onnxruntime/1.22")
    assert report.about["ir_version"] == 13


def test_an_operator_of_onnx_runtime_that_came_later(repository: Any) -> None:
    repository.onnx("network", domain="com.microsoft", operator="GatherBlockQuantized")
    assert only(repository, "24.11").verdict == DOES_NOT_LOAD
    assert "1.20" in texts(only(repository, "24.11"), DOES_NOT_LOAD)
    assert only(repository, "24.12").verdict == LOADS


def test_operators_of_a_library_of_ones_own_are_unknown(repository: Any) -> None:
    named = repository.CONFIG + 'model_operations {{ op_library_filename: "libtwice.so" }}'
    repository.onnx("network", named, domain="org.example", operator="Twice")
    assert only(repository, "26.07").verdict == UNKNOWN


@pytest.mark.parametrize(("tag", "verdict"), [("25.07", LOADS), ("26.07", DOES_NOT_LOAD)])
def test_weights_outside_the_version_directory(repository: Any, tag: str, verdict: str) -> None:
    """ONNX Runtime 1.23 reads them, 1.24 refuses them: measured with the wheels."""
    model, weights = repository.with_weights("../outside.data")
    directory = repository.add("network", {"model.onnx": model.SerializeToString()})
    (directory / "outside.data").write_bytes(weights)
    assert only(repository, tag).verdict == verdict


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [
        ("26.07-trtllm-python-py3", DOES_NOT_LOAD),  # no tensorrt backend there, whatever the version
        ("26.07", UNKNOWN),
    ],
)
def test_tensorrt_plan(repository: Any, tag: str, wanted: str) -> None:
    header = b"ftrt" + bytes(20) + bytes([10, 14, 1, 48]) + bytes(64)
    repository.add("network", {"model.plan": header}, backend="tensorrt")
    report = only(repository, tag)
    assert report.verdict == wanted
    if wanted == UNKNOWN:
        assert report.about == {"engine_of": "tensorrt", "version": "10.14.1.48"}
        assert "nvcr.io/nvidia/tensorrt:26.07-py3" in texts(report, UNKNOWN)
        assert "kind of GPU" in texts(report, NOTE)


def test_an_engine_of_tensorrt_rtx_and_a_file_that_is_none(repository: Any) -> None:
    repository.add("rtx", {"model.plan": b"vtrt" + bytes(20) + bytes([1, 7, 1, 116])}, backend="tensorrt")
    repository.add("text", {"model.plan": b"no engine at all, only words"}, backend="tensorrt")
    said = {model.model: texts(model, DOES_NOT_LOAD) for model in preflight(repository.root, "26.07").models}
    assert "no backend" in said["rtx"]
    assert "not a TensorRT engine" in said["text"]


def written_by(repository: Any, **versions: str) -> Path:
    """Turns a repository into the models of a release."""
    release = repository.root.parent / "release"
    release.mkdir()
    repository.root.rename(release / "models")
    (release / "release.json").write_text(json.dumps({"format": "clotline.release", "versions": versions}))
    return Path(release)


def archive(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, b"")
    return content.getvalue()


@pytest.mark.parametrize(
    ("torch", "tag", "verdict"),
    [
        ("2.9.1", "25.09", LOADS),
        ("2.10.0+cpu", "25.09", UNKNOWN),
        ("2.10.0", "26.07", LOADS),  # no older than 25.12's 2.10
        ("2.14.1", "26.07", UNKNOWN),
        ("2.5.0", "24.08", UNKNOWN),
    ],
)
def test_torchscript(repository: Any, torch: str, tag: str, verdict: str) -> None:
    repository.add("network", {"model.pt": archive("archive/constants.pkl")}, backend="pytorch")
    (report,) = preflight(written_by(repository, torch=torch), tag).models
    assert report.verdict == verdict


def test_who_wrote_a_network_is_read_beside_its_ensemble(repository: Any) -> None:
    repository.add("network", {"model.pt": archive("archive/constants.pkl")}, backend="pytorch")
    assert only(repository, "25.09").verdict == UNKNOWN
    noted = {"network": "network", "notes": {"torch": "2.9.0"}}
    (repository.ensemble("answers", "network") / "1" / "release.json").write_text(json.dumps(noted))
    assert [model.verdict for model in preflight(repository.root, "25.09").models] == [LOADS, LOADS]


@pytest.mark.parametrize(("tag", "verdict"), [("26.06", DOES_NOT_LOAD), ("26.07", UNKNOWN)])
def test_aotinductor(repository: Any, tag: str, verdict: str) -> None:
    config = repository.CONFIG + 'platform: "torch_aoti"'
    repository.add("network", {"model.pt2": archive("m/data/aotinductor/m.so")}, config, backend="pytorch")
    assert only(repository, tag).verdict == verdict


@pytest.mark.parametrize(
    ("writer", "tag", "verdict"),
    [("2026.0.0", "26.04", LOADS), ("2026.1.0", "26.07", LOADS), ("2026.4.1", "26.04", UNKNOWN), ("2024.4.0", "24.08", UNKNOWN)],
)  # fmt: skip
def test_openvino(repository: Any, writer: str, tag: str, verdict: str) -> None:
    xml = f'<net name="m" version="11"><rt_info><Runtime_version value="{writer}-1-x"/></rt_info></net>'
    directory = repository.add("network", {"model.xml": xml}, backend="openvino")
    assert "model.bin" in texts(only(repository, tag), DOES_NOT_LOAD)
    (directory / "1" / "model.bin").write_bytes(b"")
    assert only(repository, tag).verdict == verdict


def test_python_modules_that_no_image_has(repository: Any) -> None:
    repository.python("numbers", ["numpy", "json"])
    repository.python("pictures", ["numpy", "slides.decode"])
    said = {model.model: model for model in preflight(repository.root, "26.07").models}
    assert said["numbers"].verdict == LOADS
    assert said["pictures"].about["imports"] == ["PIL", "cv2", "numpy", "simplejpeg", "slides"]
    told = texts(said["pictures"], DOES_NOT_LOAD)
    assert "opencv-python-headless==4.11" in told  # other ones could decode to other pixels
    adds = frozenset(told.rpartition("--adds ")[2].split(","))
    assert all(model.verdict == LOADS for model in preflight(repository.root, "26.07", adds=adds).models)


def test_an_environment_of_its_own_is_unknown(repository: Any) -> None:
    directory = repository.python("numbers", ["no_such_module"])
    with (directory / "config.pbtxt").open("a") as file:
        file.write('parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/envs/a.tar.gz" } }')
    assert only(repository, "26.07").verdict == UNKNOWN


@pytest.mark.parametrize(("tag", "verdict"), [("24.08", UNKNOWN), ("24.12", LOADS), ("26.07", LOADS)])
def test_a_field_of_a_newer_configuration(repository: Any, tag: str, verdict: str) -> None:
    """model_metrics came with 2.52; 24.08's version is not known, 24.12 has 2.53."""
    repository.onnx("network", repository.CONFIG + "model_metrics {{ }}")
    assert only(repository, tag).verdict == verdict


def test_a_field_that_no_triton_has(repository: Any) -> None:
    repository.onnx("network", repository.CONFIG + "speed_of_light: 3")
    assert only(repository, "26.09").verdict == DOES_NOT_LOAD
    assert only(repository, "26.11").verdict == UNKNOWN  # newer than what was looked at


def test_gpu_models_are_told_what_the_container_needs(repository: Any) -> None:
    repository.onnx("network", repository.CONFIG.replace("KIND_CPU", GPU))
    report = only(repository, "25.12")
    assert report.verdict == LOADS
    assert "CUDA 13.1.0.36, driver from 575, compute capability from 7.5" in texts(report, NOTE)


def test_versions_that_a_server_would_take(repository: Any) -> None:
    directory = repository.onnx(
        "network", repository.CONFIG + "version_policy {{ latest {{ num_versions: 2 }} }}"
    )
    for version in ("2", "3"):
        (directory / version).mkdir()
    (directory / "3" / "model.onnx").write_bytes(repository.tiny_onnx().SerializeToString())
    said = {(model.version, model.verdict) for model in preflight(repository.root, "26.07").models}
    assert said == {(2, DOES_NOT_LOAD), (3, LOADS)}


@pytest.mark.parametrize(
    "policy", ["version_policy {{ specific {{ versions: 7 }} }}", "version_policy {{ all {{ }} }}"]
)
def test_no_version_to_take(repository: Any, policy: str) -> None:
    directory = repository.onnx("network", repository.CONFIG + policy)
    (directory / "1").rename(directory / "first")
    assert only(repository, "26.07").verdict == DOES_NOT_LOAD


def test_whoever_asks_a_model_that_does_not_load(repository: Any) -> None:
    repository.onnx("network", ir_version=14)
    repository.ensemble("tile", "network")
    directory = repository.python("slide")
    with (directory / "config.pbtxt").open("a") as file:
        for name, value in (("embedder_model", "tile"), ("embedder_version", "1")):
            file.write(f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}')
    said = {model.model: texts(model, DOES_NOT_LOAD) for model in preflight(repository.root, "26.07").models}
    assert "needs network version 1" in said["tile"]
    assert "needs tile version 1" in said["slide"]


def test_requests_that_http_refuses(repository: Any) -> None:
    config = repository.CONFIG.replace(
        "TYPE_FP32 dims: [ 2 ] }}\noutput", "TYPE_STRING dims: [ 1 ] }}\noutput"
    )
    limit = 'parameters {{ key: "max_tile_bytes" value {{ string_value: "20000000" }} }}'
    repository.add("tiles", {"model.py": "import json"}, config + limit, backend="python")
    report = only(repository, "26.07")
    assert report.largest_request_bytes == 80_000_000
    assert "--http-max-input-size=" in texts(report, NOTE)
    assert report.verdict == LOADS


def test_text_and_json_say_the_same(repository: Any) -> None:
    repository.onnx("good")
    repository.onnx("bad", ir_version=14)
    report = preflight(repository.root, "26.07")
    document = json.loads(json.dumps(as_json(report)))
    assert document["counts"] == {LOADS: 1, DOES_NOT_LOAD: 1, UNKNOWN: 0}
    assert document["facts"]["tensorrt"] is None
    assert document["facts"]["onnxruntime"]["source"].startswith("https://")
    told = as_text(report)
    assert "good 1  onnxruntime  loads" in told
    assert "bad 1   onnxruntime  DOES NOT LOAD" in told
    assert "unknown there: tensorrt" in told


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"versions": 3}'])
def test_a_broken_manifest_is_an_error(repository: Any, manifest: str) -> None:
    repository.onnx("network")
    release = written_by(repository)
    (release / "release.json").write_text(manifest)
    with pytest.raises(ReleaseVersionError, match="not the manifest"):
        preflight(release, "26.07")


def test_no_models_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReleaseVersionError, match="no Triton model"):
        preflight(tmp_path, "26.07")
    with pytest.raises(ReleaseVersionError, match="cannot be read"):
        preflight(tmp_path / "nothing", "26.07")


def test_no_embedded_server_is_an_error(
    repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.onnx("network")
    monkeypatch.setenv("CLOTLINE_TRITON_HOME", str(tmp_path / "empty"))
    with pytest.raises(FormatError, match="serving install"):
        preflight(repository.root, "embedded")
