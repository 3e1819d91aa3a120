"""Plots that the sender draws from files of a run: learning curves of history.json, a confusion matrix of held_out.csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MAX_CURVES = 12


def draw(path: Path, directory: Path) -> list[Path]:
    """Draw what belongs to `path` into `directory`; other files than those above give nothing.

    Raises:
        ValueError, KeyError, OSError: the file is not as training writes it.
    """
    drawing = _DRAWINGS.get(path.name)
    if drawing is None:
        return []
    directory.mkdir(exist_ok=True)
    return drawing(path, directory)


def confusion_matrix(path: Path, directory: Path) -> list[Path]:
    """confusion_matrix.json and .png: rows are true classes, columns those of the highest probability, in slides."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        return []
    names = [column.removeprefix("p_") for column in rows[0] if column.startswith("p_")]
    if "label" not in rows[0] or len(names) < 2:
        raise ValueError("it needs a column label and p_<class> of two classes or more")
    counts_KK = [[0] * len(names) for _ in names]
    for row in rows:
        probabilities = [float(row[f"p_{name}"]) for name in names]
        counts_KK[names.index(row["label"])][probabilities.index(max(probabilities))] += 1
    target = directory / "confusion_matrix.json"
    target.write_text(
        json.dumps({"classes": names, "rows": "true", "columns": "predicted", "slides": counts_KK}, indent=2)
        + "\n",
        encoding="utf-8",
    )
    return [target, _matrix_image(counts_KK, names, directory / "confusion_matrix.png")]


def learning_curves(path: Path, directory: Path) -> list[Path]:
    """learning_curves.png: one panel a quantity of history.json, over epochs."""
    history: list[dict[str, Any]] = json.loads(path.read_bytes())
    if len(history) < 2:
        return []
    names = [
        name
        for name, value in history[0].items()
        if name != "epoch" and isinstance(value, (int, float)) and not isinstance(value, bool)
    ][:MAX_CURVES]
    if not names:
        return []
    from matplotlib.figure import Figure

    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for name, panel in zip(names, panels.flat, strict=False):
        points = [
            (row.get("epoch", number + 1), row[name]) for number, row in enumerate(history) if name in row
        ]
        panel.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, color="#1f4e79")
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("epoch", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    target = directory / "learning_curves.png"
    figure.savefig(target, dpi=110)
    return [target]


def _matrix_image(counts_KK: Sequence[Sequence[int]], names: Sequence[str], target: Path) -> Path:
    from matplotlib.figure import Figure

    side = 2.2 + 0.7 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    panel = figure.subplots()
    panel.imshow(counts_KK, cmap="Blues")
    highest = max(max(row) for row in counts_KK)
    for true, row in enumerate(counts_KK):
        for predicted, count in enumerate(row):
            colour = "white" if count > highest / 2 else "black"
            panel.text(predicted, true, str(count), ha="center", va="center", color=colour)
    panel.set_xticks(range(len(names)), names, rotation=45 if len(names) > 4 else 0)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    panel.set_title("slides, held out", fontsize=10)
    figure.savefig(target, dpi=110)
    return target


_DRAWINGS: dict[str, Callable[[Path, Path], list[Path]]] = {
    "held_out.csv": confusion_matrix,
    "history.json": learning_curves,
}
