"""Requests that are asked many times, built beforehand for HTTP and gRPC: good ones, and bad ones of every kind.

A bad one says what is wrong with it by its kind, and what the refusal has to tell.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from serving.errors import RepositoryError
from serving.triton_http import Refused, TritonHttp
from slides.decode import encode_tile

GOOD = "good"
BROKEN = b"this is no image"
BOMB_SIDE_PX = 60_000
BATCH = 3
BAG = 5


@dataclass(frozen=True)
class Tensor:
    """An input as it travels: `data` is its binary form."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        kind: GOOD, or what is wrong.
        path: of the HTTP request.
        header_bytes: length of the JSON before the tensors in `body`; None: not told.
        body: of the HTTP request.
        message: the same over gRPC.
        outputs: names of the tensors that are compared.
        says: expression that the refusal has to match.
    """

    kind: str
    path: str
    header_bytes: int | None
    body: bytes
    message: service_pb2.ModelInferRequest
    outputs: tuple[str, ...]
    says: str = "."

    @property
    def good(self) -> bool:
        """True if it has to be answered."""
        return self.kind == GOOD


def config_of(triton: TritonHttp, model: str) -> dict[str, Any]:
    """The configuration of a model that is to be asked. Raises RepositoryError where the server has none."""
    try:
        return triton.config(model)
    except Refused as error:
        raise RepositoryError(
            f"--repository serves no {model}, which is to be asked (its server says: {error})."
        ) from error


def serialised(values: Sequence[bytes]) -> bytes:
    """BYTES elements as they travel: four bytes of length before each."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def question(
    kind: str,
    model: str,
    tensors: Sequence[Tensor],
    outputs: tuple[str, ...],
    *,
    says: str = ".",
    version: str = "",
) -> Question:
    """A request of the binary tensor data extension, and of ModelInfer."""
    inputs = [
        {
            "name": t.name,
            "datatype": t.datatype,
            "shape": t.shape,
            "parameters": {"binary_data_size": len(t.data)},
        }
        for t in tensors
    ]
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    header = json.dumps({"inputs": inputs, "outputs": wanted}).encode()
    message = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    for tensor in tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    for name in outputs:
        message.outputs.add(name=name)
    path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
    body = b"".join((header, *(tensor.data for tensor in tensors)))
    return Question(kind, path, len(header), body, message, outputs, says)


def bomb(tile: bytes) -> bytes:
    """The JPEG with a frame header that announces BOMB_SIDE_PX x BOMB_SIDE_PX pixels (ITU-T T.81, B.2.2)."""
    frame = re.search(rb"\xff[\xc0-\xc2]..\x08....", tile, re.DOTALL)
    assert frame is not None  # noqa: S101  a JPEG of our own encoder
    at = frame.start() + 5
    return tile[:at] + struct.pack(">HH", BOMB_SIDE_PX, BOMB_SIDE_PX) + tile[at + 4 :]


@dataclass(frozen=True)
class TileQuestions:
    """Requests to a tile classifier.

    Attributes:
        model: its name.
        tiles: good ones.
        max_batch: most tiles of one request.
        max_tile_bytes: most bytes of one tile.
    """

    model: str
    tiles: Sequence[bytes]
    max_batch: int
    max_tile_bytes: int
    outputs: tuple[str, ...] = ("probabilities", "confidence", "label_index")

    def good(self) -> list[Question]:
        """Single tiles, each of them, and a batch for every fourth."""
        batch = min(BATCH, self.max_batch)
        rows = [self.tiles[start : start + batch] for start in range(0, len(self.tiles) - batch + 1, 4)]
        return [self._ask(GOOD, [tile]) for tile in self.tiles] + [self._ask(GOOD, row) for row in rows]

    def bad(self) -> list[Question]:
        """One or more of each kind."""
        tile = self.tiles[0]
        data = serialised([tile])
        large = tile + bytes(self.max_tile_bytes + 1 - len(tile))
        wrong_tiles = {
            "not an image": (BROKEN, "is no image"),
            "no bytes": (b"", "no bytes"),
            "cut off": (tile[: len(tile) // 2], "truncated"),
            "cut off in its header": (tile[:40], "truncated"),
            "damaged": (tile[:2] + b"\xff" + bytes(60), "marker"),
            "decompression bomb": (bomb(tile), f"{BOMB_SIDE_PX} x {BOMB_SIDE_PX} px"),
            "too many bytes": (large, f"at most {self.max_tile_bytes}"),
            "too many bytes, none of an image": (bytes(len(large)), f"at most {self.max_tile_bytes}"),
            "too many bytes of a PNG": (b"\x89PNG" + large[4:], f"at most {self.max_tile_bytes}"),
            "too small": (encode_tile(np.zeros((4, 4, 3), np.uint8), 90), "4 x 4 px"),
        }
        found = [
            self._ask(kind, [made], says=rf"\btile 0 of 1: .*({says})")
            for kind, (made, says) in wrong_tiles.items()
        ]
        batch = min(BATCH, self.max_batch)
        for place in range(batch if batch > 1 else 0):
            row = [*self.tiles[:batch]]
            row[place] = BROKEN
            found.append(
                self._ask("broken tile in a batch", row, says=rf"\btile {place} of {batch}: .*is no image")
            )
        if batch > 1:
            says = rf"\btile 1 of {batch}: .*at most {self.max_tile_bytes}"
            found.append(self._ask("too many bytes in a batch", [tile, large, *self.tiles[2:batch]], says))
        good = Tensor("tile", "BYTES", (1, 1), data)
        found += [
            self._raw("wrong dtype", Tensor("tile", "FP32", (1, 1), bytes(4)), says="tile.*(FP32|BYTES)"),
            self._raw("wrong dtype", Tensor("tile", "UINT8", (1, len(tile)), tile), says="tile"),
            self._raw("wrong shape", Tensor("tile", "BYTES", (1,), data), says="shape"),
            self._raw("wrong shape", Tensor("tile", "BYTES", (1, 2), serialised([tile, tile])), says="shape"),
            self._raw("wrong shape", Tensor("tile", "BYTES", (1, 1, 1), data), says="shape"),
            self._raw("wrong name", Tensor("image", "BYTES", (1, 1), data), says="image|tile"),
            self._ask("batch too large", [tile] * (self.max_batch + 1), says=f"batch.*{self.max_batch}"),
            self._raw("batch of none", Tensor("tile", "BYTES", (0, 1), b""), says="tile|batch"),
            self._raw("fewer tiles than the shape says", Tensor("tile", "BYTES", (2, 1), data), says="tile"),
            self._raw(
                "more tiles than the shape says", Tensor("tile", "BYTES", (1, 1), 2 * data), says="tile"
            ),
            self._raw("length beyond the data", Tensor("tile", "BYTES", (1, 1), data[:-9]), says="tile"),
            self._raw("bytes without a length", Tensor("tile", "BYTES", (1, 1), b"ab"), says="tile"),
            question("no input", self.model, [], self.outputs, says="input"),
            question("input twice", self.model, [good, good], self.outputs, says="tile|input"),
            question("unknown output", self.model, [good], ("heatmap",), says="heatmap"),
            question("unknown model", f"{self.model}_none", [good], self.outputs, says=f"{self.model}_none"),
            question("unknown version", self.model, [good], self.outputs, says=self.model, version="97"),
            question(
                "version that is no number",
                self.model,
                [good],
                self.outputs,
                says="version|Not Found",
                version="x",
            ),
        ]
        whole = question("", self.model, [good], self.outputs)
        negative = self._raw(
            "negative shape", Tensor("tile", "BYTES", (1, -1), data), says="shape|element|dim"
        )
        lacking = service_pb2.ModelInferRequest()
        lacking.CopyFrom(whole.message)
        del lacking.raw_input_contents[:]
        found += [
            replace(whole, kind="no tensors", body=whole.body[: whole.header_bytes], message=lacking),
            negative,
            replace(whole, kind="not JSON", body=b"tile=" + whole.body[5:], message=lacking),
            replace(
                whole, kind="header longer than the body", header_bytes=len(whole.body) + 9, message=lacking
            ),
            replace(
                whole,
                kind="no length of the header",
                header_bytes=None,
                message=lacking,
            ),
            replace(
                whole,
                kind="no body",
                body=b"",
                header_bytes=None,
                message=service_pb2.ModelInferRequest(model_name=self.model),
            ),
        ]
        return found

    def _ask(self, kind: str, tiles: Sequence[bytes], says: str = ".") -> Question:
        return self._raw(kind, Tensor("tile", "BYTES", (len(tiles), 1), serialised(tiles)), says)

    def _raw(self, kind: str, tensor: Tensor, says: str = ".") -> Question:
        return question(kind, self.model, [tensor], self.outputs, says=says)


@dataclass(frozen=True)
class BagQuestions:
    """Requests to a slide classifier that takes at most `max_tiles` tiles."""

    model: str
    tiles: Sequence[bytes]
    max_tiles: int
    outputs: tuple[str, ...] = ("probabilities", "attention")

    def good(self) -> list[Question]:
        """Bags of one to BAG tiles."""
        return [
            self._ask(GOOD, self.tiles[:count])
            for count in range(1, min(BAG, len(self.tiles), self.max_tiles) + 1)
        ]

    def bad(self) -> list[Question]:
        """One or more of each kind."""
        found = []
        bag = self.tiles[: min(BAG, self.max_tiles)]
        for place in range(len(bag)):
            broken = [*bag]
            broken[place] = BROKEN
            found.append(
                self._ask(
                    "broken tile in a bag", broken, says=rf"\btile {place} of {len(bag)}: .*is no image"
                )
            )
        cut_off = [*bag[:-1], bag[-1][: len(bag[-1]) // 2]]
        return [
            *found,
            self._ask("tile cut off in a bag", cut_off, says=rf"\btile {len(bag) - 1} of {len(bag)}: .*truncated"),
            self._ask("empty bag", [], says="tiles"),
            question("bag cut off", self.model, [Tensor("tiles", "BYTES", (len(bag),), serialised(bag)[:-9])],
                     self.outputs, says="tiles"),
            self._ask("too many tiles in a bag", [BROKEN] * (self.max_tiles + 1), says=f"1 to {self.max_tiles}"),
            question("wrong shape of a bag", self.model, [Tensor("tiles", "BYTES", (1, 1), serialised(bag[:1]))],
                     self.outputs, says="shape"),
        ]  # fmt: skip

    def _ask(self, kind: str, tiles: Sequence[bytes], says: str = ".") -> Question:
        tensor = Tensor("tiles", "BYTES", (len(tiles),), serialised(tiles))
        return question(kind, self.model, [tensor], self.outputs, says=says)
