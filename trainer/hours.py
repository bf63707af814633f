"""The hours of a day as the clock of a place shows them, and the hour of each row of the logs.

An hour that is shown twice, when daylight saving ends, is one hour of double length; one that is left out, when it
begins, is none.
"""

import calendar
import datetime
import functools
import zoneinfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

NO_HOUR = -1  # of a row whose time is null or not on the day

_STEP_S = 900  # all clocks of today differ by quarters of an hour, and are set forward and back at such
_HOUR_S, _DAY_S = 3600, 86_400
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def hours_of(times: pa.Array, day: datetime.date, zone: str) -> NDArray[np.int64]:
    """The hour of each time, 0 to 23, or NO_HOUR. times: timestamps of any unit and zone, or integers: milliseconds
    since 1970 in UTC. A timestamp without a zone is what the clock showed.
    """
    kind = times.type
    per_second = _PER_SECOND[kind.unit] if pa.types.is_timestamp(kind) else _PER_SECOND["ms"]
    shown = pa.types.is_timestamp(kind) and kind.tz is None
    starts, hours = _as_shown(day) if shown else _changes(day, zone)
    known = times.is_valid().to_numpy(zero_copy_only=False)
    values = pc.fill_null(times.cast(pa.int64(), safe=False), 0).to_numpy(zero_copy_only=False)
    return np.where(known, hours[np.searchsorted(starts * per_second, values, side="right")], NO_HOUR)


def left_out(day: datetime.date, zone: str) -> list[int]:
    """The hours that the clock does not show on a day."""
    return sorted(set(range(24)) - set(_changes(day, zone)[1].tolist()))


def shown_twice(day: datetime.date, zone: str) -> list[int]:
    """The hours that last longer than an hour on a day."""
    starts, hours = _changes(day, zone)
    seconds = np.bincount(hours[1:-1], np.diff(starts), minlength=24)
    return [int(hour) for hour in np.flatnonzero(seconds > _HOUR_S)]


@functools.lru_cache(maxsize=64)
def _changes(day: datetime.date, zone: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The seconds since 1970 at which the clock comes to another hour of the day, or off the day; and the hour before
    the first of them (none) and from each of them on.
    """
    clock, midnight = zoneinfo.ZoneInfo(zone), calendar.timegm(day.timetuple())
    steps = range(midnight - _DAY_S, midnight + 2 * _DAY_S, _STEP_S)  # clocks are at most 14 hours from UTC
    shown = [datetime.datetime.fromtimestamp(step, clock) for step in steps]
    hours = np.array([each.hour if each.date() == day else NO_HOUR for each in shown])
    changed = np.flatnonzero(np.diff(hours)) + 1
    return np.array(steps)[changed], np.concatenate([[NO_HOUR], hours[changed]])


def _as_shown(day: datetime.date) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    midnight = calendar.timegm(day.timetuple())
    return midnight + _HOUR_S * np.arange(25), np.array([NO_HOUR, *range(24), NO_HOUR])
