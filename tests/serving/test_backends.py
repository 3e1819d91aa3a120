"""The Python-based `onnxruntime`, `pytorch` and `openvino` backends honour the native backends' settings and refuse the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.http as triton

from serving.processes import processes_of
from tests.serving.conftest import TINY_CONFIG, Launch, make_tiny
from tests.serving.test_launcher import infer, state_of

PYTORCH_CONFIG = """
backend: "pytorch"
max_batch_size: 4
default_model_filename: "doubled.pt"
input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] }
output { name: "y__0" data_type: TYPE_FP32 dims: [ 2 ] }
instance_group { count: 1 kind: KIND_CPU }
dynamic_batching { max_queue_delay_microseconds: 20000 }
"""


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.max()) > 1000:
            raise ValueError("too large")
        return x * 2


def add_pytorch(repository: Path, config: str) -> None:
    version = repository / "torch_tiny" / "1"
    version.mkdir(parents=True)
    torch.jit.script(Doubled()).save(str(version / "doubled.pt"))
    (repository / "torch_tiny" / "config.pbtxt").write_text(config)


def threads_of(name: str, model: str) -> int:
    """Threads of the stub process of a model."""
    for pid in processes_of(state_of(name).instance_id):
        if f"{model}_".encode() in Path(f"/proc/{pid}/cmdline").read_bytes() or model in "".join(
            Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        ):
            return len(list(Path(f"/proc/{pid}/task").iterdir()))
    raise AssertionError(f"no stub of {model}")


def test_documented_settings_are_honoured(tiny_repository: Path, launch: Launch) -> None:
    shutil.rmtree(tiny_repository / "tiny")
    shared = 'default_model_filename: "named.onnx"\noptimization { graph { level: 1 } }\n' + parameter(
        "inter_op_thread_count", "1"
    )
    for name, count in (("tiny", "1"), ("wide", "9")):
        make_tiny(tiny_repository, config=TINY_CONFIG + shared + parameter("intra_op_thread_count", count),
                  file_name="named.onnx", name=name)  # fmt: skip
    switches = "".join(
        parameter(key, "false")
        for key in (
            "DISABLE_OPTIMIZED_EXECUTION",
            "ENABLE_JIT_PROFILING",
            "ENABLE_CACHE_CLEANING",
            "ENABLE_NVFUSER",
        )
    )
    add_pytorch(tiny_repository, PYTORCH_CONFIG + switches + parameter("INTRA_OP_THREAD_COUNT", "1"))
    http = launch(tiny_repository, "--name", "settings").ready()["http"]
    assert infer(http) == infer(http, "wide") == infer(http, "torch_tiny") == [3.0, -4.0]
    assert threads_of("settings", "wide") - threads_of("settings", "tiny") >= 8

    # Requests that Triton batches together: the bad one fails alone.
    client = triton.InferenceServerClient(http, concurrency=4)
    pending = []
    for value in (1.0, 5000.0, 3.0, 4.0):
        tensor = triton.InferInput("x", [1, 2], "FP32")
        tensor.set_data_from_numpy(np.full((1, 2), value, np.float32))
        pending.append((value, client.async_infer("torch_tiny", [tensor])))
    for value, request in pending:
        if value > 1000:
            with pytest.raises(triton.InferenceServerException, match="too large"):
                request.get_result()
        else:
            assert request.get_result().as_numpy("y__0").tolist() == [[2 * value, 2 * value]]


def test_what_cannot_be_honoured_is_refused(tiny_repository: Path, launch: Launch) -> None:
    shutil.rmtree(tiny_repository / "tiny")
    wrong = {
        "unknown": parameter("intra_op_threads", "1"),
        "number": parameter("intra_op_thread_count", "many"),
        "level": "optimization { graph { level: 7 } }\n",
        "accelerator": 'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }\n',
        "absent": 'default_model_filename: "other.onnx"\n',
    }
    for name, text in wrong.items():
        make_tiny(tiny_repository, config=TINY_CONFIG + text, name=name)
    make_tiny(tiny_repository, config=TINY_CONFIG.replace('"y"', '"z"'), name="renamed")
    make_tiny(tiny_repository, config=TINY_CONFIG.replace("FP32", "INT64"), name="retyped")
    add_pytorch(
        tiny_repository,
        PYTORCH_CONFIG + parameter("ENABLE_WEIGHT_SHARING", "true") + parameter("TURBO", "true"),
    )
    launched = launch(tiny_repository, "--name", "wrong")
    assert launched.process.wait(90) == 1
    errors = launched.errors()
    for says in (
        "unknown: onnxruntime backend: model unknown: unknown parameter intra_op_threads",
        "intra_op_thread_count must be a whole number >= 0, not 'many'",
        "graph optimization level must be -1, 1 or 2, not 7",
        "optimization.execution_accelerators is not supported here",
        "other.onnx does not exist",
        "the network has no output z (it has y)",
        "input x is TYPE_INT64 in config.pbtxt, tensor(float) in the network",
        "ENABLE_WEIGHT_SHARING cannot be true",
        "unknown parameter TURBO",
    ):
        assert says in errors, f"{says!r} is missing in:\n{errors}"
    assert "Traceback" not in errors


OPENVINO_CONFIG = TINY_CONFIG.replace("onnxruntime", "openvino")


def add_openvino(repository: Path, config: str, *, name: str) -> Path:
    """The tiny model in OpenVINO's intermediate representation; returns its version directory."""
    openvino = pytest.importorskip("openvino", reason="the openvino format is an extra")
    version = make_tiny(repository, config=config, name=name) / name / "1"
    openvino.save_model(openvino.Core().read_model(str(version / "model.onnx")), str(version / "model.xml"))
    (version / "model.onnx").unlink()
    return version


def test_openvino_honours_the_native_settings_and_refuses_the_rest(
    tiny_repository: Path, launch: Launch, tmp_path: Path
) -> None:
    shutil.rmtree(tiny_repository / "tiny")
    good = "".join(
        parameter(key, value)
        for key, value in (
            ("INFERENCE_NUM_THREADS", "1"),
            ("NUM_STREAMS", "1"),
            ("PERFORMANCE_HINT", "LATENCY"),
            ("ENABLE_BATCH_PADDING", "YES"),
        )
    )
    add_openvino(tiny_repository, OPENVINO_CONFIG + good, name="ov")
    add_openvino(tiny_repository, OPENVINO_CONFIG + parameter("HINT_BF16", "YES"), name="ov_bf16")
    gathered = "dynamic_batching { preferred_batch_size: [ 2, 3 ] }\n" + parameter("static_batches", "YES")
    alone = parameter("INFERENCE_NUM_THREADS", "1") + parameter("alone_thread_count", "2")
    add_openvino(tiny_repository, OPENVINO_CONFIG + gathered, name="ov_static")
    add_openvino(tiny_repository, OPENVINO_CONFIG + gathered + alone, name="ov_alone")
    http = launch(tiny_repository, "--name", "openvino").ready()["http"]
    assert infer(http, "ov") == infer(http, "ov_bf16") == [3.0, -4.0]
    client = triton.InferenceServerClient(http)
    for size in (1, 3, 4, 2, 1):
        tiles = np.random.default_rng(size).random((size, 2), np.float32)
        tensor = triton.InferInput("x", list(tiles.shape), "FP32")
        tensor.set_data_from_numpy(tiles)
        for name in ("ov_static", "ov_alone"):
            assert client.infer(name, [tensor]).as_numpy("y").tolist() == (2 * tiles).tolist()

    wrong = tmp_path / "wrong"
    add_openvino(wrong, OPENVINO_CONFIG + parameter("TURBO", "1"), name="unknown")
    add_openvino(wrong, OPENVINO_CONFIG + parameter("HINT_BF16", "NO"), name="hint")
    add_openvino(wrong, OPENVINO_CONFIG + parameter("static_batches", "2"), name="static")
    add_openvino(wrong, OPENVINO_CONFIG + parameter("alone_thread_count", "all"), name="alone")
    add_openvino(wrong, OPENVINO_CONFIG + parameter("niceness", "low"), name="nice")
    add_openvino(wrong, OPENVINO_CONFIG.replace("FP32", "INT64"), name="retyped")
    (add_openvino(wrong, OPENVINO_CONFIG, name="weightless") / "model.bin").unlink()
    launched = launch(wrong, "--name", "openvino_wrong")
    assert launched.process.wait(90) == 1
    errors = launched.errors()
    for says in (
        "unknown parameter TURBO",
        "HINT_BF16 must be YES, not 'NO'",
        "static_batches must be YES or NO, not '2'",
        "alone_thread_count must be a whole number >= 0, not 'all'",
        "niceness must be a whole number >= 0, not 'low'",
        "input x is TYPE_INT64 in config.pbtxt, f32 in the network",
        "model.bin does not exist",
    ):
        assert says in errors, f"{says!r} is missing in:\n{errors}"
