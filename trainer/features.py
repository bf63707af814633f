"""From a batch and its pulled rows to the dense net's inputs.

The main input is every id feature's pooled vector, every number standardised (the log's, and those made from what
happened to ids), and a flag for each null number of the log.
Selection features (position, device as shown) go to the position tower alone, as vectors that may be missing.

Shape letters: B rows, I input width, D floats a row of a table, K numbers, S statistics of a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.client import Block
from embeddings.pooling import Pooling, pool, statistics
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


class Features:
    """The id features of the main input, the numbers of the log and those of what happened to ids, and the selection
    features of the position tower.
    """

    def __init__(
        self,
        ids: Mapping[str, IdFeature],
        position: Mapping[str, IdFeature],
        num_logged: int,
        statistics: Sequence[IdStatistics] = (),
    ):
        self.ids, self.position, self.num_logged, self.statistics = dict(ids), dict(position), num_logged, statistics

    @property
    def num_numbers(self) -> int:
        return self.num_logged + sum(len(each.of) for each in self.statistics)

    @property
    def input_dim(self) -> int:
        return sum(feature.dim for feature in self.ids.values()) + self.num_numbers + self.num_logged

    def vectors(self, blocks: Sequence[Block], batch: Batch, draws: Draws | None) -> dict[str, Tensor]:
        """Each id feature's vector [B, D]. draws None: scoring; no id is dropped, no selection feature is there."""
        poolings = {
            name: Pooling(feature.mean, draws.keep(name, feature.dropout) if draws and feature.dropout else None)
            for name, feature in self.ids.items()
        }
        for name in self.position:
            poolings[name] = Pooling(True, self.presence(name, batch, draws))
        return {
            name: vector_BD
            for block in blocks
            for name, vector_BD in zip(block.features, pool(block, poolings), strict=True)
        }

    def presence(self, name: str, batch: Batch, draws: Draws | None) -> Tensor:
        """Whether a selection feature is there [B]: never at serving, dropped by chance in training."""
        there_B = (batch.ids[name].lengths_B > 0).float()
        return there_B * draws.keep(name, self.position[name].dropout) if draws else torch.zeros_like(there_B)

    def numbers(self, batch: Batch, blocks: Sequence[Block], overall_S: Mapping[str, NDArray[np.float32]]) -> Tensor:
        """The numbers of a batch, NaN where null: [B, K]. overall_S: by table, the statistics over all of its ids."""
        columns = [batch.numbers_BK]
        for each in self.statistics:
            block = next(block for block in blocks if each.feature in block.features)
            overall = torch.from_numpy(overall_S[each.table]).to(batch.numbers_BK.device)
            columns.append(each.numbers(statistics(block, each.feature), overall))
        return torch.cat(columns, dim=1)

    def main(self, vectors: Mapping[str, Tensor], numbers_B2K: Tensor) -> Tensor:
        """The body's input: x_BI. numbers_B2K: standardised, then their null flags, of which the log's count."""
        return torch.cat(
            [*(vectors[name] for name in self.ids), numbers_B2K[:, : self.num_numbers + self.num_logged]], dim=1
        )

    def selection(
        self, vectors: Mapping[str, Tensor], batch: Batch, draws: Draws | None
    ) -> list[tuple[Tensor, Tensor]]:
        """For each selection feature its vector [B, D] and whether it is there [B]."""
        return [(vectors[name], self.presence(name, batch, draws)) for name in self.position]
