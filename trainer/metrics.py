"""Ranking and calibration metrics of one day, the same to the last bit for any number of workers.

In: predictions, labels and groups of each metric address (`click@all`, `dwell@click`), batch by batch, as tensors or
arrays. Out: plain dictionaries of numbers. In between, `Evaluation` keeps the rows themselves (5 bytes a row, 8 with a
real label, and 8 more with a group): binned counts would be smaller, but they misstate AUC on sparse tasks.
Exactness: AUC, GAUC and XAUC count pairs in integers, and every floating sum runs over sorted values. So a metric is a
function of the set of rows, whatever their order and whichever worker saw them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from embeddings.pulse import beat
from trainer.bootstrap import draws

GAUC_WEIGHTINGS = ("impressions", "positives", "equal")
LABEL_TYPES = {"binary": np.int8, "regression": np.float32, "ranking": np.float32}
GROUPED_KINDS = ("binary", "ranking")
NDCG_DEPTH = 10
MAX_GRADE = 1000.0  # the sum of a list's gains, 2^grade - 1, stays finite
MIN_PROBABILITY = 1e-7  # log loss clips here: float32 cannot tell 1 - 3e-8 from 1
PROBABILITY_ROUNDING = 1e-5  # a sum or exp of log-probabilities may pass 1 by this much
LOW_HALF = 0xFFFFFFFF  # of a packed 64-bit integer


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting one half.

    scores (B,) are compared as float32, the precision in which models emit them; labels (B,) are 0 or 1.
    NaN when a class is missing. ValueError when a score is NaN.
    Source: Hanley and McNeil, Radiology 143 (1982), the Wilcoxon form; equal to average ranks on ties.
    """
    positives, negatives, half_wins = _count_pairs(_binary_keys(scores, labels, np.zeros(len(scores), np.int64)))
    return _ratio(int(half_wins.sum()), 2 * int(positives.sum()) * int(negatives.sum()))


def gauc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, weighting: str) -> tuple[float, int, float]:
    """Weighted mean of the AUC inside each group, over the groups that hold both labels.

    groups (B,) are integers (a user, a request). A group weighs its number of rows ('impressions'), its number of
    positives ('positives') or one ('equal'): three different metrics, never to be compared with each other.
    Returns the value, the number of groups kept, and their share of the weight of all groups; NaN where undefined.
    ValueError when a score is NaN.
    Source: Zhou et al., Deep Interest Network, KDD 2018 (weighted by impressions), https://arxiv.org/abs/1706.06978
    """
    return _gauc(_binary_keys(scores, labels, groups), weighting)


def logloss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats, with probabilities clipped to [1e-7, 1 - 1e-7]; labels are 0 or 1."""
    clipped = np.clip(probabilities.astype(np.float64), MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    likelihoods = np.sort(np.where(labels > 0, clipped, 1 - clipped))  # a vectorised log may round by position: fix it
    return _mean(-np.log(likelihoods))


def normalized_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Log loss over the entropy of the mean label: below 1 is better than predicting that mean for every row.

    The mean is that of the evaluated rows, not of the training data as in the paper. NaN when a class is missing.
    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014,
    https://doi.org/10.1145/2648584.2648589
    """
    rate = _mean(labels)
    if not 0 < rate < 1:
        return float("nan")
    entropy = -rate * np.log(rate) - (1 - rate) * np.log1p(-rate)
    return float(logloss(probabilities, labels) / entropy)


def calibration(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Sum of predictions over sum of labels (PCOC): above 1 predicts too much; NaN when labels sum to 0."""
    return _ratio(_sum(predictions), _sum(labels))


def mse(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared error, in the squared unit of the label."""
    return _mean(np.square(predictions.astype(np.float64) - labels))


def mae(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean absolute error, in the unit of the label."""
    return _mean(np.abs(predictions.astype(np.float64) - labels))


def xauc(predictions: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> float:
    """The share of the pairs with different labels that the predictions put in the labels' order, ties one half.

    All (B,); predictions and labels are real numbers, compared as float32. With groups, integers, only pairs inside a
    group count. On 0/1 labels without groups it is the AUC. NaN without a pair. ValueError when a value is NaN.
    Source: Zhan et al., Deconfounding Duration Bias in Watch-time Prediction for Video Recommendation, KDD 2022,
    https://arxiv.org/abs/2206.06003, where pairs are sampled; here all of them count.
    """
    return _xauc(_graded_rows(predictions, labels, np.zeros(len(labels), np.int64) if groups is None else groups))


def ndcg(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, depth: int) -> tuple[float, int]:
    """Mean over lists of the DCG of the `depth` best scores, over the DCG of that list in the order of its labels.

    DCG is the sum of (2^label - 1) / log2(1 + rank), rank from 1. Rows with one score share the mean discount of their
    ranks: the expectation over all orders of the tied rows. All (B,); a list is the rows of one group; labels >= 0.
    Returns the value and the number of lists averaged, those with a positive label; NaN without any.
    ValueError when a score or a label is NaN.
    Source: Burges et al., Learning to Rank using Gradient Descent, ICML 2005 (gain); McSherry and Najork, Computing
    Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores, ECIR 2008 (ties).
    """
    return _ndcg(_graded_rows(scores, labels, groups), depth)


class Evaluation:
    """The scored rows of one day, of one worker or of all, and their metrics.

    addresses maps each metric address to its kind: 'binary' (labels 0 or 1, predictions are probabilities),
    'regression' (both in one unit) or 'ranking' (labels are grades >= 0, predictions are scores without a unit).
    A day starts with a fresh Evaluation: nothing is carried over from the day before.
    """

    def __init__(self, addresses: Mapping[str, str], gauc_weighting: str) -> None:
        assert gauc_weighting in GAUC_WEIGHTINGS, f"{gauc_weighting!r} is none of {GAUC_WEIGHTINGS}"
        self._kinds = dict(addresses)
        self._gauc_weighting = gauc_weighting
        self._chunks: dict[str, list[np.ndarray]] = {}
        for address, kind in addresses.items():
            self._chunks[f"{address}/predictions"] = [np.empty(0, np.float32)]
            self._chunks[f"{address}/labels"] = [np.empty(0, LABEL_TYPES[kind])]
            self._chunks[f"{address}/groups"] = [np.empty(0, np.int64)]
            self._chunks[f"{address}/units"] = [np.empty(0, np.int64)]

    @classmethod
    def merge(
        cls, addresses: Mapping[str, str], gauc_weighting: str, states: Iterable[Mapping[str, np.ndarray]]
    ) -> "Evaluation":
        """Return an evaluation of the rows in all `states`: one `state()` from each worker, in any order."""
        merged = cls(addresses, gauc_weighting)
        for state in states:
            assert state.keys() == merged._chunks.keys(), "workers evaluate different addresses"
            for key, chunks in merged._chunks.items():
                assert state[key].dtype == chunks[0].dtype, f"{key} arrived as {state[key].dtype}"
                chunks.append(state[key])
        return merged

    def add(
        self,
        address: str,
        predictions: torch.Tensor | np.ndarray,
        labels: torch.Tensor | np.ndarray,
        groups: torch.Tensor | np.ndarray | None = None,
        units: torch.Tensor | np.ndarray | None = None,
    ) -> None:
        """Add a batch of rows; those whose label is NaN lie outside the address's space and are dropped.

        All (B,). groups are int64, or None in every call when there is no group column; regression does without them.
        units, likewise: who is independent of the others, such as users, for standard errors (default: the groups).
        ValueError when a prediction is not a number, or for a binary address not a probability, in any row; and when
        a label is not of the address's kind.
        """
        kind = self._kinds[address]
        scores, targets = _to_numpy(predictions).astype(np.float32), _to_numpy(labels)
        assert scores.ndim == 1 and scores.shape == targets.shape, f"{address}: {scores.shape} and {targets.shape}"
        _check_predictions(address, kind, scores)
        in_space = ~np.isnan(targets)
        _check_labels(address, kind, targets[in_space])
        self._chunks[f"{address}/predictions"].append(scores[in_space])
        self._chunks[f"{address}/labels"].append(targets[in_space].astype(LABEL_TYPES[kind]))
        if groups is not None and kind in GROUPED_KINDS:
            keys = _to_numpy(groups)
            assert keys.shape == scores.shape and keys.dtype == np.int64, f"{address}: groups {keys.dtype} {keys.shape}"
            self._chunks[f"{address}/groups"].append(keys[in_space])
        if units is None and kind not in GROUPED_KINDS:
            units = groups
        if units is not None:
            self._chunks[f"{address}/units"].append(_to_numpy(units)[in_space])

    def state(self) -> dict[str, np.ndarray]:
        """Return all rows as flat arrays: the same keys and dtypes on every worker, but not the same lengths."""
        for key, chunks in self._chunks.items():
            self._chunks[key] = [np.concatenate(chunks)]
        return {key: chunks[0] for key, chunks in self._chunks.items()}

    def compute(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each address; NaN where undefined, `rows`, `lists` and `gauc_groups` are ints."""
        state = self.state()
        metrics: dict[str, dict[str, float]] = {}
        for address, kind in self._kinds.items():
            predictions, labels, groups = (state[f"{address}/{part}"] for part in ("predictions", "labels", "groups"))
            assert len(groups) in (0, len(labels)) or kind not in GROUPED_KINDS, "some batches came without groups"
            if kind == "binary":
                metrics[address] = _binary(predictions, labels, groups, self._gauc_weighting)
            elif kind == "ranking":
                metrics[address] = _ranking(predictions, labels, groups)
            else:
                metrics[address] = _regression(predictions, labels)
            metrics[address]["mean_label"] = _ratio(_sum(labels), len(labels))
            metrics[address]["rows"] = len(labels)
            beat()
        return metrics

    def draws(self, seed: int) -> dict[str, dict[str, np.ndarray]]:
        """Bootstrap draws of each address's metrics, by bootstrap.draws; of evaluations of the same rows they are of
        the same units.
        """
        state, found = self.state(), {}
        for address, kind in self._kinds.items():
            predictions, labels = state[f"{address}/predictions"], state[f"{address}/labels"]
            found[address] = draws(predictions, labels, self._units(address), seed, binary=kind == "binary")
            if kind == "ranking":
                found[address].pop("log_calibration", None)  # scores have no unit
            beat()
        return found

    def num_units(self) -> int:
        """How many users (or what else the units are) have a row."""
        return max(len(np.unique(self._units(address))) for address in self._kinds)

    def _units(self, address: str) -> np.ndarray:
        """Of each row; where neither units nor groups were given, the row is one."""
        state = self.state()
        units, groups = state[f"{address}/units"], state[f"{address}/groups"]
        rows = len(state[f"{address}/labels"])
        return units if len(units) == rows else groups if len(groups) == rows else np.arange(rows)


def _binary(probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray, weighting: str) -> dict[str, float]:
    keys = _binary_keys(probabilities[: len(groups)], labels[: len(groups)], groups)  # of no rows without groups
    group_auc, num_groups, _ = _gauc(keys, weighting)
    list_ndcg, num_lists = _binary_ndcg(keys, NDCG_DEPTH)
    return {
        "auc": auc(probabilities, labels),
        "gauc": group_auc,
        "gauc_groups": num_groups,
        f"ndcg@{NDCG_DEPTH}": list_ndcg,
        "lists": num_lists,
        "logloss": logloss(probabilities, labels),
        "ne": normalized_entropy(probabilities, labels),
        "calibration": calibration(probabilities, labels),
    }


def _regression(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "mse": mse(predictions, labels),
        "mae": mae(predictions, labels),
        "xauc": xauc(predictions, labels),
        "calibration": calibration(predictions, labels),
    }


def _ranking(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    if len(groups) < len(labels):
        return {f"ndcg@{NDCG_DEPTH}": float("nan"), "lists": 0, "xauc": xauc(scores, labels)}
    rows = _graded_rows(scores, labels, groups)  # its sorts are most of the time
    value, num_lists = _ndcg(rows, NDCG_DEPTH)
    return {f"ndcg@{NDCG_DEPTH}": value, "lists": num_lists, "xauc": _xauc(rows)}


def _binary_keys(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Rows as integers of group's number << 33 | score's bits << 1 | label, in ascending order.

    One plain sort of the rows does everything: it is several times faster than sorting indices by three columns.
    """
    return np.sort(_numbered(groups) << 33 | _sortable_bits(scores) << 1 | (labels > 0))


def _gauc(keys: np.ndarray, weighting: str) -> tuple[float, int, float]:
    positives, negatives, half_wins = _count_pairs(keys)
    weights = _group_weights(weighting, positives, negatives)
    kept = (positives > 0) & (negatives > 0)
    group_auc = half_wins[kept] / (2.0 * positives[kept] * negatives[kept])
    kept_weight = _sum(weights[kept])
    return _ratio(_sum(weights[kept] * group_auc), kept_weight), int(kept.sum()), _ratio(kept_weight, _sum(weights))


def _count_pairs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count by group, in ascending order: positives, negatives, and half-wins (2 a pair in order, 1 a tie)."""
    is_positive = (keys & 1).astype(np.int64)
    runs = np.flatnonzero(_differs_from_previous(keys >> 1))  # first row of every run of ties inside a group
    positives = np.add.reduceat(is_positive, runs)
    negatives = np.diff(runs, append=len(keys)) - positives
    starts = np.flatnonzero(_differs_from_previous(keys[runs] >> 33))  # first run of every group
    negatives_below = np.cumsum(negatives) - negatives
    negatives_below -= np.repeat(negatives_below[starts], np.diff(starts, append=len(runs)))
    half_wins = positives * (2 * negatives_below + negatives)
    return np.add.reduceat(positives, starts), np.add.reduceat(negatives, starts), np.add.reduceat(half_wins, starts)


@dataclass(frozen=True)
class _GradedRows:
    """Rows in ascending order of group, then score, then label.

    runs: the number of each row's run of one score inside a group. cells: its group's number << 32 | the place of its
    label in `labels`, the distinct ones in ascending order.
    """

    runs: np.ndarray
    cells: np.ndarray
    labels: np.ndarray


def _graded_rows(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> _GradedRows:
    """Sort rows by three columns, of 32 bits each, by sorting integers of two: np.lexsort takes twice as long."""
    if num_nan := int(np.isnan(labels).sum()):
        raise ValueError(f"{num_nan} of {len(labels)} labels are NaN")
    distinct, places = np.unique(labels.astype(np.float32), return_inverse=True)
    groups_scores, runs = np.unique(_numbered(groups) << 32 | _sortable_bits(scores), return_inverse=True)
    keys = np.sort(runs.astype(np.uint64) << 32 | places.astype(np.uint64))
    runs = keys >> 32
    return _GradedRows(runs, groups_scores[runs] >> 32 << 32 | keys & LOW_HALF, distinct)


def _xauc(rows: _GradedRows) -> float:
    """Of the pairs inside a group with two labels: all, less those in the wrong order, less half of those tied."""
    pairs = _count_equal_pairs(rows.cells >> 32) - _count_equal_pairs(np.sort(rows.cells))
    keys = rows.runs << 32 | rows.cells & LOW_HALF
    tied = _count_equal_pairs(rows.runs) - _count_equal_pairs(keys)
    wrong = _count_inversions(rows.cells, num_bits=(len(rows.labels) - 1).bit_length())
    return _ratio(2 * (pairs - wrong) - tied, 2 * pairs)


def _count_equal_pairs(ascending: np.ndarray) -> int:
    sizes = np.diff(np.flatnonzero(_differs_from_previous(ascending)), append=len(ascending))
    return int((sizes * (sizes - 1) // 2).sum())


def _count_inversions(values: np.ndarray, num_bits: int) -> int:
    """Count the pairs of which the first is greater. Only the `num_bits` lowest bits of values need sorting.

    From the highest bit down, values that agree above it form a block: a pair is inverted where, inside a block, a 1
    stands before a 0. Then zeros go to the front and ones to the back, which keeps order and splits every block.
    """
    num_inverted = 0
    for bit in reversed(range(num_bits)):
        is_one = (values >> bit & 1).astype(bool)
        ones_before = np.cumsum(is_one)
        starts = np.flatnonzero(_differs_from_previous(values >> (bit + 1)))
        zeros = np.add.reduceat(~is_one, starts, dtype=np.int64)
        ones_before_block = ones_before[starts] - is_one[starts]
        num_inverted += int(ones_before[~is_one].sum() - (zeros * ones_before_block).sum())
        values = np.concatenate([values[~is_one], values[is_one]])
    return num_inverted


def _ndcg(rows: _GradedRows, depth: int) -> tuple[float, int]:
    gains = np.exp2(rows.labels.astype(np.float64)) - 1
    best = np.sort(rows.cells)  # by label: one cell is a run of ties
    found, ideal = (
        _dcg(gains[cells & LOW_HALF], runs, cells >> 32, depth)
        for runs, cells in ((rows.runs, rows.cells), (best, best))
    )
    return _mean(found[ideal > 0] / ideal[ideal > 0]), int((ideal > 0).sum())


def _binary_ndcg(keys: np.ndarray, depth: int) -> tuple[float, int]:
    is_positive = (keys & 1).astype(np.int64)
    found = _dcg(is_positive, keys >> 1, keys >> 33, depth)
    positives = np.add.reduceat(is_positive, np.flatnonzero(_differs_from_previous(keys >> 33)))
    kept = positives > 0
    ideal = _discounts(depth)[np.minimum(positives[kept], depth)]
    return _mean(found[kept] / ideal), int(kept.sum())


def _dcg(gains: np.ndarray, runs: np.ndarray, lists: np.ndarray, depth: int) -> np.ndarray:
    """DCG of each list, in ascending order of list; rows are in ascending order of list and, inside it, of score.

    All (B,). runs tell rows with one score in one list from their neighbours.
    """
    firsts = np.flatnonzero(_differs_from_previous(runs))
    sizes = np.diff(firsts, append=len(runs))
    starts = np.flatnonzero(_differs_from_previous(lists[firsts]))
    runs_of_list = np.diff(starts, append=len(firsts))
    ends = np.repeat(np.append(firsts, len(runs))[starts + runs_of_list], runs_of_list)
    discounts = _discounts(depth)
    last, before_first = np.minimum(ends - firsts, depth), np.minimum(ends - firsts - sizes, depth)  # ranks in the list
    mean_discounts = (discounts[last] - discounts[before_first]) / sizes
    return np.add.reduceat(np.add.reduceat(gains, firsts) * mean_discounts, starts)


def _discounts(depth: int) -> np.ndarray:
    """The sum of the discounts of ranks 1 to r, for r from 0 to depth."""
    return np.append(0.0, np.cumsum(1 / np.log2(np.arange(2, depth + 2))))


def _numbered(groups: np.ndarray) -> np.ndarray:
    """Number the distinct groups from 0, in ascending order: as uint64, but small enough to shift left by 33 bits."""
    numbers: np.ndarray = np.unique(groups, return_inverse=True)[1].astype(np.uint64)
    return numbers


def _sortable_bits(scores: np.ndarray) -> np.ndarray:
    """Map float32 scores to 32-bit integers in the same order: the sign bit flipped, all bits of the negative ones.

    As uint64, to be packed with more.
    """
    if num_nan := int(np.isnan(scores).sum()):
        raise ValueError(f"{num_nan} of {len(scores)} scores are NaN")
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    sign = np.uint32(1 << 31)
    return np.where(bits & sign, ~bits, bits | sign).astype(np.uint64)


def _differs_from_previous(values: np.ndarray) -> np.ndarray:
    differs = np.ones(len(values), dtype=bool)
    differs[1:] = values[1:] != values[:-1]
    return differs


def _group_weights(weighting: str, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    assert weighting in GAUC_WEIGHTINGS, f"{weighting!r} is none of {GAUC_WEIGHTINGS}"
    if weighting == "equal":
        return np.ones_like(positives)
    return positives if weighting == "positives" else np.add(positives, negatives)


def _sum(values: np.ndarray) -> float:
    """Sum in float64 over sorted values, because floating addition depends on the order."""
    return float(np.sort(values).sum(dtype=np.float64))


def _mean(values: np.ndarray) -> float:
    return _ratio(_sum(values), len(values))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _check_predictions(address: str, kind: str, scores: np.ndarray) -> None:
    if kind == "binary":
        good, wanted = np.abs(scores - 0.5) <= 0.5 + PROBABILITY_ROUNDING, "probabilities"
    else:
        good, wanted = np.isfinite(scores), "finite numbers"
    if num_bad := int((~good).sum()):
        num_nan = int(np.isnan(scores).sum())
        raise ValueError(f"{address}: {num_bad} of {len(scores)} predictions are not {wanted} ({num_nan} are NaN)")


def _check_labels(address: str, kind: str, labels: np.ndarray) -> None:
    if kind == "binary" and (num_bad := int(((labels != 0) & (labels != 1)).sum())):
        raise ValueError(f"{address}: {num_bad} of {len(labels)} labels are neither 0 nor 1")
    if kind == "ranking" and (num_bad := int((~((labels >= 0) & (labels <= MAX_GRADE))).sum())):
        raise ValueError(f"{address}: {num_bad} of {len(labels)} labels are not grades from 0 to {MAX_GRADE:g}")


def _to_numpy(values: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
    return values
