"""Proof tests of trainer/metrics.py: scikit-learn, plain loops, invariants, the same bits for any split of the rows."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.metrics import log_loss, mean_absolute_error, mean_squared_error, ndcg_score, roc_auc_score

from trainer.metrics import (
    GAUC_WEIGHTINGS,
    Evaluation,
    auc,
    calibration,
    gauc,
    logloss,
    mae,
    mse,
    ndcg,
    normalized_entropy,
    xauc,
)

ADDRESSES = {
    "click@all": "binary",
    "has_next@click": "binary",
    "dwell@click": "regression",
    "interest@all": "ranking",
}
COUNTS = {"rows", "lists", "gauc_groups"}
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def tied_rows(num_rows: int, seed: int, num_scores: int = 20, num_groups: int = 12) -> Rows:
    """Scores on a coarse grid, so that most pairs are tied; labels that follow them; signed 64-bit group ids."""
    rng = np.random.default_rng(seed)
    scores = (rng.integers(1, num_scores, num_rows) / num_scores).astype(np.float32)
    labels = (rng.random(num_rows) < scores).astype(np.int8)
    ids = rng.integers(-(2**63), 2**63 - 1, num_groups)
    return scores, labels, ids[rng.integers(0, num_groups, num_rows)]


def graded_rows(num_rows: int, seed: int, num_scores: int = 20, num_groups: int = 12) -> Rows:
    """As `tied_rows`, but scores of any sign and grades 0, 1 (a click) and 3 (a purchase); some lists have only 0."""
    scores, clicks, groups = tied_rows(num_rows, seed, num_scores, num_groups)
    bought = np.random.default_rng(seed + 1_000).random(num_rows) < 0.3
    grades = (clicks * np.where(bought, 3, 1)).astype(np.float32)
    grades[np.isin(groups, np.unique(groups)[1::5])] = 0
    return 9 * scores - 4, grades, groups


def pair_loop_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The definition: every (positive, negative) pair, 1 when in order and one half when tied."""
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def pair_table_xauc(predictions: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """The definition: every pair of a group with the first label greater, 1 when in order and one half when tied."""
    counts = (labels[:, None] > labels) & (groups[:, None] == groups)
    hits = (predictions[:, None] > predictions) + 0.5 * (predictions[:, None] == predictions)
    return hits[counts].sum() / counts.sum()


def list_loop_ndcg(rows: Rows, depth: int) -> list[float]:
    """scikit-learn's NDCG, ties averaged, of each list with a positive grade."""
    scores, labels, groups = rows
    lists = [(labels[groups == group], scores[groups == group]) for group in np.unique(groups)]
    return [ndcg_score([2.0**grades - 1], [mine], k=depth) for grades, mine in lists if grades.any()]


def group_loop_gauc(rows: Rows, weighting: str) -> tuple[float, int, float]:
    scores, labels, groups = rows
    kept, total = [], 0
    for group in np.unique(groups):
        mine = labels[groups == group]
        weight = {"impressions": len(mine), "positives": int(mine.sum()), "equal": 1}[weighting]
        total += weight
        if 0 < mine.sum() < len(mine):
            kept.append((weight, pair_loop_auc(scores[groups == group], mine)))
    kept_weight = sum(weight for weight, _ in kept)
    return sum(weight * value for weight, value in kept) / kept_weight, len(kept), kept_weight / total


@pytest.mark.parametrize("seed", range(3))
def test_binary_metrics_equal_sklearn_on_heavily_tied_scores(seed: int) -> None:
    scores, labels, _ = tied_rows(5_000, seed)
    # scikit-learn in float64; it adds in another order, so the last digits may differ
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert logloss(scores, labels) == pytest.approx(log_loss(labels, scores.astype(np.float64)), rel=1e-12)


def test_regression_metrics_equal_sklearn() -> None:
    rng = np.random.default_rng(0)
    predictions, labels = rng.normal(3, 2, (2, 5_000)).astype(np.float32).astype(np.float64)
    # float64 on both sides: only the order of additions differs
    assert mse(predictions, labels) == pytest.approx(mean_squared_error(labels, predictions), rel=1e-12)
    assert mae(predictions, labels) == pytest.approx(mean_absolute_error(labels, predictions), rel=1e-12)


@pytest.mark.parametrize("num_scores", [2, 3, 10, 1_000_000])
def test_auc_is_the_share_of_ordered_pairs_with_ties_as_one_half(num_scores: int) -> None:
    for seed in range(5):
        scores, labels, _ = tied_rows(60, seed, num_scores)
        labels[:2] = [0, 1]
        # plain pair loop; halves add exactly and both divide once, so the values are equal
        assert auc(scores, labels) == pair_loop_auc(scores, labels)


def test_auc_orders_negative_zero_and_infinite_scores_as_numbers() -> None:
    scores = np.array([-np.inf, -2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0, np.inf], np.float32)
    labels = np.array([0, 1, 0, 1, 0, 0, 1, 1])
    assert auc(scores, labels) == pair_loop_auc(scores, labels)  # plain pair loop on Python comparisons


@pytest.mark.parametrize("transform", [np.log, np.exp, lambda s: 7 * s - 3, lambda s: -1 / s, lambda s: s**3])
def test_metrics_of_order_are_invariant_to_increasing_maps(transform: np.ufunc) -> None:
    scores, labels, groups = tied_rows(2_000, seed=1)
    mapped = transform(scores)
    # a law of rank statistics; the grid keeps distinct scores distinct in float32, so the values are equal
    assert auc(mapped, labels) == auc(scores, labels)
    assert gauc(mapped, labels, groups, "equal") == gauc(scores, labels, groups, "equal")
    assert xauc(mapped, labels, groups) == xauc(scores, labels, groups)
    assert ndcg(mapped, labels, groups, 10) == ndcg(scores, labels, groups, 10)


@pytest.mark.parametrize("weighting", GAUC_WEIGHTINGS)
@pytest.mark.parametrize("num_groups", [1, 8, 150])
def test_gauc_equals_a_plain_loop_over_groups(weighting: str, num_groups: int) -> None:
    for seed in range(3):
        rows = tied_rows(300, seed, num_groups=num_groups)
        value, num_kept, share = gauc(*rows, weighting)
        expected = group_loop_gauc(rows, weighting)
        assert num_kept == expected[1]
        # plain loop; at most 150 float64 additions in another order
        assert (value, share) == pytest.approx((expected[0], expected[2]), rel=1e-13)


def test_the_three_gauc_weightings_are_three_different_numbers() -> None:
    scores = np.array([0.9, 0.1, 0.2, 0.3, 0.8, 0.7, 0.6], np.float32)
    labels = np.array([1, 0, 0, 0, 0, 1, 1])
    groups = np.array([5, 5, 5, 5, -3, -3, -3])
    values = {weighting: gauc(scores, labels, groups, weighting)[0] for weighting in GAUC_WEIGHTINGS}
    # by hand: AUC 1 with 4 rows and 1 positive, AUC 0 with 3 rows and 2 positives
    assert values == {"impressions": 4 / 7, "positives": 1 / 3, "equal": 1 / 2}


def test_gauc_of_one_group_is_the_auc() -> None:
    scores, labels, _ = tied_rows(1_000, seed=2)
    for weighting in GAUC_WEIGHTINGS:
        value, num_groups, share = gauc(scores, labels, np.full(1_000, -7), weighting)
        assert (num_groups, share) == (1, 1.0)
        assert value == pytest.approx(auc(scores, labels), rel=1e-15)  # identity, but for weight * auc / weight


def test_a_constant_predictor_scores_one_half() -> None:
    _, labels, groups = tied_rows(1_000, seed=3)
    for order in (np.argsort(labels), np.argsort(-labels)):  # positives last, positives first: ties have no order
        constant = np.full(1_000, 0.3, np.float32)
        assert auc(constant, labels[order]) == 0.5  # definition of a tie
        assert [gauc(constant, labels[order], groups, w)[0] for w in GAUC_WEIGHTINGS] == [0.5] * 3
        assert xauc(constant, labels[order]) == xauc(constant, labels[order], groups) == 0.5


@pytest.mark.parametrize("num_scores", [2, 10, 1_000_000])
@pytest.mark.parametrize("num_groups", [1, 7, 200])
def test_xauc_is_the_share_of_ordered_pairs_with_ties_as_one_half(num_scores: int, num_groups: int) -> None:
    for seed in range(3):
        scores, grades, groups = graded_rows(300, seed, num_scores, num_groups)
        real = np.random.default_rng(seed).normal(0, 5, 300).astype(np.float32)  # all different, of both signs
        for labels in (grades + 1, real, real.round()):
            # the table of all pairs; halves add exactly and both divide once, so the values are equal
            assert xauc(scores, labels, groups) == pair_table_xauc(scores, labels, groups)
            assert xauc(scores, labels) == pair_table_xauc(scores, labels, np.zeros(300))


def test_xauc_of_many_rows_is_kendalls_tau_on_another_scale() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(50_000).astype(np.float32)
    predictions = rng.permutation(labels + rng.normal(0, 5, 50_000).round() * 50_000).astype(np.float32)
    predictions[:20_000] = labels[:20_000] + 0.5
    tied = np.square(np.unique(predictions, return_counts=True)[1]).sum() - 50_000  # ordered pairs
    # without ties of labels, tau-b is (right - wrong) / sqrt(pairs * pairs not tied); SciPy rounds in float64
    tau = kendalltau(predictions, labels).statistic * np.sqrt(1 - tied / (50_000 * 49_999))
    assert xauc(predictions, labels) == pytest.approx((1 + tau) / 2, rel=1e-12)


def test_xauc_of_events_is_the_auc() -> None:
    for seed in range(5):
        scores, labels, _ = tied_rows(2_000, seed)
        assert xauc(scores, labels) == auc(scores, labels)  # identity; both are one division of the same integers


@pytest.mark.parametrize("depth", [1, 3, 10, 1_000])
def test_ndcg_is_the_mean_of_sklearns_over_the_lists_with_a_positive_label(depth: int) -> None:
    for num_scores in (2, 20, 1_000_000):
        rows = graded_rows(1_500, depth, num_scores, num_groups=100)
        expected = list_loop_ndcg(rows, depth)
        value, num_lists = ndcg(*rows, depth)
        assert num_lists == len(expected) < 100
        # float64 on both sides: only the order of additions differs
        assert value == pytest.approx(np.mean(expected), rel=1e-12)


def test_ndcg_of_ties_is_the_mean_over_all_their_orders() -> None:
    labels, depth = np.array([0.0, 3.0, 1.0, 0.5, 0.0, 1.0]), 3
    one_list = np.zeros(6, np.int64)
    orders = [ndcg(np.array(order, np.float32), labels, one_list, depth)[0] for order in permutations(range(6))]
    # oracle: all 720 orders without a tie, in which 0.1 is the mean of 6 ranks; float64 additions
    assert ndcg(np.full(6, 0.1, np.float32), labels, one_list, depth)[0] == pytest.approx(np.mean(orders), rel=1e-12)
    assert max(orders) == pytest.approx(1.0, rel=1e-15)  # the order of the labels is ideal, by definition


def test_ndcg_by_hand() -> None:
    scores = np.array([3.0, 2.0, 1.0, 5.0, 4.0], np.float32)
    labels, groups = np.array([0, 2, 1, 0, 0]), np.array([8, 8, 8, -1, -1])
    # gains 0, 3, 1 at ranks 1, 2, 3; ideally 3, 1, 0; list -1 has no positive; two roundings
    expected = (3 / np.log2(3) + 1 / 2) / (3 + 1 / np.log2(3))
    assert ndcg(scores, labels, groups, 10) == (pytest.approx(expected, rel=1e-15), 1)


def test_metrics_are_nan_where_they_are_undefined() -> None:
    scores, ones, zeros = np.array([0.2, 0.7], np.float32), np.ones(2), np.zeros(2)
    nothing = np.empty(0, np.float32)
    # definitions: no pair without both classes, no ratio to 0, no mean of nothing
    for undefined in [
        *(auc(scores, ones), auc(scores, zeros), auc(nothing, nothing)),
        *(normalized_entropy(scores, ones), normalized_entropy(scores, zeros), normalized_entropy(nothing, nothing)),
        *(calibration(scores, zeros), logloss(nothing, nothing), mse(nothing, nothing), mae(nothing, nothing)),
        *(xauc(scores, ones), xauc(nothing, nothing), xauc(scores, np.array([0, 1]), np.array([1, 2]))),
    ]:
        assert np.isnan(undefined)
    value, num_groups, share = gauc(scores, np.array([0, 1]), np.array([1, 2]), "equal")
    assert np.isnan(value) and (num_groups, share) == (0, 0.0)
    value, num_lists = ndcg(scores, zeros, np.array([1, 1]), 10)
    assert np.isnan(value) and num_lists == 0


def test_normalized_entropy_of_the_mean_label_is_one() -> None:
    for num_positives in (1, 15, 500, 999):
        labels = np.arange(1_000) < num_positives
        mean_label = np.full(1_000, num_positives / 1_000)
        # identity in exact arithmetic; 1,000 float64 logs and additions
        assert normalized_entropy(mean_label, labels) == pytest.approx(1.0, abs=1e-12)


def test_calibration_is_the_ratio_of_sums_and_ignores_the_order() -> None:
    scores, labels, _ = tied_rows(2_000, seed=4)
    order = np.random.default_rng(0).permutation(2_000)
    value = calibration(scores, labels)
    assert calibration(scores[order], labels) == calibration(scores, labels[order]) == value
    assert value == pytest.approx(scores.sum(dtype=np.float64) / labels.sum(), rel=1e-13)  # the definition, unsorted


def test_log_loss_of_certain_mistakes_is_finite() -> None:
    wrong = logloss(np.array([0.0, 1.0], np.float32), np.array([1, 0]))
    assert wrong == pytest.approx(-np.log(1e-7), rel=1e-9)  # closed form of the clip; 1 - (1 - 1e-7) rounds at 1e-10


def add_day(evaluation: Evaluation, rows: dict[str, Rows], chosen: np.ndarray) -> None:
    for batch in np.array_split(chosen, len(chosen) // 97 + 1):
        for address, (predictions, labels, groups) in rows.items():
            evaluation.add(address, predictions[batch], torch.from_numpy(labels[batch]), groups[batch])


def day_of_rows(num_rows: int) -> dict[str, Rows]:
    rng = np.random.default_rng(5)
    click_scores, clicks, groups = tied_rows(num_rows, seed=6, num_scores=1_000_000)
    next_scores, has_next, _ = tied_rows(num_rows, seed=7)
    dwell = rng.lognormal(3, 2, (2, num_rows)).astype(np.float32)
    clicked = np.where(clicks == 1, 1.0, np.nan)
    return {
        "click@all": (click_scores, clicks, groups),
        "has_next@click": (next_scores, has_next * clicked, groups),
        "dwell@click": (dwell[0], dwell[1] * clicked, groups),
        "interest@all": graded_rows(num_rows, seed=8, num_groups=300),
    }


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_any_number_of_workers_gives_the_same_bits_as_one(num_workers: int) -> None:
    rows, num_rows = day_of_rows(3_000), 3_000
    alone = Evaluation(ADDRESSES, "impressions")
    add_day(alone, rows, np.arange(num_rows))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        owners, order = rng.integers(0, num_workers, num_rows), rng.permutation(num_rows)
        workers = [Evaluation(ADDRESSES, "impressions") for _ in range(num_workers + 1)]  # the last one gets no row
        for number in range(num_workers):
            add_day(workers[number], rows, order[owners[order] == number])
        states = [workers[number].state() for number in rng.permutation(num_workers + 1)]
        # oracle: one process; no tolerance, by design
        assert Evaluation.merge(ADDRESSES, "impressions", states).compute() == alone.compute()


def test_evaluation_reports_the_plain_functions_over_the_rows_of_each_space() -> None:
    rows = day_of_rows(2_000)
    evaluation = Evaluation(ADDRESSES, "positives")
    add_day(evaluation, rows, np.arange(2_000))
    metrics = evaluation.compute()
    predictions, labels, groups = (column[rows["click@all"][1] == 1] for column in rows["has_next@click"])
    value, num_groups, _ = gauc(predictions, labels, groups, "positives")
    list_ndcg, num_lists = ndcg(predictions, labels, groups, 10)
    assert metrics["has_next@click"] == {  # oracle: the same functions on rows masked by hand, hence equal
        "auc": auc(predictions, labels),
        "gauc": value,
        "gauc_groups": num_groups,
        "ndcg@10": list_ndcg,
        "lists": num_lists,
        "logloss": logloss(predictions, labels),
        "ne": normalized_entropy(predictions, labels),
        "calibration": calibration(predictions, labels),
        "mean_label": labels.sum() / len(labels),
        "rows": len(labels),
    }
    assert metrics["dwell@click"].keys() == {"mse", "mae", "xauc", "calibration", "mean_label", "rows"}
    scores, grades, lists = rows["interest@all"]
    list_ndcg, num_lists = ndcg(scores, grades, lists, 10)
    ranking = {"ndcg@10": list_ndcg, "lists": num_lists, "xauc": xauc(scores, grades, lists), "rows": 2_000}
    ranking["mean_label"] = pytest.approx(float(grades.mean()))
    assert metrics["interest@all"] == ranking
    assert type(metrics["click@all"]["rows"]) is int and metrics["click@all"]["rows"] == 2_000


def test_rows_with_a_masked_label_change_nothing() -> None:
    scores, labels, groups = tied_rows(500, seed=8)
    without, with_masked = (Evaluation(ADDRESSES, "equal") for _ in range(2))
    nothing = np.full(500, np.nan)
    for address in ADDRESSES:
        without.add(address, scores, labels, groups)
        with_masked.add(address, np.tile(scores, 2), np.append(nothing, labels), np.tile(groups, 2))
    assert with_masked.compute() == without.compute()  # oracle: the rows removed


def test_without_groups_their_metrics_are_nan_and_the_rest_is_unchanged() -> None:
    scores, labels, groups = tied_rows(500, seed=9)
    metrics = []
    for group_column in (None, groups):
        evaluation = Evaluation({"click@all": "binary"}, "equal")
        evaluation.add("click@all", scores, labels, group_column)
        metrics.append(evaluation.compute()["click@all"])
    assert np.isnan([metrics[0].pop("gauc"), metrics[0].pop("ndcg@10")]).all()
    assert metrics[0].pop("gauc_groups") == metrics[0].pop("lists") == 0
    assert metrics[0].items() <= metrics[1].items()  # oracle: the same day with its groups


def test_a_ranking_without_groups_is_one_list_to_xauc_and_none_to_ndcg() -> None:
    scores, grades, _ = graded_rows(500, seed=10)
    evaluation = Evaluation({"interest@all": "ranking"}, "equal")
    evaluation.add("interest@all", scores, grades)
    metrics = evaluation.compute()["interest@all"]
    assert np.isnan(metrics.pop("ndcg@10")) and metrics.pop("mean_label") == pytest.approx(float(grades.mean()))
    assert metrics == {"lists": 0, "xauc": xauc(scores, grades), "rows": 500}  # oracle: the plain function


def test_a_day_without_rows_is_nan_and_zero_rows() -> None:
    metrics = Evaluation(ADDRESSES, "impressions").compute()
    for values in metrics.values():
        assert {values.pop(name) for name in COUNTS & values.keys()} == {0}
        assert np.isnan(list(values.values())).all()  # definition: nothing to average


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_float_type_count_like_float32_arrays(dtype: torch.dtype) -> None:
    predictions = torch.tensor([0.25, 0.5, 0.75], dtype=dtype, requires_grad=True)  # exact in bfloat16
    labels = torch.tensor([True, False, True])
    tensors, arrays = (Evaluation({"click@all": "binary"}, "equal") for _ in range(2))
    tensors.add("click@all", predictions, labels, torch.tensor([1, 1, 1]))
    arrays.add("click@all", np.array([0.25, 0.5, 0.75], np.float32), np.array([1.0, 0.0, 1.0]), np.array([1, 1, 1]))
    assert tensors.compute() == arrays.compute()  # oracle: the array path
    assert {key: value.dtype for key, value in tensors.state().items()} == {
        "click@all/predictions": np.float32,
        "click@all/labels": np.int8,
        "click@all/groups": np.int64,
        "click@all/units": np.int64,
    }


def test_a_state_has_the_same_keys_and_dtypes_with_rows_and_without() -> None:
    empty, filled = (Evaluation(ADDRESSES, "equal") for _ in range(2))
    add_day(filled, day_of_rows(200), np.arange(200))
    dtypes = [{key: value.dtype for key, value in evaluation.state().items()} for evaluation in (empty, filled)]
    types = {"predictions": np.float32, "labels": np.float32, "groups": np.int64, "units": np.int64}
    expected = {f"{address}/{part}": np.dtype(of) for address in ADDRESSES for part, of in types.items()}
    expected |= {f"{address}/labels": np.dtype(np.int8) for address in ("click@all", "has_next@click")}
    assert dtypes == [expected, expected]  # by hand: what the workers' gather relies on


def test_later_batches_leave_a_state_taken_earlier_alone() -> None:
    evaluation = Evaluation({"dwell@all": "regression"}, "equal")
    batch = np.array([1.0, 2.0], np.float32)
    evaluation.add("dwell@all", batch, batch)
    early = evaluation.state()
    batch[:] = 9.0  # the caller reuses its buffer
    evaluation.add("dwell@all", batch, batch)
    assert early["dwell@all/predictions"].tolist() == [1.0, 2.0]  # by hand
    assert evaluation.state()["dwell@all/predictions"].tolist() == [1.0, 2.0, 9.0, 9.0]


@pytest.mark.parametrize(
    ("address", "bad", "message"),
    [
        ("click@all", [np.nan, 0.5, np.nan], r"click@all: 2 of 3 predictions are not probabilities \(2 are NaN\)"),
        ("click@all", [0.5, 1.7, 0.5], r"click@all: 1 of 3 predictions are not probabilities \(0 are NaN\)"),
        ("dwell@all", [np.inf, np.nan, 1.0], r"dwell@all: 2 of 3 predictions are not finite numbers \(1 are NaN\)"),
        ("order@all", [-np.inf, -7.0, 1.0], r"order@all: 1 of 3 predictions are not finite numbers \(0 are NaN\)"),
    ],
)
def test_a_bad_prediction_is_refused_even_where_the_label_is_masked(
    address: str, bad: list[float], message: str
) -> None:
    evaluation = Evaluation({"click@all": "binary", "dwell@all": "regression", "order@all": "ranking"}, "equal")
    with pytest.raises(ValueError, match=message):  # counted by hand
        evaluation.add(address, np.array(bad, np.float32), np.array([np.nan, np.nan, 1.0]))


def test_nan_scores_and_labels_of_another_kind_are_refused() -> None:
    scores = np.array([0.1, np.nan, 0.3], np.float32)
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        auc(scores, np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        gauc(scores, np.array([0, 1, 1]), np.zeros(3, np.int64), "equal")
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        ndcg(scores, np.array([0, 1, 1]), np.zeros(3, np.int64), 10)
    with pytest.raises(ValueError, match="1 of 3 labels are NaN"):
        xauc(np.array([0, 1, 1]), scores)
    with pytest.raises(ValueError, match="click@all: 1 of 2 labels are neither 0 nor 1"):
        Evaluation({"click@all": "binary"}, "equal").add("click@all", np.array([0.1, 0.2]), np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="order@all: 2 of 3 labels are not grades from 0 to 1000"):
        Evaluation({"order@all": "ranking"}, "equal").add("order@all", np.ones(3), np.array([-1.0, 0.5, np.inf]))
