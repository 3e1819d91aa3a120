"""The parity gate where it counts: the encoded tile goes into a real tritonserver, and what comes out is compared.

The same tiles that an artefact answered in this process are sent as JPEG or PNG to each ensemble, at batch 1, 2 and the
largest, over HTTP and over gRPC. So decoding in the server, the ensemble's wiring, tensor names, labels and backends are
proven with the network. The answers are held to the same table, `exporters.tolerances`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exporters.comparison_tiles import ComparisonTiles, EncodedTile
from exporters.errors import ParityError
from exporters.formats.interface import Answer, ServedFormat
from exporters.parity import Parity, compare
from exporters.proving_server import PROTOCOLS, ProvingServer
from exporters.triton_config import OUTPUTS
from slides.errors import SpecError
from slides.spec import ModelSpec

TILE_INPUT = "tile"
"""Name of the ensembles' input, BYTES [N, 1]."""
SPEC_PARAMETER = "clotline_spec"


@dataclass(frozen=True)
class ServedParity:
    """How closely an ensemble follows PyTorch, over each protocol."""

    http: Parity
    grpc: Parity


def check_served_on(
    server: ProvingServer,
    classifiers: Mapping[str, ServedFormat],
    tiles: ComparisonTiles,
    expected: Answer,
    *,
    spec: ModelSpec,
    max_batch: int,
    announce: Callable[[str], object] = print,
) -> dict[str, ServedParity]:
    """Prove ensembles on a server that is up.

    Args:
        classifiers: ensemble -> the format that it answers with; the server has to have a backend for it
            (`proving_server.unservable_here`).
        tiles: what is sent.
        expected: PyTorch's answer to them.
        spec: what the ensembles have to say of themselves.
        max_batch: the largest batch that will be served.
        announce: told what is going on, for a progress bar.

    Raises:
        ServedError: the server is gone.
        ParityError: an ensemble does not answer as PyTorch does.
        GoldenTilesError: too few tiles for a precision.
    """
    proven = {}
    for name, fmt in classifiers.items():
        check_spec(server, name, spec)
        measured = {}
        for protocol in PROTOCOLS:
            _check_labels(server, protocol, name, tiles.encoded[0], spec)
            measured[protocol] = compare(
                f"{fmt.name}: {name} over {protocol}",
                _asker(server, protocol, name, tiles.encoded, announce),
                expected,
                max_batch=max_batch,
                precision=fmt.precision,
                truth=tiles.truth,
            )
        proven[name] = ServedParity(**measured)
    return proven


def tile_tensor(tiles: Sequence[EncodedTile]) -> np.ndarray:
    """Encoded tiles as the BYTES tensor [N, 1]."""
    tiles_N1 = np.empty((len(tiles), 1), dtype=np.object_)
    for row, tile in enumerate(tiles):  # as a list, NumPy would cut trailing zero bytes off
        tiles_N1[row, 0] = tile.data
    return tiles_N1


def _asker(
    server: ProvingServer,
    protocol: str,
    name: str,
    tiles: Sequence[EncodedTile],
    announce: Callable[[str], object],
) -> Callable[[np.ndarray], Answer]:
    told_s = 0.0

    def ask(rows: np.ndarray) -> Answer:
        nonlocal told_s
        if time.monotonic() - told_s > 0.5:
            told_s = time.monotonic()
            announce(f"{name} over {protocol}: batch {len(rows)}, tile {rows[0]} of {len(tiles)}")
        batch = tile_tensor([tiles[row] for row in rows])
        answers = server.ask(protocol, name, {TILE_INPUT: batch}, OUTPUTS)
        return Answer(*(answers[output] for output in OUTPUTS))

    return ask


def check_spec(server: ProvingServer, name: str, spec: ModelSpec) -> None:
    """Hold what a public model says of itself, by which clients cut tiles and name classes, to the checkpoint's.

    Raises:
        ParityError: it says something else, or nothing.
    """
    parameter = server.config(name).get("parameters", {}).get(SPEC_PARAMETER, {})
    try:
        said = ModelSpec.from_json(parameter.get("string_value", ""))
    except SpecError as error:
        raise ParityError(
            f"{name}: its {SPEC_PARAMETER} is no specification: {error}. Nothing was published."
        ) from error
    if said != spec:
        theirs, ours = said.as_dict(), spec.as_dict()
        different = "; ".join(
            f"{key} {theirs[key]!r}, not {ours[key]!r}" for key in ours if theirs[key] != ours[key]
        )
        raise ParityError(
            f"{name}: its {SPEC_PARAMETER} is not the checkpoint's: {different}. Nothing was published."
        )


def _check_labels(
    server: ProvingServer, protocol: str, name: str, tile: EncodedTile, spec: ModelSpec
) -> None:
    said = server.label_names(
        protocol, name, {TILE_INPUT: tile_tensor([tile])}, OUTPUTS[0], len(spec.class_names)
    )
    if said != list(spec.class_names):
        raise ParityError(
            f"{name} over {protocol}: the server calls the classes {', '.join(said)}; the checkpoint calls them "
            f"{', '.join(spec.class_names)}. Nothing was published."
        )
