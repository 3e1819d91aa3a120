"""Small charts as inline SVG: no script, no external resource, readable in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

INK, FAINT, GRID = "#1f2933", "#616e7c", "#dfe4ea"
COLOURS = ("#2563a8", "#c2571a", "#3b7d3b", "#7b4fa3", "#6b7280")
MARKERS = ("circle", "square", "triangle")


def line_chart(
    series: Mapping[str, Sequence[float]], *, title: str, width_px: int = 460, height_px: int = 220
) -> str:
    """Values over epochs, one line a series, the y axis from the smallest to the largest value.

    Args:
        series: name -> values of epochs 1, 2, ...; at least one value overall.
    """
    values = [value for line in series.values() for value in line]
    low, high = min(values), max(values)
    span = high - low or 1.0
    is_share = low >= 0 and 0.5 < high <= 1
    low, high = low - 0.06 * span, 1.0 if is_share else high + 0.06 * span
    count = max(len(line) for line in series.values())
    left, top, right, bottom = 48, 44, width_px - 14, height_px - 34

    def x(index: int) -> float:
        return left + (right - left) * (index / (count - 1) if count > 1 else 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [_text(left, 16, title, strong=True)]
    for step in range(4):
        value = low + (high - low) * step / 3
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="{GRID}"/>'
        )
        parts.append(_text(left - 6, y(value) + 4, f"{value:.2f}", "end"))
    for index in sorted({0, (count - 1) // 2, count - 1}):
        parts.append(_text(x(index), bottom + 16, str(index + 1), "middle"))
    parts.append(_text(right, bottom + 30, "epoch", "end"))
    legend_x = float(left)
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if number % 2 else ""
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if len(line) == 1:
            parts.append(f'<circle cx="{x(0):.1f}" cy="{y(line[0]):.1f}" r="3" fill="{colour}"/>')
        stroke = f'stroke="{colour}" stroke-width="2"{dash}'
        parts.append(f'<line x1="{legend_x}" x2="{legend_x + 18}" y1="31" y2="31" {stroke}/>')
        parts.append(_text(legend_x + 23, 35, name))
        legend_x += 36 + 6.4 * len(name)
    return _svg(parts, width_px, height_px, title)


def dot_strip(
    points: Sequence[tuple[str, str, float]], *, axis: str, groups: Sequence[str], width_px: int = 720
) -> str:
    """One row a group, a mark a point on an axis from 0 to 1.

    Args:
        points: (name, group, value 0..1).
        axis: what the value is.
        groups: rows, from the top.
    """
    row_px = 46
    left = 20 + 8 * max(len(group) for group in groups)
    right, top = width_px - 20, 12
    bottom = top + row_px * len(groups)

    def x(value: float) -> float:
        return left + (right - left) * value

    parts = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        stroke = f'stroke="{FAINT}" stroke-dasharray="3 3"' if value == 0.5 else f'stroke="{GRID}"'
        parts.append(f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top}" y2="{bottom}" {stroke}/>')
        parts.append(_text(x(value), bottom + 16, f"{value:g}", "middle"))
    parts.append(_text((left + right) / 2, bottom + 34, axis, "middle"))
    for row, group in enumerate(groups):
        centre = top + row_px * (row + 0.5)
        parts.append(_text(left - 10, centre + 4, group, "end", strong=True))
        taken: dict[int, int] = {}
        for name, of_group, value in sorted(points, key=lambda point: point[2]):
            if of_group != group:
                continue
            bin_px = round(x(value) / 9)
            level = taken.get(bin_px, 0)  # marks at the same place are drawn beside each other
            taken[bin_px] = level + 1
            offset_px = (level + 1) // 2 * 9 * (1 if level % 2 else -1)
            colour = COLOURS[row % len(COLOURS)]
            mark = _mark(MARKERS[row % len(MARKERS)], x(value), centre + offset_px, colour)
            parts.append(f"<g>{mark}<title>{escape(name)}: {value:.3f}</title></g>")
    return _svg(parts, width_px, bottom + 44, axis)


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    style = f'fill="{colour}" fill-opacity="0.75" stroke="#fff"'
    if kind == "square":
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" {style}/>'
    if kind == "triangle":
        return f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 10h-11z" {style}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", *, strong: bool = False) -> str:
    style = f'font-size="13" font-weight="600" fill="{INK}"' if strong else f'font-size="12" fill="{FAINT}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(text)}</text>'


def _svg(parts: Sequence[str], width_px: int, height_px: int, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width_px} {height_px}" width="{width_px}" height="{height_px}" role="img" '
        'font-family="inherit" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
