"""Losses of the tasks: masked, weighted, with denominators over the global batch.

A task's loss is sum(weight * loss) / sum(weight) over the rows of its space, both sums over all workers: a worker's
part of it is the local sum over the global denominator, so the parts add up to the single-process loss (and the
gradients to its gradient).

A `given` task is learnt over every row, but its label can be null only where the parent happened. Leaving those rows
out would make "did not happen" look more frequent than it is, so the rows whose label is known stand in for them: their
weight is multiplied by (rows where the parent happened) / (those with a label). Along a chain (click, cart, buy) the
weights multiply: where it is not known whether the cart happened, nothing is known of the purchase either.

Shape letters: B rows, T tasks.
"""

import torch
from torch import Tensor

from trainer.heads import TaskGraph


def denominators(graph: TaskGraph, labels_BT: Tensor, weights_B: Tensor) -> Tensor:
    """Sums of weights that add up over the workers: [2, T], rows where the parent happened, those of them with a
    target.
    """
    known_BT = (~graph.targets(labels_BT).isnan()).double()
    happened_BT = torch.stack([graph.happened(name, labels_BT) == 1 for name in graph.tasks], dim=1).double()
    weights_B1 = weights_B.double().unsqueeze(1)
    return torch.stack([(weights_B1 * rows).sum(0) for rows in (happened_BT, happened_BT * known_BT)])


def task_losses(graph: TaskGraph, logits_BT: Tensor, labels_BT: Tensor, weights_B: Tensor, sums_2T: Tensor) -> Tensor:
    """This worker's part of each task's loss: [T]. sums_2T: `denominators` summed over all workers."""
    targets_BT = graph.targets(labels_BT)
    events = graph.events(logits_BT)
    happened_T, answered_T = sums_2T
    stand_in_T = torch.where(answered_T > 0, happened_T / answered_T.clamp(min=1e-30), 1.0).float()
    column = {name: t for t, name in enumerate(graph.tasks)}
    losses = []
    for t, (name, task) in enumerate(graph.tasks.items()):
        known_B = ~targets_BT[:, t].isnan()
        target_B = torch.where(known_B, targets_BT[:, t], 0.0)
        if task.binary:
            loss_B = -torch.where(target_B == 1, events[name].log_p_B, events[name].log_not_B)
        else:
            loss_B = (logits_BT[:, t] - target_B).square()
        weight_B, chain = weights_B * known_B, graph.chain(name)
        for event in chain:
            weight_B = weight_B * torch.where(graph.happened(event, labels_BT) == 1, stand_in_T[column[event]], 1.0)
        total = happened_T[column[chain[-1]]]  # what the weights above add up to: each null row has its stand-ins
        losses.append((weight_B * loss_B).sum() / total.clamp(min=1e-30).float())
    return torch.stack(losses)
