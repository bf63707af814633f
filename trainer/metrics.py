"""Ranking and calibration metrics of one day, the same to the last bit for any number of workers.

In: predictions, labels and groups of each metric address (`click@all`, `dwell@click`), batch by batch, as tensors or
arrays. Out: plain dictionaries of numbers. In between, `Evaluation` keeps the rows themselves (5 bytes a row, 13 with a
group): binned counts would be smaller, but they misstate AUC on sparse tasks.
Exactness: AUC and GAUC count pairs in integers, and every floating sum runs over sorted values. So a metric is a
function of the set of rows, whatever their order and whichever worker saw them.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

GAUC_WEIGHTINGS = ("impressions", "positives", "equal")
LABEL_TYPES = {"binary": np.int8, "regression": np.float32}
MIN_PROBABILITY = 1e-7  # log loss clips here: float32 cannot tell 1 - 3e-8 from 1
PROBABILITY_ROUNDING = 1e-5  # a sum or exp of log-probabilities may pass 1 by this much


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting one half.

    scores (B,) are compared as float32, the precision in which models emit them; labels (B,) are 0 or 1.
    NaN when a class is missing. ValueError when a score is NaN.
    Source: Hanley and McNeil, Radiology 143 (1982), the Wilcoxon form; equal to average ranks on ties.
    """
    positives, negatives, half_wins = _count_pairs(scores, labels, np.zeros(len(scores), np.int64))
    return _ratio(int(half_wins.sum()), 2 * int(positives.sum()) * int(negatives.sum()))


def gauc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, weighting: str) -> tuple[float, int, float]:
    """Weighted mean of the AUC inside each group, over the groups that hold both labels.

    groups (B,) are integers (a user, a request). A group weighs its number of rows ('impressions'), its number of
    positives ('positives') or one ('equal'): three different metrics, never to be compared with each other.
    Returns the value, the number of groups kept, and their share of the weight of all groups; NaN where undefined.
    ValueError when a score is NaN.
    Source: Zhou et al., Deep Interest Network, KDD 2018 (weighted by impressions), https://arxiv.org/abs/1706.06978
    """
    order = np.argsort(groups)
    numbers = np.cumsum(_differs_from_previous(groups[order]))
    positives, negatives, half_wins = _count_pairs(scores[order], labels[order], numbers)
    weights = _group_weights(weighting, positives, negatives)
    kept = (positives > 0) & (negatives > 0)
    group_auc = half_wins[kept] / (2.0 * positives[kept] * negatives[kept])
    kept_weight = _sum(weights[kept])
    return _ratio(_sum(weights[kept] * group_auc), kept_weight), int(kept.sum()), _ratio(kept_weight, _sum(weights))


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


class Evaluation:
    """The scored rows of one day, of one worker or of all, and their metrics.

    addresses maps each metric address to 'binary' (labels 0 or 1, predictions are probabilities) or 'regression'.
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
    ) -> None:
        """Add a batch of rows; those whose label is NaN lie outside the address's space and are dropped.

        All (B,). groups are int64, or None in every call when there is no group column; regression does without them.
        ValueError when a prediction is not a number, or for a binary address not a probability, in any row.
        """
        kind = self._kinds[address]
        scores, targets = _to_numpy(predictions).astype(np.float32), _to_numpy(labels)
        assert scores.ndim == 1 and scores.shape == targets.shape, f"{address}: {scores.shape} and {targets.shape}"
        _check_predictions(address, kind, scores)
        in_space = ~np.isnan(targets)
        _check_labels(address, kind, targets[in_space])
        self._chunks[f"{address}/predictions"].append(scores[in_space])
        self._chunks[f"{address}/labels"].append(targets[in_space].astype(LABEL_TYPES[kind]))
        if groups is not None and kind == "binary":
            keys = _to_numpy(groups)
            assert keys.shape == scores.shape and keys.dtype == np.int64, f"{address}: groups {keys.dtype} {keys.shape}"
            self._chunks[f"{address}/groups"].append(keys[in_space])

    def state(self) -> dict[str, np.ndarray]:
        """Return all rows as flat arrays: the same keys and dtypes on every worker, but not the same lengths."""
        for key, chunks in self._chunks.items():
            self._chunks[key] = [np.concatenate(chunks)]
        return {key: chunks[0] for key, chunks in self._chunks.items()}

    def compute(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each address; NaN where undefined, `rows` and `gauc_groups` are ints."""
        state = self.state()
        metrics: dict[str, dict[str, float]] = {}
        for address, kind in self._kinds.items():
            predictions, labels = state[f"{address}/predictions"], state[f"{address}/labels"]
            if kind == "binary":
                metrics[address] = self._binary(predictions, labels, state[f"{address}/groups"])
            else:
                metrics[address] = _regression(predictions, labels)
        return metrics

    def _binary(self, predictions: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[str, float]:
        assert len(groups) in (0, len(predictions)), "some batches came with groups and some without"
        grouped = len(groups) == len(predictions)
        value, num_groups, _ = gauc(predictions, labels, groups, self._gauc_weighting) if grouped else (np.nan, 0, 0)
        return {
            "auc": auc(predictions, labels),
            "gauc": value,
            "gauc_groups": num_groups,
            "logloss": logloss(predictions, labels),
            "ne": normalized_entropy(predictions, labels),
            "calibration": calibration(predictions, labels),
            "rows": len(labels),
        }


def _regression(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "mse": mse(predictions, labels),
        "mae": mae(predictions, labels),
        "calibration": calibration(predictions, labels),
        "rows": len(labels),
    }


def _count_pairs(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count per group, in ascending order of group: positives, negatives, and half-wins (2 a pair in order, 1 a tie).

    groups are small numbers (0 <= group < 2^31), so that group, score and label fit one integer and one plain sort of
    the rows does everything: it is several times faster than sorting indices by two columns.
    """
    keys = np.sort(groups.astype(np.uint64) << 33 | _sortable_bits(scores).astype(np.uint64) << 1 | (labels > 0))
    is_positive = (keys & 1).astype(np.int64)
    runs = np.flatnonzero(_differs_from_previous(keys >> 1))  # first row of every run of ties inside a group
    positives = np.add.reduceat(is_positive, runs)
    negatives = np.diff(runs, append=len(keys)) - positives
    starts = np.flatnonzero(_differs_from_previous(keys[runs] >> 33))  # first run of every group
    negatives_below = np.cumsum(negatives) - negatives
    negatives_below -= np.repeat(negatives_below[starts], np.diff(starts, append=len(runs)))
    half_wins = positives * (2 * negatives_below + negatives)
    return np.add.reduceat(positives, starts), np.add.reduceat(negatives, starts), np.add.reduceat(half_wins, starts)


def _sortable_bits(scores: np.ndarray) -> np.ndarray:
    """Map float32 scores to integers in the same order: the sign bit flipped, and all bits of the negative ones."""
    if num_nan := int(np.isnan(scores).sum()):
        raise ValueError(f"{num_nan} of {len(scores)} scores are NaN")
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    sign = np.uint32(1 << 31)
    ordered: np.ndarray = np.where(bits & sign, ~bits, bits | sign)
    return ordered


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


def _to_numpy(values: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
    return values
