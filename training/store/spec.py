"""What a tile store was asked to hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from slides.errors import SpecError
from slides.spec import ModelSpec
from training.errors import StoreError

ALL_TILES = 100_000
"""As `tiles_per_slide`: every tile with enough tissue (the highest number that ModelSpec takes)."""

STAIN_METHODS = ("none", "macenko", "reinhard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """How tiles are cut; two stores with the same one and the same slides hold the same bytes.

    Attributes:
        tile_size_px: side of a tile in its own pixels.
        um_per_px: resolution of a tile, micrometres per pixel.
        tiles_per_slide: at most so many, the most tissue-rich ones; ALL_TILES for all.
        min_tissue_share: 0..1; a tile with less tissue is left out.
        jpeg_quality: 1..100.
        stain_normalise: "none", "macenko" or "reinhard"; colours of every tile are moved to a reference.
        stain_reference_sha256: of the reference image; "" for the reference that torchstain has built in.
        slide_um_per_px: resolution of level 0 of all slides where their files do not state it; None trusts the files.

    Raises:
        StoreError: naming every impossible value at once.
    """

    tile_size_px: int
    um_per_px: float
    tiles_per_slide: int
    min_tissue_share: float
    jpeg_quality: int = 90
    stain_normalise: str = "none"
    stain_reference_sha256: str = ""
    slide_um_per_px: float | None = None

    def __post_init__(self) -> None:
        problems = []
        try:
            self.as_model_spec()
        except SpecError as error:
            problems += str(error).removeprefix("model specification: ").split("; ")
        if self.stain_normalise not in STAIN_METHODS:
            problems.append(
                f"stain_normalise must be one of {', '.join(STAIN_METHODS)}, not {self.stain_normalise!r}"
            )
        if self.slide_um_per_px is not None and not (
            math.isfinite(self.slide_um_per_px) and self.slide_um_per_px > 0
        ):
            problems.append(f"slide_um_per_px must be a number above 0, not {self.slide_um_per_px!r}")
        if problems:
            raise StoreError("tile store", problems)

    @classmethod
    def of_model(cls, spec: ModelSpec, **changes: Any) -> StoreSpec:
        """The cut that a model expects, with `changes` to it."""
        of_cut = {
            name: getattr(spec, name)
            for name in ("tile_size_px", "um_per_px", "tiles_per_slide", "min_tissue_share", "jpeg_quality")
        }
        return cls(**{**of_cut, **changes})

    def as_model_spec(self) -> ModelSpec:
        """What `slides.tissue` needs to know; its classes and input size are not used there."""
        return ModelSpec(
            class_names=("unused", "unused too"),
            tile_size_px=self.tile_size_px,
            um_per_px=self.um_per_px,
            input_size_px=8,
            tiles_per_slide=self.tiles_per_slide,
            min_tissue_share=self.min_tissue_share,
            jpeg_quality=self.jpeg_quality,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> StoreSpec:
        """What `as_dict` gave; StoreError names `source` where it did not."""
        try:
            return cls(**values)
        except TypeError as error:
            raise StoreError(source, [f"is of another version of Clotline: {error}"]) from error

    def differences(self, other: StoreSpec) -> list[str]:
        """One line for each value in which `other` differs: "um_per_px is 0.5 there, 1.0 is asked for"."""
        return [
            f"{field.name} is {getattr(self, field.name)!r} there, {getattr(other, field.name)!r} is asked for"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
