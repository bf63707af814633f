"""Whole nights over logs as they are: late, delayed, malformed, drifting, by the hour. In this process, without Ray."""

import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import CONFIG, Run

from cluster.simulate import simulate

pytestmark = pytest.mark.slow
FIRST = datetime.date(2026, 11, 1)
DAYS = [str(FIRST + datetime.timedelta(days=number)) for number in range(4)]
PART = "part-0.parquet"


@pytest.fixture(scope="module")
def simulated_days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("days")
    simulate(str(out), days=4, start=FIRST, users=60, items=40, rows_per_day=800, seed=0)
    return out / "logs"


class Case:
    """A copy of the logs, a configuration over them, and nights."""

    def __init__(self, folder: Path, logs: Path, run: Run):
        self.folder, self.logs, self._run = folder, folder / "logs", run
        shutil.copytree(logs, self.logs)
        text = CONFIG.replace("LOGS", str(self.logs)).replace("ROOT", str(folder))
        (folder / "small.yaml").write_text(text.replace("workers: 2", "workers: 1"))

    def run(self, verb: str = "nightly", *options: str, code: int = 0, **sets: Any) -> dict[str, Any]:
        set_ = [word for key, value in sets.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
        no_ray = [] if verb == "status" else ["--no-ray"]
        ended = self._run(verb, str(self.folder / "small.yaml"), *no_ray, "--json", *options, *set_)
        assert ended.code == code, ended.err
        return ended.json

    def path(self, day: str, name: str = PART) -> Path:
        return self.logs / f"day={day}" / name

    def table(self, day: str, name: str = PART) -> pa.Table:
        return pq.read_table(self.path(day, name), partitioning=None)

    def hide(self, *days: str) -> None:
        for day in days:
            (self.logs / f"day={day}").rename(self.folder / day)

    def deliver(self, *days: str) -> None:
        for day in days:
            (self.folder / day).rename(self.logs / f"day={day}")

    def manifest(self, folder: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "checkpoints/small" / folder / "manifest.json").read_text())
        return found


@pytest.fixture
def case(tmp_path: Path, simulated_days: Path, daybreak: Run) -> Case:
    return Case(tmp_path, simulated_days, daybreak)


def metrics(report: dict[str, Any]) -> dict[str, Any]:
    return {day["day"]: day["metrics"] for day in report["days"]}


def column(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(name), name, pa.array(values))


# Late rows.


def test_a_day_that_is_delivered_again_is_told_by_the_night_and_by_status_and_left_as_it_is(case: Case) -> None:
    case.run()
    shutil.copy(case.path(DAYS[1]), case.path(DAYS[1], "late.parquet"))
    late = [{"day": DAYS[1], "what": "delivered again: late.parquet is new"}]
    again = case.run()
    assert again["late"] == case.run("status")["late"] == late
    assert not any(day["trained"] for day in again["days"])


def test_with_retrain_the_night_goes_back_and_ends_as_if_the_late_rows_had_been_there(
    case: Case, tmp_path: Path, daybreak: Run
) -> None:
    case.run()
    for day in DAYS[1:3]:
        pq.write_table(case.table(day).slice(0, 40), case.path(day, "late.parquet"))
    (tmp_path / "whole").mkdir()
    expected = Case(tmp_path / "whole", case.logs, daybreak).run()  # oracle: a model that saw all of it from the start
    report = case.run(nightly__late="retrain")
    assert [day["trained"] for day in report["days"]] == [False, True, True, True]
    assert metrics(report) == metrics(expected) and [day["rows"] for day in report["days"]] == [800, 840, 840, 800]
    reasons = [entry["reason"] for entry in case.run("status", "--day", DAYS[1])["entries"]]
    assert f"nightly.late: {DAYS[1]} was delivered again: late.parquet is new" in reasons
    calm = case.run(nightly__late="retrain")
    assert calm["late"] == [] and not any(day["trained"] for day in calm["days"])


def test_a_day_that_comes_after_a_later_one_was_trained_is_gone_back_to(case: Case) -> None:
    case.hide(DAYS[1])
    skipping = {"nightly__missing_days": "skip"}
    report = case.run(**skipping)
    assert [day["day"] for day in report["days"]] == [DAYS[0], *DAYS[2:]] and report["skipped"] == [DAYS[1]]
    case.deliver(DAYS[1])
    what = "delivered only after a later one was trained"
    assert case.run(**skipping)["late"] == [{"day": DAYS[1], "what": what}]
    report = case.run(**skipping, nightly__late="retrain")
    assert [(day["day"], day["trained"]) for day in report["days"]] == [
        (DAYS[0], False),
        *((d, True) for d in DAYS[1:]),
    ]


# Labels that are complete only later.


def test_a_day_is_trained_when_its_labels_are_complete_and_the_model_is_the_same(
    case: Case, tmp_path: Path, daybreak: Run
) -> None:
    case.hide(*DAYS[2:])
    report = case.run(data__label_delay_days=2)
    assert report["days"] == [] and report["waiting"] == DAYS[:2]
    case.deliver(DAYS[2])
    report = case.run(data__label_delay_days=2)
    assert [day["day"] for day in report["days"]] == DAYS[:1] and report["waiting"] == DAYS[1:3]
    case.deliver(DAYS[3])
    report = case.run(data__label_delay_days=2)
    assert [day["trained"] for day in report["days"]] == [False, True]
    (tmp_path / "at once").mkdir()
    at_once = Case(tmp_path / "at once", case.logs, daybreak).run("nightly", "--through", DAYS[1])
    assert metrics(report) == metrics(at_once)


# Malformed rows and files.


def test_bad_rows_are_set_aside_told_and_trained_around(case: Case, tmp_path: Path, daybreak: Run) -> None:
    good, rows = case.table(DAYS[1]), case.table(DAYS[1]).num_rows
    pq.write_table(column(column(good, "click", 7, 5), "price", 60, -2.0), case.path(DAYS[1]))
    stopped = case.run(code=2)
    assert "column 'price', row 60: log1p is not defined" in stopped["error"]
    report = case.run(data__max_bad_rows=0.01)
    day = report["days"][1]
    assert day["rows"] == 798 and (day["quarantine"]["rows"], day["quarantine"]["files"]) == (2, 0)
    told = {(each["column"], each["reason"]): each["rows"] for each in day["quarantine"]["reasons"]}
    assert told == {
        ("click", "not the label of a task with loss: bce"): 1,
        ("price", "log1p is not defined here"): 1,
    }
    kept = pq.read_table(
        case.folder / f"checkpoints/small/quarantine/day={DAYS[1]}/rows-0000.parquet", partitioning=None
    )
    assert sorted(zip(kept["_row"].to_pylist(), kept["_column"].to_pylist(), strict=True)) == [
        (7, "click"),
        (60, "price"),
    ]
    # oracle: a day that never had these rows
    (tmp_path / "clean").mkdir()
    clean = Case(tmp_path / "clean", case.logs, daybreak)
    pq.write_table(good.filter(pa.array(~np.isin(np.arange(rows), (7, 60)))), clean.path(DAYS[1]))
    assert metrics(report) == metrics(clean.run())


def test_too_many_bad_rows_stop_the_night_before_training_and_leave_the_day_before(case: Case) -> None:
    case.run("nightly", "--through", DAYS[0])
    table = case.table(DAYS[1])
    for row in range(0, 80, 2):
        table = column(table, "click", row, 5)
    pq.write_table(table, case.path(DAYS[1]))
    stopped = case.run(data__max_bad_rows=0.01, code=2)
    assert (
        f"day {DAYS[1]}: too many malformed rows\n  got 5.00% of the rows; the first: not the label" in stopped["error"]
    )
    status = case.run("status")
    assert status["champion"] == DAYS[0] and [day["day"] for day in status["days"]] == [DAYS[0]]
    assert not (case.folder / "checkpoints/small/quarantine").exists()


def test_a_bad_file_is_set_aside_and_when_it_is_delivered_whole_the_day_is_late(case: Case) -> None:
    extra = case.path(DAYS[1], "extra.parquet")
    pq.write_table(case.table(DAYS[1]).slice(0, 30), extra)
    whole = extra.read_bytes()
    extra.write_bytes(whole[:-9])
    report = case.run(data__max_bad_rows=0.4)
    [bad] = report["days"][1]["quarantine"]["bad_files"]
    assert bad["file"] == str(extra) and bad["reason"].startswith("not a readable Parquet file")
    assert report["days"][1]["rows"] == 800 and case.run(data__max_bad_rows=0.4)["late"] == []
    extra.write_bytes(whole)
    assert case.run(data__max_bad_rows=0.4)["late"] == [
        {"day": DAYS[1], "what": "delivered again: extra.parquet is another"}
    ]


# Columns that change.


def test_a_new_column_is_told_and_ids_that_become_texts_stop_the_night(case: Case) -> None:
    for path in (case.logs / f"day={DAYS[1]}").glob("*.parquet"):
        table = pq.read_table(path, partitioning=None)
        pq.write_table(table.append_column("colour", pa.array(["red"] * table.num_rows)), path)
    for path in (case.logs / f"day={DAYS[3]}").glob("*.parquet"):
        table = pq.read_table(path, partitioning=None)
        items = pc.cast(table["item_id"], pa.string())
        pq.write_table(table.set_column(table.column_names.index("item_id"), "item_id", items), path)
    report = case.run("nightly", "--through", DAYS[2])
    assert [day["notes"] for day in report["days"]] == [
        [], ["column 'colour' is new, of type string: nothing reads it"], []
    ]  # fmt: skip
    assert "the ids of column 'item_id' are of another sort" in case.run(code=2)["error"]


# By the hour.


@pytest.fixture
def hourly(case: Case) -> Case:
    """Two days whose rows say at which of a few hours they were, and once more in folders of hours."""
    shutil.rmtree(case.logs / f"day={DAYS[2]}")
    shutil.rmtree(case.logs / f"day={DAYS[3]}")
    for number, day in enumerate(DAYS[:2]):
        midnight = datetime.datetime.combine(FIRST + datetime.timedelta(days=number), datetime.time(), datetime.UTC)
        paths = sorted((case.logs / f"day={day}").glob("*.parquet"))
        table = pa.concat_tables([pq.read_table(path, partitioning=None) for path in paths])
        hours = np.sort(np.random.default_rng(number).choice([0, 7, 23], table.num_rows))
        ms = int(midnight.timestamp() * 1000) + hours * 3_600_000 + 60_000
        table = table.append_column("at_ms", pa.array(ms))
        for path in paths:
            path.unlink()
        pq.write_table(table, case.path(day), row_group_size=100)
        for hour in (0, 7, 23):
            folder = case.folder / "by_folder" / f"day={day}" / f"hour={hour}"
            folder.mkdir(parents=True)
            pq.write_table(table.filter(pa.array(hours == hour)), folder / PART, row_group_size=10_000)
    return case


HOURS = [f"{day}T{hour:02d}" for day in DAYS[:2] for hour in (0, 7, 23)]
BY_HOUR = {"data__period": "hour", "data__time": "at_ms"}


def test_a_model_of_hours_scores_each_hour_before_it_trains_on_it(hourly: Case) -> None:
    report = hourly.run(**BY_HOUR)
    assert [day["day"] for day in report["days"]] == HOURS and sum(day["rows"] for day in report["days"]) == 1600
    assert report["days"][0]["metrics"] == {} and all(day["metrics"] for day in report["days"][1:])
    assert hourly.manifest(f"day={DAYS[1]}/hour=07")["report"]["day"] == HOURS[4]
    again = hourly.run(**BY_HOUR)
    assert not any(day["trained"] for day in again["days"]) and again["late"] == []
    assert hourly.run("status", **BY_HOUR)["champion"] in HOURS


def test_hours_night_by_night_are_those_of_one_night(hourly: Case, tmp_path: Path, daybreak: Run) -> None:
    steps = [hourly.run("nightly", "--through", through, **BY_HOUR) for through in (HOURS[1], DAYS[0], HOURS[3])]
    assert [len(step["days"]) for step in steps] == [2, 3, 4]
    last = hourly.run("nightly", **BY_HOUR)
    (tmp_path / "at once").mkdir()
    at_once = Case(tmp_path / "at once", hourly.logs, daybreak).run(**BY_HOUR)
    assert metrics(last) == metrics(at_once)


def test_hours_by_folders_and_by_a_clock_are_the_same_intervals(hourly: Case, tmp_path: Path, daybreak: Run) -> None:
    by_clock = hourly.run(**BY_HOUR)
    (tmp_path / "folders").mkdir()
    folders = Case(tmp_path / "folders", hourly.folder / "by_folder", daybreak)
    stopped = folders.run(data__period="hour", code=2)
    assert f"hour {DAYS[0]}T01 is missing" in stopped["error"]
    report = folders.run(data__period="hour", nightly__missing_days="skip")
    assert [(day["day"], day["rows"]) for day in report["days"]] == [(d["day"], d["rows"]) for d in by_clock["days"]]
    assert report["skipped"][:3] == [f"{DAYS[0]}T0{hour}" for hour in (1, 2, 3)] and len(report["skipped"]) == 48 - 6


def test_predict_and_evaluate_take_an_hour(hourly: Case, tmp_path: Path) -> None:
    report = hourly.run("nightly", "--through", HOURS[4], **BY_HOUR)
    measured = hourly.run("evaluate", "--day", HOURS[4], "--model-day", HOURS[3], **BY_HOUR)
    assert measured["metrics"] == report["days"][4]["metrics"]
    said = hourly.run("predict", "--day", HOURS[5], "--out", str(tmp_path / "scores"), **BY_HOUR)
    assert said["rows"] == pq.read_table(tmp_path / "scores").num_rows > 0
    wrong = hourly.run("predict", "--day", DAYS[1], "--out", str(tmp_path / "scores"), **BY_HOUR, code=2)
    assert f"day {DAYS[1]} is no interval of this model" in wrong["error"]
    assert os.listdir(tmp_path / "scores") == ["part-00000-of-00001.parquet"]
