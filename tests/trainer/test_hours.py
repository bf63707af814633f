"""The hour of a row by the clock of its place. Oracle: zoneinfo, one time after the other."""

import datetime
import zoneinfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.hours import NO_HOUR, hours_of, left_out, shown_twice

ZONES = ["UTC", "America/Sao_Paulo", "Europe/Berlin", "Asia/Kolkata", "Australia/Lord_Howe", "Pacific/Apia"]
CHANGES = {  # days on which clocks were set
    "America/Sao_Paulo": ["2017-10-15", "2018-02-17", "2018-02-18"],  # at midnight
    "Europe/Berlin": ["2026-03-29", "2026-10-25"],
    "Australia/Lord_Howe": ["2026-04-05", "2026-10-04"],  # by half an hour
    "Pacific/Apia": ["2011-12-30", "2011-12-31"],  # over the date line: the first of them was no day
}
ON_CHANGE = st.sampled_from([(datetime.date.fromisoformat(day), zone) for zone, of in CHANGES.items() for day in of])
ANY_DAY = st.tuples(st.dates(datetime.date(1990, 1, 1), datetime.date(2037, 12, 31)), st.sampled_from(ZONES))
SPRING, AUTUMN = datetime.date(2026, 3, 29), datetime.date(2026, 10, 25)  # Berlin's clock is set at 1:00 UTC


def shown(ms: int, day: datetime.date, zone: str) -> int:
    """What the clock shows, or NO_HOUR on another day."""
    time = datetime.datetime.fromtimestamp(ms / 1000, zoneinfo.ZoneInfo(zone))
    return time.hour if time.date() == day else NO_HOUR


@settings(max_examples=150, deadline=None)
@given(ANY_DAY | ON_CHANGE, st.integers(0, 2**32))
def test_every_time_has_the_hour_that_the_clock_shows(where: tuple[datetime.date, str], seed: int) -> None:
    day, zone = where
    noon = int(datetime.datetime.combine(day, datetime.time(12), datetime.UTC).timestamp()) * 1000
    times = noon + np.random.default_rng(seed).integers(-30 * 3600_000, 30 * 3600_000, 40)
    quarters = noon + np.arange(-120, 120) * 900_000  # and the moments at which clocks change, and just before
    times = np.concatenate([times, quarters, quarters - 1])
    assert hours_of(pa.array(times), day, zone).tolist() == [shown(int(ms), day, zone) for ms in times]


@pytest.mark.parametrize("day", [SPRING, AUTUMN, datetime.date(2026, 7, 1)])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone_of_column", ["UTC", "Asia/Tokyo"])
def test_unit_and_zone_of_the_column_do_not_matter(day: datetime.date, unit: str, zone_of_column: str) -> None:
    seconds = int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()) + 611 * np.arange(-50, 200)
    expected = hours_of(pa.array(seconds * 1000), day, "Europe/Berlin").tolist()
    column = pa.array(seconds, pa.timestamp("s", "UTC")).cast(pa.timestamp(unit, zone_of_column))
    assert hours_of(column, day, "Europe/Berlin").tolist() == expected


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_timestamp_without_a_zone_is_what_the_clock_showed(unit: str) -> None:
    times = pd.date_range(f"{AUTUMN}", periods=144, freq="10min") - pd.Timedelta("1h")
    found = hours_of(pa.array(times).cast(pa.timestamp(unit)), AUTUMN, "Europe/Berlin")
    assert found.tolist() == [time.hour if time.date() == AUTUMN else NO_HOUR for time in times]


def test_no_time_and_a_time_on_another_day_have_no_hour() -> None:
    times = [None, 0, -(2**62), 2**62, int(datetime.datetime(2026, 3, 29, 12, tzinfo=datetime.UTC).timestamp() * 1000)]
    assert hours_of(pa.array(times, pa.int64()), SPRING, "UTC").tolist() == [NO_HOUR] * 4 + [12]


def test_an_hour_that_is_shown_twice_is_one_and_one_that_is_left_out_is_none() -> None:
    zone = "Europe/Berlin"
    assert (left_out(SPRING, zone), shown_twice(SPRING, zone)) == ([2], [])
    assert (left_out(AUTUMN, zone), shown_twice(AUTUMN, zone)) == ([], [2])
    assert (left_out(AUTUMN, "UTC"), shown_twice(AUTUMN, "UTC")) == ([], [])
    start = int(datetime.datetime(2026, 10, 24, 22, tzinfo=datetime.UTC).timestamp()) * 1000  # midnight in Berlin
    hours = hours_of(pa.array(start + np.arange(25) * 3600_000), AUTUMN, zone)
    assert hours.tolist() == [0, 1, 2, 2, *range(3, 24)]


def test_a_day_whose_midnight_is_left_out_begins_at_one() -> None:
    assert left_out(datetime.date(2017, 10, 15), "America/Sao_Paulo") == [0]


@settings(max_examples=60, deadline=None)
@given(ANY_DAY | ON_CHANGE)
def test_the_hours_of_a_day_are_those_of_its_minutes(where: tuple[datetime.date, str]) -> None:
    """Oracle: every quarter of an hour, looked up."""
    day, zone = where
    noon = int(datetime.datetime.combine(day, datetime.time(12), datetime.UTC).timestamp())
    seen = [shown((noon + 900 * quarter) * 1000, day, zone) for quarter in range(-160, 160)]
    minutes = {hour: 15 * seen.count(hour) for hour in range(24)}
    assert left_out(day, zone) == [hour for hour, n in minutes.items() if n == 0]
    assert shown_twice(day, zone) == [hour for hour, n in minutes.items() if n > 60]
