"""Chance that belongs to a row: the same draw for the same row on any number of workers, in any batch.

Dropout of ids, positions and gates draws from here, so law 1 (the number of workers never changes the answer) holds
with dropout on. Shape letter: B rows.
"""

import math

import torch
from torch import Tensor

from embeddings.buckets import hash64
from embeddings.shard import hash_name


class Draws:
    """Uniform numbers for rows row_B (their places in the day), for one day of one model."""

    def __init__(self, row_B: Tensor, seed: int, day: int):
        self._row_B = hash64(row_B + hash_name(f"day {day}", seed))

    def uniform(self, stream: str, columns: int = 1) -> Tensor:
        """Float32 in [0, 1): [B, columns]. The stream names what is drawn; streams are independent."""
        column = hash64(torch.arange(columns, device=self._row_B.device) + hash_name(stream, 0))
        return ((hash64(self._row_B.unsqueeze(1) ^ column) >> 40) + 2**23).float() / 2**24

    def normal(self, stream: str, columns: int) -> Tensor:
        """Standard normal: [B, columns]."""
        # the middle of each step of 2^-23 between -1 and 1: exact in float32 in this order, never -1 or 1 themselves
        return math.sqrt(2) * torch.erfinv(2 * self.uniform(stream, columns) - 1 + 2.0**-24)

    def keep(self, stream: str, dropout: float) -> Tensor:
        """1 where the row keeps what the stream names, 0 (with probability dropout) where it is dropped: [B]."""
        return (self.uniform(stream).squeeze(1) >= dropout).float()
