"""Ids as bad as they come: multiples of the number of workers, all equal, Zipf's, the extremes, equal in half a key.

Nothing collides, nothing hangs, and no shard has much more than its share.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import threads
from contracts.examples import EXTREMES, jagged
from contracts.play import ids_of

from embeddings.accounts import account
from embeddings.client import ShardedEmbeddings
from embeddings.exchange import Exchange
from embeddings.kernels import TorchRows
from embeddings.optim import Sgd
from embeddings.shard import Shard
from embeddings.table import TableConfig

N = 20_000
ROWS = 500  # of a batch


def zipf(seed: int) -> list[int]:
    return np.random.default_rng(seed).zipf(1.2, 4 * N).tolist()


def of_keys(keys: Sequence[int]) -> list[int]:
    return ids_of(np.array(keys, np.int64)).tolist()


MANY = {  # at least thousands of distinct ids: shared out evenly
    "a row of numbers": list(range(N)),
    "negative": list(range(-N, 0)),
    "multiples of 2, 4 and 8": list(range(0, 8 * N, 8)),
    "multiples of 3 and 5": list(range(0, 15 * N, 15)),
    "multiples of 7": list(range(0, 7 * N, 7)),
    "multiples of 4096": list(range(0, 4096 * N, 4096)),
    "in the upper half only": [i << 32 for i in range(N)],
    "at the top of the range": list(range(2**63 - N, 2**63)),
    "at the bottom of the range": list(range(-(2**63), -(2**63) + N)),
    "powers of a hash": [(i * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for i in range(N)],
    "Zipf 1.2": zipf(0),
    "with extremes between": [*range(N), *EXTREMES, -1, *EXTREMES],
}
FEW = {  # degenerate: they may lie with one shard, but must not be lost or mixed up
    "all equal": [7] * N,
    "all -1": [-1] * N,
    "two, in turns": [-1, 0] * (N // 2),
    "the extremes": list(EXTREMES) * 500,
    "keys equal in their low halves": of_keys([(k - 1_000) * 2**32 + 5 for k in range(2_000)]),
    "keys equal in their high halves": of_keys([5 * 2**32 + k for k in range(2_000)]),
    "keys of the first bucket": of_keys([-(2**63) + k * 2**20 for k in range(2_000)]),
    "keys of the last bucket": of_keys([2**63 - 1 - k * 2**20 for k in range(2_000)]),
}


def seen_by(exchange: Exchange, ids: Sequence[int]) -> tuple[dict[int, tuple[int, float]], dict[str, float]]:
    """Each id here with its count and its weight, after every sighting added a gradient of -1; and the account."""
    shard = Shard({"t": TableConfig(dim=4, capacity_rows=16)}, Sgd(lr=1.0), exchange, kernel=TorchRows)
    store = ShardedEmbeddings(shard, {"f": "t"})
    rows = np.array_split(np.array(ids, np.int64), ROWS)[exchange.rank :: exchange.num_workers]
    for batch in np.array_split(np.arange(len(rows)), 5):
        (block,) = store.pull({"f": jagged([rows[b].tolist() for b in batch])}, insert=True)
        (-block.rows_UD[block.ids.values_N]).sum().backward()
        store.push([block])
    columns = shard.export("t")
    found = ids_of(columns["key"]).tolist()
    assert len(np.unique(columns["row"])) == len(found)
    known = zip(columns["count"].tolist(), columns["weight"][:, 0].tolist(), strict=True)
    return dict(zip(found, known, strict=True)), account(shard)["t"]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("ids", [*MANY, *FEW])
def test_every_id_has_one_row_that_all_of_its_sightings_and_none_else_reached(ids: str, workers: int) -> None:
    """The oracle counts with a dict; whole numbers below 2^24 are exact in float32."""
    sightings = Counter((MANY | FEW)[ids])
    ends = threads.run(workers, seen_by, (MANY | FEW)[ids])
    found = {i: known for mine, _ in ends for i, known in mine.items()}
    assert sum(len(mine) for mine, _ in ends) == len(found)  # one owner each
    assert found == {i: (n, float(n)) for i, n in sightings.items()}
    for _, counts in ends:
        assert (counts["ids"], counts["rows"], counts["new"]) == (sightings.total(), len(sightings), len(sightings))
        assert ids in FEW or counts["imbalance"] <= 1.3
