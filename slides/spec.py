"""What a model expects of its input, and the names of what it answers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from slides.errors import SpecError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Classes, geometry and normalisation of one model: all that preprocessing needs to know.

    Attributes:
        class_names: two or more different names; their order is the order of the probabilities.
        tile_size_px: side of the square tile that is cut from the slide at `um_per_px`.
        um_per_px: resolution at which tiles are cut, in micrometres per pixel.
        input_size_px: side of the network's input; `slides.decode.decode_tile` resizes tiles to it.
        mean: mean of red, green, blue in 0..1, subtracted inside the network's graph.
        std: standard deviation of red, green, blue in 0..1, divided by inside the network's graph.
        tiles_per_slide: the k most tissue-rich tiles of a slide are taken.
        min_tissue_share: 0..1; a tile with less tissue is never taken.
        jpeg_quality: 1..100, quality with which tiles travel (chroma is never subsampled).

    Raises:
        SpecError: naming every impossible value at once.
    """

    class_names: tuple[str, ...]
    tile_size_px: int
    um_per_px: float
    input_size_px: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    tiles_per_slide: int
    min_tissue_share: float
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        for name in ("class_names", "mean", "std"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        problems = [*self._problems()]
        if problems:
            raise SpecError("model specification: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        names = self.class_names
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            problems.append(f"class_names must be a sequence of strings, not {names!r}")
        elif len(names) < 2:
            problems.append(f"class_names needs two names or more, not {list(names)}")
        elif any(not name.strip() or name != name.strip() or not name.isprintable() for name in names):
            problems.append(
                f"class_names must be printable, not blank, without outer spaces, not {list(names)}"
            )
        elif len(set(names)) < len(names):
            problems.append(f"class_names must all differ, not {list(names)}")
        for name, low, high in (
            ("tile_size_px", 8, 4096),
            ("input_size_px", 8, 4096),
            ("tiles_per_slide", 1, 100_000),
            ("jpeg_quality", 1, 100),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                problems.append(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        if not _is_number(self.um_per_px) or not 0 < self.um_per_px <= 1000:
            problems.append(f"um_per_px must be above 0 and at most 1000 um/px, not {self.um_per_px!r}")
        if not _is_number(self.min_tissue_share) or not 0 <= self.min_tissue_share <= 1:
            problems.append(f"min_tissue_share must be from 0 to 1, not {self.min_tissue_share!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3 or not all(_is_number(v) for v in value):
                problems.append(f"{name} must be three finite numbers (red, green, blue), not {value!r}")
            elif name == "std" and min(value) <= 0:
                problems.append(f"std must be above 0, not {list(value)}")
        return problems

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON types (lists, strings, numbers)."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    def to_json(self) -> str:
        """Compact JSON with sorted keys: equal specifications give equal strings."""
        return json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """A specification from JSON types.

        Raises:
            SpecError: a key is unknown, a key without default is missing, or a value is impossible.
        """
        if not isinstance(values, Mapping):
            raise SpecError(f"model specification: must be a JSON object, not {type(values).__name__}")
        fields = dataclasses.fields(cls)
        unknown = sorted(str(key) for key in set(values) - {field.name for field in fields})
        missing = [f.name for f in fields if f.name not in values and f.default is dataclasses.MISSING]
        if unknown or missing:
            problems = [f"unknown key {key!r}" for key in unknown] + [
                f"missing key {key!r}" for key in missing
            ]
            known = ", ".join(field.name for field in fields)
            raise SpecError(f"model specification: {'; '.join(problems)} (known: {known})")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelSpec:
        """A specification from what `to_json` wrote; SpecError as in `from_dict`, or if it is no JSON."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise SpecError(f"model specification: not JSON ({error}): {text[:80]!r}") from error
        return cls.from_dict(values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
