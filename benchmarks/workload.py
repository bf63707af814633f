"""The standard workload: 17 id features, 45 ids a row, Zipf 1.05, tables of 7 to 2,000,000 ids, rows of 16 numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embeddings.jagged import Jagged

DIM = 16
_SKEW = 1.05


@dataclass(frozen=True)
class IdFeature:
    """ids: how many there are. mean_length: of a row's list; 1: one id a row."""

    ids: int
    mean_length: float = 1.0


FEATURES: Mapping[str, IdFeature] = {
    "user_id": IdFeature(2_000_000),
    "item_id": IdFeature(1_000_000),
    "author_id": IdFeature(300_000),
    **{
        f"category_{i}": IdFeature(ids)
        for i, ids in enumerate((100, 1000, 5000, 20_000, 50, 300, 100_000, 10_000, 24, 7, 500_000, 200))
    },
    "history_items": IdFeature(1_000_000, 20.0),
    "history_categories": IdFeature(5000, 10.0),
}


def zipf_ids(count: int, num_ids: int, generator: torch.Generator) -> Tensor:
    """Ids 0 .. num_ids - 1, the n-th about 1 / n^1.05 as frequent as the first."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    continuous = ((num_ids ** (1 - _SKEW) - 1) * uniform + 1).pow(1 / (1 - _SKEW))
    return continuous.long().sub_(1).clamp_(0, num_ids - 1)


def batch(num_rows: int, seed: int) -> dict[str, Jagged]:
    """One batch of ids, by feature."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, feature in FEATURES.items():
        lengths_B = torch.ones(num_rows, dtype=torch.int64)
        if feature.mean_length != 1:
            lengths_B = torch.poisson(torch.full((num_rows,), feature.mean_length), generator=generator).long()
        found[name] = Jagged.from_lengths(zipf_ids(int(lengths_B.sum()), feature.ids, generator), lengths_B)
    return found
