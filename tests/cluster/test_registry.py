"""The gate. The oracle is the rule itself, worked by hand on numbers that are exact in binary."""

from typing import Any

import pytest

from cluster.registry import Decision, judge

METRICS: dict[str, dict[str, Any]] = {"click@all": {"auc": 0.75}, "buy@click": {"auc": 0.5, "ne": 0.9}}


def with_auc(**changed: float | None) -> dict[str, dict[str, Any]]:
    """METRICS with other AUCs: click for click@all, buy for buy@click."""
    address = {"click": "click@all", "buy": "buy@click"}
    return METRICS | {address[name]: {"auc": value} for name, value in changed.items()}


def test_the_first_model_is_promoted_whatever_it_is() -> None:
    assert judge({}, None, ("click@all",), 0.0) == Decision("promoted", "the first model")


@pytest.mark.parametrize(
    ("auc", "state"),
    [(0.8, "promoted"), (0.75, "promoted"), (0.5, "promoted"), (0.499, "held")],  # 0.75 - 0.25 is just good enough
)
def test_a_candidate_may_be_worse_by_the_tolerance_and_not_by_more(auc: float, state: str) -> None:
    assert judge(with_auc(click=auc), METRICS, ("click@all",), 0.25).state == state


def test_without_tolerance_equal_is_good_enough_and_less_is_not() -> None:
    assert judge(METRICS, METRICS, ("click@all", "buy@click"), 0.0).state == "promoted"
    assert judge(with_auc(click=0.7499), METRICS, ("click@all",), 0.0).state == "held"


def test_every_address_of_the_gate_counts_and_no_other() -> None:
    worse = with_auc(buy=0.25)
    assert judge(worse, METRICS, ("click@all", "buy@click"), 0.125).state == "held"
    assert judge(worse, METRICS, ("buy@click", "click@all"), 0.125).state == "held"
    assert judge(worse, METRICS, ("click@all",), 0.125).state == "promoted"


def test_the_reason_says_which_address_by_how_much() -> None:
    decision = judge(with_auc(buy=0.25), METRICS, ("click@all", "buy@click"), 0.125)
    assert decision.reason == "buy@click: AUC 0.2500 is below the champion's 0.5000 by more than 0.125"


@pytest.mark.parametrize("candidate", [with_auc(click=None), {"click@all": {}}, {}])
def test_an_undefined_auc_is_held_because_nobody_knows_what_it_is_worth(candidate: dict[str, Any]) -> None:
    assert judge(candidate, METRICS, ("click@all",), 0.5) == Decision("held", "click@all: AUC is undefined")


@pytest.mark.parametrize("champion", [{}, with_auc(click=None), {"click@all": {"ne": 0.9}}])
def test_a_champion_without_an_auc_stands_in_nobodys_way(champion: dict[str, Any]) -> None:
    # The first day's model is promoted unscored: there was no model before it to score that day with.
    assert judge(METRICS, champion, ("click@all",), 0.0).state == "promoted"
