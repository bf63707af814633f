"""One step, from a batch to updated weights. Each line that talks to other workers says so: it is collective.

Shape letters: B rows, T tasks, N losses (the tasks' and the auxiliary nets'), M terms of which they are made, J sums
that a body's penalty or a loss is a function of, K numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from embeddings.client import Block
from embeddings.exchange import Exchange
from trainer.balance import gram
from trainer.data import Batch
from trainer.draws import Draws
from trainer.features import Inputs
from trainer.learner import Learner
from trainer.model import Outputs
from trainer.objective import Objective, Term, known_rows, shares_of_losses


def train_step(learner: Learner, batch: Batch, day: int) -> tuple[Tensor, Tensor]:
    """Train on this worker's share of a global batch. day: its ordinal. Returns each loss over all workers, in the
    order of learner.losses, and what it was multiplied by: [N].
    """
    blocks = learner.embeddings.pull(batch.ids, insert=True, labels_BL=learner.happened(batch))  # collective
    batch = batch.to(learner.device)
    draws = learner.draws(batch, day)

    numbers_BK = learner.features.numbers(batch, blocks, learner.embeddings.shard.overall_S)
    known_2T = known_rows(learner.graph, batch.labels_BT, batch.weights_BT)
    measured = learner.stats.measure(numbers_BK), learner.graph.measure(batch.labels_BT), known_2T
    numbers_3K, sum_J, known_2T = summed(learner.exchange, *measured)  # collective
    learner.stats.update(numbers_3K)
    learner.graph.update(sum_J)
    numbers_B2K = learner.stats.standardise(numbers_BK)

    inputs = learner.features.inputs(blocks, numbers_B2K, batch, draws)
    outputs, terms = forward(learner, inputs, batch, draws, known_2T)
    loss, losses_N, weights_N = balanced(learner, inputs, outputs, terms)  # collective

    learner.optimizer.zero_grad()
    loss.backward()
    all_reduce_gradients(learner)  # collective
    learner.optimizer.step()
    learner.averaged.update_parameters(learner.model)
    learner.embeddings.push(blocks)  # collective
    learner.health.add(outputs.shared)
    if learner.balance.looks_again:
        learner.balance.look(losses_again(learner, blocks, batch, draws, numbers_B2K, known_2T))  # collective
    return losses_N, weights_N


@torch.no_grad()
def score_step(learner: Learner, batch: Batch) -> Tensor:
    """The heads' logits [B, L] as at serving: nothing dropped, positions missing, unknown ids left unknown."""
    features = learner.features
    blocks = learner.embeddings.pull(batch.ids, insert=False)  # collective
    batch = batch.to(learner.device)
    numbers_BK = features.numbers(batch, blocks, learner.embeddings.shard.overall_S)
    inputs = features.inputs(blocks, learner.stats.standardise(numbers_BK), batch, None)
    with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.autocast):
        outputs: Outputs = learner.averaged(inputs, None)
    return outputs.logits_BL


def forward(
    learner: Learner, inputs: Inputs, batch: Batch, draws: Draws, known_2T: Tensor
) -> tuple[Outputs, list[Term]]:
    """The net's outputs, and the terms of all losses on this worker's rows."""
    graph = learner.graph
    with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.autocast):
        outputs: Outputs = learner.model(inputs, draws)
        auxiliary = learner.auxiliary_terms(inputs, batch, draws)
    nodes = graph.nodes(outputs.logits_BL, outputs.shown_BP)
    objective = Objective(graph, nodes, batch.labels_BT, batch.weights_BT, known_2T, batch.groups_B)
    return outputs, [*objective.terms(), *auxiliary]


def balanced(learner: Learner, inputs: Inputs, outputs: Outputs, terms: list[Term]) -> tuple[Tensor, Tensor, Tensor]:
    """This worker's part of what is learnt from, with the tasks weighed against each other; each loss over all workers,
    and its weight: [N]. Collective.
    """
    balance, num_tasks = learner.balance, len(learner.graph.tasks)
    sum_M, weight_M = torch.stack([term.sum for term in terms]), torch.stack([term.weight for term in terms])
    of_tasks_M = sum_M[: sum(term.task < num_tasks for term in terms)]
    gram_MM = gram(of_tasks_M, inputs.shared) if balance.needs_gram else sum_M.new_zeros(0, 0)
    moments_J = sum_M.new_zeros(0) if outputs.shared.moments_M is None else outputs.shared.moments_M
    total_M, weight_M, gram_MM, moment_J = summed(  # collective
        learner.exchange, sum_M.detach(), weight_M.detach(), gram_MM, moments_J.detach()
    )
    share_NM = shares_of_losses(terms, weight_M)
    share_TM = share_NM[:num_tasks, : gram_MM.shape[0]]
    losses_N, gram_TT = (share_NM @ total_M).float(), share_TM @ gram_MM @ share_TM.T
    weights_N = torch.ones_like(losses_N)
    weights_N[:num_tasks] = balance.weigh(losses_N[:num_tasks], gram_TT)
    loss = (weights_N @ share_NM.float()) @ sum_M + slope(learner.model.body.penalty, moment_J) @ moments_J
    return loss, losses_N, weights_N


def slope(penalty: Callable[[Tensor], Tensor], moment_J: Tensor) -> Tensor:
    """The gradient of a body's penalty at the moments of the global batch: times a worker's own part of the moments, it
    is that worker's part of the penalty's gradient.
    """
    if not moment_J.numel():
        return moment_J.float()
    at_J = moment_J.float().requires_grad_()
    return torch.autograd.grad(penalty(at_J), at_J)[0]


@torch.no_grad()
def losses_again(
    learner: Learner, blocks: list[Block], batch: Batch, draws: Draws, numbers_B2K: Tensor, known_2T: Tensor
) -> Tensor:
    """The tasks' losses on the same rows after the step: [T]. Collective."""
    blocks = learner.embeddings.again(blocks)  # collective
    inputs = learner.features.inputs(blocks, numbers_B2K, batch, draws)
    _, terms = forward(learner, inputs, batch, draws, known_2T)
    sums = (torch.stack([term.sum for term in terms]), torch.stack([term.weight for term in terms]))
    total_M, weight_M = summed(learner.exchange, *sums)  # collective
    return (shares_of_losses(terms, weight_M) @ total_M)[: len(learner.graph.tasks)].float()


def summed(exchange: Exchange, *parts: Tensor) -> list[Tensor]:
    """Each tensor summed over all workers, in one message: float64. Collective."""
    total = exchange.all_reduce(torch.cat([part.flatten().double() for part in parts]))
    return [flat.view_as(part) for flat, part in zip(total.split([part.numel() for part in parts]), parts, strict=True)]


def all_reduce_gradients(learner: Learner) -> None:
    """Sum the dense gradients over the workers, in one buffer. Collective."""
    parameters = list(learner.named_parameters().values())
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = learner.exchange.all_reduce(torch.cat([g.flatten() for g in gradients]))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
