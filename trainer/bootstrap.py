"""How sure a day's metrics are: the bootstrap over users.

In: predictions, labels and the user of each row (or its request, or the row itself: the unit that is independent of the
others). Out: draws of the metrics, whose standard deviation is the metric's standard error. A draw takes as many units
as there are, with replacement, each with all of its rows: rows of one user are alike, and a bootstrap over rows would
believe in more evidence than there is. Two models that are compared take the same draws.

What is drawn is a function of the seed and the set of units, never of the rows' order: the same for any number of
workers. Sums are of whole numbers, or over sorted rows. Cost: one sort, then about a millisecond a draw and 50,000
rows; a day of more rows is represented by whole users, and the errors are scaled to all.
Source: Efron, Tibshirani: An introduction to the bootstrap, 1993, chapter 8 (units with all of their rows); for the AUC
of rows in clusters: Obuchowski: Nonparametric analysis of clustered ROC curve data, Biometrics 53, 1997.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Int64s = NDArray[np.int64]

NUM_DRAWS = 100  # the standard error itself is then known to 7 %
MAX_ROWS = 50_000
_SURE = 1.96  # standard errors on either side, for 95 %
_ODD = np.uint64(0x9E3779B97F4A7C15)


def draws(
    predictions: NDArray[np.float32], labels: NDArray[np.generic], units: Int64s, seed: int, *, binary: bool
) -> dict[str, Floats]:
    """Draws of the metrics of rows (B,), NaN where a draw leaves one undefined: log_calibration, mean_label, and for
    labels 0 and 1 also auc: [NUM_DRAWS] each, already scaled to the errors of all rows around their mean.
    """
    if not len(labels):
        return {}
    kept = kept_rows(units, seed, MAX_ROWS)
    predictions, targets, codes = predictions[kept], labels[kept].astype(np.float64), _codes(units[kept])
    order = np.lexsort((targets, predictions))
    predictions, targets, codes = predictions[order], targets[order], codes[order]
    by_unit = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[by_unit], prepend=-1))
    rows_U = np.diff(starts, append=len(codes)).astype(np.float64)
    predicted_U, label_U = (
        np.add.reduceat(values[by_unit].astype(np.float64), starts) for values in (predictions, targets)
    )
    found: dict[str, list[float]] = {"log_calibration": [], "mean_label": []}
    if binary:
        found["auc"] = []
    ranks = Ranks(predictions, targets > 0, codes) if binary else None
    for count_U in counts(len(rows_U), seed):
        predicted, label, rows = (float((count_U * sum_U).sum()) for sum_U in (predicted_U, label_U, rows_U))
        found["log_calibration"].append(math.log(predicted / label) if predicted * label > 0 else math.nan)
        found["mean_label"].append(label / rows)
        if ranks:
            found["auc"].append(ranks.auc(count_U))
    scale = math.sqrt(len(targets) / len(labels))
    return {name: _scaled(np.array(values), scale) for name, values in found.items()}


def errors(drawn: Mapping[str, Mapping[str, Floats]]) -> dict[str, dict[str, float | None]]:
    """By address the standard errors of auc, mean_label and calibration (of its logarithm: relative)."""
    return {
        address: {name.removeprefix("log_"): deviation(values) for name, values in of.items()}
        for address, of in drawn.items()
    }


def differences(
    ours: Mapping[str, Mapping[str, float | None]],
    theirs: Mapping[str, Mapping[str, float | None]],
    our_draws: Mapping[str, Mapping[str, Floats]],
    their_draws: Mapping[str, Mapping[str, Floats]],
) -> dict[str, dict[str, float | None]]:
    """By address the difference of two models' AUCs on the same rows, and where it lies with 95 %: auc, low, high."""
    found: dict[str, dict[str, float | None]] = {}
    for address, of in our_draws.items():
        if "auc" in of:
            mine, its = ours[address]["auc"], theirs[address]["auc"]
            error = deviation(of["auc"] - their_draws[address]["auc"])
            auc = None if mine is None or its is None else mine - its
            found[address] = {"auc": auc, "low": None, "high": None}
            if auc is not None and error is not None:
                found[address] |= {"low": auc - _SURE * error, "high": auc + _SURE * error}
    return found


def deviation(values: Floats) -> float | None:
    """The standard deviation of draws; None where fewer than half of them are defined."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) >= max(2, len(values) / 2) else None


def kept_rows(units: Int64s, seed: int, most: int) -> Int64s:
    """The rows of as many whole units, chosen by chance, as have at most so many rows (of one at least)."""
    if len(units) <= most:
        return np.arange(len(units))
    distinct, inverse, rows_U = np.unique(units, return_inverse=True, return_counts=True)
    lot_U = (distinct.view(np.uint64) ^ np.uint64(seed)) * _ODD
    lot_U = (lot_U ^ (lot_U >> np.uint64(32))) * _ODD
    order = np.lexsort((distinct, lot_U))
    taken = max(1, int(np.searchsorted(rows_U[order].cumsum(), most, side="right")))
    chosen_U = np.zeros(len(distinct), bool)
    chosen_U[order[:taken]] = True
    return np.flatnonzero(chosen_U[inverse])


def counts(num_units: int, seed: int) -> Iterator[Int64s]:
    """How often each draw takes each unit: NUM_DRAWS times [U]."""
    rng = np.random.default_rng(seed)
    for _ in range(NUM_DRAWS):
        yield np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)


class Ranks:
    """The AUC of rows of which each counts as often as its unit is drawn. codes (B,): each row's unit, from 0."""

    def __init__(self, scores: NDArray[np.float32], positive: NDArray[np.bool_], codes: Int64s):
        order = np.argsort(scores[~positive], kind="stable")
        negatives = scores[~positive][order]
        self._positives, self._negatives = codes[positive], codes[~positive][order]
        self._below, self._through = (np.searchsorted(negatives, scores[positive], side) for side in ("left", "right"))

    def auc(self, count_U: Int64s) -> float:
        """NaN where a class is missing. A pair counts two half-wins in order, one where the scores are equal."""
        below = np.concatenate([[0], count_U[self._negatives].cumsum()])
        positives = count_U[self._positives]
        pairs = int(positives.sum()) * int(below[-1])
        half_wins = int((positives * (below[self._below] + below[self._through])).sum())
        return half_wins / (2 * pairs) if pairs else math.nan


def _codes(units: Int64s) -> Int64s:
    return np.unique(units, return_inverse=True)[1].astype(np.int64)


def _scaled(values: Floats, scale: float) -> Floats:
    """The draws drawn together around their mean: fewer rows than all are less sure by the root of their share."""
    known = values[~np.isnan(values)]
    middle = float(np.sort(known).mean()) if len(known) else 0.0
    return middle + scale * (values - middle)
