"""(table, key) -> row against a Python dict, with the keys that hash maps like least."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from embeddings.buckets import keys_of
from embeddings.dedupe import Bytes, Int64s
from embeddings.idmap import FREE, MAX_TABLES, IdMap, _home

EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63)]
Pair = tuple[int, int]  # table, key
Draw = Callable[[random.Random], Pair]


def arrays(pairs: list[Pair]) -> tuple[Int64s, Bytes]:
    return np.array([key for _, key in pairs], np.int64), np.array([table for table, _ in pairs], np.uint8)


def insert(ids: IdMap, pairs: list[Pair]) -> list[int]:
    rows: list[int] = ids.insert(*arrays(pairs)).tolist()
    return rows


def find(ids: IdMap, pairs: list[Pair]) -> list[int]:
    rows: list[int] = ids.find(*arrays(pairs)).tolist()
    return rows


# Pairs of every kind. A pair is looked for first at a slot that the low half of its key decides; a tag of some bits of
# the high half is compared before the key.


def spread(draw: random.Random) -> Pair:
    """Any key, a few tables, the extremes among them."""
    return draw.choice([0, 1, 254]), draw.choice([*EXTREMES, *[draw.randrange(-(2**63), 2**63) for _ in range(20)]])


def near(draw: random.Random) -> Pair:
    """Small numbers: neighbouring keys, the same ones in many tables."""
    return draw.randrange(MAX_TABLES), draw.randrange(-8, 8)


def one_home(draw: random.Random) -> Pair:
    """All want the last slot, whatever the size: the search must go round to the first."""
    return 0, (draw.randrange(-(2**31), 2**31) << 32) + 0xFFFFFFFF


def one_tag(draw: random.Random) -> Pair:
    """All have the same high half."""
    return draw.choice([3, 4]), (12345 << 32) + draw.randrange(2**32)


def one_home_and_tag(draw: random.Random) -> Pair:
    """Only bits above those that go into a tag differ."""
    return 7, (draw.randrange(-(2**10), 2**10) << 53) + 42


PAIRS: list[Draw] = [spread, near, one_home, one_tag, one_home_and_tag]


class Twin:
    """The same promises by a dict, and a check that the map keeps them."""

    def __init__(self, capacity_rows: int):
        self.ids, self.row_of, self.most = IdMap(capacity_rows, num_tallies=1), dict[Pair, int](), 0

    def insert(self, pairs: list[Pair]) -> None:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.row_of]
        rows = insert(self.ids, new)
        assert len(set(rows)) == len(new) and not set(rows) & set(self.row_of.values())  # nobody's row is given away
        self.row_of.update(zip(new, rows, strict=True))
        self.most = max(self.most, len(self.row_of))
        assert max(rows, default=0) < self.most <= self.ids.capacity_rows  # freed rows come first

    def remove(self, pairs: list[Pair]) -> None:
        self.ids.remove(np.array([self.row_of.pop(pair) for pair in pairs], np.int64))

    def check(self, others: list[Pair]) -> None:
        asked = [*self.row_of, *others]
        assert find(self.ids, asked) == [self.row_of.get(pair, -1) for pair in asked]
        assert self.ids.num_rows == len(self.row_of)
        for table in {table for table, _ in asked}:
            rows = sorted(row for (t, _), row in self.row_of.items() if t == table)
            assert self.ids.rows(table).tolist() == rows and self.ids.num_rows_T[table] == len(rows)


@pytest.mark.parametrize("capacity", [0, 1, 3, 8, 700])
@pytest.mark.parametrize("pair", PAIRS)
def test_random_inserts_finds_and_removals_equal_a_dict_while_the_map_grows(pair: Draw, capacity: int) -> None:
    draw, twin = random.Random(capacity), Twin(capacity)
    for step in range(30):
        twin.insert([pair(draw) for _ in range(draw.choice([0, 1, 5, 80]))])
        leaving = draw.choice([0, 1, len(twin.row_of) // 2, len(twin.row_of)]) if step % 3 else 0
        twin.remove(draw.sample(list(twin.row_of), min(leaving, len(twin.row_of))))
        twin.check([draw.choice(PAIRS)(draw) for _ in range(30)] + [pair(draw) for _ in range(30)])


def test_an_empty_map_knows_no_pair_not_even_zero() -> None:
    ids = IdMap(0)
    assert find(ids, [(0, key) for key in EXTREMES]) == [-1] * 5
    assert find(ids, []) == [] and ids.num_rows == 0 and insert(ids, []) == []


def test_no_key_and_no_table_is_reserved() -> None:
    ids, pairs = IdMap(1), [(table, key) for key in EXTREMES for table in (0, 1, MAX_TABLES - 1)]
    assert insert(ids, pairs) == list(range(len(pairs)))
    assert find(ids, pairs) == list(range(len(pairs)))
    assert find(ids, [(2, key) for key in EXTREMES] + [(0, 2)]) == [-1] * 6


def test_one_key_has_a_row_of_its_own_in_each_of_all_tables() -> None:
    ids, every = IdMap(MAX_TABLES), [(table, -1) for table in range(MAX_TABLES)]
    insert(ids, every[::2])
    assert [row >= 0 for row in find(ids, every)] == [table % 2 == 0 for table in range(MAX_TABLES)]
    insert(ids, every[1::2])
    assert len(set(find(ids, every))) == MAX_TABLES and (ids.num_rows_T == 1).all()


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5, 31, 32, 33, 1_000, 1_024])
def test_a_map_takes_as_many_rows_as_it_has_before_it_grows(capacity: int) -> None:
    ids, pairs = IdMap(capacity), [(0, key) for key in keys_of(np.arange(capacity)).tolist()]
    assert insert(ids, pairs) == list(range(capacity)) and ids.capacity_rows == capacity
    assert find(ids, pairs) == list(range(capacity))
    assert find(ids, [(1, key) for _, key in pairs]) == [-1] * capacity  # a full map still ends a search
    insert(ids, [(1, 0)])
    assert ids.capacity_rows == 2 * capacity  # then it doubles


def test_growing_keeps_all_that_is_known_of_a_row_and_new_rows_start_at_zero() -> None:
    ids = IdMap(3, num_tallies=2)
    rows = ids.insert(*arrays([(4, 10), (4, 11), (5, 10)]))
    ids.count_R[rows], ids.seen_R[rows], ids.tally_RC[rows] = [1, 2, 3], [4, 5, 6], [[1, 2], [3, 4], [5, 6]]
    new = ids.insert(*arrays([(4, 12), (9, 9)]))
    assert ids.count_R[rows].tolist() == [1, 2, 3] and ids.seen_R[rows].tolist() == [4, 5, 6]
    assert ids.tally_RC[rows].tolist() == [[1, 2], [3, 4], [5, 6]] and ids.table_R[rows].tolist() == [4, 4, 5]
    assert not ids.count_R[new].any() and not ids.seen_R[new].any() and not ids.tally_RC[new].any()


def test_freed_rows_are_given_out_again_and_have_forgotten_everything() -> None:
    ids, pairs = IdMap(10, num_tallies=1), [(0, key) for key in range(10)]
    rows = ids.insert(*arrays(pairs))
    ids.count_R[rows], ids.seen_R[rows], ids.tally_RC[rows] = 7, 8, 9
    ids.remove(rows[2:5])
    assert (ids.table_R[2:5] == FREE).all() and (ids.table_R[[1, 5]] == 0).all()
    assert sorted(insert(ids, [(1, 20), (1, 21), (1, 22)])) == [2, 3, 4] and ids.capacity_rows == 10
    for known in (ids.count_R, ids.seen_R, ids.tally_RC[:, 0]):
        assert not known[2:5].any() and known[[0, 1, 5, 9]].all()


def test_a_map_that_is_emptied_and_filled_over_and_over_does_not_grow() -> None:
    ids = IdMap(64, num_tallies=1)
    for night in range(50):
        pairs = [(0, key) for key in keys_of(np.arange(64) + 64 * night).tolist()]
        rows = ids.insert(*arrays(pairs))
        assert find(ids, pairs) == rows.tolist()
        ids.remove(rows)
        assert find(ids, pairs) == [-1] * 64
    assert ids.capacity_rows == 64 and ids.num_rows == 0


def test_rows_set_aside_belong_to_no_key_also_after_growing() -> None:
    ids = IdMap(2)
    ids.skip(2)
    assert insert(ids, [(0, 0), (0, -1)]) == [2, 3]
    rows = insert(ids, [(0, key) for key in range(5, 50)])
    assert rows == list(range(4, 49)) and ids.num_rows == 47
    assert ids.rows(0).tolist() == [2, 3, *rows] and find(ids, [(0, 0), (0, -1)]) == [2, 3]


def test_taken_and_changed_rows_equal_sets_of_rows_over_random_inserts_changes_and_removals() -> None:
    ids, draw, changed, living = IdMap(5), random.Random(0), set[int](), set[int]()
    ids.skip(3)
    for number in range(200):
        rows = insert(ids, [(0, 1000 * number + n) for n in range(draw.choice([0, 1, 7]))])
        living |= set(rows)
        picked = draw.sample(sorted(living), min(len(living), draw.choice([0, 1, 5])))
        ids.change(np.array(rows + picked, np.int64))
        changed |= set(rows + picked)
        gone = draw.sample(sorted(living), min(len(living), draw.choice([0, 2, 9])))
        ids.remove(np.array(gone, np.int64))
        living -= set(gone)
        if number % 20 == 19:
            ids.changed.fill(0)
            changed.clear()
        assert np.flatnonzero(ids.taken()).tolist() == sorted(living) and ids.taken().size == ids.capacity_rows
        assert ids.changed_rows().tolist() == sorted(changed & living)


def test_reserve_makes_room_at_once_and_at_least_doubles_when_it_must() -> None:
    ids, capacities = IdMap(10), []
    for rows in (10, 11, 15, 100, 3):
        ids.reserve(rows)
        capacities.append(ids.capacity_rows)
    assert capacities == [10, 20, 20, 100, 100]


def test_a_full_map_with_one_tally_takes_less_than_24_bytes_a_row() -> None:
    ids, num_rows = IdMap(100_000, num_tallies=1), 100_000
    ids.insert(keys_of(np.arange(num_rows)), np.zeros(num_rows, np.uint8))
    # key 8, table 1, count 4, seen 2, tally 4, whether it changed 1/8, and a slot of 4 at a load of 0.85
    assert ids.num_rows == ids.capacity_rows and 19.125 + 4 / 0.85 <= ids.memory_bytes / num_rows < 24


def test_a_map_past_int32_is_refused() -> None:
    with pytest.raises(AssertionError, match="2\\^31 rows"):
        IdMap(2**31)


@pytest.mark.parametrize("num_slots", [3, 1_000, 2**31, int((2**31 - 1) / 0.85) + 2])
def test_every_first_slot_lies_within_the_map_also_the_largest(num_slots: int) -> None:
    keys = [*EXTREMES, 0xFFFFFFFF, 0x80000000, *range(0, 2**32, 2**28)]
    slots = [_home(key, np.uint8(table), num_slots) for key in keys for table in (0, 1, 254)]
    assert min(slots) >= 0 and max(slots) < num_slots
    # plain integers: the low half of the key as a share of 2^32
    assert [_home(key, np.uint8(0), num_slots) for key in keys] == [key % 2**32 * num_slots // 2**32 for key in keys]
