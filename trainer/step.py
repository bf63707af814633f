"""One step, from a batch to updated weights. Each line that talks to other workers says so: it is collective.

Shape letters: B rows, I input width, T tasks, K numbers.
"""

import torch
from torch import Tensor

from trainer.data import Batch
from trainer.learner import Learner
from trainer.losses import denominators, task_losses


def train_step(learner: Learner, batch: Batch, day: int) -> Tensor:
    """Train on this worker's share of a global batch; returns its part of each task's loss [T]. day: its ordinal."""
    exchange, graph, model, features = learner.exchange, learner.graph, learner.model, learner.features
    blocks = learner.embeddings.pull(batch.ids, insert=True, labels_BL=learner.happened(batch))  # collective
    batch = batch.to(learner.device)
    draws = learner.draws(batch, day)

    numbers_BK = features.numbers(batch, blocks, learner.embeddings.shard.overall_S)
    numbers_3K = learner.stats.measure(numbers_BK)
    weights_2T = denominators(graph, batch.labels_BT, batch.weights_B)
    sums = exchange.all_reduce(torch.cat([numbers_3K.flatten(), weights_2T.flatten()]))  # collective
    learner.stats.update(sums[: numbers_3K.numel()].view_as(numbers_3K))

    vectors = features.vectors(blocks, batch, draws)
    x_BI = features.main(vectors, learner.stats.standardise(numbers_BK))
    selection = features.selection(vectors, batch, draws)
    with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.autocast):
        logits_BT = model(x_BI, selection, draws)
    losses_T = task_losses(
        graph, logits_BT, batch.labels_BT, batch.weights_B, sums[numbers_3K.numel() :].view_as(weights_2T)
    )

    learner.optimizer.zero_grad()
    (losses_T * learner.loss_weights_T).sum().backward()

    all_reduce_gradients(learner)  # collective
    learner.optimizer.step()
    learner.averaged.update_parameters(model)
    learner.embeddings.push(blocks)  # collective
    return losses_T.detach()


@torch.no_grad()
def score_step(learner: Learner, batch: Batch) -> Tensor:
    """The tasks' conditional logits [B, T] as at serving: nothing dropped, positions missing, unknown ids left
    unknown.
    """
    features = learner.features
    blocks = learner.embeddings.pull(batch.ids, insert=False)  # collective
    batch = batch.to(learner.device)
    vectors = features.vectors(blocks, batch, None)
    x_BI = features.main(
        vectors, learner.stats.standardise(features.numbers(batch, blocks, learner.embeddings.shard.overall_S))
    )
    selection = features.selection(vectors, batch, None)
    with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.autocast):
        logits_BT: Tensor = learner.averaged(x_BI, selection, None)
    return logits_BT


def all_reduce_gradients(learner: Learner) -> None:
    """Sum the dense gradients over the workers, in one buffer. Collective."""
    parameters = list(learner.model.parameters())
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = learner.exchange.all_reduce(torch.cat([g.flatten() for g in gradients]))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
