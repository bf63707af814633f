"""Towers: from what the body shares to the heads' logits, and how one head's tower feeds another's.

Shape letters: B rows, T heads, H width of a tower's input and output, L logits of all heads side by side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.layers import StackedLinear, StackedMlp


@dataclass(frozen=True)
class Head:
    """num_logits: as many as its loss and its place in the graph need. biased: whether a constant means anything; where
    it does not, its gradient is rounding alone, and Adam would take steps after that.

    Other heads, by their places: links, whose hidden features its own tower also reads; transfer, from which
    information is passed on; cascade, whose logit its own adds to.
    """

    num_logits: int = 1
    biased: bool = True
    links: tuple[int, ...] = ()
    transfer: int | None = None
    cascade: int | None = None

    @property
    def parents(self) -> tuple[int, ...]:
        return tuple(head for head in (*self.links, self.transfer, self.cascade) if head is not None)


def parents_first(parents: Sequence[Sequence[int]]) -> list[int]:
    """The heads in an order in which each comes after those that it reads. ValueError for a circle."""
    order: list[int] = []

    def visit(head: int, path: tuple[int, ...]) -> None:
        if head in path:
            raise ValueError("the heads read each other in a circle")
        if head not in order:
            for parent in parents[head]:
                visit(parent, (*path, head))
            order.append(head)

    for head in range(len(parents)):
        visit(head, ())
    return order


class Relation(nn.Module):
    """A head's features from its own tower's and its parents': ReLU(W [own, parents] + b).

    Parents' hidden features are passed on, not their labels: nothing leaks at serving. Source: Wang et al.: Deep
    Bayesian multi-target learning for recommender systems (DBMTL), 2019, arXiv 1902.09154.
    """

    def __init__(self, num_parents: int, width: int):
        super().__init__()
        self.linear = nn.Linear((1 + num_parents) * width, width)

    def forward(self, own_BH: Tensor, parents: Sequence[Tensor]) -> Tensor:
        return torch.relu(self.linear(torch.cat([own_BH, *parents], dim=1)))


class Transfer(nn.Module):
    """A head's features as an attention over its own tower's and what an earlier one passes on.

    Source: Xi et al.: Modeling the sequential dependence among audience multi-step conversions (AITM), KDD 2021,
    eq. 5-8.
    """

    def __init__(self, width: int):
        super().__init__()
        self.info = nn.Linear(width, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, own_BH: Tensor, earlier_BH: Tensor) -> Tensor:
        both_B2H = torch.stack([torch.relu(self.info(earlier_BH)), own_BH], dim=1)
        weight_B2 = (self.query(both_B2H) * self.key(both_B2H)).sum(2) / math.sqrt(own_BH.shape[1])
        return torch.einsum("bs,bsh->bh", weight_B2.softmax(1), self.value(both_B2H))


class Towers(nn.Module):
    """A tower for each head, all side by side; then, parents first, what heads take from each other."""

    biased_L11: Tensor

    def __init__(self, heads: Sequence[Head], input_dim: int, layers: tuple[int, ...]):
        super().__init__()
        self.heads = tuple(heads)
        self.towers = StackedMlp(len(heads), input_dim, layers)
        width = self.towers.output_dim
        self.relations = nn.ModuleDict({str(h): Relation(len(x.links), width) for h, x in enumerate(heads) if x.links})
        self.transfers = nn.ModuleDict({str(h): Transfer(width) for h, x in enumerate(heads) if x.transfer is not None})
        self.out = StackedLinear(sum(head.num_logits for head in heads), width, 1)
        self._head_of_L = [h for h, head in enumerate(heads) for _ in range(head.num_logits)]
        biased_L = torch.tensor([float(heads[h].biased) for h in self._head_of_L])
        self.register_buffer("biased_L11", biased_L.view(-1, 1, 1), persistent=False)
        self._first = [self._head_of_L.index(h) for h in range(len(heads))]
        self.num_logits = len(self._head_of_L)
        self._order = parents_first([head.parents for head in heads])

    def forward(self, h_TBH: Tensor) -> Tensor:
        """The heads' logits side by side: [B, L], float32."""
        hidden_TBH = self._related(self.towers(h_TBH))
        if self.num_logits > len(self.heads):
            hidden_TBH = hidden_TBH[self._head_of_L]
        logits_LB1 = torch.baddbmm(self.out.bias * self.biased_L11, hidden_TBH, self.out.weight)
        return self._cascaded(logits_LB1.squeeze(2).T.float())

    def _related(self, hidden_TBH: Tensor) -> Tensor:
        if not self.relations and not self.transfers:
            return hidden_TBH
        made = list(hidden_TBH)
        for h in self._order:
            head = self.heads[h]
            if head.transfer is not None:
                made[h] = self.transfers[str(h)](made[h], made[head.transfer])
            if head.links:
                made[h] = self.relations[str(h)](made[h], [made[parent] for parent in head.links])
        return torch.stack([each.to(made[0].dtype) for each in made])

    def _cascaded(self, logits_BL: Tensor) -> Tensor:
        """A head in a cascade learns what its logit adds to its parent's. Source: Gao et al.: Neural multi-task
        recommendation from multi-behavior data (NMTR), ICDE 2019, eq. 5.
        """
        if all(head.cascade is None for head in self.heads):
            return logits_BL
        columns = list(logits_BL.unbind(1))
        for h in self._order:
            parent = self.heads[h].cascade
            if parent is not None:
                columns[self._first[h]] = columns[self._first[h]] + columns[self._first[parent]]
        return torch.stack(columns, dim=1)
