"""What preflight says of the embedded server is compared with that server: one start, a model a rule."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import helper

from exporters.preflight.findings import DOES_NOT_LOAD, LOADS, UNKNOWN
from exporters.preflight.report import preflight

SERVING = [
    sys.executable,
    "-m",
    "serving",
    "up",
    "--http-port",
    "0",
    "--grpc-port",
    "0",
    "--metrics-port",
    "0",
]


def torchscript() -> bytes:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    written = io.BytesIO()
    torch.jit.save(torch.jit.script(Twice()), written)
    return written.getvalue()


def archive(*names: str) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        for name in names:
            file.writestr(name, b"")
    return written.getvalue()


def fill(models: Any) -> dict[str, str]:
    """Adds a model a rule; returns what preflight is to say of each."""
    config = models.CONFIG
    pytorch = config.replace('"x"', '"x__0"').replace('"y"', '"y__0"')
    wanted: dict[str, str] = {}

    def expect(verdict: str, directory: Path) -> Path:
        wanted[directory.name] = verdict
        return directory

    expect(LOADS, models.onnx("plain"))
    expect(DOES_NOT_LOAD, models.onnx("newer_ir", ir_version=15))
    expect(DOES_NOT_LOAD, models.onnx("newer_opset", opset=99))
    expect(DOES_NOT_LOAD, models.onnx("newer_ml", domain="ai.onnx.ml", operator="Scaler", domain_version=6))
    expect(LOADS, models.onnx("unused_domain"))
    unused = models.tiny_onnx()
    unused.opset_import.append(helper.make_opsetid("org.example.unused", 1))
    (models.root / "unused_domain" / "1" / "model.onnx").write_bytes(unused.SerializeToString())
    expect(LOADS, models.onnx("contrib", domain="com.microsoft", operator="Gelu"))
    expect(DOES_NOT_LOAD, models.onnx("no_contrib", domain="com.microsoft", operator="NoSuchOperator"))
    expect(DOES_NOT_LOAD, models.onnx("own_domain", domain="org.example", operator="Twice"))
    model, weights = models.with_weights()
    both = {"model.onnx": model.SerializeToString(), "model.onnx.data": weights}
    expect(LOADS, models.add("with_weights", both))
    expect(DOES_NOT_LOAD, models.add("without_weights", {"model.onnx": both["model.onnx"]}))
    expect(DOES_NOT_LOAD, models.add("short_weights", {**both, "model.onnx.data": weights[:-4]}))
    expect(DOES_NOT_LOAD, models.add("damaged_onnx", {"model.onnx": b"no model"}))
    expect(DOES_NOT_LOAD, models.add("no_file", {}))
    expect(DOES_NOT_LOAD, models.onnx("other_output", config.replace('"y"', '"z"')))
    expect(DOES_NOT_LOAD, models.onnx("other_name", config.replace("{name}", "somebody")))
    expect(DOES_NOT_LOAD, models.onnx("gpu", config.replace("KIND_CPU", "KIND_GPU")))
    expect(DOES_NOT_LOAD, models.onnx("newer_field", config + "model_metrics {{ }}"))
    expect(DOES_NOT_LOAD, models.onnx("no_field", config + "speed_of_light: 3"))
    expect(DOES_NOT_LOAD, models.onnx("no_config", "this is {{ no configuration"))
    labelled = config.replace(
        "dims: [ 2 ] }}\ninstance", 'dims: [ 2 ] label_filename: "labels.txt" }}\ninstance'
    )
    expect(DOES_NOT_LOAD, models.onnx("no_labels", labelled))
    expect(LOADS, models.onnx("labels", labelled)).joinpath("labels.txt").write_text("a\nb\n")
    outside, weights = models.with_weights("../outside.data")
    directory = expect(DOES_NOT_LOAD, models.add("outside", {"model.onnx": outside.SerializeToString()}))
    (directory / "outside.data").write_bytes(weights)
    expect(DOES_NOT_LOAD, models.add("no_backend", {"model.plan": b"ftrt" + bytes(60)}, backend="tensorrt"))
    expect(LOADS, models.python("python", ["numpy", "slides.decode"]))
    expect(DOES_NOT_LOAD, models.python("python_imports", ["no_such_module"]))
    expect(UNKNOWN, models.add("torchscript", {"model.pt": torchscript()}, pytorch, backend="pytorch"))
    expect(
        DOES_NOT_LOAD,
        models.add("cut_torchscript", {"model.pt": torchscript()[:-30]}, pytorch, backend="pytorch"),
    )
    aoti = pytorch + 'platform: "torch_aoti"'
    expect(
        DOES_NOT_LOAD,
        models.add("pt2", {"model.pt2": archive("m/data/aotinductor/a.so")}, aoti, backend="pytorch"),
    )
    expect(
        DOES_NOT_LOAD,
        models.add("openvino", {"model.xml": '<net name="m" version="11"></net>'}, backend="openvino"),
    )
    expect(LOADS, models.ensemble("whole", "plain"))
    expect(DOES_NOT_LOAD, models.ensemble("broken", "newer_ir"))
    expect(DOES_NOT_LOAD, models.ensemble("partless", "nobody"))
    expect(DOES_NOT_LOAD, models.ensemble("over_broken", "broken"))
    return wanted


@pytest.mark.timeout(180)
def test_says_what_the_server_does(repository: Any) -> None:
    wanted = fill(repository)
    said = {report.model: report.verdict for report in preflight(repository.root, "embedded").models}
    assert said == wanted

    done = subprocess.run(
        [*SERVING, "--repository", str(repository.root)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert "these models did not load" in done.stderr, done.stderr
    broken = set(re.findall(r"^  (\w+): ", done.stderr, re.MULTILINE))
    followers = re.search(r"^  and with them[^:]*: (.*)$", done.stderr, re.MULTILINE)
    broken |= set(followers[1].split(", ")) if followers else set()
    assert broken == {name for name, verdict in wanted.items() if verdict == DOES_NOT_LOAD}
