"""A snapshot is of one instant: rows are read out while ids come, learn and go.

Step by step with every interleaving that hypothesis finds, and in a real thread.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import torch
from contracts.examples import jagged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import embeddings.freeze
import embeddings.snapshot
from embeddings.client import ShardedEmbeddings
from embeddings.freeze import FrozenRows
from embeddings.kernels import TorchRows
from embeddings.optim import RowwiseAdagrad
from embeddings.pool import Columns
from embeddings.shard import Shard
from embeddings.snapshot import Layer, Part, Snapshot, load
from embeddings.table import TableConfig

LOCAL = pyarrow.fs.LocalFileSystem()
DAY = 738_000
TABLES = {name: TableConfig(dim=4, capacity_rows=4, value_half_life_days=1.0) for name in ("a", "b")}


def new_store(tables: dict[str, TableConfig] = TABLES) -> ShardedEmbeddings:
    shard = Shard(tables, RowwiseAdagrad(lr=0.5), kernel=TorchRows)
    shard.begin_day(DAY)
    return ShardedEmbeddings(shard, {name: name for name in tables})


def train(store: ShardedEmbeddings, ids: dict[str, list[int]]) -> None:
    """Every row's gradient is ones."""
    blocks = store.pull({name: jagged([of]) for name, of in ids.items()}, insert=True)
    torch.stack([block.rows_UD.sum() for block in blocks]).sum().backward()
    store.push(blocks)


_IDS = st.lists(st.integers(0, 15), max_size=6, unique=True)
_EVENTS = st.one_of(
    st.tuples(st.just("train"), _IDS, _IDS),
    st.tuples(st.just("evict"), st.sampled_from(["a", "b"]), st.integers(1, 6)),
    st.just(("read", None, None)),
    st.just(("day", None, None)),
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(_EVENTS, max_size=6), st.lists(_EVENTS, max_size=12), st.booleans(), st.integers(1, 4))
def test_rows_are_read_as_they_were_whatever_happens_between_two_pieces(
    before: list[Any], after: list[Any], only_new: bool, most_rows: int
) -> None:
    """The oracle is a copy, taken at the instant, of all that is known of the rows: bit for bit."""
    store = new_store()
    shard, (pool,) = store.shard, store.shard.pools
    for number, event in enumerate(before):
        if number == 3 and only_new:
            shard.saved()
        happen(store, event)
    frozen = FrozenRows(pool, changed=only_new)
    shard.before_change = lambda pool, rows: frozen.before_change(rows)
    truth = [pool.known(rows) for rows in (sorted_rows(shard, name, only_new) for name in TABLES)]
    shard.saved()

    pieces, found = frozen.chunks(most_rows), []
    for event in after:
        if event[0] == "read":
            found += [piece for piece in [next(pieces, None)] if piece]
        else:
            happen(store, event)
    found += pieces
    assert all(len(columns["key"]) <= most_rows for _, columns in found)
    for t, expected in enumerate(truth):
        mine = [columns for table, columns in found if table == t]
        for what, column in expected.items() if mine else ():
            np.testing.assert_array_equal(np.concatenate([columns[what] for columns in mine]), column)
        assert mine or not expected["key"].size


def happen(store: ShardedEmbeddings, event: Any) -> None:
    what, first, second = event
    if what == "train":
        train(store, {"a": first, "b": second})
    elif what == "evict":
        store.shard.evict_least(first, second)
    elif what == "day":
        store.shard.end_day()
        store.shard.begin_day(store.shard.periods.today + 1)


def sorted_rows(shard: Shard, table: str, only_new: bool) -> np.ndarray:
    rows: np.ndarray = shard.export(table)["row"]
    return rows[np.isin(rows, shard.pool_of(table).ids.changed_rows())] if only_new else rows


class Busy:
    """Ids that come and go without end: each batch has some old ones, some new ones, and some lose their rows."""

    def __init__(self, store: ShardedEmbeddings):
        self.store, self.steps, self.newest = store, 0, 2_000
        self.random = np.random.default_rng(0)

    def step(self) -> None:
        old = self.random.choice(self.newest, 150, replace=False).tolist()
        train(self.store, {"a": [*old, *range(self.newest, self.newest + 50)], "b": old[:50]})
        self.store.shard.evict_least("a", 40)
        self.newest, self.steps = self.newest + 50, self.steps + 1


def while_written(snapshot: Snapshot, folder: Path, busy: Busy, monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """Write in a thread, whose every piece waits for a step; here, ids come and go as long as it takes."""
    parts: list[Part] = []
    add = embeddings.snapshot._Parts.add

    def add_after_a_step(*arguments: Any) -> None:
        steps = busy.steps
        while busy.steps == steps:
            time.sleep(0.0001)
        add(*arguments)

    monkeypatch.setattr(embeddings.snapshot._Parts, "add", add_after_a_step)
    thread = threading.Thread(target=lambda: parts.extend(snapshot.write(LOCAL, str(folder))))
    thread.start()
    steps = busy.steps
    while thread.is_alive():
        busy.step()
    thread.join()
    monkeypatch.setattr(embeddings.snapshot._Parts, "add", add)
    assert busy.steps - steps >= 3, "nothing happened while the snapshot was written: it proves nothing"
    return parts


def test_a_snapshot_written_while_ids_come_learn_and_go_is_of_the_instant_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base and two deltas, each loaded with those before it, against copies that were taken at their instants."""
    monkeypatch.setattr(embeddings.snapshot, "_ROW_GROUP", 61)  # so that a snapshot is read in many pieces
    monkeypatch.setattr(embeddings.freeze, "_SCAN", 97)
    store, layers = new_store(), []
    busy = Busy(store)
    for _ in range(20):
        busy.step()
    capacity = store.shard.pools[0].ids.capacity_rows
    for number in range(3):
        truth = {name: store.shard.export(name) for name in TABLES}
        snapshot = Snapshot(store.shard, base=number == 0)
        layers.append(
            Layer(str(tmp_path / str(number)), while_written(snapshot, tmp_path / str(number), busy, monkeypatch))
        )
        loaded = new_store().shard
        load(loaded, LOCAL, layers)
        for name in TABLES:
            check_same(loaded.export(name), truth[name])
            check_one_instant(loaded.export(name))
    assert store.shard.pools[0].ids.capacity_rows > capacity, "the pool did not grow meanwhile"


def check_same(found: Columns, truth: Columns) -> None:
    """All but where the rows lie."""
    assert found.keys() == truth.keys()
    for what in found.keys() - {"row", "seen"}:
        np.testing.assert_array_equal(found[what], truth[what])


def check_one_instant(columns: Columns) -> None:
    """A row's columns tell of as many steps: its gradients were ones, once each time that it was seen."""
    count = columns["count"]
    assert np.array_equal(columns["adagrad_sum"], count) and np.array_equal(columns["tally"][:, 0], count)
    weight = -0.5 * np.cumsum(1 / np.sqrt(np.arange(1, count.max() + 1)))
    # float32 sums of a few dozen steps, each rounded by 6e-8
    np.testing.assert_allclose(columns["weight"], np.repeat(weight[count - 1, None], 4, 1), rtol=1e-5)


def test_who_waits_is_saved_as_of_the_instant(tmp_path: Path) -> None:
    tables = {"a": TableConfig(dim=4, capacity_rows=4, min_count=3, default_row="trained")}
    store = new_store(tables)
    for ids in ([1, 2, 3], [2, 3], [3, 4]):
        train(store, {"a": ids})
    snapshot = Snapshot(store.shard, base=True)
    before: Callable[[], Columns] = lambda: store.shard.pools[0].known(np.array([0]))  # noqa: E731
    default = before()
    train(store, {"a": [1, 2, 3, 4, 5]})
    parts = snapshot.write(LOCAL, str(tmp_path))
    loaded = new_store(tables).shard
    load(loaded, LOCAL, [Layer(str(tmp_path), parts)])
    waiting = loaded.waiting.ids
    assert sorted(waiting.count_R[waiting.rows(0)].tolist()) == [1, 1, 2]  # ids 1, 4 and 2
    found = loaded.pools[0].known(np.array([0]))
    assert all(np.array_equal(found[what], default[what]) for what in ("weight", "adagrad_sum", "count"))
    assert not np.array_equal(before()["weight"], default["weight"])
