"""A set of ready-cut tiles, white blood cells against red, from the BCCD photographs, in the layout that training reads."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import cv2
import numpy as np

from slides.decode import encode_tile
from training.errors import DataError

BCCD_DIR = Path(__file__).resolve().parents[3] / "shared" / "bccd"
CLASS_NAMES = ("RBC", "WBC")
RED_PHOTOGRAPH_EVERY = 6
RED_CELLS_A_PHOTOGRAPH = 12

_Box = tuple[int, ...]


def make_bccd_tiles(out_dir: Path, *, bccd_dir: Path = BCCD_DIR, seed: int = 7) -> Path:
    """Write train.csv and train/<image_id>.jpg: about 250 white and 500 red cells.

    A photograph is the patient. A patient has one class in train.csv, so each photograph gives cells of one kind:
    five photographs of six their white cells, the sixth its red ones.

    Raises:
        DataError: boxes.csv or a photograph is missing or damaged.
    """
    boxes_of = _boxes(bccd_dir)
    generator = random.Random(seed)  # noqa: S311  not for secrets
    names = sorted(boxes_of)
    generator.shuffle(names)
    (out_dir / "train").mkdir(parents=True, exist_ok=True)
    rows = []
    for place, name in enumerate(names):
        label = "RBC" if place % RED_PHOTOGRAPH_EVERY == 0 else "WBC"
        boxes = boxes_of[name].get(label, [])
        if label == "RBC":
            boxes = generator.sample(boxes, min(len(boxes), RED_CELLS_A_PHOTOGRAPH))
        photograph = cv2.imread(str(bccd_dir / "images" / name))
        if photograph is None:
            raise DataError(str(bccd_dir), [f"images/{name} is missing or no image; give the BCCD folder"])
        patient_id = Path(name).stem
        for number, box in enumerate(boxes):
            tile_HWC = _square_around(photograph[:, :, ::-1], box)
            image_id = f"{patient_id}_{number}"
            (out_dir / "train" / f"{image_id}.jpg").write_bytes(encode_tile(tile_HWC, 95))
            rows.append((image_id, "1", patient_id, str(number), label))
    with (out_dir / "train.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "center_id", "patient_id", "image_num", "label"))
        writer.writerows(sorted(rows))
    return out_dir


def _boxes(bccd_dir: Path) -> dict[str, dict[str, list[_Box]]]:
    """Photograph -> type of cell -> boxes (left, top, right, bottom), pixels."""
    boxes_of: dict[str, dict[str, list[_Box]]] = {}
    try:
        with (bccd_dir / "boxes.csv").open(newline="") as stream:
            for row in csv.DictReader(stream):
                box = tuple(int(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
                boxes_of.setdefault(row["filename"], {}).setdefault(row["cell_type"], []).append(box)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(str(bccd_dir), [f"boxes.csv: {error}; give the BCCD folder"]) from error
    return boxes_of


def _square_around(photograph_HWC: np.ndarray, box: _Box) -> np.ndarray:
    """The square of the longer side of the box plus a tenth, moved inside the photograph."""
    height_px, width_px = photograph_HWC.shape[:2]
    left, top, right, bottom = box
    side_px = min(max(32, round(1.1 * max(right - left, bottom - top))), height_px, width_px)
    x_px = min(max(0, (left + right - side_px) // 2), width_px - side_px)
    y_px = min(max(0, (top + bottom - side_px) // 2), height_px - side_px)
    return photograph_HWC[y_px : y_px + side_px, x_px : x_px + side_px]
