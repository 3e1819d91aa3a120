"""What one kind of checkpoint gives to an export: staged, proven, and told of."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.exported_format import ExportedFormat
from exporters.formats.interface import OnnxTarget, ServedFormat
from exporters.publication import Publication
from exporters.serving_options import ServingOptions
from slides.spec import ModelSpec
from training.reference_profile import ReferenceProfile

LayerSource = tuple[bytes, bytes, np.ndarray]
"""FP32 ONNX, INT8 ONNX of the same network, tiles uint8 [N, S, S, 3]: what a plot of errors by layer needs."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What an export is asked for.

    Attributes:
        source: a checkpoint's directory, or the definition of an ensemble.
        formats: the first one answers as `tile_classifier` or `slide_classifier`.
        tiles_source: tiles for the gate; None for the golden ones of `source`.
        calibration_source: training tiles for INT8.
        publish_unproven: also publish further formats that this machine cannot prove.
        keep_refused: list a further format that is refused and go on; otherwise its refusal is raised.
        served: prove through a tritonserver too.
        newest_onnx: newest opset and IR version of ONNX that the container reads; None for the default.
        with_slides: give a tile checkpoint a `slide_classifier`, which answers with the mean over a slide's tiles.
    """

    source: Path
    formats: Sequence[ServedFormat]
    options: ServingOptions
    tiles_source: Path | None = None
    calibration_source: Path | None = None
    publish_unproven: bool = False
    keep_refused: bool = False
    served: bool = True
    with_slides: bool = False
    newest_onnx: tuple[int, int] | None = None

    @property
    def onnx_target(self) -> OnnxTarget:
        """What ONNX files are written for."""
        return OnnxTarget() if self.newest_onnx is None else OnnxTarget.within(*self.newest_onnx)


class Staging(ABC):
    """Models on their way into a repository that is held.

    Attributes:
        kind: "tile", "slide" or "ensemble".
        version: of every model, but the preprocess model.
        spec: what the models expect.
        formats: by name, in the order asked for.
        golden: path below golden/ -> content.
        layer_sources: format -> what a plot of its errors by layer needs.
        reference: what drift is measured against; None where no tile of a known patient was at hand.
    """

    kind: str
    version: int
    spec: ModelSpec
    formats: dict[str, ExportedFormat]
    golden: Mapping[str, bytes]
    layer_sources: Mapping[str, LayerSource]
    reference: ReferenceProfile | None

    @abstractmethod
    def prove_served(self, publication: Publication, announce: Callable[[str], object]) -> None:
        """Prove what is staged through a tritonserver; a refused further format is withdrawn or raised.

        Raises:
            UnavailableError: there is no tritonserver.
            ParityError: an answer is not PyTorch's.
        """

    @abstractmethod
    def models_in_order(self) -> list[str]:
        """All models that are staged, each after those that it refers to."""

    @abstractmethod
    def classifiers(self) -> dict[str, dict[str, Any]]:
        """Public model -> its entry in the manifest."""

    @abstractmethod
    def checkpoint(self) -> dict[str, Any]:
        """What the manifest says of the checkpoint, JSON types."""

    @abstractmethod
    def pretrained(self) -> dict[str, Any] | None:
        """Origin and licence of the weights that training started from; None if it started from none."""


def stage(
    request: Request, repository: Path, publication: Publication, announce: Callable[[str], object]
) -> Staging:
    """Build, prove in this process and stage whatever `request.source` is.

    Raises:
        TrainingError: it is no checkpoint, damaged, or of another version.
        FormatError, GraphError, GoldenTilesError, ParityError, RepositoryError: see `exporters.errors`.
    """
    from exporters.slide.source import kind_of

    if kind_of(request.source) == "tile":
        from exporters.tile_staging import TileStaging

        return TileStaging(request, repository, publication, announce)
    from exporters.slide_staging import SlideStaging

    return SlideStaging(request, repository, publication, announce)
