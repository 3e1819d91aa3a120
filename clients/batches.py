"""Tiles of a slide, gathered into requests to a tile classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

MAX_REQUEST_BYTES = 32 * 1024 * 1024
"""Half of Triton's default limit for one HTTP request (64 MiB), so that no batch of large tiles is turned away."""


def batches(tiles: Iterable[bytes], size: int, max_bytes: int) -> Iterator[list[bytes]]:
    """Tiles in lists of at most `size` tiles and `max_bytes` bytes; a tile beyond that travels alone."""
    batch: list[bytes] = []
    held_bytes = 0
    for data in tiles:
        if batch and (len(batch) == size or held_bytes + len(data) > max_bytes):
            yield batch
            batch, held_bytes = [], 0
        batch.append(data)
        held_bytes += len(data)
    if batch:
        yield batch
