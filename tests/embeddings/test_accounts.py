"""The report on ids against Counters and sums over the shards, with one worker and with two."""

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import many
import numpy as np
import pytest
import torch

from embeddings.accounts import account
from embeddings.client import ShardedEmbeddings
from embeddings.exchange import Exchange, LocalExchange
from embeddings.jagged import Jagged
from embeddings.kernels import TorchRows
from embeddings.optim import Sgd
from embeddings.shard import COUNTS, Shard
from embeddings.table import TableConfig

TABLES = {
    "plain": TableConfig(dim=4, ttl_days=2),
    "slow": TableConfig(dim=4, min_count=3),
    "shut": TableConfig(dim=4, capacity_rows=20, grow=False, when_full="reject"),
    "full": TableConfig(dim=4, capacity_rows=20, grow=False, budget_rows=12),
    "empty": TableConfig(dim=4),
    "wide": TableConfig(dim=8, capacity_rows=1_000),
}
DAYS, STEPS_A_DAY = [50, 51, 52, 53], 3
Array = np.ndarray[Any, Any]
Account = dict[str, dict[str, float]]


def batch_of(step: int) -> dict[str, Array]:
    """Each table's ids of a global batch. The wide table: 700 ids once, and of eight of them many more."""
    rng = np.random.default_rng(step)
    ids = {table: rng.zipf(1.5, 40) % 50 + 10 * step for table in TABLES}
    ids["empty"] = ids["empty"][:0]
    ids["wide"] = (
        np.concatenate([np.arange(700), np.repeat(np.arange(7), 100), np.full(50, 7)]) if step == 0 else ids["empty"]
    )
    return ids


@dataclass
class Day:
    """What one worker saw at the end of a day."""

    account: Account
    rows: dict[str, int]
    counts: dict[str, list[int]]  # the sightings of each row, by table
    room: int
    bytes: int


def work(exchange: Exchange) -> list[Day]:
    shard = Shard(TABLES, Sgd(), exchange, kernel=TorchRows)
    embeddings = ShardedEmbeddings(shard, {table: table for table in TABLES})
    days = [end_of_day(shard)]  # before anything came
    for step in range(len(DAYS) * STEPS_A_DAY):
        if step % STEPS_A_DAY == 0:
            shard.begin_day(DAYS[step // STEPS_A_DAY])
            shard.reset_counts()
        ids = {table: part_of(of, exchange.rank, exchange.num_workers) for table, of in batch_of(step).items()}
        rows = max(of.size for of in ids.values())
        embeddings.pull({table: in_rows(of, rows) for table, of in ids.items()}, insert=True)
        if step % STEPS_A_DAY == STEPS_A_DAY - 1:
            shard.end_day()
            days.append(end_of_day(shard))
    return days


def part_of(ids: Array, rank: int, num_workers: int) -> Array:
    return ids[rank::num_workers]


def in_rows(ids: Array, num_rows: int) -> Jagged:
    """One id a row, then rows without any."""
    lengths = (torch.arange(num_rows) < ids.size).long()
    return Jagged.from_lengths(torch.from_numpy(ids), lengths)


def end_of_day(shard: Shard) -> Day:
    counts = {name: shard.export(name)["count"].tolist() for name in shard.names}
    room = sum(pool.ids.capacity_rows - len(pool.tables) for pool in shard.pools)
    size = sum(pool.memory_bytes for pool in shard.pools)
    return Day(account(shard), {name: len(of) for name, of in counts.items()}, counts, room, size)


@pytest.fixture(scope="module", params=[1, 2])
def seen(request: pytest.FixtureRequest) -> list[list[Day]]:
    """What each worker saw, in worker order."""
    return [alone()] if request.param == 1 else many.run(request.param, work)


@functools.cache
def alone() -> list[Day]:
    return work(LocalExchange())


def test_every_worker_is_told_the_same(seen: list[list[Day]]) -> None:
    assert all(worker[day].account == seen[0][day].account for worker in seen for day in range(len(DAYS) + 1))


def test_ids_are_distinct_ones_and_repeats(seen: list[list[Day]]) -> None:
    for d, day in enumerate(seen[0][1:]):
        batches = [batch_of(d * STEPS_A_DAY + step) for step in range(STEPS_A_DAY)]
        for table, told in day.account.items():
            parts = [part_of(b[table], rank, len(seen)) for b in batches for rank in range(len(seen))]
            assert told["ids"] == sum(of.size for of in parts)
            assert told["distinct"] == sum(np.unique(of).size for of in parts)  # after each worker's dedupe
            assert told["ids"] == told["distinct"] + told["repeats"]


def test_every_pair_that_was_met_was_known_new_rejected_or_still_waits(seen: list[list[Day]]) -> None:
    sightings = {table: Counter[int]() for table in TABLES}
    for d, day in enumerate(seen[0][1:]):
        met, waited = Counter[str](), Counter[str]()
        for step in range(d * STEPS_A_DAY, (d + 1) * STEPS_A_DAY):
            for table, ids in batch_of(step).items():
                sightings[table].update(ids.tolist())
                met[table] += len(set(ids.tolist()))
                waited[table] += sum(sightings[table][i] < TABLES[table].min_count for i in set(ids.tolist()))
        for table, told in day.account.items():
            assert met[table] == told["hit"] + told["new"] + told["rejected"] + waited[table]
            assert told["admitted"] == (told["new"] if TABLES[table].min_count > 1 else 0)
        below = sum(count < 3 for count in sightings["slow"].values())
        assert day.account["slow"]["waiting"] == below and waited["slow"] and day.account["plain"]["waiting"] == 0


def test_rows_today_are_those_of_yesterday_and_the_new_ones_less_the_evicted(seen: list[list[Day]]) -> None:
    for yesterday, today in zip(seen[0], seen[0][1:], strict=False):
        for table, told in today.account.items():
            assert told["rows"] == yesterday.account[table]["rows"] + told["new"] - told["evicted"]
    last = seen[0][-1].account
    assert last["plain"]["evicted"] and last["full"]["evicted"] and last["full"]["rows"] == 12
    assert last["shut"]["rejected"] and last["shut"]["rows"] == 20 and last["full"]["unknown"] == 0


def test_rows_free_rows_bytes_load_and_imbalance_are_those_of_the_shards(seen: list[list[Day]]) -> None:
    for d in range(1, len(DAYS) + 1):
        of_workers = [worker[d] for worker in seen]
        told = of_workers[0].account
        for table in TABLES:
            rows = [day.rows[table] for day in of_workers]
            assert told[table]["rows"] == sum(rows)
            largest = max(rows) / (sum(rows) / len(rows)) if sum(rows) else 0
            assert told[table]["imbalance"] == round(largest, 4)
            load = told[table]["rows"] / max(told[table]["rows"] + told[table]["free"], 1)
            assert told[table]["load"] == round(load, 4)
        # each table's share is cut to a whole number on the way
        taken = sum(of["rows"] + of["free"] for of in told.values())
        assert 0 <= sum(day.room for day in of_workers) - taken < len(TABLES)
        assert 0 <= sum(day.bytes for day in of_workers) - sum(of["bytes"] for of in told.values()) < len(TABLES)


def test_the_top_share_is_that_of_the_most_frequent_hundredth_of_the_ids_with_a_row(seen: list[list[Day]]) -> None:
    wide = seen[0][1].account["wide"]
    assert wide["rows"] == 700 and wide["top_share"] == round(7 * 101 / (700 + 700 + 50), 4)  # by hand: seven of 700
    for d in range(1, len(DAYS) + 1):
        for table, told in seen[0][d].account.items():
            count = sorted((c for worker in seen for c in worker[d].counts[table]), reverse=True)
            share = sum(count[: math.ceil(len(count) / 100)]) / max(sum(count), 1)
            assert told["top_share"] == round(share, 4)


def test_nothing_is_told_of_tables_that_nothing_happened_to(seen: list[list[Day]]) -> None:
    before, empty = seen[0][0].account, seen[0][-1].account["empty"]
    stand = {"waiting", "seen", "waiting_seen", "rows", "free", "bytes"}
    assert set(empty) == {*COUNTS, *stand, "repeats", "load", "imbalance", "top_share"}
    assert not any(empty.values()) and not any(value for told in before.values() for value in told.values())


def test_all_but_what_depends_on_the_cut_is_the_same_with_one_worker(seen: list[list[Day]]) -> None:
    of_the_cut = {"distinct", "repeats", "free", "bytes", "load", "imbalance"}
    for mine, theirs in zip(seen[0], alone(), strict=True):
        for table, told in mine.account.items():
            assert all(value == theirs.account[table][name] for name, value in told.items() if name not in of_the_cut)
