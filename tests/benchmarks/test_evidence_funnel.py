"""The short forms of the evidence on funnels and on position bias: what is claimed of them holds with one seed.

Tolerances are wider than the claims on the page: a tenth to a third of the rows, one seed.
"""

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.evidence import funnel, position, selection, serps
from benchmarks.evidence.part import Found, Part

pytestmark = pytest.mark.slow

PARTS: dict[str, Part] = {
    "selection": selection.PART,
    "funnel": funnel.PART,
    "position": position.PART,
    "serps": serps.PART,
}
needs_pages = pytest.mark.skipif(bool(serps.lacks()), reason=serps.lacks() or "there")


@cache
def short(part: str) -> Found:
    torch.set_num_threads(1)
    trials = PARTS[part].trials(True, None)
    return [trial | dict(PARTS[part].measure(**trial)) | {"seconds": 0.0} for trial in trials]


def of(part: str, value: str, **trial: Any) -> Any:
    """What was measured of the one trial that agrees with all that is given."""
    [result] = [r for r in short(part) if all(r[name] == wanted for name, wanted in trial.items())]
    return result[value]


@pytest.mark.parametrize("method", ["clicked rows", "ESMM", "ESCM2-IPS", "ESCM2-DR"])
def test_where_the_net_can_be_right_every_way_of_learning_conversions_is_right_over_the_whole_space(
    method: str,
) -> None:
    assert abs(of("selection", "bias", law="linear", method=method)) < 0.06
    assert of("selection", "deciles", law="linear", method=method) < 0.08


def test_where_it_cannot_propensities_take_away_the_bias_that_the_product_leaves() -> None:
    for method in ("clicked rows", "ESMM"):
        assert of("selection", "bias", law="sine", method=method) > 0.12
    for method in ("ESCM2-IPS", "ESCM2-DR"):
        assert abs(of("selection", "bias", law="sine", method=method)) < 0.09


def test_conversions_of_rows_that_clicks_share_are_ranked_better_than_alone() -> None:
    alone, shared, esmm = (
        of("selection", "everywhere", law="alike", method=m) for m in ("alone", "shared rows", "ESMM")
    )
    assert shared > alone + 0.01 and esmm > alone + 0.01


def test_esm2_recovers_the_steps_that_its_losses_name_and_the_conversions_composed_of_them() -> None:
    for step, most in {"y1": 0.03, "y2": 0.06, "buy@click": 0.08, "buy@all": 0.08}.items():
        assert of("funnel", f"tenths of {step}", method="ESM2") < most, step


def test_purchases_after_and_without_an_action_are_recovered_where_each_has_a_loss() -> None:
    for step in ("y3", "y4"):
        assert of("funnel", f"tenths of {step}", method="a loss each") < 0.12, step


def test_esm2_ranks_purchases_better_than_esmm_where_a_product_cannot_be_right() -> None:
    esm2, esmm = (of("funnel", "auc@click", method=method) for method in ("ESM2", "ESMM"))
    assert esm2 > esmm + 0.01


@pytest.mark.parametrize("law, method", [("added", "tower, never missing"), ("examined", "PAL")])
def test_with_a_tenth_of_the_lists_shuffled_the_learnt_position_curve_is_the_true_one(law: str, method: str) -> None:
    assert of("position", "slope", law=law, method=method) == pytest.approx(1, abs=0.1)
    assert of("position", "r", law=law, method=method) > 0.98


def test_rows_without_a_position_make_the_curve_flatter_and_the_items_odds_steeper() -> None:
    at_times, never = ({"law": "added", "method": method} for method in ("tower", "tower, never missing"))
    assert of("position", "slope", **at_times) < of("position", "slope", **never)
    assert of("position", "inflation", **at_times) > of("position", "inflation", **never)


@needs_pages
def test_on_real_result_pages_the_towers_curve_is_that_of_the_same_documents_at_several_places() -> None:
    found, same, all_rows = (
        torch.tensor(of("serps", value, method=method))
        for value, method in (
            ("curve", "tower, never missing"),
            ("curve", "same documents"),
            ("rates", "same documents"),
        )
    )
    assert serps.slope_of(found, same)[0] == pytest.approx(1, abs=0.2)  # the documents' own curve is known to ± .1
    assert (found - same).abs().max() < 0.7 * (all_rows - same).abs().max()


@needs_pages
def test_clicks_on_other_result_pages_are_explained_better_with_the_tower() -> None:
    with_tower, without = (of("serps", "loglik", method=m) for m in ("tower, never missing", "no position"))
    assert with_tower > without + 0.002


@pytest.mark.parametrize("part", ["selection", "funnel", "position", pytest.param("serps", marks=needs_pages)])
def test_of_one_seed_the_report_says_nothing_for_certain(part: str) -> None:
    report = PARTS[part].report(short(part))
    assert report.rows and all(row.verdict.startswith("open") for row in report.rows)
    assert "nan" not in report.text
