"""One worker's part of every table: its keys, its rows, and what was counted.

Shape letters: U distinct keys, D floats a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embeddings.buckets import hash64
from embeddings.idmap import IdMap
from embeddings.kernels import FbgemmRows, RowKernel
from embeddings.optim import RowwiseAdagrad
from embeddings.pool import RowPool
from embeddings.table import TableConfig

_HEADROOM = (
    1.25  # shards are not exactly equal: without it, a table at its stated capacity would double on some of them
)


@dataclass
class IdCounts:
    """What happened to the ids of one table since the counts were reset.

    ids: ids asked for, repeats included. distinct: after each worker's batch was deduped. new: ids that got a row.
    unknown: distinct ids without a row that read the default row (scoring never inserts).
    """

    ids: int = 0
    distinct: int = 0
    new: int = 0
    unknown: int = 0


class Shard:
    """Keys and rows of the buckets that this worker owns, for all tables."""

    def __init__(
        self,
        tables: Mapping[str, TableConfig],
        optimizer: RowwiseAdagrad,
        *,
        num_shards: int = 1,
        seed: int = 0,
        device: torch.device | None = None,
        kernel: Callable[[int, int, torch.device], RowKernel] = FbgemmRows,
    ):
        self.device = device = device or torch.device("cpu")
        share = _HEADROOM / num_shards if num_shards > 1 else 1.0
        self.tables = dict(tables)
        self.maps = {name: IdMap(int(table.capacity_rows * share), device) for name, table in tables.items()}
        self.counts = {name: IdCounts() for name in tables}
        self.pools: dict[int, RowPool] = {}
        for dim in sorted({table.dim for table in tables.values()}):
            rows = sum(table.capacity_rows for table in tables.values() if table.dim == dim)
            self.pools[dim] = RowPool(dim, int(rows * share), optimizer, device, kernel)
        self._seeds = {name: hash_name(name, seed) for name in tables}

    def rows_of(self, table: str, keys_U: Tensor, *, insert: bool) -> Tensor:
        """The rows of distinct keys in the pool of the table's dim; unknown keys get a row, or -1 when not insert."""
        ids = self.maps[table]
        rows_U = ids.find(keys_U)
        missing = rows_U < 0
        num_missing = int(missing.sum())
        if num_missing and insert:
            keys = keys_U[missing]
            rows_U[missing] = self.add(
                table, keys, self._first_weight(table, keys), torch.zeros(num_missing, device=keys.device)
            )
            self.counts[table].new += num_missing
        elif num_missing:
            self.counts[table].unknown += num_missing
        return rows_U

    def add(self, table: str, keys_U: Tensor, weight_UD: Tensor, state_U: Tensor) -> Tensor:
        """Give distinct new keys rows with these weights and state."""
        rows_U = self.pools[self.tables[table].dim].take(weight_UD, state_U)
        self.maps[table].insert(keys_U, rows_U)
        return rows_U

    def _first_weight(self, table: str, keys_U: Tensor) -> Tensor:
        config = self.tables[table]
        if config.init_scale == 0:
            return torch.zeros(keys_U.numel(), config.dim, device=keys_U.device)
        columns_D = hash64(torch.arange(config.dim, device=keys_U.device) + self._seeds[table])
        uniform_UD = (hash64(keys_U.unsqueeze(1) ^ columns_D) >> 11) / 2.0**52
        return (uniform_UD * config.init_scale).float()

    def export(self, table: str) -> tuple[Tensor, Tensor, Tensor]:
        """All of a table's rows here, sorted by key: keys [U], weights [U, D], optimizer state [U]."""
        keys_U, rows_U = self.maps[table].items()
        keys_U, order = keys_U.sort()
        pool = self.pools[self.tables[table].dim]
        return keys_U, pool.lookup(rows_U[order]), pool.state(rows_U[order])

    def reset_counts(self) -> None:
        self.counts = {name: IdCounts() for name in self.tables}


def hash_name(name: str, seed: int) -> int:
    """A stable 63-bit number for a name and a seed (FNV-1a over the name, started from the seed)."""
    value = 0xCBF29CE484222325 ^ seed
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value >> 1
