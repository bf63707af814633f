"""Days and hours as the keys of nights. Oracle: datetime's own arithmetic."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.intervals import Interval

DAY = datetime.date(2026, 11, 20)
dates = st.dates(max_value=datetime.date(9999, 12, 30))
moments = st.datetimes(max_value=datetime.datetime(9999, 12, 30))


def hour_of(moment: datetime.datetime) -> Interval:
    return Interval(moment.date(), moment.hour)


@given(dates)
def test_days_follow_each_other_as_the_calendar_has_them(day: datetime.date) -> None:
    interval = Interval(day)
    assert interval.next() == Interval(day + datetime.timedelta(days=1)) > interval
    assert interval.number == day.toordinal() and interval.next().number == interval.number + 1


@given(moments)
def test_hours_follow_each_other_over_the_ends_of_days(moment: datetime.datetime) -> None:
    interval, following = hour_of(moment), hour_of(moment + datetime.timedelta(hours=1))
    assert interval.next() == following > interval and following.number == interval.number + 1


@given(moments, moments)
def test_hours_are_in_the_order_of_time(one: datetime.datetime, other: datetime.datetime) -> None:
    a, b = (moment.replace(minute=0, second=0, microsecond=0) for moment in (one, other))
    assert (hour_of(a) < hour_of(b)) == (a < b) and (hour_of(a) == hour_of(b)) == (a == b)
    assert (hour_of(a).number < hour_of(b).number) == (a < b)


@given(moments)
def test_a_name_is_read_as_what_it_names(moment: datetime.datetime) -> None:
    for interval in (Interval(moment.date()), hour_of(moment)):
        assert Interval.parse(interval.name, "--day") == interval and str(interval) == interval.name


def test_names_and_folders_are_those_of_the_docs() -> None:
    day, hour = Interval(DAY), Interval(DAY, 3)
    assert (day.name, day.folder, day.words) == ("2026-11-20", "day=2026-11-20", "day 2026-11-20")
    assert (hour.name, hour.folder, hour.words) == ("2026-11-20T03", "day=2026-11-20/hour=03", "hour 2026-11-20T03")


@pytest.mark.parametrize(
    "text", ["2026-02-30", "2026-11-20T24", "2026-11-20T3", "2026-11-20T", "20261120", "today", ""]
)
def test_what_is_no_interval_is_told_with_who_said_it(text: str) -> None:
    with pytest.raises(UserError, match=f"(?s)^--from: not a day.*got '{text}'.*expected YYYY-MM-DD.*-> give a day"):
        Interval.parse(text, "--from")
