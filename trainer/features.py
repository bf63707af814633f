"""From a batch and its pulled rows to the dense net's inputs.

The main input is every id feature's pooled vector, every number standardised, and a flag for each null number.
Selection features (position, device as shown) go to the position tower alone, as vectors that may be missing.

Shape letters: B rows, I input width, D floats a row of a table, K numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embeddings.client import Pulled
from embeddings.pooling import pool
from trainer.data import Batch
from trainer.draws import Draws
from trainer.numbers import NumberStats


@dataclass(frozen=True)
class IdFeature:
    """dim: its table's. mean: how a list is pooled. dropout: share of training rows on which it reads as unknown."""

    dim: int
    mean: bool = True
    dropout: float = 0.0


class Features:
    """The id features of the main input, and the selection features of the position tower."""

    def __init__(self, ids: Mapping[str, IdFeature], position: Mapping[str, IdFeature], num_numbers: int):
        self.ids, self.position, self.num_numbers = dict(ids), dict(position), num_numbers

    @property
    def input_dim(self) -> int:
        return sum(feature.dim for feature in self.ids.values()) + 2 * self.num_numbers

    def main(self, batch: Batch, pulled: Pulled, stats: NumberStats, draws: Draws | None) -> Tensor:
        """The body's input: x_BI. draws None: scoring, nothing is dropped."""
        parts = []
        for name, feature in self.ids.items():
            keep_B = draws.keep(name, feature.dropout) if draws and feature.dropout else None
            parts.append(pool(pulled, name, feature.dim, mean=feature.mean, keep_B=keep_B))
        return torch.cat([*parts, stats.standardise(batch.numbers_BK)], dim=1)

    def selection(self, batch: Batch, pulled: Pulled, draws: Draws | None) -> list[tuple[Tensor, Tensor]]:
        """For each selection feature its vector [B, D] and whether it is there [B]: never at serving, dropped by
        chance in training.
        """
        found = []
        for name, feature in self.position.items():
            present_B = (batch.ids[name].lengths_B > 0).float()
            present_B = present_B * (draws.keep(name, feature.dropout) if draws else 0.0)
            found.append((pool(pulled, name, feature.dim, mean=feature.mean, keep_B=present_B), present_B))
        return found
