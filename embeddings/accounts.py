"""What happened to the ids of each table, over all shards: nothing is lost without being counted."""

import math

import numpy as np
import torch

from embeddings.exchange import smallest
from embeddings.shard import COUNTS, Shard

_TOP = 100  # of so many ids, the most frequent one


def account(shard: Shard) -> dict[str, dict[str, float]]:
    """By table, over all workers (collective): the shard's counts since they were reset, and how things stand.

    repeats: ids saved by deduping. waiting: ids that wait for a row. seen,
    waiting_seen: of both, those that were seen today. rows, free, bytes: of all shards; a pool's bytes
    and free rows are told of each table by its share of the rows. load: rows a row reserved. imbalance: rows of the
    largest shard over the mean. top_share: of all sightings of the ids that have a row, those of the most frequent
    hundredth.
    """
    mine = np.array([_of_table(shard, name) for name in shard.names], np.float64)
    workers, rank = shard.exchange.num_workers, shard.exchange.rank
    everyone = torch.zeros(workers, *mine.shape, dtype=torch.float64)
    everyone[rank] = torch.from_numpy(mine)
    everyone = shard.exchange.all_reduce(everyone)
    names = [*COUNTS, "waiting", "seen", "waiting_seen", "rows", "free", "bytes"]
    found = {}
    for t, table in enumerate(shard.names):
        sums = dict(zip(names, everyone[:, t].sum(0).tolist(), strict=True))
        counts: dict[str, float] = {name: int(value) for name, value in sums.items()}
        rows_W = everyone[:, t, names.index("rows")]
        counts["repeats"] = counts["ids"] - counts["distinct"]
        counts["load"] = round(counts["rows"] / max(counts["rows"] + counts["free"], 1), 4)
        counts["imbalance"] = round(float(rows_W.max() / rows_W.mean().clamp(min=1e-9)), 4)
        counts["top_share"] = round(_top_share(shard, table, int(counts["rows"])), 4)
        found[table] = counts
    return found


def _of_table(shard: Shard, table: str) -> list[float]:
    t, pool = shard.number[table], shard.pool_of(table)
    rows = int(pool.ids.num_rows_T[t])
    share = rows / max(pool.ids.num_rows, 1)
    free = share * (pool.ids.capacity_rows - pool.ids.num_rows - len(pool.tables))
    counts = [shard.counts[name][t] for name in COUNTS]
    waiting = shard.waiting.ids
    seen = [int(shard.seen_today(ids, ids.rows(t)).sum()) for ids in (pool.ids, waiting)]
    return [*counts, int(waiting.num_rows_T[t]), *seen, rows, free, share * pool.memory_bytes]


def _top_share(shard: Shard, table: str, num_rows: int) -> float:
    pool = shard.pool_of(table)
    rows = pool.ids.rows(shard.number[table])
    count = pool.ids.count_R[rows].astype(np.int64)
    order = torch.from_numpy(np.stack([(1 << 40) - count, pool.ids.key_R[rows]]))
    top = smallest(order, math.ceil(num_rows / _TOP), shard.exchange).numpy()
    sums = shard.exchange.all_reduce(torch.tensor([count[top].sum(), count.sum()], dtype=torch.int64))
    return float(sums[0] / sums[1].clamp(min=1))
