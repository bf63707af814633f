"""One training loop for all parts: a MultiTaskModel on tensors, Adam, minibatches, one worker, no embeddings.

The step is trainer/step.py's without its collectives. Shape letters: N models, B rows, I input width, T tasks, L
logits, M terms.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from trainer.balance import Balancer, Fixed, gram
from trainer.bodies import Shared
from trainer.draws import Draws
from trainer.features import Inputs
from trainer.heads import TaskGraph
from trainer.model import MultiTaskModel, Outputs
from trainer.objective import Objective, known_rows, shares_of_losses


@dataclass(frozen=True)
class Rows:
    """labels_BT: as the task graph has them, NaN where unknown. selection: what the position tower reads (see
    trainer.features.Inputs).
    """

    x_BI: Tensor
    labels_BT: Tensor
    selection: Sequence[tuple[Tensor, Tensor]] = ()

    def __len__(self) -> int:
        return len(self.x_BI)

    def take(self, row_N: Tensor | slice) -> "Rows":
        selection = [(vector_BD[row_N], present_B[row_N]) for vector_BD, present_B in self.selection]
        return Rows(self.x_BI[row_N], self.labels_BT[row_N], selection)


def batches(rows: Rows, batch_size: int, steps: int, seed: int) -> Iterator[Rows]:
    """Batches for so many steps, shuffled anew for each pass; the last rows of a pass that make no batch are left."""
    size, generator, done = len(rows), torch.Generator().manual_seed(seed), 0
    while True:
        order_B = torch.randperm(size, generator=generator)
        for start in range(0, size - batch_size + 1, batch_size):
            if done == steps:
                return
            done += 1
            yield rows.take(order_B[start : start + batch_size])


def losses_of(
    model: Callable[..., Outputs], graph: TaskGraph, rows: Rows, draws: Draws | None
) -> tuple[Tensor, Outputs]:
    """Each task's loss on some rows: [T], with what the model made of them. draws None: scoring."""
    outputs = model(Inputs(rows.x_BI, {}, rows.selection), draws)
    nodes, weights_BT = graph.nodes(outputs.logits_BL, outputs.shown_BP), torch.ones_like(rows.labels_BT)
    known_2T = known_rows(graph, rows.labels_BT, weights_BT)
    terms = Objective(graph, nodes, rows.labels_BT, weights_BT, known_2T).terms()
    share_TM = shares_of_losses(terms, torch.stack([term.weight for term in terms]).detach())
    return share_TM @ torch.stack([term.sum for term in terms]), outputs


def fit(
    model: MultiTaskModel,
    graph: TaskGraph,
    batches: Iterable[Rows],
    *,
    rate: float = 0.001,
    seed: int = 0,
    balance: Balancer | None = None,
    check: Callable[[], float] | None = None,
    every: int = 100,
    patience: int | None = None,
    watch: Callable[[int, Tensor, Shared], None] | None = None,
) -> int:
    """Train on the batches; returns the number of steps.

    check: what is to be small, such as a loss on rows held out: asked every so many steps, the best weights are put
    back at the end, and with patience the training ends after so many checks without a better one. watch: told each
    step, its losses [T] and what the body made.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    balance = balance or Fixed(len(graph.tasks), [False] * len(graph.tasks))
    best, kept, since, step = math.inf, None, 0, 0
    for step, rows in enumerate(batches, start=1):
        rows.x_BI.requires_grad_(balance.needs_gram)
        losses_T, outputs = losses_of(model, graph, rows, _draws(rows, seed, step))
        gram_TT = gram(losses_T, [rows.x_BI]) if balance.needs_gram else losses_T.new_zeros(0, 0)
        loss = balance.weigh(losses_T.detach(), gram_TT) @ losses_T
        if outputs.shared.moments_M is not None:
            loss = loss + model.body.penalty(outputs.shared.moments_M)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if balance.looks_again:
            with torch.no_grad():
                balance.look(losses_of(model, graph, rows, _draws(rows, seed, step))[0])
        if watch:
            watch(step, losses_T.detach(), outputs.shared)
        if check and step % every == 0:
            found, since = check(), since + 1
            if found < best:
                best, kept, since = found, copy.deepcopy(model.state_dict()), 0
            if since == patience:
                break
    if kept:
        model.load_state_dict(kept)
    return step


def fit_side_by_side(
    models: Sequence[MultiTaskModel], graph: TaskGraph, batches: Iterable[Sequence[Rows]], *, rate: float = 0.001
) -> None:
    """Train models of one shape, each on batches of its own. For small ones a step is mostly overhead, which they
    share: several train much faster than one after the other, and come out the same.
    """
    parameters, buffers = stack_module_state(list(models))

    def loss(step: int, parameters: dict[str, Tensor], buffers: dict[str, Tensor], *of_rows: Tensor) -> Tensor:
        def model(inputs: Inputs, draws: Draws | None) -> Outputs:
            outputs: Outputs = functional_call(models[0], (parameters, buffers), (inputs, draws))
            return outputs

        x_BI, labels_BT, row_B = of_rows
        losses_T, outputs = losses_of(model, graph, Rows(x_BI, labels_BT), Draws(row_B, 0, step))
        moments_M = outputs.shared.moments_M
        return losses_T.sum() + (0.0 if moments_M is None else models[0].body.penalty(moments_M))

    optimizer = torch.optim.Adam(parameters.values(), lr=rate, fused=True)
    for step, rows in enumerate(batches, start=1):
        x_NBI, labels_NBT = torch.stack([r.x_BI for r in rows]), torch.stack([r.labels_BT for r in rows])
        row_NB = torch.arange(labels_NBT[..., 0].numel()).view(labels_NBT.shape[:2])
        optimizer.zero_grad()
        vmap(partial(loss, step))(parameters, buffers, x_NBI, labels_NBT, row_NB).sum().backward()
        optimizer.step()
    with torch.no_grad():
        for name, parameter in parameters.items():
            for model, mine in zip(models, parameter, strict=True):
                model.get_parameter(name).copy_(mine)


def _draws(rows: Rows, seed: int, step: int) -> Draws:
    return Draws(torch.arange(len(rows)), seed, step)


@torch.no_grad()
def logits(model: MultiTaskModel, rows: Rows, size: int = 8192) -> Tensor:
    """Scores as at serving: [B, L]."""
    parts = [rows.take(slice(start, start + size)) for start in range(0, len(rows), size)]
    return torch.cat([model(Inputs(part.x_BI, {}, part.selection), None).logits_BL for part in parts])
