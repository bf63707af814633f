"""One worker's rows: who gets one, who waits, who loses his, against plain dicts; first weights in plain integers."""

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.buckets import keys_of
from embeddings.dedupe import Int64s
from embeddings.exchange import LocalExchange
from embeddings.idmap import MAX_TABLES
from embeddings.kernels import FbgemmRows, TorchRows
from embeddings.optim import Adagrad, Adam, RowwiseAdagrad
from embeddings.pool import Columns, RowPool
from embeddings.shard import COUNTS, Shard, TooManyRows, hash_name
from embeddings.table import Admission, TableConfig
from embeddings.tallies import SIGHTINGS, Floats, Tally

TABLES = {
    "user": TableConfig(dim=4, capacity_rows=8, init_scale=0.1),
    "item": TableConfig(dim=8, capacity_rows=8, init_scale=0.5),
    "ad": TableConfig(dim=8, capacity_rows=8),
}
EXTREMES = [0, -1, 2**63 - 1, -(2**63)]


def shard_of(tables: Mapping[str, TableConfig] = TABLES, **settings: Any) -> Shard:
    return Shard(tables, settings.pop("optimizer", RowwiseAdagrad()), **{"kernel": TorchRows} | settings)


def keys(ids: list[int] | range) -> Int64s:
    found: Int64s = keys_of(np.array(list(ids), np.int64))
    return found


def meet_keys(shard: Shard, table: str, key_U: Int64s, **events: list[int]) -> tuple[Int64s, Floats]:
    """Rows and statistics of distinct keys, each seen once, or as the events say."""
    names = shard.ledger.events
    event_UE = np.zeros((key_U.size, len(names)), np.int64)
    event_UE[:, 0] = 1
    for name, count in events.items():
        event_UE[:, names.index(name)] = count
    return shard.meet(shard.pool_of(table), key_U, np.full(key_U.size, shard.number[table], np.uint8), event_UE)


def meet(shard: Shard, table: str, ids: list[int] | range, **events: list[int]) -> Int64s:
    return meet_keys(shard, table, keys(ids), **events)[0]


def find(shard: Shard, table: str, ids: list[int] | range) -> Int64s:
    key_U = keys(ids)
    return shard.find(shard.pool_of(table), key_U, np.full(key_U.size, shard.number[table], np.uint8))[0]


def who_has_a_row(shard: Shard, table: str, ids: list[int] | range) -> list[int]:
    return [i for i, row in zip(ids, find(shard, table, ids).tolist(), strict=True) if row >= 0]


def count_of(shard: Shard, table: str) -> dict[str, int]:
    """The counts that are not zero."""
    return {name: int(of[shard.number[table]]) for name, of in shard.counts.items() if of[shard.number[table]]}


def first_weights(shard: Shard, table: str, ids: list[int] | range) -> torch.Tensor:
    return shard.pool_of(table).lookup(meet(shard, table, ids))


# First weights


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def uniform(key: int, column: int, table_seed: int) -> float:
    """A first weight's law on Python integers: the top 53 bits of a hash of key and column, as a signed fraction."""
    mixed = splitmix64(key ^ splitmix64(table_seed + column))
    return ((mixed + 2**63) % 2**64 - 2**63 >> 11) / 2**52


@pytest.mark.parametrize("table", ["user", "item"])
def test_first_weights_equal_their_law_in_python_integers(table: str) -> None:
    ids, config = [*EXTREMES, *range(1, 20)], TABLES[table]
    expected = [
        [config.init_scale * uniform(key % 2**64, column, hash_name(table, 3)) for column in range(config.dim)]
        for key in keys(ids).tolist()
    ]
    # float32 of a float64 value, one multiplication later: two roundings of 6e-8
    torch.testing.assert_close(first_weights(shard_of(seed=3), table, ids), torch.tensor(expected), rtol=2e-7, atol=0)


def test_first_weights_are_uniform_between_minus_and_plus_the_scale() -> None:
    weight = first_weights(shard_of(), "item", range(4_000)).flatten().sort().values / 0.5
    expected = torch.linspace(-1, 1, weight.numel())
    # Kolmogorov-Smirnov: the distance passes 2.2 / sqrt(n) once in 10,000 draws; twice that, for the range is 2 wide
    assert (weight - expected).abs().max() < 2 * 2.2 / weight.numel() ** 0.5
    assert weight.abs().max() <= 1


def test_first_weights_do_not_depend_on_order_batches_or_kernel() -> None:
    expected, other = first_weights(shard_of(), "item", range(100)), shard_of(kernel=FbgemmRows)
    parts = [list(range(100))[::-1][a:b] for a, b in ((0, 1), (1, 1), (1, 61), (61, 100))]
    found = torch.cat([first_weights(other, "item", part) for part in parts])
    assert torch.equal(found.flip(0), expected)  # bits


def test_first_weights_differ_between_ids_columns_seeds_and_tables() -> None:
    tables = {name: TableConfig(dim=8, init_scale=1.0) for name in ("a", "b")}
    shards = [shard_of(tables, seed=seed) for seed in (0, 1)]
    weights = [first_weights(shard, name, range(50)) for shard in shards for name in tables]
    # 1,600 draws of 53 bits, rounded to 24: one pair in 10 million is equal, so a few at most
    assert torch.stack(weights).unique().numel() > 1_590


def test_first_weights_of_tables_that_share_a_pool_follow_each_its_own_scale() -> None:
    shard, table_U = shard_of(), np.array([1, 2, 1, 2], np.uint8)  # item, ad
    key_U = keys([5, 5, 6, 6])
    rows, _ = shard.meet(shard.pool_of("item"), key_U, table_U, np.ones((4, 1), np.int64))
    assert torch.equal(shard.pool_of("ad").lookup(rows[[1, 3]]), torch.zeros(2, 8))
    assert torch.equal(shard.pool_of("item").lookup(rows[[0, 2]]), first_weights(shard_of(), "item", [5, 6]))


def test_hash_name_is_fnv_1a_when_the_seed_is_zero() -> None:
    # the published 64-bit test vectors, less their lowest bit
    assert hash_name("", 0) == 0xCBF29CE484222325 >> 1
    assert hash_name("a", 0) == 0xAF63DC4C8601EC8C >> 1
    assert hash_name("foobar", 0) == 0x85944171F73967E8 >> 1


# Tables and pools


def test_tables_share_a_pool_when_width_type_and_number_of_tallies_agree() -> None:
    tables = {
        "a": TableConfig(dim=4),
        "b": TableConfig(dim=4, min_count=3),
        "wider": TableConfig(dim=8),
        "half": TableConfig(dim=4, dtype="float16"),
        "told": TableConfig(dim=4),
    }
    shard = shard_of(tables, tallies={"told": [Tally("seen")]})
    assert [pool.tables for pool in shard.pools] == [[0, 1], [2], [3], [4]]
    assert [shard.pool_of(name) for name in tables] == [shard.pools[p] for p in (0, 0, 1, 2, 3)]
    assert {name: shard.number[name] for name in tables} == dict(zip(tables, range(5), strict=True))


@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_all_shards_together_reserve_the_capacity_and_a_quarter_more_where_they_are_several(num_workers: int) -> None:
    exchange = LocalExchange()
    exchange.num_workers = num_workers
    shard = shard_of({"a": TableConfig(dim=4, capacity_rows=700), "b": TableConfig(dim=4, capacity_rows=1_400)})
    one_of = shard_of(shard.tables, exchange=exchange)
    assert shard.pools[0].ids.capacity_rows == 2_100 + 2  # with the default rows
    share = 2_100 * (1.25 if num_workers > 1 else 1) / num_workers
    assert abs(one_of.pools[0].ids.capacity_rows - share - 2) <= 1


def test_more_tables_than_a_byte_can_number_are_refused() -> None:
    with pytest.raises(AssertionError, match="255 tables"):
        shard_of({str(t): TableConfig(dim=4, capacity_rows=1) for t in range(MAX_TABLES + 1)})


def test_an_id_keeps_its_row_and_a_new_row_starts_without_state() -> None:
    shard = shard_of()
    rows = meet(shard, "user", [*EXTREMES, 5, 6])
    assert len(set(rows.tolist())) == 6 and not shard.pool_of("user").states(rows)["adagrad_sum"].any()
    again = meet(shard, "user", [7, 6, 5, *EXTREMES[::-1]])
    assert again[1:].tolist() == rows[::-1].tolist() and again[0] not in rows


def test_one_id_in_two_tables_of_one_pool_has_two_rows() -> None:
    shard = shard_of()
    rows = [meet(shard, table, EXTREMES).tolist() for table in ("item", "ad", "item")]
    assert rows[0] == rows[2] and len({*rows[0], *rows[1]}) == 8


def test_a_table_grows_far_beyond_its_stated_capacity_without_losing_a_row() -> None:
    shard = shard_of()  # capacity_rows is 8
    whole = torch.cat([first_weights(shard, "item", range(first, first + 3_000)) for first in range(0, 21_000, 3_000)])
    shard.reset_counts()
    assert torch.equal(first_weights(shard, "item", range(21_000)), whole)
    assert count_of(shard, "item") == {"hit": 21_000}


def test_finding_counts_the_unknown_and_changes_nothing() -> None:
    shard = shard_of(tallies={"user": [Tally("seen")]})
    shard.begin_day(100)
    meet(shard, "user", range(10))
    before = shard.export("user")
    found = find(shard, "user", range(8, 13))
    assert (found < 0).tolist() == [False, False, True, True, True]
    assert count_of(shard, "user") == {"new": 10, "unknown": 3} and count_of(shard, "item") == {}
    assert all(np.array_equal(column, before[name]) for name, column in shard.export("user").items())
    shard.reset_counts()
    assert set(shard.counts) == set(COUNTS) and not any(of.any() for of in shard.counts.values())


# Who gets a row


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_an_id_gets_its_row_on_its_nth_sighting_and_its_count_tells_all_of_them(kind: Any) -> None:
    tables = {"x": TableConfig(dim=4, min_count=4, admission=Admission(kind, cells=1 << 22)), "y": TABLES["user"]}
    shard, twin, draw, rows = shard_of(tables), Counter[int](), random.Random(0), dict[int, int]()
    for day in range(1, 9):
        shard.begin_day(day)
        batch = {i: draw.choice([1, 1, 2, 5]) for i in draw.sample(range(60), 15)}
        twin.update(batch)
        new = [i for i in batch if twin[i] >= 4 and i not in rows]
        shard.reset_counts()
        found = meet(shard, "x", list(batch), sightings=list(batch.values())).tolist()
        hits = sum(i in rows for i in batch)
        rows |= dict(zip(batch, found, strict=True)) | rows  # a row stays the same once there is one
        rows = {i: row for i, row in rows.items() if row >= 0}
        assert found == [rows.get(i, -1) for i in batch] and set(rows) == {i for i in twin if twin[i] >= 4}
        expected = {"hit": hits, "new": len(new), "admitted": len(new)}
        assert count_of(shard, "x") == {name: count for name, count in expected.items() if count}
        pool = shard.pool_of("x")
        assert {i: int(pool.ids.count_R[row]) for i, row in rows.items()} == {i: twin[i] for i in rows}
        waiting = 0 if kind == "sketch" else sum(count < 4 for count in twin.values())
        assert shard.waiting.ids.num_rows == waiting


def test_sightings_beyond_what_a_sketch_can_count_are_counted_once_there_is_a_row() -> None:
    shard = shard_of({"x": TableConfig(dim=4, min_count=2, admission=Admission("sketch"))})
    rows = meet(shard, "x", [5, 6], sightings=[300, 2])
    assert shard.pool_of("x").ids.count_R[rows].tolist() == [300, 2]
    meet(shard, "x", [5], sightings=[10])
    assert shard.pool_of("x").ids.count_R[rows].tolist() == [310, 2]


def test_tables_wait_apart() -> None:
    tables = {name: TableConfig(dim=4, min_count=2) for name in ("a", "b")}
    shard = shard_of(tables)
    assert meet(shard, "a", [5]).tolist() == meet(shard, "b", [5]).tolist() == [-1]
    assert meet(shard, "a", [5])[0] >= 0 and find(shard, "b", [5])[0] == -1
    assert shard.waiting.ids.num_rows_T[:2].tolist() == [0, 1]


def test_who_waits_is_forgotten_after_forget_days_without_a_sighting() -> None:
    shard = shard_of({"x": TableConfig(dim=4, min_count=3, admission=Admission(forget_days=2))})
    for day, ids in ((10, [1, 2]), (11, [2]), (12, [3])):
        shard.begin_day(day)
        meet(shard, "x", ids)
        shard.end_day()
    assert shard.waiting.ids.num_rows == 2  # 1 was last seen two days ago
    assert sorted(np.concatenate(shard.admitted["x"]).tolist()) == keys([1]).tolist()
    assert (meet(shard, "x", [1, 2]) >= 0).tolist() == [False, True]  # the third sighting of 2; 1 begins again


def test_a_sketchs_counts_halve_every_forget_days_also_over_days_that_are_missing() -> None:
    shard = shard_of({"x": TableConfig(dim=4, min_count=200, admission=Admission("sketch", forget_days=3))})
    shard.begin_day(10)
    meet(shard, "x", [7], sightings=[100])
    asked = []
    for day in (10, 11, 12, 12, 13, 14, 15, 24, 1_000):
        shard.begin_day(day)
        asked.append(int(shard.sketches["x"].add(keys([7]), np.zeros(1, np.int64))[0]))
    # closed form: day // 3 - 10 // 3 halvings so far
    assert asked == [100 >> min(day // 3 - 3, 8) for day in (10, 11, 12, 12, 13, 14, 15, 24, 1_000)]


# Who finds room


class FullTable:
    """A table of fixed capacity in plain dicts: value, a sum of sightings that halves every day."""

    def __init__(self, config: TableConfig):
        self.config, self.value, self.counts = config, dict[int, float](), Counter[str]()

    def next_day(self) -> None:
        self.value = {key: value / 2 for key, value in self.value.items()}

    def meet(self, batch: dict[int, int]) -> None:
        capacity, due = self.config.capacity_rows, sorted(key for key in batch if key not in self.value)
        self.counts["hit"] += len(batch) - len(due)
        lacking = len(self.value) + len(due) - capacity
        if lacking > 0 and self.config.when_full == "evict":
            self.evict(max(lacking, capacity // 20), in_use=batch)
        room = capacity - len(self.value)
        self.counts["rejected"] += len(due[room:])
        self.counts["new"] += len(due[:room])
        for key, count in batch.items():
            if key in self.value or key in due[:room]:
                self.value[key] = self.value.get(key, 0.0) + count

    def evict(self, how_many: int, in_use: Mapping[int, int]) -> None:
        order = sorted((value, key % 2**64, key) for key, value in self.value.items() if key not in in_use)
        for _, _, key in order[:how_many]:
            del self.value[key]
            self.counts["evicted"] += 1


@pytest.mark.parametrize("when_full", ["evict", "reject"])
@pytest.mark.parametrize("capacity", [1, 7, 60])
def test_a_full_table_keeps_the_most_valuable_like_a_dict(when_full: Any, capacity: int) -> None:
    config = TableConfig(dim=4, capacity_rows=capacity, grow=False, when_full=when_full, value_half_life_days=1.0)
    tables, twin, draw = {"x": config, "y": TableConfig(dim=4, capacity_rows=30)}, FullTable(config), random.Random(1)
    shard = shard_of(tables)
    meet(shard, "y", range(30))  # another table of the pool
    pool = shard.pool_of("x")
    for day in range(10, 16):
        shard.begin_day(day)
        twin.next_day()
        for _ in range(6):
            ids = draw.sample(range(3 * capacity + 5), draw.choice([0, 1, capacity // 2 + 1, capacity + 3]))
            count = [draw.choice([1, 2, 64]) for _ in ids]
            rows = meet(shard, "x", ids, sightings=count)
            twin.meet(dict(zip(keys(ids).tolist(), count, strict=True)))
            assert [row >= 0 for row in rows] == [key in twin.value for key in keys(ids).tolist()]
            exported = shard.export("x")
            assert exported["key"].tolist() == sorted(twin.value) and len(twin.value) <= capacity
            value = shard.ledger.read(pool.ids, exported["row"])[:, 0]
            assert value.tolist() == [twin.value[key] for key in sorted(twin.value)]  # powers of two: exact
    assert count_of(shard, "x") == {name: count for name, count in twin.counts.items() if count}
    assert twin.counts["rejected"] and bool(twin.counts["evicted"]) == (when_full == "evict")
    assert len(who_has_a_row(shard, "y", range(30))) == 30 and pool.ids.capacity_rows == capacity + 30 + 2


def test_a_full_table_admits_the_lowest_keys_of_a_batch_and_who_waits_keeps_waiting() -> None:
    config = TableConfig(dim=4, capacity_rows=2, grow=False, when_full="reject", min_count=2, ttl_days=1)
    shard = shard_of({"x": config})
    shard.begin_day(1)
    assert (meet(shard, "x", [1, 2, 3, 4]) == -1).all() and count_of(shard, "x") == {}
    found = dict(zip(keys([1, 2, 3, 4]).tolist(), meet(shard, "x", [1, 2, 3, 4]).tolist(), strict=True))
    assert [found[key] >= 0 for key in sorted(found)] == [True, True, False, False]
    assert count_of(shard, "x") == {"new": 2, "admitted": 2, "rejected": 2} and shard.waiting.ids.num_rows == 2
    shard.begin_day(2)
    shard.end_day()  # the two rows are freed
    low, high = np.array(sorted(found)[:2]), np.array(sorted(found)[2:])
    assert (meet_keys(shard, "x", high)[0] >= 0).all() and (meet_keys(shard, "x", low)[0] == -1).all()


def test_evicting_tells_how_many_and_never_takes_rows_in_use() -> None:
    shard = shard_of()
    rows = meet(shard, "user", range(10), sightings=list(range(1, 11)))
    meet(shard, "item", range(10))
    assert shard.evict_least("user", 0) == 0
    assert shard.evict_least("user", 3, in_use=rows[[0, 2]]) == 3
    assert who_has_a_row(shard, "user", range(10)) == [0, 2, 5, 6, 7, 8, 9]
    assert shard.evict_least("user", 100, in_use=rows[[9]]) == 6
    assert who_has_a_row(shard, "user", range(10)) == [9] and shard.pool_of("item").ids.num_rows == 10
    assert count_of(shard, "user")["evicted"] == 9
    assert sorted(np.concatenate(shard.evicted["user"]).tolist()) == sorted(keys(range(9)).tolist())


# The end of a day


def test_ids_unseen_for_ttl_days_lose_their_rows_at_the_end_of_a_day() -> None:
    shard = shard_of({"x": TableConfig(dim=4, ttl_days=2), "y": TableConfig(dim=4)})
    for day, ids in ((10, [1, 2]), (11, [2, 3]), (12, [4]), (13, [1])):
        shard.begin_day(day)
        meet(shard, "x", ids)
        meet(shard, "y", ids)
        shard.end_day()
        expected = {10: [1, 2], 11: [1, 2, 3], 12: [2, 3, 4], 13: [1, 4]}[day]
        assert who_has_a_row(shard, "x", range(6)) == expected
    assert who_has_a_row(shard, "y", range(6)) == [1, 2, 3, 4]
    assert count_of(shard, "x")["evicted"] == 3 and shard.pool_of("x").lookup(find(shard, "x", [1])).any() == 0


def test_above_its_budget_a_table_keeps_who_is_most_valuable_by_its_events_and_their_age() -> None:
    config = TableConfig(dim=4, budget_rows=3, value={"click": 1.0, "buy": 20.0}, value_half_life_days=1.0)
    shard = shard_of({"x": config}, labels=["view", "click", "buy"])
    assert shard.ledger.events == [SIGHTINGS, "click", "buy"]  # a view is worth nothing
    shard.begin_day(10)
    meet(shard, "x", [1, 2, 3, 4], sightings=[9, 9, 9, 9], click=[2, 60, 9, 0], buy=[1, 0, 0, 0])
    shard.begin_day(11)
    meet(shard, "x", [5, 6, 7], sightings=[1, 1, 1], click=[10, 12, 0], buy=[0, 0, 1])
    shard.end_day()
    # by hand, on day 11: 1: 22 / 2, 2: 60 / 2, 3: 9 / 2, 4: 0, 5: 10, 6: 12, 7: 20
    assert who_has_a_row(shard, "x", range(9)) == [2, 6, 7]
    shard.end_day()
    assert who_has_a_row(shard, "x", range(9)) == [2, 6, 7] and count_of(shard, "x")["evicted"] == 4


def test_equally_valuable_ids_leave_in_the_order_of_their_keys_read_as_unsigned() -> None:
    shard = shard_of({"x": TableConfig(dim=4, budget_rows=20)})
    shard.begin_day(1)
    meet(shard, "x", range(50))
    shard.end_day()
    kept = sorted(key % 2**64 for key in keys(range(50)).tolist())[30:]
    assert sorted(key % 2**64 for key in shard.export("x")["key"].tolist()) == kept


# What a model reads


def test_statistics_are_those_before_the_batch_and_leave_value_out() -> None:
    tallies = {"user": [Tally("seen"), Tally("bought", {"buy": 2.0}, 1.0)]}
    shard = shard_of(tallies=tallies, labels=["buy"])
    assert shard.statistics("user") == ["seen", "bought"] and shard.statistics("item") == []
    shard.begin_day(10)
    for expected in ([[0, 0], [0, 0]], [[1, 2], [1, 6]]):
        _, statistics = meet_keys(shard, "user", keys([1, 2]), buy=[1, 3])
        assert statistics.dtype == np.float32 and statistics.tolist() == expected
    shard.begin_day(11)
    # two sightings less a day of 30, and 2 x 2 and 2 x 6 halved; 3 has no row
    _, found = shard.find(shard.pool_of("user"), keys([2, 3, 1]), np.zeros(3, np.uint8))
    assert found == pytest.approx(np.array([[2 * 0.5 ** (1 / 30), 6], [0, 0], [2 * 0.5 ** (1 / 30), 2]]), rel=1e-6)
    assert meet_keys(shard, "item", keys([1]))[1].shape == (1, 0)


def test_statistics_over_all_of_a_tables_ids_are_those_as_the_day_began() -> None:
    tally = Tally("bought", {"buy": 1.0}, 1.0, by_day=True)
    shard = shard_of(tallies={"user": [tally, Tally("seen", half_life_days=2.0)]}, labels=["buy"])
    shard.begin_day(10)
    assert list(shard.overall_S) == ["user"] and shard.overall_S["user"].tolist() == [0, 0]
    meet(shard, "user", range(5), buy=[0, 1, 2, 3, 4])
    shard.begin_day(10)  # again, in the middle of the day
    assert shard.overall_S["user"].tolist() == [0, 0]
    shard.begin_day(12)
    assert shard.overall_S["user"].tolist() == [10 / 4, 5 / 2]  # by hand; exact: powers of two


def test_beginning_a_day_twice_is_beginning_it_once() -> None:
    shard = shard_of({"x": TableConfig(dim=4, min_count=2, admission=Admission("sketch", forget_days=1))})
    shard.begin_day(10)
    shard.sketches["x"].add(keys([1]), np.array([64]))
    for _ in range(3):
        shard.begin_day(11)
    assert shard.periods.days == [0, 10, 11] and shard.sketches["x"].cells.max() == 32


# Who must know


def rows_by_owner(pool: RowPool) -> dict[int, dict[str, bytes]]:
    rows = np.concatenate([pool.ids.rows(table) for table in pool.tables])
    known = pool.known(rows)
    return {
        int(row): {name: np.ascontiguousarray(column[place]).tobytes() for name, column in known.items()}
        for place, row in enumerate(rows)
    }


def test_before_change_is_told_of_every_row_that_changes_while_it_is_still_as_it_was() -> None:
    config = TableConfig(dim=4, capacity_rows=20, grow=False, ttl_days=2, budget_rows=15, init_scale=1.0)
    shard, draw = (
        shard_of({"x": config, "y": TableConfig(dim=4, init_scale=1.0)}, optimizer=Adagrad()),
        random.Random(0),
    )
    pool, changes = shard.pool_of("x"), 0
    for step in range(60):
        told: list[Columns] = []
        shard.before_change = lambda pool, rows, told=told: told.append(pool.known(rows.copy()))  # type: ignore[misc]
        if step % 6 == 0:
            shard.begin_day(100 + step)
        before = rows_by_owner(pool)
        if step % 6 == 5:
            shard.end_day()
        else:
            meet(shard, draw.choice(["x", "y"]), draw.sample(range(60), 8))
        after, seen = rows_by_owner(pool), dict[int, dict[str, bytes]]()
        for known in told:
            for place, row in enumerate(known["row"].tolist()):
                seen.setdefault(row, {n: np.ascontiguousarray(c[place]).tobytes() for n, c in known.items()})
        changed = [row for row in before if after.get(row) != before[row]]
        assert all(seen[row] == before[row] for row in changed)
        changes += len(changed)
    assert changes > 200 and count_of(shard, "x")["evicted"] > 20


# To and from snapshots


def test_export_gives_every_row_of_its_table_alone_sorted_by_key_with_its_day() -> None:
    shard = shard_of(optimizer=Adam())
    for day, table, ids in ((5, "ad", range(30)), (6, "item", range(20, 90)), (7, "ad", range(25, 60))):
        shard.begin_day(day)
        rows = meet(shard, table, ids)
        shard.pool_of(table).update(rows, torch.full((len(ids), 8), float(day)))
    exported, pool = shard.export("ad"), shard.pool_of("ad")
    assert exported["key"].tolist() == sorted(keys(range(60)).tolist())
    day_of = dict(zip(keys(range(60)).tolist(), [5] * 25 + [7] * 35, strict=True))
    assert exported["last_seen_day"].tolist() == [day_of[key] for key in exported["key"].tolist()]
    known = pool.known(pool.ids.find(exported["key"], np.full(60, 2, np.uint8)))
    assert set(exported) == {*known, "last_seen_day"} and set(Adam.states) < set(exported)
    assert all(np.array_equal(exported[name], column) for name, column in known.items())


def test_export_of_an_empty_table_is_empty_and_keeps_the_width() -> None:
    exported = shard_of().export("item")
    assert exported["weight"].shape == (0, 8) and exported["key"].shape == exported["adagrad_sum"].shape == (0,)


def test_rows_that_are_put_are_as_they_were_exported_and_uncounted() -> None:
    first, second = shard_of(optimizer=Adam()), shard_of(optimizer=Adam(), kernel=FbgemmRows)
    first.begin_day(5)
    first.pool_of("user").update(meet(first, "user", range(40)), torch.randn(40, 4))
    exported = first.export("user")
    second.begin_day(5)
    second.put("user", exported["key"], exported)
    again = second.export("user")
    assert all(np.array_equal(again[name], column) for name, column in exported.items() if name != "row")
    assert count_of(second, "user") == {} and not second.evicted["user"]


def test_under_another_optimizer_states_of_the_same_name_are_kept_and_the_others_start_anew() -> None:
    first, second = shard_of(optimizer=RowwiseAdagrad()), shard_of(optimizer=Adam())
    first.pool_of("user").update(meet(first, "user", range(4)), torch.ones(4, 4))
    exported = first.export("user")
    second.put("user", exported["key"], exported)
    again = second.export("user")
    assert np.array_equal(again["weight"], exported["weight"])
    assert not any(again[name].any() for name in Adam.states) and exported["adagrad_sum"].all()


def test_a_default_row_that_is_put_is_what_an_id_without_a_row_reads() -> None:
    shard = shard_of({"x": TableConfig(dim=4, default_row="trained", min_count=2), "y": TableConfig(dim=4)})
    known = {"weight": np.ones((1, 4), np.float32), "adagrad_sum": np.array([3.0], np.float32), "count": np.array([7])}
    shard.put_default("x", known)
    pool, rows = shard.pool_of("x"), shard.pool_of("x").default_rows(np.array([0, 1], np.uint8))
    assert pool.lookup(rows).tolist() == [[1.0] * 4, [0.0] * 4]
    assert pool.states(rows)["adagrad_sum"].tolist() == [3, 0] and pool.ids.count_R[rows].tolist() == [7, 0]


def from_snapshot(shard: Shard, table: str, ids: list[int], values: list[float], days: list[int]) -> None:
    """Put rows as a snapshot of a table without tallies of its own brings them."""
    known: Columns = {"count": np.ones(len(ids), np.int32), "seen": shard.periods.past(np.array(days))}
    known |= {"tally": np.array(values, np.float32)[:, None], "weight": np.zeros((len(ids), 4), np.float32)}
    shard.put(table, keys(ids), known)


def test_a_table_that_may_neither_grow_nor_evict_refuses_more_rows_than_it_is_given() -> None:
    config = TableConfig(dim=4, capacity_rows=3, grow=False, when_full="reject")
    shard = shard_of({"y": TABLES["user"], "x": config})
    from_snapshot(shard, "x", [1, 2, 3], [1.0] * 3, [50] * 3)
    from_snapshot(shard, "y", list(range(20)), [1.0] * 20, [50] * 20)
    shard.fit()
    from_snapshot(shard, "x", [4], [1.0], [50])
    with pytest.raises(TooManyRows, match="table x: 4 rows, capacity 3") as error:
        shard.fit()
    assert (error.value.table, error.value.rows, error.value.capacity_rows) == ("x", 4, 3)


def test_a_table_that_is_given_less_room_keeps_who_is_most_valuable_on_the_newest_day() -> None:
    shard = shard_of({"x": TableConfig(dim=4, capacity_rows=2, grow=False, value_half_life_days=1.0)})
    from_snapshot(shard, "x", [1, 2, 3, 4], [16.0, 9.0, 5.0, 3.0], [738_000, 738_001, 738_003, 738_002])
    shard.fit()
    # by hand, on day 738,003: 16 / 8, 9 / 4, 5, 3 / 2
    assert shard.periods.today == 738_003 and who_has_a_row(shard, "x", range(6)) == [2, 3]
    assert count_of(shard, "x")["evicted"] == 2
    assert sorted(np.concatenate(shard.evicted["x"]).tolist()) == sorted(keys([1, 4]).tolist())


def test_an_empty_shard_fits_and_its_first_day_halves_nothing() -> None:
    shard = shard_of({"x": TableConfig(dim=4, min_count=2, admission=Admission("sketch", forget_days=1))})
    shard.fit()
    shard.sketches["x"].add(keys([1]), np.array([64]))
    shard.begin_day(738_000)
    assert shard.sketches["x"].cells.max() == 64
