"""Triton backend `openvino` for servers without the native one: a Python-based backend over OpenVINO's CPU plugin.

It reads the native backend's documented settings (source: README of triton-inference-server/openvino_backend) and
refuses every other one:
  default_model_filename   (top level) default `model.xml`; `model.onnx` works, too
  parameters: INFERENCE_NUM_THREADS, COMPILATION_NUM_THREADS (whole numbers), NUM_STREAMS (AUTO, NUMA or a number),
              PERFORMANCE_HINT (LATENCY, THROUGHPUT or CUMULATIVE_THROUGHPUT), HINT_BF16 (YES),
              ENABLE_BATCH_PADDING, SKIP_OV_DYNAMIC_BATCHSIZE, RESHAPE_IO_LAYERS (YES or NO; nothing to do here: a batch
              is run at its own size)
and four of its own, which the native backend does not look for:
  parameters: alone_thread_count  threads of an execution while no other instance of ours executes in this server
              (0: every core, at most 8). Default: INFERENCE_NUM_THREADS. A lone request then has all cores, and under
              load every instance keeps to its own; where they differ the network is held in memory twice.
              static_batches  YES: compile it for each batch size that Triton gathers, from 1 to the largest
              preferred one. OpenVINO then plans each at loading, and not anew whenever the size changes. Each copy
              has its own memory for weights. Larger batches run in parts of these sizes.
              niceness  of its process (nice(2)), 0 to 19. Default: 0
              clotline_answers_for  whose predictions its answers are (slides/model_metrics.py), to be counted
Without HINT_BF16 it computes in FP32, also where OpenVINO would choose BF16.
Requests that Triton hands over together run as one batch; if that fails each runs alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from slides import lone_execution
from slides.model_metrics import ANSWERS_FOR, network_predictions

TYPES = {
    "TYPE_BOOL": "boolean", "TYPE_UINT8": "u8", "TYPE_UINT16": "u16", "TYPE_UINT32": "u32", "TYPE_UINT64": "u64",
    "TYPE_INT8": "i8", "TYPE_INT16": "i16", "TYPE_INT32": "i32", "TYPE_INT64": "i64",
    "TYPE_FP16": "f16", "TYPE_FP32": "f32", "TYPE_FP64": "f64",
}  # fmt: skip
HINTS = ("LATENCY", "THROUGHPUT", "CUMULATIVE_THROUGHPUT")


def import_openvino() -> None:
    """Import it now and not with this module, which Triton loads once more only to ask for auto-completion."""
    global ov
    import openvino as ov


def refuse(model: str, problem: str) -> Exception:
    """The error that keeps a model from loading; Triton reports its text as the model's reason."""
    return pb_utils.TritonModelException(f"openvino backend: model {model}: {problem}")


class Settings:
    """Properties of one compiled model, read from its configuration; `problems` lists what cannot be honoured."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.problems: list[str] = []
        self.parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        # Every instance is a process of its own, and OpenVINO would pin the threads of all of them to the same cores.
        self.properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
        for name in ("INFERENCE_NUM_THREADS", "COMPILATION_NUM_THREADS"):
            text = self._take(name)
            if text and not text.isdigit():
                self.problems.append(f"{name} must be a whole number >= 0, not {text!r}")
            elif text:
                self.properties[name] = int(text)
        self.properties_alone: dict[str, Any] | None = None
        alone, niceness = self._take(lone_execution.PARAMETER), self._take("niceness")
        for name, text in ((lone_execution.PARAMETER, alone), ("niceness", niceness)):
            if text and not text.isdigit():
                self.problems.append(f"{name} must be a whole number >= 0, not {text!r}")
        self.niceness = int(niceness) if niceness.isdigit() else 0
        streams = self._take("NUM_STREAMS").upper()
        if streams and not (streams in ("AUTO", "NUMA") or streams.isdigit()):
            self.problems.append(f"NUM_STREAMS must be AUTO, NUMA or a whole number, not {streams!r}")
        elif streams:
            self.properties["NUM_STREAMS"] = int(streams) if streams.isdigit() else streams
        hint = self._take("PERFORMANCE_HINT").upper()
        if hint and hint not in HINTS:
            self.problems.append(f"PERFORMANCE_HINT must be one of {', '.join(HINTS)}, not {hint!r}")
        elif hint:
            self.properties["PERFORMANCE_HINT"] = hint
        bf16 = self._take("HINT_BF16").upper()
        if bf16 not in ("", "YES"):
            self.problems.append(f"HINT_BF16 must be YES, not {bf16!r}")
        elif bf16:
            self.properties["INFERENCE_PRECISION_HINT"] = "bf16"
        threads = self.properties.get("INFERENCE_NUM_THREADS", 0)
        if threads and alone.isdigit() and lone_execution.threads_alone(int(alone)) != threads:
            # It may take all cores, so its threads may be pinned to them: free ones often met on one core, and took turns.
            more = {
                "INFERENCE_NUM_THREADS": lone_execution.threads_alone(int(alone)),
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": True,
            }
            self.properties_alone = {**self.properties, **more}
        static = self._take("static_batches").upper()
        if static not in ("", "YES", "NO"):
            self.problems.append(f"static_batches must be YES or NO, not {static!r}")
        gathered = (config.get("dynamic_batching") or {}).get("preferred_batch_size") or [1]
        batched = config["max_batch_size"] > 0
        self.static_batches = range(1, max(gathered) + 1) if static == "YES" and batched else range(0)
        for name in ("ENABLE_BATCH_PADDING", "SKIP_OV_DYNAMIC_BATCHSIZE", "RESHAPE_IO_LAYERS"):
            if self._take(name).upper() not in ("", "YES", "NO"):
                self.problems.append(f"{name} must be YES or NO")
        self.parameters.pop(ANSWERS_FOR, None)  # read by `network_predictions`
        if self.parameters:
            self.problems.append(
                f"unknown parameter {', '.join(sorted(self.parameters))} (see the backend's docstring)"
            )

    def _take(self, name: str) -> str:
        return str(self.parameters.pop(name, "")).strip()


class Network:
    """One model, compiled.

    Args:
        model: as read.
        properties: of the CPU plugin.
        sizes: of batches that get a compiled model of their own.
        any_size: whether there is one for all other sizes, too; without it larger batches run in parts.
    """

    def __init__(
        self, core: Any, model: Any, properties: dict[str, Any], sizes: Iterable[int], *, any_size: bool
    ) -> None:
        def compiled(what: Any) -> Any:
            return core.compile_model(what, "CPU", properties).create_infer_request()

        self._any = compiled(model) if any_size else None
        self._of_size = {}
        for size in sizes:
            fixed = model.clone()
            shapes = {port: port.get_partial_shape() for port in fixed.inputs}
            for shape in shapes.values():
                shape[0] = size
            fixed.reshape(shapes)
            self._of_size[size] = compiled(fixed)

    def infer(self, feed: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        """These outputs."""
        size = len(next(iter(feed.values())))
        whole = self._of_size.get(size, self._any)
        if whole is not None:
            return self._run(whole, feed, outputs)
        parts, largest = [], max(self._of_size)
        for start in range(0, size, largest):
            part = {name: array[start : start + largest] for name, array in feed.items()}
            parts.append(self._run(self._of_size[min(largest, size - start)], part, outputs))
        return {name: np.concatenate([part[name] for part in parts]) for name in outputs}

    @staticmethod
    def _run(request: Any, feed: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        found = request.infer(feed, share_inputs=True, share_outputs=True)
        return {name: np.array(found[name]) for name in outputs}  # the next call overwrites what it found


class TritonPythonModel:
    """One model compiled by OpenVINO."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compile the model; whatever the configuration asks for and cannot have keeps the model from loading."""
        config = json.loads(args["model_config"])
        name = args["model_name"]
        try:
            import_openvino()
        except ImportError as error:
            raise refuse(
                name, f"openvino cannot be imported ({error}): install it beside Clotline, then `python -m serving install --force`, or serve the onnx format"
            ) from error  # fmt: skip
        settings = Settings(config)
        problems = settings.problems
        if args["model_instance_kind"] == "GPU":
            problems.append("instance_group asks for a GPU; this backend runs on the CPU: use KIND_CPU")
        path = Path(
            args["model_repository"],
            args["model_version"],
            config.get("default_model_filename") or "model.xml",
        )
        if not path.exists():
            problems.append(f"{path} does not exist")
        elif path.suffix == ".xml" and not path.with_suffix(".bin").exists():
            problems.append(f"{path.with_suffix('.bin')} does not exist")
        if problems:
            raise refuse(name, "; ".join(problems))
        os.nice(settings.niceness)  # before any other thread is there
        try:
            core = ov.Core()
            model = core.read_model(str(path))
        except Exception as error:  # OpenVINO raises RuntimeError with many lines
            raise refuse(name, f"OpenVINO {ov.__version__} cannot load {path}: {error}") from error
        self.batched = config["max_batch_size"] > 0
        problems = [
            *self._mismatches("input", config["input"], model.inputs),
            *self._mismatches("output", config["output"], model.outputs),
        ]
        if problems:
            raise refuse(name, "; ".join(problems))
        try:
            sizes = settings.static_batches
            self.network = self.network_alone = Network(
                core, model, settings.properties, sizes, any_size=not sizes
            )
            self.neighbours = lone_execution.neighbours_here() if settings.properties_alone else None
            if settings.properties_alone and self.neighbours is not None:
                self.network_alone = Network(core, model, settings.properties_alone, sizes[:1], any_size=True)
        except Exception as error:
            raise refuse(name, f"OpenVINO {ov.__version__} cannot compile {path}: {error}") from error
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]
        self.predictions = network_predictions(pb_utils, args)

    def finalize(self) -> None:
        """Tell the rest of the predictions."""
        if self.predictions is not None:
            self.predictions.close()

    def _mismatches(self, what: str, declared: list[dict[str, Any]], actual: list[Any]) -> list[str]:
        known = {name: port for port in actual for name in port.get_names()}
        problems = []
        for entry in declared:
            port = known.get(entry["name"])
            if port is None:
                problems.append(
                    f"the network has no {what} {entry['name']} (it has {', '.join(sorted(known))})"
                )
                continue
            element = port.get_element_type().get_type_name()
            if element != TYPES.get(entry["data_type"]):
                problems.append(
                    f"{what} {entry['name']} is {entry['data_type']} in config.pbtxt, {element} in the network"
                )
            shape = port.get_partial_shape()
            if self.batched and shape.rank.is_static and len(shape) and shape[0].is_static:
                problems.append(
                    f"{what} {entry['name']} has a fixed batch of {shape[0].get_length()}: export it with a dynamic batch"
                )
        missing = {port.get_any_name() for port in actual} - {entry["name"] for entry in declared}
        if what == "input" and missing:
            problems.append(f"inputs {', '.join(sorted(missing))} of the network are not in config.pbtxt")
        return problems

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        if self.neighbours is None:
            return self._answer(requests, self.network)
        with self.neighbours.executing() as alone:
            # Requests that were gathered waited for an instance: there is load.
            return self._answer(
                requests, self.network_alone if alone and len(requests) == 1 else self.network
            )

    def _answer(self, requests: list[Any], network: Any) -> list[Any]:
        try:
            return self._run(requests, network)
        except Exception as error:
            if len(requests) == 1:
                return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"OpenVINO: {error}"))]
        return [response for request in requests for response in self._answer([request], network)]

    def _run(self, requests: list[Any], network: Any) -> list[Any]:
        if not self.batched and len(requests) > 1:
            return [response for request in requests for response in self._run([request], network)]
        arrays = {
            name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self.inputs
        }
        feed = {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in arrays.items()}
        results = network.infer(feed, self.outputs)
        counts = [len(array) for array in arrays[self.inputs[0]]]
        if self.predictions is not None:
            self.predictions.add(requests, counts, results)
        responses, start = [], 0
        for request, count in zip(requests, counts, strict=True):
            stop = start + count if len(requests) > 1 else None
            wanted = set(request.requested_output_names())
            tensors = [
                pb_utils.Tensor(name, results[name][start:stop]) for name in self.outputs if name in wanted
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = stop or 0
        return responses
