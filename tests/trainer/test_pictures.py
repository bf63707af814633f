"""The picture of the days. The oracle is the figure's own lines and texts, and the pixels of the PNG."""

import io
import math
from collections.abc import Sequence
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text

from trainer.pictures import COLORS, _spread, days_figure, days_picture


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
