"""Which rows are an interval's, what was delivered of it, and what is new in its columns.

Oracles: the table that was written and pandas' own way from times to hours.
"""

import datetime
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data import Logs
from trainer.errors import UserError
from trainer.files import Files
from trainer.intervals import Interval
from trainer.lanes import DayPlan, RowGroup
from trainer.schema import Schema

DAY = datetime.date(2026, 10, 25)  # Berlin's clock shows two o'clock twice
NEXT = DAY + datetime.timedelta(days=1)
ZONE = "Europe/Berlin"
SCHEMA = Schema({"user": "user_id"}, {"price": "price"}, {"click": "click"}, group="request_id", keys=("row",))


def rows(count: int, day: datetime.date = DAY, zone: str = ZONE, seed: int = 0, hours: Any = None) -> pd.DataFrame:
    """Rows at times all over a day, in no order; hours: those of the clock that have any."""
    start = pd.Timestamp(day, tz=zone)
    seconds = int((pd.Timestamp(day + datetime.timedelta(days=1), tz=zone) - start).total_seconds())
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"at": start + pd.to_timedelta(rng.integers(0, seconds, 60 * count), "s")})
    if hours is not None:
        frame = frame[frame["at"].dt.hour.isin(hours)]
    frame = frame[:count].reset_index(drop=True)
    of = {"row": range(count), "user_id": range(count), "price": rng.random(count), "click": rng.integers(0, 2, count)}
    return frame.assign(**of, request_id=np.arange(count) // 4, ts_ms=frame["at"].astype("int64") // 10**3)


def write(folder: Path, frame: pd.DataFrame, name: str = "part-0.parquet", row_group_size: int = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    frame = frame.assign(ts_ms=frame["at"].dt.tz_convert("UTC").dt.as_unit("ms").astype("int64"))
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), folder / name, row_group_size=row_group_size)
    return folder / name


def read(logs: Logs, plan: DayPlan, **options: Any) -> list[int]:
    """The `row` of each row of a plan, in the order of their places in it."""
    batches = list(logs.read(plan, batch_size=40, lanes=4, seed=1, **options))
    found = {
        place: row["row"]
        for batch in batches
        for place, row in zip(batch.row_B.tolist(), batch.keys.to_pylist(), strict=True)
    }
    assert sorted(found) == list(range(len(found))), "places are counted within the interval"
    return [found[place] for place in range(len(found))]


# Hours by a clock.


@pytest.mark.parametrize("column", ["ts_ms", "at"])
def test_a_day_is_parted_into_the_hours_that_the_clock_shows(tmp_path: Path, column: str) -> None:
    frame = rows(900)
    write(tmp_path / f"day={DAY}", frame[:500], "a.parquet")
    write(tmp_path / f"day={DAY}", frame[500:], "b.parquet", row_group_size=333)
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time=column, time_zone=ZONE)
    found = logs.intervals()
    assert found == [Interval(DAY, hour) for hour in sorted(set(frame["at"].dt.hour))]
    plans = {interval: logs.plan(interval) for interval in found}
    for interval, plan in plans.items():
        assert read(logs, plan) == frame[frame["at"].dt.hour == interval.hour]["row"].tolist()
    twice = f"the clock of {ZONE} shows hour 2 twice: both are one interval"
    assert [interval.hour for interval, plan in plans.items() if twice in plan.notes] == [2]
    assert plans[Interval(DAY, 2)].num_rows > 1.4 * 900 / 25, "about two hours of rows"


def test_an_hour_is_the_same_for_any_number_of_workers_and_resumes(tmp_path: Path) -> None:
    frame = rows(2_000, hours=[7, 8])
    write(tmp_path / f"day={DAY}", frame, row_group_size=300)
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="ts_ms", time_zone=ZONE)
    plan = logs.plan(Interval(DAY, 8))

    def steps(workers: int, **options: Any) -> list[list[int]]:
        shares = [
            [
                b.row_B.tolist()
                for b in logs.read(plan, batch_size=64, lanes=6, seed=1, rank=r, num_workers=workers, **options)
            ]
            for r in range(workers)
        ]
        return [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]

    for whole_groups in (False, True):
        alone = steps(1, whole_groups=whole_groups)
        assert steps(3, whole_groups=whole_groups) == alone
        assert steps(2, whole_groups=whole_groups, start_step=5) == alone[5:]


def test_hours_of_one_day_are_shuffled_in_orders_of_their_own(tmp_path: Path) -> None:
    frame = pd.concat([rows(100, hours=[7]), rows(100, hours=[8])])
    write(tmp_path / f"day={DAY}", frame, row_group_size=200)
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="ts_ms", time_zone=ZONE)
    plans = [logs.plan(Interval(DAY, hour)) for hour in (7, 8)]
    orders = [
        [row for b in logs.read(plan, batch_size=9, lanes=1, seed=1) for row in b.row_B.tolist()] for plan in plans
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100)) and orders[0] != orders[1]


def test_planning_hours_reads_no_column_but_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / f"day={DAY}", rows(400))
    asked: list[tuple[str, ...]] = []
    whole = Files.whole

    def noted(self: Files, group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        asked.append(tuple(columns or ()))
        return whole(self, group, columns)

    monkeypatch.setattr(Files, "whole", noted)
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="ts_ms", time_zone=ZONE)
    for interval in logs.intervals():
        logs.plan(interval)
    assert asked == [("ts_ms",)] * 4, "each row group's times once, for all hours"


def test_a_row_group_is_decoded_only_for_the_hours_that_it_has_rows_in(tmp_path: Path) -> None:
    frame = pd.concat([rows(100, hours=[3]), rows(100, hours=[9])])
    write(tmp_path / f"day={DAY}", frame)
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="ts_ms", time_zone=ZONE)
    assert [group.index for group in logs.plan(Interval(DAY, 3)).row_groups] == [0]
    assert [group.index for group in logs.plan(Interval(DAY, 9)).row_groups] == [1]


def test_an_hour_without_a_row_between_others_is_not_missing_and_a_day_without_a_folder_is(tmp_path: Path) -> None:
    last = NEXT + datetime.timedelta(days=1)
    for day in (DAY, last):
        write(tmp_path / f"day={day}", rows(50, day, hours=[5, 22]))
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="ts_ms", time_zone=ZONE)
    assert logs.intervals() == [Interval(DAY, 5), Interval(DAY, 22), Interval(last, 5), Interval(last, 22)]
    assert list(logs.missing(Interval(DAY, 5), Interval(last, 22))) == [Interval(NEXT)]


@pytest.mark.parametrize(
    ("value", "got"), [(None, "None"), (pd.Timestamp("2026-10-26 12:00", tz=ZONE), "2026-10-26"), (pd.NaT, "None")]
)
def test_a_row_without_a_time_on_its_day_stops_with_its_place(tmp_path: Path, value: Any, got: str) -> None:
    frame = rows(50).drop(columns="ts_ms")
    frame.loc[17, "at"] = value
    (tmp_path / f"day={DAY}").mkdir()
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / f"day={DAY}" / "a.parquet", row_group_size=10)
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="at", time_zone=ZONE)
    text = f"(?s)a.parquet, row group 1, column 'at', row 7: no time on the day.*got {got}.*in {ZONE}.*data.time_zone"
    with pytest.raises(UserError, match=text):
        logs.intervals()


def test_an_error_in_an_hour_names_the_row_of_the_file(tmp_path: Path) -> None:
    frame = rows(200)
    frame.loc[150, "price"] = float("inf")
    write(tmp_path / f"day={DAY}", frame)
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="ts_ms", time_zone=ZONE)
    hour = int(frame["at"][150].hour)
    with pytest.raises(UserError, match="part-0.parquet, row group 1, column 'price', row 50: not a finite number"):
        read(logs, logs.plan(Interval(DAY, hour)))


# Hours that have folders.


def by_folders(root: Path, folders: list[str], day: datetime.date = DAY) -> Logs:
    for number, folder in enumerate(folders):
        write(root / f"day={day}" / folder, rows(10, seed=number).assign(row=number * 10 + np.arange(10)))
    return Logs(str(root), "day", SCHEMA, by_hour=True, time_zone=ZONE)


def test_hours_are_their_folders_with_one_digit_or_two(tmp_path: Path) -> None:
    logs = by_folders(tmp_path, ["hour=0", "hour=00", "hour=7", "hour=23"])
    assert logs.intervals() == [Interval(DAY, 0), Interval(DAY, 7), Interval(DAY, 23)]
    assert read(logs, logs.plan(Interval(DAY, 0))) == list(range(20)), "both folders are the hour's"
    assert read(logs, logs.plan(Interval(DAY, 7))) == list(range(20, 30))
    files = [file["file"] for file in logs.plan(Interval(DAY, 0)).delivery]
    assert files == ["hour=0/part-0.parquet", "hour=00/part-0.parquet"]


def test_an_hour_without_a_folder_is_missing_unless_the_clock_leaves_it_out(tmp_path: Path) -> None:
    logs = by_folders(tmp_path, [f"hour={hour:02d}" for hour in (0, 1, 3, 5)], datetime.date(2026, 3, 29))
    spring = datetime.date(2026, 3, 29)  # the clock goes from 2 to 3
    assert list(logs.missing(Interval(spring, 0), Interval(spring, 5))) == [Interval(spring, 4)]
    assert "leaves out hour 2" in logs.plan(Interval(spring, 3)).notes[0]


@pytest.mark.parametrize("folder", ["hour=24", "hour=1pm", "hour=", "hour=123"])
def test_a_folder_that_is_no_hour_is_told(tmp_path: Path, folder: str) -> None:
    logs = by_folders(tmp_path, ["hour=00", folder])
    with pytest.raises(UserError, match=f"(?s)day={DAY}/{folder}: not an hour.*expected hour=00 .. hour=23.*-> rename"):
        logs.intervals()


def test_days_without_folders_of_hours_are_told_with_the_ways_out(tmp_path: Path) -> None:
    write(tmp_path / f"day={DAY}", rows(10))
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True)
    with pytest.raises(
        UserError, match="(?s)no hours found.*expected folders such as.*hour=13.*data.time.*period: day"
    ):
        logs.intervals()


@pytest.mark.parametrize(("by_hour", "interval"), [(True, Interval(DAY)), (False, Interval(DAY, 3))])
def test_an_interval_of_the_other_sort_is_refused(tmp_path: Path, by_hour: bool, interval: Interval) -> None:
    write(tmp_path / f"day={DAY}", rows(10))
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=by_hour, time="ts_ms" if by_hour else None, time_zone=ZONE)
    with pytest.raises(UserError, match=f"(?s){interval.words} is no interval of this model.*expected a"):
        logs.plan(interval)


# What was delivered.


def test_a_delivery_names_each_file_with_its_bytes_rows_and_footer(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"day={DAY}", rows(n), f"{n}.parquet") for n in (30, 7)]
    expected = []
    for path in sorted(paths):
        content = path.read_bytes()
        footer = content[
            -8 - int.from_bytes(content[-8:-4], "little") :
        ]  # the Parquet format: footer, its length, PAR1
        expected.append({
            "file": path.name,
            "bytes": len(content),
            "rows": pq.read_metadata(path).num_rows,
            "footer": hashlib.sha256(footer).hexdigest()[:32],
        })  # fmt: skip
    assert list(Logs(str(tmp_path), "day", SCHEMA).plan(Interval(DAY)).delivery) == expected


def test_the_delivery_of_an_hour_is_of_the_files_that_have_rows_in_it(tmp_path: Path) -> None:
    write(tmp_path / f"day={DAY}", rows(40, hours=[3, 4]), "a.parquet")
    write(tmp_path / f"day={DAY}", rows(20, hours=[4]), "b.parquet")
    logs = Logs(str(tmp_path), "day", SCHEMA, by_hour=True, time="ts_ms", time_zone=ZONE)
    three, four = (logs.plan(Interval(DAY, hour)).delivery for hour in (3, 4))
    assert [file["file"] for file in three] == ["a.parquet"] and [f["file"] for f in four] == ["a.parquet", "b.parquet"]
    assert three[0]["rows"] + four[0]["rows"] == 40 and four[1]["rows"] == 20


def test_a_file_that_changes_after_it_was_planned_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / f"day={DAY}", rows(40))
    logs = Logs(str(tmp_path), "day", SCHEMA)
    plan = logs.plan(Interval(DAY))
    write(tmp_path / f"day={DAY}", rows(41))
    with pytest.raises(UserError, match="(?s)row group 0: a row group is not what it was.*got 41 rows.*expected 40"):
        read(logs, plan)


# What is new in the columns.


def drifting(root: Path, second: pd.DataFrame, **options: Any) -> DayPlan:
    """The plan of a day after one with the columns of rows()."""
    write(root / f"day={DAY}", rows(20))
    write(root / f"day={NEXT}", second)
    return Logs(str(root), "day", SCHEMA, **options).plan(Interval(NEXT), Interval(DAY))


def test_a_new_column_is_ignored_and_told(tmp_path: Path) -> None:
    plan = drifting(tmp_path, rows(30, NEXT).assign(colour="red"))
    assert len(plan.notes) == 1 and plan.notes[0].startswith("column 'colour' is new") and plan.num_rows == 30


def test_columns_as_before_and_a_first_day_have_no_notes(tmp_path: Path) -> None:
    assert drifting(tmp_path, rows(30, NEXT)).notes == ()
    assert Logs(str(tmp_path), "day", SCHEMA).plan(Interval(NEXT)).notes == ()


def test_a_type_that_means_the_same_is_told(tmp_path: Path) -> None:
    frame = rows(30, NEXT)
    (note,) = drifting(tmp_path, frame.assign(click=frame["click"].astype("float32"))).notes
    assert note == "column 'click' is of type float, and was of int64: it is read as before"


@pytest.mark.parametrize("column", ["user_id", "request_id"])
def test_ids_that_were_integers_and_are_strings_are_an_error(tmp_path: Path, column: str) -> None:
    frame = rows(30, NEXT)
    text = (
        f"(?s)day={NEXT}: the ids of column '{column}' are of another sort.*got strings.*expected integers.*new model"
    )
    with pytest.raises(UserError, match=text):
        drifting(tmp_path, frame.assign(**{column: frame[column].astype(str)}), max_bad_rows=0.5)


def test_files_of_a_day_that_disagree_about_the_sort_of_an_id_are_refused(tmp_path: Path) -> None:
    write(tmp_path / f"day={DAY}", rows(20), "a.parquet")
    frame = rows(20)
    write(tmp_path / f"day={DAY}", frame.assign(user_id=frame["user_id"].astype(str)), "b.parquet")
    with pytest.raises(
        UserError, match="(?s)b.parquet: the ids of column 'user_id' are of another sort.*the day's first"
    ):
        Logs(str(tmp_path), "day", SCHEMA).plan(Interval(DAY))


def test_a_column_of_another_kind_is_an_error(tmp_path: Path) -> None:
    frame = rows(30, NEXT)
    with pytest.raises(UserError, match="(?s)column 'price' of feature 'price' has the wrong type.*got .*string"):
        drifting(tmp_path, frame.assign(price=frame["price"].astype(str)))
