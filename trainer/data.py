"""The logs: days of Parquet in, batches of tensors out.

    <path>/day=2026-11-20/*.parquet -> row groups, shuffled -> lanes -> a worker's share of every global batch

A day's rows, its row groups in shuffled order, are one long line, cut into `lanes` equal segments that are read side by
side. Every global batch takes an equal slice of every lane; a worker reads a contiguous run of lanes. So the global
batches are the same for any number of workers, all workers make the same number of steps, files may have fewer row
groups than there are workers, and a row group is decoded twice only where two workers' lanes meet. What it costs: a
worker holds one decoded row group a lane (fewer when lanes share one).

Shape letters: B rows, K numbers, T tasks.
"""

import datetime
import hashlib
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
import torch
from torch import Tensor

from embeddings.jagged import Jagged
from trainer.errors import UserError

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_REEXPORT = "re-export the day, or correct the configuration"


@dataclass(frozen=True)
class Schema:
    """Which columns are read, and as what.

    ids, numbers: feature -> column. max_len: feature -> how many of a list's last ids count. log1p: numbers that are
    transformed so. labels: task -> column. binary: the tasks whose label is 0 or 1. above: the tasks whose label must
    be greater than a bound. weight, group: columns, or None. keys: columns handed through.
    """

    ids: Mapping[str, str]
    numbers: Mapping[str, str]
    labels: Mapping[str, str]
    max_len: Mapping[str, int] = field(default_factory=dict)
    log1p: frozenset[str] = frozenset()
    binary: frozenset[str] = frozenset()
    above: Mapping[str, float] = field(default_factory=dict)
    weight: str | None = None
    group: str | None = None
    keys: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        wanted = [*self.ids.values(), *self.numbers.values(), *self.labels.values(), *self.keys]
        return list(dict.fromkeys([*wanted, *(c for c in (self.weight, self.group) if c)]))


@dataclass
class Batch:
    """Rows of a day. A null number is NaN, a null label is NaN, a null id is an empty list.

    row_B: each row's place in its day, the same for any number of workers: what is random about a row is drawn from it.
    groups_B: the hashed group column. keys: the key columns as an Arrow table, when asked for.
    """

    ids: dict[str, Jagged]
    numbers_BK: Tensor
    labels_BT: Tensor
    weights_B: Tensor
    row_B: Tensor
    groups_B: Tensor | None = None
    keys: Any = None

    @property
    def num_rows(self) -> int:
        return self.row_B.numel()

    def select(self, rows: Tensor) -> "Batch":
        """The given rows, in their order."""
        return Batch(
            {name: ids.select(rows) for name, ids in self.ids.items()},
            **{f.name: _select(getattr(self, f.name), rows) for f in fields(self) if f.name != "ids"},
        )

    def to(self, device: torch.device) -> "Batch":
        """The same rows with every tensor on the device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ids"}
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in moved.items()}
        return Batch({name: ids.to(device) for name, ids in self.ids.items()}, **moved)

    @staticmethod
    def cat(parts: Sequence["Batch"]) -> "Batch":
        """The rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        return Batch(
            {name: Jagged.cat([part.ids[name] for part in parts]) for name in parts[0].ids},
            **{f.name: _cat([getattr(part, f.name) for part in parts]) for f in fields(Batch) if f.name != "ids"},
        )


def _select(value: Any, rows: Tensor) -> Any:
    if value is None:
        return None
    return value[rows] if isinstance(value, Tensor) else value.take(pa.array(rows.numpy()))


def _cat(values: list[Any]) -> Any:
    if values[0] is None:
        return None
    return torch.cat(values) if isinstance(values[0], Tensor) else pa.concat_tables(values)


@dataclass(frozen=True)
class RowGroup:
    path: str
    index: int
    num_rows: int
    first_row: int  # place of its first row in the day


@dataclass(frozen=True)
class DayPlan:
    """A day's row groups, in the order of their files. All footers were read and all columns checked."""

    day: datetime.date
    row_groups: tuple[RowGroup, ...]

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.row_groups)

    def num_steps(self, batch_size: int) -> int:
        return -(-self.num_rows // batch_size)


def open_filesystem(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A local path, or the URI of any filesystem that pyarrow knows (s3://, gs://, hdfs://, file://)."""
    try:
        if "://" in path:
            return pyarrow.fs.FileSystem.from_uri(path)
        return pyarrow.fs.LocalFileSystem(), path.rstrip("/")
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            "cannot open the filesystem", path, got=str(error), do="check the address and the credentials"
        ) from None


def list_folder(filesystem: pyarrow.fs.FileSystem, path: str, *, recursive: bool = False) -> list[pyarrow.fs.FileInfo]:
    """What lies in a folder; nothing when it is not there."""
    try:
        return list(filesystem.get_file_info(pyarrow.fs.FileSelector(path, True, recursive)))
    except (pa.ArrowException, OSError) as error:
        do = "check the path, the rights to read it and the network"
        raise UserError("a folder cannot be listed", path, got=_first_line(error), do=do) from None


class Logs:
    """The days below one path, hive-partitioned by day."""

    def __init__(self, path: str, day_column: str, schema: Schema):
        self.path, self.schema, self._prefix = path, schema, f"{day_column}="
        self.filesystem, self._root = open_filesystem(path)

    def days(self) -> list[datetime.date]:
        """The days that are there, in order."""
        found = list_folder(self.filesystem, self._root)
        folders = [info.base_name for info in found if info.type == pyarrow.fs.FileType.Directory]
        names = sorted(name.removeprefix(self._prefix) for name in folders if name.startswith(self._prefix))
        if not names:
            got = f"{len(folders)} folders of other names" if folders else "no folders"
            expected, do = f"folders such as {self._prefix}2026-11-20", "correct data.path or data.day_column"
            raise UserError("no days found", self.path, got=got, expected=expected, do=do)
        return [parse_day(name, f"{self.path}/{self._prefix}{name}") for name in names]

    def plan(self, day: datetime.date) -> DayPlan:
        """Read the footers of a day's files and check their columns."""
        folder = f"{self._root}/{self._prefix}{day}"
        files = [i for i in list_folder(self.filesystem, folder, recursive=True) if i.type == pyarrow.fs.FileType.File]
        paths = sorted(file.path for file in files if _is_data(file.path.removeprefix(folder)))
        groups: list[RowGroup] = []
        num_rows = 0
        keys: dict[str, pa.DataType] = {}
        for path in paths:
            parquet = self._open(path)
            self._check(parquet.schema_arrow, path)
            self._check_keys(parquet.schema_arrow, path, keys)
            for index in range(parquet.metadata.num_row_groups):
                rows = parquet.metadata.row_group(index).num_rows
                if rows:
                    groups.append(RowGroup(path, index, rows, num_rows))
                num_rows += rows
        if not num_rows:
            got = f"{len(paths)} Parquet files without a row" if paths else "no Parquet files"
            do = "deliver the day, or remove its folder and ask for another day"
            raise UserError(f"day {day} is empty", folder, got=got, expected="at least one row", do=do)
        return DayPlan(day, tuple(groups))

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path, filesystem=self.filesystem)
        except (pa.ArrowException, OSError) as error:
            got, do = _first_line(error), "deliver the file again, or remove it"
            raise UserError("not a readable Parquet file", path, got=got, do=do) from None

    def _check(self, found: pa.Schema, path: str) -> None:
        schema = self.schema
        wants = [
            (f"feature '{n}'", c, (_is_id if n not in schema.max_len else _is_id_list)) for n, c in schema.ids.items()
        ]
        wants += [(f"feature '{n}'", c, _is_number) for n, c in schema.numbers.items()]
        wants += [(f"task '{n}'", c, _is_number) for n, c in schema.labels.items()]
        wants += [("data.weight", schema.weight, _is_number)] if schema.weight else []
        wants += [("data.group", schema.group, _is_id)] if schema.group else []
        wants += [("data.keys", c, lambda kind: True) for c in schema.keys]
        for user, column, fits in wants:
            if column not in found.names:
                got = f"columns {', '.join(found.names)}"
                raise UserError(f"column '{column}' of {user} is missing", path, got=got, do=_REEXPORT)
            kind = found.field(column).type
            if not fits(kind):
                what, expected = f"column '{column}' of {user} has the wrong type", fits.__doc__ or ""
                raise UserError(what, path, got=str(kind), expected=expected, do=_REEXPORT)

    def _check_keys(self, found: pa.Schema, path: str, kinds: dict[str, pa.DataType]) -> None:
        """Key columns are handed through as they are, so their types must be those of the day's first file, kept in
        kinds.
        """
        for column in self.schema.keys:
            kind = found.field(column).type
            expected = kinds.setdefault(column, kind)
            if kind != expected:
                what = f"column '{column}' of data.keys has another type than in the day's first file"
                raise UserError(what, path, got=str(kind), expected=str(expected), do=_REEXPORT)

    def decode(self, group: RowGroup) -> Batch:
        """One row group as tensors, every value checked."""
        schema = self.schema
        try:
            table = self._open(group.path).read_row_group(group.index, columns=schema.columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            got, do = _first_line(error), "deliver the file again, or remove it"
            raise UserError(
                "a row group cannot be read", f"{group.path}, row group {group.index}", got=got, do=do
            ) from None
        lists = {schema.ids[name] for name in schema.max_len}
        column = {name: _typed(table[name].combine_chunks(), name in lists) for name in table.column_names}
        where = f"{group.path}, row group {group.index}"
        labels = [
            _label(column[c], f"{where}, column '{c}'", task in schema.binary, schema.above.get(task))
            for task, c in schema.labels.items()
        ]
        numbers = [
            _number(column[c], f"{where}, column '{c}'", name in schema.log1p) for name, c in schema.numbers.items()
        ]
        return Batch(
            {name: _ids(column[c], schema.max_len.get(name)) for name, c in schema.ids.items()},
            torch.stack(numbers, 1) if numbers else torch.empty(group.num_rows, 0),
            torch.stack(labels, 1) if labels else torch.empty(group.num_rows, 0),
            _weight(column[schema.weight], f"{where}, column '{schema.weight}'")
            if schema.weight
            else torch.ones(group.num_rows),
            torch.arange(group.first_row, group.first_row + group.num_rows),
            _group(column[schema.group], f"{where}, column '{schema.group}'") if schema.group else None,
            table.select(schema.keys) if schema.keys else None,
        )

    def read(
        self,
        plan: DayPlan,
        *,
        batch_size: int,
        lanes: int,
        rank: int = 0,
        num_workers: int = 1,
        seed: int | None = None,
        start_step: int = 0,
    ) -> Iterator[Batch]:
        """This worker's share of each global batch, decoded ahead in a thread. seed None: rows stay in order, lane by
        lane.

        start_step: where to resume; the batches from there on are those of an undisturbed read.
        """
        mine = range(rank * lanes // num_workers, (rank + 1) * lanes // num_workers)
        steps = plan.num_steps(batch_size)
        return prefetch(
            self._batches(plan, [_Lane(plan, lane, lanes, seed) for lane in mine], steps, start_step), depth=4
        )

    def _batches(self, plan: DayPlan, lanes: list["_Lane"], steps: int, start_step: int) -> Iterator[Batch]:
        for lane in lanes:
            lane.take(lane.num_rows * start_step // steps)
        rows_left: dict[RowGroup, int] = {}
        for lane in lanes:
            for piece in lane.pieces_left():
                rows_left[piece[0]] = rows_left.get(piece[0], 0) + piece[1]
        decoded: dict[RowGroup, Batch] = {}
        for step in range(start_step, steps):
            wanted: dict[RowGroup, list[np.ndarray]] = {}
            for lane in lanes:
                for group, rows in lane.take(lane.num_rows * (step + 1) // steps - lane.num_rows * step // steps):
                    wanted.setdefault(group, []).append(rows)
            parts = []
            for group, rows_of_lanes in wanted.items():
                if group not in decoded:
                    decoded[group] = self.decode(group)
                rows = np.concatenate(rows_of_lanes)
                parts.append(decoded[group].select(torch.from_numpy(rows)))
                rows_left[group] -= rows.size
                if not rows_left[group]:
                    del decoded[group]
            yield Batch.cat(parts) if parts else self._empty()

    def _empty(self) -> Batch:
        schema = self.schema
        none = torch.empty(0, dtype=torch.int64)
        return Batch(
            {name: Jagged(none, torch.zeros(1, dtype=torch.int64)) for name in schema.ids},
            torch.empty(0, len(schema.numbers)),
            torch.empty(0, len(schema.labels)),
            torch.empty(0),
            none,
            none if schema.group else None,
        )


class _Lane:
    """One of the equal segments of a day's line of rows, taken from its beginning.

    Rows are shuffled within each piece (the part of a row group that lies in this lane), the row groups by all lanes
    alike.
    """

    def __init__(self, plan: DayPlan, lane: int, lanes: int, seed: int | None):
        self._seed = None if seed is None else (seed, plan.day.toordinal())
        order: Iterable[int] = range(len(plan.row_groups))
        if self._seed is not None:
            order = np.random.default_rng(self._seed).permutation(len(plan.row_groups))
        first, end = plan.num_rows * lane // lanes, plan.num_rows * (lane + 1) // lanes
        self.num_rows, self._taken, self._lane = end - first, 0, lane
        self._pieces: list[tuple[RowGroup, int, int]] = []
        start = 0
        for group in (plan.row_groups[i] for i in order):
            a, b = max(first - start, 0), min(end - start, group.num_rows)
            if a < b:
                self._pieces.append((group, a, b))
            start += group.num_rows
        self._pieces.reverse()  # taken from the end
        self._rows: np.ndarray | None = None

    def pieces_left(self) -> list[tuple[RowGroup, int]]:
        """The row groups still to be read here and how many of their rows."""
        left = [(group, b - a) for group, a, b in self._pieces]
        if self._rows is not None:
            left[-1] = (left[-1][0], self._rows.size)
        return left

    def take(self, count: int) -> list[tuple[RowGroup, np.ndarray]]:
        """The next rows of the lane: row groups, and rows within them."""
        taken = []
        while count:
            group, a, b = self._pieces[-1]
            if self._rows is None:
                self._rows = self._shuffled(group, a, b)
            rows, self._rows = self._rows[:count], self._rows[count:]
            taken.append((group, rows))
            count -= rows.size
            if not self._rows.size:
                self._pieces.pop()
                self._rows = None
        return taken

    def _shuffled(self, group: RowGroup, a: int, b: int) -> np.ndarray:
        rows = np.arange(a, b)
        if self._seed is not None:
            rows = np.random.default_rng((*self._seed, self._lane, group.first_row)).permutation(rows)
        return rows


def prefetch(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Run an iterator ahead in a thread, at most depth items; its exception is raised here, and leaving early stops
    the thread.
    """
    items: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(end)
        except BaseException as error:  # noqa: BLE001 - handed over to the reader
            put(error)

    threading.Thread(target=run, name="read-ahead", daemon=True).start()
    try:
        while (item := items.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()


def parse_day(name: str, where: str) -> datetime.date:
    """The day of a folder's name."""
    try:
        return datetime.date.fromisoformat(name)
    except ValueError:
        raise UserError("not a day", where, got=name, expected="YYYY-MM-DD", do="rename or remove the folder") from None


def _is_data(name: str) -> bool:
    return name.endswith(".parquet") and not any(part.startswith((".", "_")) for part in name.split("/"))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _is_id(kind: pa.DataType) -> bool:
    """an integer or a string"""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_null(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


def _is_id_list(kind: pa.DataType) -> bool:
    """a list of integers or strings"""
    return pa.types.is_null(kind) or (
        (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_id(kind.value_type)
    )


def _is_number(kind: pa.DataType) -> bool:
    """an integer, a float or a boolean"""
    known = (pa.types.is_null, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(is_(kind) for is_ in known)


def _typed(array: pa.Array, is_list: bool) -> pa.Array:
    """A file in which a column has no value at all may have left its type open: then it is a column of nulls."""
    if not pa.types.is_null(array.type):
        return array
    return array.cast(pa.list_(pa.int64()) if is_list else pa.int64())


def _ids(array: pa.Array, max_len: int | None) -> Jagged:
    """max_len None: one id a row, none where null. Else lists of which the last max_len ids count; null ids within
    them are left out.
    """
    if max_len is None:
        present = torch.from_numpy(array.is_valid().to_numpy(zero_copy_only=False).astype(np.int64))
        return Jagged.from_lengths(_hash_ids(array.drop_null()), present)
    lengths = torch.from_numpy(
        pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    values = array.flatten()
    everything = Jagged.from_lengths(torch.arange(len(values)), lengths)
    from_end = everything.offsets[1:].repeat_interleave(lengths) - everything.values_N
    kept = (from_end <= max_len) & torch.from_numpy(values.is_valid().to_numpy(zero_copy_only=False).copy())
    kept_before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
    return Jagged(_hash_ids(values.filter(pa.array(kept.numpy()))), kept_before[everything.offsets])


def _group(array: pa.Array, where: str) -> Tensor:
    if array.null_count:
        row = int(array.is_valid().to_numpy(zero_copy_only=False).argmin())
        got, expected = f"null in {array.null_count} rows", "a group for every row"
        raise UserError("not a group", f"{where}, row {row}", got=got, expected=expected, do=_REEXPORT)
    return _hash_ids(array)


def _hash_ids(array: pa.Array) -> Tensor:
    """Ids as int64: integers keep their 64 bits; a string becomes the first 8 bytes (little-endian) of the
    BLAKE2b-64 hash of its UTF-8.
    """
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_integer(array.type):
        values = np.array(array.to_numpy(zero_copy_only=False))
        return torch.from_numpy(values.view(np.int64) if values.dtype == np.uint64 else values.astype(np.int64))
    encoded = array.dictionary_encode()
    digests = b"".join(
        hashlib.blake2b(text.encode(), digest_size=8).digest() for text in encoded.dictionary.to_pylist()
    )
    hashed = np.frombuffer(digests, dtype="<i8").astype(np.int64)
    return torch.from_numpy(hashed[encoded.indices.to_numpy(zero_copy_only=False)])


def _floats(array: pa.Array, where: str) -> np.ndarray:
    """float64 with NaN for null; a NaN, an infinity or what float32 would make one is an error."""
    values = np.array(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    bad = ~(np.abs(values) <= _FLOAT32_MAX) & array.is_valid().to_numpy(zero_copy_only=False)
    _refuse(
        bad, values, where, "not a finite number", "finite numbers (of float32's range), or null where there is none"
    )
    return values


def _refuse(bad: np.ndarray, values: np.ndarray, where: str, what: str, expected: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        got = f"{values[row]}" + (f", the first of {int(bad.sum())} such rows" if bad.sum() > 1 else "")
        raise UserError(what, f"{where}, row {row}", got=got, expected=expected, do=_REEXPORT)


def _number(array: pa.Array, where: str, log1p: bool) -> Tensor:
    values = _floats(array, where)
    if log1p:
        _refuse(values <= -1, values, where, "log1p is not defined here", "numbers above -1")
        values = np.log1p(values)
    return torch.from_numpy(values.astype(np.float32))


def _label(array: pa.Array, where: str, binary: bool, above: float | None) -> Tensor:
    values = _floats(array, where)
    if binary:
        bad = ~np.isin(values, (0, 1)) & ~np.isnan(values)
        _refuse(bad, values, where, "not the label of a task with loss: bce", "0, 1 or null")
    if above is not None:
        _refuse(
            values <= above, values, where, "transform: log1p is not defined here", f"labels above {above:g}, or null"
        )
    return torch.from_numpy(values.astype(np.float32))


def _weight(array: pa.Array, where: str) -> Tensor:
    values = _floats(array, where)
    _refuse(~(values >= 0), values, where, "not a sample weight", "numbers from 0 up, none of them null")
    return torch.from_numpy(values.astype(np.float32))
