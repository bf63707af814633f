"""Who waits, against Python counters; the sketch against a plain loop over its cells."""

import random
from collections import Counter

import numpy as np
import pytest

from embeddings.admission import CountSketch, Waiting
from embeddings.buckets import NUM_BUCKETS, bucket_of, buckets_of, keys_of, owner_of
from embeddings.dedupe import Int64s

EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63)]
SMALL = NUM_BUCKETS * 4 * 4  # cells: four columns a bucket and hash function
LARGE = 1 << 22


# Exact counters


def test_waiting_counts_every_sighting_of_every_pair_like_a_counter() -> None:
    waiting, twin, draw = Waiting(), Counter[tuple[int, int]](), random.Random(0)
    pairs = [(table, key) for table in (0, 1, 254) for key in [*EXTREMES, *range(2, 900)]]
    for period in range(20):
        batch = draw.sample(pairs, 300)
        count = [draw.choice([1, 1, 2, 500]) for _ in batch]
        key_U, table_U = np.array([key for _, key in batch]), np.array([table for table, _ in batch], np.uint8)
        total = waiting.add(key_U, table_U, np.array(count), period)
        twin.update(dict(zip(batch, count, strict=True)))
        assert total.tolist() == [twin[pair] for pair in batch]
        assert (waiting.ids.seen_R[waiting.ids.find(key_U, table_U)] == period).all()
        gone = draw.sample(pairs, 100)  # many of them do not wait
        waiting.remove(np.array([key for _, key in gone]), np.array([table for table, _ in gone], np.uint8))
        for pair in gone:
            del twin[pair]
        assert waiting.ids.num_rows == len(twin)


def test_who_waits_again_starts_from_nothing() -> None:
    waiting, key_U, table_U = Waiting(), np.array([-1]), np.zeros(1, np.uint8)
    waiting.add(key_U, table_U, np.array([3]), 1)
    waiting.remove(key_U, table_U)
    assert waiting.add(key_U, table_U, np.array([1]), 2).tolist() == [1]


# The sketch


def ask(sketch: CountSketch, keys: Int64s) -> Int64s:
    """Estimates: nothing is added."""
    return sketch.add(keys, np.zeros(keys.size, np.int64))


def batches(num_keys: int, count: int, most: int) -> list[tuple[Int64s, Int64s]]:
    """Batches of distinct keys, some keys far more often than others, and how often each was seen."""
    rng, keys = np.random.default_rng(0), keys_of(np.arange(num_keys))
    often = rng.pareto(1.0, num_keys) + 0.01
    chosen = [rng.choice(num_keys, num_keys // 3, replace=False, p=often / often.sum()) for _ in range(count)]
    return [(keys[places], rng.integers(1, most + 1, places.size)) for places in chosen]


def cells_of(key: int, cells: int) -> list[tuple[int, ...]]:
    """The cells of a key: those that it alone raises in an empty sketch."""
    empty = CountSketch(cells)
    empty.add(np.array([key]), np.array([1]))
    return [tuple(place) for place in np.argwhere(empty.cells).tolist()]


@pytest.mark.parametrize("cells", [1, 4 * NUM_BUCKETS, SMALL, 100_000, LARGE])
def test_a_sketch_takes_at_most_its_cells_in_bytes_but_one_a_bucket_and_hash_at_the_least(cells: int) -> None:
    sketch = CountSketch(cells)
    assert sketch.cells.nbytes <= max(cells, 4 * NUM_BUCKETS) < sketch.cells.nbytes + 4 * NUM_BUCKETS


@pytest.mark.parametrize("cells", [1, SMALL, LARGE])
def test_estimates_are_never_too_low_up_to_255(cells: int) -> None:
    sketch, truth = CountSketch(cells), Counter[int]()
    for key_U, count_U in batches(50_000, 8, most=40):
        estimate_U = sketch.add(key_U, count_U)
        truth.update(dict(zip(key_U.tolist(), count_U.tolist(), strict=True)))
        true_U = np.array([truth[key] for key in key_U.tolist()])
        assert (estimate_U >= np.minimum(true_U, 255)).all() and estimate_U.max() <= 255
    assert (true_U > 255).any() or len(truth) > 1_000


def test_a_sketch_with_room_is_exact_for_all_but_a_few_ids() -> None:
    sketch, truth = CountSketch(LARGE), Counter[int]()
    for key_U, count_U in batches(20_000, 5, most=9):
        sketch.add(key_U, count_U)
        truth.update(dict(zip(key_U.tolist(), count_U.tolist(), strict=True)))
    keys = np.array(list(truth))
    wrong = (ask(sketch, keys) != np.array(list(truth.values()))).mean()
    # five ids share a bucket of 256 columns: all four cells of one are others' with chance (4 / 256)^4 = 6e-8 and few
    # strangers; cells that collide within a bucket by a bad hash would show at once
    assert wrong < 1e-3


def test_only_the_cells_that_hold_the_smallest_count_are_raised_like_in_a_plain_loop() -> None:
    """A bucket's worth of keys in a sketch of two columns, against the published update on a dict of cells."""
    every = keys_of(np.arange(NUM_BUCKETS * 12))
    keys = every[bucket_of(every) == 17]
    cells, twin, draw = 4 * 2 * NUM_BUCKETS, Counter[tuple[int, ...]](), random.Random(0)
    places = {key: cells_of(key, cells) for key in keys.tolist()}
    assert len(keys) >= 6 and all(len(of_key) == 4 for of_key in places.values())
    sketch = CountSketch(cells)
    for _ in range(200):
        batch = {key: draw.randrange(1, 4) for key in draw.sample(keys.tolist(), 3)}
        estimate = {key: min(min(twin[c] for c in places[key]) + count, 255) for key, count in batch.items()}
        for key, value in estimate.items():
            for cell in places[key]:
                twin[cell] = max(twin[cell], value)
        found = sketch.add(np.array(list(batch)), np.array(list(batch.values())))
        assert found.tolist() == list(estimate.values())
        assert {tuple(place): sketch.cells[tuple(place)] for place in np.argwhere(sketch.cells).tolist()} == twin
    assert 255 in twin.values()  # the end of a cell was met


def test_the_cells_of_keys_are_spread_evenly_over_each_hash_functions_columns() -> None:
    sketch, keys = CountSketch(SMALL), keys_of(np.arange(40_000))
    hits = np.zeros((4, 4))
    for key in keys[:2_000]:  # ten keys a bucket at most, so alone in it mostly: one at a time
        sketch.cells[:] = 0 if sketch.cells.any() else sketch.cells
        sketch.add(np.array([key]), np.array([1]))
        hits += sketch.cells[bucket_of(key)]
        sketch.cells[bucket_of(key)] = 0
    # 2,000 throws into four columns: a column's share has sigma 0.0097; five sigmas
    assert np.abs(hits / 2_000 - 0.25).max() < 5 * 0.0097


@pytest.mark.parametrize("cells", [1, SMALL])
def test_the_order_of_a_batchs_keys_does_not_matter(cells: int) -> None:
    forward, backward = CountSketch(cells), CountSketch(cells)
    for key_U, count_U in batches(20_000, 4, most=60):
        assert np.array_equal(forward.add(key_U, count_U), backward.add(key_U[::-1], count_U[::-1])[::-1])
    assert np.array_equal(forward.cells, backward.cells)


@pytest.mark.parametrize("num_shards", [2, 3, 7])
def test_sketches_of_shards_side_by_side_are_the_sketch_of_one(num_shards: int) -> None:
    whole = CountSketch(SMALL)
    parts = [CountSketch(SMALL, buckets_of(shard, num_shards)) for shard in range(num_shards)]
    for key_U, count_U in batches(20_000, 4, most=60):
        estimate_U, owner_U = whole.add(key_U, count_U), owner_of(key_U, num_shards)
        for shard, part in enumerate(parts):
            mine = owner_U == shard
            assert np.array_equal(part.add(key_U[mine], count_U[mine]), estimate_U[mine])
    assert np.array_equal(np.concatenate([part.cells for part in parts]), whole.cells)


def test_counts_halve_and_round_down_once_for_every_forget_days_that_ended() -> None:
    keys, first = keys_of(np.arange(100)), np.minimum(np.arange(100) * 4, 255)
    for days in ([700, 703, 706, 709], [700, 701, 701, 702, 703, 711], [702, 703, 1_000], [700, 702], [700, 740_000]):
        sketch = CountSketch(LARGE)
        sketch.begin_day(days[0], 3)  # the first day ends nothing
        sketch.add(keys, np.arange(100) * 4)
        for day in days[1:]:
            sketch.begin_day(day, 3)
            # closed form; 8 halvings leave nothing of a byte
            assert np.array_equal(ask(sketch, keys), first >> min(day // 3 - days[0] // 3, 8))


def test_an_earlier_day_halves_nothing_and_the_newest_is_remembered() -> None:
    sketch, key = CountSketch(SMALL), keys_of(np.arange(1))
    sketch.begin_day(100, 10)
    sketch.add(key, np.array([64]))
    for day in (85, 100, 109, 95, 109):
        sketch.begin_day(day, 10)
    assert ask(sketch, key).tolist() == [64] and sketch.day == 109
    sketch.begin_day(110, 10)
    assert ask(sketch, key).tolist() == [32]


def test_asking_for_no_key_changes_nothing() -> None:
    sketch = CountSketch(SMALL)
    assert sketch.add(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == [] and not sketch.cells.any()
