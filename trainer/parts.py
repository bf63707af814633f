"""A model in two parts for serving: what belongs to the user and the request, computed once, and what to each item.

Nothing but the body's entry reads the main input, and the entry is affine: what the user's columns give and what an
item's give are added, and everything after that is the item part's. Both parts are plain modules from tensors to
tensors, whose inputs are named by feature:

    id, ids        the pooled rows of its ids [B, D]
    ids, pool none the rows of its ids [B, L, D], zeros behind the end; and NAME there: bool [B, L]
    number         the value [B] as the log's reader gives it, NaN for null
    id_stats       the statistics of its id [B, S]

Shape letters: B rows, I width of the main input, M of one part's, O width of the body's entry, T tasks, L logits, K
numbers.
"""

import copy
from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from trainer.features import Features, Inputs
from trainer.heads import TaskGraph
from trainer.learner import Learner
from trainer.model import MultiTaskModel
from trainer.numbers import NumberStats
from trainer.predictions import told

Given: TypeAlias = Mapping[str, Tensor]


class Side(nn.Module):
    """One part's columns of the main input: [B, M]. column_M: where they stand in it."""

    column_M: Tensor

    def __init__(self, features: Features, stats: NumberStats, overall: Mapping[str, Tensor], names: Collection[str]):
        super().__init__()
        columns = features.layout.columns
        self.ids = [name for name in features.ids if name in names]
        self.logged = [name for name in features.logged if name in names]
        self.statistics = {name: each for name, each in features.statistics.items() if name in names}
        self._overall = {name: overall[each.table] for name, each in self.statistics.items()}
        values = [columns[name][0] for name in self.logged] + [c for name in self.statistics for c in columns[name]]
        first = sum(feature.dim for feature in features.ids.values())
        self._stats = stats.select([column - first for column in values])
        flags = [columns[name][1] for name in self.logged]
        places = [c for name in self.ids for c in columns[name]] + values + flags
        self.register_buffer("column_M", torch.tensor(places, dtype=torch.int64))

    def forward(self, given: Given) -> Tensor:
        numbers = [given[name].unsqueeze(1) for name in self.logged]
        numbers += [each.numbers(given[name], self._overall[name]) for name, each in self.statistics.items()]
        vectors = [given[name] for name in self.ids]
        if numbers:
            numbers_BK = torch.cat(numbers, dim=1)
            standard_B2K = self._stats.standardise(numbers_BK)
            vectors.append(standard_B2K[:, : numbers_BK.shape[1] + len(self.logged)])  # only the log's can be null
        return torch.cat(vectors, dim=1)


class UserPart(nn.Module):
    """From a user and a request to the user's share of the body's entry: [B, O]."""

    def __init__(self, model: MultiTaskModel, side: Side, input_dim: int, lists: Collection[str]):
        super().__init__()
        self.side, self.encoder, self.entry = side, model.encoder, model.body.entry
        self._input_dim, self.lists = input_dim, list(lists)

    def forward(self, given: Given) -> Tensor:
        mine_BM = self.side(given)
        x_BI = mine_BM.new_zeros(mine_BM.shape[0], self._input_dim).index_copy(1, self.side.column_M, mine_BM)
        if self.encoder is not None:
            lists = {name: (given[name], given[f"{name} there"]) for name in self.lists}
            x_BI = torch.cat([x_BI, self.encoder(Inputs(x_BI, lists, ()), None)], dim=1)
        entry_BO: Tensor = self.entry(x_BI)
        return entry_BO


class ItemPart(nn.Module):
    """From one user's share [1, O] and his items to what `predict` tells of them, by address: [B]. Beside the features'
    stand, by name, the columns that some losses need (`by`). powers: of the fused score.
    """

    weight_MO: Tensor
    shift_L: Tensor

    def __init__(self, model: MultiTaskModel, side: Side, graph: TaskGraph, powers: Mapping[str, float], width: int):
        super().__init__()
        self.side, self.body, self.towers = side, model.body, model.towers
        self._graph, self._powers = graph, dict(powers)
        self.register_buffer("weight_MO", _slope(model.body.entry, width)[side.column_M])
        self.register_buffer("shift_L", _position_shift(model))

    def forward(self, entry_1O: Tensor, given: Given) -> dict[str, Tensor]:
        entry_BO = entry_1O + self.side(given) @ self.weight_MO
        logits_BL = self.towers(self.body(entry_BO, None).h_TBH) + self.shift_L
        unknown_BT = logits_BL.new_full((logits_BL.shape[0], len(self._graph.tasks)), torch.nan)
        labels_BT = torch.cat([unknown_BT, *(given[name].unsqueeze(1) for name in self._graph.by)], dim=1)
        return told(self._graph, logits_BL, labels_BT, self._powers)


def split(learner: Learner, item: Collection[str], powers: Mapping[str, float]) -> tuple[UserPart, ItemPart]:
    """The parts of what scores. item: the features that belong to an item; all others are the user's or the request's.
    ValueError where an item's feature would have to be known to the user's part, or where a part would be empty.
    """
    features, model = learner.features, learner.averaged.module
    assert isinstance(model, MultiTaskModel)
    served = {*features.layout.columns, *features.lists}
    for name in model.encoder.reads if model.encoder else ():
        if name in item:
            raise ValueError(f"the encoder reads '{name}', which belongs to an item: it is computed once for all items")
    for name in features.lists:
        if name in item:
            raise ValueError(f"'{name}' is a list with pool: none, which only the encoder reads: it is the user's")
    for name, each in features.statistics.items():
        if each.feature not in features.ids:
            raise ValueError(f"'{name}' tells of '{each.feature}', which is no feature of the main input")
        if (name in item) != (each.feature in item):
            raise ValueError(f"'{name}' tells of the id '{each.feature}': both belong to the item, or neither")
    overall = {name: torch.from_numpy(total_S) for name, total_S in learner.embeddings.shard.overall_S.items()}
    sides = [Side(features, learner.stats, overall, names) for names in (served - {*item}, served & {*item})]
    for side, whose in zip(sides, ("user", "item"), strict=True):
        if not side.column_M.numel():
            raise ValueError(f"no feature of the main input belongs to the {whose}")
    width = features.layout.input_dim
    encoded = width + (model.encoder.output_dim if model.encoder else 0)
    lists = [name for name in features.lists if model.encoder and name in model.encoder.reads]
    user = UserPart(model, sides[0], width, lists)
    return user.eval(), ItemPart(model, sides[1], learner.graph, powers, encoded).eval()


@torch.no_grad()
def _slope(entry: nn.Module, width: int) -> Tensor:
    """The matrix of an affine map of that many numbers: [width, O]."""
    exact = copy.deepcopy(entry).double()
    start_1O = exact(torch.zeros(1, width, dtype=torch.float64))
    slope_IO: Tensor = (exact(torch.eye(width, dtype=torch.float64)) - start_1O).float()
    return slope_IO


@torch.no_grad()
def _position_shift(model: MultiTaskModel) -> Tensor:
    """What the position tower adds to each logit when its features are missing: [L]."""
    if model.position is None or model.adds_PL is None:
        return torch.zeros(model.towers.num_logits)
    missing = [(torch.zeros(1, vector_D.numel()), torch.zeros(1)) for vector_D in model.position.missing]
    shift_L: Tensor = (model.position(missing).float() @ model.adds_PL)[0]
    return shift_L
