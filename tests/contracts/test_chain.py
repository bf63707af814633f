"""Thirty days of a vocabulary that moves on: new ids come every day, old ones are seen no more.

Every day on another number of workers, from what the day before left on disk.
"""

import gc
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import threads
import torch
from contracts.examples import coefficients, jagged
from contracts.play import ids_of, waiting_in

from embeddings.accounts import account
from embeddings.client import ShardedEmbeddings
from embeddings.exchange import Exchange, LocalExchange
from embeddings.kernels import TorchRows
from embeddings.optim import RowwiseAdagrad
from embeddings.pooling import Pooling, pool
from embeddings.shard import Shard
from embeddings.snapshot import Layer, Part, Snapshot, load
from embeddings.table import Admission, TableConfig

LOCAL = pyarrow.fs.LocalFileSystem()
DAY, DAYS, TTL, FORGET = 738_000, 30, 3, 2
TABLE = TableConfig(
    dim=4, capacity_rows=64, init_scale=0.5, min_count=2, admission=Admission(forget_days=FORGET), ttl_days=TTL
)
_NUMPY = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
WORKERS = (1, 2, 3, 5, 2, 8)


def batches(day: int) -> list[list[list[int]]]:
    """Three batches of 40 rows: the ids of a window that moves by 60 a day, the newer ones more often."""
    random = np.random.default_rng(day)
    newest = 60 * day + 300
    return [
        [(newest - random.geometric(1 / 100, random.integers(1, 6)).clip(max=300)).tolist() for _ in range(40)]
        for _ in range(3)
    ]


def store_on(exchange: Exchange) -> ShardedEmbeddings:
    return ShardedEmbeddings(Shard({"item": TABLE}, RowwiseAdagrad(), exchange, kernel=TorchRows), {"item": "item"})


def train(store: ShardedEmbeddings, day: int) -> dict[str, float]:
    """A day, and its account. Gradients are quarters: their sums are exact on any number of workers."""
    store.shard.begin_day(DAY + day)
    store.shard.reset_counts()
    mine = slice(store.exchange.rank, None, store.exchange.num_workers)
    for step, lists in enumerate(batches(day)):
        (block,) = store.pull({"item": jagged(lists[mine])}, insert=True)
        factors_BD = torch.from_numpy(coefficients(0, len(lists), step, 4)[mine]).float()
        (pool(block, {"item": Pooling(mean=False)}) * factors_BD).sum().backward()
        store.push([block])
    store.shard.end_day()
    return account(store.shard)["item"]


Rows = dict[int, tuple[int, int, bytes]]  # by id: count, last day, and all else bit for bit


@dataclass
class Told:
    """What a worker tells of a day: its account, all that it knows, what it wrote."""

    account: dict[str, float]
    rows: Rows
    waiting: dict[int, tuple[int, int]]
    delta: list[Part] = field(default_factory=list)
    full: list[Part] = field(default_factory=list)


def told(shard: Shard, of_day: dict[str, float]) -> Told:
    columns = shard.export("item")
    rest = [columns[what] for what in ("weight", "adagrad_sum", "tally")]
    rows = {
        i: (int(columns["count"][n]), int(columns["last_seen_day"][n]), b"".join(c[n].tobytes() for c in rest))
        for n, i in enumerate(ids_of(columns["key"]).tolist())
    }
    return Told(of_day, rows, waiting_in(shard, "item"))


def live(exchange: Exchange, day: int, layers: Sequence[Layer], folder: Path) -> Told:
    """A day on fresh workers, and what it leaves: a delta, and all of it as a base of its own."""
    store = store_on(exchange)
    if layers:
        load(store.shard, LOCAL, layers)
        store.shard.fit()
    found = told(store.shard, train(store, day))
    found.delta = Snapshot(store.shard, base=not layers).write(LOCAL, str(folder / f"delta-{day}"))
    found.full = Snapshot(store.shard, base=True).write(LOCAL, str(folder / f"full-{day}"))
    return found


def reread(exchange: Exchange, layers: Sequence[Layer]) -> Told:
    shard = store_on(exchange).shard
    load(shard, LOCAL, layers)
    return told(shard, {})


def together(tellers: Sequence[Told]) -> tuple[Rows, dict[int, tuple[int, int]]]:
    """What all workers know; no id is with two of them."""
    rows = {i: row for teller in tellers for i, row in teller.rows.items()}
    waiting = {i: count for teller in tellers for i, count in teller.waiting.items()}
    assert len(rows) == sum(len(teller.rows) for teller in tellers)
    assert len(waiting) == sum(len(teller.waiting) for teller in tellers)
    return rows, waiting


class Ages:
    """The oracle: who has a row, who waits, and since when nobody was seen. Plain dicts of count and last day."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[int, int]] = {}
        self.waiting: dict[int, tuple[int, int]] = {}

    def live(self, day: int) -> dict[str, float]:
        """The day's account."""
        found = Counter(ids=0, hit=0, new=0, admitted=0, evicted=0)
        for lists in batches(day):
            for i, seen in Counter(i for ids in lists for i in ids).items():
                found["ids"] += seen
                found["hit"] += i in self.rows
                of = self.rows if i in self.rows else self.waiting
                of[i] = count, _ = of.get(i, (0, 0))[0] + seen, DAY + day
                if of is self.waiting and count >= TABLE.min_count:
                    self.rows[i] = self.waiting.pop(i)
                    found.update(new=1, admitted=1)
        gone = [i for i, (_, last) in self.rows.items() if DAY + day - last >= TTL]
        for i in gone:
            del self.rows[i]
        self.waiting = {i: (n, last) for i, (n, last) in self.waiting.items() if DAY + day - last < FORGET}
        return {**found, "evicted": len(gone), "rows": len(self.rows), "waiting": len(self.waiting), "rejected": 0}


@dataclass
class Lived:
    """A day as its workers told of it, and what its base and deltas, and its full base, hold when they are read."""

    workers: list[Told]
    of_chain: list[Told]
    of_full: list[Told]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> list[Lived]:
    folder, layers, days = tmp_path_factory.mktemp("chain"), list[Layer](), []
    for day in range(DAYS):
        workers = threads.run(WORKERS[day % len(WORKERS)], live, day, layers, folder)
        layers.append(Layer(str(folder / f"delta-{day}"), [part for teller in workers for part in teller.delta]))
        full = Layer(str(folder / f"full-{day}"), [part for teller in workers for part in teller.full])
        days.append(Lived(workers, threads.run(1 + day % 2, reread, layers), threads.run(2 - day % 2, reread, [full])))
    return days


def test_base_and_deltas_are_the_full_base_of_every_day_bit_for_bit(lived: list[Lived]) -> None:
    for day in lived:
        truth = together(day.workers)
        assert together(day.of_chain) == truth and together(day.of_full) == truth


def test_a_delta_is_much_smaller_than_the_base_that_it_stands_for(lived: list[Lived]) -> None:
    rows = [
        sum(part.rows for teller in day.workers for part in teller.delta if part.kind == "rows") for day in lived[5:]
    ]
    seen = [len({i for lists in batches(day) for ids in lists for i in ids}) for day in range(5, DAYS)]
    assert all(held <= ids for held, ids in zip(rows, seen, strict=True))


def test_counters_add_up_over_thirty_days_that_change_hands(lived: list[Lived]) -> None:
    ages, yesterday = Ages(), 0.0
    for day, of_day in enumerate(lived):
        expected, found = ages.live(day), of_day.workers[0].account
        assert {what: found[what] for what in expected} == expected
        assert found["rows"] == yesterday + found["new"] - found["evicted"]
        rows, waiting = together(of_day.workers)
        assert {i: (count, last) for i, (count, last, _) in rows.items()} == ages.rows
        assert waiting == ages.waiting
        assert all(teller.account == found for teller in of_day.workers)
        yesterday = found["rows"]
    assert sum(of_day.workers[0].account["evicted"] > 0 for of_day in lived) > 20  # it was a life with losses


def test_thirty_days_that_change_hands_leave_what_one_worker_has_that_never_stopped(lived: list[Lived]) -> None:
    store = store_on(LocalExchange())
    for day, of_day in enumerate(lived):
        one = told(store.shard, train(store, day))
        assert (one.rows, one.waiting) == together(of_day.workers)


def test_memory_is_flat_once_as_many_ids_go_as_come(tmp_path: Path) -> None:
    """Of the pool and its map, and of all arrays that numpy holds, with a delta every day."""
    store, reserved, arrays = store_on(LocalExchange()), [], []
    ids, waiting = store.shard.pools[0].ids, store.shard.waiting.ids
    for day in range(DAYS):
        if day == 10:
            tracemalloc.start()
        train(store, day)
        Snapshot(store.shard, base=day == 0).write(LOCAL, str(tmp_path / str(day)))
        reserved.append((ids.capacity_rows, waiting.capacity_rows))
        if day % 6 == 5 and day > 10:
            gc.collect()
            arrays.append(sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([_NUMPY]).traces))
    tracemalloc.stop()
    assert len(set(reserved[10:])) == 1 and ids.num_rows < ids.capacity_rows < 4 * ids.num_rows
    lists = 4 * (ids.capacity_rows + waiting.capacity_rows)  # of the rows that are free: they breathe with the days
    assert max(arrays) - arrays[0] < lists + 2 * DAYS * 100  # and two periods a day, of some numbers each


def test_a_day_of_nothing_new_leaves_no_trace_but_its_age(lived: list[Lived], tmp_path: Path) -> None:
    """An idle night: saved again as a delta, a chain holds what it held."""

    def idle(exchange: Exchange) -> list[Part]:
        shard = store_on(exchange).shard
        load(shard, LOCAL, layers)
        shard.fit()
        return Snapshot(shard, base=False).write(LOCAL, str(tmp_path / "idle"))

    def first(exchange: Exchange) -> Any:
        return live(exchange, 0, [], tmp_path)

    layers = [Layer(str(tmp_path / "delta-0"), threads.run(1, first)[0].delta)]
    (parts,) = threads.run(1, idle)
    assert [part for part in parts if part.kind == "rows"] == []
    layers.append(Layer(str(tmp_path / "idle"), parts))
    assert together(threads.run(2, reread, layers)) == together(lived[0].workers)
