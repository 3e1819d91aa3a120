"""The parity gate for slides through a real tritonserver: encoded tiles in, a slide's answer out, over both protocols."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.errors import ParityError
from exporters.formats import formats_named
from exporters.proving_server import PROTOCOLS, ProvingServer
from exporters.served_parity import check_spec
from exporters.slide.head import HEAD_OUTPUTS
from exporters.slide.parity import SlideAnswer, compare_slides, slide_problems
from exporters.tolerances import TOLERANCES

if TYPE_CHECKING:
    from exporters.slide.export import SlideDraft

TILES_INPUT = "tiles"


def check_slides_on(
    server: ProvingServer, draft: SlideDraft, announce: Callable[[str], object] = lambda text: None
) -> dict[str, dict[str, Any]]:
    """Ask every public slide model of a draft about all bags, on a server that is up.

    Returns:
        public model -> "http" and "grpc" -> the figures of `exporters.parity.Parity`, JSON types; `tiles` counts slides.

    Raises:
        ParityError: an answer is not PyTorch's.
        ServedError: the server is gone.
    """
    proven: dict[str, dict[str, Any]] = {}
    for name in draft.public:
        precision = _precision(draft, name)
        check_spec(server, name, draft.spec)
        for protocol in PROTOCOLS:
            announce(f"{name} over {protocol}: {len(draft.expected.bags)} slides")
            ask = _asker(server, protocol, name, draft)
            where = f"{name} over {protocol}"
            if draft.kind == "tile" and precision != "fp32":
                found = _hold(where, ask, draft, precision)
            else:
                found = dataclasses.asdict(compare_slides(where, ask, draft.expected, precision=precision))
            proven.setdefault(name, {})[protocol] = found
    return proven


def tile_tensor(tiles: tuple[bytes, ...]) -> np.ndarray:
    """Encoded tiles as the BYTES tensor [T]."""
    tensor_T = np.empty(len(tiles), dtype=np.object_)
    tensor_T[:] = tiles
    return tensor_T


def _asker(
    server: ProvingServer, protocol: str, name: str, draft: SlideDraft
) -> Callable[[int], SlideAnswer]:
    def ask(bag: int) -> SlideAnswer:
        inputs = {TILES_INPUT: tile_tensor(draft.expected.bags[bag].tiles)}
        return server.ask(protocol, name, inputs, HEAD_OUTPUTS)

    return ask


def _hold(name: str, ask: Callable[[int], SlideAnswer], draft: SlideDraft, precision: str) -> dict[str, Any]:
    """Hold the slides of a tile network in a lower precision to the bound on any one answer: the flips and scores of that
    network were held on its tiles, of which there are more than slides.
    """
    tolerance = TOLERANCES[precision]
    worst, flips = 0.0, 0
    for bag, ours in enumerate(draft.expected.answers):
        theirs = ask(bag)
        problems = slide_problems(theirs, ours, tolerance)
        apart = float(np.abs(theirs["probabilities"] - ours["probabilities"]).max())
        if apart > tolerance.max_abs_diff:
            problems.append(f"probabilities differ by {apart:.3g} (allowed {tolerance.max_abs_diff:g})")
        if problems:
            raise ParityError(
                f"{name}, slide {draft.expected.bags[bag].image_id}: {'; '.join(problems)}. Nothing was published."
            )
        worst = max(worst, apart)
        flips += int((theirs["label_index"] != ours["label_index"]).any())
    return {
        "precision": precision,
        "tiles": len(draft.expected.bags),
        "max_abs_diff": worst,
        "label_flips": flips,
    }


def _precision(draft: SlideDraft, name: str) -> str:
    """Of the network behind a public model."""
    format_name = draft.classifiers[name]["format"]
    exported = draft.formats.get(format_name)
    return exported.precision if exported is not None else formats_named([format_name])[0].precision
