"""The logs: days of Parquet in, batches of tensors out.

    <path>/day=2026-11-20/*.parquet -> row groups -> columns, checked -> a worker's share of every global batch

plan.py tells which rows are an interval's, lanes.py which of them come when, columns.py what becomes of them.

Shape letters: B rows, K numbers, T tasks.
"""

import datetime
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.jagged import Jagged
from trainer.columns import Columns, Refused
from trainer.errors import UserError
from trainer.files import Clock, Files
from trainer.folders import Folders
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
from trainer.plan import Planner
from trainer.schema import Schema
from trainer.storage import open_filesystem, without_credentials


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
    """The days below one path, hive-partitioned by day, or the hours of them.

    by_hour: intervals are hours: the folders hour=00 .. hour=23 of a day, or, with the name of a column of times, its
    rows by the clock of a zone. max_bad_rows: the share of malformed rows and files up to which they may be left out;
    0: the first one is an error.
    """

    def __init__(
        self,
        path: str,
        day_column: str,
        schema: Schema,
        *,
        by_hour: bool = False,
        time: str | None = None,
        time_zone: str = "UTC",
        max_bad_rows: float = 0.0,
    ):
        self.path, self.schema = without_credentials(path), schema
        self.by_hour, self.max_bad_rows = by_hour, max_bad_rows
        self.filesystem, root = open_filesystem(path)
        self.files = Files(self.filesystem, Clock(time, time_zone) if by_hour and time else None)
        self._folders = Folders(self.filesystem, root, self.path, day_column)
        self._planner = Planner(
            self.files, self._folders, schema, by_hour=by_hour, zone=time_zone, max_bad_rows=max_bad_rows
        )

    def days(self) -> list[datetime.date]:
        """The days that are there, in order."""
        return self._folders.days()

    def intervals(self, first: Interval | None = None, through: Interval | None = None) -> list[Interval]:
        """The intervals that are there, in order, within first .. through."""
        return self._planner.intervals(first, through)

    def missing(self, first: Interval, through: Interval) -> Iterator[Interval]:
        """Those between two intervals that are not there, in order."""
        return self._planner.missing(first, through)

    def plan(self, interval: Interval, before: Interval | None = None) -> DayPlan:
        """Read the footers of an interval's files and check their columns, against those of the interval trained
        before, too.
        """
        return self._planner.plan(interval, before)

    @property
    def parts_days(self) -> bool:
        """Whether a clock parts the rows of days into hours."""
        return self.files.clock is not None

    def delivered(self, interval: Interval) -> list[dict[str, Any]]:
        """What lies in the folder of an interval now, by footers; of an hour that a clock parts, its day."""
        return self._planner.delivered(interval)

    def decode(self, group: RowGroup) -> Batch:
        """One row group as tensors, every value checked."""
        table, rows = self.files.table(group, self.schema.columns)
        return decode(self.schema, table, group.where, group.first_row, rows)

    def check(self, group: RowGroup) -> tuple[Refused, NDArray[np.int64] | None]:
        """The rows of a row group that hold a value which means nothing; and where each of its rows stands."""
        table, rows = self.files.table(group, self.schema.columns)
        refused = Refused(np.zeros(table.num_rows, bool))
        Columns(self.schema, table, group.where, rows, refused).check()
        return refused, rows

    def groups(self, group: RowGroup) -> Tensor | None:
        """The hashed group column of one row group, and nothing else of it."""
        wanted = [self.schema.group] if self.schema.group else []
        table, rows = self.files.table(group, wanted)
        return Columns(self.schema, table, group.where, rows).groups()

    def cut_groups(self, plan: DayPlan) -> int:
        """How often a list goes on in the day's next row group: each time it is read as two."""
        column = self._group_column()
        ends = [self._ends(group, column) for group in plan.row_groups]
        return sum(last == first for (_, last), (first, _) in pairwise(ends))

    def _ends(self, group: RowGroup, column: str) -> tuple[Any, Any]:
        array = self.files.table(group, [column])[0][column]
        return array[0].as_py(), array[-1].as_py()

    def _group_column(self) -> str:
        if self.schema.group is None:
            what = "lists are to stay whole, and no column says what a list is"
            expected, do = "the column that makes one ranked list", "add data.group, such as group: request_id"
            raise UserError(what, "data.group", expected=expected, do=do)
        return self.schema.group

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


def decode(
    schema: Schema, table: pa.Table, where: str, first_row: int = 0, rows: NDArray[np.int64] | None = None
) -> Batch:
    """A table as tensors, every value checked. where: its place, for errors; rows: where each row stands in it, when
    not in this order.
    """
    columns = Columns(schema, table, where, rows)
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
