"""The training loop of fit.py for rows with ids: tables in torch, our dense net on their rows, auxiliary nets too.

The tables stand in for the parameter server; what is on trial here is the net. All rows that are scored lie in one set
of tensors, of which training takes batches.

Shape letters: B rows, T tasks, L longest list, D floats of a table's row, V rows of a table.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from embeddings.jagged import Jagged
from trainer.auxiliary import Auxiliary
from trainer.data import Batch
from trainer.draws import Draws
from trainer.features import Inputs, Layout
from trainer.heads import TaskGraph
from trainer.model import MultiTaskModel
from trainer.objective import Objective, Term, known_rows, shares_of_losses


class IdRows(NamedTuple):
    """ids: by feature [B]. lists: by feature [B, L], -1 behind the end. labels_BT: NaN where unknown."""

    labels_BT: Tensor
    ids: Mapping[str, Tensor]
    lists: Mapping[str, Tensor]

    def take(self, row_N: Tensor | slice) -> "IdRows":
        ids, lists = ({name: of_B[row_N] for name, of_B in each.items()} for each in (self.ids, self.lists))
        return IdRows(self.labels_BT[row_N], ids, lists)


class Tables(nn.Module):
    """tables: by name (V, D). of: each feature's table. pooled: lists whose mean is part of the main input."""

    def __init__(self, tables: Mapping[str, tuple[int, int]], of: Mapping[str, str], pooled: Sequence[str] = ()):
        super().__init__()
        self.tables = nn.ModuleDict()
        for name, shape in tables.items():
            self.tables[name] = table = nn.Embedding(*shape)
            nn.init.normal_(table.weight, std=0.05)
        self._of, self._pooled, self._dims = dict(of), list(pooled), {name: dim for name, (_, dim) in tables.items()}

    def layout(self, ids: Sequence[str], lists: Sequence[str]) -> Layout:
        columns, first = {}, 0
        for name in (*ids, *self._pooled):
            columns[name] = list(range(first, first + self._dims[self._of[name]]))
            first += len(columns[name])
        return Layout(columns, {name: self._dims[self._of[name]] for name in lists if name not in self._pooled})

    def forward(self, rows: IdRows) -> Inputs:
        parts = [self.tables[self._of[name]](id_B) for name, id_B in rows.ids.items()]
        lists = {name: self._list(name, id_BL) for name, id_BL in rows.lists.items()}
        for name in self._pooled:
            rows_BLD, there_BL = lists.pop(name)
            parts.append(rows_BLD.sum(1) / there_BL.sum(1, keepdim=True).clamp(min=1))
        return Inputs(torch.cat(parts, dim=1), lists, ())

    def _list(self, name: str, id_BL: Tensor) -> tuple[Tensor, Tensor]:
        there_BL = id_BL >= 0
        return self.tables[self._of[name]](id_BL.clamp(min=0)) * there_BL.unsqueeze(2), there_BL


def fit_ids(
    tables: Tables,
    model: MultiTaskModel,
    graph: TaskGraph,
    rows: IdRows,
    *,
    passes: int,
    batch_size: int = 512,
    rate: float = 0.003,
    seed: int = 0,
    auxiliary: Sequence[Auxiliary] = (),
) -> None:
    """Train on the rows, shuffled anew for each pass."""
    parameters = [p for module in (tables, model, *auxiliary) for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    size, generator, step = len(rows.labels_BT), torch.Generator().manual_seed(seed), 0
    for _ in range(passes):
        order_B = torch.randperm(size, generator=generator)
        for start in range(0, size - batch_size + 1, batch_size):
            step += 1
            loss = _loss(tables, model, graph, rows.take(order_B[start : start + batch_size]), auxiliary, (seed, step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _loss(
    tables: Tables,
    model: MultiTaskModel,
    graph: TaskGraph,
    rows: IdRows,
    auxiliary: Sequence[Auxiliary],
    chance: tuple[int, int],
) -> Tensor:
    row_B, inputs = torch.arange(len(rows.labels_BT)), tables(rows)
    draws = Draws(row_B, *chance)
    weights_BT, nodes = torch.ones_like(rows.labels_BT), graph.nodes(model(inputs, draws).logits_BL)
    known_2T = known_rows(graph, rows.labels_BT, weights_BT)
    terms = Objective(graph, nodes, rows.labels_BT, weights_BT, known_2T).terms()
    targets_BT, tasks, batch = graph.targets(rows.labels_BT), list(graph.tasks), _batch(rows, row_B)
    for net in auxiliary:
        place = tasks.index(net.label) if net.label else 0
        whole, weight = net(inputs, batch, targets_BT[:, place], weights_BT[:, place], draws)
        terms.append(Term(len(terms), whole, weight, net.weight))
    share_NM = shares_of_losses(terms, torch.stack([term.weight for term in terms]).detach())
    loss: Tensor = (share_NM @ torch.stack([term.sum for term in terms])).sum()
    return loss


def _batch(rows: IdRows, row_B: Tensor) -> Batch:
    """The part of a batch that auxiliary nets read, all of one lane."""
    lists = {name: Jagged.from_lengths(id_BL[id_BL >= 0], (id_BL >= 0).sum(1)) for name, id_BL in rows.lists.items()}
    nothing = rows.labels_BT[:, :0]
    return Batch(lists, nothing, rows.labels_BT, torch.ones_like(rows.labels_BT), row_B, lane_B=torch.zeros_like(row_B))


@torch.no_grad()
def score_ids(tables: Tables, model: MultiTaskModel, rows: IdRows, size: int = 8192) -> Tensor:
    """Logits as at serving: [B, L]."""
    parts = [rows.take(slice(start, start + size)) for start in range(0, len(rows.labels_BT), size)]
    return torch.cat([model(tables(part), None).logits_BL for part in parts])
