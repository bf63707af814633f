"""The bootstrap over users. Oracles: a twin that repeats rows as they are drawn, closed forms of variances."""

import math
from typing import Any

import numpy as np
import pytest

from trainer import bootstrap
from trainer.bootstrap import NUM_DRAWS, counts, deviation, differences, draws, errors, kept_rows
from trainer.metrics import Evaluation, auc, calibration


def rows(num_units: int, seed: int, alike: float = 0.0) -> tuple[Any, Any, Any]:
    """Scores of few values, labels drawn from them, and users of 1 to 9 rows whose rates differ."""
    rng = np.random.default_rng(seed)
    units = np.repeat(rng.permutation(10 * num_units)[:num_units] - 5, rng.integers(1, 10, num_units))
    scores = rng.integers(1, 20, len(units)).astype(np.float32) / 32
    rate = scores + alike * np.random.default_rng(seed + 1).normal(size=10 * num_units + 5)[units]
    return scores, (rng.random(len(units)) < rate).astype(np.int8), units


def test_a_draw_is_the_metric_of_rows_that_are_repeated_as_often_as_their_user_is_drawn() -> None:
    scores, labels, units = rows(40, seed=1)
    found = draws(scores, labels, units, 7, binary=True)
    distinct = np.unique(units)
    for draw, times in enumerate(counts(len(distinct), 7)):
        again = np.repeat(np.arange(len(units)), times[np.searchsorted(distinct, units)])
        assert found["auc"][draw] == pytest.approx(auc(scores[again], labels[again]), abs=1e-12)
        assert found["log_calibration"][draw] == pytest.approx(
            math.log(calibration(scores[again], labels[again])), abs=1e-9
        )
        assert found["mean_label"][draw] == pytest.approx(labels[again].mean(), abs=1e-12)


def test_a_draw_takes_as_many_units_as_there_are_each_as_likely() -> None:
    taken = np.array(list(counts(50, 3)))
    assert taken.shape == (NUM_DRAWS, 50) and (taken.sum(1) == 50).all()
    assert np.abs(taken.mean(0) - 1).max() < 5 / math.sqrt(NUM_DRAWS)  # each count has variance 1
    assert taken.var() == pytest.approx(1, abs=0.1)


def test_the_error_of_a_mean_is_that_of_its_closed_form_and_grows_where_rows_of_a_user_are_alike() -> None:
    found = {}
    for alike in (0.0, 0.3):
        scores, labels, units = rows(3_000, seed=2, alike=alike)
        mean, distinct = labels.mean(), np.unique(units, return_inverse=True)[1]
        sums, sizes = np.bincount(distinct, labels), np.bincount(distinct)
        closed = math.sqrt(((sums - mean * sizes) ** 2).sum()) / len(labels)  # a ratio of sums over users, linearised
        found[alike] = deviation(draws(scores, labels, units, 1, binary=True)["mean_label"])
        assert found[alike] == pytest.approx(closed, rel=0.25)  # a deviation of 100 draws is known to 7 %
    assert found[0.0] == pytest.approx(math.sqrt(0.31 * 0.69 / 15_000), rel=0.25)
    assert found[0.3] > 1.3 * found[0.0]


def test_the_error_of_an_auc_is_hanley_and_mcneils_where_each_row_is_somebody_else() -> None:
    rng = np.random.default_rng(5)
    labels = rng.random(4_000) < 0.2
    scores = (1 / (1 + np.exp(-rng.normal(size=4_000) - labels))).astype(np.float32)
    area, positives, negatives = auc(scores, labels), labels.sum(), (~labels).sum()
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    found = deviation(draws(scores, labels, np.arange(4_000), 1, binary=True)["auc"])
    assert found == pytest.approx(math.sqrt(variance / (positives * negatives)), rel=0.25)


def test_the_order_of_the_rows_and_the_names_of_the_users_change_nothing() -> None:
    scores, labels, units = rows(60, seed=3)
    order = np.random.default_rng(0).permutation(len(units))
    first = draws(scores, labels, units, 9, binary=True)
    for name, values in draws(scores[order], labels[order], units[order] * 3 + 1, 9, binary=True).items():
        assert (values == first[name]).all(), name  # to the last bit


def test_of_many_rows_whole_users_are_kept_and_the_errors_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels, units = rows(4_000, seed=4)
    whole = errors({"click@all": draws(scores, labels, units, 1, binary=True)})["click@all"]
    kept = kept_rows(units, 1, 5_000)
    assert 4_900 < len(kept) <= 5_000
    assert not set(units[kept]) & set(np.delete(units, kept))  # nobody is cut in two
    order = np.random.default_rng(0).permutation(len(units))
    assert set(units[order][kept_rows(units[order], 1, 5_000)]) == set(units[kept])
    assert set(units[kept_rows(units, 2, 5_000)]) != set(units[kept])
    monkeypatch.setattr(bootstrap, "MAX_ROWS", 5_000)
    part = errors({"click@all": draws(scores, labels, units, 1, binary=True)})["click@all"]
    for name, value in whole.items():
        assert value and part[name] == pytest.approx(value, rel=0.35), name  # two estimates of 7 %, of other users


def test_one_user_of_too_many_rows_is_kept_whole() -> None:
    assert len(kept_rows(np.zeros(50, np.int64), 1, 10)) == 50


def test_a_class_that_draws_miss_leaves_the_error_open() -> None:
    scores, labels = np.linspace(0.1, 0.9, 9, dtype=np.float32), np.zeros(9, np.int8)
    found = errors({"click@all": draws(scores, labels, np.arange(9), 1, binary=True)})["click@all"]
    assert found == {"calibration": None, "mean_label": 0.0, "auc": None}
    assert draws(scores[:0], labels[:0], np.arange(0), 1, binary=True) == {}


def evaluation(scores: Any, labels: Any, units: Any) -> Evaluation:
    made = Evaluation({"click@all": "binary"}, "equal")
    made.add("click@all", scores, labels, units=units)
    return made


def test_two_models_on_the_same_rows_are_told_apart_far_better_than_alone() -> None:
    rng = np.random.default_rng(6)
    users = np.repeat(np.arange(500), 8)
    logit = rng.normal(size=4_000)
    labels = (rng.random(4_000) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    good, worse = (
        (1 / (1 + np.exp(-logit - noise * rng.normal(size=4_000)))).astype(np.float32) for noise in (0.1, 0.3)
    )
    models = [evaluation(scores, labels, users) for scores in (worse, good)]
    metrics, drawn = [model.compute() for model in models], [model.draws(1) for model in models]
    found = differences(*metrics, *drawn)["click@all"]
    assert found["auc"] == auc(worse, labels) - auc(good, labels) < 0
    width, alone = found["high"] - found["low"], 2 * 1.96 * errors(drawn[0])["click@all"]["auc"]
    assert width < alone / 2 and found["high"] < 0
    same = differences(metrics[0], metrics[0], drawn[0], drawn[0])["click@all"]
    assert same == {"auc": 0.0, "low": 0.0, "high": 0.0}


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """The mean of 200 repetitions of a study with a known rate: 95 % of 200 is 190, with a deviation of 3."""
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        users = np.repeat(np.arange(60), 5)
        labels = (rng.random(300) < 0.4 + 0.2 * np.repeat(rng.choice([-1, 1], 60), 5)).astype(np.int8)
        error = deviation(draws(np.full(300, 0.5, np.float32), labels, users, seed, binary=False)["mean_label"])
        assert error is not None
        hits += abs(labels.mean() - 0.4) < 1.96 * error
    assert 178 <= hits <= 200
