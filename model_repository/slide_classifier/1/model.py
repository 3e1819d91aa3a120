"""The encoded tiles of a slide in, the slide's answer out.

input  `tiles`          BYTES [T]      whole JPEG or PNG files, a bag of any size up to the limits
output `probabilities`  FP32 [K]       `confidence` FP32 [1], `label_index` INT64 [1]
       `attention`      FP32 [T]       of each tile, in the order of the tiles; it sums to 1
       `entropy`, `mutual_information`, `std`  FP32 [1]: how unsure the answer is, and how much its members differ
       `answered`       BOOL [1]       false: the ensemble abstains
       `member_probabilities` FP32 [M, K], `release` BYTES [1]

The pixels never come here: tiles go in small requests to the embedder, a Triton ensemble of `tile_preprocess` and the
encoders, in which Triton batches the tiles of many slides together; its embeddings go to the head, one ONNX graph.
An instance works on one slide at a time and has at most `requests_in_flight` requests under way, so memory is
bounded by the number of instances, and what waits, waits in Triton's queue. Parts never ask this model, so that however
many slides wait, the parts they wait for can always go on.

Parameters (config.pbtxt, written by the exporter): `embedder_model`, `embedder_version`, `embedder_outputs` (comma-separated, one
a member), `head_model`, `head_version`, `max_tiles`, `max_bag_bytes`, `tiles_a_request`, `requests_in_flight`, and what clients
read: `clotline_spec`, `clotline_checkpoint`, `clotline_bag`, `clotline_reference`, `clotline_release`, `clotline_unproven`.
Counted are predictions, abstentions, rejected bags and tiles a bag (docs/metrics.md).
A slide with a broken tile fails alone; the error names the tile by its place in the bag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from slides.errors import SpecError
from slides.model_metrics import BAG_EDGES, ModelMetrics, Predictions, is_probe, public_name
from slides.spec import ModelSpec

NUMBERS = (
    "embedder_version",
    "head_version",
    "max_tiles",
    "max_bag_bytes",
    "tiles_a_request",
    "requests_in_flight",
)
NEEDED = {"embedder_model", "embedder_outputs", "head_model", *NUMBERS}
FOR_CLIENTS = {
    "clotline_spec",
    "clotline_checkpoint",
    "clotline_bag",
    "clotline_reference",
    "clotline_release",
    "clotline_unproven",
}
RELEASE = "release"
_REFUSED_TILE = re.compile(r"\btile (\d+) of \d+(: .*)", re.DOTALL)
_QUEUE_IS_FULL = "maximum queue size"


REASONS = ("empty_bag", "too_many_tiles", "too_many_bytes", "broken_tile")


class Refused(Exception):
    """A slide that gets no answer; `code` is one of pb_utils.TritonError's, `reason` one of REASONS if it is the input."""

    def __init__(self, message: str, code: int, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class SlideMetrics:
    """What this instance counts of its slides."""

    def __init__(self, args: dict[str, str], classes: Sequence[str]) -> None:
        name = public_name(args["model_name"])
        self.metrics = ModelMetrics(pb_utils, args["model_instance_name"])
        self.predictions = Predictions(self.metrics, name, classes)
        self.abstentions = self.metrics.count(
            "clotline_abstentions_total", "Answers from which the ensemble abstains", {"model": name}
        )
        self.rejected = {
            reason: self.metrics.count(
                "clotline_rejected_inputs_total",
                "Inputs that got an error",
                {"model": name, "reason": reason},
            )
            for reason in REASONS
        }
        self.bag_tiles = self.metrics.histogram(
            "clotline_bag_tiles", "Tiles a bag", {"model": name}, BAG_EDGES
        )
        self.metrics.show()

    def add(self, answers: dict[str, Any]) -> None:
        """Count what a slide was answered."""
        confidence, label_index = (answers[key].as_numpy().item() for key in ("confidence", "label_index"))
        self.predictions.add(label_index, confidence)
        if not answers["answered"].as_numpy().item():
            self.abstentions.add()


class TritonPythonModel:
    """Asks the embedder and the head; holds no state but its limits and threads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameters; an unknown, missing or impossible one keeps the model from loading."""
        config = json.loads(args["model_config"])
        values = {key: entry["string_value"] for key, entry in config.get("parameters", {}).items()}
        problems = [f"unknown parameter {name}" for name in sorted(set(values) - NEEDED - FOR_CLIENTS)]
        problems += [f"parameter {name} is missing" for name in sorted(NEEDED - set(values))]
        problems += [
            f"{name} must be a whole number above 0, not {values[name]!r}"
            for name in NUMBERS
            if name in values and not (values[name].isdecimal() and int(values[name]))
        ]
        classes: Sequence[str] = ()
        if "clotline_spec" in values:
            try:
                classes = ModelSpec.from_json(values["clotline_spec"]).class_names
            except SpecError as error:
                problems.append(f"clotline_spec: {error}")
        if problems:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {'; '.join(problems)}")
        self.embedder, self.head = values["embedder_model"], values["head_model"]
        self.embedder_outputs = values["embedder_outputs"].split(",")
        for name in NUMBERS:
            setattr(self, name, int(values[name]))
        self.outputs = [entry["name"] for entry in config["output"]]
        self.release = values.get("clotline_release") or f"{args['model_name']}/{args['model_version']}"
        self.threads = ThreadPoolExecutor(self.requests_in_flight, thread_name_prefix="tiles")
        self.metrics = SlideMetrics(args, classes)

    def finalize(self) -> None:
        """End the threads, and tell the rest of the counts."""
        self.threads.shutdown(cancel_futures=True)
        self.metrics.metrics.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        counted = not is_probe(request)
        try:
            if request.is_cancelled():  # while it waited in the queue
                raise Refused("nobody waits for this slide any more", pb_utils.TritonError.CANCELLED)
            tiles = pb_utils.get_input_tensor_by_name(request, "tiles").as_numpy().reshape(-1)
            self._check_limits(tiles)
            if counted:
                self.metrics.bag_tiles.add(len(tiles))
            request_id = request.request_id()
            answers = self._pool(self._embed(tiles, request_id), request_id)
        except Refused as refused:
            if counted and refused.reason:
                self.metrics.rejected[refused.reason].add()
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(refused), refused.code))
        if counted:
            self.metrics.add(answers)
        answers[RELEASE] = pb_utils.Tensor(RELEASE, np.array([self.release], dtype=np.object_))
        wanted = set(request.requested_output_names())
        return pb_utils.InferenceResponse([answers[name] for name in self.outputs if name in wanted])

    def _check_limits(self, tiles: np.ndarray) -> None:
        count, size = len(tiles), sum(map(len, tiles))
        if not 1 <= count <= self.max_tiles:
            reason = "too_many_tiles" if count else "empty_bag"
            problem = f"the bag has {count} tiles; from 1 to {self.max_tiles} are taken"
        elif size > self.max_bag_bytes:
            reason = "too_many_bytes"
            problem = f"the bag has {size} bytes; at most {self.max_bag_bytes} are taken"
        else:
            return
        raise Refused(problem, pb_utils.TritonError.INVALID_ARG, reason)

    def _embed(self, tiles: np.ndarray, request_id: str) -> list[np.ndarray]:
        """Embeddings FP32 [T, D] of each member."""
        futures: list[Future[list[np.ndarray]]] = []
        try:
            for start in range(0, len(tiles), self.tiles_a_request):
                part = tiles[start : start + self.tiles_a_request]
                futures.append(self.threads.submit(self._embed_part, part, start, len(tiles), request_id))
            parts = [future.result() for future in futures]
        finally:
            for future in futures:  # after a failure: what has not begun never does
                future.cancel()
        return [np.concatenate(of_member) for of_member in zip(*parts, strict=True)]

    def _embed_part(self, tiles: np.ndarray, start: int, count: int, request_id: str) -> list[np.ndarray]:
        tensor = pb_utils.Tensor("tile", tiles.reshape(-1, 1))
        try:
            found = self._ask(
                self.embedder, self.embedder_version, [tensor], self.embedder_outputs, request_id
            )
        except Refused as refused:
            told = _REFUSED_TILE.search(str(refused))
            if told is None:
                raise
            # tile_preprocess counts within the request, and Triton gives no code of a part's error.
            message = f"tile {start + int(told[1])} of {count}{told[2]}"
            raise Refused(message, pb_utils.TritonError.INVALID_ARG, "broken_tile") from None
        return [found[name].as_numpy() for name in self.embedder_outputs]

    def _pool(self, embeddings: list[np.ndarray], request_id: str) -> dict[str, Any]:
        names = (
            ["embeddings"] if len(embeddings) == 1 else [f"embeddings_{m}" for m in range(len(embeddings))]
        )
        tensors = [pb_utils.Tensor(name, values) for name, values in zip(names, embeddings, strict=True)]
        wanted = [name for name in self.outputs if name != RELEASE]
        return self._ask(self.head, self.head_version, tensors, wanted, request_id)

    def _ask(
        self, model: str, version: int, inputs: list[Any], outputs: list[str], request_id: str
    ) -> dict[str, Any]:
        request = pb_utils.InferenceRequest(
            model_name=model,
            model_version=version,
            inputs=inputs,
            requested_output_names=outputs,
            request_id=request_id,
        )
        response = request.exec()
        if response.has_error():
            message = response.error().message()
            busy = _QUEUE_IS_FULL in message
            raise Refused(
                message, pb_utils.TritonError.UNAVAILABLE if busy else pb_utils.TritonError.INTERNAL
            )
        return {name: pb_utils.get_output_tensor_by_name(response, name) for name in outputs}
