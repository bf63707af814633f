"""A batch of lists of different lengths: values in one tensor, offsets in another (Arrow's list layout, FBGEMM's too).

Shape letters: B rows of the batch, N ids of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Jagged:
    """Row b holds values_N[offsets[b]:offsets[b + 1]]; offsets has B + 1 entries, begins with 0 and ends with N.
    Both int64.
    """

    values_N: Tensor
    offsets: Tensor

    @property
    def num_rows(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths_B(self) -> Tensor:
        return self.offsets[1:] - self.offsets[:-1]

    def to(self, device: torch.device) -> "Jagged":
        return Jagged(self.values_N.to(device), self.offsets.to(device))

    @staticmethod
    def from_lengths(values_N: Tensor, lengths_B: Tensor) -> "Jagged":
        return Jagged(values_N, torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)))

    def select(self, rows: Tensor) -> "Jagged":
        """The given rows (int64 positions, repeats allowed), in their order."""
        first = self.offsets[rows]
        lengths = self.offsets[rows + 1] - first
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        shift = (first - offsets[:-1]).repeat_interleave(lengths)
        return Jagged(self.values_N[torch.arange(shift.numel(), device=rows.device) + shift], offsets)

    @staticmethod
    def cat(parts: Sequence["Jagged"]) -> "Jagged":
        """The rows of all parts, one part after the other."""
        values = torch.cat([part.values_N for part in parts])
        return Jagged.from_lengths(values, torch.cat([part.lengths_B for part in parts]))
