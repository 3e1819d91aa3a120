"""Speed against accuracy of all formats of a release, in one picture.

To the right is faster, to the top more accurate. The shape and colour of a marker is the precision, its area the size of the
files; hollow is unproven, crossed out is refused. What was not timed stands in a strip of its own on the right; what did not even
run is listed below the picture only.
Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), told apart by the colour-blind as well.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

MARKERS = {
    "fp32": ("o", "#0072B2"),
    "fp16": ("s", "#009E73"),
    "bf16": ("D", "#CC79A7"),
    "int8": ("^", "#D55E00"),
}
"""Precision -> matplotlib's marker and colour."""
_OTHER = ("P", "#555555")
_GREY = "#555555"
_LOGARITHMIC_FROM = 6.0  # times as fast as the slowest
_SMALLEST_DP = 1e-8
_STRIP_SHARE = 0.19
_WRAP = 128
_LINES_A_REMARK = 3
_REACHES_PX = (1, 12, 26, 44, 66, 92)
_DIRECTIONS = (
    0,
    180,
    90,
    270,
    45,
    135,
    225,
    315,
    20,
    160,
    200,
    340,
    65,
    115,
    245,
    295,
)  # degrees, liked best first


@dataclass(frozen=True)
class _Point:
    name: str
    precision: str
    status: str
    images_per_s: float | None
    megabytes: float
    parity: Mapping[str, Any]

    @property
    def auc_change(self) -> float | None:
        before_after = self.parity.get("patient_auc")
        return None if before_after is None else float(before_after[1]) - float(before_after[0])

    @property
    def max_abs_diff(self) -> float:
        return float(self.parity["max_abs_diff"])


def speed_accuracy(formats: Mapping[str, Mapping[str, Any]], *, title: str) -> bytes:
    """The picture, as PNG.

    Upwards is the change of the patients' AUC if it is known for every format and differs for any; otherwise how close the
    probabilities stay to PyTorch's (largest difference of any tile, smallest at the top).

    Args:
        formats: "formats" of release.json: by name "precision", "status", "reasons", "bytes", "parity" (its "in_process"
            is read) and "speed" (None, or "images_per_s", "fp32_images_per_s", "batch", "machine"). An FP32 format without
            a speed of its own gets the one that another format was compared with.
        title: shown above.

    Raises:
        ValueError: no formats.
    """
    if not formats:
        raise ValueError("no formats to draw")
    written = io.BytesIO()
    speed_accuracy_figure(formats, title=title).savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def speed_accuracy_figure(formats: Mapping[str, Mapping[str, Any]], *, title: str) -> Figure:
    """The same as matplotlib's Figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = _points(formats)
    lines = _remarks(formats, {point.name for point in points})
    height_in = 5.2 + 0.19 * len(lines)
    figure = Figure(figsize=(9.6, height_in), dpi=110)
    FigureCanvasAgg(figure)
    bottom = (0.62 + 0.19 * len(lines) + 0.1) / height_in
    axes = figure.add_axes((0.1, bottom, 0.87, 1 - bottom - 0.72 / height_in))
    figure.text(0.012, 1 - 0.13 / height_in, title, fontsize=13, weight="bold", va="top")
    if points:
        _draw(figure, axes, points, _machine(formats))
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no format ran on this machine", ha="center", fontsize=12, color=_GREY)
    figure.text(
        0.012,
        (0.19 * len(lines) + 0.07) / height_in,
        "\n".join(lines),
        fontsize=8.5,
        va="top",
        linespacing=1.45,
    )
    return figure


def _points(formats: Mapping[str, Mapping[str, Any]]) -> list[_Point]:
    points = []
    for name, entry in formats.items():
        images_per_s, parity = _images_per_s(name, formats), _parity(entry)
        if parity is not None:
            status = entry.get("status", "accepted")
            points.append(_Point(name, entry["precision"], status, images_per_s, _megabytes(entry), parity))
    return points


def _images_per_s(name: str, formats: Mapping[str, Mapping[str, Any]]) -> float | None:
    speed = formats[name].get("speed")
    if speed is not None:
        return float(speed["images_per_s"])
    if formats[name]["precision"] != "fp32":
        return None
    rivals = [
        float(entry["speed"]["fp32_images_per_s"])
        for other, entry in formats.items()
        if other.startswith(f"{name}-") and (entry.get("speed") or {}).get("fp32_images_per_s")
    ]
    return max(rivals) if rivals else None


def _parity(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    parity = entry.get("parity")
    if parity is not None and "in_process" in parity:
        parity = parity["in_process"]
    return parity if parity and parity.get("max_abs_diff") is not None else None


def _megabytes(entry: Mapping[str, Any]) -> float:
    return float(entry.get("bytes") or 0) / 1e6


def _remarks(formats: Mapping[str, Mapping[str, Any]], drawn: Collection[str]) -> list[str]:
    """Lines below the picture: why a format is refused or unproven, and which ones are not drawn."""
    lines = []
    for name, entry in formats.items():
        status = entry.get("status", "accepted")
        absent = (
            ""
            if name in drawn
            else f", did not run on this machine and is not drawn ({_megabytes(entry):.1f} MB)"
        )
        why = "; ".join(reason.removeprefix(f"{name}: ") for reason in entry.get("reasons") or ())
        if absent or status != "accepted":
            remark = f"{name} is {status}{absent}{': ' if why else ''}{why}"
            wrapped = textwrap.wrap(
                remark, _WRAP, subsequent_indent="    ", max_lines=_LINES_A_REMARK, placeholder=" ..."
            )
            lines += wrapped
    return lines


def _machine(formats: Mapping[str, Mapping[str, Any]]) -> str:
    for entry in formats.values():
        speed = entry.get("speed")
        if speed is not None:
            return f"{speed['machine']}, batch {speed['batch']}, one thread"
    return "this machine"


def _draw(figure: Figure, axes: Axes, points: Sequence[_Point], machine: str) -> None:
    by_auc = all(p.auc_change is not None for p in points) and any(
        abs(p.auc_change or 0) > 1e-9 for p in points
    )
    heights = [p.auc_change or 0.0 if by_auc else max(p.max_abs_diff, _SMALLEST_DP) for p in points]
    places = _speed_axis(axes, points)
    if by_auc:
        _auc_axis(axes, heights)
    else:
        axes.set_yscale("log")
        axes.set_ylim(max(heights) * 12, min(heights) / 12)  # upwards is better here, too
        axes.set_ylabel("largest |change of a probability|   (better upwards)")
        if all(p.auc_change is not None for p in points):
            figure.text(0.97, 1 - 0.15 / figure.get_figheight(), "patients' AUC is the same in all formats", ha="right",
                        va="top", fontsize=9.5, color=_GREY)  # fmt: skip
    axes.set_xlabel(f"images/s   ({machine}; faster to the right)")
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    largest = max(p.megabytes for p in points) or 1.0
    areas = [60 + 200 * p.megabytes / largest for p in points]
    for point, place, height, area in zip(points, places, heights, areas, strict=True):
        marker, colour = MARKERS.get(point.precision, _OTHER)
        hollow = point.status == "unproven"
        axes.scatter(place, height, s=area, marker=marker, zorder=3, linewidths=1.8,
                     facecolors="none" if hollow else colour, edgecolors=colour,
                     alpha=0.35 if point.status == "refused" else 0.9)  # fmt: skip
        if point.status == "refused":
            axes.scatter(place, height, s=area * 1.3, marker="x", color="black", zorder=4, linewidths=2.2)
    _legend(axes, points)
    _label(figure, axes, points, list(zip(places, heights, strict=True)), areas)


def _speed_axis(axes: Axes, points: Sequence[_Point]) -> list[float]:
    """Set up the horizontal axis; returns where each point stands on it."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    rates = [point.images_per_s for point in points if point.images_per_s is not None]
    untimed = len(rates) < len(points)
    timed_share = (1 - _STRIP_SHARE if rates else 0.0) if untimed else 1.0
    slowest, fastest = min(rates, default=1.0), max(rates, default=1.0)
    if fastest > _LOGARITHMIC_FROM * slowest:
        axes.set_xscale("log")
        low, end = slowest / 1.6, fastest * 1.9
        high = low * (end / low) ** (1 / timed_share)
        strip = low * (high / low) ** (1 - _STRIP_SHARE * 0.72)
        ticks = LogLocator(subs=(1, 2, 5)).tick_values(low, end)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        low, end = 0.0, fastest * 1.22
        high = end / timed_share if timed_share else end
        strip = high * (1 - _STRIP_SHARE * 0.72) if timed_share else high / 2
        ticks = MaxNLocator(nbins=8).tick_values(low, end)
    axes.set_xticks([tick for tick in ticks if low <= tick <= end and timed_share])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlim(low, high)
    if untimed:
        axes.axvspan(end if timed_share else low, high, color="#000000", alpha=0.04, zorder=0, linewidth=0)
        axes.annotate("not timed", (0.995, 0.985), xycoords="axes fraction", ha="right", va="top", fontsize=8.5,
                      color=_GREY)  # fmt: skip
    return [strip if point.images_per_s is None else point.images_per_s for point in points]


def _auc_axis(axes: Axes, heights: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    from exporters.tolerances import TOLERANCES

    limit = -TOLERANCES["int8"].auc_fall
    low, high = min(*heights, limit), max(*heights, 0.0)
    axes.set_ylim(low - 0.25 * (high - low), high + 0.3 * (high - low))
    axes.axhspan(low - (high - low), limit, color="#000000", alpha=0.05, zorder=0)
    axes.annotate(f"refused below {limit:+.3f}", (0.005, limit), xycoords=("axes fraction", "data"),
                  va="top", fontsize=8.5, color=_GREY)  # fmt: skip
    axes.axhline(0, color=_GREY, linewidth=0.9, zorder=1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if abs(value) > 1e-12 else "0")
    axes.set_ylabel("change of the patients' AUC   (better upwards)")


def _legend(axes: Axes, points: Sequence[_Point]) -> None:
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, markersize=9, label=precision.upper())
        for precision, (marker, colour) in MARKERS.items()
        if any(p.precision == precision for p in points)
    ]
    if any(p.status == "unproven" for p in points):
        entries.append(Line2D([], [], linestyle="none", marker="o", markerfacecolor="none", color=_GREY, markersize=9,
                              label="hollow: unproven"))  # fmt: skip
    if any(p.status == "refused" for p in points):
        entries.append(Line2D([], [], linestyle="none", marker="x", color="black", markersize=9,
                              markeredgewidth=2, label="crossed out: refused"))  # fmt: skip
    axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(-0.005, 1.0), ncols=len(entries), frameon=False,
                fontsize=9, handletextpad=0.2, columnspacing=1.4)  # fmt: skip


def _label(
    figure: Figure,
    axes: Axes,
    points: Sequence[_Point],
    at: Sequence[tuple[float, float]],
    areas: Sequence[float],
) -> None:
    """Write a label beside every marker, where neither another label nor a marker stands."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    places = axes.transData.transform(at)
    radii = [(area**0.5 / 2 + 2) * figure.dpi / 72 for area in areas]
    taken = [Bbox.from_extents(x - r, y - r, x + r, y + r) for (x, y), r in zip(places, radii, strict=True)]
    inside = axes.get_window_extent(renderer)
    for point, (x, y), radius in sorted(
        zip(points, places, radii, strict=True), key=lambda entry: -entry[1][0]
    ):
        label = axes.annotate(
            f"{point.name}\n{_said(point)}", (x, y), xycoords="figure pixels",
            textcoords="figure pixels", fontsize=8.8, linespacing=1.15, ha="center", va="center", zorder=5,
            xytext=(x, y), bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.7, "shrinkA": 0, "shrinkB": radius / 2},
        )  # fmt: skip
        size = Text.get_window_extent(
            label, renderer
        )  # an annotation's own would include the line to the marker
        width, tall = size.width + 6, size.height + 4
        best: tuple[int, Bbox] | None = None
        for number, (reach, degrees) in enumerate(itertools.product(_REACHES_PX, _DIRECTIONS)):
            dx, dy = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            far = max(abs(dx), abs(dy))
            at_x = x + dx / far * (radius + reach + width / 2)
            at_y = y + dy / far * (radius + reach + tall / 2)
            box = Bbox.from_bounds(at_x - width / 2, at_y - tall / 2, width, tall)
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            cost = number + 2000 * outside + 500 * sum(box.overlaps(other) for other in taken)
            cost += 60 * sum(_crosses((x, y), box, other) for other in taken if not other.contains(x, y))
            if best is None or cost < best[0]:
                best = (cost, box)
        assert best is not None  # noqa: S101  (there are offsets)
        box = best[1]
        taken.append(box)
        label.set_position(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))


def _said(point: _Point) -> str:
    rate = "" if point.images_per_s is None else f"{point.images_per_s:,.0f}/s, "
    return f"{rate}{point.megabytes:.1f} MB"


def _crosses(marker: tuple[float, float], label: Bbox, other: Bbox) -> bool:
    """Whether the line from a marker to its label runs through another box."""
    x, y = (label.x0 + label.x1) / 2, (label.y0 + label.y1) / 2
    return any(
        other.contains(marker[0] + (x - marker[0]) * step / 12, marker[1] + (y - marker[1]) * step / 12)
        for step in range(1, 12)
    )
