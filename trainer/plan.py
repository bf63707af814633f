"""Which intervals the logs have, and which rows are an interval's: of every file the footer, and no column but times.

A missing column, one of a wrong type, and ids that were integers and are strings now, are errors. What else is new in
the columns is told in the plan's notes.
"""

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.delivery import entry, unread
from trainer.drift import Types, check_columns, drift, types_of
from trainer.errors import UserError
from trainer.files import Clock, Files, LogFile
from trainer.folders import Folders
from trainer.hours import NO_HOUR, left_out, shown_twice
from trainer.intervals import Interval
from trainer.lanes import BadFile, BadRows, DayPlan, RowGroup
from trainer.schema import REEXPORT, Schema

NO_TIME = "no time on the day"


class NoRows(UserError):
    """An interval without a row."""


@dataclass(frozen=True)
class _Parted:
    """A row group by hours: how many rows each of the 24 has, and the places of those that have none."""

    num_rows_H: NDArray[np.int64]
    without: NDArray[np.int64]


@dataclass(frozen=True)
class _Day:
    """The files of a day or of an hour: the good ones, the bad ones; and each good one's row groups by hours, where a
    clock parts them.
    """

    files: tuple[LogFile, ...]
    bad: tuple[BadFile, ...]
    parted: tuple[tuple[_Parted, ...], ...] = ()

    def hours(self) -> list[int]:
        """Those that have rows."""
        none = np.zeros(24, np.int64)
        return [int(h) for h in np.flatnonzero(sum((group.num_rows_H for of in self.parted for group in of), none))]


class Planner:
    """Plans the intervals of the logs.

    by_hour: whether intervals are hours: of folders, or, when the files have a clock, of the rows' times. zone: by
    which hours are left out. max_bad_rows: above 0, files that mean nothing are told in the plan instead of being an
    error, up to this share of the bytes; and so are rows without an hour.
    """

    def __init__(
        self, files: Files, folders: Folders, schema: Schema, *, by_hour: bool, zone: str, max_bad_rows: float
    ):
        self._files, self._folders, self._schema, self._by_hour = files, folders, schema, by_hour
        self._zone, self._max_bad_rows = zone, max_bad_rows
        self._parted: dict[datetime.date, _Day] = {}
        self._types: dict[Interval, Types] = {}

    @property
    def _clock(self) -> Clock | None:
        return self._files.clock

    def intervals(self, first: Interval | None, through: Interval | None) -> list[Interval]:
        """Those that are there, in order, within first .. through. With a clock the times of these days are read."""
        days = self._folders.days()
        within = [d for d in days if (not first or d >= first.day) and (not through or d <= through.day)]
        found = [Interval(day) for day in within]
        if self._by_hour:
            hours = {
                day: self._part(day).hours() if self._clock else sorted(self._folders.hours(day)) for day in within
            }
            if within and not any(hours.values()) and not self._clock:
                expected = f"folders such as day={within[0]}/hour=13"
                do = "deliver a folder an hour, name the column of times in data.time, or set data.period: day"
                raise UserError("no hours found", self._folders.path, "days without them", expected, do)
            found = [Interval(day, hour) for day, of in hours.items() for hour in of]
        return [interval for interval in found if interval.is_within(first, through)]

    def missing(self, first: Interval, through: Interval) -> Iterator[Interval]:
        """What is not there between two intervals, although calendar and clock have it. With a clock an hour without a
        row is not missing: only whole days are.
        """
        by_folder = self._by_hour and not self._clock
        there = set(self.intervals(first, through)) if by_folder else {Interval(day) for day in self._folders.days()}
        expected, end = (first, through) if by_folder else (Interval(first.day), Interval(through.day))
        while expected <= end:
            if expected not in there and not (by_folder and expected.hour in left_out(expected.day, self._zone)):
                yield expected
            expected = expected.next()

    def plan(self, interval: Interval, before: Interval | None) -> DayPlan:
        """An interval's rows. before: the one trained before it, with whose columns its own are compared."""
        if (interval.hour is not None) != self._by_hour:
            expected = f"an hour, such as {interval.day}T13" if self._by_hour else "a day"
            do = "name the other, or set data.period"
            raise UserError(f"{interval.words} is no interval of this model", "data.period", "", expected, do)
        if self._clock:
            return self._plan_parted(interval, self._clock, before)
        day = self._look(interval)
        rows = [list(file.row_groups) for file in day.files]
        return self._planned(interval, day, rows, before)

    def delivered(self, interval: Interval) -> list[dict[str, Any]]:
        """What lies in the folder of an interval now, by footers; of an hour that a clock parts, its day."""
        found = []
        for path, size in self._folders.files(Interval(interval.day) if self._clock else interval):
            name = self._folders.name(path, interval)
            try:
                file = self._files.look(path, name)
                found.append(entry(file, file.num_rows))
            except UserError:
                found.append(unread(name, size))
        return found

    def _plan_parted(self, interval: Interval, clock: Clock, before: Interval | None) -> DayPlan:
        """The rows of an hour within a day's files. Rows without an hour are told of with the day's first hour."""
        day = self._part(interval.day)
        rows = [[int(group.num_rows_H[interval.hour]) for group in of] for of in day.parted]
        bad_rows = []
        if [interval.hour] == day.hours()[:1]:
            for file, of in zip(day.files, day.parted, strict=True):
                without = [
                    (index, tuple(group.without.tolist())) for index, group in enumerate(of) if group.without.size
                ]
                bad_rows += [BadRows(file.path, i, clock.column, NO_TIME, places) for i, places in without]
        return self._planned(interval, day, rows, before, tuple(bad_rows))

    def _planned(
        self, interval: Interval, day: _Day, rows: list[list[int]], before: Interval | None,
        bad_rows: tuple[BadRows, ...] = (),
    ) -> DayPlan:  # fmt: skip
        """rows: of each file's row groups, how many are the interval's."""
        hour, groups, num_rows = interval if self._clock else None, [], 0
        for file, of in zip(day.files, rows, strict=True):
            for index, count in enumerate(of):
                groups += [RowGroup(file.path, index, count, num_rows, hour)] if count else []
                num_rows += count
        if not num_rows:
            got = f"{len(day.files)} Parquet files without a row" if day.files else "no Parquet files"
            do = "deliver the day, or remove its folder and ask for another day"
            folder = self._folders.folder(interval)
            raise NoRows(f"{interval.words} is empty", folder, got=got, expected="at least one row", do=do)
        delivery = [entry(file, sum(of)) for file, of in zip(day.files, rows, strict=True) if sum(of) or not hour]
        delivery += [unread(self._folders.name(file.path, interval), file.bytes) for file in day.bad]
        notes = [*self._of_the_clock(interval), *self._of_the_columns(interval, day, before)]
        return DayPlan(interval, tuple(groups), tuple(delivery), tuple(notes), day.bad, bad_rows)

    def _part(self, day: datetime.date) -> _Day:
        """A day's files, their rows parted by the clock; its times are read once."""
        if day not in self._parted:
            found = self._look(Interval(day))
            self._check_without_hour(day, found)
            self._parted[day] = found
        return self._parted[day]

    def _check_without_hour(self, day: datetime.date, found: _Day) -> None:
        rows = sum(file.num_rows for file in found.files)
        without = sum(group.without.size for of in found.parted for group in of)
        if without > self._max_bad_rows * rows:
            got, expected = f"{without} of {rows} rows", f"at most {self._max_bad_rows:.2%} (data.max_bad_rows)"
            do = f"{REEXPORT}: data.time_zone is the zone by whose clock days are cut"
            raise UserError(f"too many rows have {NO_TIME}", self._folders.folder(Interval(day)), got, expected, do)

    def _look(self, interval: Interval) -> _Day:
        """The footers of an interval's files and, with a clock, their times; all columns are checked."""
        good: list[LogFile] = []
        bad: list[BadFile] = []
        parted: list[tuple[_Parted, ...]] = []
        for path, size in self._folders.files(interval):
            work = partial(self._look_at, path, interval, good[0] if good else None)
            found = self._files.tried(path, work) if self._max_bad_rows else work()
            if isinstance(found, UserError):
                bad.append(BadFile(path, size, f"{found.what}: {found.got}"))
            else:
                good.append(found[0])
                parted.append(found[1])
        self._check_bad_files(interval, good, bad)
        return _Day(tuple(good), tuple(bad), tuple(parted))

    def _look_at(self, path: str, interval: Interval, first: LogFile | None) -> tuple[LogFile, tuple[_Parted, ...]]:
        """A file, with a clock parted. first: the first of its day."""
        file = self._files.look(path, self._folders.name(path, interval))
        check_columns(self._schema, file, self._clock, first)
        if not self._clock:
            return file, ()
        groups = [RowGroup(path, index, rows, 0) for index, rows in enumerate(file.row_groups)]
        return file, tuple(self._part_group(group, self._clock, interval) for group in groups)

    def _part_group(self, group: RowGroup, clock: Clock, interval: Interval) -> _Parted:
        times = self._files.whole(group, [clock.column])
        hours = clock.hours(times, interval)
        without = np.flatnonzero(hours == NO_HOUR)
        if without.size and not self._max_bad_rows:
            got = f"{times[clock.column][int(without[0])]}" + (
                f", the first of {without.size} such rows" * (without.size > 1)
            )
            where = f"{group.where}, column '{clock.column}', row {without[0]}"
            do = f"{REEXPORT}: data.time_zone is the zone by whose clock days are cut"
            raise UserError(NO_TIME, where, got, f"times on {interval.day} in {clock.zone}", do)
        return _Parted(np.bincount(hours[hours != NO_HOUR], minlength=24), without)

    def _check_bad_files(self, interval: Interval, good: list[LogFile], bad: list[BadFile]) -> None:
        """How many rows bad files have nobody knows: their share of the bytes counts."""
        bad_bytes = sum(file.bytes for file in bad)
        share = bad_bytes / max(1, bad_bytes + sum(file.bytes for file in good))
        if share > self._max_bad_rows or (bad and not good):
            got = f"{len(bad)} of {len(good) + len(bad)} files, {share:.1%} of the bytes; the first: {bad[0].reason}"
            expected = f"at most {self._max_bad_rows:.1%} (data.max_bad_rows)"
            do = "deliver the files again"
            raise UserError(f"too many files of {interval.words} mean nothing", bad[0].path, got, expected, do)

    def _of_the_clock(self, interval: Interval) -> list[str]:
        """What is unusual about the hours of a day, told with the hour concerned, or the next one."""
        if interval.hour is None:
            return []
        left = [h for h in left_out(interval.day, self._zone) if h == interval.hour - 1]
        twice = [h for h in shown_twice(interval.day, self._zone) if h == interval.hour]
        notes = [f"the clock of {self._zone} leaves out hour {hour}: there is no such interval" for hour in left]
        return notes + [f"the clock of {self._zone} shows hour {hour} twice: both are one interval" for hour in twice]

    def _of_the_columns(self, interval: Interval, day: _Day, before: Interval | None) -> list[str]:
        """What is new against the interval before. Ids of another sort are an error."""
        self._types[interval] = now = types_of(day.files)
        return (
            drift(self._schema, self._types_before(before), now, f"{self._folders.folder(interval)}") if before else []
        )

    def _types_before(self, interval: Interval) -> Types:
        """Of an interval that was planned already, or whose files may still be there."""
        if interval not in self._types:
            paths = [path for path, _ in self._folders.files(interval if not self._clock else Interval(interval.day))]
            found = []
            for path in paths:
                with contextlib.suppress(UserError):  # it is not the night's business any more
                    found.append(self._files.look(path, path))
            self._types[interval] = types_of(found)
        return self._types[interval]
