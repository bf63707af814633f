"""Saved by N workers, loaded by M: all that is known of every id is the same, bit for bit.

Gradients are quarters, so what several workers send for a row has one sum, and the truth is the same for every N.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import threads
import torch
from contracts.examples import IDS, LABELS, coefficients, jagged

from embeddings.buckets import NUM_BUCKETS, buckets_of
from embeddings.client import ShardedEmbeddings
from embeddings.exchange import Exchange
from embeddings.kernels import TorchRows
from embeddings.optim import Adagrad, RowwiseAdagrad
from embeddings.pooling import Pooling, pool
from embeddings.shard import Shard, TooManyRows
from embeddings.snapshot import Layer, Part, Snapshot, compact, load
from embeddings.table import Admission, TableConfig
from embeddings.tallies import Tally

LOCAL = pyarrow.fs.LocalFileSystem()
WORKERS = [1, 2, 3, 4, 5, 8]
DAY = 738_000
SOON = Admission(forget_days=2)
TABLES = {
    "user": TableConfig(dim=4, capacity_rows=8, init_scale=0.5, min_count=2, default_row="trained", admission=SOON),
    "item": TableConfig(dim=8, capacity_rows=4, value={"click": 2.0}, value_half_life_days=2.0, ttl_days=2),
    "ad": TableConfig(dim=4, capacity_rows=64, dtype="float16", min_count=2, admission=Admission("sketch", 1 << 17)),
}
TALLIES = {"item": [Tally("clicks", {"click": 1.0}, 3.0, by_day=True), Tally("seen", half_life_days=2.0)]}
Known = dict[str, dict[int, bytes]]  # by table and what, of each id or bucket


def store_on(exchange: Exchange, tables: Mapping[str, TableConfig] = TABLES) -> ShardedEmbeddings:
    shard = Shard(tables, RowwiseAdagrad(), exchange, labels=LABELS, tallies=TALLIES, kernel=TorchRows)
    return ShardedEmbeddings(shard, {name: name for name in tables}, own=list(tables))


def train(store: ShardedEmbeddings, day: int) -> None:
    """Four batches of an eventful day: ids come, some come again, some are forgotten."""
    store.shard.begin_day(day)
    rank, workers = store.exchange.rank, store.exchange.num_workers
    for step in range(4):
        rows = range(40)[rank::workers]
        lists = [[IDS[(7 * row + 11 * k + 5 * step + 3 * day) % 64] for k in range(row % 4)] for row in rows]
        for row, ids in zip(rows, lists, strict=True):
            ids += [1_000 * (day - row % 2) + 4 * row + step] if row % 5 == 0 else []  # seen on one day or on two
        clicks = torch.tensor([[row % 2, row % 3] for row in rows], dtype=torch.int64).view(-1, 2)
        blocks = store.pull(dict.fromkeys(TABLES, jagged(lists)), insert=True, labels_BL=clicks)
        for block in blocks:
            vectors_FBD = pool(block, {feature: Pooling(mean=False) for feature in block.features})
            factors_BD = torch.from_numpy(coefficients(0, 40, step, vectors_FBD.shape[2])[rank::workers])
            (vectors_FBD * factors_BD.float()).sum().backward()
        store.push(blocks)
    store.shard.end_day()


def saved(store: ShardedEmbeddings, folder: Path, base: bool) -> list[Part]:
    return Snapshot(store.shard, base=base).write(LOCAL, str(folder))


def grown(exchange: Exchange, folder: Path) -> tuple[list[list[Part]], Known]:
    """Three days; a base after the first, a delta after each of the others. The parts, and all that is known."""
    store, parts = store_on(exchange), []
    for day in range(3):
        train(store, DAY + day)
        parts.append(saved(store, folder / str(day), base=day == 0))
    return parts, known(store.shard)


def known(shard: Shard) -> Known:
    """All that a shard knows, but for where it lies, by id; of the default rows and sketches too."""
    found: Known = {}
    for t, name in enumerate(shard.names):
        columns = shard.export(name)
        found[f"{name} rows"] = by_key(columns["key"], columns, ("row", "seen", "table", "key"))
        waiting = shard.waiting.ids
        rows = waiting.rows(t)
        days = np.array(shard.periods.days)[waiting.seen_R[rows]]
        found[f"{name} waiting"] = by_key(waiting.key_R[rows], {"count": waiting.count_R[rows], "day": days})
        pool = shard.pool_of(name)
        default = pool.known(pool.default_rows(np.array([t], np.uint8)))
        found[f"{name} default"] = by_key(np.zeros(1), {what: default[what] for what in ("weight", "count")})
        if name in shard.sketches:
            found[f"{name} sketch"] = by_key(np.array(shard.buckets), {"cells": shard.sketches[name].cells})
    return found


def by_key(keys: Any, columns: Mapping[str, Any], without: Sequence[str] = ()) -> dict[int, bytes]:
    kept = [column for name, column in sorted(columns.items()) if name not in without]
    return {int(key): b"".join(column[i].tobytes() for column in kept) for i, key in enumerate(keys)}


def merged(parts: Sequence[Known]) -> Known:
    """What all workers know; nobody knows what another does, but for the default rows, which all do."""
    found: Known = {of: {} for of in parts[0]}
    for part, (of, what) in itertools.product(parts, found.items()):
        assert of.endswith("default") or not what.keys() & part[of].keys()
        what |= part[of]
    return found


def loaded(exchange: Exchange, layers: Sequence[Layer], tables: Mapping[str, TableConfig] = TABLES) -> Known:
    shard = store_on(exchange, tables).shard
    load(shard, LOCAL, [Layer(layer.folder, layer.overlapping(shard.buckets)) for layer in layers])
    shard.fit()
    return known(shard)


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[list[Layer], Known]]:
    """By number of workers, what they wrote and what they knew then."""
    found = {}
    for workers in WORKERS:
        folder = tmp_path_factory.mktemp(f"of-{workers}")
        ends = threads.run(workers, grown, folder)
        layers = [Layer(str(folder / str(d)), sum((parts[d] for parts, _ in ends), [])) for d in range(3)]
        found[workers] = layers, merged([of for _, of in ends])
    return found


Chains = dict[int, tuple[list[Layer], Known]]


def test_any_number_of_workers_know_the_same_after_three_days(chains: Chains) -> None:
    truth = chains[1][1]
    assert all(truth[f"{name} {what}"] for name in TABLES for what in ("rows", "default"))
    assert truth["user waiting"] and any(map(any, truth["ad sketch"].values()))  # none is compared with nothing
    for workers in WORKERS:
        assert chains[workers][1] == truth


@pytest.mark.parametrize("load_on", WORKERS)
@pytest.mark.parametrize("saved_by", WORKERS)
def test_any_number_of_workers_load_what_any_other_saved(chains: Chains, saved_by: int, load_on: int) -> None:
    layers, truth = chains[saved_by]
    assert merged(threads.run(load_on, loaded, layers)) == truth


@pytest.mark.parametrize("load_on", [1, 3, 8])
def test_other_capacities_lose_nothing_where_there_is_room(chains: Chains, load_on: int) -> None:
    layers, truth = chains[2]
    for capacity, grow in ((1, True), (200, False), (5_000, True)):
        tables = {name: replace(table, capacity_rows=capacity, grow=grow) for name, table in TABLES.items()}
        assert merged(threads.run(load_on, loaded, layers, tables)) == truth


@pytest.mark.parametrize("load_on", [1, 3, 8])
def test_the_most_valuable_rows_stay_where_there_is_too_little_room(chains: Chains, load_on: int) -> None:
    layers, truth = chains[2]
    tables = {name: replace(table, capacity_rows=10, grow=False) for name, table in TABLES.items()}
    found = merged(threads.run(load_on, loaded, layers, tables))
    values = threads.run(1, values_of_items, layers)[0]
    for name in TABLES:
        kept, all_rows = found[f"{name} rows"], truth[f"{name} rows"]
        assert len(kept) == 10 and kept.items() < all_rows.items()  # bit for bit
    best = sorted(values, key=lambda key: (values[key], key % 2**64))[-10:]
    assert sorted(found["item rows"]) == sorted(best)


def values_of_items(exchange: Exchange, layers: Sequence[Layer]) -> dict[int, float]:
    """The value of each item as of the last day, from its file's columns: clicks count twice and halve in two days."""
    shard = store_on(exchange).shard
    load(shard, LOCAL, layers)
    columns = shard.export("item")
    age = DAY + 2 - columns["last_seen_day"]
    return dict(zip(columns["key"].tolist(), (columns["tally"][:, 0] * 0.5 ** (age / 2)).tolist(), strict=True))


def test_too_many_rows_for_a_table_that_may_not_evict_are_told_of_on_every_worker(chains: Chains) -> None:
    def refused(exchange: Exchange) -> tuple[str, int, int]:
        with pytest.raises(TooManyRows) as error:
            loaded(exchange, chains[2][0], tables)
        return error.value.table, error.value.rows, error.value.capacity_rows

    tables = TABLES | {"item": replace(TABLES["item"], capacity_rows=10, grow=False, when_full="reject")}
    assert threads.run(3, refused) == [("item", len(chains[2][1]["item rows"]), 10)] * 3


@pytest.mark.parametrize("load_on", [1, 2, 5])
@pytest.mark.parametrize("folded_by", [1, 3])
def test_a_folded_chain_loads_like_the_chain(chains: Chains, tmp_path: Path, folded_by: int, load_on: int) -> None:
    layers, truth = chains[4]
    parts = [compact(LOCAL, layers, str(tmp_path), buckets_of(w, folded_by)) for w in range(folded_by)]
    assert sum(part.rows for of in parts for part in of if part.kind == "sketch") == NUM_BUCKETS
    assert merged(threads.run(load_on, loaded, [Layer(str(tmp_path), sum(parts, []))])) == truth


@pytest.mark.parametrize(("saved_by", "load_on"), [(1, 1), (2, 3), (3, 2)])
def test_a_chain_goes_on_after_a_load(chains: Chains, tmp_path: Path, saved_by: int, load_on: int) -> None:
    """A fourth day on other workers, saved as a delta of theirs, is the fourth day of those that never stopped."""

    def fourth(exchange: Exchange) -> tuple[list[Part], Known]:
        store = store_on(exchange)
        load(store.shard, LOCAL, layers)
        store.shard.fit()
        train(store, DAY + 3)
        return saved(store, tmp_path / "3", base=False), known(store.shard)

    def four_days(exchange: Exchange) -> Known:
        store = store_on(exchange)
        for day in range(4):
            train(store, DAY + day)
        return known(store.shard)

    layers = chains[saved_by][0]
    ends, truth = threads.run(load_on, fourth), merged(threads.run(saved_by, four_days))
    assert merged([of for _, of in ends]) == truth
    longer = [*layers, Layer(str(tmp_path / "3"), sum((parts for parts, _ in ends), []))]
    assert merged(threads.run(saved_by, loaded, longer)) == truth


def test_another_optimizer_starts_its_states_anew_and_keeps_the_weights(chains: Chains) -> None:
    shards = [
        Shard(TABLES, optimizer, tallies=TALLIES, labels=LABELS, kernel=TorchRows)
        for optimizer in (RowwiseAdagrad(), Adagrad())
    ]
    for shard in shards:
        load(shard, LOCAL, chains[3][0])
    for name in TABLES:
        old, new = (shard.export(name) for shard in shards)
        assert np.array_equal(new["weight"], old["weight"]) and np.array_equal(new["count"], old["count"])
        assert not new["adagrad_sums"].any() and old["adagrad_sum"].any()
