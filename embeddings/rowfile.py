"""A table's rows for serving: one Arrow file (IPC), sorted by id, that a server maps into memory and searches.

    id: int64   row: fixed_size_list<float | halffloat>[dim]   statistics: fixed_size_list<float>[S], of tables with any

Rows alone: what training needs beside them stays in the snapshots. Shape letters: N ids, U rows, D numbers a row, S
statistics.
"""

import numpy as np
import pyarrow as pa
import pyarrow.fs
import torch
from torch import Tensor

from embeddings.buckets import unhash64
from embeddings.shard import Shard

_CHUNK = 1 << 18


def write_rows(shard: Shard, table: str, filesystem: pyarrow.fs.FileSystem, path: str) -> int:
    """Write a table of a shard that holds all of its rows; returns how many there are. Statistics are of today."""
    pool, half = shard.pool_of(table), shard.tables[table].dtype == "float16"
    rows = pool.ids.rows(shard.number[table])
    ids = unhash64(torch.from_numpy(pool.ids.key_R[rows])).numpy()
    order = np.argsort(ids)
    statistics = len(shard.statistics(table))
    columns = {"id": pa.int64(), "row": pa.list_(pa.float16() if half else pa.float32(), pool.dim)}
    schema = pa.schema(columns | ({"statistics": pa.list_(pa.float32(), statistics)} if statistics else {}))
    with filesystem.open_output_stream(path) as stream, pa.ipc.new_file(stream, schema) as writer:
        for first in range(0, max(order.size, 1), _CHUNK):
            some = order[first : first + _CHUNK]
            found = [pa.array(ids[some]), _lists(pool.lookup(rows[some]).cpu().numpy(), schema.field("row").type)]
            if statistics:
                found.append(_lists(shard.statistics_of(pool, rows[some]), schema.field("statistics").type))
            writer.write_batch(pa.record_batch(found, schema=schema))
    return int(order.size)


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    flat = pa.array(values.astype(kind.value_type.to_pandas_dtype()).reshape(-1), kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)


class RowFile:
    """The rows of a table, read where they lie. default_D: what an id without a row reads; None: zeros."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem, path: str, default_D: Tensor | None = None):
        local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
        source = pa.memory_map(path) if local else filesystem.open_input_file(path)
        reader = pa.ipc.open_file(source)
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ids = [batch["id"].to_numpy() for batch in self._batches]
        self._first = np.array([ids[0] for ids in self._ids if ids.size], np.int64)
        self.dim = reader.schema.field("row").type.list_size
        self._default_D = torch.zeros(self.dim) if default_D is None else default_D
        self.num_statistics = 0
        if "statistics" in reader.schema.names:
            self.num_statistics = reader.schema.field("statistics").type.list_size

    @property
    def num_rows(self) -> int:
        return sum(ids.size for ids in self._ids)

    def find(self, id_N: Tensor) -> tuple[Tensor, Tensor]:
        """Each id's row [N, D] and statistics [N, S], float32."""
        row_ND = self._default_D.repeat(id_N.numel(), 1)
        statistics_NS = torch.zeros(id_N.numel(), self.num_statistics)
        wanted = id_N.numpy()
        batch_N = np.searchsorted(self._first, wanted, side="right") - 1
        for number in np.unique(batch_N[batch_N >= 0]):
            batch, ids = self._batches[number], self._ids[number]
            asked = np.flatnonzero(batch_N == number)
            places = np.searchsorted(ids, wanted[asked])
            there = places < ids.size
            there[there] = ids[places[there]] == wanted[asked][there]
            asked, places = asked[there], places[there]
            row_ND[asked] = _rows(batch["row"], places)
            if self.num_statistics:
                statistics_NS[asked] = _rows(batch["statistics"], places)
        return row_ND, statistics_NS


def _rows(lists: pa.Array, places: np.ndarray) -> Tensor:
    values = lists.flatten().to_numpy().reshape(-1, lists.type.list_size)
    return torch.from_numpy(values[places].astype(np.float32))
