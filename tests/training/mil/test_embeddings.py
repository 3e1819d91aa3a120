"""training/mil/embeddings.py"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slides.decode import decode_tile
from training.errors import DataError
from training.mil import embeddings
from training.mil.bags import Augmentation, SlideBag
from training.mil.network import build_encoder
from training.mil.options import BagOptions
from training.network import TileEncoder

from .conftest import SPEC, make_bags

OPTIONS = BagOptions(tiles=4, encoder="frozen")


@pytest.fixture
def encoder() -> TileEncoder:
    torch.manual_seed(1)
    return build_encoder("squeezenet1_1", SPEC, OPTIONS).module.eval()


@pytest.fixture
def counted(encoder: TileEncoder) -> list[int]:
    """Grows by the number of tiles whenever the encoder is called."""
    calls: list[int] = []
    encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    return calls


def embed(
    bags: list[SlideBag], encoder: TileEncoder, folder: Path, **changes: Any
) -> list[NDArray[np.float32]]:
    arguments = {"options": OPTIONS, "augmentation": Augmentation(0.1), "seed": 1, **changes}
    return embeddings.embeddings_of(bags, encoder, SPEC, folder=folder, show_progress=False, **arguments)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_embeddings_are_the_encoders_answers(encoder: TileEncoder, tmp_path: Path) -> None:
    bags = make_bags(2)
    for bag, found_VTD in zip(bags, embed(bags, encoder, tmp_path), strict=True):
        tiles_NHWC = torch.from_numpy(np.stack([decode_tile(tile, 32) for tile in bag.tiles]))
        with torch.no_grad():
            expected_TD = encoder(tiles_NHWC).numpy()
        assert found_VTD.shape == (1, len(bag.tiles), encoder.feature_dim)
        assert np.allclose(found_VTD[0], expected_TD, atol=1e-5)


def test_what_is_there_is_used(encoder: TileEncoder, counted: list[int], tmp_path: Path) -> None:
    bags = make_bags(2)
    first = embed(bags, encoder, tmp_path)
    assert sum(counted) == sum(len(bag.tiles) for bag in bags)
    counted.clear()
    again = embed(bags[::-1], encoder, tmp_path)
    assert counted == []
    assert all(np.array_equal(one, other) for one, other in zip(first, again[::-1], strict=True))
    embed(bags, encoder, tmp_path, seed=5)  # without views the seed changes nothing
    assert counted == []


def test_only_what_is_new_is_embedded(encoder: TileEncoder, counted: list[int], tmp_path: Path) -> None:
    bags = make_bags(4)
    embed(bags[:3], encoder, tmp_path)
    counted.clear()
    embed(bags, encoder, tmp_path)
    assert sum(counted) == sum(len(bag.tiles) for bag in bags[3:])


def test_other_weights_tiles_or_views_find_no_file(
    encoder: TileEncoder, counted: list[int], tmp_path: Path
) -> None:
    import dataclasses

    (bag, *_) = make_bags(1)
    embed([bag], encoder, tmp_path)
    counted.clear()
    changed = dataclasses.replace(bag, tiles=(*bag.tiles[:-1], bag.tiles[0]))
    embed([changed], encoder, tmp_path)
    assert counted == [len(bag.tiles)]
    embed([bag], encoder, tmp_path, options=BagOptions(tiles=4, encoder="frozen", views=1))
    assert len(counted) == 3
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1e-3
    embed([bag], encoder, tmp_path)
    assert len(counted) == 4


def test_views_differ_and_are_always_the_same(encoder: TileEncoder, tmp_path: Path) -> None:
    bags = make_bags(1)
    options = BagOptions(tiles=4, encoder="frozen", views=2)
    first, _ = embed(bags, encoder, tmp_path / "one", options=options)
    again, _ = embed(bags, encoder, tmp_path / "two", options=options)
    other, _ = embed(bags, encoder, tmp_path / "three", options=options, seed=2)
    assert first.shape[0] == 3
    assert np.array_equal(first, again)
    assert np.array_equal(first[0], other[0])
    assert not np.allclose(first[1], first[2])
    assert not np.allclose(first[1], other[1])


def test_a_file_that_was_cut_short_is_made_again(encoder: TileEncoder, tmp_path: Path) -> None:
    bags = make_bags(1)
    before = [np.array(found) for found in embed(bags, encoder, tmp_path)]
    for path, size in zip(files(tmp_path), (40, 0), strict=True):
        os.truncate(path, size)
    assert all(
        np.array_equal(one, other) for one, other in zip(before, embed(bags, encoder, tmp_path), strict=True)
    )
    assert all(path.suffix == ".npy" and not path.name.startswith(".") for path in files(tmp_path))


def test_every_slide_with_a_bad_tile_is_named(encoder: TileEncoder, tmp_path: Path) -> None:
    import dataclasses

    bags = make_bags(2)
    bad = [
        dataclasses.replace(bags[number], tiles=(*bags[number].tiles[1:], b"no image")) for number in (0, 2)
    ]
    with pytest.raises(DataError, match=r"2 of 4 slides cannot be embedded.*\n.*p00_0.*\n.*p01_0"):
        embed([bad[0], bags[1], bad[1], bags[3]], encoder, tmp_path)


def test_the_folder_is_the_users_cache_unless_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CLOTLINE_CACHE", raising=False)
    assert embeddings.cache_folder() == tmp_path / "clotline" / "embeddings"
    monkeypatch.setenv("CLOTLINE_CACHE", str(tmp_path / "own"))
    assert embeddings.cache_folder() == tmp_path / "own" / "embeddings"
