"""Rows for serving. The oracle is what the store itself tells of the same ids."""

import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.feather
import pyarrow.fs
import pytest
import torch

from embeddings import rowfile
from embeddings.client import ShardedEmbeddings
from embeddings.jagged import Jagged
from embeddings.optim import Sgd
from embeddings.rowfile import RowFile, write_rows
from embeddings.shard import Shard
from embeddings.table import TableConfig

EXTREMES = [0, -1, 2**63 - 1, -(2**63), 5, -7]


def store(dtype: Literal["float32", "float16"], num_ids: int, **settings: Any) -> tuple[Shard, torch.Tensor]:
    shard = Shard({"item": TableConfig(4, 64, 0.5, dtype=dtype, **settings), "other": TableConfig(4)}, Sgd(0.1))
    shard.begin_day(datetime.date(2026, 11, 20).toordinal())
    ids = torch.cat(
        [torch.tensor(EXTREMES), torch.from_numpy(np.random.default_rng(0).integers(-(2**62), 2**62, num_ids))]
    )
    client = ShardedEmbeddings(shard, {"item": "item", "other": "other"})
    none = Jagged(torch.empty(0, dtype=torch.int64), torch.zeros(len(ids) + 1, dtype=torch.int64))
    client.pull({"item": Jagged(ids, torch.arange(len(ids) + 1)), "other": none}, insert=True)
    return shard, ids


def known(shard: Shard) -> dict[int, np.ndarray]:
    from embeddings.buckets import unhash64

    columns = shard.export("item")
    return dict(zip(unhash64(torch.from_numpy(columns["key"])).tolist(), columns["weight"], strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("chunk", [1 << 18, 7, 1])
def test_every_id_finds_its_row_and_an_unknown_one_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Literal["float32", "float16"], chunk: int
) -> None:
    monkeypatch.setattr(rowfile, "_CHUNK", chunk)
    shard, ids = store(dtype, 40)
    path, filesystem = str(tmp_path / "item.arrow"), pyarrow.fs.LocalFileSystem()
    assert write_rows(shard, "item", filesystem, path) == len(ids)
    found = RowFile(filesystem, path, torch.full((4,), 9.0))
    strangers = torch.tensor([1, -2, 2**63 - 2, -(2**63) + 1, 6, *(ids[:5] + 11)])
    asked = torch.cat([strangers, ids.flip(0), strangers])
    rows_ND, statistics_NS = found.find(asked)
    truth = known(shard)
    for id_, row_D in zip(asked.tolist(), rows_ND, strict=True):
        assert row_D.tolist() == truth.get(id_, np.full(4, 9.0)).tolist()
    assert statistics_NS.shape == (len(asked), 0) and found.num_rows == len(ids)
    assert found.find(ids[:0])[0].shape == (0, 4)


def test_a_table_without_rows_gives_the_default_for_every_id(tmp_path: Path) -> None:
    shard, _ = store("float32", 3)
    path, filesystem = str(tmp_path / "other.arrow"), pyarrow.fs.LocalFileSystem()
    assert write_rows(shard, "other", filesystem, path) == 0
    assert RowFile(filesystem, path).find(torch.tensor([1, 2]))[0].tolist() == [[0.0] * 4] * 2


def test_the_file_is_plain_arrow_sorted_by_id(tmp_path: Path) -> None:
    """pandas and any other Arrow reader see the ids in order."""
    shard, ids = store("float32", 20)
    path = str(tmp_path / "item.arrow")
    write_rows(shard, "item", pyarrow.fs.LocalFileSystem(), path)
    table = pyarrow.feather.read_table(path)
    assert table["id"].to_pylist() == sorted(ids.tolist())
    assert table["row"].to_pylist()[0] == known(shard)[-(2**63)].tolist()
