"""What a day's rows are like, whatever the model: the gate compares it with the days before.

In: the batches as they are scored. Out, of all workers: where each number lies, and the rows' content, a number that is
the same for the same rows whatever their order, file or worker. Labels do not enter it: they may arrive later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embeddings.buckets import hash64
from embeddings.exchange import Exchange
from embeddings.jagged import Jagged
from trainer.data import Batch

_ODD = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit number


class Facts:
    """Sums over rows; they add up over workers. numbers: the names of the numeric features."""

    def __init__(self, numbers: Sequence[str]):
        self._numbers = list(numbers)
        self._sums = torch.zeros(3, len(self._numbers), dtype=torch.float64)
        self._content = torch.zeros(1, dtype=torch.int64)

    def add(self, batch: Batch) -> None:
        """Count a batch's rows."""
        known_BK = ~batch.numbers_BK.isnan()
        values_BK = batch.numbers_BK.double().nan_to_num(0.0)
        self._sums += torch.stack([known_BK.double().sum(0), values_BK.sum(0), values_BK.square().sum(0)])
        self._content += content(batch.ids, batch.numbers_BK)

    def report(self, exchange: Exchange) -> dict[str, Any]:
        """content, and by number mean and deviation (None without a value). Collective."""
        count_K, sum_K, square_K = exchange.all_reduce(self._sums.clone())
        total = exchange.all_reduce(self._content.clone())
        mean_K = sum_K / count_K
        deviation_K = (square_K / count_K - mean_K.square()).clamp(min=0).sqrt()
        told = zip(self._numbers, count_K.tolist(), mean_K.tolist(), deviation_K.tolist(), strict=True)
        return {
            "content": f"{int(total) % 2**64:016x}",
            "numbers": {
                name: {"mean": mean, "deviation": deviation} if count else {"mean": None, "deviation": None}
                for name, count, mean, deviation in told
            },
        }


def content(ids: Mapping[str, Jagged], numbers_BK: Tensor) -> Tensor:
    """The sum over rows of a hash of each row's ids and numbers, modulo 2^64: int64 [1]."""
    row_B = torch.zeros(numbers_BK.shape[0], dtype=torch.int64)
    for name in sorted(ids):
        of_row_N = torch.arange(row_B.numel()).repeat_interleave(ids[name].lengths_B)
        row_B = hash64(row_B * _ODD).index_add(0, of_row_N, hash64(ids[name].values_N))
    for column_B in numbers_BK.nan_to_num(0.0).unbind(1):
        row_B = hash64(row_B * _ODD) + column_B.contiguous().view(torch.int32).long()
    return hash64(row_B).sum(0, keepdim=True)
