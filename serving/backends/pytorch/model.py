"""Triton backend `pytorch` for servers without the native one: a Python-based backend over TorchScript.

It reads the native backend's documented settings (source: README of triton-inference-server/pytorch_backend) and
refuses every other one:
  default_model_filename   (top level) default `model.pt`
  parameters: INTRA_OP_THREAD_COUNT, INTER_OP_THREAD_COUNT (threads of this instance; torch's own default if unset),
              INFERENCE_MODE, DISABLE_OPTIMIZED_EXECUTION, ENABLE_JIT_EXECUTOR, ENABLE_JIT_PROFILING,
              ENABLE_TENSOR_FUSER, ENABLE_CACHE_CLEANING (`true` or `false`; the last one does something on a GPU only);
              ENABLE_WEIGHT_SHARING, ENABLE_NVFUSER only as `false`: instances are processes here, and nvFuser is gone
              intra_op_thread_count and inter_op_thread_count are read as other names of the first two
and one of its own, which the native backend does not look for:
  parameters: clotline_answers_for  whose predictions its answers are (slides/model_metrics.py), to be counted
Names follow the native convention: `NAME__INDEX`, the index being the position among the arguments or results of
`forward`; an input may also have the name of an argument of `forward`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from slides.model_metrics import ANSWERS_FOR, network_predictions

TORCH_TYPES = (
    "TYPE_BOOL", "TYPE_UINT8", "TYPE_INT8", "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64",
)  # fmt: skip
FALSE_ONLY = {
    "ENABLE_WEIGHT_SHARING": "instances are processes of their own here",
    "ENABLE_NVFUSER": "nvFuser was removed from PyTorch",
}


def import_torch() -> None:
    """Import torch now and not with this module, which Triton loads once more only to ask for auto-completion."""
    global torch
    import torch


def refuse(model: str, problem: str) -> Exception:
    """The error that keeps a model from loading; Triton reports its text as the model's reason."""
    return pb_utils.TritonModelException(f"pytorch backend: model {model}: {problem}")


class Settings:
    """Settings of one model; `problems` lists what cannot be honoured."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.problems: list[str] = []
        self.parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        for native in ("INTRA_OP_THREAD_COUNT", "INTER_OP_THREAD_COUNT"):
            if native.lower() in self.parameters:
                self.parameters.setdefault(native, self.parameters.pop(native.lower()))
        self.intra_op = self._threads("INTRA_OP_THREAD_COUNT")
        self.inter_op = self._threads("INTER_OP_THREAD_COUNT")
        self.inference_mode = self._switch("INFERENCE_MODE", True)
        self.optimized = not self._switch("DISABLE_OPTIMIZED_EXECUTION", False)
        self.jit_executor = self._switch("ENABLE_JIT_EXECUTOR", None)
        self.jit_profiling = self._switch("ENABLE_JIT_PROFILING", None)
        self.tensor_fuser = self._switch("ENABLE_TENSOR_FUSER", None)
        self.cache_cleaning = self._switch("ENABLE_CACHE_CLEANING", False)
        for name, reason in FALSE_ONLY.items():
            if self._switch(name, False):
                self.problems.append(f"{name} cannot be true: {reason}")
        self.parameters.pop(ANSWERS_FOR, None)  # read by `network_predictions`
        if self.parameters:
            self.problems.append(
                f"unknown parameter {', '.join(sorted(self.parameters))} (see the backend's docstring)"
            )

    def _threads(self, name: str) -> int | None:
        text = self.parameters.pop(name, "").strip()
        if text and not (text.isdigit() and int(text) > 0):
            self.problems.append(f"{name} must be a whole number > 0, not {text!r}")
            return None
        return int(text) if text else None

    def _switch(self, name: str, default: bool | None) -> bool | None:
        text = self.parameters.pop(name, "").strip().lower()
        if not text:
            return default
        if text not in ("true", "false"):
            self.problems.append(f"{name} must be true or false, not {text!r}")
        return text == "true"

    def apply(self) -> None:
        """Set torch's switches of this process."""
        if self.intra_op:
            torch.set_num_threads(self.intra_op)
        if self.inter_op:
            torch.set_num_interop_threads(self.inter_op)
        if self.jit_executor is not None:
            torch._C._jit_set_profiling_executor(self.jit_executor)
        if self.jit_profiling is not None:
            torch._C._jit_set_profiling_mode(self.jit_profiling)
        if self.tensor_fuser is not None:
            torch._C._jit_set_texpr_fuser_enabled(self.tensor_fuser)
        torch.jit.set_fusion_strategy(
            [("STATIC", 0), ("DYNAMIC", 2)]
        )  # batch sizes vary: no recompilation for each


class TritonPythonModel:
    """One TorchScript module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the module; whatever the configuration asks for and cannot have keeps the model from loading."""
        config = json.loads(args["model_config"])
        name = args["model_name"]
        try:
            import_torch()
        except ImportError as error:
            raise refuse(
                name, f"torch cannot be imported ({error}): install it beside Clotline, then "
                "`python -m serving install --force`, or serve the onnx format"
            ) from error  # fmt: skip
        settings = Settings(config)
        problems = settings.problems
        for entry in [*config["input"], *config["output"]]:
            if entry["data_type"] not in TORCH_TYPES:
                problems.append(f"{entry['name']}: {entry['data_type']} has no counterpart in torch")
        gpu = args["model_instance_kind"] == "GPU"
        if gpu and not torch.cuda.is_available():
            problems.append("instance_group asks for a GPU and torch sees none: use KIND_CPU")
        path = Path(
            args["model_repository"],
            args["model_version"],
            config.get("default_model_filename") or "model.pt",
        )
        if not path.exists():
            problems.append(f"{path} does not exist")
        if problems:
            raise refuse(name, "; ".join(problems))
        settings.apply()
        self.settings = settings
        self.device = torch.device(f"cuda:{args['model_instance_device_id']}" if gpu else "cpu")
        try:
            self.module = torch.jit.load(str(path), map_location=self.device).eval()
        except Exception as error:  # torch raises RuntimeError, ValueError and pickle errors alike
            raise refuse(name, f"torch {torch.__version__} cannot load {path}: {error}") from error
        self.batched = config["max_batch_size"] > 0
        arguments = [argument.name for argument in self.module.forward.schema.arguments][1:]
        self.inputs = self._positions(name, [entry["name"] for entry in config["input"]], arguments)
        self.outputs = self._positions(name, [entry["name"] for entry in config["output"]], None)
        if sorted(self.inputs.values()) != list(range(len(arguments))):
            raise refuse(
                name, f"inputs {list(self.inputs)} are not the arguments of forward ({', '.join(arguments)})"
            )
        self.predictions = network_predictions(pb_utils, args)

    def finalize(self) -> None:
        """Tell the rest of the predictions."""
        if self.predictions is not None:
            self.predictions.close()

    def _positions(self, model: str, names: list[str], arguments: list[str] | None) -> dict[str, int]:
        positions = {}
        for name in names:
            _, mark, index = name.rpartition("__")
            if arguments and name in arguments:
                positions[name] = arguments.index(name)
            elif mark and index.isdigit():
                positions[name] = int(index)
            else:
                raise refuse(model, f"{name}: a name must end in __<index> or be an argument of forward")
        return positions

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        try:
            return self._run(requests)
        except Exception as error:
            if len(requests) == 1:
                return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"PyTorch: {error}"))]
        return [response for request in requests for response in self.execute([request])]

    def _run(self, requests: list[Any]) -> list[Any]:
        if not self.batched and len(requests) > 1:
            return [response for request in requests for response in self._run([request])]
        columns: list[list[Any]] = [[]] * len(self.inputs)
        for name, position in self.inputs.items():
            columns[position] = [
                torch.from_numpy(pb_utils.get_input_tensor_by_name(r, name).as_numpy()) for r in requests
            ]
        arguments = [(torch.cat(parts) if len(parts) > 1 else parts[0]).to(self.device) for parts in columns]
        with (
            torch.inference_mode(bool(self.settings.inference_mode)),
            torch.jit.optimized_execution(self.settings.optimized),
        ):
            results = self.module(*arguments)
        if self.settings.cache_cleaning and self.device.type == "cuda":
            torch.cuda.empty_cache()
        results = results if isinstance(results, (tuple, list)) else (results,)
        arrays = {name: results[position].detach().cpu().numpy() for name, position in self.outputs.items()}
        counts = [len(tensor) for tensor in columns[0]]
        if self.predictions is not None:
            self.predictions.add(requests, counts, arrays)
        responses, start = [], 0
        for index, request in enumerate(requests):
            stop = start + counts[index] if len(requests) > 1 else None
            tensors = [
                pb_utils.Tensor(name, arrays[name][start:stop])
                for name in self.outputs
                if name in request.requested_output_names()
            ]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = stop or 0
        return responses
