"""What a night has to train, and what came late. Oracle: lists written out by hand over folders of tiny days."""

import datetime
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data import Logs
from trainer.delivery import Delivery
from trainer.due import Due, due
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.late import late
from trainer.schema import Schema

SCHEMA = Schema({"user": "user"}, {}, {"click": "click"})
NOTHING: list[int] = []


def day(number: int) -> datetime.date:
    return datetime.date(2026, 11, number)


def days(*numbers: int) -> list[Interval]:
    return [Interval(day(number)) for number in numbers]


def hours(number: int, *of: int) -> list[Interval]:
    return [Interval(day(number), hour) for hour in of]


def deliver(
    root: Path, number: int, folder: str = "", name: str = "a", rows: int = 3, hours: Sequence[int] = ()
) -> None:
    """A file of a day, or of a folder of it; with hours: that many rows at each of these."""
    at = [pd.Timestamp(day(number), tz="UTC") + pd.Timedelta(hours=hour) for hour in hours for _ in range(rows)]
    count = len(at) or rows
    content = {
        "user": range(count),
        "click": [0] * count,
        "at": pa.array(at or [None] * count, pa.timestamp("us", "UTC")),
    }
    path = root / f"day={day(number)}" / folder / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(content), path, compression="none")


def by_days(root: Path, *numbers: int) -> Logs:
    for number in numbers:
        deliver(root, number)
    return Logs(str(root), "day", SCHEMA)


def planned(found: Due) -> list[Interval]:
    return [plan.interval for plan in found.plans]


# What is due.


def test_the_days_after_the_newest_trained_one_are_due_within_the_options(tmp_path: Path) -> None:
    logs = by_days(tmp_path, 1, 2, 3, 4, 5)
    assert planned(due(logs, [], None, None)) == days(1, 2, 3, 4, 5)
    assert planned(due(logs, days(1, 2), None, None)) == days(3, 4, 5)
    assert planned(due(logs, days(1, 2), *days(1, 4))) == days(3, 4)
    assert planned(due(logs, days(2), *days(4, 4))) == days(4)
    assert planned(due(logs, days(5), None, None)) == [] == planned(due(logs, days(3), None, days(2)[0]))


@pytest.mark.parametrize(
    ("there", "trained", "first", "through", "missing"),
    [
        ((1, 3), (), None, None, 2),
        ((1, 2, 4), (1,), None, None, 3),
        ((1, 2), (), None, 3, 3),
        ((2, 3), (), 1, None, 1),
        ((1, 3), (1,), None, 3, 2),
        ((1,), (1,), None, 2, 2),
    ],
)
def test_a_gap_stops_the_night_or_is_skipped_and_named(
    tmp_path: Path, there: Any, trained: Any, first: int | None, through: int | None, missing: int
) -> None:
    logs = by_days(tmp_path, *there)
    options = days(first)[0] if first else None, days(through)[0] if through else None
    with pytest.raises(UserError, match=f"(?s)day 2026-11-0{missing} is missing.*got days 2026-11-0{there[0]} .. 2026"):
        due(logs, days(*trained), *options)
    found = due(logs, days(*trained), *options, skip_missing=True)
    assert found.skipped == days(missing)
    assert planned(found) == [i for i in days(*there) if i not in days(*trained)]


def test_an_interval_without_rows_is_skipped_as_one_that_is_missing(tmp_path: Path) -> None:
    logs = by_days(tmp_path, 1, 3)
    (tmp_path / f"day={day(2)}").mkdir()
    with pytest.raises(UserError, match="day 2026-11-02 is empty"):
        due(logs, [], None, None)
    found = due(logs, [], None, None, skip_missing=True)
    assert planned(found) == days(1, 3) and found.skipped == days(2)


@pytest.mark.parametrize("delay", [0, 1, 2, 4, 5, 9])
def test_a_day_is_due_when_its_labels_are_complete(tmp_path: Path, delay: int) -> None:
    logs = by_days(tmp_path, 1, 2, 3, 4, 5)
    found = due(logs, days(1), None, None, label_delay_days=delay)
    ripe = [number for number in (2, 3, 4, 5) if number + delay <= 5]
    assert planned(found) == days(*ripe)
    assert found.waiting == [day(number) for number in (2, 3, 4, 5) if number not in ripe]


def test_a_day_that_is_asked_for_waits_too_while_its_labels_are_not_complete(tmp_path: Path) -> None:
    logs = by_days(tmp_path, 1, 2, 3)
    found = due(logs, [], None, days(2)[0], label_delay_days=2)
    assert planned(found) == days(1) and found.waiting == [day(2)]


def test_hours_of_folders_are_due_over_the_ends_of_days(tmp_path: Path) -> None:
    for number, hour in [(1, 22), (1, 23), (2, 0), (2, 2)]:
        deliver(tmp_path, number, f"hour={hour:02d}")
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True)
    with pytest.raises(UserError, match="hour 2026-11-02T01 is missing"):
        due(logs, hours(1, 22), None, None)
    found = due(logs, hours(1, 22), None, None, skip_missing=True)
    assert planned(found) == [*hours(1, 23), *hours(2, 0, 2)] and found.skipped == hours(2, 1)
    assert planned(due(logs, [], None, days(1)[0])) == hours(1, 22, 23), "a day ends with its last hour"


def test_a_day_as_the_end_of_hours_is_its_last_hour_and_as_the_start_its_first(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        deliver(tmp_path, number, hours=[1, 5, 23])
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="at")
    assert planned(due(logs, [], *days(2, 2))) == hours(2, 1, 5, 23)
    assert planned(due(logs, hours(1, 5), None, hours(2, 1)[0])) == [*hours(1, 23), *hours(2, 1)]
    assert planned(due(logs, hours(2, 1), None, None, label_delay_days=1)) == hours(2, 5, 23)


def test_a_model_that_goes_from_days_to_hours_and_back_goes_on_with_the_next_day(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        deliver(tmp_path, number, hours=[0, 5])
    by_hour = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="at")
    assert planned(due(by_hour, days(1), None, None)) == [*hours(2, 0, 5), *hours(3, 0, 5)]
    assert planned(due(Logs(str(tmp_path), "day", SCHEMA), hours(1, 5), None, None)) == days(2, 3)


def test_an_hour_asked_of_a_model_of_days_is_refused(tmp_path: Path) -> None:
    logs = by_days(tmp_path, 1)
    for options, option in [((hours(1, 3)[0], None), "--from"), ((None, hours(1, 3)[0]), "--through")]:
        with pytest.raises(UserError, match=f"(?s)^{option}: an hour of a model that is trained by days.*T03"):
            due(logs, [], *options)


def test_columns_are_compared_along_the_chain_that_is_trained(tmp_path: Path) -> None:
    by_days(tmp_path, 1, 2, 3)
    path = tmp_path / f"day={day(2)}" / "a.parquet"
    pq.write_table(pq.read_table(path, partitioning=None).append_column("new", pa.array([1, 2, 3])), path)
    logs = Logs(str(tmp_path), "day", SCHEMA)
    assert [len(plan.notes) for plan in due(logs, days(1), None, None).plans] == [1, 0]
    assert [len(plan.notes) for plan in due(logs, [], *days(2, 3)).plans] == [0, 0]


# What came late.


def known(logs: Logs, intervals: Sequence[Interval]) -> dict[Interval, Delivery]:
    return {interval: logs.plan(interval).delivery for interval in intervals}


def told(logs: Logs, trained: dict[Interval, Delivery]) -> list[tuple[str, str]]:
    """By a reader that has not seen the files before."""
    fresh = Logs(logs.path, "day", SCHEMA, by_hour=logs.by_hour, time="at" if logs.parts_days else None)
    return [(each.interval.name, each.what) for each in late(fresh, trained, list(trained))]


def test_a_day_that_is_as_it_was_is_not_late(tmp_path: Path) -> None:
    logs = by_days(tmp_path, 1, 2, 3)
    trained = known(logs, days(1, 2))
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))  # the same files, at other times
    os.utime(tmp_path / f"day={day(1)}" / "a.parquet", (0, 0))
    assert told(logs, trained) == []
    assert told(Logs(str(tmp_path.with_name("copy")), "day", SCHEMA), trained) == []


def test_a_day_that_is_delivered_again_is_told_with_what_changed(tmp_path: Path) -> None:
    logs = by_days(tmp_path, 1, 2, 3, 4, 5)
    deliver(tmp_path, 3, name="b")
    trained = known(logs, days(1, 2, 3, 4))
    deliver(tmp_path, 1, rows=4)
    deliver(tmp_path, 2, name="late")
    (tmp_path / f"day={day(3)}" / "a.parquet").unlink()
    shutil.rmtree(tmp_path / f"day={day(4)}")  # old logs are removed: that is no delivery
    again = "delivered again: {}.parquet is {}"
    assert told(logs, trained) == [
        ("2026-11-01", again.format("a", "another")),
        ("2026-11-02", again.format("late", "new")),
        ("2026-11-03", again.format("a", "gone")),
    ]


def test_a_file_of_the_same_size_with_other_values_is_another(tmp_path: Path) -> None:
    logs = by_days(tmp_path, 1)
    trained, path = known(logs, days(1)), tmp_path / f"day={day(1)}" / "a.parquet"
    size = path.stat().st_size
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.set_column(0, "user", pa.array([7, 8, 9])), path, compression="none")
    assert path.stat().st_size == size and told(logs, trained) == [
        ("2026-11-01", "delivered again: a.parquet is another")
    ]


def test_a_day_that_is_delivered_after_a_later_one_was_trained_is_told_once_it_has_rows(tmp_path: Path) -> None:
    logs = by_days(tmp_path, 1, 3)
    trained = known(logs, days(1, 3))
    (tmp_path / f"day={day(2)}").mkdir()
    assert told(logs, trained) == []
    deliver(tmp_path, 2)
    deliver(tmp_path, 4)
    assert told(logs, trained) == [("2026-11-02", "delivered only after a later one was trained")]


def test_a_day_whose_checkpoint_was_removed_is_not_taken_for_one_that_came_late(tmp_path: Path) -> None:
    logs = by_days(tmp_path, 1, 2, 3)
    assert late(logs, known(logs, days(1, 3)), days(1, 2, 3)) == []


def test_hours_by_a_clock_are_late_where_a_new_file_has_rows(tmp_path: Path) -> None:
    deliver(tmp_path, 1, hours=[1, 2])
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="at")
    trained = known(logs, hours(1, 1, 2))
    deliver(tmp_path, 1, name="later", hours=[3, 4])
    assert told(logs, trained) == [], "the day goes on"
    trained |= known(Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="at"), hours(1, 4))
    deliver(tmp_path, 1, name="late", hours=[2])
    new, unseen = "delivered again: late.parquet is new", "delivered only after a later one was trained"
    assert told(logs, trained) == [("2026-11-01T02", new), ("2026-11-01T03", unseen)]


def test_hours_by_a_clock_are_late_when_their_file_is_another(tmp_path: Path) -> None:
    deliver(tmp_path, 1, hours=[1, 2])
    deliver(tmp_path, 2, hours=[1])
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="at")
    trained = known(logs, [*hours(1, 1, 2), *hours(2, 1)])
    deliver(tmp_path, 1, rows=5, hours=[1, 2])
    assert [name for name, _ in told(logs, trained)] == ["2026-11-01T01", "2026-11-01T02"]


def test_a_day_of_hours_that_is_delivered_again_without_times_is_told_and_is_no_error(tmp_path: Path) -> None:
    deliver(tmp_path, 1, hours=[1, 2])
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="at")
    trained = known(logs, hours(1, 1, 2))
    deliver(tmp_path, 1, name="late")  # its times are null
    assert told(logs, trained) == [("2026-11-01T01", "delivered again, and cannot be read: no time on the day")]
