"""Distinct (table, key) pairs against a plain dict and np.unique, with the pairs that hash tables like least."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from embeddings.buckets import keys_of, owner_of
from embeddings.dedupe import Bytes, Distinct, Int64s, distinct, sums_by_pair, transpose
from embeddings.jagged import Jagged

EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63)]


def tables_of(values: list[int]) -> Bytes:
    return np.array(values, np.uint8)


def near(rng: np.random.Generator) -> tuple[Int64s, Bytes]:
    """Few keys, many repeats, the extremes among them, three tables."""
    keys = rng.choice(np.array([*EXTREMES, *range(2, 60)], np.int64), 3_000)
    return keys, rng.integers(0, 3, keys.size).astype(np.uint8)


def spread(rng: np.random.Generator) -> tuple[Int64s, Bytes]:
    """Keys as they come, more than the smallest hash table has slots, every table there can be."""
    keys = keys_of(rng.integers(0, 4_000, 6_000))
    return keys, rng.choice(tables_of([0, 1, 128, 254]), keys.size)


def crowded(rng: np.random.Generator) -> tuple[Int64s, Bytes]:
    """Keys that agree in their low bits: all want one slot."""
    keys = (rng.integers(-300, 300, 2_000) << 40) + 5
    return keys, np.zeros(keys.size, np.uint8)


MakeBatch = Callable[[np.random.Generator], tuple[Int64s, Bytes]]
BATCHES: list[MakeBatch] = [near, spread, crowded]


def plain(key_N: Int64s, table_N: Bytes, num_workers: int) -> Distinct:
    """The same by a dict in order of insertion, a stable sort by owner, and loops."""
    pairs = list(zip(key_N.tolist(), table_N.tolist(), strict=True))
    owners = {pair: int(owner_of(pair[0], num_workers)) for pair in dict.fromkeys(pairs)}
    ordered = sorted(owners, key=owners.__getitem__)
    place = {pair: u for u, pair in enumerate(ordered)}
    count = [0] * len(ordered)
    for pair in pairs:
        count[place[pair]] += 1
    sizes = [list(owners.values()).count(worker) for worker in range(num_workers)]
    keys, tables = [key for key, _ in ordered], [table for _, table in ordered]
    arrays = (keys, [place[pair] for pair in pairs], count, sizes)
    key_U, index_N, count_U, sizes_W = (np.array(array, np.int64) for array in arrays)
    return Distinct(key_U, tables_of(tables), index_N, count_U, sizes_W)


def assert_same(found: Distinct, expected: Distinct) -> None:
    for name, value in vars(expected).items():
        assert getattr(found, name).dtype == value.dtype and np.array_equal(getattr(found, name), value), name


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("batch", BATCHES)
def test_distinct_equals_a_dict_by_owner_in_order_of_first_appearance(batch: MakeBatch, num_workers: int) -> None:
    key_N, table_N = batch(np.random.default_rng(num_workers))
    assert_same(distinct(key_N, table_N, num_workers), plain(key_N, table_N, num_workers))


@pytest.mark.parametrize("batch", BATCHES)
def test_distinct_finds_the_pairs_and_counts_of_np_unique(batch: MakeBatch) -> None:
    key_N, table_N = batch(np.random.default_rng(100))
    found = distinct(key_N, table_N)
    expected, count = np.unique(np.stack([key_N, table_N]), axis=1, return_counts=True)
    order = np.lexsort((found.table_U, found.key_U))
    assert np.array_equal(np.stack([found.key_U, found.table_U])[:, order], expected)
    assert np.array_equal(found.count_U[order], count)


@pytest.mark.parametrize("num_workers", [1, 5])
def test_each_id_finds_its_own_pair_and_sizes_cut_the_pairs_by_owner(num_workers: int) -> None:
    key_N, table_N = spread(np.random.default_rng(1))
    found = distinct(key_N, table_N, num_workers)
    assert np.array_equal(found.key_U[found.index_N], key_N) and np.array_equal(found.table_U[found.index_N], table_N)
    owners = np.repeat(np.arange(num_workers), found.sizes_W)
    assert np.array_equal(owner_of(found.key_U, num_workers), owners)  # also: sizes add up to the pairs


def test_equal_keys_of_different_tables_are_different_pairs() -> None:
    key_N, table_N = np.repeat(np.array(EXTREMES), 255), np.tile(np.arange(255).astype(np.uint8), len(EXTREMES))
    twice = distinct(np.tile(key_N, 2), np.tile(table_N, 2))
    assert np.array_equal(twice.key_U, key_N) and np.array_equal(twice.table_U, table_N)
    assert (twice.count_U == 2).all()


@pytest.mark.parametrize("bits", range(0, 56, 8))
def test_pairs_whose_keys_differ_as_their_tables_do_stay_apart(bits: int) -> None:
    """A hash that mixes key and table by one xor sends all of these to one slot, wherever it shifts the table to."""
    table_N = np.arange(255).astype(np.uint8)
    for shift in range(bits, bits + 8):
        key_N = (table_N.astype(np.int64) << shift) ^ 77
        assert_same(distinct(key_N, table_N), plain(key_N, table_N, 1))


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_of_no_id_or_of_one(count: int, num_workers: int) -> None:
    key_N, table_N = np.full(count, -1), np.full(count, 254, np.uint8)
    assert_same(distinct(key_N, table_N, num_workers), plain(key_N, table_N, num_workers))


def test_distinct_leaves_its_arguments_alone() -> None:
    key_N, table_N = near(np.random.default_rng(2))
    keys, tables = key_N.copy(), table_N.copy()
    distinct(key_N, table_N, 2)
    assert np.array_equal(key_N, keys) and np.array_equal(table_N, tables)


def lists_of(jagged: Jagged) -> list[list[int]]:
    values, offsets = jagged.values_N.tolist(), jagged.offsets.tolist()
    assert (offsets[0], offsets[-1]) == (0, len(values))
    return [values[first:end] for first, end in zip(offsets, offsets[1:], strict=False)]


def random_bags(lengths: list[int], num_pairs: int) -> Jagged:
    values = torch.randint(num_pairs, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return Jagged.from_lengths(values, torch.tensor(lengths, dtype=torch.int64))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [3], [2, 0, 5, 0, 0, 1, 40]])
@pytest.mark.parametrize("num_pairs", [4, 1_000])  # all in use many times over; most in none
def test_transpose_equals_a_loop_that_asks_each_pair_for_its_bags(lengths: list[int], num_pairs: int) -> None:
    bags = random_bags(lengths, num_pairs)
    expected: list[list[int]] = [[] for _ in range(num_pairs)]
    for bag, pairs in enumerate(lists_of(bags)):
        for u in pairs:
            expected[u].append(bag)  # a pair that a bag holds twice names it twice
    turned = transpose(bags, num_pairs)
    assert lists_of(turned) == expected
    assert turned.values_N.dtype == turned.offsets.dtype == torch.int64


def test_transposing_twice_gives_each_bag_its_pairs_back_sorted() -> None:
    bags = random_bags([3, 0, 1, 8, 0, 20] * 10, 50)
    again = transpose(transpose(bags, 50), bags.num_rows)
    assert lists_of(again) == [sorted(pairs) for pairs in lists_of(bags)]


def test_no_pairs_at_all_have_no_bags() -> None:
    assert lists_of(transpose(random_bags([0, 0, 0], 1), 0)) == []


@pytest.mark.parametrize("lengths", [[], [0, 0], [3], [2, 0, 5, 0, 0, 1, 40]])
@pytest.mark.parametrize("num_pairs", [4, 1_000])
def test_sums_by_pair_equal_a_loop_and_the_turned_lists_own_sums(lengths: list[int], num_pairs: int) -> None:
    bags, value = random_bags(lengths, num_pairs), torch.randint(-9, 9, (len(lengths), 3)).float()  # sums are exact
    expected = torch.zeros(num_pairs, 3)
    for bag, pairs in enumerate(lists_of(bags)):
        for u in pairs:
            expected[u] += value[bag]
    assert torch.equal(sums_by_pair(bags, value, num_pairs), expected)
    assert torch.equal(transpose(bags, num_pairs).sums(value), expected)


def test_sums_by_pair_take_values_of_any_memory_layout() -> None:
    bags, value = random_bags([2, 0, 5], 4), torch.arange(6.0).view(2, 3).T
    for given in (value, value[:, :1].expand(3, 2), torch.ones(1, 1).expand(3, 2)):
        assert torch.equal(sums_by_pair(bags, given, 4), sums_by_pair(bags, given.contiguous(), 4))
