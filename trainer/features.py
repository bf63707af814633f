"""From a batch and its pulled rows to the dense net's inputs.

The main input is every id feature's pooled vector, every number standardised, and a flag for each null number.
Selection features (position, device as shown) go to the position tower alone, as vectors that may be missing.

Shape letters: B rows, I input width, D floats a row of a table, K numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embeddings.client import Block
from embeddings.pooling import Pooling, pool
from trainer.data import Batch
from trainer.draws import Draws


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

    def numbers(self, batch: Batch, blocks: Sequence[Block]) -> Tensor:
        """The numbers of a batch as they are: [B, K], NaN where null."""
        return batch.numbers_BK

    def main(self, vectors: Mapping[str, Tensor], numbers_BK: Tensor) -> Tensor:
        """The body's input, from the id features' vectors and the standardised numbers: x_BI."""
        return torch.cat([*(vectors[name] for name in self.ids), numbers_BK], dim=1)

    def selection(
        self, vectors: Mapping[str, Tensor], batch: Batch, draws: Draws | None
    ) -> list[tuple[Tensor, Tensor]]:
        """For each selection feature its vector [B, D] and whether it is there [B]."""
        return [(vectors[name], self.presence(name, batch, draws)) for name in self.position]
