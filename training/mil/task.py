"""Training on bags of tiles, each bag with the weak label of its slide."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training import scores, tile_task, tiles
from training.errors import RecipeError
from training.mil import bags as slide_bags
from training.mil import checkpoint as slide_checkpoint
from training.mil import embeddings
from training.mil.bags import Augmentation, BagItems, EmbeddedBags, SlideBag, TileBags
from training.mil.checkpoint import GoldenBag, SlideCheckpoint
from training.mil.network import BagNetwork, Encoder, LayerPool, SlideNetwork, build_encoder, build_head
from training.mil.options import BagOptions
from training.network import TileEncoder
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

GOLDEN_BAGS = 4
MOST_GOLDEN_TILES = 32


class BagTask:
    """`training.task.Task` of bags of tiles."""

    item_name = "slide"

    def __init__(
        self,
        recipe: Recipe,
        split: Split,
        bags: Sequence[SlideBag],
        data: Mapping[str, Any],
        *,
        embeddings_folder: Path | None = None,
    ) -> None:
        """
        Args:
            bags: those of `split.records`, in that order.
            data: fingerprint, source and what else the manifest should say beside the split.
            embeddings_folder: of a frozen encoder; None = `embeddings.cache_folder()`.

        Raises:
            RecipeError: the recipe has no [bags].
            ArchitectureError, PretrainedError, DataError: with a frozen encoder, as `build_encoder` and `embeddings_of`.
        """
        self.recipe = recipe
        self.options = _options(recipe)
        self.split = split
        self.class_names = recipe.spec.class_names
        self.data = {**split.as_data(), "tiles": sum(len(bag.tiles) for bag in bags), **data}
        self.pretrained: dict[str, Any] | None = None
        self._frozen: TileEncoder | None = None
        augmentation = Augmentation(recipe.colour_jitter, recipe.stain_augmentation)
        embedded: Sequence[NDArray[np.float32]] = ()
        if self.options.encoder == "frozen":
            self._frozen = self._build_encoder()
            self._frozen.eval()
            embedded = embeddings.embeddings_of(
                bags,
                self._frozen,
                recipe.spec,
                self.options,
                augmentation,
                seed=recipe.seed,
                folder=embeddings_folder,
            )

        def items(start: int, end: int, *, learns: bool) -> BagItems:
            own = bags[start:end]
            if self._frozen is not None:
                return EmbeddedBags(
                    own, embedded[start:end], recipe.spec, self.options, learns=learns, seed=recipe.seed
                )
            return TileBags(
                own,
                recipe.spec,
                self.options,
                augmentation=augmentation if learns else None,
                seed=recipe.seed,
            )

        trained, watched = len(split.train), len(split.train) + len(split.validation)
        self.train_set = items(0, trained, learns=True)
        self.validation_set = items(trained, watched, learns=False) if split.validation else None
        self.held_out_set = items(watched, len(bags), learns=False)

    @classmethod
    def load(cls, recipe: Recipe, data: Path, split: Split) -> BagTask:
        """See `training.task.load_task`."""
        _options(recipe)
        if recipe.source == "store":
            store = tile_task.open_store(recipe, data)
            bags = slide_bags.of_store(store, split.records, recipe.spec)
            told = {
                "fingerprint": store.fingerprint,
                "source": "store",
                "cut": dataclasses.asdict(store.spec_of_cut),
            }
            return cls(recipe, split, bags, told)
        bags = on_main_process(lambda: slide_bags.of_slides(split.records, recipe.spec))
        fingerprint = tiles.fingerprint([tiles.SlideTiles(bag.record, bag.tiles) for bag in bags])
        return cls(recipe, split, bags, {"fingerprint": fingerprint, "source": recipe.source})

    def build_network(self, *, weights: bool = True) -> nn.Module:
        """A SlideNetwork, or with a frozen encoder a BagNetwork; see `training.task.Task`."""
        if self._frozen is not None:
            return BagNetwork(build_head(self._frozen.feature_dim, self.recipe.spec, self.options))
        encoder = self._build_encoder(weights=weights)
        return SlideNetwork(encoder, build_head(encoder.feature_dim, self.recipe.spec, self.options))

    def _build_encoder(self, *, weights: bool = True) -> TileEncoder:
        def build(wanted: str) -> Encoder:
            return build_encoder(self.recipe.architecture, self.recipe.spec, self.options, weights=wanted)

        if not weights:
            return build("none").module
        with accelerate.PartialState().local_main_process_first():  # one process downloads
            encoder = build(self.recipe.weights)
        self.pretrained = encoder.pretrained
        return encoder.module

    def backbone_of(self, network: nn.Module) -> tuple[nn.Module | None, str]:
        """The encoder's backbone, which has no classifier; None with a frozen encoder."""
        if not isinstance(network, SlideNetwork):
            return None, ""
        backbone = network.encoder.backbone
        return (backbone.backbone if isinstance(backbone, LayerPool) else backbone), ""

    def scores(self, items: Items, probabilities_NK: NDArray[np.float32]) -> dict[str, float]:
        """accuracy, auc and log_loss for slide_ and patient_."""
        records = self.split.held_out if items is self.held_out_set else self.split.validation
        found = scores.score(probabilities_NK, items.slide_of_item, records, self.class_names)
        return {name: value for name, value in found.items() if not name.startswith("tile_")}

    def held_out_table(self, probabilities_NK: NDArray[np.float32]) -> str:
        """A slide's probabilities are those of its bag."""
        of_slide = dict(zip(self.held_out_set.slide_of_item, probabilities_NK, strict=True))
        return tile_task.held_out_table(self.split.held_out, of_slide, self.class_names)

    def attention(self, network: nn.Module, items: BagItems) -> list[NDArray[np.float32]]:
        """FP32 [T] a slide: the attention of the tiles in its bag, in the order of `items.rows`."""
        found = []
        with torch.inference_mode():
            for index in range(len(items)):
                values_TX, _, _ = items[index]
                mask_1T = torch.ones(1, len(values_TX), dtype=torch.bool)
                _, attention_1T = network.answer(values_TX[None], mask_1T)  # type: ignore[operator]
                found.append(attention_1T[0].numpy())
        return found

    def extra_files(self, network: nn.Module, probabilities_NK: NDArray[np.float32]) -> dict[str, str]:
        """attention.csv: one row a tile of each held-out slide's bag, x_px, y_px and side_px in level 0 where known."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image_id", "tile", "x_px", "y_px", "side_px", "attention"])
        for index, attention_T in enumerate(self.attention(network, self.held_out_set)):
            bag = self.held_out_set.bags[index]
            for row, value in zip(self.held_out_set.rows(index).tolist(), attention_T.tolist(), strict=True):
                place: Sequence[int | str] = ("", "", "")
                if bag.places is not None:
                    columns = (bag.places.x_px_T, bag.places.y_px_T, bag.places.side_px_T)
                    place = [int(column[row]) for column in columns]
                writer.writerow([bag.record.image_id, row, *place, f"{value:.9g}"])
        return {"attention.csv": text.getvalue()}

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
        """Encoder and head of a trained network; see `training.task.Task`."""
        if self._frozen is not None:
            assert isinstance(network, BagNetwork)  # noqa: S101 - for mypy; build_network made it
            encoder = self._frozen
        else:
            assert isinstance(network, SlideNetwork)  # noqa: S101
            encoder = network.encoder
        served = SlideCheckpoint(encoder.eval(), network.head.eval(), self.recipe.spec, self.options, {}, ())
        return slide_checkpoint.save(
            directory,
            encoder,
            network.head,
            self.recipe.spec,
            architecture=self.recipe.architecture,
            bags=self.options,
            metrics=metrics,
            data=self.data,
            golden_bags=[self._golden_bag(served, index) for index in self._golden_slides()],
            about={
                **about,
                "pretrained": self.pretrained,
                PROFILE_KEY: self._reference_profile(probabilities_NK).as_dict(),
            },
            overwrite=overwrite,
        )

    def _reference_profile(self, probabilities_NK: NDArray[np.float32]) -> ReferenceProfile:
        """Of all held-out slides, and of the tiles in their bags."""
        held_out = self.held_out_set
        patient_of = {record.image_id: record.patient_id for record in self.split.held_out}
        tiles_of_patients = [
            (patient_of[bag.record.image_id], (index, int(row)))
            for index, bag in enumerate(held_out.bags)
            for row in held_out.rows(index)
        ]
        return profile(
            "held_out",
            slides=answers_of(
                probabilities_NK,
                [patient_of[image_id] for image_id in held_out.slide_of_item],
                self.class_names,
            ),
            appearance=appearance_of_items(
                tiles_of_patients,
                lambda place: held_out.bags[place[0]].tiles[place[1]],
                self.recipe.spec.input_size_px,
            ),
        )

    def _golden_slides(self) -> list[int]:
        """Up to GOLDEN_BAGS held-out slides; classes take turns."""
        slides_of: dict[int, list[int]] = {}
        for index, label in enumerate(self.held_out_set.labels):
            slides_of.setdefault(label, []).append(index)
        turns = [
            slides[turn] for turn in range(GOLDEN_BAGS) for slides in slides_of.values() if turn < len(slides)
        ]
        return sorted(turns[:GOLDEN_BAGS])

    def _golden_bag(self, served: SlideCheckpoint, index: int) -> GoldenBag:
        """The held-out slide's bag, cut off after MOST_GOLDEN_TILES, and what encoder and head say of just that."""
        bag = self.held_out_set.bags[index]
        rows = self.held_out_set.rows(index)[:MOST_GOLDEN_TILES]
        encoded = tuple(bag.tiles[int(row)] for row in rows)
        answer = served.answer(encoded)
        places = bag.places
        return GoldenBag(
            image_id=bag.record.image_id,
            label=bag.record.label,
            tiles=encoded,
            probabilities=tuple(answer.probabilities_K.tolist()),
            attention=tuple(answer.attention_T.tolist()),
            x_px=() if places is None else tuple(places.x_px_T[rows].tolist()),
            y_px=() if places is None else tuple(places.y_px_T[rows].tolist()),
        )


def _options(recipe: Recipe) -> BagOptions:
    if recipe.bags is None:
        raise RecipeError("recipe", ["bags: is missing; a table [bags] is what makes slides bags of tiles"])
    return recipe.bags
