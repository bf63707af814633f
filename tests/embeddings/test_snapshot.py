"""Rows to files and back: any number of shards saves, any number loads, and pandas reads the files as they are."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.fs
import pytest
import torch

from embeddings.buckets import NUM_BUCKETS, bucket_of, first_bucket, hash64, shard_sizes, unhash64
from embeddings.optim import RowwiseAdagrad
from embeddings.shard import Shard
from embeddings.snapshot import load_table, overlapping, save_table
from embeddings.table import TableConfig

TABLES = {
    "item": TableConfig(dim=8, capacity_rows=4, init_scale=0.3),
    "ad": TableConfig(dim=8),
    "user": TableConfig(dim=4),
}
EXTREMES = [0, -1, 2**63 - 1, -(2**63)]
IDS = torch.tensor([*EXTREMES, *range(1, 3_000)])
LOCAL = pyarrow.fs.LocalFileSystem()
Rows = dict[int, tuple[bytes, float]]


def empty_shards(num_shards: int) -> list[Shard]:
    return [Shard(TABLES, RowwiseAdagrad(), num_shards=num_shards) for _ in range(num_shards)]


def trained_shards(num_shards: int) -> list[Shard]:
    """Every id's item row after a step whose gradient depends on the id alone; other ids in a table as wide."""
    shards, keys = empty_shards(num_shards), hash64(IDS).sort().values
    for shard, mine in zip(shards, keys.split(shard_sizes(keys, num_shards).tolist()), strict=True):
        rows = shard.rows_of("item", mine, insert=True)
        shard.rows_of("ad", mine[::2] + 1, insert=True)
        shard.pools[8].update(rows, (mine % 1_000).float().unsqueeze(1) * torch.linspace(-1, 1, 8))
    return shards


def rows_of(shards: list[Shard]) -> Rows:
    """Weights (their bytes) and state of each id, over all shards."""
    found: Rows = {}
    for keys, weight, state in (shard.export("item") for shard in shards):
        ids = unhash64(keys).tolist()
        assert not found.keys() & set(ids)  # one owner an id
        found.update({i: (w.tobytes(), s) for i, w, s in zip(ids, weight.numpy(), state.tolist(), strict=True)})
    return found


def save(shards: list[Shard], folder: Path) -> list[str]:
    paths = [str(folder / f"item-{s}-of-{len(shards)}.parquet") for s in range(len(shards))]
    saved = [save_table(shard, "item", LOCAL, path) for shard, path in zip(shards, paths, strict=True)]
    assert saved == [shard.maps["item"].num_keys for shard in shards]
    return paths


@pytest.fixture(scope="module", params=[1, 2, 3])
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save(trained_shards(request.param), tmp_path_factory.mktemp("snapshot"))


@pytest.fixture(scope="module")
def truth() -> Rows:
    return rows_of(trained_shards(1))


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_any_number_of_shards_loads_the_same_rows_and_state_from_the_files_that_overlap(
    paths: list[str], truth: Rows, num_shards: int
) -> None:
    shards, loaded = empty_shards(num_shards), 0
    for rank, shard in enumerate(shards):
        needed = [paths[s] for s in overlapping(rank, num_shards, len(paths))]
        loaded += load_table(shard, "item", LOCAL, needed, rank, num_shards)
    assert loaded == len(IDS) and rows_of(shards) == truth  # bits


@pytest.mark.parametrize("num_shards", [2, 3, 5])
def test_a_file_that_does_not_overlap_holds_no_row_of_the_shard(paths: list[str], num_shards: int) -> None:
    for rank, shard in enumerate(empty_shards(num_shards)):
        others = set(range(len(paths))) - set(overlapping(rank, num_shards, len(paths)))
        assert load_table(shard, "item", LOCAL, [paths[s] for s in others], rank, num_shards) == 0


def test_loaded_ids_are_known_and_keep_learning_like_the_ones_never_saved(paths: list[str]) -> None:
    twin, loaded = trained_shards(1)[0], empty_shards(1)[0]
    load_table(loaded, "item", LOCAL, paths, 0, 1)
    keys, grad = hash64(IDS[:500]), torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    for shard in (twin, loaded):
        shard.reset_counts()
        shard.pools[8].update(shard.rows_of("item", keys, insert=True), grad)
        assert shard.counts["item"].new == 0
    assert rows_of([loaded]) == rows_of([twin])  # the same arithmetic on the same rows: bits


def test_pandas_reads_ids_weights_and_state_as_plain_columns(paths: list[str], truth: Rows) -> None:
    frame = pd.concat([pd.read_parquet(path) for path in paths])
    assert list(frame.columns) == ["id", "weight", "adagrad_sum"]
    assert (frame["id"].dtype, frame["adagrad_sum"].dtype) == (np.int64, np.float32)
    weight = np.stack(frame["weight"].to_list())
    assert weight.shape == (len(IDS), 8) and weight.dtype == np.float32
    found = zip(frame["id"], weight, frame["adagrad_sum"], strict=True)
    assert {int(i): (w.tobytes(), float(s)) for i, w, s in found} == truth


def test_a_file_holds_its_shards_buckets_in_rising_order(paths: list[str]) -> None:
    for shard, path in enumerate(paths):
        buckets = bucket_of(hash64(torch.tensor(pd.read_parquet(path)["id"].to_numpy())))
        assert (buckets.diff() >= 0).all()
        assert first_bucket(shard, len(paths)) <= buckets[0] and buckets[-1] < first_bucket(shard + 1, len(paths))


def test_an_empty_table_is_saved_and_loaded_as_no_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "user.parquet")
    assert save_table(empty_shards(1)[0], "user", LOCAL, path) == 0
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["id", "weight", "adagrad_sum"] and len(frame) == 0
    assert load_table(empty_shards(1)[0], "user", LOCAL, [path], 0, 1) == 0


def test_weights_that_are_not_finite_come_back_as_they_are(tmp_path: Path) -> None:
    shard, loaded, path = empty_shards(1)[0], empty_shards(1)[0], str(tmp_path / "item.parquet")
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -1e-45, 1e-38, 3.4e38, 1.0]])
    shard.add("item", hash64(IDS[:1]), weight, torch.tensor([torch.inf]))
    save_table(shard, "item", LOCAL, path)
    load_table(loaded, "item", LOCAL, [path], 0, 1)
    assert rows_of([loaded]) == {0: (weight.numpy().tobytes(), torch.inf)}


def test_overlapping_files_are_those_that_share_a_bucket() -> None:
    for num_shards, saved_shards in [(n, m) for n in range(1, 9) for m in range(1, 9)]:
        owner = [
            s
            for s in range(saved_shards)
            for _ in range(first_bucket(s, saved_shards), first_bucket(s + 1, saved_shards))
        ]
        assert len(owner) == NUM_BUCKETS
        for rank in range(num_shards):  # plain: the saved owner of every bucket of the shard
            mine = owner[first_bucket(rank, num_shards) : first_bucket(rank + 1, num_shards)]
            assert overlapping(rank, num_shards, saved_shards) == sorted(set(mine))
