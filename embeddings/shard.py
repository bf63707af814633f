"""One worker's part of every table: who has a row, who waits for one, who loses his, and what was counted.

Methods whose docstring says so are collective: all workers call them in the same order.

Shape letters: U distinct pairs (table, key), E kinds of events, T tables, W workers, D numbers a row.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.admission import CountSketch, Waiting
from embeddings.buckets import buckets_of, hash64, keys_of
from embeddings.dedupe import Bytes, Int64s
from embeddings.exchange import Exchange, LocalExchange, smallest
from embeddings.idmap import MAX_TABLES, IdMap
from embeddings.kernels import FbgemmRows
from embeddings.optim import RowOptimizer
from embeddings.pool import Columns, Layout, MakeKernel, RowPool
from embeddings.table import TableConfig
from embeddings.tallies import IMPRESSIONS, SIGHTINGS, Floats, Ledger, Periods, Tally

_HEADROOM = 1.25  # shards are not exactly equal: without it, a full table would double on some of them
_EVICT_SHARE = 0.05  # of a full table, at once: finding the least valuable rows is a pass over all of them

# What is counted of a table's ids between two calls of reset_counts. ids: asked for, repeats included. distinct: after
# each worker's batch was deduped. hit: distinct pairs that had a row. new: got one; admitted: of those, after waiting.
# rejected: had to go without since the table was full. evicted: lost theirs. unknown: read the default row in scoring.
COUNTS = ("ids", "distinct", "hit", "new", "admitted", "rejected", "evicted", "unknown")


class Shard:
    """Rows of the buckets that this worker owns, for all tables.

    labels: what may happen on a row besides an impression. tallies: those of each table beside its value. kernel:
    makes a RowKernel of rows, dim, type and device.
    """

    def __init__(
        self,
        tables: Mapping[str, TableConfig],
        optimizer: RowOptimizer,
        exchange: Exchange | None = None,
        *,
        labels: Sequence[str] = (),
        tallies: Mapping[str, Sequence[Tally]] | None = None,
        seed: int = 0,
        device: torch.device | None = None,
        kernel: MakeKernel = FbgemmRows,
    ):
        assert len(tables) <= MAX_TABLES, f"at most {MAX_TABLES} tables"
        self.tables, self.names, self.exchange = dict(tables), list(tables), exchange or LocalExchange()
        self.number = {name: t for t, name in enumerate(self.names)}
        self.device = device or torch.device("cpu")
        self.buckets = buckets_of(self.exchange.rank, self.exchange.num_workers)
        self.periods, self.waiting = Periods(), Waiting()
        of_tables = [[_value(table), *(tallies or {}).get(name, ())] for name, table in tables.items()]
        used = {event for of_table in of_tables for tally in of_table for event in tally.weights}
        self.labels = list(labels)
        self.ledger = Ledger(of_tables, [SIGHTINGS, *(e for e in (IMPRESSIONS, *labels) if e in used)])
        self.sketches = {
            name: CountSketch(table.admission.cells, self.buckets)
            for name, table in tables.items()
            if table.min_count > 1 and table.admission.kind == "sketch"
        }
        self.pools = self._make_pools(optimizer, kernel)
        self.evicted: dict[str, list[Int64s]] = {name: [] for name in tables}  # keys, since the last snapshot
        self.admitted: dict[str, list[Int64s]] = {name: [] for name in tables}  # or forgotten: wait no longer
        self.before_change: Callable[[RowPool, Int64s], None] = lambda pool, rows: None
        self._seeds = {name: hash_name(name, seed) for name in tables}
        self._min_count_T = np.array([table.min_count for table in tables.values()], np.int64)
        self.overall_S: dict[str, Floats] = {}  # each table's statistics over all of its ids, as the day began
        self.reset_counts()

    def _make_pools(self, optimizer: RowOptimizer, kernel: MakeKernel) -> list[RowPool]:
        by_layout: dict[Layout, list[int]] = {}
        for t, table in enumerate(self.tables.values()):
            layout = Layout(table.dim, table.dtype, len(self.ledger.columns(t)))
            by_layout.setdefault(layout, []).append(t)
        workers = self.exchange.num_workers
        share = _HEADROOM / workers if workers > 1 else 1.0
        return [
            RowPool(
                layout,
                numbers,
                int(share * sum(self.tables[self.names[t]].capacity_rows for t in numbers)),
                optimizer,
                self.device,
                kernel,
            )
            for layout, numbers in by_layout.items()
        ]

    def pool_of(self, table: str) -> RowPool:
        return next(pool for pool in self.pools if self.number[table] in pool.tables)

    @property
    def all_ids(self) -> list[IdMap]:
        """The maps of those that wait, then of each pool."""
        return [self.waiting.ids, *(pool.ids for pool in self.pools)]

    def statistics(self, table: str) -> list[str]:
        """The names of a table's tallies besides value."""
        return [tally.name for tally in self.ledger.tallies[self.number[table]][1:]]

    def begin_day(self, day: int) -> None:
        """From here on it is this day: a number that rises by one a day. Collective."""
        if day != self.periods.today:
            self.periods.begin(day)
        self.ledger.begin(self.periods)
        for name, sketch in self.sketches.items():
            sketch.begin_day(day, self.tables[name].admission.forget_days)
        self.overall_S = {name: self._sum_statistics(name) for name in self.tables if self.statistics(name)}

    def find(self, pool: RowPool, key_U: Int64s, table_U: Bytes) -> tuple[Int64s, Floats]:
        """The rows of distinct pairs, -1 where there is none, and their statistics. For scoring: nothing is counted but
        the unknown.
        """
        rows_U = pool.ids.find(key_U, table_U)
        self.count("unknown", table_U[rows_U < 0])
        return rows_U, self.statistics_of(pool, rows_U)

    def statistics_of(self, pool: RowPool, rows_U: Int64s) -> Floats:
        """The tallies that a model reads: all but the first, value."""
        if pool.layout.num_tallies == 1:
            return np.zeros((rows_U.size, 0), np.float32)
        return self.ledger.read(pool.ids, rows_U)[:, 1:].copy()

    def seen_today(self, ids: IdMap, rows: Int64s) -> NDArray[np.bool_]:
        """Which of the rows were seen today. (A day has two periods where a snapshot of it was loaded.)"""
        return self.periods.ages()[ids.seen_R[rows]] == 0

    def _sum_statistics(self, table: str) -> Floats:
        """A table's statistics over all of its ids and workers, as today began: [S] (collective). They are summed up in
        whole 2^-20ths, so that the order of the rows does not matter.
        """
        pool = self.pool_of(table)
        rows = pool.ids.rows(self.number[table])
        statistics_US = self.ledger.read(pool.ids, rows, as_today_began=True)[:, 1:]
        total_S = np.rint(statistics_US.astype(np.float64) * 2**20).astype(np.int64).sum(0)
        return (self.exchange.all_reduce(torch.from_numpy(total_S)).numpy() / 2**20).astype(np.float32)

    def meet(self, pool: RowPool, key_U: Int64s, table_U: Bytes, event_UE: Int64s) -> tuple[Int64s, Floats]:
        """The rows of distinct pairs that a batch brings, -1 where there is none, and their statistics before it. For
        training: those that are due get a row, and what happened to them is entered. Collective.
        """
        rows_U = pool.ids.find(key_U, table_U)
        missing = np.flatnonzero(rows_U < 0)
        self.count("hit", table_U[rows_U >= 0])
        if missing.size or self._fixed(pool):
            rows_U[missing] = self._admit(pool, key_U[missing], table_U[missing], event_UE[missing, 0], rows_U)
        statistics_UC = self.statistics_of(pool, rows_U)
        self.before_change(pool, rows_U[rows_U >= 0])
        self.ledger.add(pool.ids, rows_U, event_UE, self.periods.now)
        return rows_U, statistics_UC

    def _admit(self, pool: RowPool, key_U: Int64s, table_U: Bytes, count_U: Int64s, in_use: Int64s) -> Int64s:
        """Rows for those of the pairs that have been seen often enough and find room, -1 for the others."""
        total_U = self._sightings(key_U, table_U, count_U)
        due_U = total_U >= self._min_count_T[table_U]
        due_U = self._with_room(pool, key_U, table_U, due_U, in_use)
        key, table = key_U[due_U], table_U[due_U]
        weight_UD = self._first_weight(key, table)
        rows_U = np.full(key_U.size, -1, np.int64)
        rows_U[due_U] = rows = pool.add(key, table, weight_UD)
        pool.ids.count_R[rows] = np.maximum(total_U - count_U, 0)[due_U]  # a sketch counts no further than 255
        waited = self._min_count_T[table] > 1
        self._end_wait(key[waited], table[waited])
        self.count("new", table)
        self.count("admitted", table[waited])
        return rows_U

    def _sightings(self, key_U: Int64s, table_U: Bytes, count_U: Int64s) -> Int64s:
        """All sightings so far of pairs without a row, these ones included."""
        total_U = count_U.copy()
        on_trial = self._min_count_T[table_U] > 1
        for name, sketch in self.sketches.items():
            of_table = table_U == self.number[name]
            total_U[of_table] = sketch.add(key_U[of_table], count_U[of_table])
            on_trial &= ~of_table
        if on_trial.any():
            total_U[on_trial] = self.waiting.add(
                key_U[on_trial], table_U[on_trial], count_U[on_trial], self.periods.now
            )
        return total_U

    def _with_room(
        self, pool: RowPool, key_U: Int64s, table_U: Bytes, due_U: NDArray[np.bool_], in_use: Int64s
    ) -> NDArray[np.bool_]:
        """Which of the pairs that are due find room, the same on any number of workers: those of the lowest keys."""
        fixed = self._fixed(pool)
        if not fixed:
            return due_U
        workers, rank = self.exchange.num_workers, self.exchange.rank
        known = np.zeros((workers, 2, len(fixed)), np.int64)  # by worker: pairs that are due, rows that there are
        for i, t in enumerate(fixed):
            known[rank, :, i] = (due_U & (table_U == t)).sum(), pool.ids.num_rows_T[t]
        known = self.exchange.all_reduce(torch.from_numpy(known)).numpy()
        due_U = due_U.copy()
        for i, t in enumerate(fixed):
            table = self.tables[self.names[t]]
            due_W, rows = known[:, 0, i], int(known[:, 1, i].sum())
            lacking = rows + int(due_W.sum()) - table.capacity_rows
            if lacking > 0 and table.when_full == "evict":
                many = max(lacking, int(table.capacity_rows * _EVICT_SHARE))
                rows -= self.evict_least(self.names[t], many, in_use)
            mine = np.flatnonzero(due_U & (table_U == t))
            room = max(0, table.capacity_rows - rows - int(due_W[:rank].sum()))
            turned_away = mine[np.argsort(key_U[mine])][room:]
            due_U[turned_away] = False
            self.count("rejected", table_U[turned_away])
        return due_U

    def _fixed(self, pool: RowPool) -> list[int]:
        return [t for t in pool.tables if not self.tables[self.names[t]].grow]

    def evict_least(self, table: str, how_many: int, in_use: Int64s | None = None) -> int:
        """Evict a table's least valuable rows over all workers, but none of those in use; returns how many.
        Collective.
        """
        pool = self.pool_of(table)
        rows = pool.ids.rows(self.number[table])
        if in_use is not None:
            rows = rows[~np.isin(rows, in_use)]
        value = self.ledger.read(pool.ids, rows)[:, 0].copy()
        order = np.stack(
            [value.view(np.int32).astype(np.int64) << 32, pool.ids.key_R[rows]]
        )  # floats >= 0 sort as bits
        chosen = smallest(torch.from_numpy(order), how_many, self.exchange).numpy()
        self._evict(pool, rows[chosen])
        return int(self.exchange.all_reduce(torch.tensor([chosen.sum()])).item())

    def _evict(self, pool: RowPool, rows: Int64s) -> None:
        self.before_change(pool, rows)
        table_U, key_U = pool.ids.table_R[rows], pool.ids.key_R[rows]
        for t in np.unique(table_U):
            self.evicted[self.names[t]].append(key_U[table_U == t])
        self.count("evicted", table_U)
        pool.remove(rows)

    def end_day(self) -> None:
        """Evict who was not seen for a table's ttl_days, then the least valuable above its budget; forget who waited
        in vain. Collective.
        """
        ages = self.periods.ages()
        for name, table in self.tables.items():
            pool, t = self.pool_of(name), self.number[name]
            rows = pool.ids.rows(t)
            if table.ttl_days is not None:
                self._evict(pool, rows[ages[pool.ids.seen_R[rows]] >= table.ttl_days])
            if table.budget_rows is not None:
                total = self.exchange.all_reduce(torch.tensor([pool.ids.num_rows_T[t]]))
                self.evict_least(name, max(0, int(total.item()) - table.budget_rows))
            waiting = self.waiting.ids.rows(t)
            waiting = waiting[ages[self.waiting.ids.seen_R[waiting]] >= table.admission.forget_days]
            self._end_wait(self.waiting.ids.key_R[waiting], self.waiting.ids.table_R[waiting])

    def _end_wait(self, key_U: Int64s, table_U: Bytes) -> None:
        self.waiting.remove(key_U, table_U)
        for t in np.unique(table_U):
            self.admitted[self.names[t]].append(key_U[table_U == t])

    def _first_weight(self, key_U: Int64s, table_U: Bytes) -> Tensor | None:
        """New rows: uniform, from the key and the seed alone; None when all start at zero."""
        configs = {int(t): self.tables[self.names[t]] for t in np.unique(table_U)}
        if not any(config.init_scale for config in configs.values()):
            return None
        dim = next(iter(configs.values())).dim
        weight_UD = np.zeros((key_U.size, dim), np.float32)
        for t, config in configs.items():
            of_table = table_U == t
            column_D = hash64(torch.arange(dim) + self._seeds[self.names[t]]).numpy()
            bits_N = keys_of((key_U[of_table, None] ^ column_D).ravel()) >> 11
            weight_UD[of_table] = (bits_N * (config.init_scale / 2.0**52)).reshape(-1, dim)
        return torch.from_numpy(weight_UD)

    def saved(self) -> None:
        """From here on rows count as changed since the snapshot, which was just taken."""
        for ids in self.all_ids:
            ids.changed.fill(0)
        for keys in (*self.evicted.values(), *self.admitted.values()):
            keys.clear()

    def export(self, table: str) -> Columns:
        """All that is known of a table's rows here, sorted by key: RowPool.known, and the day each was last seen."""
        pool = self.pool_of(table)
        rows = pool.ids.rows(self.number[table])
        columns = pool.known(rows[np.argsort(pool.ids.key_R[rows])])
        return columns | {"last_seen_day": np.array(self.periods.days)[columns["seen"]]}

    def default_of(self, table: str) -> list[float] | None:
        """What an id without a row reads; None: zeros."""
        if self.tables[table].default_row == "zero":
            return None
        pool = self.pool_of(table)
        row: list[float] = pool.lookup(pool.default_rows(np.array([self.number[table]], np.uint8)))[0].tolist()
        return row

    def put(self, table: str, key_U: Int64s, known: Columns) -> None:
        """Enter rows that a snapshot holds, of ids that have none: weight, optimizer states, count, tallies, seen."""
        pool = self.pool_of(table)
        rows_U = pool.add(key_U, np.full(key_U.size, self.number[table], np.uint8), None)
        pool.ids.count_R[rows_U], pool.ids.seen_R[rows_U] = known["count"], known["seen"]
        pool.ids.tally_RC[rows_U] = known["tally"]
        pool.write(rows_U, torch.from_numpy(known["weight"]), _states(pool, known))

    def put_default(self, table: str, known: Columns) -> None:
        """Set a table's default row from a snapshot."""
        pool = self.pool_of(table)
        rows = pool.default_rows(np.array([self.number[table]], np.uint8))
        pool.ids.count_R[rows] = known["count"]
        pool.write(rows, torch.from_numpy(known["weight"]), _states(pool, known))

    def fit(self) -> None:
        """After rows came from a snapshot: it is the newest day on which an id was seen, and a table that may not grow
        holds no more than its capacity, or TooManyRows is raised. Collective.
        """
        day_W = torch.zeros(self.exchange.num_workers, dtype=torch.int64)
        day_W[self.exchange.rank] = max(self.periods.days)
        self.begin_day(int(self.exchange.all_reduce(day_W).max().item()))
        for name, table in self.tables.items():
            mine = torch.tensor([self.pool_of(name).ids.num_rows_T[self.number[name]]])
            rows = int(self.exchange.all_reduce(mine).item())
            if not table.grow and rows > table.capacity_rows:
                if table.when_full == "reject":
                    raise TooManyRows(name, rows, table.capacity_rows)
                self.evict_least(name, rows - table.capacity_rows)

    def count(self, what: str, table_U: Bytes) -> None:
        """Add to a count of each table as many as are named."""
        self.counts[what] += np.bincount(table_U, minlength=len(self.names))

    def reset_counts(self) -> None:
        self.counts = {name: np.zeros(len(self.names), np.int64) for name in COUNTS}


def _states(pool: RowPool, known: Columns) -> dict[str, Tensor]:
    """Of the optimizer's states those that are known; under another optimizer the others start anew."""
    return {name: torch.from_numpy(known[name]) for name in pool.optimizer.states if name in known}


class TooManyRows(Exception):
    """More rows live than a table that may neither grow nor evict is now given: table, rows, capacity."""

    def __init__(self, table: str, rows: int, capacity_rows: int):
        super().__init__(f"table {table}: {rows} rows, capacity {capacity_rows}")
        self.table, self.rows, self.capacity_rows = table, rows, capacity_rows


def _value(table: TableConfig) -> Tally:
    return Tally("value", table.value or {SIGHTINGS: 1.0}, table.value_half_life_days)


def hash_name(name: str, seed: int) -> int:
    """A stable 63-bit number for a name and a seed (FNV-1a over the name, started from the seed)."""
    value = 0xCBF29CE484222325 ^ seed
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value >> 1
