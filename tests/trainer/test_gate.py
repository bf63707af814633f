"""The gate, on made-up reports. The oracle of each test is the rule, worked out by hand."""

from typing import Any

import pytest

from trainer.gate import Decision, GateConfig, Past, judge

ROWS = 10_000


def report(day: int = 20, **changed: Any) -> dict[str, Any]:
    """A day like all others; changed: values by their path, joined by two underscores (`metrics__click@all__auc`)."""
    found: dict[str, Any] = {
        "day": f"2026-11-{day:02d}",
        "rows": ROWS,
        "units": 1_000,
        "content": f"{day:016x}",
        "metrics": {
            "click@all": {"auc": 0.75, "calibration": 1.0, "mean_label": 0.2, "rows": ROWS},
            "watch@click": {"mse": 0.5, "calibration": 1.0, "mean_label": 3.0, "rows": 2_000},
        },
        "errors": {
            "click@all": {"auc": 0.005, "calibration": 0.02, "mean_label": 0.004},
            "watch@click": {"calibration": 0.01, "mean_label": 0.03},
        },
        "numbers": {"price": {"mean": 3.0, "deviation": 0.8}},
        "nulls": {"price": 200},
        "ids": {"item": {"new": 100, "seen": 1_000, "waiting_seen": 0}},
        "losses": {"click": 0.5, "watch": 0.4},
        "norms": {"dense": 0.1, "lag": 0.01, "rows": {"item": 0.2}},
        "gates": {"experts": {"least": 0.2, "dead_units": 0.1}},
    }
    for path, value in changed.items():
        *folders, name = path.split("__")
        place = found
        for folder in folders:
            place = place[folder]
        place[name] = value
    return found


def past(*days: int, state: str = "promoted", reason: str = "", **changed: Any) -> list[Past]:
    return [Past(report(day, **changed), state, reason) for day in days]


WEEK = past(*range(10, 18))


def decide(before: list[Past] = WEEK, settings: GateConfig | None = None, **changed: Any) -> Decision:
    return judge(report(20, **changed), before, settings or GateConfig())


def test_a_day_like_the_others_is_promoted_and_the_reason_says_how_many_it_was_compared_with() -> None:
    decision = decide()
    assert decision.state == "promoted" and decision.reason == "as good as the 8 promoted before it"
    assert decision.found == [] and len(decision.checks) == 13


@pytest.mark.parametrize(
    ("auc", "state"),
    [(0.9, "promoted"), (0.75, "promoted"), (0.5, "promoted"), (0.499, "held")],  # 0.75 - 0.25 is just good enough
)
def test_an_auc_may_fall_by_the_tolerance_and_not_by_more(auc: float, state: str) -> None:
    settings = GateConfig(tolerance=0.25, floor=None)
    assert decide(settings=settings, **{"metrics__click@all__auc": auc}).state == state


def test_the_first_model_is_promoted_unscored() -> None:
    found = judge(report(20, metrics={}, errors={}), [], GateConfig())
    assert (found.state, found.reason) == ("promoted", "the first model")
