"""The charts of the report. Every one says how many slides or patients it is made of.

Colours are those of Okabe and Ito, which colour-blind eyes tell apart; lines also differ in dash, marks in shape.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from training.evaluation.curves import GRID, Curve
from training.evaluation.scoring import Rows

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
FAINT = "#5d6b78"
DPI = 160
_STYLE: dict[str, Any] = {
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e8ed",
    "grid.linewidth": 0.8,
    "xtick.color": "#2b3640",
    "ytick.color": "#2b3640",
    "legend.frameon": False,
    "legend.fontsize": 10.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Figures are drawn alike, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]  # keys are checked when they are set
        yield


def png(figure: Figure) -> bytes:
    """A figure as PNG, reproducible: no date in it."""
    data = io.BytesIO()
    FigureCanvasAgg(figure)
    with style():
        figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    return data.getvalue()


def colour_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def roc(curves: Mapping[str, Curve], title: str) -> bytes:
    """ROC curves; the names are the legend's entries."""
    with style():
        figure, axes = _square(title, len(curves))
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (2, 2)), label="chance")
        _draw_curves(axes, curves, steps=False)
        axes.set(
            xlabel="false positive rate (1 \u2212 specificity)", ylabel="true positive rate (sensitivity)"
        )
        return _finish(figure, axes)


def precision_recall(curves: Mapping[str, Curve], title: str) -> bytes:
    """Precision-recall curves; the share of the class is what a guess would have."""
    with style():
        figure, axes = _square(title, len(curves))
        for number, prevalence in enumerate(
            sorted({round(one.positives / (one.positives + one.negatives), 3) for one in curves.values()})[:3]
        ):
            label = f"chance ({100 * prevalence:.0f} %)"
            axes.axhline(
                prevalence, color=FAINT, linewidth=1, linestyle=(0, (2, 2 + 2 * number)), label=label
            )
        _draw_curves(axes, curves, steps=True)
        axes.set(xlabel="recall (sensitivity)", ylabel="precision (positive predictive value)")
        return _finish(figure, axes)


def reliability(bins: Mapping[str, Sequence[Mapping[str, Any]]], title: str, lowest: float) -> bytes:
    """Confidence against the share that is right, with Wilson intervals, and how many answers each bin holds.

    Args:
        bins: name (of the level) -> what `scoring.reliability` told.
        lowest: 1/K, the smallest confidence that can be.
    """
    with style():
        figure = Figure(figsize=(6.2, 6.0), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot(
            [lowest, 1],
            [lowest, 1],
            color=FAINT,
            linewidth=1,
            linestyle=(0, (2, 2)),
            label="perfectly calibrated",
        )
        width = 0.009
        for number, (name, entries) in enumerate(bins.items()):
            shift = (number - (len(bins) - 1) / 2) * width
            x = np.array([entry["confidence"] for entry in entries])
            right = [entry["right"] for entry in entries]
            y = np.array([one["value"] for one in right])
            spread = [y - [one["low"] for one in right], [one["high"] for one in right] - y]
            axes.errorbar(
                x + shift, y, yerr=np.maximum(spread, 0), fmt=MARKS[number] + DASHES[number], capsize=3,
                color=colour_of(number), linewidth=1.4, markersize=6, elinewidth=1.2, label=name,
            )  # fmt: skip
            edges = [(entry["low"] + entry["high"]) / 2 for entry in entries]
            below.bar(
                np.array(edges) + 2.4 * shift,
                [one["whole"] for one in right],
                width=0.02,
                color=colour_of(number),
            )
        axes.set(ylabel="share that is right (95 % interval)", ylim=(-0.03, 1.05), xlim=(lowest - 0.03, 1.03))
        below.set(xlabel="confidence (probability of the answered class)", ylabel="answers")
        below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        for one in (axes.xaxis, axes.yaxis):
            one.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_title(title)
        figure.legend(loc="outside lower left")
        return png(figure)


def confusion(levels: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Confusion matrices side by side: counts, and shares of each true class.

    Args:
        levels: name of the level -> what `scoring.confusion` told.
    """
    names = next(iter(levels.values()))["class_names"]
    side = max(3.4, 0.95 * len(names) + 1.6)
    with style():
        figure = Figure(figsize=(side * len(levels) + 0.9, side + 0.5), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(levels)))
        for axes, (level, told) in zip(panels, levels.items(), strict=True):
            counts_KK = np.array(told["counts"])
            rows_K1 = counts_KK.sum(axis=1, keepdims=True)
            share_KK = np.divide(counts_KK, rows_K1, out=np.zeros(counts_KK.shape), where=rows_K1 > 0)
            image = axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
            for k, row in enumerate(counts_KK):
                for j, count in enumerate(row):
                    shown = f"{count}\n{100 * share_KK[k, j]:.0f} %" if rows_K1[k, 0] else "0\n\u2013"
                    colour = "white" if share_KK[k, j] > 0.55 else "#14202b"
                    axes.text(j, k, shown, ha="center", va="center", color=colour, fontsize=12)
            ticks = range(len(names))
            labels = [f"{name}\n(n = {int(rows_K1[k, 0])})" for k, name in enumerate(names)]
            turned = max(map(len, names)) > 8
            axes.set_xticks(ticks, names, rotation=30 if turned else 0, ha="right" if turned else "center")
            axes.set_yticks(ticks, labels)
            axes.set(xlabel="answered", ylabel="true class" if axes is panels[0] else "")
            axes.set_title(f"{level} (n = {int(counts_KK.sum())})")
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        bar = figure.colorbar(
            image, ax=list(panels), shrink=0.62, format=PercentFormatter(1.0, decimals=0, symbol=" %")
        )
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)  # type: ignore[operator]
        return png(figure)


def forest(
    groups: Sequence[tuple[str, Mapping[str, Any]]], score: str, axis: str, *, chance: float | None, limits: tuple[float, float] | None
) -> bytes:  # fmt: skip
    """One score in several groups, with its interval; a group where it is not defined says why.

    Args:
        groups: (name, what `scoring.score_group` told), from the top.
    """
    with style():
        figure = Figure(figsize=(7.6, 1.25 + 0.52 * len(groups)), layout="constrained")
        axes = figure.subplots()
        labels = []
        for row, (name, told) in enumerate(groups):
            entry = told["scores"][score]
            counts = ", ".join(f"{count} {label}" for label, count in told["by_class"].items())
            labels.append(f"{name}\n{counts}")
            if entry["value"] is None:
                shown = told["undefined"] or "not enough answers"
                axes.text(
                    0.5, row, f"not defined: {shown}", ha="center", va="center", color=FAINT, style="italic",
                    transform=axes.get_yaxis_transform(),
                )  # fmt: skip
                continue
            overall = row == 0
            colour = colour_of(0) if overall else colour_of(1)
            if entry["low"] is not None:
                axes.plot(
                    [entry["low"], entry["high"]],
                    [row, row],
                    color=colour,
                    linewidth=2.2,
                    solid_capstyle="butt",
                )
            axes.plot(entry["value"], row, "D" if overall else "o", color=colour, markersize=8, clip_on=False)
            interval = "no interval" if entry["low"] is None else f"{entry['low']:.2f} to {entry['high']:.2f}"
            axes.text(
                1.02, row, f"{entry['value']:.2f}  ({interval})", va="center", fontsize=10,
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        if chance is not None:
            axes.axvline(chance, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_yticks(range(len(groups)), labels)
        axes.set_ylim(len(groups) - 0.45, -0.55)
        if limits:
            axes.set_xlim(*limits)
        axes.set_xlabel(axis)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return png(figure)


def histogram(rows: Rows, class_names: Sequence[str], what: str) -> bytes:
    """How probabilities are spread, by true class: of the second class where there are two, else of the true class."""
    binary = len(class_names) == 2
    with style():
        occurring = [k for k in range(len(class_names)) if (rows.labels_N == k).any()]
        figure = Figure(figsize=(6.2, 1.2 + 1.35 * len(occurring)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(len(occurring), 1, sharex=True, sharey=True))
        for axes, k in zip(panels, occurring, strict=True):
            mine = rows.labels_N == k
            values = rows.probabilities_NK[mine, 1 if binary else k]
            axes.hist(
                values, bins=np.linspace(0, 1, 21), color=colour_of(k), edgecolor="white", linewidth=0.8
            )
            if binary:
                axes.axvline(0.5, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
            axes.set_title(f"truly {class_names[k]} (n = {int(mine.sum())} {what})", fontsize=11)
            axes.set_ylabel(what)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        panels[-1].set(
            xlabel=f"probability of {class_names[1]}" if binary else "probability of the true class",
            xlim=(0, 1),
        )
        return png(figure)


def abstention(levels: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> bytes:
    """Share of wrong answers against the share that is answered, the least certain left out first.

    The first level has a band of Wilson intervals; slides of one patient are not independent, theirs would be too narrow.
    """
    with style():
        figure = Figure(figsize=(6.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(levels.items()):
            x = [point["coverage"] for point in points]
            wrong = [point["wrong"] for point in points]
            if number == 0:
                low, high = ([one[limit] for one in wrong] for limit in ("low", "high"))
                axes.fill_between(x, low, high, color=colour_of(0), alpha=0.13, linewidth=0)
            axes.plot(
                x, [one["value"] for one in wrong], DASHES[number], marker=MARKS[number],
                markersize=4.5 if len(x) < 60 else 0, color=colour_of(number), linewidth=1.6, label=name, clip_on=False,
            )  # fmt: skip
        axes.set(xlabel="share that is answered (the least certain are left to a person)", xlim=(1.02, 0))
        axes.set(ylabel="wrong among the answered", ylim=(-0.02, 1.0))
        for one in (axes.xaxis, axes.yaxis):
            one.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_title(title)
        figure.legend(loc="outside lower left")
        return png(figure)


def _square(title: str, entries: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, 5.6 + 0.24 * entries), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.015, 1.015), ylim=(-0.015, 1.03))
    axes.set_title(title)
    axes.set_aspect("equal")
    return figure, axes


def _draw_curves(axes: Axes, curves: Mapping[str, Curve], *, steps: bool) -> None:
    for number, (name, curve) in enumerate(curves.items()):
        colour = colour_of(number)
        if curve.low_G is not None and curve.high_G is not None:
            axes.fill_between(GRID, curve.low_G, curve.high_G, color=colour, alpha=0.14, linewidth=0)
        axes.plot(
            curve.x_P, curve.y_P, color=colour, linewidth=2, linestyle=DASHES[number % len(DASHES)], label=name,
            drawstyle="steps-pre" if steps else "default",
        )  # fmt: skip


def _finish(figure: Figure, axes: Axes) -> bytes:
    """The legend goes below the axes, where no curve can run into it."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.14), ncols=1, handlelength=2.6)
    return png(figure)
