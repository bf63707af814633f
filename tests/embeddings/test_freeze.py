"""Rows read as they were at an instant, against a copy of all of them taken at that instant.

Meanwhile rows are updated, evicted, given to others, and the pool grows: between any two steps of the reader, and in
another thread.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.buckets import keys_of
from embeddings.dedupe import Int64s
from embeddings.freeze import FrozenRows
from embeddings.kernels import FbgemmRows, TorchRows
from embeddings.optim import Adam
from embeddings.pool import Columns, Layout, MakeKernel, RowPool

TABLES, DIM = [2, 5], 4
Known = dict[tuple[int, int], dict[str, bytes]]  # (table, key) -> what is known of its row


def by_owner(chunks: Iterable[Columns]) -> Known:
    found: Known = {}
    for columns in chunks:
        for place, owner in enumerate(zip(columns["table"].tolist(), columns["key"].tolist(), strict=True)):
            assert owner not in found
            found[owner] = {name: np.ascontiguousarray(column[place]).tobytes() for name, column in columns.items()}
    return found


def everything(pool: RowPool) -> Known:
    return by_owner([pool.known(np.concatenate([pool.ids.rows(table) for table in TABLES]))])


class Life:
    """A pool that is trained on: whoever changes rows tells the frozen ones first."""

    def __init__(self, seed: int, kernel: MakeKernel = TorchRows):
        self.draw, self.next_key = random.Random(seed), 0
        self.pool = RowPool(Layout(DIM, "float32", 2), TABLES, 10, Adam(0.1), torch.device("cpu"), kernel)
        self.tell: Callable[[Int64s], None] = lambda rows: None

    def add(self, count: int) -> None:
        keys = keys_of(np.arange(self.next_key, self.next_key + count) - 5)
        self.next_key += count
        tables = np.array([self.draw.choice(TABLES) for _ in range(count)], np.uint8)
        rows = self.pool.add(keys, tables, torch.randn(count, DIM))
        self._see(rows)

    def update(self, count: int) -> None:
        rows = self._some(count)
        self.tell(rows)
        self._see(rows)
        self.pool.update(rows, torch.randn(rows.size, DIM))

    def evict(self, count: int) -> None:
        rows = self._some(count)
        self.tell(rows)
        self.pool.remove(rows)

    def step(self) -> None:
        act = self.draw.choice([self.add, self.update, self.update, self.evict])
        act(self.draw.choice([0, 1, 5, 20]))

    def _see(self, rows: Int64s) -> None:
        ids = self.pool.ids
        ids.count_R[rows] += 1
        ids.seen_R[rows] = 1
        ids.tally_RC[rows] += 0.5

    def _some(self, count: int) -> Int64s:
        rows = np.concatenate([self.pool.ids.rows(table) for table in TABLES])
        return np.array(self.draw.sample(rows.tolist(), min(count, rows.size)), np.int64)


@pytest.fixture(params=[TorchRows, FbgemmRows])
def kernel(request: pytest.FixtureRequest) -> MakeKernel:
    made: MakeKernel = request.param
    return made


def living(seed: int, kernel: MakeKernel = TorchRows, num_rows: int = 60) -> Life:
    life = Life(seed, kernel)
    life.add(num_rows)
    for _ in range(10):
        life.step()
    return life


def test_rows_come_table_by_table_sorted_by_key_at_most_so_many_at_once() -> None:
    life, sizes = living(0), {2: list[int](), 5: list[int]()}
    keys: dict[int, list[int]] = {2: [], 5: []}
    order = []
    for table, columns in FrozenRows(life.pool).chunks(7):
        assert (columns["table"] == table).all()
        order.append(table)
        sizes[table].append(columns["key"].size)
        keys[table] += columns["key"].tolist()
    assert order == sorted(order) and all(size == 7 for of in sizes.values() for size in of[:-1])
    assert all(0 < of[-1] <= 7 and keys[table] == sorted(keys[table]) for table, of in sizes.items())
    assert {(table, key) for table, of in keys.items() for key in of} == set(everything(life.pool))


def test_an_empty_pool_has_no_rows_to_read() -> None:
    assert list(FrozenRows(Life(0).pool).chunks(7)) == []


def test_of_rows_all_columns_are_read_that_a_pool_knows() -> None:
    life = living(1)
    _, columns = next(FrozenRows(life.pool).chunks(1_000))
    known = life.pool.known(columns["row"])
    assert list(columns) == list(known) and all(np.array_equal(columns[name], known[name]) for name in known)


def test_only_rows_that_are_marked_as_changed_are_frozen_when_asked_for() -> None:
    life = living(2)
    for marked in (range(0), range(0, 60, 3), range(60)):
        life.pool.ids.changed.fill(0)
        owners = set(everything(life.pool))
        rows = np.concatenate([life.pool.ids.rows(table) for table in TABLES])
        changed = rows[np.isin(rows, np.array(marked))]
        life.pool.ids.change(changed)
        expected = by_owner([life.pool.known(changed)])
        frozen = FrozenRows(life.pool, changed=True)
        life.tell = frozen.before_change
        life.update(5)
        life.evict(2)
        assert by_owner(columns for _, columns in frozen.chunks(3)) == expected
        assert set(expected) < owners
        life.tell = lambda rows: None


@pytest.mark.parametrize("seed", range(6))
def test_changes_between_two_chunks_are_not_seen(kernel: MakeKernel, seed: int) -> None:
    life = living(seed, kernel)
    expected, frozen = everything(life.pool), FrozenRows(life.pool)
    life.tell, capacity = frozen.before_change, life.pool.ids.capacity_rows
    for _ in range(seed):
        life.step()  # also before anything was read
    found = []
    for _, columns in frozen.chunks(4):
        found.append(columns)
        for _ in range(3):
            life.step()
        life.add(30)
    assert by_owner(found) == expected  # bits
    assert everything(life.pool) != expected and life.pool.ids.capacity_rows > 2 * capacity


class Revolving:
    """A lock that lets somebody else act each time before it is taken and after it is given back."""

    def __init__(self, lock: Any, act: Callable[[], None]):
        self._lock, self._act, self._busy = lock, act, False

    def __enter__(self) -> None:
        self._let_in()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._let_in()

    def _let_in(self) -> None:
        if not self._busy:
            self._busy = True
            self._act()
            self._busy = False


@pytest.mark.parametrize("seed", range(6))
def test_changes_at_every_point_where_the_reader_lets_go_of_the_lock_are_not_seen(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("embeddings.freeze._SCAN", 9)  # rows are listed in pieces, with changes in between
    life = living(seed)
    expected, frozen = everything(life.pool), FrozenRows(life.pool)
    life.tell = frozen.before_change
    frozen._lock = Revolving(frozen._lock, life.step)  # type: ignore[assignment]
    assert by_owner(columns for _, columns in frozen.chunks(5)) == expected
    assert everything(life.pool) != expected


@pytest.mark.parametrize("seed", range(6))
def test_a_reader_that_comes_first_when_rows_are_about_to_change_leaves_nothing_out(seed: int) -> None:
    life = living(seed)
    expected, frozen = everything(life.pool), FrozenRows(life.pool)
    life.tell, chunks, found = frozen.before_change, frozen.chunks(5), list[Columns]()

    def read_one() -> None:
        found.extend(columns for _, columns in [next(chunks, (0, None))] if columns is not None)

    lock = frozen._lock
    frozen._lock = Revolving(lock, read_one)  # type: ignore[assignment]
    for _ in range(100):
        life.step()
    frozen._lock = lock
    found += [columns for _, columns in chunks]
    assert by_owner(found) == expected


def test_rows_added_since_and_rows_given_to_others_are_not_among_the_frozen() -> None:
    life = living(3)
    expected, frozen = everything(life.pool), FrozenRows(life.pool)
    life.tell = frozen.before_change
    life.evict(1_000)
    life.add(500)  # in the same rows, then in others
    assert life.pool.ids.num_rows == 500
    assert by_owner(columns for _, columns in frozen.chunks(50)) == expected


def test_a_row_is_copied_for_the_reader_once_and_not_after_he_has_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    life, copied, known = living(5), Counter[int](), RowPool.known

    def counted(pool: RowPool, rows: Int64s) -> Columns:
        copied.update(rows.tolist())
        return known(pool, rows)

    frozen, rows = FrozenRows(life.pool), np.concatenate([life.pool.ids.rows(table) for table in TABLES])
    monkeypatch.setattr(RowPool, "known", counted)
    for part in (rows[:10], rows[:20], rows[5:15]):
        frozen.before_change(part)
    assert copied == Counter(rows[:20].tolist())
    list(frozen.chunks(7))
    copied.clear()
    frozen.before_change(rows)
    assert not copied


def test_another_threads_reader_sees_the_instant_while_this_one_trains(kernel: MakeKernel) -> None:
    life, found = living(4, kernel, num_rows=3_000), list[Columns]()
    expected, frozen = everything(life.pool), FrozenRows(life.pool)
    life.tell, begun = frozen.before_change, threading.Event()

    def read() -> None:
        begun.wait()
        found.extend(columns for _, columns in frozen.chunks(8))

    reader = threading.Thread(target=read)
    reader.start()
    before, steps = everything(life.pool), 0
    while reader.is_alive():
        life.step()
        begun.set()
        steps += 1
    reader.join()
    assert by_owner(found) == expected
    assert steps > 5 and everything(life.pool) != before
