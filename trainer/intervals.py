"""What a night trains on: a day, or an hour of one. Everything that happens once a night is keyed by it.

    Interval(date(2026, 11, 20))        2026-11-20       day=2026-11-20
    Interval(date(2026, 11, 20), 13)    2026-11-20T13    day=2026-11-20/hour=13

A model has intervals of one sort. An hour is one of the clock in the zone of the logs: an hour that the clock shows
twice is one interval, one that it leaves out is none.
"""

import datetime
import re
from dataclasses import dataclass
from functools import total_ordering

from trainer.errors import UserError

_ONE_DAY = datetime.timedelta(days=1)
_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})(?:T(\d{2}))?")


@total_ordering
@dataclass(frozen=True)
class Interval:
    """A day, or with `hour` (0 to 23) that hour of it. A day stands before its hours."""

    day: datetime.date
    hour: int | None = None

    def __post_init__(self) -> None:
        assert self.hour is None or 0 <= self.hour < 24, "an hour of the clock"

    @property
    def name(self) -> str:
        """As reports, options and people say it."""
        return str(self.day) if self.hour is None else f"{self.day}T{self.hour:02d}"

    @property
    def words(self) -> str:
        """For errors: "day 2026-11-20"."""
        return f"{'day' if self.hour is None else 'hour'} {self.name}"

    @property
    def folder(self) -> str:
        """Where it lies below a model's folder."""
        return f"day={self.day}" if self.hour is None else f"day={self.day}/hour={self.hour:02d}"

    @property
    def number(self) -> int:
        """Its own among the intervals of its sort; one more for the next. It seeds what is random on it."""
        return self.day.toordinal() if self.hour is None else self.day.toordinal() * 24 + self.hour

    def next(self) -> "Interval":
        """The one that follows by the calendar and the clock."""
        if self.hour is None:
            return Interval(self.day + _ONE_DAY)
        return Interval(self.day, self.hour + 1) if self.hour < 23 else Interval(self.day + _ONE_DAY, 0)

    @staticmethod
    def parse(text: str, where: str) -> "Interval":
        """The interval of that name. where: who says it, for errors."""
        if match := _NAME.fullmatch(text):
            try:
                day, hour = datetime.date.fromisoformat(match[1]), match[2]
                return Interval(day, None if hour is None else datetime.time(int(hour)).hour)
            except ValueError:
                pass  # a form without a meaning, such as 2026-11-31 or T24
        expected, do = "YYYY-MM-DD, or YYYY-MM-DDTHH for an hour", "give a day of the calendar, such as 2026-11-20"
        raise UserError("not a day", where, got=repr(text), expected=expected, do=do)

    def is_within(self, first: "Interval | None", through: "Interval | None") -> bool:
        """Does it lie between two others, or ends that are open? A day at the end holds all of its hours."""
        ends = through is None or self <= through or (through.hour is None and self.day == through.day)
        return ends and (first is None or first <= self)

    def __lt__(self, other: "Interval") -> bool:
        return (self.day, -1 if self.hour is None else self.hour) < (
            other.day,
            -1 if other.hour is None else other.hour,
        )

    def __str__(self) -> str:
        return self.name
