"""Reading slides, finding tissue, cutting and decoding tiles, and what a model expects of them.

The ground floor of Clotline: it imports no other stage, needs numpy and image libraries only, and runs under
NumPy 1.26 and 2. Names are loaded when they are first asked for, so that whoever needs only `decode_tile`
(the server's preprocessing) never loads openslide or tifffile.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slides.aggregate import mean_probabilities, slides_to_patients
    from slides.decode import decode_tile, encode_tile
    from slides.errors import (
        AggregationError,
        LabelsError,
        NoTissueError,
        ResolutionUnknownError,
        SlideFileError,
        SlidesError,
        SpecError,
        TileDecodeError,
    )
    from slides.labels import SlideRecord, patient_of, read_labels
    from slides.reader import Slide, open_slide
    from slides.spec import ModelSpec
    from slides.tissue import TileRef, find_tiles, iter_tiles, tissue_mask

_HOMES = {
    "slides.aggregate": ("mean_probabilities", "slides_to_patients"),
    "slides.decode": ("decode_tile", "encode_tile"),
    "slides.errors": (
        "AggregationError",
        "LabelsError",
        "NoTissueError",
        "ResolutionUnknownError",
        "SlideFileError",
        "SlidesError",
        "SpecError",
        "TileDecodeError",
    ),
    "slides.labels": ("SlideRecord", "patient_of", "read_labels"),
    "slides.reader": ("Slide", "open_slide"),
    "slides.spec": ("ModelSpec",),
    "slides.tissue": ("TileRef", "find_tiles", "iter_tiles", "tissue_mask"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AggregationError",
    "LabelsError",
    "ModelSpec",
    "NoTissueError",
    "ResolutionUnknownError",
    "Slide",
    "SlideFileError",
    "SlideRecord",
    "SlidesError",
    "SpecError",
    "TileDecodeError",
    "TileRef",
    "decode_tile",
    "encode_tile",
    "find_tiles",
    "iter_tiles",
    "mean_probabilities",
    "open_slide",
    "patient_of",
    "read_labels",
    "slides_to_patients",
    "tissue_mask",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'slides' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
