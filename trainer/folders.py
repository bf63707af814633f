"""Where the logs of an interval lie: folders of days, and of hours in them.

<path>/day=2026-11-20/*.parquet, or <path>/day=2026-11-20/hour=13/*.parquet, where hour=3 is hour=03
"""

import datetime
import re

import pyarrow.fs

from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.storage import list_folder

_HOUR = re.compile(r"hour=(\d{1,2})")


class Folders:
    """The folders below root. path: as people are shown it."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem, root: str, path: str, day_column: str):
        self._filesystem, self._root, self.path, self._prefix = filesystem, root, path, f"{day_column}="

    def days(self) -> list[datetime.date]:
        """The days that are there, in order."""
        folders = self._below(self._root)
        names = sorted(name.removeprefix(self._prefix) for name in folders if name.startswith(self._prefix))
        if not names:
            got = f"{len(folders)} folders of other names" if folders else "no folders"
            expected, do = f"folders such as {self._prefix}2026-11-20", "correct data.path or data.day_column"
            raise UserError("no days found", self.path, got=got, expected=expected, do=do)
        return [parse_day(name, f"{self.path}/{self._prefix}{name}") for name in names]

    def hours(self, day: datetime.date) -> dict[int, list[str]]:
        """The hours of a day that have folders, and the names of these."""
        found: dict[int, list[str]] = {}
        for name in sorted(self._below(self.folder(Interval(day)))):
            if name.startswith("hour="):
                match = _HOUR.fullmatch(name)
                if not match or int(match[1]) > 23:
                    where, expected = f"{self.path}/{self._prefix}{day}/{name}", "hour=00 .. hour=23"
                    raise UserError("not an hour", where, got=name, expected=expected, do="rename or remove the folder")
                found.setdefault(int(match[1]), []).append(name)
        return found

    def folder(self, interval: Interval) -> str:
        """Where an interval's files lie."""
        hour = "" if interval.hour is None else f"/hour={interval.hour:02d}"
        return f"{self._root}/{self._prefix}{interval.day}{hour}"

    def files(self, interval: Interval) -> list[tuple[str, int]]:
        """The Parquet files of a day, or of an hour that has folders: their paths, in order, and bytes."""
        day = self.folder(Interval(interval.day))
        names = (
            [""] if interval.hour is None else [f"/{name}" for name in self.hours(interval.day).get(interval.hour, ())]
        )
        found = [info for name in names for info in list_folder(self._filesystem, f"{day}{name}", recursive=True)]
        data = [info for info in found if info.is_file and _is_data(info.path.removeprefix(day))]
        return sorted((info.path, info.size) for info in data)

    def name(self, path: str, interval: Interval) -> str:
        """A file's path below its day's folder."""
        return path.removeprefix(f"{self.folder(Interval(interval.day))}/")

    def _below(self, folder: str) -> list[str]:
        return [info.base_name for info in list_folder(self._filesystem, folder) if not info.is_file]


def parse_day(name: str, where: str) -> datetime.date:
    """The day of a folder's name."""
    try:
        return datetime.date.fromisoformat(name)
    except ValueError:
        raise UserError("not a day", where, got=name, expected="YYYY-MM-DD", do="rename or remove the folder") from None


def _is_data(name: str) -> bool:
    return name.endswith(".parquet") and not any(part.startswith((".", "_")) for part in name.split("/"))
