"""The picture of the days. The oracle is the figure's own lines and texts, and the pixels of the PNG."""

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text

from trainer.pictures import COLORS, _spread, days_figure, days_picture, gates_figure, gates_picture


def history(
    days: int = 10, addresses: Sequence[str] = ("click@all", "buy@click")
) -> list[tuple[str, dict[str, float]]]:
    """AUC 0.6 + 0.1 a + 0.001 d and calibration 1 + 0.02 a + 0.001 d of address a on day d, and one number more."""
    return [
        (
            f"2026-11-{day + 1:02d}",
            {"seconds": 30.0}
            | {f"{address}/auc": 0.6 + 0.1 * a + 0.001 * day for a, address in enumerate(addresses)}
            | {f"{address}/calibration": 1 + 0.02 * a + 0.001 * day for a, address in enumerate(addresses)},
        )
        for day in range(days)
    ]


def lines(axes: Axes) -> dict[str, list[float]]:
    return {
        str(line.get_label()): np.asarray(line.get_ydata()).tolist()
        for line in axes.lines
        if "@" in str(line.get_label())
    }


def test_the_picture_is_a_png_with_the_colour_of_every_series() -> None:
    png = days_picture(history(), dpi=100)
    pixels = matplotlib.image.imread(io.BytesIO(png))
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and pixels.shape == (420, 1000, 4)
    for color in COLORS[:2]:
        wanted = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        found = np.abs(pixels[..., :3] - wanted).max(axis=-1) < 1 / 255  # PNG keeps 8 bits a channel
        assert found[:, :500].any() and found[:, 500:].any()  # in both panels


def test_both_panels_show_every_address_with_its_own_values() -> None:
    auc, calibration = days_figure(history()).axes
    for axes, start, step in ((auc, 0.6, 0.1), (calibration, 1.0, 0.02)):
        for a, address in enumerate(("click@all", "buy@click")):
            assert lines(axes)[address] == pytest.approx([start + step * a + 0.001 * day for day in range(10)])
    assert [text.get_text() for text in auc.texts] == ["click@all  0.609", "buy@click  0.709"]
    assert any(np.array_equal(line.get_ydata(), [1.0, 1.0]) for line in calibration.lines)


def test_the_calibration_axis_is_logarithmic_and_holds_one() -> None:
    for factor in (0.05, 0.3, 1.0, 1.7, 40.0):
        days = [(day, {key: value * factor for key, value in metrics.items()}) for day, metrics in history()]
        axes = days_figure(days).axes[1]
        low, high = axes.get_ylim()
        assert axes.get_yscale() == "log"
        assert low < min(1.0, factor) and high > max(1.0, 1.029 * factor)
        assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_a_value_that_is_missing_nan_infinite_or_zero_leaves_a_gap() -> None:
    days = history()
    days[3][1]["click@all/auc"] = math.nan
    days[4][1]["click@all/auc"] = math.inf
    days[5][1]["click@all/auc"] = 0.0
    del days[9][1]["click@all/auc"]
    axes = days_figure(days).axes[0]
    assert [day for day, value in enumerate(lines(axes)["click@all"]) if math.isnan(value)] == [3, 4, 5, 9]
    assert [text.get_text() for text in axes.texts] == ["click@all", "buy@click  0.709"]  # no value of the last day
    assert axes.get_ylim()[1] < 0.8


@pytest.mark.filterwarnings("error")
def test_one_day_and_a_day_without_metrics_are_pictures_too() -> None:
    assert days_picture(history(days=1)).startswith(b"\x89PNG")
    assert days_picture([("2026-11-20", {})]).startswith(b"\x89PNG")
    assert days_picture([("2026-11-20", {"a@all/auc": math.nan, "a@all/calibration": 0.0})]).startswith(b"\x89PNG")


def test_names_of_equal_lines_do_not_overlap_and_stay_in_the_picture() -> None:
    days = history(addresses=[f"task{i}@all" for i in range(8)])
    days[-1][1].update({f"task{i}@all/calibration": 1.4 for i in range(8)})
    figure = days_figure(days)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
        assert len(boxes) == 8 and all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))
        assert max(box.x1 for box in boxes) <= figure.bbox.x1 and boxes[-1].y1 <= figure.bbox.y1


def test_spread_moves_names_least_of_all_places_that_are_apart() -> None:
    # Closed form: far apart stays; three equal ones stand around their mean; the upper end pushes down.
    assert _spread([0.1, 0.5, 0.9], gap=0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert _spread([0.5, 0.5, 0.5], gap=0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert _spread([0.2, 0.95, 1.0], gap=0.1) == pytest.approx([0.2, 0.9, 1.0])
    assert _spread([], gap=0.1) == []


def gates(*sizes: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Levels of so many gates and experts, as a day's report tells of them."""
    rng = np.random.default_rng(0)
    return {
        f"level {number}": {
            "mean": {
                f"task {g}": {f"expert {e + 1}": float(share) for e, share in enumerate(rng.dirichlet([0.5] * experts))}
                for g in range(num_gates)
            },
            "entropy": {f"task {g}": 0.5 for g in range(num_gates)},
            "least": 0.03,
            "dead_units": 0.125,
        }
        for number, (num_gates, experts) in enumerate(sizes, start=1)
    }


def test_a_heat_map_shows_the_share_of_every_expert_in_every_gate_of_every_level() -> None:
    levels = gates((3, 4), (2, 4))
    figure = gates_figure(levels, "model, 2026-11-20")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "level 1: least used expert 0.030, 12% dead units",
        "level 2: least used expert 0.030, 12% dead units",
    ]
    for axes, entry in zip(figure.axes, levels.values(), strict=True):
        share_GE = [list(shares.values()) for shares in entry["mean"].values()]
        np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), share_GE)
        assert [text.get_text() for text in axes.texts] == [f"{share:.2f}" for row in share_GE for share in row]
        assert [label.get_text() for label in axes.get_yticklabels()] == [f"{gate}  (0.50)" for gate in entry["mean"]]


@pytest.mark.parametrize("sizes", [[(1, 1)], [(1, 32)], [(12, 4), (13, 8)]])
def test_no_text_of_a_heat_map_lies_on_another(sizes: list[tuple[int, int]]) -> None:
    figure = gates_figure(gates(*sizes), "model, 2026-11-20: mean shares of experts")
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text()]  # type: ignore[union-attr]
    boxes = [box for box in (text.get_window_extent() for text in texts) if box.width > 1]  # the others are not drawn
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), (a, b)
    assert gates_picture(gates(*sizes)).startswith(b"\x89PNG")
