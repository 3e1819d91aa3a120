"""A set of ready-cut tiles, WBC against RBC, from the BCCD photographs, in the layout that training reads."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import cv2

from slides.decode import encode_tile

BCCD_DIR = Path(__file__).resolve().parents[2] / "shared" / "bccd"
CLASS_NAMES = ("RBC", "WBC")
RED_PHOTOGRAPH_EVERY = 6
RED_CELLS_A_PHOTOGRAPH = 12


def make_bccd_tiles(out_dir: Path, *, bccd_dir: Path = BCCD_DIR, seed: int = 7) -> Path:
    """Write train.csv and train/<image_id>.jpg: about 250 white and 500 red cells.

    A photograph is the patient. A patient has one class in train.csv, so each photograph gives cells of one kind:
    five photographs of six their white cells, the sixth its red ones.
    """
    boxes_of: dict[str, dict[str, list[tuple[int, int, int, int]]]] = {}
    with (bccd_dir / "boxes.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            box = tuple(int(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes_of.setdefault(row["filename"], {}).setdefault(row["cell_type"], []).append(box)  # type: ignore[arg-type]
    generator = random.Random(seed)
    names = sorted(boxes_of)
    generator.shuffle(names)
    (out_dir / "train").mkdir(parents=True, exist_ok=True)
    rows = []
    for place, name in enumerate(names):
        label = "RBC" if place % RED_PHOTOGRAPH_EVERY == 0 else "WBC"
        boxes = boxes_of[name].get(label, [])
        if label == "RBC":
            boxes = generator.sample(boxes, min(len(boxes), RED_CELLS_A_PHOTOGRAPH))
        photograph_HWC = cv2.imread(str(bccd_dir / "images" / name))[:, :, ::-1]
        patient_id = Path(name).stem
        for number, box in enumerate(boxes):
            tile_HWC = _square_around(photograph_HWC, box)
            image_id = f"{patient_id}_{number}"
            (out_dir / "train" / f"{image_id}.jpg").write_bytes(encode_tile(tile_HWC, 95))
            rows.append((image_id, "1", patient_id, str(number), label))
    with (out_dir / "train.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "center_id", "patient_id", "image_num", "label"))
        writer.writerows(sorted(rows))
    return out_dir


def _square_around(photograph_HWC, box):  # type: ignore[no-untyped-def]
    """The square of the longer side of the box plus a tenth, moved inside the photograph."""
    height_px, width_px = photograph_HWC.shape[:2]
    left, top, right, bottom = box
    side_px = min(max(32, round(1.1 * max(right - left, bottom - top))), height_px, width_px)
    x_px = min(max(0, (left + right - side_px) // 2), width_px - side_px)
    y_px = min(max(0, (top + bottom - side_px) // 2), height_px - side_px)
    return photograph_HWC[y_px : y_px + side_px, x_px : x_px + side_px]
