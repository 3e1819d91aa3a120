"""Triton backend `onnxruntime` for servers without the native one: a Python-based backend over ONNX Runtime.

It reads the native backend's documented settings that make sense on a CPU (source: README of
triton-inference-server/onnxruntime_backend) and refuses every other one:
  default_model_filename          (top level) default `model.onnx`
  optimization.graph.level        -1 basic; 1 basic and extended; 2 none; unset: all
  parameters: intra_op_thread_count, inter_op_thread_count, execution_mode (0 sequential, 1 parallel),
              enable_mem_arena, enable_mem_pattern (0 or 1), memory.enable_memory_arena_shrinkage (`cpu:0`);
              graph_optimization_level is read as another name of optimization.graph.level
and one of its own, which the native backend does not look for:
  parameters: alone_thread_count  threads of an execution while no other instance of this backend executes in this
              server (0: every core, at most 8). Default: intra_op_thread_count. A lone request then has all cores,
              and under load every instance keeps to its own; where they differ a second session is held in memory.
              clotline_answers_for  whose predictions its answers are (slides/model_metrics.py), to be counted
Requests that Triton hands over together run as one batch; if that fails each runs alone, so that one bad request
harms nobody else.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from slides.model_metrics import ANSWERS_FOR, network_predictions

ONNX_TYPES = {
    "TYPE_BOOL": "tensor(bool)", "TYPE_UINT8": "tensor(uint8)", "TYPE_UINT16": "tensor(uint16)",
    "TYPE_UINT32": "tensor(uint32)", "TYPE_UINT64": "tensor(uint64)", "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)", "TYPE_INT32": "tensor(int32)", "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)", "TYPE_FP32": "tensor(float)", "TYPE_FP64": "tensor(double)",
    "TYPE_STRING": "tensor(string)",
}  # fmt: skip
LEVELS = {"-1": "ORT_ENABLE_BASIC", "1": "ORT_ENABLE_EXTENDED", "2": "ORT_DISABLE_ALL", "0": "ORT_ENABLE_ALL"}
SHRINKAGE = "memory.enable_memory_arena_shrinkage"
MOST_THREADS_ALONE = 8
SHARED_MEMORY = "/dev/shm"  # nosec B108  # noqa: S108


def import_onnxruntime() -> None:
    """Import it now and not with this module, which Triton loads once more only to ask for auto-completion."""
    global ort
    import onnxruntime as ort


def refuse(model: str, problem: str) -> Exception:
    """The error that keeps a model from loading; Triton reports its text as the model's reason."""
    return pb_utils.TritonModelException(f"onnxruntime backend: model {model}: {problem}")


class Neighbours:
    """Which instances of this backend, in all stubs of one server, are executing at this moment.

    They share a table in shared memory with a row (pid, monotonic nanoseconds at which its execution began, or 0) an
    instance. Its name begins with the prefix of the server's regions (serving/processes.py), so that it is removed
    with them. A row of 64-bit numbers has one writer; readers may be late by an execution, which costs time only.
    """

    ROWS = 256
    FORGOTTEN_NS = 30_000_000_000  # an execution that began before that has ended with its stub

    def __init__(self, server: str) -> None:
        path = f"{SHARED_MEMORY}/clotline_{server}_executing"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.ftruncate(handle, self.ROWS * 16)
            self.memory = mmap.mmap(handle, self.ROWS * 16)
            self.rows = np.frombuffer(self.memory, np.int64).reshape(self.ROWS, 2)
            free = (row for row in range(self.ROWS) if not self._lives(int(self.rows[row, 0])))
            self.own = next(free, None)
            if self.own is not None:
                self.rows[self.own] = os.getpid(), 0
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # mmap holds the file open: closing alone would not release it
            os.close(handle)

    @staticmethod
    def _lives(pid: int) -> bool:
        return pid > 0 and os.path.exists(f"/proc/{pid}")

    @contextmanager
    def executing(self) -> Any:
        """Says that this instance executes; gives whether it is the only one."""
        if self.own is None:
            yield False
            return
        now = time.monotonic_ns()
        began = self.rows[:, 1]
        alone = not np.any(began > now - self.FORGOTTEN_NS)
        began[self.own] = now
        try:
            yield alone
        finally:
            began[self.own] = 0


class Settings:
    """Session options of one model, read from its configuration; `problems` lists what cannot be honoured."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.problems: list[str] = []
        self.options = ort.SessionOptions()
        self.run_options = ort.RunOptions()
        self.parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        optimization = config.get("optimization") or {}
        if optimization.get("execution_accelerators"):
            self.problems.append(
                "optimization.execution_accelerators is not supported here (native backend only)"
            )
        named = self.parameters.pop("graph_optimization_level", "0")
        level = str((optimization.get("graph") or {}).get("level") or named or "0")
        if level not in LEVELS:
            self.problems.append(f"graph optimization level must be -1, 1 or 2, not {level}")
        else:
            self.options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
        self.threads = self._whole("intra_op_thread_count", 0)
        self.threads_alone = self._whole("alone_thread_count", self.threads)
        if self.threads_alone == 0:
            self.threads_alone = min(len(os.sched_getaffinity(0)), MOST_THREADS_ALONE)
        self.options.intra_op_num_threads = self.threads
        self.options.inter_op_num_threads = self._whole("inter_op_thread_count", 0)
        # Idle threads that spin would take the cores from the other instances and from preprocessing.
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._switch("execution_mode", False):
            self.options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        self.options.enable_cpu_mem_arena = self._switch("enable_mem_arena", True)
        self.options.enable_mem_pattern = self._switch("enable_mem_pattern", True)
        shrinkage = self.parameters.pop(SHRINKAGE, "")
        if shrinkage:
            self.run_options.add_run_config_entry(SHRINKAGE, shrinkage)
        self.parameters.pop(ANSWERS_FOR, None)  # read by `network_predictions`
        if self.parameters:
            self.problems.append(
                f"unknown parameter {', '.join(sorted(self.parameters))} (see the backend's docstring)"
            )

    def _whole(self, name: str, default: int) -> int:
        text = self.parameters.pop(name, str(default)).strip()
        if not text.isdigit():
            self.problems.append(f"{name} must be a whole number >= 0, not {text!r}")
            return default
        return int(text)

    def _switch(self, name: str, default: bool) -> bool:
        text = self.parameters.pop(name, "1" if default else "0").strip()
        if text not in ("0", "1"):
            self.problems.append(f"{name} must be 0 or 1, not {text!r}")
        return text == "1"


class TritonPythonModel:
    """One ONNX Runtime session."""

    def initialize(self, args: dict[str, str]) -> None:
        """Build the session; whatever the configuration asks for and cannot have keeps the model from loading."""
        import_onnxruntime()
        config = json.loads(args["model_config"])
        name = args["model_name"]
        settings = Settings(config)
        problems = settings.problems
        if args["model_instance_kind"] == "GPU":
            problems.append("instance_group asks for a GPU; this backend runs on the CPU: use KIND_CPU")
        if problems:
            raise refuse(name, "; ".join(problems))
        server = os.environ.get("CLOTLINE_INSTANCE", "")
        self.neighbours = None
        if (
            settings.threads
            and settings.threads_alone != settings.threads
            and re.fullmatch(r"[\w-]+", server)
        ):
            self.neighbours = Neighbours(server)
        path = Path(
            args["model_repository"],
            args["model_version"],
            config.get("default_model_filename") or "model.onnx",
        )
        if not path.exists():
            raise refuse(name, f"{path} does not exist")
        try:
            self.session = self.session_alone = self._open(path, settings)
            if self.neighbours is not None:
                settings.options.intra_op_num_threads = settings.threads_alone
                self.session_alone = self._open(path, settings)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise refuse(name, f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from error
        self.run_options = settings.run_options
        self.batched = config["max_batch_size"] > 0
        problems = [
            *self._mismatches("input", config["input"], self.session.get_inputs()),
            *self._mismatches("output", config["output"], self.session.get_outputs()),
        ]
        missing = {i.name for i in self.session.get_inputs()} - {i["name"] for i in config["input"]}
        problems += [f"input {m} of the network is not in config.pbtxt" for m in sorted(missing)]
        if problems:
            raise refuse(name, "; ".join(problems))
        self.inputs = [i["name"] for i in config["input"]]
        self.strings = {i["name"] for i in config["input"] if i["data_type"] == "TYPE_STRING"}
        self.outputs = [o["name"] for o in config["output"]]
        self.predictions = network_predictions(pb_utils, args)

    def finalize(self) -> None:
        """Tell the rest of the predictions."""
        if self.predictions is not None:
            self.predictions.close()

    def _open(self, path: Path, settings: Settings) -> Any:
        return ort.InferenceSession(str(path), settings.options, providers=["CPUExecutionProvider"])

    def _mismatches(self, what: str, declared: list[dict[str, Any]], actual: list[Any]) -> list[str]:
        known = {tensor.name: tensor for tensor in actual}
        problems = []
        for entry in declared:
            tensor = known.get(entry["name"])
            if tensor is None:
                problems.append(f"the network has no {what} {entry['name']} (it has {', '.join(known)})")
                continue
            if tensor.type != ONNX_TYPES.get(entry["data_type"]):
                problems.append(
                    f"{what} {entry['name']} is {entry['data_type']} in config.pbtxt, {tensor.type} in the network"
                )
            if self.batched and tensor.shape and isinstance(tensor.shape[0], int):
                problems.append(
                    f"{what} {entry['name']} has a fixed batch of {tensor.shape[0]}: export it with a dynamic batch"
                )
        return problems

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        if self.neighbours is None:
            return self._answer(requests, self.session)
        with self.neighbours.executing() as alone:
            return self._answer(requests, self.session_alone if alone else self.session)

    def _answer(self, requests: list[Any], session: Any) -> list[Any]:
        try:
            return self._run(requests, session)
        except Exception as error:
            if len(requests) == 1:
                return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"ONNX Runtime: {error}"))]
        return [response for request in requests for response in self._answer([request], session)]

    def _run(self, requests: list[Any], session: Any) -> list[Any]:
        arrays = {name: [self._array(request, name) for request in requests] for name in self.inputs}
        together = self.batched and len(requests) > 1
        feed = {name: np.concatenate(parts) if together else parts[0] for name, parts in arrays.items()}
        if not self.batched and len(requests) > 1:
            return [response for request in requests for response in self._run([request], session)]
        wanted = {name for request in requests for name in request.requested_output_names()}
        names = [name for name in self.outputs if name in wanted]
        results = dict(zip(names, session.run(names, feed, self.run_options), strict=True))
        counts = [len(array) for array in arrays[self.inputs[0]]]
        if self.predictions is not None:
            self.predictions.add(requests, counts, results)
        responses, start = [], 0
        for index, request in enumerate(requests):
            stop = start + counts[index] if together else None
            tensors = [
                pb_utils.Tensor(name, results[name][start:stop] if together else results[name])
                for name in names
                if name in request.requested_output_names()
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = stop or 0
        return responses

    def _array(self, request: Any, name: str) -> Any:
        array = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        if name in self.strings:
            return np.array([item.decode() for item in array.reshape(-1)], dtype=object).reshape(array.shape)
        return array
