"""The reference profile in one picture: confidence and the four statistics of the tiles, a histogram each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from training.reference_profile import ReferenceProfile

_BLUE, _GREY = "#0072B2", "#555555"


def reference_plot(profile: ReferenceProfile, *, title: str) -> bytes:
    """The picture, as PNG.

    Raises:
        ValueError: the profile holds nothing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = histograms(profile)
    if not panels:
        raise ValueError("the profile holds nothing to draw")
    figure = Figure(figsize=(2.4 * len(panels), 2.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    for axes, (name, (counts, edges)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        lefts, rights = [0.0, *edges], [*edges, 1.0]
        widths = [right - left for left, right in zip(lefts, rights, strict=True)]
        # Buckets differ in width, so that the area is the share and the height is not.
        heights = [
            count / sum(counts) / width if width > 0 else 0.0
            for count, width in zip(counts, widths, strict=True)
        ]
        axes.bar(lefts, heights, widths, align="edge", color=_BLUE, edgecolor="white", linewidth=0.5)
        filled = [index for index, count in enumerate(counts) if count]
        axes.set_xlim(lefts[max(0, filled[0] - 1)], rights[min(len(rights) - 1, filled[-1] + 1)])
        axes.set_xlabel(name.replace("_", " "), fontsize=8)
        axes.tick_params(labelsize=7, colors=_GREY)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    written = io.BytesIO()
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def histograms(profile: ReferenceProfile) -> Mapping[str, tuple[Sequence[int], Sequence[float]]]:
    """What is drawn -> counts of its buckets, and their upper edges."""
    panels: dict[str, tuple[Sequence[int], Sequence[float]]] = {}
    answers = profile.tiles or profile.slides
    if answers is not None:
        panels["confidence"] = (answers.together, profile.confidence_edges)
    if profile.appearance is not None:
        panels |= {
            name: (counts, profile.appearance_edges[name])
            for name, counts in profile.appearance.statistics.items()
        }
    return panels
