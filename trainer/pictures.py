"""Pictures of a model: AUC and calibration of every task, day by day; and which experts a day's gates mixed.

days: from `[(day, {"click@all/auc": 0.71, "click@all/calibration": 1.02, ...}), ...]`, sorted by day; a metric may be
absent or NaN; a PNG of two panels with one line per address (task@space), named at its end. gates: from the gates of a
day's report; a PNG with a heat-map a level, a row a gate and a column an expert.

Drawn with matplotlib's objects on its Agg canvas: no window, no global state. Importing matplotlib takes 1-2 s.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

History = Sequence[tuple[str, dict[str, float]]]

SIZE_INCHES = (10.0, 4.2)
FONT_POINTS = 9.0
LETTER_WIDTH = 0.0073  # of a letter of that size, as a part of the figure's width
INK, FAINT = "#333333", "#8c8c8c"
COLORS = ("#2166ac", "#d6604d", "#1b7837", "#762a83", "#e08214", "#35978f", "#8c510a", "#c51b7d")
# Ticks of the calibration axis, whose scale is logarithmic: the first row that holds every value is taken.
CALIBRATION_TICKS = (
    (0.9, 0.95, 1.0, 1.05, 1.1),
    (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4),
    (0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0),
    (0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0),
    (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
)


def days_picture(history: History, title: str = "", dpi: float = 150.0) -> bytes:
    """The PNG of `days_figure`: 1500 x 630 pixels at 150 dpi."""
    out = io.BytesIO()
    days_figure(history, title).savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def days_figure(history: History, title: str = "") -> Figure:
    """The panels AUC and calibration (predicted / observed); a value not finite or not positive leaves a gap."""
    assert history, "a picture needs at least one day"
    days = [day for day, _ in history]
    keys = [key for _, metrics in history for key in metrics if key.endswith(("/auc", "/calibration"))]
    addresses = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    colors = {address: COLORS[index % len(COLORS)] for index, address in enumerate(addresses)}
    dot = min(max(100 / len(days), 1.6), 4.0)  # points; a value between two gaps is a dot without a line

    figure = Figure(figsize=SIZE_INCHES, facecolor="white")
    if title:
        figure.text(0.01, 0.975, title, va="top", color=INK, fontsize=FONT_POINTS + 2, weight="bold")
    longest = max((len(f"{address}  0.000") for address in addresses), default=0)
    width = max(0.425 - LETTER_WIDTH * longest, 0.1)  # what the names at the line ends leave of half a figure
    height = 0.74 if title else 0.8
    for left, metric, heading in ((0.055, "auc", "AUC"), (0.56, "calibration", "Calibration: predicted / observed")):
        axes = figure.add_axes((left, 0.09, width, height))
        lines = {address: _series(history, f"{address}/{metric}") for address in addresses}
        _frame(axes, heading, days)
        for address, values in lines.items():
            axes.plot(values, color=colors[address], linewidth=1.6, marker="o", markersize=dot, zorder=3, label=address)
        _scale_calibration(axes, lines) if metric == "calibration" else _scale_auc(axes, lines)
        _name_lines(axes, lines, colors)
    return figure


def gates_picture(gates: Mapping[str, Mapping[str, Any]], title: str = "", dpi: float = 150.0) -> bytes:
    """The PNG of `gates_figure`."""
    out = io.BytesIO()
    gates_figure(gates, title).savefig(out, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.15)
    return out.getvalue()


def gates_figure(gates: Mapping[str, Mapping[str, Any]], title: str = "") -> Figure:
    """A heat-map a level: the mean share of each expert in each gate, the gate's entropy behind its name; white is
    none, the darkest all.
    """
    assert gates, "a picture needs at least one level"
    columns = max(len(shares) for entry in gates.values() for shares in entry["mean"].values())
    heights = [0.36 * len(entry["mean"]) for entry in gates.values()]
    width, height = 0.62 * columns, sum(heights) + 0.8 * len(heights) + 0.5  # inches
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.0, 1.0, title, va="top", color=INK, fontsize=FONT_POINTS + 2, weight="bold")
    top = height - 0.2
    for (level, entry), inches in zip(gates.items(), heights, strict=True):
        top -= inches + 0.8
        axes = figure.add_axes((0.0, (top + 0.4) / height, 1.0, inches / height))
        share_GE = [list(shares.values()) for shares in entry["mean"].values()]
        axes.imshow(share_GE, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        dead = f", {entry['dead_units']:.0%} dead units" if "dead_units" in entry else ""
        axes.set_title(
            f"{level}: least used expert {entry['least']:.3f}{dead}", loc="left", color=INK, fontsize=FONT_POINTS
        )
        names = [f"{gate}  ({entropy:.2f})" for gate, entropy in entry["entropy"].items()]
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(len(share_GE[0])), [str(1 + expert) for expert in range(len(share_GE[0]))])
        axes.tick_params(length=0, colors=INK, labelsize=FONT_POINTS)
        for side in axes.spines.values():
            side.set_visible(False)
        for gate, shares in enumerate(share_GE):
            for expert, share in enumerate(shares):
                color = "white" if share > 0.55 else INK
                axes.text(expert, gate, f"{share:.2f}", ha="center", va="center", color=color, fontsize=FONT_POINTS - 1)
    below = "expert; behind a gate's name its entropy, 1: equal shares"
    figure.text(0.0, 0.0, below, va="bottom", color=INK, fontsize=FONT_POINTS)
    return figure


def _series(history: History, key: str) -> list[float]:
    values = (metrics.get(key, math.nan) for _, metrics in history)
    return [value if math.isfinite(value) and value > 0 else math.nan for value in values]  # a log axis has no zero


def _finite(lines: dict[str, list[float]]) -> list[float]:
    return [value for values in lines.values() for value in values if math.isfinite(value)]


def _frame(axes: Axes, heading: str, days: list[str]) -> None:
    axes.set_title(heading, loc="left", color=INK, fontsize=FONT_POINTS + 1, pad=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.tick_params(length=0, colors=INK, labelsize=FONT_POINTS)
    axes.tick_params(axis="x", length=3, color=FAINT)
    last = len(days) - 1
    ticks = sorted({0, last // 2, last} if last >= 4 and len(days[0]) <= len("2026-11-20") else {0, last})
    axes.set_xticks(ticks, [days[tick] for tick in ticks])
    margin = 0.03 * last if last else 0.5
    axes.set_xlim(-margin, last + margin)


def _scale_auc(axes: Axes, lines: dict[str, list[float]]) -> None:
    values = _finite(lines) or [0.5, 1.0]
    low, high = min(values), max(values)
    margin = max(0.1 * (high - low), 0.005)
    axes.set_ylim(low - margin, high + margin)
    axes.locator_params(axis="y", nbins=5)


def _scale_calibration(axes: Axes, lines: dict[str, list[float]]) -> None:
    values = _finite(lines)
    low, high = min([0.9, *values]), max([1.1, *values])  # errors of a few per cent shall look small
    ticks = next((row for row in CALIBRATION_TICKS if row[0] <= low and high <= row[-1]), CALIBRATION_TICKS[-1])
    margin = (high / low) ** 0.08
    bottom, top = max(low, ticks[0]) / margin, min(high, ticks[-1]) * margin
    shown = [tick for tick in ticks if bottom <= tick <= top]
    axes.set_ylim(bottom, top)  # before the scale: matplotlib warns of a logarithmic axis without data
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.axhline(1.0, color=INK, linewidth=1.0, zorder=2)


def _name_lines(axes: Axes, lines: dict[str, list[float]], colors: dict[str, str]) -> None:
    """Write every address and its value of the last day to the right of the panel, beside the end of its line."""
    ends = []
    for address, values in lines.items():
        known = [index for index, value in enumerate(values) if math.isfinite(value)]
        if known:
            index = known[-1]
            height = axes.transAxes.inverted().transform(axes.transData.transform((index, values[index])))[1]
            ends.append((min(max(height, 0.0), 1.0), address, index))
    ends.sort()
    places = _spread([height for height, _, _ in ends], gap=0.065)
    for place, (_, address, index) in zip(places, ends, strict=True):
        value = lines[address][index]
        axes.annotate(
            f"{address}  {value:.3f}" if index == len(lines[address]) - 1 else address,
            xy=(index, value),
            xytext=(1.05, place),
            textcoords="axes fraction",
            va="center",
            color=colors[address],
            fontsize=FONT_POINTS,
            arrowprops={"arrowstyle": "-", "color": colors[address], "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
            annotation_clip=False,
        )


def _spread(heights: list[float], gap: float) -> list[float]:
    """The places at least `gap` apart, inside 0..1 if they fit, that are nearest (least squares) to sorted heights."""
    # With the gaps taken out, places need only not fall: isotonic regression, by pooling neighbours.
    pools: list[list[float]] = []
    for index, height in enumerate(heights):
        pools.append([height - index * gap])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) > sum(pools[-1]) / len(pools[-1]):
            upper = pools.pop()
            pools[-1].extend(upper)
    top = max(1.0 - (len(heights) - 1) * gap, 0.0)
    levels = [min(max(sum(pool) / len(pool), 0.0), top) for pool in pools for _ in pool]
    return [level + index * gap for index, level in enumerate(levels)]
