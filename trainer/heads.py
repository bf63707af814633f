"""Heads as one probability graph: each task's logit is conditional, events are composed from them in log space.

A task stands alone, hangs on another event by `given` (its probability multiplies the parent's: ESMM's product, learnt
over every row), or is masked by `where` (learnt on the rows where that event happened). A prediction has an address,
task@space: has_next@click is the conditional on clicked rows, has_next@all the product on every row.

Source of the product: Ma et al.: Entire space multi-task model, SIGIR 2018, eq. 2 and 4. Shape letters: B rows, T
tasks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Task:
    """binary: an event with probability sigmoid(logit); else a regression on transform(scale * label). given, where:
    another task.
    """

    binary: bool = True
    given: str | None = None
    where: str | None = None
    log1p: bool = False
    scale: float = 1.0

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

    def then(self, conditional: "Event") -> "Event":
        """This happens and then that: p = p1 * p2, 1 - p = (1 - p1) + p1 * (1 - p2).

        The sum loses 1 - p where p is small, log1p(-p) where p is near 1: each serves its half. The clamp keeps the
        gradient of the half that is not taken finite.
        """
        log_p_B = self.log_p_B + conditional.log_p_B
        of_rare_B = torch.log1p(-log_p_B.clamp(max=-math.log(2)).exp())
        of_likely_B = torch.logaddexp(self.log_not_B, self.log_p_B + conditional.log_not_B)
        return Event(log_p_B, torch.where(log_p_B < -math.log(2), of_rare_B, of_likely_B))


class TaskGraph:
    """The tasks in order, and how their probabilities compose."""

    def __init__(self, tasks: Mapping[str, Task]):
        self.tasks = dict(tasks)
        self._column = {name: i for i, name in enumerate(tasks)}

    def events(self, logits_BT: Tensor) -> dict[str, Event]:
        """Each binary task's event over every row: a `given` task's is the product along its chain."""
        events: dict[str, Event] = {}
        for name in self._parents_first():
            task, conditional = self.tasks[name], Event.of(logits_BT[:, self._column[name]])
            events[name] = events[task.given].then(conditional) if task.given else conditional
        return events

    def _parents_first(self) -> list[str]:
        binary = [name for name, task in self.tasks.items() if task.binary]
        return sorted(binary, key=lambda name: len(self.chain(name)))

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
        hangs on none.
        """
        parent = self.tasks[name].given or self.tasks[name].where
        return torch.ones_like(labels_BT[:, 0]) if parent is None else self._target(parent, labels_BT)

    @property
    def addresses(self) -> dict[str, str]:
        """Every prediction's address, task@space, and its kind: binary or regression."""
        found = {}
        for name, task in self.tasks.items():
            kind = "binary" if task.binary else "regression"
            if task.given or task.where:
                found[f"{name}@{task.given or task.where}"] = kind
            if not task.where:
                found[f"{name}@all"] = kind
        return found

    def predictions(self, logits_BT: Tensor) -> dict[str, Tensor]:
        """By address: probabilities, or a regression's value as its target is transformed."""
        events, found = self.events(logits_BT), {}
        for address, kind in self.addresses.items():
            name, space = address.split("@")
            logit_B = logits_BT[:, self._column[name]]
            conditional_B = logit_B if kind == "regression" else torch.sigmoid(logit_B)
            found[address] = events[name].log_p_B.exp() if space == "all" and kind == "binary" else conditional_B
        return found

    def answers(self, labels_BT: Tensor) -> dict[str, Tensor]:
        """By address: what the prediction is compared with, NaN outside its space."""
        targets_BT, found = self.targets(labels_BT), {}
        for address in self.addresses:
            name, space = address.split("@")
            target_B = targets_BT[:, self._column[name]]
            in_space = torch.ones_like(target_B) if space == "all" else self.happened(name, labels_BT)
            found[address] = torch.where(in_space == 1, target_B, torch.nan)
        return found
