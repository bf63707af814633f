"""One worker's keys and rows: first weights against their law in plain integers, rows and counts against dicts."""

import pytest
import torch
from torch import Tensor

from embeddings.buckets import hash64
from embeddings.kernels import FbgemmRows, RowKernel, TorchRows
from embeddings.optim import RowwiseAdagrad
from embeddings.shard import IdCounts, Shard, hash_name
from embeddings.table import TableConfig

TABLES = {
    "user": TableConfig(dim=4, capacity_rows=8, init_scale=0.1),
    "item": TableConfig(dim=8, capacity_rows=8, init_scale=0.5),
    "ad": TableConfig(dim=8, capacity_rows=8),
}
EXTREMES = [0, -1, 2**63 - 1, -(2**63)]


def shard_of(*, num_shards: int = 1, seed: int = 0, kernel: type[FbgemmRows] | type[RowKernel] = FbgemmRows) -> Shard:
    return Shard(TABLES, RowwiseAdagrad(), num_shards=num_shards, seed=seed, kernel=kernel)


def keys_of(ids: list[int] | range) -> Tensor:
    return hash64(torch.tensor(list(ids), dtype=torch.int64))


def first_weights(shard: Shard, table: str, keys: Tensor) -> Tensor:
    rows = shard.rows_of(table, keys, insert=True)
    return shard.pools[TABLES[table].dim].lookup(rows)


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
    keys, config = keys_of([*EXTREMES, *range(20)]), TABLES[table]
    expected = [
        [config.init_scale * uniform(key % 2**64, column, hash_name(table, 3)) for column in range(config.dim)]
        for key in keys.tolist()
    ]
    # float32 of a float64 value, one multiplication later: two roundings of 6e-8
    torch.testing.assert_close(first_weights(shard_of(seed=3), table, keys), torch.tensor(expected), rtol=2e-7, atol=0)


def test_first_weights_are_uniform_between_minus_and_plus_the_scale() -> None:
    weight = first_weights(shard_of(), "item", keys_of(range(4_000))).flatten().sort().values / 0.5
    expected = torch.linspace(-1, 1, weight.numel())
    # Kolmogorov-Smirnov: the distance passes 2.2 / sqrt(n) once in 10,000 draws; twice that, for the range is 2 wide
    assert (weight - expected).abs().max() < 2 * 2.2 / weight.numel() ** 0.5
    assert weight.abs().max() <= 1


def test_first_weights_do_not_depend_on_order_batches_shards_or_kernel() -> None:
    keys = keys_of(range(100))
    expected = first_weights(shard_of(), "item", keys)
    other = shard_of(num_shards=3, kernel=TorchRows)
    parts = [first_weights(other, "item", part) for part in keys.flip(0).split([1, 0, 60, 39])]
    assert torch.equal(torch.cat(parts).flip(0), expected)  # bits


def test_first_weights_differ_between_ids_columns_seeds_and_tables() -> None:
    tables = {name: TableConfig(dim=8, init_scale=1.0) for name in ("a", "b")}
    shards = [Shard(tables, RowwiseAdagrad(), seed=seed) for seed in (0, 1)]
    keys = keys_of(range(50))
    weights = [s.pools[8].lookup(s.rows_of(name, keys, insert=True)) for s in shards for name in tables]
    # 1,600 draws of 53 bits, rounded to 24: one pair in 10 million is equal, so a few at most
    assert torch.stack(weights).unique().numel() > 1_590


def test_a_table_without_init_scale_starts_at_zero() -> None:
    assert torch.equal(first_weights(shard_of(), "ad", keys_of(range(5))), torch.zeros(5, 8))


def test_an_id_keeps_its_row_and_a_new_row_starts_without_state() -> None:
    shard, keys = shard_of(), keys_of([*EXTREMES, 5, 6])
    rows = shard.rows_of("user", keys, insert=True)
    assert rows.unique().numel() == 6 and torch.equal(shard.pools[4].state(rows), torch.zeros(6))
    again = shard.rows_of("user", torch.cat([keys_of([7]), keys.flip(0)]), insert=True)
    assert torch.equal(again[1:], rows.flip(0)) and again[0] not in rows


def test_one_id_in_two_tables_of_one_width_has_two_rows() -> None:
    shard, keys = shard_of(), keys_of(EXTREMES)
    rows = [shard.rows_of(table, keys, insert=True) for table in ("item", "ad", "item")]
    assert torch.equal(rows[0], rows[2]) and torch.cat(rows[:2]).unique().numel() == 8


def test_unknown_ids_are_counted_and_get_no_row_unless_inserted() -> None:
    shard = shard_of()
    shard.rows_of("user", keys_of(range(10)), insert=True)
    found = shard.rows_of("user", keys_of(range(8, 13)), insert=False)
    assert (found < 0).tolist() == [False, False, True, True, True] and shard.maps["user"].num_keys == 10
    assert shard.counts["user"] == IdCounts(new=10, unknown=3) and shard.counts["item"] == IdCounts()
    shard.reset_counts()
    assert shard.counts == {name: IdCounts() for name in TABLES}


def test_export_gives_back_every_row_of_its_table_alone_sorted_by_key() -> None:
    shard, twin = shard_of(), dict[int, tuple[list[float], float]]()
    for table, ids in (("ad", range(30)), ("item", range(20, 90)), ("ad", range(100, 160))):
        keys = keys_of(ids)
        weight, state = (
            torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(ids.start)),
            torch.arange(len(ids)) + 0.5,
        )
        shard.add(table, keys, weight, state)
        if table == "ad":
            twin.update(zip(keys.tolist(), zip(weight.tolist(), state.tolist(), strict=True), strict=True))
    keys, weight, state = shard.export("ad")
    assert keys.tolist() == sorted(twin)
    assert list(zip(weight.tolist(), state.tolist(), strict=True)) == [twin[key] for key in sorted(twin)]


def test_export_of_an_empty_table_is_empty_and_keeps_the_width() -> None:
    keys, weight, state = shard_of().export("item")
    assert (keys.shape, weight.shape, state.shape) == ((0,), (0, 8), (0,))


def test_a_table_grows_far_beyond_its_stated_capacity_without_losing_a_row() -> None:
    shard, keys = shard_of(), keys_of(range(20_000))  # capacity_rows is 8
    whole = [first_weights(shard, "item", part) for part in keys.split(3_000)]
    shard.counts["item"].new = 0
    assert torch.equal(first_weights(shard, "item", keys), torch.cat(whole)) and shard.counts["item"].new == 0


def test_hash_name_is_fnv_1a_when_the_seed_is_zero() -> None:
    # the published 64-bit test vectors, less their lowest bit
    assert hash_name("", 0) == 0xCBF29CE484222325 >> 1
    assert hash_name("a", 0) == 0xAF63DC4C8601EC8C >> 1
    assert hash_name("foobar", 0) == 0x85944171F73967E8 >> 1
