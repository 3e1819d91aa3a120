"""Triton backend `onnxruntime` for servers without the native one: a Python-based backend over ONNX Runtime.

It reads the native backend's documented settings that make sense on a CPU (source: README of
triton-inference-server/onnxruntime_backend) and refuses every other one:
  default_model_filename          (top level) default `model.onnx`
  optimization.graph.level        -1 basic; 1 basic and extended; 2 none; unset: all
  parameters: intra_op_thread_count, inter_op_thread_count, execution_mode (0 sequential, 1 parallel),
              enable_mem_arena, enable_mem_pattern (0 or 1), memory.enable_memory_arena_shrinkage (`cpu:0`);
              graph_optimization_level is read as another name of optimization.graph.level
and three of its own, which the native backend does not look for:
  parameters: alone_thread_count  threads of an execution while no other instance of ours executes in this server
              (0: every core, at most 8). Default: intra_op_thread_count. A lone request then has all cores,
              and under load every instance keeps to its own; where they differ a second session is held in memory.
              niceness  of its process (nice(2)), 0 to 19. Default: 0
              clotline_answers_for  whose predictions its answers are (slides/model_metrics.py), to be counted
Requests that Triton hands over together run as one batch; if that fails each runs alone, so that one bad request
harms nobody else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from slides import lone_execution
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


def import_onnxruntime() -> None:
    """Import it now and not with this module, which Triton loads once more only to ask for auto-completion."""
    global ort
    import onnxruntime as ort


def refuse(model: str, problem: str) -> Exception:
    """The error that keeps a model from loading; Triton reports its text as the model's reason."""
    return pb_utils.TritonModelException(f"onnxruntime backend: model {model}: {problem}")


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
        self.threads_alone = lone_execution.threads_alone(self._whole(lone_execution.PARAMETER, self.threads))
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
        self.niceness = self._whole("niceness", 0)
        self.parameters.pop(ANSWERS_FOR, None)  # read by `network_predictions`
        if self.parameters:
            self.problems.append(
                f"unknown parameter {', '.join(sorted(self.parameters))} (see the backend's docstring)"
            )

    def for_alone(self) -> None:
        """Options of the second session. Its threads spin while it executes, when nobody else wants the cores."""
        self.options.intra_op_num_threads = self.threads_alone
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        self.options.add_session_config_entry("session.force_spinning_stop", "1")

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
        os.nice(settings.niceness)  # before any other thread is there
        more_alone = settings.threads and settings.threads_alone != settings.threads
        self.neighbours = lone_execution.neighbours_here() if more_alone else None
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
                settings.for_alone()
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
            # Requests that were gathered waited for an instance: there is load.
            return self._answer(
                requests, self.session_alone if alone and len(requests) == 1 else self.session
            )

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
        wanted = [set(request.requested_output_names()) for request in requests]
        names = [name for name in self.outputs if any(name in of_one for of_one in wanted)]
        results = dict(zip(names, session.run(names, feed, self.run_options), strict=True))
        counts = [len(array) for array in arrays[self.inputs[0]]]
        if self.predictions is not None:
            self.predictions.add(requests, counts, results)
        responses, start = [], 0
        for index, count in enumerate(counts):
            stop = start + count if together else None
            tensors = [
                pb_utils.Tensor(name, results[name][start:stop] if together else results[name])
                for name in names
                if name in wanted[index]
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = stop or 0
        return responses

    def _array(self, request: Any, name: str) -> Any:
        array = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        if name in self.strings:
            return np.array([item.decode() for item in array.reshape(-1)], dtype=object).reshape(array.shape)
        return array
