"""training/benchmarks/weak_labels.py: its data; the figures come from running it"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from slides.decode import decode_tile
from training import recipe
from training.benchmarks import weak_labels
from training.errors import DataError


@pytest.fixture
def bccd(tmp_path: Path) -> Path:
    """Three photographs, the second with a platelet."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(1)
    for number in range(3):
        small_HWC = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        photograph_HWC = cv2.resize(small_HWC, (640, 480), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / "images" / f"B_{number}.jpg"), photograph_HWC)
    (tmp_path / "boxes.csv").write_text(
        "filename,cell_type,xmin,xmax,ymin,ymax\n"
        "B_0.jpg,WBC,1,9,2,8\nB_1.jpg,Platelets,10,40,20,60\nB_1.jpg,RBC,1,2,3,4\n"
    )
    return tmp_path


def test_photographs_are_slides_of_tiles_that_cover_them(bccd: Path) -> None:
    boxes = weak_labels.platelet_boxes(bccd)
    assert boxes == {"B_1.jpg": [(10, 20, 40, 60)]}
    bags = weak_labels.photographs(bccd, 160, boxes.keys())
    assert [bag.record.label for bag in bags] == ["none", "platelets", "none"]
    assert len({bag.record.patient_id for bag in bags}) == 3
    places = bags[0].places
    assert places is not None
    photograph_HWC = cv2.imread(str(bags[0].record.path))[:, :, ::-1]
    assert len(bags[0].tiles) == 12
    covered_HW = np.zeros((480, 640), bool)
    for x, y, tile in zip(places.x_px_T, places.y_px_T, bags[0].tiles, strict=True):
        covered_HW[y : y + 160, x : x + 160] = True
        difference = decode_tile(tile, 160).astype(int) - photograph_HWC[y : y + 160, x : x + 160]
        assert np.abs(difference).mean() < 3
    assert covered_HW.all()


def test_the_recipe_of_the_benchmark_is_one() -> None:
    plan = recipe.from_dict(weak_labels.RECIPE)
    assert plan.bags is not None
    assert plan.folds == weak_labels.FOLDS


def test_no_photographs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--bccd"):
        weak_labels.platelet_boxes(tmp_path)
    with pytest.raises(DataError, match="--bccd"):
        weak_labels.photographs(tmp_path, 160, ())
