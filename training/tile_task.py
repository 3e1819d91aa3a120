"""Training on single tiles, each with the label of its slide."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from torch import nn

from slides.labels import SlideRecord
from training import checkpoint, network, pretrained, scores, tiles
from training.errors import DataError
from training.processes import on_main_process
from training.recipe import Recipe
from training.reference_profile import (
    PROFILE_KEY,
    ReferenceProfile,
    answers_of,
    appearance_of_items,
    profile,
)
from training.task import Items, Split

if TYPE_CHECKING:
    from training.store.reader import TileStore

GOLDEN_TILES = 32


class TileTask:
    """`training.task.Task` of single tiles."""

    item_name = "tile"

    def __init__(
        self, recipe: Recipe, split: Split, slides: Sequence[tiles.SlideTiles], data: dict[str, Any]
    ) -> None:
        """
        Args:
            slides: those of `split.records`, in that order.
            data: fingerprint, source and what else the manifest should say beside the split.
        """
        self.recipe = recipe
        self.split = split
        self.class_names = recipe.spec.class_names
        trained, watched = len(split.train), len(split.train) + len(split.validation)
        self.train_set = tiles.TileDataset(
            slides[:trained],
            recipe.spec,
            colour_jitter=recipe.colour_jitter,
            stain_augmentation=recipe.stain_augmentation,
            seed=recipe.seed,
        )
        self.validation_set = (
            tiles.TileDataset(slides[trained:watched], recipe.spec) if split.validation else None
        )
        self.held_out_set = tiles.TileDataset(slides[watched:], recipe.spec)
        self.data = {**split.as_data(), "tiles": sum(len(slide.tiles) for slide in slides), **data}
        self.pretrained: dict[str, Any] | None = None

    @classmethod
    def load(cls, recipe: Recipe, data: Path, split: Split) -> TileTask:
        """See `training.task.load_task`."""
        if recipe.source == "store":
            store = open_store(recipe, data)
            told = {
                "fingerprint": store.fingerprint,
                "source": "store",
                "cut": dataclasses.asdict(store.spec_of_cut),
            }
            return cls(recipe, split, tiles.of_store(store, split.records, recipe.spec), told)
        source = recipe.source
        slides = on_main_process(lambda: tiles.collect_tiles(split.records, source, recipe.spec))
        return cls(recipe, split, slides, {"fingerprint": tiles.fingerprint(slides), "source": source})

    def build_network(self, *, weights: bool = True) -> nn.Module:
        """See `training.task.Task`."""
        built = network.build(self.recipe.architecture, self.recipe.spec)
        if weights:
            with PartialState().local_main_process_first():  # it downloads, the others find it there
                self.pretrained = pretrained.load(
                    built.backbone, self.recipe.architecture, self.recipe.weights
                )
        return built

    def backbone_of(self, built: nn.Module) -> tuple[nn.Module | None, str]:
        """See `training.task.Task`."""
        backbone = built.get_submodule("backbone")
        return backbone, network.classifier_name(backbone)

    def scores(self, items: Items, probabilities_NK: NDArray[np.float32]) -> dict[str, float]:
        """tile_accuracy, and accuracy, auc and log_loss for slide_ and patient_."""
        records = self.split.held_out if items is self.held_out_set else self.split.validation
        return scores.score(probabilities_NK, items.slide_of_item, records, self.class_names)

    def held_out_table(self, probabilities_NK: NDArray[np.float32]) -> str:
        """A slide's probabilities are the mean over its tiles."""
        of_slide = scores.by_slide(probabilities_NK, self.held_out_set.slide_of_item)
        return held_out_table(self.split.held_out, of_slide, self.class_names)

    def save(
        self,
        directory: Path,
        network: nn.Module,
        probabilities_NK: NDArray[np.float32],
        *,
        metrics: Mapping[str, float],
        about: Mapping[str, Any],
        overwrite: bool,
    ) -> Path:
        """See `training.task.Task`."""
        return checkpoint.save(
            directory,
            network,  # type: ignore[arg-type]
            self.recipe.spec,
            architecture=self.recipe.architecture,
            metrics=metrics,
            data=self.data,
            golden_tiles=_golden_tiles(self.held_out_set, probabilities_NK),
            about={
                **about,
                "pretrained": self.pretrained,
                PROFILE_KEY: self._reference_profile(probabilities_NK).as_dict(),
            },
            overwrite=overwrite,
        )

    def _reference_profile(self, probabilities_NK: NDArray[np.float32]) -> ReferenceProfile:
        """Of all held-out tiles, and of their slides by the mean over tiles."""
        held_out = self.held_out_set
        patient_of = {record.image_id: record.patient_id for record in self.split.held_out}
        patients_N = [patient_of[image_id] for image_id in held_out.slide_of_item]
        of_slide = scores.by_slide(probabilities_NK, held_out.slide_of_item)
        tiles_of_patients = [(patient, row) for row, patient in enumerate(patients_N)]
        return profile(
            "held_out",
            tiles=answers_of(probabilities_NK, patients_N, self.class_names),
            slides=answers_of(
                np.stack([*of_slide.values()]),
                [patient_of[image_id] for image_id in of_slide],
                self.class_names,
            ),
            appearance=appearance_of_items(tiles_of_patients, held_out.encoded, held_out.spec.input_size_px),
        )


def open_store(recipe: Recipe, path: Path) -> TileStore:
    """The tile store at `path`, if it was cut as the recipe wants it.

    Raises:
        StoreError: it cannot be read, or was cut otherwise.
        DataError: its tiles were stain-normalised otherwise.
    """
    from training.store.reader import TileStore  # pyarrow is not needed where there is no store

    store = TileStore.open(path)
    store.check_fits(recipe.spec)
    normalised = store.spec_of_cut.stain_normalise
    if normalised != recipe.stain:
        raise DataError(
            str(path),
            [
                f"its tiles were cut with stain normalisation {normalised!r}, the recipe says stain = {recipe.stain!r}"
            ],
        )
    return store


def held_out_table(
    records: Sequence[SlideRecord], of_slide: Mapping[str, NDArray[np.floating]], class_names: Sequence[str]
) -> str:
    """held_out.csv: image_id, patient_id, center_id, label, p_<class>..., one row a slide; 9 significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image_id", "patient_id", "center_id", "label", *(f"p_{name}" for name in class_names)])
    for record in records:
        values = [f"{value:.9g}" for value in of_slide[record.image_id]]
        writer.writerow([record.image_id, record.patient_id, record.center_id, record.label, *values])
    return text.getvalue()


def _golden_tiles(
    held_out: tiles.TileDataset, probabilities_NK: NDArray[np.float32]
) -> list[checkpoint.GoldenTile]:
    """Up to GOLDEN_TILES held-out tiles: classes take turns, and each class's are spread over its slides."""
    rows_of: dict[int, list[int]] = {}
    for row, label in enumerate(held_out.labels):
        rows_of.setdefault(label, []).append(row)
    each = math.ceil(GOLDEN_TILES / len(rows_of))
    spread = [
        [rows[round(place)] for place in np.linspace(0, len(rows) - 1, min(each, len(rows)))]
        for _, rows in sorted(rows_of.items())
    ]
    chosen = [rows[turn] for turn in range(each) for rows in spread if turn < len(rows)][:GOLDEN_TILES]
    return [
        checkpoint.GoldenTile(
            image_id=held_out.slide_of_item[row],
            label=held_out.spec.class_names[held_out.labels[row]],
            data=held_out.encoded(row),
            probabilities=tuple(probabilities_NK[row].tolist()),
        )
        for row in chosen
    ]
