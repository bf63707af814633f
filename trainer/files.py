"""The files of the logs: opened, their footers read, their row groups as tables of the rows that an interval has."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embeddings.pulse import beat
from trainer.errors import UserError
from trainer.hours import hours_of
from trainer.intervals import Interval
from trainer.lanes import RowGroup
from trainer.storage import first_line

Result = TypeVar("Result")
_AGAIN = "deliver the file again, or remove it"


@dataclass(frozen=True)
class Clock:
    """By what a day's rows are parted into hours: a column of times, and the zone whose clock counts."""

    column: str
    zone: str

    def hours(self, table: pa.Table, interval: Interval) -> NDArray[np.int64]:
        """The hour of each row, on the day of the interval."""
        return hours_of(table[self.column].combine_chunks(), interval.day, self.zone)


@dataclass(frozen=True)
class LogFile:
    """A file by its footer. name: its path below its day's folder; footer: a hash of it; row_groups: their rows."""

    path: str
    name: str
    bytes: int
    footer: str
    columns: pa.Schema
    row_groups: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups)


class Files:
    """The Parquet files of one filesystem. clock: see there."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem, clock: Clock | None = None):
        self.filesystem, self.clock = filesystem, clock

    def look(self, path: str, name: str) -> LogFile:
        """A file's footer, and nothing else of it."""
        try:
            with self.filesystem.open_input_file(path) as source:
                parquet = pq.ParquetFile(source)
                metadata, columns = parquet.metadata, parquet.schema_arrow
                source.seek(source.size() - 8 - metadata.serialized_size)  # its length and PAR1 are the last 8 bytes
                footer = hashlib.sha256(source.read()).hexdigest()[:32]
                size = source.size()
        except (pa.ArrowException, OSError) as error:
            raise UserError("not a readable Parquet file", path, got=first_line(error), do=_AGAIN) from None
        groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
        return LogFile(path, name, size, footer, columns, groups)

    def table(self, group: RowGroup, columns: list[str]) -> tuple[pa.Table, NDArray[np.int64] | None]:
        """The rows of a row group that its interval has; and where each stands in the row group, when not in order."""
        if group.hour is None and group.left_out is None:
            return self._checked(self.whole(group, columns), group), None
        if group.hour is None:
            table = self.whole(group, columns)
            mine = np.ones(table.num_rows, bool)
        else:
            assert self.clock, "who parts rows by hours has a clock"
            read = self.whole(group, list(dict.fromkeys([*columns, self.clock.column])))
            mine = self.clock.hours(read, group.hour) == group.hour.hour
            table = read.select(columns)
        if group.left_out is not None:
            mine[group.left_out] = False
        return self._checked(table.filter(pa.array(mine)), group), np.flatnonzero(mine)

    def whole(self, group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        """All rows of a row group. columns: None: all of them."""
        try:
            parquet = pq.ParquetFile(group.path, filesystem=self.filesystem)
        except (pa.ArrowException, OSError) as error:
            raise UserError("not a readable Parquet file", group.path, got=first_line(error), do=_AGAIN) from None
        try:
            table = parquet.read_row_group(group.index, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError("a row group cannot be read", group.where, got=first_line(error), do=_AGAIN) from None
        finally:
            parquet.close()
        beat()
        return table

    def tried(self, path: str, work: Callable[[], Result]) -> Result | UserError:
        """What the work with a file returns; or its error, when the file is what is bad and not the way to it: its
        bytes can be read, and to try again is in vain.
        """
        try:
            return work()
        except UserError:
            if not self._is_readable(path):
                raise
        try:
            return work()
        except UserError as error:
            return error

    def _is_readable(self, path: str) -> bool:
        try:
            with self.filesystem.open_input_stream(path) as stream:
                while stream.read(1 << 24):
                    pass
        except (pa.ArrowException, OSError):
            return False
        return True

    def _checked(self, table: pa.Table, group: RowGroup) -> pa.Table:
        if table.num_rows != group.num_rows:
            got, expected = f"{table.num_rows} rows", f"{group.num_rows}"
            do = "leave a day's files as they are while it is trained; run the same command again"
            raise UserError("a row group is not what it was when the night began", group.where, got, expected, do)
        return table
