"""Losses: how far a head's answer is from what happened, one number a row, or a list.

A loss is built from its settings alone. To add one: a class here, a line in LOSSES, a test. Which rows count, with
which weight, and that every worker divides by the same sums is objective.py's business.

Shape letters: B rows, L logits of one head, M thresholds, G lists or groups, S places of the longest list, Z bins, J
sums.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from trainer.pieces import ColumnText

_BELOW_ALL = -1e9  # a logit that no softmax sees


class Loss(nn.Module):
    """What every loss is. kind: what its predictions are: binary (a probability), regression (a value) or ranking (a
    score without a unit). labels: the least and the most that a label may be. num_logits: L. num_sums: J, 0 where it
    need not know more than its own rows. in_lists: whether it compares the rows of a group. by: a column of the log, or
    an expression, whose values it needs beside the labels: by_B.
    """

    kind: ClassVar[str]
    labels: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    in_lists: ClassVar[bool] = False
    num_logits = 1
    num_sums = 0
    by = ""

    def measure(self, label_B: Tensor, by_B: Tensor) -> Tensor:
        """What the loss must know of all rows, as sums that add up over workers: [J]."""
        return label_B.new_zeros(0)

    def update(self, sum_J: Tensor) -> None:
        """Learn the sums of a global batch."""

    def target(self, label_B: Tensor, by_B: Tensor) -> Tensor:
        """What the logits are held against."""
        return label_B

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        """One number a row: [B]. For a loss in lists both are [G, S], targets NaN where there is no row: [G]."""
        raise NotImplementedError

    def predict(self, logits_BL: Tensor, by_B: Tensor | None = None) -> Tensor:
        """The prediction in the unit of the label: [B]."""
        return logits_BL[:, 0]


class CrossEntropy(Loss):
    """An event that happened or did not."""

    kind = "binary"

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits_BL[:, 0], target_B, reduction="none")

    def predict(self, logits_BL: Tensor, by_B: Tensor | None = None) -> Tensor:
        return torch.sigmoid(logits_BL[:, 0])


class SquaredError(Loss):
    """(prediction - target)^2."""

    kind = "regression"

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        return (logits_BL[:, 0] - target_B).square()


class Huber(Loss):
    """Squared error / 2 up to delta, from there on delta * (absolute error - delta / 2). Source: Huber, 1964."""

    kind = "regression"

    def __init__(self, *, delta: float = 1.0):
        super().__init__()
        if delta <= 0:
            raise ValueError("delta must be above 0")
        self._delta = delta

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        return nn.functional.huber_loss(logits_BL[:, 0], target_B, reduction="none", delta=self._delta)


class WeightedLogistic(Loss):
    """Time as odds: a row with time t > 0 is a positive of weight t, one without is a negative; the prediction is the
    odds e^logit.

    It is the expected time only where positives are rare: with share p of positives it is E[t] / (1 - p). Source:
    Covington, Adams, Sargin: Deep neural networks for YouTube recommendations, RecSys 2016, section 4.2.
    """

    kind = "regression"
    labels = (0.0, math.inf)

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        return torch.where(target_B > 0, target_B * softplus(-logits_BL[:, 0]), softplus(logits_BL[:, 0]))

    def predict(self, logits_BL: Tensor, by_B: Tensor | None = None) -> Tensor:
        return logits_BL[:, 0].clamp(max=60).exp()


class Thresholds(Loss):
    """CREAD: a value by the chances that it passes each of some thresholds, t_0 = 0 < t_1 < ... < t_M: logit m says
    P(y > t_m-1), and the prediction is sum_m P(y > t_m-1) (t_m - t_m-1), exact where y takes these values only.

    Three terms: cross entropy of each threshold; restore times the Huber loss of the prediction; order times how far
    the chance of a threshold passes that of the one below. Source: Sun et al.: CREAD: A classification-restoration
    framework with error adaptive discretization for watch time prediction, AAAI 2024, eq. 5-9.
    """

    kind = "regression"
    labels = (0.0, math.inf)
    width_M: Tensor
    least_M: Tensor

    def __init__(self, *, thresholds: tuple[float, ...] = (), restore: float = 1.0, order: float = 1.0):
        super().__init__()
        edges = torch.tensor([0.0, *thresholds])
        if len(edges) < 2 or (edges.diff() <= 0).any():
            raise ValueError("thresholds must be numbers above 0, each larger than the one before")
        self.num_logits, self._restore, self._order, self._most = len(thresholds), restore, order, float(edges[-1])
        self.register_buffer("width_M", edges.diff(), persistent=False)
        self.register_buffer("least_M", edges[:-1], persistent=False)

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        passed_BM = (target_B.unsqueeze(1) > self.least_M).to(logits_BL.dtype)
        entropy_B = binary_cross_entropy_with_logits(logits_BL, passed_BM, reduction="none").sum(1)
        most_B = target_B.clamp(max=self._most)
        apart_B = nn.functional.huber_loss(self.predict(logits_BL), most_B, reduction="none")
        disorder_B = torch.sigmoid(logits_BL).diff(dim=1).clamp(min=0).sum(1)
        return entropy_B + self._restore * apart_B + self._order * disorder_B

    def predict(self, logits_BL: Tensor, by_B: Tensor | None = None) -> Tensor:
        return torch.sigmoid(logits_BL) @ self.width_M.to(logits_BL.dtype)


class DurationQuantiles(Loss):
    """D2Q: a watch time by its rank among those of items of like length: the head learns the quantile, and the
    prediction is that quantile's time among items of the row's length.

    by: the length. lengths: where one group of lengths ends and the next begins. Times are counted in bins that are
    equally wide in log(1 + t) up to `most`; the counts are of all rows trained on so far. A row of unknown length,
    or of a group that has no rows yet, is among all rows. Source: Zhan et al.: Deconfounding duration bias in
    watch-time prediction for video recommendation, KDD 2022, section 4.
    """

    kind = "regression"
    labels = (0.0, math.inf)
    counts_GZ: Tensor
    lengths: Tensor

    def __init__(
        self, *, by: ColumnText = "", lengths: tuple[float, ...] = (), bins: int = 512, most: float = 86_400.0
    ):
        super().__init__()
        if not by:
            raise ValueError("by must name the column that holds the length")
        self.by, self._bins, self._width = by, bins, math.log1p(most) / bins
        self.register_buffer("lengths", torch.tensor(sorted(lengths), dtype=torch.float64), persistent=False)
        self.register_buffer("counts_GZ", torch.zeros(len(lengths) + 1, bins, dtype=torch.float64))
        self.num_sums = self.counts_GZ.numel()

    def measure(self, label_B: Tensor, by_B: Tensor) -> Tensor:
        known_B = ~(label_B.isnan() | by_B.isnan())
        group_B = torch.bucketize(by_B[known_B].double(), self.lengths, right=True)
        place_B = group_B * self._bins + self._bin(label_B[known_B])
        return torch.bincount(place_B, minlength=self.num_sums).double()

    def update(self, sum_J: Tensor) -> None:
        self.counts_GZ = self.counts_GZ + sum_J.view_as(self.counts_GZ)

    def target(self, label_B: Tensor, by_B: Tensor) -> Tensor:
        """The share of the group's times below, half of its own bin's among them."""
        group_B, bin_B = self._group(by_B), self._bin(label_B.nan_to_num(0.0))
        counts_GZ = self._with_all()
        below_GZ = counts_GZ.cumsum(1) - counts_GZ / 2
        share_B = below_GZ[group_B, bin_B] / counts_GZ.sum(1)[group_B].clamp(min=1)
        return torch.where(label_B.isnan(), torch.nan, share_B.to(label_B.dtype))

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        return (torch.sigmoid(logits_BL[:, 0]) - target_B).square()

    def predict(self, logits_BL: Tensor, by_B: Tensor | None = None) -> Tensor:
        """Between the bins' ends in proportion."""
        assert by_B is not None, "a quantile is of a group of lengths"
        group_B, counts_GZ = self._group(by_B), self._with_all()
        total_GZ = counts_GZ.cumsum(1)
        wanted_B1 = (torch.sigmoid(logits_BL[:, :1].double()) * total_GZ[group_B, -1:]).clamp(min=1e-9)
        bin_B = torch.searchsorted(total_GZ[group_B], wanted_B1)[:, 0].clamp(max=self._bins - 1)
        inside_B = 1 - (total_GZ[group_B, bin_B] - wanted_B1[:, 0]) / counts_GZ[group_B, bin_B].clamp(min=1e-9)
        return torch.expm1((bin_B + inside_B.clamp(0, 1)) * self._width).to(logits_BL.dtype)

    def _with_all(self) -> Tensor:
        """The groups' counts, and behind them those of all rows."""
        return torch.cat([self.counts_GZ, self.counts_GZ.sum(0, keepdim=True)])

    def _group(self, by_B: Tensor) -> Tensor:
        """Each row's group; all rows where its length is not known, or its group has none yet."""
        group_B, everybody = (
            torch.bucketize(by_B.double().nan_to_num(0.0), self.lengths, right=True),
            len(self.counts_GZ),
        )
        return torch.where(by_B.isnan() | (self.counts_GZ.sum(1)[group_B] == 0), everybody, group_B)

    def _bin(self, label_B: Tensor) -> Tensor:
        return (torch.log1p(label_B.double()) / self._width).long().clamp(0, self._bins - 1)


class ListLoss(Loss):
    """Compares the scores of one list with its graded labels. A list in which no label is above another says nothing.
    A list's loss is a mean, so that long lists do not outweigh the others.
    """

    kind = "ranking"
    in_lists = True

    def says(self, target_GS: Tensor) -> Tensor:
        """Which lists have something to say: bool [G]."""
        there_GS = ~target_GS.isnan()
        highest_G = target_GS.where(there_GS, -torch.inf).amax(1)
        return highest_G > target_GS.where(there_GS, torch.inf).amin(1)


class Pairwise(ListLoss):
    """BPR: the mean of -log sigmoid(s_i - s_j) over the list's pairs with y_i > y_j.

    Source: Rendle et al.: BPR: Bayesian personalized ranking from implicit feedback, UAI 2009, section 4; graded labels
    (buy above click above impression) give the pairs.
    """

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        above_GSS = target_B.unsqueeze(2) > target_B.unsqueeze(1)  # NaN is above nothing
        surprise_GSS = softplus(logits_BL.unsqueeze(1) - logits_BL.unsqueeze(2))
        pairs_G = above_GSS.sum((1, 2))
        return (surprise_GSS * above_GSS).sum((1, 2)) / pairs_G.clamp(min=1)


class Softmax(ListLoss):
    """Cross entropy of the softmax of a list's scores and its labels' shares.

    Source: Cao et al.: Learning to rank: from pairwise approach to listwise approach (ListNet), ICML 2007, with labels
    as they are instead of their softmax.
    """

    labels = (0.0, math.inf)

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        there_GS = ~target_B.isnan()
        log_share_GS = logits_BL.masked_fill(~there_GS, _BELOW_ALL).log_softmax(1)
        label_GS = target_B.where(there_GS, 0.0)
        return -(label_GS * log_share_GS).sum(1) / label_GS.sum(1).clamp(min=1e-12)


class ListMle(ListLoss):
    """The Plackett-Luce likelihood of the order of the labels: the mean of log(sum of e^s_j over y_j <= y_i) - s_i over
    the rows whose label is not the list's lowest. Equal labels stand beside each other, as in Breslow's treatment of
    ties; without ties it is ListMLE.

    Source: Xia et al.: Listwise approach to learning to rank: theory and algorithm, ICML 2008.
    """

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        left_GSS = target_B.unsqueeze(1) <= target_B.unsqueeze(2)  # who is still to be placed; NaN never is
        log_sum_GS = logits_BL.unsqueeze(1).masked_fill(~left_GSS, _BELOW_ALL).logsumexp(2)
        lowest_G1 = target_B.where(~target_B.isnan(), torch.inf).amin(1, keepdim=True)
        counts_GS = target_B > lowest_G1
        surprise_GS = (log_sum_GS - logits_BL) * counts_GS
        return surprise_GS.sum(1) / counts_GS.sum(1).clamp(min=1)


class ApproxNdcg(ListLoss):
    """1 - NDCG, with ranks made smooth: 1 + sum over the others of sigmoid((s_j - s_i) / temperature).

    Gains are 2^label - 1: labels are small grades. Source: Qin, Liu, Li: A general approximation framework for direct
    optimization of information retrieval measures, Information Retrieval 13, 2010.
    """

    labels = (0.0, 30.0)

    def __init__(self, *, temperature: float = 0.1):
        super().__init__()
        if temperature <= 0:
            raise ValueError("temperature must be above 0")
        self._temperature = temperature

    def forward(self, logits_BL: Tensor, target_B: Tensor) -> Tensor:
        there_GS = ~target_B.isnan()
        gain_GS = torch.exp2(target_B.where(there_GS, 0.0)) - 1
        passes_GSS = torch.sigmoid((logits_BL.unsqueeze(1) - logits_BL.unsqueeze(2)) / self._temperature)
        rank_GS = 0.5 + (passes_GSS * there_GS.unsqueeze(1)).sum(2)  # one half of it is its own
        best_GS = gain_GS.sort(1, descending=True).values
        place_S = torch.arange(1, gain_GS.shape[1] + 1, device=gain_GS.device, dtype=gain_GS.dtype)
        ideal_G = (best_GS / torch.log2(1 + place_S)).sum(1)
        return 1 - (gain_GS / torch.log2(1 + rank_GS)).sum(1) / ideal_G.clamp(min=1e-12)


LOSSES: dict[str, type[Loss]] = {
    "bce": CrossEntropy,
    "mse": SquaredError,
    "huber": Huber,
    "weighted_logistic": WeightedLogistic,
    "cread": Thresholds,
    "d2q": DurationQuantiles,
    "bpr": Pairwise,
    "softmax": Softmax,
    "listmle": ListMle,
    "approx_ndcg": ApproxNdcg,
}


def lists(group_B: Tensor) -> Tensor:
    """The rows of each group, in their order: [G, S], -1 behind a group's end; S is 1 or more."""
    group_of_B, sizes_G = torch.unique(group_B, return_inverse=True, return_counts=True)[1:]
    order_B = group_of_B.argsort(stable=True)
    first_G = sizes_G.cumsum(0) - sizes_G
    place_S = torch.arange(int(sizes_G.max()) if sizes_G.numel() else 1, device=group_B.device)
    rows_GS = (first_G.unsqueeze(1) + place_S).clamp(max=max(group_B.numel() - 1, 0))
    return torch.where(place_S < sizes_G.unsqueeze(1), order_B[rows_GS], -1)


def in_lists(values_B: Tensor, rows_GS: Tensor, behind: float) -> Tensor:
    """Values of rows as lists: [G, S], `behind` where a list has no row."""
    return torch.where(rows_GS >= 0, values_B[rows_GS.clamp(min=0)], behind)
