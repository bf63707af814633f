"""The logs: days of Parquet in, batches of tensors out.

    <path>/day=2026-11-20/*.parquet -> row groups -> columns, checked -> a worker's share of every global batch

Which rows come when is told in lanes.py; here, what becomes of them. A value that means nothing is an error that names
its file, row group, column and row.

Shape letters: B rows, K numbers, T tasks.
"""

import datetime
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.buckets import hash64
from embeddings.jagged import Jagged
from embeddings.pulse import beat
from trainer.errors import UserError
from trainer.expressions import Expression, Values, parse
from trainer.intervals import Interval
from trainer.lanes import (
    DayPlan,
    Edges,
    Lane,
    RowGroup,
    between_rows,
    between_runs,
    open_lanes,
    prefetch,
)
from trainer.storage import first_line, list_folder, open_filesystem, without_credentials

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_REEXPORT = "re-export the day, or correct the configuration"


class Allowed(NamedTuple):
    """What labels may be: holds(values) -> bool, for values that are known. who: who asks for it."""

    who: str
    expected: str
    holds: Callable[[Values], NDArray[np.bool_]]


@dataclass(frozen=True)
class Schema:
    """Which columns are read, and as what.

    ids, numbers: feature -> column. max_len: feature -> how many of a list's last ids count. log1p: numbers that are
    transformed so. labels: task -> expression, most often a column. weights: task -> expression, for tasks that weigh
    rows in their own way. allowed: task -> what its label may be, checked in this order. weight, group: columns, or
    None. user: likewise; may be null. keys: columns handed through. aligned: features whose lists are read side by
    side, so that they are equally long on every row and of one max_len.
    """

    ids: Mapping[str, str]
    numbers: Mapping[str, str]
    labels: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    max_len: Mapping[str, int] = field(default_factory=dict)
    log1p: frozenset[str] = frozenset()
    allowed: Mapping[str, Sequence[Allowed]] = field(default_factory=dict)
    weight: str | None = None
    group: str | None = None
    user: str | None = None
    keys: tuple[str, ...] = ()
    aligned: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        assert self.weights.keys() <= self.labels.keys(), "only a task has weights"
        for features in self.aligned:
            assert len({self.max_len[name] for name in features}) == 1, "lists side by side need one max_len"

    @cached_property
    def label_of(self) -> dict[str, Expression]:
        """Each task's label."""
        return {task: parse(text, f"the label of task '{task}'") for task, text in self.labels.items()}

    @cached_property
    def weight_of(self) -> dict[str, Expression]:
        """The weights of the tasks that have their own."""
        return {task: parse(text, f"the weight of task '{task}'") for task, text in self.weights.items()}

    @property
    def columns(self) -> list[str]:
        wanted = [*self.ids.values(), *self.numbers.values(), *self.keys]
        for expression in (*self.label_of.values(), *self.weight_of.values()):
            wanted += expression.columns
        return list(dict.fromkeys([*wanted, *(c for c in (self.weight, self.group, self.user) if c)]))


@dataclass
class Batch:
    """Rows of a day. A null number is NaN, a null label is NaN, a null id is an empty list.

    weights_BT: the row's weight times the task's own, in the order of the labels.
    row_B: each row's place in its day, the same for any number of workers: what is random about a row is drawn from it.
    groups_B: the hashed group column. users_B: whose row it is, hashed; somebody of its own where nobody is named.
    lane_B: the lane from which each row was read; a lane's rows stand in its order.
    keys: the key columns as an Arrow table, when asked for.
    """

    ids: dict[str, Jagged]
    numbers_BK: Tensor
    labels_BT: Tensor
    weights_BT: Tensor
    row_B: Tensor
    groups_B: Tensor | None = None
    users_B: Tensor | None = None
    lane_B: Tensor | None = None
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


class Logs:
    """The days below one path, hive-partitioned by day."""

    def __init__(self, path: str, day_column: str, schema: Schema):
        self.path, self.schema, self._prefix = without_credentials(path), schema, f"{day_column}="
        self.filesystem, self._root = open_filesystem(path)

    def intervals(self) -> list[Interval]:
        """The intervals that are there, in order."""
        found = list_folder(self.filesystem, self._root)
        folders = [info.base_name for info in found if info.type == pyarrow.fs.FileType.Directory]
        names = sorted(name.removeprefix(self._prefix) for name in folders if name.startswith(self._prefix))
        if not names:
            got = f"{len(folders)} folders of other names" if folders else "no folders"
            expected, do = f"folders such as {self._prefix}2026-11-20", "correct data.path or data.day_column"
            raise UserError("no days found", self.path, got=got, expected=expected, do=do)
        return [Interval(parse_day(name, f"{self.path}/{self._prefix}{name}")) for name in names]

    def plan(self, interval: Interval) -> DayPlan:
        """Read the footers of an interval's files and check their columns."""
        folder = f"{self._root}/{self._prefix}{interval.day}"
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
            raise UserError(f"{interval.words} is empty", folder, got=got, expected="at least one row", do=do)
        return DayPlan(interval, tuple(groups))

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path, filesystem=self.filesystem)
        except (pa.ArrowException, OSError) as error:
            got, do = first_line(error), "deliver the file again, or remove it"
            raise UserError("not a readable Parquet file", path, got=got, do=do) from None

    def _check(self, found: pa.Schema, path: str) -> None:
        schema = self.schema
        wants = [
            (f"feature '{n}'", c, (_is_id if n not in schema.max_len else _is_id_list)) for n, c in schema.ids.items()
        ]
        wants += [(f"feature '{n}'", c, _is_number) for n, c in schema.numbers.items()]
        wants += [(f"task '{n}'", c, _is_number) for n, label in schema.label_of.items() for c in label.columns]
        wants += [(f"the weight of task '{n}'", c, _is_number) for n, w in schema.weight_of.items() for c in w.columns]
        wants += [("data.weight", schema.weight, _is_number)] if schema.weight else []
        wants += [("data.group", schema.group, _is_id)] if schema.group else []
        wants += [("data.user", schema.user, _is_id)] if schema.user else []
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
        return decode(self.schema, self._table(group, self.schema.columns), group.where, group.first_row)

    def groups(self, group: RowGroup) -> Tensor | None:
        """The hashed group column of one row group, and nothing else of it."""
        wanted = [self.schema.group] if self.schema.group else []
        return _Columns(self.schema, self._table(group, wanted), group.where).groups()

    def cut_groups(self, plan: DayPlan) -> int:
        """How often a list goes on in the day's next row group: each time it is read as two."""
        column = self._group_column()
        ends = [self._ends(group, column) for group in plan.row_groups]
        return sum(last == first for (_, last), (first, _) in pairwise(ends))

    def _ends(self, group: RowGroup, column: str) -> tuple[Any, Any]:
        array = self._table(group, [column])[column]
        return array[0].as_py(), array[-1].as_py()

    def _group_column(self) -> str:
        if self.schema.group is None:
            what = "lists are to stay whole, and no column says what a list is"
            expected, do = "the column that makes one ranked list", "add data.group, such as group: request_id"
            raise UserError(what, "data.group", expected=expected, do=do)
        return self.schema.group

    def _table(self, group: RowGroup, columns: list[str]) -> pa.Table:
        try:
            table = self._open(group.path).read_row_group(group.index, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            got, do = first_line(error), "deliver the file again, or remove it"
            raise UserError("a row group cannot be read", group.where, got=got, do=do) from None
        beat()
        return table

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
        whole_groups: bool = False,
    ) -> Iterator[Batch]:
        """This worker's share of each global batch, decoded ahead in a thread. seed None: rows stay in order, lane by
        lane.

        start_step: where to resume; the batches from there on are those of an undisturbed read. whole_groups: rows of
        equal group that follow each other in a row group come together, in their order, in one lane of one batch;
        batches are then of nearly equal size, and a worker's share may be empty.
        """
        if whole_groups:
            self._group_column()
        held = _Held(self, whole_groups)
        mine = range(rank * lanes // num_workers, (rank + 1) * lanes // num_workers)
        opened = open_lanes(plan, lanes, mine, seed, held.edges)
        return prefetch(self._batches(held, opened, plan.num_steps(batch_size), start_step), depth=4)

    def _batches(self, held: "_Held", opened: Iterator[Lane], steps: int, start_step: int) -> Iterator[Batch]:
        lanes = list(opened)
        for lane in lanes:
            lane.skip(lane.num_rows * start_step // steps)
        held.expect(lanes)
        for step in range(start_step, steps):
            wanted: dict[RowGroup, list[tuple[int, np.ndarray]]] = {}
            for lane in lanes:
                for group, rows in lane.take(lane.num_rows * (step + 1) // steps):
                    wanted.setdefault(group, []).append((lane.number, rows))
            parts = [held.select(group, of_lanes) for group, of_lanes in wanted.items()]
            yield Batch.cat(parts) if parts else self._empty()

    def _empty(self) -> Batch:
        schema = self.schema
        none = torch.empty(0, dtype=torch.int64)
        return Batch(
            {name: Jagged(none, torch.zeros(1, dtype=torch.int64)) for name in schema.ids},
            torch.empty(0, len(schema.numbers)),
            torch.empty(0, len(schema.labels)),
            torch.empty(0, len(schema.labels)),
            none,
            none if schema.group else None,
            none if schema.user else None,
            none,
        )


class _Held:
    """The row groups of which a worker still reads rows, each decoded once and held until its last row is out."""

    def __init__(self, logs: Logs, whole_groups: bool):
        self._logs, self._whole_groups = logs, whole_groups
        self._edges: dict[RowGroup, Edges] = {}
        self._decoded: dict[RowGroup, Batch] = {}
        self._rows_left: Counter[RowGroup] = Counter()

    def edges(self, group: RowGroup) -> Edges:
        """Where its rows may be parted."""
        if group not in self._edges:
            groups = self._logs.groups(group) if self._whole_groups else None
            self._edges[group] = between_rows(group.num_rows) if groups is None else between_runs(groups.numpy())
        return self._edges[group]

    def expect(self, lanes: Iterable[Lane]) -> None:
        """Count what is still to be read."""
        for lane in lanes:
            self._rows_left.update(lane.rows_left())
        self._edges = {group: edges for group, edges in self._edges.items() if self._rows_left[group]}

    def select(self, group: RowGroup, of_lanes: Sequence[tuple[int, np.ndarray]]) -> Batch:
        """The rows that each lane takes of a row group."""
        if group not in self._decoded:
            self._decoded[group] = self._logs.decode(group)
        rows = np.concatenate([rows for _, rows in of_lanes])
        batch = self._decoded[group].select(torch.from_numpy(rows))
        lanes = np.repeat([lane for lane, _ in of_lanes], [rows.size for _, rows in of_lanes])
        batch.lane_B = torch.from_numpy(lanes)
        self._rows_left[group] -= rows.size
        if not self._rows_left[group]:
            del self._decoded[group], self._edges[group]
        return batch


def decode(schema: Schema, table: pa.Table, where: str, first_row: int = 0) -> Batch:
    """A table as tensors, every value checked. where: its place, for errors."""
    columns = _Columns(schema, table, where)
    return Batch(
        columns.ids(),
        columns.numbers(),
        columns.labels(),
        columns.weights(),
        torch.arange(first_row, first_row + table.num_rows),
        columns.groups(),
        columns.users(first_row),
        keys=table.select(schema.keys) if schema.keys else None,
    )


def as_table(schema: Schema, columns: Mapping[str, Sequence[Any]], where: str) -> pa.Table:
    """Values by column, as a request brings them, as the table that a log would hold; columns that nothing reads are
    left out. where: its place, for errors.
    """
    ids, lists = set(schema.ids.values()), {schema.ids[name] for name in schema.max_len}
    arrays = {}
    for column in schema.columns:
        if column not in columns:
            got, do = ", ".join(columns) or "none", "send every column that the model reads, null where it is not known"
            raise UserError(f"column '{column}' is missing", where, got=f"columns {got}", do=do)
        kind = None if column in ids else pa.float64()
        try:
            array = pa.array(columns[column], kind)
        except (pa.ArrowException, OverflowError) as error:
            do = "send ids as integers or strings, lists as lists of them, numbers as numbers"
            raise UserError(f"column '{column}' cannot be read", where, got=first_line(error), do=do) from None
        fits = _is_id_list if column in lists else _is_id if column in ids else _is_number
        if not fits(array.type):
            got, expected = str(array.type), fits.__doc__ or ""
            raise UserError(f"column '{column}' has the wrong type", where, got, expected, "send such values")
        arrays[column] = array
    if len({len(array) for array in arrays.values()}) > 1:
        got = ", ".join(f"{len(array)} in '{column}'" for column, array in arrays.items())
        raise UserError("columns of different lengths", where, got, "one value a row in each", "send whole rows")
    return pa.table(arrays)


def parse_day(name: str, where: str) -> datetime.date:
    """The day of a folder's name."""
    try:
        return datetime.date.fromisoformat(name)
    except ValueError:
        raise UserError("not a day", where, got=name, expected="YYYY-MM-DD", do="rename or remove the folder") from None


def _is_data(name: str) -> bool:
    return name.endswith(".parquet") and not any(part.startswith((".", "_")) for part in name.split("/"))


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


class _Columns:
    """The columns of one row group on their way to tensors."""

    def __init__(self, schema: Schema, table: pa.Table, where: str):
        lists = {schema.ids[name] for name in schema.max_len}
        self._schema, self._where, self._num_rows = schema, where, table.num_rows
        self._array = {name: _typed(table[name].combine_chunks(), name in lists) for name in table.column_names}
        self._read: dict[str, Values] = {}

    def ids(self) -> dict[str, Jagged]:
        schema = self._schema
        for features in schema.aligned:
            self._check_aligned([schema.ids[name] for name in features])
        return {name: _ids(self._array[column], schema.max_len.get(name)) for name, column in schema.ids.items()}

    def numbers(self) -> Tensor:
        schema = self._schema
        numbers = [_number(self._floats(c), self._place(c), name in schema.log1p) for name, c in schema.numbers.items()]
        return self._side_by_side(numbers)

    def labels(self) -> Tensor:
        labels = []
        for task, expression in self._schema.label_of.items():
            values, where = self._values(expression)
            for who, expected, holds in self._schema.allowed.get(task, ()):
                bad = ~(holds(values) | np.isnan(values))
                _refuse(bad, values, where, f"not the label of a task with {who}", f"{expected} or null")
            labels.append(values)
        return self._side_by_side(labels)

    def weights(self) -> Tensor:
        schema, row_weights = self._schema, np.ones(self._num_rows)
        if schema.weight:
            row_weights = _weight(self._floats(schema.weight), self._place(schema.weight))
        weights = dict.fromkeys(schema.labels, row_weights)
        for task, expression in schema.weight_of.items():
            values, where = self._values(expression)
            unknown = np.isnan(values) & np.isnan(self._values(schema.label_of[task])[0])
            values = np.where(unknown, 1.0, values)  # what happened is not known, so neither is what it weighs
            weights[task] = _finite(_weight(values, where) * row_weights, np.True_, where)
        return self._side_by_side(list(weights.values()))

    def groups(self) -> Tensor | None:
        column = self._schema.group
        return _group(self._array[column], self._place(column)) if column else None

    def users(self, first_row: int) -> Tensor | None:
        """A row that names nobody is somebody of its own."""
        if self._schema.user is None:
            return None
        array = self._array[self._schema.user]
        known = torch.from_numpy(array.is_valid().to_numpy(zero_copy_only=False).copy())
        users = ~hash64(torch.arange(first_row, first_row + len(array)))
        users[known] = _hash_ids(array.drop_null())
        return users

    def _check_aligned(self, columns: Sequence[str]) -> None:
        lengths = {column: _lengths(self._array[column]) for column in columns}
        for column in columns:
            null = self._array[column].flatten().is_null().to_numpy(zero_copy_only=False)
            if null.any():
                row, got = int(np.arange(self._num_rows).repeat(lengths[column])[null][0]), f"{null.sum()} null ids"
                what, expected = "a list that is read beside another has gaps", "an id in every place"
                raise UserError(what, f"{self._place(column)}, row {row}", got=got, expected=expected, do=_REEXPORT)
        for a, b in pairwise(columns):
            differ = lengths[a] != lengths[b]
            if differ.any():
                row, what = int(differ.argmax()), "lists that are read side by side differ in length"
                got = f"{lengths[a][row]} and {lengths[b][row]}, the first of {differ.sum()} such rows"
                where = f"{self._where}, columns '{a}' and '{b}', row {row}"
                raise UserError(what, where, got=got, expected="equally many ids", do=_REEXPORT)

    def _place(self, column: str) -> str:
        return f"{self._where}, column '{column}'"

    def _floats(self, column: str) -> Values:
        if column not in self._read:
            self._read[column] = _floats(self._array[column], self._place(column))
        return self._read[column]

    def _values(self, expression: Expression) -> tuple[Values, str]:
        """An expression on every row, NaN only where one of its columns is null; and where it stands."""
        if expression.column:
            return self._floats(expression.column), self._place(expression.column)
        where = f"{self._where}, expression '{expression.text}'"
        columns = {column: self._floats(column) for column in expression.columns}
        values = np.broadcast_to(expression.evaluate(columns), self._num_rows)
        null = np.any([np.isnan(values) for values in columns.values()], axis=0)
        return _finite(values, ~null, where), where

    def _side_by_side(self, columns: list[Values]) -> Tensor:
        """float32 [B, number of columns]."""
        if not columns:
            return torch.empty(self._num_rows, 0)
        return torch.stack([torch.from_numpy(values.astype(np.float32)) for values in columns], 1)


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
    lengths, values = torch.from_numpy(_lengths(array)), array.flatten()
    everything = Jagged.from_lengths(torch.arange(len(values)), lengths)
    from_end = everything.offsets[1:].repeat_interleave(lengths) - everything.values_N
    kept = (from_end <= max_len) & torch.from_numpy(values.is_valid().to_numpy(zero_copy_only=False).copy())
    kept_before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
    return Jagged(_hash_ids(values.filter(pa.array(kept.numpy()))), kept_before[everything.offsets])


def _lengths(lists: pa.Array) -> np.ndarray:
    """0 where null."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


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


def _floats(array: pa.Array, where: str) -> Values:
    """float64 with NaN for null; a NaN, an infinity or what float32 would make one is an error."""
    values = np.array(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    return _finite(values, array.is_valid().to_numpy(zero_copy_only=False), where)


def _finite(values: Values, known: np.ndarray | np.bool_, where: str) -> Values:
    """The values, refused where they are beyond float32, or NaN though known."""
    bad = ~(np.abs(values) <= _FLOAT32_MAX) & (known | ~np.isnan(values))
    what, expected = "not a finite number", "finite numbers (of float32's range), or null where there is none"
    _refuse(bad, values, where, what, expected)
    return values


def _refuse(bad: np.ndarray, values: Values, where: str, what: str, expected: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        got = f"{values[row]}" + (f", the first of {int(bad.sum())} such rows" if bad.sum() > 1 else "")
        raise UserError(what, f"{where}, row {row}", got=got, expected=expected, do=_REEXPORT)


def _number(values: Values, where: str, log1p: bool) -> Values:
    if log1p:
        _refuse(values <= -1, values, where, "log1p is not defined here", "numbers above -1")
        return np.log1p(values)
    return values


def _weight(values: Values, where: str) -> Values:
    _refuse(~(values >= 0), values, where, "not a sample weight", "numbers from 0 up, none of them null")
    return values
