"""Rows to and from files: Parquet that pandas, DuckDB and Polars read as they are.

One file a table and shard: columns id (int64), weight (list of dim floats), and the optimizer's state under its name,
sorted by bucket. A file covers the buckets of the shard that wrote it, so a run with another number of workers opens
only the files that overlap its own.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
import torch

from embeddings.buckets import bucket_of, first_bucket, hash64, unhash64
from embeddings.shard import Shard


def save_table(shard: Shard, table: str, filesystem: pyarrow.fs.FileSystem, path: str) -> int:
    """Write the shard's rows of one table; returns how many."""
    keys_U, weight_UD, state_U = shard.export(table)
    dim = shard.tables[table].dim
    columns = {
        "id": pa.array(unhash64(keys_U).cpu().numpy()),
        "weight": pa.FixedSizeListArray.from_arrays(pa.array(weight_UD.cpu().numpy().reshape(-1)), dim),
        shard.pools[dim].optimizer.state_name: pa.array(state_U.cpu().numpy()),
    }
    pq.write_table(pa.table(columns), path, filesystem=filesystem, compression="zstd", compression_level=1)
    return keys_U.numel()


def load_table(
    shard: Shard, table: str, filesystem: pyarrow.fs.FileSystem, paths: Iterable[str], rank: int, num_shards: int
) -> int:
    """Read the rows of this shard's buckets from a table's files; returns how many."""
    dim = shard.tables[table].dim
    state_name = shard.pools[dim].optimizer.state_name
    loaded = 0
    for path in paths:
        rows = pq.read_table(path, filesystem=filesystem, columns=["id", "weight", state_name])
        keys = hash64(_tensor(rows["id"]))
        bucket = bucket_of(keys)
        mine = (bucket >= first_bucket(rank, num_shards)) & (bucket < first_bucket(rank + 1, num_shards))
        weight = _tensor(pc.list_flatten(rows["weight"])).view(-1, dim)
        shard.add(table, keys[mine], weight[mine], _tensor(rows[state_name])[mine])
        loaded += int(mine.sum())
    return loaded


def overlapping(rank: int, num_shards: int, saved_shards: int) -> list[int]:
    """The saved shards whose buckets this shard needs."""
    first, end = first_bucket(rank, num_shards), first_bucket(rank + 1, num_shards)
    return [
        s
        for s in range(saved_shards)
        if first_bucket(s, saved_shards) < end and first_bucket(s + 1, saved_shards) > first
    ]


def _tensor(column: pa.ChunkedArray) -> torch.Tensor:
    return torch.from_numpy(np.array(column.to_numpy()))
