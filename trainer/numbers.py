"""Running statistics of the numeric features: count, mean and spread of every value trained on so far, kept in the
checkpoint.

Shape letters: B rows, K numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class NumberStats:
    """count_K, mean_K, m2_K (sum of squared deviations), in float64. Nulls (NaN) are left out.

    Source for the merge: Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample
    variances, 1979.
    """

    def __init__(self, num_numbers: int, device: torch.device | None = None):
        self.count_K, self.mean_K, self.m2_K = torch.zeros(3, num_numbers, dtype=torch.float64, device=device)

    def measure(self, numbers_BK: Tensor) -> Tensor:
        """A batch's sums [3, K]: count, sum, sum of squares around the running mean; they add up over workers."""
        known_BK = ~numbers_BK.isnan()
        values_BK = torch.where(known_BK, numbers_BK.double() - self.mean_K, 0.0)
        return torch.stack([known_BK.sum(0).double(), values_BK.sum(0), values_BK.square().sum(0)])

    def update(self, sums_3K: Tensor) -> None:
        """Merge the global batch's sums, as measured before."""
        count_K, sum_K, square_K = sums_3K
        total_K = (self.count_K + count_K).clamp(min=1)
        self.m2_K = self.m2_K + square_K - sum_K.square() / total_K
        self.mean_K = self.mean_K + sum_K / total_K
        self.count_K = self.count_K + count_K

    def standardise(self, numbers_BK: Tensor) -> Tensor:
        """(x - mean) / deviation, 0 where null, and a flag for each null: [B, 2K]."""
        variance_K = self.m2_K / self.count_K.clamp(min=1)
        scale_K = torch.where(variance_K > 1e-12, variance_K, 1.0).rsqrt()
        null_BK = numbers_BK.isnan()
        values_BK = torch.where(null_BK, 0.0, (numbers_BK.double() - self.mean_K) * scale_K)
        return torch.cat([values_BK.float(), null_BK.float()], dim=1)

    def select(self, numbers: Sequence[int]) -> "NumberStats":
        """The statistics of some of the numbers."""
        some = NumberStats(len(numbers))
        some.load({name: value[list(numbers)] for name, value in self.state().items()})
        return some

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count_K, "mean": self.mean_K, "m2": self.m2_K}

    def load(self, state: dict[str, Tensor]) -> None:
        self.count_K, self.mean_K, self.m2_K = state["count"], state["mean"], state["m2"]
