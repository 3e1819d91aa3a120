"""Charts of the preview as inline SVG: no script, no external resource."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from deploy.preview_prometheus import Series

INK, FAINT, GRID, GOOD, BAD = "#1f2933", "#616e7c", "#dfe4ea", "#3b7d3b", "#b3261e"
COLOURS = ("#2563a8", "#c2571a", "#3b7d3b", "#7b4fa3", "#0f8b8d", "#a8326d", "#8a6d1a", "#6b7280")
HIGH_PX = 190
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 68, 12, 8, 22


@dataclass(frozen=True)
class Canvas:
    """Where a chart is drawn: its width, and the span of time that it shows, with marks in it (seconds since 1970)."""

    width_px: int
    start_s: float
    end_s: float
    marks: Sequence[float] = ()

    def x(self, at_s: float) -> float:
        """Pixels from the left."""
        share = (at_s - self.start_s) / (self.end_s - self.start_s)
        return LEFT_PX + (self.width_px - LEFT_PX - RIGHT_PX) * share

    def svg(self, parts: Sequence[str], label: str) -> str:
        """The chart with its time axis and marks."""
        bottom = HIGH_PX - BOTTOM_PX
        drawn = list(parts)
        for mark_s in self.marks:
            if self.start_s <= mark_s <= self.end_s:
                line = f'x1="{self.x(mark_s):.1f}" x2="{self.x(mark_s):.1f}" y1="{TOP_PX}" y2="{bottom}"'
                drawn.append(
                    f'<line {line} stroke="#7b4fa3" stroke-dasharray="2 3"><title>release</title></line>'
                )
        for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
            at_s = self.start_s + (self.end_s - self.start_s) * share
            clock = time.strftime("%H:%M:%S", time.gmtime(at_s))
            drawn.append(_text(self.x(at_s), HIGH_PX - 6, clock, anchor))
        return (
            f'<svg viewBox="0 0 {self.width_px} {HIGH_PX}" role="img" font-family="inherit" '
            f'aria-label="{escape(label)}">{"".join(drawn)}</svg>'
        )


def lines(
    canvas: Canvas, named: Sequence[tuple[str, Series]], unit: str, *, highest: float | None, stacked: bool
) -> str:
    """One line a series from 0; stacked, areas on one another."""
    layers = _stacked([series for _, series in named]) if stacked else [list(s.points) for _, s in named]
    values = [value for points in layers for _, value in points if math.isfinite(value)]
    low = min([0.0, *values])
    high = max([value for value in values if value > low] or [low + 1.0])
    high = highest if highest is not None and highest >= high else _round_up(high, unit)

    def y(value: float) -> float:
        return HIGH_PX - BOTTOM_PX - (HIGH_PX - TOP_PX - BOTTOM_PX) * (value - low) / (high - low)

    parts = _grid(canvas, low, high, unit, y)
    for place in reversed(range(len(layers))):
        colour = COLOURS[place % len(COLOURS)]
        dash = ' stroke-dasharray="6 3"' if place >= len(COLOURS) else ""
        for run in _runs(layers[place]):
            told = " ".join(f"{canvas.x(at_s):.1f},{y(value):.1f}" for at_s, value in run)
            if stacked:
                ends = f"{canvas.x(run[-1][0]):.1f},{y(0):.1f} {canvas.x(run[0][0]):.1f},{y(0):.1f}"
                parts.append(f'<polygon points="{told} {ends}" fill="{colour}" fill-opacity="0.85"/>')
            elif len(run) == 1:
                parts.append(
                    f'<circle cx="{canvas.x(run[0][0]):.1f}" cy="{y(run[0][1]):.1f}" r="2" fill="{colour}"/>'
                )
            else:
                parts.append(
                    f'<polyline points="{told}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>'
                )
    return canvas.svg(parts, ", ".join(name for name, _ in named))


def states(canvas: Canvas, named: Sequence[tuple[str, Series]]) -> str:
    """One bar a series: green where it is not 0."""
    high = (HIGH_PX - TOP_PX - BOTTOM_PX) / max(len(named), 1)
    parts = []
    for row, (name, series) in enumerate(named):
        top = TOP_PX + row * high
        changes = [
            point
            for before, point in zip([None, *series.points], series.points, strict=False)
            if before is None or bool(before[1]) != bool(point[1])
        ]
        for (at_s, value), (until_s, _) in itertools.pairwise([*changes, (canvas.end_s, 0.0)]):
            left, right = canvas.x(at_s), canvas.x(until_s)
            colour = GOOD if value else BAD
            parts.append(
                f'<rect x="{left:.1f}" y="{top + 2:.1f}" width="{right - left + 0.3:.1f}" height="{high - 4:.1f}" fill="{colour}"/>'
            )
        parts.append(_text(LEFT_PX + 6, top + high / 2 + 4, name, colour="#fff"))
    return canvas.svg(parts, ", ".join(name for name, _ in named))


def heatmap(canvas: Canvas, buckets: Sequence[Series], step_s: float) -> str:
    """A histogram over time: a column a step, a row a bucket, darker where more values fell."""
    rising = sorted(buckets, key=lambda series: float(series.labels["le"]))
    edges = [series.labels["le"] for series in rising]
    below: dict[float, float] = {}
    counts: list[dict[float, float]] = []
    for series in rising:
        own = {at_s: max(value - below.get(at_s, 0.0), 0.0) for at_s, value in series.points}
        below = {at_s: value for at_s, value in series.points}
        counts.append(own)
    most = max((value for row in counts for value in row.values()), default=0.0) or 1.0
    high = (HIGH_PX - TOP_PX - BOTTOM_PX) / max(len(rising), 1)
    parts = []
    for row, own in enumerate(counts):
        top = HIGH_PX - BOTTOM_PX - (row + 1) * high
        for at_s, value in own.items():
            if value > 0:
                left, right = (
                    max(canvas.x(at_s - step_s), LEFT_PX),
                    min(canvas.x(at_s), canvas.width_px - RIGHT_PX),
                )
                parts.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.5):.1f}" height="{high:.1f}" '
                    f'fill="{COLOURS[0]}" fill-opacity="{0.1 + 0.9 * value / most:.2f}"/>'
                )
        if len(rising) <= 8 or row % 2:
            parts.append(_text(LEFT_PX - 6, top + 4, edges[row], "end"))
    return canvas.svg(parts, "histogram")


def shown(value: float, unit: str) -> str:
    """A value with its unit, as short as it can be read."""
    if not math.isfinite(value):
        return "no number"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit in ("bytes", "Bps"):
        for prefix in ("", "Ki", "Mi", "Gi"):
            if abs(value) < 1024 or prefix == "Gi":
                return f"{value:.3g} {prefix}B" + ("/s" if unit == "Bps" else "")
            value /= 1024
    if unit == "s":
        return (
            f"{value * 1e6:.3g} µs"
            if abs(value) < 1e-3
            else f"{value * 1e3:.3g} ms"
            if abs(value) < 1
            else f"{value:.3g} s"
        )
    said = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return said + {"reqps": " req/s", "ops": " /s", "d": " d", "watt": " W"}.get(unit, "")


def _grid(canvas: Canvas, low: float, high: float, unit: str, y: Callable[[float], float]) -> list[str]:
    parts = []
    for step in range(5):
        value = low + (high - low) * step / 4
        line = f'x1="{LEFT_PX}" x2="{canvas.width_px - RIGHT_PX}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
        parts.append(f'<line {line} stroke="{GRID}"/>')
        parts.append(_text(LEFT_PX - 6, y(value) + 4, shown(value, unit), "end"))
    return parts


def _round_up(value: float, unit: str) -> float:
    if unit in ("bytes", "Bps"):
        power = 1024.0 ** math.floor(math.log(max(value, 1.0), 1024))
        return power * _round_up(value / power, "none")
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= value)


def _stacked(all_series: Sequence[Series]) -> list[list[tuple[float, float]]]:
    below: dict[float, float] = {}
    layers = []
    for series in all_series:
        for at_s, value in series.points:
            below[at_s] = below.get(at_s, 0.0) + (value if math.isfinite(value) else 0.0)
        layers.append([(at_s, below[at_s]) for at_s, _ in series.points])
    return layers


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Parts of a line without a gap: NaN, or more than twice the usual step."""
    steps = sorted(later - earlier for (earlier, _), (later, _) in itertools.pairwise(points))
    usual_s = steps[0] if steps else 0.0
    runs: list[list[tuple[float, float]]] = []
    last_s = -math.inf
    for at_s, value in points:
        if not math.isfinite(value):
            continue
        if at_s - last_s > 1.5 * usual_s or not runs:
            runs.append([])
        runs[-1].append((at_s, value))
        last_s = at_s
    return runs


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = FAINT) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="{colour}">{escape(text)}</text>'
