"""Heads as one probability graph: each head's logit is conditional, events are composed from them in log space.

A task stands alone, hangs on another event by `given` (its probability multiplies the parent's, learnt over every row:
ESMM), goes on from there `via` a third (total probability: ESM2), or is masked by `where` (learnt on the rows where
that event happened). A prediction has an address, task@space: has_next@click is the conditional on clicked rows,
has_next@all the product on every row.

Sources: Ma et al.: Entire space multi-task model, SIGIR 2018, eq. 2 and 4; Wen et al.: Entire space multi-task modeling
via post-click behavior decomposition, SIGIR 2020, eq. 3-6. Shape letters: B rows, T tasks, L logits of all heads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.losses import CrossEntropy, Loss
from trainer.towers import Head


@dataclass(frozen=True)
class Propensity:
    """A conditional is learnt from rows that were not chosen at random: those where the parent happened. Weigh each by
    one over the parent's probability, which is at least `least`.

    doubly_robust: beside it a second head imputes the loss where the parent did not happen. product: the weight of the
    loss over every row, which stays. Source: Wang et al.: ESCM2: Entire space counterfactual multi-task model, SIGIR
    2022, eq. 8-14.
    """

    doubly_robust: bool = False
    least: float = 0.02
    product: float = 0.1


@dataclass(frozen=True)
class Task:
    """given, where, via: other tasks' events. head: another prediction's address, whose head this task's loss uses
    instead of one of its own. links, transfer, cascade: other tasks whose towers or logits its own builds on (see
    towers.py); calibrator: how much a probability above that of the task it transfers from costs.

    log1p, scale: a regression's target is log1p(scale * label). positive_weight: what a label 1 weighs more;
    negatives_kept: the share of the rows with label 0 that the log still has. Both are taken back: predictions are
    probabilities as if neither had been done.
    """

    loss: Loss = field(default_factory=CrossEntropy)
    given: str | None = None
    where: str | None = None
    via: str | None = None
    head: str | None = None
    links: tuple[str, ...] = ()
    transfer: str | None = None
    cascade: str | None = None
    calibrator: float = 0.0
    propensity: Propensity | None = None
    log1p: bool = False
    scale: float = 1.0
    positive_weight: float = 1.0
    negatives_kept: float = 1.0

    @property
    def binary(self) -> bool:
        return self.loss.kind == "binary"

    @property
    def num_logits(self) -> int:
        """Its loss's; one more where it goes two ways; one more for what it imputes."""
        return self.loss.num_logits + bool(self.via) + bool(self.propensity and self.propensity.doubly_robust)

    @property
    def shift(self) -> float:
        """By how much weighting and down-sampling raised the log-odds of what is learnt from."""
        return math.log(self.positive_weight / self.negatives_kept)

    def to_target(self, label_B: Tensor) -> Tensor:
        """The label as the loss and the metrics see it."""
        scaled = label_B * self.scale
        return torch.log1p(scaled) if self.log1p else scaled

    def to_label(self, prediction_B: Tensor) -> Tensor:
        """A prediction in the unit of the label."""
        return (torch.expm1(prediction_B) if self.log1p else prediction_B) / self.scale


@dataclass(frozen=True)
class Event:
    """The log-probability that something happens, and that it does not: both exact where the other is near 0."""

    log_p_B: Tensor
    log_not_B: Tensor

    @staticmethod
    def of(logit_B: Tensor) -> "Event":
        return Event(logsigmoid(logit_B), logsigmoid(-logit_B))

    @property
    def logit_B(self) -> Tensor:
        return self.log_p_B - self.log_not_B

    def then(self, conditional: "Event") -> "Event":
        """This happens and then that: p = p1 * p2, 1 - p = (1 - p1) + p1 * (1 - p2).

        The sum loses 1 - p where p is small, log1p(-p) where p is near 1: each serves its half.
        """
        log_p_B = self.log_p_B + conditional.log_p_B
        of_likely_B = torch.logaddexp(self.log_not_B, self.log_p_B + conditional.log_not_B)
        return Event(log_p_B, torch.where(log_p_B < -math.log(2), _log_not(log_p_B), of_likely_B))

    def either(self, if_so: "Event", if_not: "Event") -> "Event":
        """What follows on this, or on its absence: p = p1 * p2 + (1 - p1) * p3; 1 - p likewise. A sum near 1 has lost
        its logarithm, which then comes from the other one.
        """
        log_p_B = torch.logaddexp(self.log_p_B + if_so.log_p_B, self.log_not_B + if_not.log_p_B)
        log_not_B = torch.logaddexp(self.log_p_B + if_so.log_not_B, self.log_not_B + if_not.log_not_B)
        likely_B = log_p_B > log_not_B
        return Event(
            torch.where(likely_B, _log_not(log_not_B), log_p_B), torch.where(likely_B, log_not_B, _log_not(log_p_B))
        )


def _log_not(log_p_B: Tensor) -> Tensor:
    """log(1 - p) for p up to 1/2; the clamp keeps the gradient finite where it is not taken."""
    return torch.log1p(-log_p_B.clamp(max=-math.log(2)).exp())


@dataclass(frozen=True)
class Nodes:
    """What the graph makes of a batch's logits. logits: by task its head's [B, L]. conditional: by binary task its
    event where its parent happened; whole: its event on every row.
    """

    logits: Mapping[str, Tensor]
    conditional: Mapping[str, Event]
    whole: Mapping[str, Event]


class TaskGraph:
    """The tasks in order, and how their probabilities compose. Labels come as [B, T]; behind the tasks' own stand the
    columns of `by`: by name what some losses need beside their labels.

    shown: tasks that only happen on a row that is looked at, which is a chance of its own (PAL: Guo et al.:
    Position-bias aware learning framework, RecSys 2019, eq. 2).
    """

    def __init__(self, tasks: Mapping[str, Task], shown: Sequence[str] = ()):
        self.tasks, self._shown = dict(tasks), list(shown)
        self._column = {name: i for i, name in enumerate(tasks)}
        self.with_head = [name for name, task in tasks.items() if task.head is None]
        self._measuring = {name: task for name, task in tasks.items() if task.loss.num_sums}
        self.by = {f"{name} by": task.loss.by for name, task in tasks.items() if task.loss.by}
        self._column |= {name: len(tasks) + i for i, name in enumerate(self.by)}

    def to(self, device: torch.device) -> "TaskGraph":
        """With the losses' tensors on a device."""
        for task in self.tasks.values():
            task.loss.to(device)
        return self

    def by_column(self, name: str, labels_BT: Tensor) -> Tensor:
        """What a task's loss needs beside its label; NaN when nothing."""
        by = f"{name} by"
        return labels_BT[:, self._column[by]] if by in self.by else labels_BT.new_full(labels_BT.shape[:1], torch.nan)

    def measure(self, labels_BT: Tensor) -> Tensor:
        """What the losses must know of all rows, as sums that add up over workers: [J]."""
        found = [
            task.loss.measure(self._target(name, labels_BT), self.by_column(name, labels_BT))
            for name, task in self._measuring.items()
        ]
        return torch.cat([labels_BT.new_zeros(0), *found])

    def update(self, sum_J: Tensor) -> None:
        """Hand the sums of a global batch to the losses."""
        losses = [task.loss for task in self._measuring.values()]
        for loss, mine_J in zip(losses, sum_J.split([loss.num_sums for loss in losses]), strict=True):
            loss.update(mine_J)

    def places(self, name: str) -> list[int]:
        """Where a task's logits stand among all."""
        sizes = [self.tasks[head].num_logits for head in self.with_head]
        head = self.with_head.index(name)
        return list(range(sum(sizes[:head]), sum(sizes[: head + 1])))

    @property
    def heads(self) -> list[Head]:
        """What the dense net must have for the tasks with a head, in their order."""
        place = {name: head for head, name in enumerate(self.with_head)}
        return [
            Head(
                task.num_logits,
                task.loss.kind != "ranking",
                tuple(place[link] for link in task.links),
                None if task.transfer is None else place[task.transfer],
                None if task.cascade is None else place[task.cascade],
            )
            for task in (self.tasks[name] for name in self.with_head)
        ]

    def nodes(self, logits_BL: Tensor, shown_BP: Tensor | None = None) -> Nodes:
        """The events over every row: a `given` task's is the product along its chain. shown_BP: the logits that a row
        is looked at, for each of the tasks that need it; None: as if every row were.
        """
        sizes = [self.tasks[name].num_logits for name in self.with_head]
        logits = dict(zip(self.with_head, logits_BL.split(sizes, dim=1), strict=True))
        conditional: dict[str, Event] = {}
        whole: dict[str, Event] = {}
        for name in self._parents_first():
            task = self.tasks[name]
            event = Event.of(logits[name][:, 0])
            if task.via:
                event = conditional[task.via].either(event, Event.of(logits[name][:, 1]))
            if shown_BP is not None and name in self._shown:
                event = Event.of(shown_BP[:, self._shown.index(name)]).then(event)
            conditional[name] = event
            whole[name] = whole[task.given].then(event) if task.given else event
        return Nodes(logits, conditional, whole)

    def _parents_first(self) -> list[str]:
        return sorted((name for name in self.with_head if self.tasks[name].binary), key=self._depth)

    def _depth(self, name: str) -> int:
        """The length of the longest path to it: a via may itself go via another."""
        before = [parent for parent in (self.tasks[name].given, self.tasks[name].via) if parent]
        return 1 + max((self._depth(parent) for parent in before), default=0)

    def chain(self, name: str) -> list[str]:
        """The task and the events that it is given, the nearest first."""
        parent = self.tasks[name].given
        return [name] if parent is None else [name, *self.chain(parent)]

    def targets(self, labels_BT: Tensor) -> Tensor:
        """What each task's loss is measured against: [B, T], NaN where it is not defined.

        given: 0 where the parent did not happen, else the label. where: the label on the rows where that event
        happened.
        """
        columns = [self._target(name, labels_BT) for name in self.tasks]
        return torch.stack(columns, dim=1)

    def _target(self, name: str, labels_BT: Tensor) -> Tensor:
        task, target_B = self.tasks[name], self.tasks[name].to_target(labels_BT[:, self._column[name]])
        happened_B = self.happened(name, labels_BT)
        if task.given:
            return torch.where(happened_B == 0, 0.0, torch.where(happened_B == 1, target_B, torch.nan))
        return torch.where(happened_B == 1, target_B, torch.nan)

    def happened(self, name: str, labels_BT: Tensor) -> Tensor:
        """Whether the event that a task hangs on happened: 1, 0, or NaN where unknown; 1 everywhere for a task that
        hangs on none. A loss on a conditional (buy@click) hangs on the event of that space.
        """
        task = self.tasks[name]
        space = task.head.partition("@")[2] if task.head else "all"
        parent = task.given or task.where or (None if space == "all" else space)
        return torch.ones_like(labels_BT[:, 0]) if parent is None else self._target(parent, labels_BT)

    @property
    def addresses(self) -> dict[str, str]:
        """Every prediction's address, task@space, and its kind: binary, regression or ranking."""
        found = {}
        for name in self.with_head:
            task = self.tasks[name]
            for space in (task.given or task.where, task.via, None if task.where else "all"):
                if space:
                    found[f"{name}@{space}"] = task.loss.kind
        return found

    def predictions(self, logits_BL: Tensor, labels_BT: Tensor | None = None) -> dict[str, Tensor]:
        """By address: probabilities, scores, or a regression's value as its target is transformed. labels_BT: needed
        where there is a column behind the labels (`by`); nothing else of it is read.
        """
        nodes = self.nodes(logits_BL)
        return {address: self._prediction(nodes, labels_BT, *address.split("@")) for address in self.addresses}

    def _prediction(self, nodes: Nodes, labels_BT: Tensor | None, name: str, space: str) -> Tensor:
        task = self.tasks[name]
        if not task.binary:
            by_B = None if labels_BT is None else self.by_column(name, labels_BT)
            return task.loss.predict(nodes.logits[name], by_B)
        if space == "all":
            return nodes.whole[name].log_p_B.exp()
        if space == task.via or not task.via:
            return torch.sigmoid(nodes.logits[name][:, 0])
        return nodes.conditional[name].log_p_B.exp()

    def answers(self, labels_BT: Tensor) -> dict[str, Tensor]:
        """By address: what the prediction is compared with, NaN outside its space."""
        targets_BT, found = self.targets(labels_BT), {}
        for address in self.addresses:
            name, space = address.split("@")
            target_B = targets_BT[:, self._column[name]]
            if space == "all":
                in_space = torch.ones_like(target_B)
            elif space == self.tasks[name].via:
                in_space = self._target(space, labels_BT)
            else:
                in_space = self.happened(name, labels_BT)
            found[address] = torch.where(in_space == 1, target_B, torch.nan)
        return found
