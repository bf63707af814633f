"""From a batch and its pulled rows to the dense net's inputs.

The main input x_BI is every id feature's pooled vector, every number standardised (the log's, and those made from what
happened to ids), and a flag for each null number of the log. Lists with pool: none go to the encoder alone, unpooled.
Selection features (position, device as shown) go to the position tower alone, as vectors that may be missing.

Shape letters: B rows, I input width, D floats a row of a table, L longest list, K numbers, S statistics of a table.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.client import Block
from embeddings.pooling import Pooling, pool, sequence, statistics
from trainer.data import Batch
from trainer.draws import Draws


@dataclass(frozen=True)
class IdFeature:
    """dim: its table's. mean: how a list is pooled. dropout: share of training rows on which it reads as unknown."""

    dim: int
    mean: bool = True
    dropout: float = 0.0


@dataclass(frozen=True)
class IdStatistics:
    """Numbers from what happened to a feature's id. of: for each number one place among the table's statistics, a
    count, or two, a rate. smoothing: how many of what a rate divides by the overall rate counts for.
    """

    feature: str
    table: str
    of: Sequence[tuple[int, ...]]
    smoothing: float

    def numbers(self, statistics_BS: Tensor, overall_S: Tensor) -> Tensor:
        """log1p of each count, and each smoothed rate: [B, K]."""
        return torch.stack([self._number(place, statistics_BS, overall_S) for place in self.of], dim=1)

    def _number(self, place: tuple[int, ...], statistics_BS: Tensor, overall_S: Tensor) -> Tensor:
        count_B = statistics_BS[:, place[0]]
        if len(place) == 1:
            return torch.log1p(count_B)
        overall = overall_S[place[0]] / overall_S[place[1]].clamp(min=1e-9)
        return (count_B + self.smoothing * overall) / (statistics_BS[:, place[1]] + self.smoothing)


@dataclass(frozen=True)
class Layout:
    """What the dense net can name of its inputs. columns: each feature's places in x_BI. lists: the widths of the
    features that come unpooled.
    """

    columns: Mapping[str, Sequence[int]]
    lists: Mapping[str, int]

    @property
    def input_dim(self) -> int:
        return sum(map(len, self.columns.values()))

    def columns_of(self, features: Iterable[str]) -> list[int]:
        """The places in x_BI of some features. ValueError for one that is not there."""
        for name in features:
            if name not in self.columns:
                raise ValueError(f"'{name}' is no feature of the main input, which has {', '.join(self.columns)}")
        return [column for name in features for column in self.columns[name]]

    def list_dim(self, feature: str) -> int:
        """The width of an unpooled list. ValueError for one that is not there."""
        if feature not in self.lists:
            known = ", ".join(self.lists) or "none"
            raise ValueError(f"'{feature}' is no list with pool: none; such lists: {known}")
        return self.lists[feature]


@dataclass(frozen=True)
class Inputs:
    """What the dense net reads of a batch. lists: for each unpooled feature its rows [B, L, D], zeros behind the end,
    and where there is an id: bool [B, L]. selection: for each selection feature its vector [B, D], zeros where it is
    missing, and whether it is there: [B].
    """

    x_BI: Tensor
    lists: Mapping[str, tuple[Tensor, Tensor]]
    selection: Sequence[tuple[Tensor, Tensor]]

    @property
    def shared(self) -> list[Tensor]:
        """What all tasks read: where gradients of single tasks are compared."""
        return [self.x_BI, *(rows_BLD for rows_BLD, _ in self.lists.values())]


class Features:
    """The id features of the main input, the numbers of the log and those of what happened to ids, the unpooled lists
    (each with its width and longest length), and the selection features of the position tower.
    """

    def __init__(
        self,
        ids: Mapping[str, IdFeature],
        position: Mapping[str, IdFeature],
        logged: Sequence[str],
        statistics: Mapping[str, IdStatistics] | None = None,
        lists: Mapping[str, tuple[IdFeature, int]] | None = None,
    ):
        self.ids, self.position, self.logged = dict(ids), dict(position), list(logged)
        self.statistics, self.lists = dict(statistics or {}), dict(lists or {})

    @property
    def num_numbers(self) -> int:
        return len(self.logged) + sum(len(each.of) for each in self.statistics.values())

    @property
    def layout(self) -> Layout:
        columns: dict[str, list[int]] = {}
        first = 0
        for name, feature in self.ids.items():
            columns[name] = list(range(first, first + feature.dim))
            first += feature.dim
        flags = first + self.num_numbers
        for k, name in enumerate(self.logged):
            columns[name] = [first + k, flags + k]
        first += len(self.logged)
        for name, each in self.statistics.items():
            columns[name] = list(range(first, first + len(each.of)))
            first += len(each.of)
        return Layout(columns, {name: feature.dim for name, (feature, _) in self.lists.items()})

    def inputs(self, blocks: Sequence[Block], numbers_B2K: Tensor, batch: Batch, draws: Draws | None) -> Inputs:
        """numbers_B2K: standardised, then their null flags, of which the log's count. draws None: scoring; no id is
        dropped, no selection feature is there.
        """
        vectors = self._vectors(blocks, batch, draws)
        numbers_BK = numbers_B2K[:, : self.num_numbers + len(self.logged)]
        x_BI = torch.cat([*(vectors[name] for name in self.ids), numbers_BK], dim=1)
        return Inputs(
            x_BI.requires_grad_(draws is not None),
            {name: self._list(name, blocks, draws) for name in self.lists},
            [(vectors[name], self.presence(name, batch, draws)) for name in self.position],
        )

    def _vectors(self, blocks: Sequence[Block], batch: Batch, draws: Draws | None) -> dict[str, Tensor]:
        """Each id feature's vector [B, D]."""
        poolings = {
            name: Pooling(feature.mean, draws.keep(name, feature.dropout) if draws and feature.dropout else None)
            for name, feature in self.ids.items()
        }
        for name in self.position:
            poolings[name] = Pooling(True, self.presence(name, batch, draws))
        for name in self.lists:
            poolings[name] = Pooling(last=0)  # nothing of it is pooled
        return {
            name: vector_BD
            for block in blocks
            for name, vector_BD in zip(block.features, pool(block, poolings), strict=True)
        }

    def _list(self, name: str, blocks: Sequence[Block], draws: Draws | None) -> tuple[Tensor, Tensor]:
        feature, longest = self.lists[name]
        rows_BLD, there_BL = sequence(next(block for block in blocks if name in block.features), name, longest)
        if draws and feature.dropout:
            there_BL = there_BL & (draws.keep(name, feature.dropout) > 0).unsqueeze(1)
            rows_BLD = rows_BLD * there_BL.unsqueeze(2)
        return rows_BLD, there_BL

    def presence(self, name: str, batch: Batch, draws: Draws | None) -> Tensor:
        """Whether a selection feature is there [B]: never at serving, dropped by chance in training."""
        there_B = (batch.ids[name].lengths_B > 0).float()
        return there_B * draws.keep(name, self.position[name].dropout) if draws else torch.zeros_like(there_B)

    def numbers(self, batch: Batch, blocks: Sequence[Block], overall_S: Mapping[str, NDArray[np.float32]]) -> Tensor:
        """The numbers of a batch, NaN where null: [B, K]. overall_S: by table, the statistics over all of its ids."""
        columns = [batch.numbers_BK]
        for each in self.statistics.values():
            block = next(block for block in blocks if each.feature in block.features)
            overall = torch.from_numpy(overall_S[each.table]).to(batch.numbers_BK.device)
            columns.append(each.numbers(statistics(block, each.feature), overall))
        return torch.cat(columns, dim=1)
