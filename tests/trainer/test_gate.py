"""The gate, on made-up reports. The oracle of each test is the rule, worked out by hand on numbers that are exact."""

import datetime
import math
from typing import Any

import pytest

from trainer.gate import CHECKS, Decision, auc_error, calibration_error, judge, look_back
from trainer.sanity import new_share
from trainer.usual import GateConfig, Past, Usual, allowed, excess, median, usual

ROWS = 10_000
MONDAY = datetime.date(2026, 11, 2)


def report(day: int = 20, **changed: Any) -> dict[str, Any]:
    """A day like all others, so many days after a Monday; changed: values by their path, `metrics/click@all/auc`."""
    found: dict[str, Any] = {
        "day": str(MONDAY + datetime.timedelta(days=day)),
        "rows": ROWS,
        "units": 1_000,
        "content": f"{day:016x}",
        "metrics": {
            "click@all": {"auc": 0.75, "calibration": 1.0, "mean_label": 0.25, "rows": ROWS},
            "cart@click": {"auc": 0.6, "calibration": 1.0, "mean_label": 0.2, "rows": 2_500},
            "watch@click": {"mse": 0.5, "calibration": 1.0, "mean_label": 3.0, "rows": 2_500},
        },
        "errors": {
            "click@all": {"auc": 0.005, "calibration": 0.02, "mean_label": 0.004},
            "cart@click": {"auc": 0.01, "calibration": 0.05, "mean_label": 0.01},
            "watch@click": {"calibration": 0.01, "mean_label": 0.03},
        },
        "numbers": {"price": {"mean": 3.0, "deviation": 0.8}},
        "nulls": {"price": changed.get("rows", ROWS) // 50},
        "ids": {"item": {"new": 100, "seen": 1_000, "waiting_seen": 0}},
        "losses": {"click": 0.5, "cart": 0.3, "watch": 0.4},
        "norms": {"dense": 0.1, "lag": 0.01, "rows": {"item": 0.2}},
        "gates": {"level 1": {"least": 0.2, "dead_units": 0.1}},
    }
    for path, value in changed.items():
        *folders, name = path.split("/")
        place = found
        for folder in folders:
            place = place[folder]
        place[name] = value
    return found


def days(*numbers: int, state: str = "promoted", reason: str = "", **changed: Any) -> list[Past]:
    return [Past(report(day, **changed), state, reason) for day in numbers]


WEEK = days(*range(10, 20))


def decide(before: list[Past] = WEEK, settings: GateConfig | None = None, day: int = 20, **changed: Any) -> Decision:
    return judge(report(day, **changed), before, settings or GateConfig())


# What is usual.


def test_what_is_usual_lies_between_the_median_and_the_newest() -> None:
    assert usual([1.0, 2.0, 3.0, 4.0, 9.0], 3) == Usual(3.0, 9.0, 1.4826)  # deviations 2, 1, 0, 1, 6: median 1
    assert usual([5.0, None, 4.0, 1.0], 3) == Usual(1.0, 4.0, 1.4826)  # of those who know
    assert usual([5.0, None], 2) is None and usual([], 0) is None


@pytest.mark.parametrize(("value", "beyond"), [(2.0, 0.0), (1.0, 0.0), (3.0, 0.0), (3.5, 0.5), (0.25, -0.75)])
def test_excess_is_the_way_out_of_what_is_usual(value: float, beyond: float) -> None:
    assert excess(value, Usual(1.0, 3.0, 0.0)) == beyond


def test_chance_counts_only_where_it_is_more_than_the_tolerance() -> None:
    assert allowed(1.0, 2.0, 0.3, 0.4) == 1.0  # 2 * 0.5 is no more
    assert allowed(1.0, 4.0, 0.3, 0.4) == 2.0
    assert median([3, 1, 2]) == 2 and median([4, 1, 3, 2]) == 2.5


# Good days, and few of them.


def test_a_day_like_the_others_is_promoted_and_the_reason_says_with_how_many_it_was_compared() -> None:
    decision = decide()
    assert (decision.state, decision.reason) == ("promoted", "as good as the 10 promoted before it")
    assert decision.found == [] and [name for name, _ in decision.checks] == list(CHECKS)


def test_the_first_model_is_promoted_unscored() -> None:
    decision = judge(report(metrics={}, errors={}), [], GateConfig())
    assert (decision.state, decision.reason) == ("promoted", "the first model")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_with_few_days_before_it_nothing_is_compared_and_the_reason_says_so(count: int) -> None:
    decision = decide(days(*range(count)), **{"metrics/click@all/auc": 0.55, "rows": 200, "nulls/price": 150})
    assert decision.state == "promoted" and "not compared" in decision.reason
    assert (f"only {count} before it, of 3" in decision.reason) == (count > 0)
    assert decide(days(0, 1, 2), **{"metrics/click@all/auc": 0.55}).state == "held"


def test_a_trickle_of_rows_before_a_launch_does_not_tell_what_is_usual() -> None:
    trickle = days(*range(10, 16), rows=60, **{"metrics/click@all/mean_label": 0.9})
    assert "not compared" in decide(trickle).reason
    assert decide(trickle, GateConfig(least_rows=50)).found == ["rows", "labels"]


def test_held_days_do_not_tell_what_is_usual() -> None:
    bad = days(*range(13, 20), state="held", reason="nulls: price", **{"nulls/price": ROWS})
    assert decide([*WEEK[:3], *bad]).state == "promoted"
    assert decide([*WEEK[:3], *bad], **{"nulls/price": ROWS}).found == ["nulls"]


def test_a_day_that_a_person_promoted_is_usual_from_then_on_and_so_is_what_was_before() -> None:
    forced = days(19, **{"nulls/price": ROWS})
    assert decide([*WEEK[:9], *forced], **{"nulls/price": ROWS}).state == "promoted"
    assert decide([*WEEK[:9], *forced]).state == "promoted"


def test_of_the_third_day_that_is_held_for_the_same_reason_on_the_reason_says_what_a_person_can_do() -> None:
    same = days(17, 18, state="held", reason="nulls: price is null in 90% of the rows; rows: 1")
    decision = decide([*WEEK[:7], *same], **{"nulls/price": ROWS})
    assert decision.reason.endswith(
        "(nulls: 3 times in a row; if that is how it is now, promote --force --day 2026-11-22)"
    )
    other = days(18, state="held", reason="auc: click@all is undefined")
    assert "times in a row" not in decide([*WEEK[:7], same[0], *other], **{"nulls/price": ROWS}).reason


def test_hours_are_compared_with_the_same_hour_of_other_days() -> None:
    night = days(*range(8), rows=500)
    noon = days(*range(8))
    for earlier in night:
        earlier.report["day"] += "T03"
    for earlier in noon:
        earlier.report["day"] += "T12"
    both = [each for pair in zip(night, noon, strict=True) for each in pair]
    quiet = report(8, rows=500)
    assert judge(quiet | {"day": quiet["day"] + "T03"}, both, GateConfig()).reason.startswith("as good as the 8")
    assert judge(quiet | {"day": quiet["day"] + "T12"}, both, GateConfig()).found == ["rows"]
    assert "none of its hour" in judge(quiet | {"day": quiet["day"] + "T05"}, both, GateConfig()).reason


def looked_back(earlier: list[Past], day: str, trailing: int) -> tuple[list[str], int]:
    """The names of the intervals that look_back gives, and how many it read."""
    by_name, read = {each.report["day"]: each for each in reversed(earlier)}, []

    def one(name: str) -> Past:
        read.append(name)
        return by_name[name]

    found = look_back(by_name, one, day, GateConfig(trailing=trailing))
    return [each.report["day"] for each in found], len(read)


def test_no_more_of_the_past_is_read_than_is_needed() -> None:
    earlier = [*days(*range(10)), *days(10, 11, state="held"), *days(*range(12, 20))]
    names = [each.report["day"] for each in earlier]
    assert looked_back(earlier, "2026-11-22", 10) == (names[8:], 12)
    assert looked_back(earlier, "2026-11-22", 100) == (names, 20)


def test_of_hours_the_newest_and_those_of_the_same_hour_are_read() -> None:
    earlier = [
        Past(report() | {"day": f"2026-11-{day:02d}T{hour:02d}"}, "promoted")
        for day in (1, 2, 3, 4)
        for hour in range(24)
    ]
    found, reads = looked_back(earlier, "2026-11-05T03", 3)
    assert found == [f"2026-11-{day}" for day in ("02T03", "03T03", "04T03", "04T21", "04T22", "04T23")] and reads == 6


def test_the_reason_begins_with_the_cause_and_counts_what_it_leaves_out() -> None:
    decision = decide(
        rows=100, **{"nulls/price": 100, "losses/click": 9.0, "metrics/click@all/auc": 0.2, "norms/dense": 9}
    )
    assert decision.found == ["rows", "nulls", "auc", "norms", "loss"]
    assert decision.reason.startswith("rows: 100 rows, 0.01 times the usual 10,000; nulls: price is null in 100%")
    assert decision.reason.endswith("; and 2 more")


# How good the model is.


@pytest.mark.parametrize(
    ("auc", "state"),
    [(0.9, "promoted"), (0.75, "promoted"), (0.5, "promoted"), (0.499, "held")],  # 0.75 - 0.25 is just good enough
)
def test_an_auc_may_fall_by_the_tolerance_and_not_by_more(auc: float, state: str) -> None:
    settings = GateConfig(tolerance=0.25, floor=None)
    assert decide(settings=settings, **{"metrics/click@all/auc": auc}).state == state


@pytest.mark.parametrize(("auc", "state"), [(0.64, "promoted"), (0.62, "held")])
def test_an_auc_of_few_events_may_fall_by_chance(auc: float, state: str) -> None:
    unsure = {"errors/click@all/auc": 0.03}  # 4 of them: 0.12
    assert decide(**{"metrics/click@all/auc": auc}, **unsure).state == state


def test_an_auc_of_days_that_differ_may_fall_as_they_do() -> None:
    aucs = [0.70, 0.74, 0.72, 0.76, 0.73, 0.75, 0.71]  # their median is 0.73, and half of them are within 0.02 of it
    before = [Past(report(day, **{"metrics/click@all/auc": auc}), "promoted") for day, auc in enumerate(aucs)]
    error = {"errors/click@all/auc": 0.04}
    deviation = math.hypot(0.02 * 1.4826, 0.04)
    assert decide(before, **{"metrics/click@all/auc": 0.71 - 3.99 * deviation}, **error).state == "promoted"
    assert decide(before, **{"metrics/click@all/auc": 0.71 - 4.01 * deviation}, **error).state == "held"


def test_the_auc_of_every_address_is_compared_and_must_be_defined_where_it_is_asked_for() -> None:
    assert decide(**{"metrics/cart@click/auc": 0.4}).reason.startswith("auc: cart@click is 0.4000 ± 0.0144")
    undefined = {"metrics/cart@click/auc": None}
    assert decide(**undefined).state == "promoted"  # the first event alone is asked for
    decision = decide(settings=GateConfig(addresses=("cart@click",)), **undefined)
    assert decision.reason == "auc: cart@click is undefined: 500 of its 2500 labels are 1"
    assert decide(**{"metrics/click@all/auc": None}).found == ["auc"]


def test_below_the_floor_is_held_when_it_is_sure_and_not_as_always() -> None:
    low = {"metrics/click@all/auc": 0.45, "errors/click@all/auc": 0.01}
    assert decide([], **low).reason.startswith("auc: click@all is 0.4500 ± 0.0100, below the floor of 0.5")
    assert decide([], **low | {"errors/click@all/auc": 0.02}).state == "promoted"
    assert decide(days(*range(5), **low), **low).state == "promoted"


def test_the_error_of_an_auc_is_no_less_than_that_of_scores_that_know_nothing() -> None:
    few = report(**{"metrics/click@all/rows": 8, "metrics/click@all/mean_label": 0.5, "errors/click@all/auc": 0.0})
    assert auc_error(few, "click@all") == math.sqrt(9 / (12 * 4 * 4))  # Mann and Whitney's variance, over (4 * 4)^2
    assert auc_error(report(**{"errors/click@all/auc": 0.02}), "click@all") == 0.02
    assert decide([], **{"metrics/click@all": few["metrics"]["click@all"] | {"auc": 0.0}}).state == "promoted"


@pytest.mark.parametrize(
    ("high", "state"), [(0.01, "promoted"), (-0.005, "promoted"), (-0.0051, "held"), (None, "promoted")]
)
def test_a_model_that_is_surely_worse_than_the_champion_on_the_same_rows_is_held(
    high: float | None, state: str
) -> None:
    difference = {"auc": -0.02, "low": -0.03, "high": high}
    decision = decide(rival={"day": "2026-11-18", "metrics": {}, "differences": {"click@all": difference}})
    assert decision.state == state
    if state == "held":
        words = "the AUC of click@all on today's rows is 0.0200 below that of the champion of 2026-11-18"
        assert decision.reason == f"champion: {words} (95%: 0.0051 to 0.0300)"


@pytest.mark.parametrize(
    ("usually", "value", "state"),
    [
        (1.0, 1.49, "promoted"),
        (1.0, 1.51, "held"),
        (1.0, 0.66, "held"),
        (2.0, 2.9, "promoted"),  # labels are missing from this address on every day
        (2.0, 3.1, "held"),
        (2.0, 0.7, "promoted"),  # nearer to 1 is never worse
    ],
)
def test_a_calibration_may_leave_what_is_usual_by_a_factor(usually: float, value: float, state: str) -> None:
    before = days(*range(5), **{"metrics/click@all/calibration": usually})
    assert decide(before, **{"metrics/click@all/calibration": value}).state == state


def test_fixed_bounds_of_a_calibration_hold_whatever_is_usual() -> None:
    settings = GateConfig(calibration_bounds={"click@all": (0.8, 1.25)})
    high = {"metrics/click@all/calibration": 1.4}
    assert (
        decide(days(*range(5), **high), settings, **high).reason
        == "calibration: click@all is 1.400, outside 0.8 to 1.25"
    )
    assert (
        decide(days(*range(5), **high), settings, **high, **{"errors/click@all/calibration": 0.04}).state == "promoted"
    )


def test_a_calibration_is_no_surer_than_its_events_are_many() -> None:
    few = {"metrics/click@all/rows": 400, "metrics/click@all/mean_label": 0.01, "errors/click@all/calibration": 0.0}
    assert calibration_error(report(**few), "click@all") == 0.5  # four of them
    assert (
        calibration_error(report(**few, **{"metrics/click@all/calibration": 0.25}), "click@all") == 1.0
    )  # one expected
    assert calibration_error(report(), "watch@click") == 0.01


# Is the day as days are?


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_report_with_a_number_that_is_none_is_held(number: float) -> None:
    assert decide(**{"norms/rows/item": number}).reason.startswith(f"nan: norms.rows.item is {number}")


def test_the_rows_of_an_earlier_day_are_known_again_also_of_one_that_was_held() -> None:
    assert decide(content=f"{12:016x}").reason == "delivery: the 10,000 rows are those of 2026-11-14, delivered again"
    held = days(9, state="held")
    assert decide([*held, *WEEK], content=f"{9:016x}").found == ["delivery"]
    assert decide(content=f"{12:016x}", settings=GateConfig(repeated=False)).state == "promoted"
    assert (
        decide(days(1, 2, rows=5), rows=5, content=f"{1:016x}").state == "promoted"
    )  # a handful may be equal by chance


@pytest.mark.parametrize(
    ("rows", "state"), [(15_900, "promoted"), (16_100, "held"), (6_300, "promoted"), (6_200, "held"), (5_000, "held")]
)
def test_rows_may_differ_by_a_factor_either_way(rows: int, state: str) -> None:
    assert decide(rows=rows).state == state


def test_while_no_whole_week_is_known_rows_may_differ_by_its_square() -> None:
    assert decide(days(*range(6)), day=6, rows=4_000).state == "promoted"
    assert decide(days(*range(6)), day=6, rows=3_900).found == ["rows"]


def test_a_weekend_that_came_twice_is_usual_and_a_workday_like_it_is_not() -> None:
    weeks = []
    for day in range(26):  # the first two weekends are held, for their rows alone
        weekend = day % 7 > 4
        decision = judge(report(day, rows=1_000 if weekend else ROWS), weeks, GateConfig())
        weeks.append(Past(report(day, rows=1_000 if weekend else ROWS), decision.state, decision.reason))
    assert [day for day, earlier in enumerate(weeks) if earlier.state == "held"] == [5, 6, 12, 13]
    assert decide(weeks, day=26, rows=1_000).state == "promoted"  # a Saturday
    assert decide(weeks, day=28, rows=1_000).found == ["rows"]  # a Monday
    assert decide(weeks, day=26, rows=100).found == ["rows"]


def test_rows_of_tiny_days_differ_by_chance() -> None:
    tiny, settings = days(*range(8), rows=20), GateConfig(least_rows=1)
    assert decide(tiny, settings, rows=10).state == "promoted"  # 4 deviations of log(10 / 20): 4 * 0.39
    assert decide(days(*range(8), rows=2_000), settings, rows=1_000).found == ["rows"]


@pytest.mark.parametrize(("nulls", "state"), [(1_100, "promoted"), (1_300, "held"), (0, "promoted")])
def test_the_share_of_nulls_may_rise_by_the_tolerance(nulls: int, state: str) -> None:
    assert decide(**{"nulls/price": nulls}).state == state  # usually 200: 2 %; 10 % more is allowed


def test_a_column_that_was_never_null_or_no_longer_is_counts_too() -> None:
    assert decide(**{"nulls/item": 5_000}).reason == "nulls: item is null in 50% of the rows (usually 0%)"
    often = days(*range(10, 18), **{"nulls/price": 5_000})
    assert decide(often, nulls={}).reason == "nulls: price is null in 0% of the rows (usually 50%)"


def test_nulls_of_few_users_rise_by_chance() -> None:
    few = {"units": 16, "nulls/price": 5_000}  # half of 16 users: a deviation of 1/8
    assert decide(days(*range(8), **few), units=16, **{"nulls/price": 9_900}).state == "promoted"
    many = days(*range(8), **{"nulls/price": 5_000})
    assert decide(many, **{"nulls/price": 9_900}).found == ["nulls"]


@pytest.mark.parametrize(
    ("mean", "deviation", "state"),
    [(3.79, 0.8, "promoted"), (3.81, 0.8, "held"), (2.1, 0.8, "held"), (3.0, 7.9, "promoted"), (3.0, 8.1, "held")],
)
def test_a_number_may_move_by_a_deviation_and_spread_ten_times(mean: float, deviation: float, state: str) -> None:
    decision = decide(**{"numbers/price": {"mean": mean, "deviation": deviation}})
    assert decision.state == state and decision.found == (["values"] if state == "held" else [])


def test_a_number_without_a_value_is_left_to_the_nulls() -> None:
    nothing = {"numbers/price": {"mean": None, "deviation": None}, "nulls/price": ROWS}
    assert decide(**nothing).found == ["nulls"]


@pytest.mark.parametrize(("new", "state"), [(290, "promoted"), (310, "held"), (0, "promoted")])
def test_more_ids_than_usual_may_be_new_by_the_tolerance(new: int, state: str) -> None:
    assert decide(**{"ids/item/new": new}).state == state  # usually 10 %; 20 % more is allowed


def test_ids_that_wait_for_their_row_are_new_too_and_a_table_of_a_few_ids_is_left_to_chance() -> None:
    assert new_share(report(**{"ids/item": {"new": 10, "seen": 60, "waiting_seen": 40}}), "item") == (0.5, 100)
    assert new_share(report(**{"ids/item": {"new": 0, "seen": 0, "waiting_seen": 0}}), "item") == (None, 0)
    assert decide(**{"ids/item": {"new": 1, "seen": 3, "waiting_seen": 0}}).state == "promoted"
    assert decide(**{"ids/item": {"new": 60, "seen": 100, "waiting_seen": 300}}).found == ["ids"]


@pytest.mark.parametrize(
    ("mean", "state"), [(0.39, "promoted"), (0.41, "held"), (0.17, "promoted"), (0.15, "held"), (0.0, "held")]
)
def test_a_rate_of_labels_may_differ_by_a_factor_either_way(mean: float, state: str) -> None:
    assert decide(**{"metrics/click@all/mean_label": mean}).state == state


@pytest.mark.parametrize(("rows", "state"), [(12, "promoted"), (400, "held")])
def test_no_event_at_all_is_held_where_that_is_no_chance(rows: int, state: str) -> None:
    """Of 12 rows 3 clicks are usual, which none are in one day of twenty; of 400 a hundred."""
    few = {"metrics/click@all/rows": rows, "metrics/click@all/mean_label": 0.0, "metrics/click@all/calibration": None}
    assert ("labels" in decide(**few).found) == (state == "held")


def test_rows_of_a_user_are_alike_and_so_a_rate_is_less_sure() -> None:
    """The mean label's error says that a row is worth a sixteenth: 400 rows are 25, of which a quarter are clicks."""
    alike = {"metrics/click@all/rows": 400, "errors/click@all/mean_label": math.sqrt(16 * 0.25 / 400)}
    rare = {"metrics/click@all/mean_label": 0.04}
    assert decide(days(*range(8), **alike), **alike, **rare).found == []
    assert decide(days(*range(8), **{"metrics/click@all/rows": 400}), **alike, **rare).found == ["labels"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("norms/dense", 0.16, "the norm of the dense weights is 0.16, 1.6 times the usual 0.1"),
        ("norms/rows/item", 0.5, "the norm of the rows of table item is 0.5, 2.5 times the usual 0.2"),
        ("norms/lag", 0.025, "the dense weights moved by 0.025, 2.5 times the usual 0.01"),
    ],
)
def test_norms_may_grow_by_a_factor(path: str, value: float, words: str) -> None:
    assert decide(**{path: value}).reason == f"norms: {words}"
    assert decide(**{path: value * 0.55}).state == "promoted"


def test_young_weights_grow_fast() -> None:
    grown = [Past(report(day, **{"norms/rows/item": 0.1 * 2**day}), "promoted") for day in range(4)]
    assert decide(grown, day=4, **{"norms/rows/item": 3.1}).state == "promoted"  # 0.8 on the day before, doubled each
    assert decide(grown, day=4, **{"norms/rows/item": 3.3}).found == ["norms"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("gates/level 1/least", 0.001, "an expert of level 1 has a share of 0.10% (usually at least 20.0%)"),
        ("gates/level 1/dead_units", 0.4, "40% of the experts' units of level 1 never answered (usually 10%)"),
    ],
)
def test_an_expert_that_nobody_uses_and_units_that_die_are_seen(path: str, value: float, words: str) -> None:
    assert decide(**{path: value}).reason == f"experts: {words}"
    always = days(*range(5), **{path: value})
    assert decide(always, **{path: value}).state == "promoted"  # a body that always was so


def test_a_loss_may_rise_by_a_factor_and_is_told_at_the_rate_of_its_label() -> None:
    assert decide(**{"losses/click": 0.62}).state == "promoted"
    assert decide(**{"losses/click": 0.63}).reason == "loss: click in training is 1.26 times the usual: 0.63"
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.25, 0.35)]
    more = {"metrics/click@all/mean_label": 0.35, "losses/click": 0.62 * entropy[1] / entropy[0]}
    assert more["losses/click"] > 0.63 and decide(**more).state == "promoted"
    assert decide(**{"losses/watch": 0.51}).found == ["loss"]  # a regression's as it is


@pytest.mark.parametrize(
    ("setting", "changed"),
    [
        ("rows", {"rows": 10}),
        ("nulls", {"nulls/price": ROWS}),
        ("values", {"numbers/price": {"mean": 3_000.0, "deviation": 800.0}}),
        ("new_ids", {"ids/item/new": 1_000}),
        ("labels", {"metrics/click@all/mean_label": 0.45}),
        ("tolerance", {"metrics/click@all/auc": 0.6}),
        ("floor", {"metrics/click@all/auc": 0.2}),
        ("calibration", {"metrics/click@all/calibration": 9.0}),
        ("paired_tolerance", {"rival": {"day": "", "differences": {"click@all": {"auc": -1, "low": -1, "high": -1}}}}),
        ("dense_norm", {"norms/dense": 9.0, "norms/lag": 9.0}),
        ("row_norm", {"norms/rows/item": 9.0}),
        ("dead_units", {"gates/level 1/dead_units": 1.0}),
        ("loss", {"losses/click": 9.0}),
    ],
)
def test_a_tolerance_of_null_turns_a_check_off(setting: str, changed: dict[str, Any]) -> None:
    off: dict[str, Any] = {setting: None}
    if setting == "floor":
        off["tolerance"] = None
    assert decide(**changed).state == "held"
    assert decide(settings=GateConfig(**off), **changed).state == "promoted"
