"""A batch of lists of different lengths: values in one tensor, offsets in another (Arrow's list layout, FBGEMM's too).

Shape letters: B rows of the batch, N ids of the batch, U rows that the ids name, D numbers each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


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

    def sums(self, rows_UD: Tensor) -> Tensor:
        """For each list the sum of the rows that its values name: [B, D]."""
        if rows_UD.shape[0] == 0:
            return rows_UD.new_zeros(self.num_rows, rows_UD.shape[1])
        return embedding_bag(self.values_N, rows_UD, self.offsets, mode="sum", include_last_offset=True)

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
        offsets, first = [parts[0].offsets[:1]], 0
        for part in parts:
            offsets.append(part.offsets[1:] + first)
            first += part.values_N.numel()
        return Jagged(torch.cat([part.values_N for part in parts]), torch.cat(offsets))
