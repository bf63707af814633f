"""How large the weights are after a day: a model that ran away shows it here before anything else.

All from the weights as they stand, so a day that was interrupted and resumed tells the same.
"""

from typing import Any

import numpy as np
import torch

from embeddings.shard import Shard
from trainer.learner import Learner


@torch.no_grad()
def norms(learner: Learner) -> dict[str, Any]:
    """dense: the root of the mean square of the dense weights; lag: of their distance from their moving average: how
    far the last steps went; rows: by table, of the rows that today's ids have. Collective.
    """
    weights = torch.cat([p.flatten().double() for p in learner.model.parameters()])
    averages = torch.cat([p.flatten().double() for p in learner.averaged.module.parameters()])
    found: dict[str, Any] = {"dense": _root_mean_square(weights), "lag": _root_mean_square(weights - averages)}
    sums_T2 = torch.tensor([squares(learner.embeddings.shard, name) for name in learner.embeddings.shard.names])
    sums_T2 = learner.exchange.all_reduce(sums_T2.double())
    found["rows"] = {
        name: (square / count) ** 0.5
        for name, (square, count) in zip(learner.embeddings.shard.names, sums_T2.tolist(), strict=True)
        if count
    }
    return found


def squares(shard: Shard, table: str) -> tuple[float, float]:
    """Over this worker's rows of a table that were seen today: the sum of the squares, and of how many numbers."""
    pool = shard.pool_of(table)
    rows = pool.ids.rows(shard.number[table])
    rows = rows[shard.seen_today(pool.ids, rows)]
    rows = rows[np.argsort(pool.ids.key_R[rows])]  # sums in one order, wherever the rows lie
    return float(pool.lookup(rows).double().square().sum()), float(rows.size * pool.dim)


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
