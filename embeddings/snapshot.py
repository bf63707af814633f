"""Rows to and from files: Parquet that pandas, DuckDB and Polars read as they are.

A snapshot is of one instant: Snapshot(shard) takes hold of it between two steps, write() may run in a thread while
training goes on. A base holds all rows, a delta those touched since the snapshot before, and who lost his row since.

    <folder>/<table>/rows-0000-2047.parquet        id, weight, the optimizer's states, count, tallies, last_seen_day
    <folder>/<table>/evicted-0000-2047.parquet     tombstones: id
    <folder>/<table>/waiting-0000-2047.parquet     id, count, last_seen_day of ids that wait for their row
    <folder>/<table>/admitted-0000-2047.parquet    ids that wait no longer: id
    <folder>/<table>/sketch-0000-2047.parquet      a sketch's cells, by bucket
    <folder>/<table>/default-0000-4095.parquet     the trained default row

The numbers are the first and the last bucket: a run with another number of workers opens only the files, and in them
only the row groups, that overlap its own. A chain of layers is read from the newest to the base: what is met first of
an id, alive or evicted, counts.

Shape letters: U rows, D numbers a row.
"""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from embeddings.buckets import NUM_BUCKETS, bucket_of, keys_of, unhash64
from embeddings.dedupe import Int64s
from embeddings.freeze import FrozenRows
from embeddings.idmap import IdMap
from embeddings.pool import Columns, RowPool
from embeddings.pulse import beat
from embeddings.shard import Shard

_ROW_GROUP = 1 << 17
_EPOCH = datetime.date(1970, 1, 1).toordinal()
_TOMBSTONES = {"rows": "evicted", "waiting": "admitted"}  # the kind that says who is no longer among them


@dataclass(frozen=True)
class Part:
    """One file of a layer; path: within the layer's folder. buckets: the first and the end of those it covers."""

    path: str
    table: str
    kind: str
    buckets: tuple[int, int]
    rows: int


class Snapshot:
    """The shard as it is now: all of it (base), or what changed since the snapshot before. Make it between two steps
    and write it once; make the next when this one is written.
    """

    def __init__(self, shard: Shard, *, base: bool):
        self._shard = shard
        self._frozen = [FrozenRows(pool, changed=not base) for pool in shard.pools]
        waiting = shard.waiting.ids
        waiting_rows = np.flatnonzero(waiting.taken()) if base else waiting.changed_rows()
        self._small = [part for name in shard.names for part in _small_parts(shard, name, base, waiting_rows)]
        shard.before_change = self._before_change
        self._changed = [(ids, ids.changed.copy()) for ids in shard.all_ids]
        self._gone = [(keys, list(keys)) for keys in (*shard.evicted.values(), *shard.admitted.values())]
        shard.saved()

    def undo(self) -> None:
        """It was not written whole, or is not kept: what changed before it counts as changed again, and so comes into
        the next one. Call it between two steps, when nothing writes any more.
        """
        for ids, changed in self._changed:
            ids.changed[: changed.size] |= changed
        for keys, gone in self._gone:
            keys.extend(gone)

    def _before_change(self, pool: RowPool, rows: Int64s) -> None:
        self._frozen[self._shard.pools.index(pool)].before_change(rows)

    def write(self, filesystem: pyarrow.fs.FileSystem, folder: str) -> list[Part]:
        """Write this shard's parts into a folder and say which."""
        shard, parts = self._shard, _Parts(filesystem, folder, self._shard.buckets)
        try:
            for frozen in self._frozen:
                for t, columns in frozen.chunks(_ROW_GROUP):
                    parts.add(shard.names[t], "rows", _named(shard, shard.names[t], columns))
            for table, kind, columns in self._small:
                parts.add(table, kind, columns)
        finally:
            shard.before_change = lambda pool, rows: None
            written = parts.close()
        return written


def _small_parts(shard: Shard, table: str, base: bool, waiting_rows: Int64s) -> Iterator[tuple[str, str, Columns]]:
    """What a snapshot copies at once: who waits, tombstones, the sketch, the default row."""
    t, waiting, pool = shard.number[table], shard.waiting.ids, shard.pool_of(table)
    rows = waiting_rows[waiting.table_R[waiting_rows] == t]
    days = np.array(shard.periods.days)[waiting.seen_R[rows]]
    yield table, "waiting", _ids(waiting.key_R[rows]) | {"count": waiting.count_R[rows], "last_seen_day": _date(days)}
    if not base:
        yield table, "evicted", _ids(_gone(shard.evicted[table], t, pool.ids))
        yield table, "admitted", _ids(_gone(shard.admitted[table], t, waiting))
    if table in shard.sketches:
        sketch = shard.sketches[table]
        columns: Columns = {"bucket": np.array(shard.buckets, np.int16)}
        columns |= {"cells": sketch.cells.reshape(len(sketch.cells), -1).copy()}
        yield table, "sketch", columns | {"day": _date(np.full(len(sketch.cells), sketch.day))}
    if shard.tables[table].default_row == "trained" and shard.exchange.rank == 0:
        known = pool.known(pool.default_rows(np.array([t], np.uint8)))
        columns = {name: known[name] for name in ("weight", *pool.optimizer.states, "count")}  # no id, no day
        yield table, "default", {"bucket": np.zeros(1, np.int16)} | columns


def _gone(keys: Sequence[Int64s], table: int, ids: IdMap) -> Int64s:
    """Of the keys that left, those that did not come back."""
    left = np.unique(np.concatenate([np.zeros(0, np.int64), *keys]))
    return left[ids.find(left, np.full(left.size, table, np.uint8)) < 0]


def _named(shard: Shard, table: str, rows: Columns) -> Columns:
    """A table's rows with the names that files give to columns."""
    pool = shard.pool_of(table)
    columns = _ids(rows["key"]) | {"weight": rows["weight"]}
    columns |= {name: rows[name] for name in pool.optimizer.states}
    columns |= {"count": rows["count"]}
    columns |= dict(zip(shard.ledger.columns(shard.number[table]), rows["tally"].T, strict=True))
    return columns | {"last_seen_day": _date(np.array(shard.periods.days)[rows["seen"]])}


def _ids(keys: Int64s) -> Columns:
    return {"id": unhash64(torch.from_numpy(keys)).numpy(), "bucket": bucket_of(keys).astype(np.int16)}


def _date(days: Int64s) -> NDArray[Any]:
    return (days - _EPOCH).astype("datetime64[D]")


class _Parts:
    """Parquet files that are being written, one a table and kind, opened when something comes for them."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem, folder: str, buckets: range):
        self._filesystem, self._folder, self._buckets = filesystem, folder, buckets
        self._writers: dict[tuple[str, str], tuple[str, pq.ParquetWriter]] = {}
        self._rows: dict[tuple[str, str], int] = {}
        self._open = contextlib.ExitStack()  # all of them are closed, also when one of them cannot be

    def add(self, table: str, kind: str, columns: Columns) -> None:
        """Append rows as one row group."""
        content = pa.table({name: _arrow(column) for name, column in columns.items()})
        if content.num_rows == 0:
            return
        if (table, kind) not in self._writers:
            buckets = self._covered(kind)
            path = f"{table}/{kind}-{buckets.start:04d}-{buckets.stop - 1:04d}.parquet"
            self._filesystem.create_dir(f"{self._folder}/{table}", recursive=True)
            stream = self._open.enter_context(self._filesystem.open_output_stream(f"{self._folder}/{path}"))
            writer = pq.ParquetWriter(
                stream,
                content.schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=["bucket", "last_seen_day"],
                write_statistics=["bucket"],
            )
            self._open.callback(writer.close)
            self._writers[table, kind], self._rows[table, kind] = (path, writer), 0
        self._writers[table, kind][1].write_table(content)
        self._rows[table, kind] += content.num_rows
        beat()

    def close(self) -> list[Part]:
        self._open.close()
        found = [(path, key, self._covered(key[1])) for key, (path, _) in self._writers.items()]
        return [Part(path, *key, (buckets.start, buckets.stop), self._rows[key]) for path, key, buckets in found]

    def _covered(self, kind: str) -> range:
        """A default row is every worker's."""
        return range(NUM_BUCKETS) if kind == "default" else self._buckets


def _arrow(column: NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(column).reshape(-1))
    return flat if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


@dataclass(frozen=True)
class Layer:
    """A snapshot on disk: its folder and its parts."""

    folder: str
    parts: Sequence[Part]

    def overlapping(self, buckets: range) -> list[Part]:
        """The parts that cover some of the buckets."""
        return [p for p in self.parts if p.buckets[0] < buckets.stop and p.buckets[1] > buckets.start]

    def paths(self, table: str, kind: str, buckets: range) -> list[str]:
        """The files of a kind that cover some of the buckets."""
        wanted = [part for part in self.overlapping(buckets) if (part.table, part.kind) == (table, kind)]
        return [f"{self.folder}/{part.path}" for part in wanted]


def load(shard: Shard, filesystem: pyarrow.fs.FileSystem, layers: Sequence[Layer]) -> None:
    """Fill a fresh shard from a base and the deltas after it, written by any number of workers. A table that they do
    not know stays empty. Shard.fit comes after it.
    """
    for t, table in enumerate(shard.names):
        for columns in read(filesystem, layers, table, "rows", shard.buckets):
            none = np.zeros(columns["id"].size, np.float32)
            tallies = [columns.get(name, none) for name in shard.ledger.columns(t)]
            columns["tally"] = np.stack(tallies, axis=1)
            columns["seen"] = shard.periods.past(_days(columns["last_seen_day"]))
            shard.put(table, columns["key"], columns)
        waiting = shard.waiting.ids
        for columns in read(filesystem, layers, table, "waiting", shard.buckets):
            rows = waiting.insert(columns["key"], np.full(columns["key"].size, t, np.uint8))
            waiting.count_R[rows] = columns["count"]
            waiting.seen_R[rows] = shard.periods.past(_days(columns["last_seen_day"]))
        for columns in _newest(filesystem, layers, table, "sketch", shard.buckets) if table in shard.sketches else ():
            sketch = shard.sketches[table]
            if columns["cells"].shape[1] == sketch.cells[0].size:  # a sketch of another size starts anew
                cells = columns["cells"].reshape(-1, *sketch.cells.shape[1:])
                sketch.cells[columns["bucket"] - shard.buckets.start] = cells
                sketch.day = int(_days(columns["day"])[0])
        for columns in _newest(filesystem, layers, table, "default", range(NUM_BUCKETS)):
            shard.put_default(table, columns)
    shard.ledger.begin(shard.periods)  # which has the days of the rows now


def compact(
    filesystem: pyarrow.fs.FileSystem, layers: Sequence[Layer], folder: str, buckets: range = range(NUM_BUCKETS)
) -> list[Part]:
    """Fold a base and the deltas after it into one new base for some buckets, a piece at a time; the layers stay."""
    parts = _Parts(filesystem, folder, buckets)
    for table, kind in sorted({(part.table, part.kind) for layer in layers for part in layer.parts}):
        if kind in _TOMBSTONES:
            rows = sum(
                part.rows for layer in layers for part in layer.parts if (part.table, part.kind) == (table, kind)
            )
            step, none = max(1, NUM_BUCKETS * _ROW_GROUP // max(rows, 1)), _no_rows(filesystem, layers, table, kind)
            for first in range(buckets.start, buckets.stop, step):
                piece = range(first, min(first + step, buckets.stop))
                found = list(read(filesystem, layers, table, kind, piece))
                if found:
                    order = np.argsort(np.concatenate([columns["key"] for columns in found]))
                    columns = {name: np.concatenate([_column(of, name, none) for of in found]) for name in none}
                    parts.add(table, kind, {name: column[order] for name, column in columns.items()})
        elif kind not in _TOMBSTONES.values():
            whole = buckets if kind == "sketch" else range(NUM_BUCKETS if buckets.start == 0 else 0)
            for columns in _newest(filesystem, layers, table, kind, whole):
                columns.pop("key", None)
                parts.add(table, kind, columns)
    return parts.close()


def _no_rows(filesystem: pyarrow.fs.FileSystem, layers: Sequence[Layer], table: str, kind: str) -> Columns:
    """The columns of all layers, empty: an optimizer or a tally may have come in between."""
    none: Columns = {}
    for path in (path for layer in layers for path in layer.paths(table, kind, range(NUM_BUCKETS))):
        with filesystem.open_input_file(path) as stream:
            content = pq.ParquetFile(stream).schema_arrow.empty_table()
        none |= {name: _numpy(content[name].combine_chunks()) for name in content.column_names}
    return none


def _column(columns: Columns, name: str, none: Columns) -> NDArray[Any]:
    """A column, or zeros where it was not known yet: it starts anew."""
    zeros = np.zeros((columns["key"].size, *none[name].shape[1:]), none[name].dtype)
    return columns.get(name, zeros)


def read(
    filesystem: pyarrow.fs.FileSystem, layers: Sequence[Layer], table: str, kind: str, buckets: range
) -> Iterator[Columns]:
    """The rows (or who waits) of some buckets as the newest layer leaves them, each id once, in pieces; `key` is added
    to a file's columns.
    """
    settled = IdMap(1024)  # the ids of which a newer layer told
    for layer in reversed(layers):
        told = []
        for columns in _groups(filesystem, layer.paths(table, kind, buckets), buckets):
            new = settled.find(columns["key"], np.zeros(columns["key"].size, np.uint8)) < 0
            told.append(columns["key"][new])
            yield {name: column[new] for name, column in columns.items()}
        for columns in _groups(filesystem, layer.paths(table, _TOMBSTONES[kind], buckets), buckets):
            told.append(columns["key"])
        if layer is not layers[0]:
            keys = np.unique(np.concatenate([np.zeros(0, np.int64), *told]))
            keys = keys[settled.find(keys, np.zeros(keys.size, np.uint8)) < 0]
            settled.insert(keys, np.zeros(keys.size, np.uint8))


def _newest(
    filesystem: pyarrow.fs.FileSystem, layers: Sequence[Layer], table: str, kind: str, buckets: range
) -> Iterator[Columns]:
    """What the newest layer has of a kind that every layer holds whole."""
    return _groups(filesystem, layers[-1].paths(table, kind, buckets) if layers else [], buckets)


def _groups(filesystem: pyarrow.fs.FileSystem, paths: Sequence[str], buckets: range) -> Iterator[Columns]:
    """The rows of files that lie in the buckets; row groups that have none of them are not read."""
    for path in paths:
        with filesystem.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            names = file.schema_arrow.names
            for group in range(file.metadata.num_row_groups):
                of_bucket = file.metadata.row_group(group).column(names.index("bucket")).statistics
                if of_bucket.min < buckets.stop and of_bucket.max >= buckets.start:
                    content = file.read_row_group(group, use_threads=False)
                    beat()
                    columns = {name: _numpy(content[name].combine_chunks()) for name in names}
                    mine = (columns["bucket"] >= buckets.start) & (columns["bucket"] < buckets.stop)
                    if not mine.all():
                        columns = {name: column[mine] for name, column in columns.items()}
                    yield columns | ({"key": keys_of(columns["id"])} if "id" in columns else {})


def _numpy(array: pa.Array) -> NDArray[Any]:
    if pa.types.is_fixed_size_list(array.type):
        return np.array(array.flatten().to_numpy()).reshape(len(array), array.type.list_size)
    return np.array(array.to_numpy(zero_copy_only=False))


def _days(dates: NDArray[Any]) -> Int64s:
    return dates.astype("datetime64[D]").astype(np.int64) + _EPOCH
