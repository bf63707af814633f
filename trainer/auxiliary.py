"""Auxiliary nets: they shape the rows in training, and are no part of what scores or serves.

Each is built from (Layout, **its settings), which name features, and adds losses of its own, each divided by its sum of
weights over all workers. To add one: a class here, a line in AUXILIARIES, a test. Source of both: Ouyang et al.:
Representation learning-assisted click-through rate prediction (DeepMCP), IJCAI 2019.

Shape letters: B rows, I input width, L longest list, P ids of all lists, D their width, N pairs of a window, Q
negatives, M negatives of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from trainer.data import Batch
from trainer.draws import Draws
from trainer.features import Inputs, Layout
from trainer.layers import StackedMlp
from trainer.pieces import EventName, FeatureName, FeatureNames


class Loss(NamedTuple):
    """sum / weight is the loss, both summed over the workers."""

    sum: Tensor
    weight: Tensor


class Auxiliary(nn.Module):
    """What every auxiliary net is. label: the task whose event it learns, or none. weight: what its loss is multiplied
    by. Rows may be compared within a lane's slice of the batch only, so that the number of workers changes nothing.
    """

    label: str
    weight: float

    def forward(self, inputs: Inputs, batch: Batch, label_B: Tensor, weight_B: Tensor, draws: Draws) -> Loss:
        """label_B: of the event that its settings name, NaN where unknown; weight_B: what the rows weigh for it. Of the
        first task, for a net without an event.
        """
        raise NotImplementedError


class TanhTower(nn.Module):
    """ReLU layers, the last one tanh: an inner product of two ReLU outputs could not fall below zero."""

    def __init__(self, input_dim: int, layers: tuple[int, ...]):
        super().__init__()
        if not layers:
            raise ValueError("layers: a tower needs at least one")
        self.hidden = StackedMlp(1, input_dim, layers[:-1])
        self.last = nn.Linear(self.hidden.output_dim, layers[-1])

    def forward(self, x_BI: Tensor) -> Tensor:
        return torch.tanh(self.last(self.hidden(x_BI.unsqueeze(0))[0]))


class Matching(Auxiliary):
    """Does this user take this item? Two towers, whose inner product is the logit of an event. Section 3.3."""

    def __init__(
        self,
        layout: Layout,
        *,
        user: FeatureNames = (),
        item: FeatureNames = (),
        label: EventName = "",
        layers: tuple[int, ...] = (64, 32),
        weight: float = 1.0,
    ):
        super().__init__()
        self._user, self._item = layout.columns_of(user), layout.columns_of(item)
        if not self._user or not self._item:
            raise ValueError("user and item must each name at least one feature")
        if not label:
            raise ValueError("label must name the event that is learnt")
        self.label, self.weight = label, weight
        self.user, self.item = TanhTower(len(self._user), layers), TanhTower(len(self._item), layers)

    def forward(self, inputs: Inputs, batch: Batch, label_B: Tensor, weight_B: Tensor, draws: Draws) -> Loss:
        logit_B = (self.user(inputs.x_BI[:, self._user]) * self.item(inputs.x_BI[:, self._item])).sum(1).float()
        weight_B = weight_B * ~label_B.isnan()
        surprise_B = softplus(torch.where(label_B == 1, -logit_B, logit_B))
        return Loss((surprise_B * weight_B).sum(), weight_B.sum())


class Correlation(Auxiliary):
    """Ids that stand near each other in a user's behaviour are alike; ids drawn by chance are not: skip-gram with
    negatives, one tower for all of them. Section 3.4.

    sequence: a list feature with pool: none. window: how far apart two of its ids may stand. negatives: how many ids
    are drawn for each id, and stand against each of its pairs, from all that stand in such lists in the lane's slice of
    the batch, each as often as it stands there; one that is in the window itself does not count.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        sequence: FeatureName = "",
        window: int = 2,
        negatives: int = 4,
        layers: tuple[int, ...] = (64, 32),
        weight: float = 0.1,
    ):
        super().__init__()
        self._sequence, self._window, self._negatives = sequence, window, negatives
        self.label, self.weight = "", weight
        self.tower = TanhTower(layout.list_dim(sequence), layers)

    def forward(self, inputs: Inputs, batch: Batch, label_B: Tensor, weight_B: Tensor, draws: Draws) -> Loss:
        assert batch.lane_B is not None, "read from a log"
        rows_BLD, there_BL = inputs.lists[self._sequence]
        row_P = there_BL.nonzero()[:, 0]
        target_N, context_N = map(torch.cat, zip(*window_pairs(row_P, self._window), strict=True))
        drawn_BM = draws.uniform("negatives", there_BL.shape[1] * self._negatives)
        drawn_BLQ = drawn_BM.unflatten(1, (-1, self._negatives))
        other_PQ = self.others(batch.row_B[row_P], batch.lane_B[row_P], drawn_BLQ[there_BL])
        ids = batch.ids[self._sequence]
        id_P = ids.values_N[there_BL.any(1).repeat_interleave(ids.lengths_B)]
        assert id_P.numel() == row_P.numel(), "the log cuts lists at their longest"
        apart_PQ = ~self.near(row_P, id_P, other_PQ)
        vector_PD = self.tower(rows_BLD[there_BL]).float()
        near_N = (vector_PD[target_N] * vector_PD[context_N]).sum(1)
        far_PQ = (vector_PD.unsqueeze(1) * vector_PD[other_PQ]).sum(2)  # no matrix product: autocast would round it
        far_P = (softplus(far_PQ) * apart_PQ).sum(1)
        return Loss(softplus(-near_N).sum() + far_P[target_N].sum(), near_N.new_tensor(float(target_N.numel())))

    def others(self, row_P: Tensor, lane_P: Tensor, drawn_PQ: Tensor) -> Tensor:
        """For each id some that are drawn from its lane's slice, whatever the order in which lanes and rows come."""
        order_P = row_P.argsort(stable=True)
        order_P = order_P[lane_P[order_P].argsort(stable=True)]
        lane, which_P, count = lane_P.unique(return_inverse=True, return_counts=True)
        first = count.cumsum(0) - count
        place_PQ = (drawn_PQ * count[which_P].unsqueeze(1)).long()
        return order_P[first[which_P].unsqueeze(1) + torch.minimum(place_PQ, count[which_P].unsqueeze(1) - 1)]

    def near(self, row_P: Tensor, id_P: Tensor, other_PQ: Tensor) -> Tensor:
        """Which of the others are the same id as one in the window: [P, Q]."""
        near_PQ = id_P[other_PQ] == id_P.unsqueeze(1)
        for target, context in window_pairs(row_P, self._window):
            near_PQ[target] |= id_P[other_PQ[target]] == id_P[context].unsqueeze(1)
        return near_PQ


def window_pairs(row_P: Tensor, window: int) -> list[tuple[Tensor, Tensor]]:
    """Every id with each one of its row that stands at most `window` places away; for each distance and direction the
    first ids and the second. row_P: the row of each id; the ids of a row stand side by side.
    """
    pairs = []
    for apart in range(1, window + 1):
        earlier = (row_P[apart:] == row_P[:-apart]).nonzero()[:, 0]
        pairs += [(earlier, earlier + apart), (earlier + apart, earlier)]
    return pairs


AUXILIARIES: dict[str, type[Auxiliary]] = {"matching": Matching, "correlation": Correlation}
