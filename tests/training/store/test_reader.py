from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas
import pytest

from slides.decode import decode_tile
from slides.labels import read_labels
from slides.reader import open_slide
from slides.spec import ModelSpec
from slides.tissue import find_tiles
from training.errors import StoreError
from training.store.reader import TileStore
from training.store.spec import StoreSpec


@pytest.fixture
def copy(store: TileStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.path, tmp_path / "copy"))


def model(**changes: object) -> ModelSpec:
    values = {
        "class_names": ("CE", "LAA"),
        "tile_size_px": 64,
        "um_per_px": 0.5,
        "input_size_px": 64,
        "tiles_per_slide": 6,
        "min_tissue_share": 0.5,
    }
    return ModelSpec(**{**values, **changes})  # type: ignore[arg-type]


def test_slides_are_those_of_the_labels(store: TileStore, data_dir: Path) -> None:
    assert list(store.slides) == read_labels(data_dir, class_names=("CE", "LAA"))
    assert store.failed == ()
    assert store.class_names == ("CE", "LAA")
    assert sum(len(store.rows_of(record.image_id)) for record in store.slides) == len(store) > 100
    assert [row for record in store.slides for row in store.rows_of(record.image_id)] == list(
        range(len(store))
    )
    with pytest.raises(KeyError):
        store.rows_of("nobody")


def test_tiles_decode_and_rows_outside_are_refused(store: TileStore) -> None:
    for row in (0, 63, 64, len(store) - 1):
        assert decode_tile(store.tile(row), 64).shape == (64, 64, 3)
    for row in (-1, len(store)):
        with pytest.raises(IndexError):
            store.tile(row)


def test_pickled_and_read_from_threads(store: TileStore) -> None:
    again = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert again.fingerprint == store.fingerprint
    rows = [*range(len(store))] * 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.tile, rows)) == [store.tile(row) for row in rows]
    assert len(pickle.dumps(store)) < 1000


def test_no_file_stays_open(store: TileStore) -> None:
    """A store of thousands of slides must not run into the limit of open files."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    again = TileStore.open(store.path)
    for record in again.slides:
        again.tile(again.rows_of(record.image_id)[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_richest_are_those_of_a_client_with_fewer_tiles(store: TileStore) -> None:
    for record in store.slides:
        with open_slide(record.path) as slide:
            for count in (1, 6, 33):
                wanted = find_tiles(slide, model(tiles_per_slide=count, min_tissue_share=0.7))
                rows = store.richest(record.image_id, count, 0.7)
                columns = store.index.take(rows).to_pydict()
                found = list(zip(columns["x_px"], columns["y_px"], strict=True))
                assert found == [(ref.x_px, ref.y_px) for ref in wanted]


def test_the_darkest(store: TileStore) -> None:
    rows = store.darkest("p0_0", 5)
    darkness = store.index.column("darkness").to_pylist()
    assert [darkness[row] for row in rows] == sorted(
        (darkness[row] for row in store.rows_of("p0_0")), reverse=True
    )[:5]


def test_any_tool_reads_the_index(store: TileStore) -> None:
    table = pandas.read_parquet(store.path / "index.parquet")
    assert len(table) == len(store)
    assert set(table.groupby("patient_id", observed=True).size().index) == {"p0", "p1", "p2", "p3"}


def test_a_model_that_expects_other_tiles(store: TileStore) -> None:
    store.check_fits(model())
    with pytest.raises(
        StoreError, match=r"(?s)3 problems.*tile_size_px.*min_tissue_share.*labels LAA"
    ) as caught:
        store.check_fits(model(tile_size_px=128, min_tissue_share=0.2, class_names=("CE", "other")))
    assert "um_per_px" not in str(caught.value)


def test_missing_unfinished_and_damaged(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is missing"):
        TileStore.open(tmp_path / "nowhere")
    file = copy / "slides" / "p1_0.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(StoreError, match=r"p1_0\.arrow has \d+ bytes, not"):
        TileStore.open(copy)
    file.write_bytes(bytes(len(whole)))
    damaged = TileStore.open(copy)
    with pytest.raises(StoreError, match=r"p1_0\.arrow is damaged"):
        damaged.tile(damaged.rows_of("p1_0")[0])
    index = copy / "index.parquet"
    index.write_bytes(index.read_bytes()[:200])
    with pytest.raises(StoreError, match=r"index\.parquet is damaged"):
        TileStore.open(copy)
    index.unlink()
    with pytest.raises(StoreError, match="not finished"):
        TileStore.open(copy)


def test_impossible_values_are_all_named() -> None:
    with pytest.raises(
        StoreError, match=r"(?s)4 problems.*tile_size_px.*jpeg_quality.*stain_normalise.*slide_um"
    ) as caught:
        StoreSpec(
            tile_size_px=1, um_per_px=0.5, tiles_per_slide=4, min_tissue_share=0.5, jpeg_quality=101,
            stain_normalise="vahadane", slide_um_per_px=-1.0,
        )  # fmt: skip
    assert "um_per_px must be above" not in str(caught.value)


def test_neither_torch_nor_openslide_is_loaded_to_read() -> None:
    code = "import sys, training.store.reader; print([n for n in ('torch', 'torchstain', 'jinja2') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
