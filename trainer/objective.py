"""The objective: which rows each task's loss counts, with which weight, divided by sums over the global batch.

A task's loss is sum(weight * loss) / sum(weight) over the rows of its space, both sums over all workers: a worker's
part of it is the local sum over the global one, so the parts add up to the single-process loss (and the gradients to
its gradient). Every loss is a sum of such terms.

A `given` task is learnt over every row, but its label can be null only where the parent happened. Leaving those rows
out would make "did not happen" look more frequent than it is, so the rows whose label is known stand in for them: their
weight is multiplied by (rows where the parent happened) / (those with a label). Along a chain (click, cart, buy) the
weights multiply: where it is not known whether the cart happened, nothing is known of the purchase either. Likewise,
where a log has kept only some of the rows without the parent, these stand in for the others.

Shape letters: B rows, T tasks, M terms, G lists, S places of the longest list.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trainer.heads import Event, Nodes, Task, TaskGraph
from trainer.losses import ListLoss, in_lists, lists


class Term(NamedTuple):
    """A part of a task's loss: factor * sum / weight, both summed over the workers. sum is what is learnt from."""

    task: int
    sum: Tensor
    weight: Tensor
    factor: float = 1.0


def known_rows(graph: TaskGraph, labels_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Sums of weights that add up over the workers: [2, T], rows where the parent happened, those of them with a
    target.
    """
    known_BT = (~graph.targets(labels_BT).isnan()).double()
    happened_BT = torch.stack([graph.happened(name, labels_BT) == 1 for name in graph.tasks], dim=1).double()
    weights_BT = weights_BT[:, : len(graph.tasks)].double()
    return torch.stack([(weights_BT * rows).sum(0) for rows in (happened_BT, happened_BT * known_BT)])


class Objective:
    """The terms of all tasks' losses on one worker's share of a batch. known_2T: known_rows over all workers.
    groups_B: what makes lists of rows, where a loss wants them.
    """

    def __init__(
        self,
        graph: TaskGraph,
        nodes: Nodes,
        labels_BT: Tensor,
        weights_BT: Tensor,
        known_2T: Tensor,
        groups_B: Tensor | None = None,
    ):
        self._graph, self._nodes, self._labels_BT, self._groups_B = graph, nodes, labels_BT, groups_B
        self._weights_BT, self._targets_BT = weights_BT, graph.targets(labels_BT)
        happened_T, answered_T = known_2T
        self._stand_in_T = torch.where(answered_T > 0, happened_T / answered_T.clamp(min=1e-30), 1.0).float()

    def terms(self) -> list[Term]:
        return [term for t, name in enumerate(self._graph.tasks) for term in self._of_task(t, name)]

    def _of_task(self, t: int, name: str) -> Iterator[Term]:
        task = self._graph.tasks[name]
        known_B = ~self._targets_BT[:, t].isnan()
        target_B = torch.where(known_B, self._targets_BT[:, t], 0.0)
        weight_B = self._weight(t, name, known_B)
        if isinstance(task.loss, ListLoss):
            yield self._of_lists(t, task.loss, self._score(name, task), self._targets_BT[:, t], weight_B)
        elif task.binary:
            event = self._event(name, task)
            product = task.propensity.product if task.propensity else 1.0
            surprise_B = torch.where(target_B == 1, *_surprises(event, task.shift))
            yield _term(t, surprise_B, weight_B * torch.where(target_B == 1, task.positive_weight, 1.0), product)
        else:
            by_B = self._graph.by_column(name, self._labels_BT)
            yield _term(t, task.loss(self._logits(name, task), task.loss.target(target_B, by_B)), weight_B)
        if task.propensity:
            yield from self._debiased(t, name, task, weight_B, target_B)
        if task.transfer and task.calibrator:
            later, earlier = (self._nodes.whole[node].log_p_B.exp() for node in (name, task.transfer))
            yield _term(t, (later - earlier).clamp(min=0), weight_B, task.calibrator)

    def _weight(self, t: int, name: str, known_B: Tensor) -> Tensor:
        """Zero where there is no target; rows with a label stand in for those without, rows without the parent for
        those that the log has not kept.
        """
        graph, weight_B = self._graph, self._weights_BT[:, t] * known_B
        column = {event: t for t, event in enumerate(graph.tasks)}
        for event in graph.chain(name):
            happened_B = graph.happened(event, self._labels_BT) == 1
            weight_B = weight_B * torch.where(happened_B, self._stand_in_T[column[event]], 1.0)
        if graph.tasks[name].loss.in_lists:
            return weight_B
        for event in graph.chain(self._node(name, graph.tasks[name])[0])[1:]:
            missed_B = self._targets_BT[:, column[event]] == 0
            weight_B = weight_B * torch.where(missed_B, 1 / graph.tasks[event].negatives_kept, 1.0)
        return weight_B

    def _node(self, name: str, task: Task) -> tuple[str, str]:
        """The head and the space on which a task's loss is measured."""
        if task.head is None:
            return name, "all"
        head, _, space = task.head.partition("@")
        return head, space

    def _event(self, name: str, task: Task) -> Event:
        head, space = self._node(name, task)
        return (self._nodes.whole if space == "all" else self._nodes.conditional)[head]

    def _logits(self, name: str, task: Task) -> Tensor:
        return self._nodes.logits[self._node(name, task)[0]]

    def _score(self, name: str, task: Task) -> Tensor:
        if self._graph.tasks[self._node(name, task)[0]].binary:
            return self._event(name, task).logit_B
        return self._logits(name, task)[:, 0]

    def _of_lists(self, t: int, loss: ListLoss, score_B: Tensor, target_B: Tensor, weight_B: Tensor) -> Term:
        """A list weighs what its rows with a target weigh on average."""
        assert self._groups_B is not None, "a loss in lists needs groups: the configuration is checked for it"
        rows_GS = lists(self._groups_B)
        target_GS = in_lists(target_B, rows_GS, torch.nan)
        there_GS = ~target_GS.isnan()
        weight_G = (in_lists(weight_B, rows_GS, 0.0) * there_GS).sum(1) / there_GS.sum(1).clamp(min=1)
        return _term(t, loss(in_lists(score_B, rows_GS, 0.0), target_GS), weight_G * loss.says(target_GS))

    def _debiased(self, t: int, name: str, task: Task, weight_B: Tensor, target_B: Tensor) -> Iterator[Term]:
        """ESCM2's losses of a conditional: rows where the parent happened, over the parent's probability; with a second
        head also what it imputes everywhere, right on average if either of the two is right.
        """
        assert task.propensity and task.given
        happened_B = self._graph.happened(name, self._labels_BT) == 1
        chance_B = self._nodes.whole[task.given].log_p_B.detach().exp().clamp(min=task.propensity.least)
        weight_of_happened_B = weight_B * happened_B / chance_B
        if_so_B, if_not_B = _surprises(self._nodes.conditional[name], task.shift)
        if_so_B = task.positive_weight * if_so_B
        loss_B = torch.where(target_B == 1, if_so_B, if_not_B)
        if not task.propensity.doubly_robust:
            yield _term(t, loss_B, weight_of_happened_B)
            return
        imputed_B = torch.sigmoid(self._nodes.logits[name][:, -1])
        expected_B = torch.lerp(if_not_B, if_so_B, imputed_B.detach())
        everywhere = (weight_B * expected_B).sum() + (weight_of_happened_B * (loss_B - expected_B)).sum()
        yield Term(t, everywhere, weight_B.sum())
        guess_B = torch.lerp(if_not_B.detach(), if_so_B.detach(), imputed_B)
        missed = (weight_of_happened_B * (loss_B.detach() - guess_B).square()).sum()
        yield Term(t, missed, weight_B.sum())


def _term(t: int, loss_B: Tensor, weight_B: Tensor, factor: float = 1.0) -> Term:
    return Term(t, (weight_B * loss_B).sum(), weight_B.sum(), factor)


def _surprises(event: Event, shift: float) -> tuple[Tensor, Tensor]:
    """-log of the probability that it happens, and that it does not. shift: by how much its log-odds are higher in what
    is learnt from.
    """
    if shift == 0:
        return -event.log_p_B, -event.log_not_B
    logit_B = event.logit_B + shift
    return softplus(-logit_B), softplus(logit_B)


def shares_of_losses(terms: list[Term], weight_M: Tensor) -> Tensor:
    """How much of each term's sum is in each task's loss: [T, M]. weight_M: the terms' weights over all workers."""
    share_TM = weight_M.new_zeros(1 + max(term.task for term in terms), len(terms))
    for m, term in enumerate(terms):
        share_TM[term.task, m] = term.factor / weight_M[m].clamp(min=1e-30)
    return share_TM
