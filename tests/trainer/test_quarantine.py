"""Malformed rows and files are set aside. Oracle: the same day written without them, and a plain loop over the rows."""

import datetime
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import threads

from embeddings.exchange import Exchange, LocalExchange
from trainer.data import Logs
from trainer.errors import UserError
from trainer.files import Files
from trainer.intervals import Interval
from trainer.lanes import DayPlan
from trainer.quarantine import keep, sift, summary
from trainer.schema import Allowed, Schema
from trainer.storage import Storage

DAY, ROWS = datetime.date(2026, 11, 20), 600
TODAY = Interval(DAY)
BINARY = Allowed("loss: bce", "0, 1", lambda values: np.isin(values, (0, 1)))
SCHEMA = Schema(
    {"user": "user", "items": "items", "times": "times"},
    {"price": "price"},
    {"click": "click", "long": "watch / length"},
    {"long": "1 + length"},
    max_len={"items": 5, "times": 5},
    log1p=frozenset({"price"}),
    allowed={"click": [BINARY]},
    weight="weight",
    group="request",
    keys=("row",),
    aligned=(("items", "times"),),
)
# What may be wrong with a row, by the column and the reason that are told.
BAD: dict[tuple[str, str], dict[str, Any]] = {
    ("price", "not a finite number"): {"price": float("nan")},
    ("price", "log1p is not defined here"): {"price": -1.5},
    ("click", "not the label of a task with loss: bce"): {"click": 2.0},
    ("watch / length", "not a finite number"): {"length": 0.0},
    ("weight", "not a sample weight"): {"weight": -1.0},
    ("request", "not a group"): {"request": None},
    ("items, times", "lists that are read side by side differ in length"): {"times": [1]},
    ("items", "a list that is read beside another has gaps"): {"items": [1, None, 3]},
}


def good(rows: int = ROWS) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "row": row,
            "user": f"u{row % 40}",
            "items": [row, row + 1, row + 2],
            "times": [3, 2, 1],
            "price": None if row % 7 == 0 else float(rng.random()),
            "click": None if row % 11 == 0 else float(rng.integers(2)),
            "watch": float(rng.random()),
            "length": 2.0,
            "weight": 1.0,
            "request": row // 6,
        }
        for row in range(rows)
    ]


def spoilt(every: int = 13) -> tuple[list[dict[str, Any]], dict[int, tuple[str, str]]]:
    """Every so many rows something is wrong with one; and with which what."""
    rows, reasons = good(), {}
    for number, row in enumerate(range(3, ROWS, every)):
        reason = list(BAD)[number % len(BAD)]
        rows[row] |= BAD[reason]
        reasons[row] = reason
    rows[3 + every] |= BAD["weight", "not a sample weight"]  # two things wrong with one row: the first is told
    return rows, reasons


def write(folder: Path, rows: list[dict[str, Any]], sizes: tuple[int, ...] = (250, 350)) -> list[Path]:
    """Files of so many rows, in row groups of 100."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"items": pa.list_(pa.int64()), "times": pa.list_(pa.int64()), "request": pa.int64()}
    paths, first = [], 0
    for number, size in enumerate(sizes):
        table = pa.Table.from_pylist(rows[first : first + size])
        for name, kind in kinds.items():
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
        paths.append(folder / f"part-{number}.parquet")
        pq.write_table(table, paths[-1], row_group_size=100)
        first += size
    return paths


def open_logs(root: Path, share: float = 0.2, **options: Any) -> Logs:
    return Logs(str(root), "day", SCHEMA, max_bad_rows=share, **options)


def sifted(logs: Logs, interval: Interval = TODAY) -> DayPlan:
    return sift(LocalExchange(), logs, logs.plan(interval))


def everything(logs: Logs, plan: DayPlan, workers: int, **options: Any) -> list[list[tuple[Any, ...]]]:
    """All that is read in each step, over all workers, in an order of its own."""
    shares = [
        [
            [
                (place, keys["row"], numbers, labels, weights)
                for place, keys, numbers, labels, weights in zip(
                    batch.row_B.tolist(),
                    batch.keys.to_pylist() if batch.keys is not None else [],
                    map(str, batch.numbers_BK.tolist()),
                    map(str, batch.labels_BT.tolist()),
                    map(str, batch.weights_BT.tolist()),
                    strict=True,
                )
            ]
            for batch in logs.read(plan, batch_size=50, lanes=6, rank=rank, num_workers=workers, **options)
        ]
        for rank in range(workers)
    ]
    return [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]


# Rows.


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"seed": 1, "whole_groups": True}, {"start_step": 4}])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_what_is_left_is_read_as_a_day_without_bad_rows_by_any_number_of_workers(
    tmp_path: Path, workers: int, options: dict[str, Any]
) -> None:
    rows, reasons = spoilt()
    left = [row for row in rows if row["row"] not in reasons]
    first = sum(row["row"] < 250 for row in left)
    write(tmp_path / "bad" / f"day={DAY}", rows)
    logs = open_logs(tmp_path / "bad")
    plan = sifted(logs)
    # the same rows in the same row groups, in a day that was written without the others
    folder = tmp_path / "good" / f"day={DAY}"
    folder.mkdir(parents=True)
    for path, part in zip(write(tmp_path / "all", rows), (left[:first], left[first:]), strict=True):
        schema = pq.read_schema(path)
        with pq.ParquetWriter(folder / path.name, schema) as writer:
            start = 0 if path.name == "part-0.parquet" else 250
            for group in range(start, start + 350, 100):
                of_group = [row for row in part if group <= row["row"] < group + 100]
                if of_group:
                    writer.write_table(pa.Table.from_pylist(of_group, schema))
    clean = open_logs(tmp_path / "good", 0.0)
    assert plan.num_rows == len(left) == clean.plan(TODAY).num_rows
    assert everything(logs, plan, workers, **options) == everything(clean, clean.plan(TODAY), workers, **options)


def sift_on(exchange: Exchange, root: Path) -> tuple[Any, ...]:
    logs = open_logs(root)
    plan = sift(exchange, logs, logs.plan(TODAY))
    left_out = [None if group.left_out is None else group.left_out.tolist() for group in plan.row_groups]
    return plan.row_groups, left_out, plan.bad_rows, plan.bad_files


@pytest.mark.parametrize("workers", [2, 3, 9])
def test_any_number_of_workers_finds_the_same(tmp_path: Path, workers: int) -> None:
    write(tmp_path / f"day={DAY}", spoilt()[0])
    alone = sift_on(LocalExchange(), tmp_path)
    assert threads.run(workers, functools.partial(sift_on, root=tmp_path)) == [alone] * workers


def test_each_bad_row_is_told_once_with_its_first_reason(tmp_path: Path) -> None:
    rows, reasons = spoilt()
    write(tmp_path / f"day={DAY}", rows)
    plan = sifted(open_logs(tmp_path))
    starts = {"part-0.parquet": 0, "part-1.parquet": 250}
    found = {
        starts[Path(bad.path).name] + 100 * bad.index + row: (bad.column, bad.reason)
        for bad in plan.bad_rows
        for row in bad.rows
    }
    assert found == reasons and sum(len(bad.rows) for bad in plan.bad_rows) == len(reasons)
    told, counts = summary(plan), Counter(reasons.values())
    assert told["rows"] == len(reasons) and told["share"] == len(reasons) / ROWS and told["files"] == 0
    assert {(each["column"], each["reason"]): each["rows"] for each in told["reasons"]} == counts


def test_a_day_of_good_rows_is_left_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / f"day={DAY}", good())
    logs = open_logs(tmp_path)
    plan = logs.plan(TODAY)
    assert sift(LocalExchange(), logs, plan) is plan
    assert summary(plan) == {"rows": 0, "share": 0.0, "files": 0, "reasons": [], "bad_files": []}


def test_without_max_bad_rows_no_row_is_looked_at_and_the_first_bad_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / f"day={DAY}", spoilt()[0])
    logs = open_logs(tmp_path, 0.0)
    monkeypatch.setattr(logs, "check", lambda group: pytest.fail("a pass over the columns that nobody asked for"))
    plan = sifted(logs)
    with pytest.raises(
        UserError, match="part-0.parquet, row group 0, column 'items', row 94: a list that is read beside"
    ):
        everything(logs, plan, 1)


def refused_on(exchange: Exchange, root: Path, share: float) -> str:
    try:
        sift_on_share(exchange, root, share)
    except UserError as error:
        return str(error)
    return "not refused"


def sift_on_share(exchange: Exchange, root: Path, share: float) -> None:
    logs = open_logs(root, share)
    sift(exchange, logs, logs.plan(TODAY))


@pytest.mark.parametrize("workers", [1, 3])
def test_above_the_share_the_night_stops_on_all_workers_and_names_the_first(tmp_path: Path, workers: int) -> None:
    rows, reasons = spoilt()
    write(tmp_path / f"day={DAY}", rows)
    share = len(reasons) / ROWS
    texts = threads.run(workers, functools.partial(refused_on, root=tmp_path, share=share - 0.001))
    assert len(set(texts)) == 1
    assert texts[0].startswith(
        "day 2026-11-20: too many malformed rows\n  got 7.67% of the rows; the first: a list that is read"
    )
    assert (
        "expected at most 7.57% (data.max_bad_rows)" in texts[0]
        and "part-0.parquet, row group 0, 'items', row 94" in texts[0]
    )
    assert threads.run(workers, functools.partial(refused_on, root=tmp_path, share=share)) == ["not refused"] * workers


# Files.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def garbled(path: Path) -> None:
    """The footer stays good: only who reads the pages sees it."""
    content = path.read_bytes()
    path.write_bytes(content[:60] + bytes(byte ^ 0x5A for byte in content[60:600]) + content[600:])


def without_click(path: Path) -> None:
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["click"]), path)


def text_for_price(path: Path) -> None:
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.set_column(4, "price", table["price"].cast(pa.string())), path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut, "not a readable Parquet file: "),
        (garbled, "a row group cannot be read: "),
        (without_click, "column 'click' of task 'click' is missing: got columns row"),
        (text_for_price, "column 'price' of feature 'price' has the wrong type: string"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_means_nothing_is_set_aside_whole(tmp_path: Path, spoil: Any, reason: str, workers: int) -> None:
    paths = write(tmp_path / f"day={DAY}", good(), (250, 50, 300))
    spoil(paths[1])
    row_groups, left_out, bad_rows, [bad] = threads.run(workers, functools.partial(sift_on, root=tmp_path))[-1]
    assert (bad.path, bad.bytes) == (str(paths[1]), paths[1].stat().st_size)
    assert bad.reason.startswith(reason.replace(": got", ":"))
    assert bad_rows == () and left_out == [None] * 6
    assert {group.path for group in row_groups} == {str(paths[0]), str(paths[2])}
    assert [group.first_row for group in row_groups] == [0, 100, 200, 250, 350, 450]


@pytest.mark.parametrize("spoil", [cut, garbled])
def test_a_bad_file_above_the_share_stops_the_night(tmp_path: Path, spoil: Any) -> None:
    paths = write(tmp_path / f"day={DAY}", good(), (250, 50, 300))
    spoil(paths[2])
    text = "(?s)(too many files of day 2026-11-20 mean nothing|too many malformed rows).*20.00?% [(]data.max_bad_rows"
    with pytest.raises(UserError, match=text):
        sifted(open_logs(tmp_path))


def test_a_file_that_cannot_be_reached_is_no_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / f"day={DAY}", good(), (250, 50, 300))
    look, times = Files.look, 0

    def refusing(self: Files, path: str, name: str) -> Any:
        nonlocal times
        times += path.endswith("part-1.parquet")
        if path.endswith("part-1.parquet") and times < last:
            raise UserError("not a readable Parquet file", path, got="a time-out")
        return look(self, path, name)

    monkeypatch.setattr(Files, "look", refusing)
    last = 2  # it answers again when it is tried again
    assert open_logs(tmp_path).plan(TODAY).bad_files == ()
    last = 99
    monkeypatch.setattr(Files, "_is_readable", lambda self, path: False)
    with pytest.raises(UserError, match="part-1.parquet: not a readable Parquet file\n  got a time-out"):
        open_logs(tmp_path).plan(TODAY)


# What is kept.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bad_rows_are_kept_as_they_stand_with_their_places_and_reasons(tmp_path: Path) -> None:
    rows, reasons = spoilt()
    paths = write(tmp_path / "logs" / f"day={DAY}", rows)
    logs = open_logs(tmp_path / "logs")
    plan = sifted(logs)
    keep(Storage(str(tmp_path / "kept")), logs, plan)
    folder = tmp_path / "kept" / f"day={DAY}"
    assert sorted(contents(folder)) == ["quarantine.json", "rows-0000.parquet", "rows-0001.parquet"]
    for number, (path, start) in enumerate(zip(paths, (0, 250), strict=True)):
        whole = pq.read_table(path, partitioning=None).to_pylist()
        for kept in pq.read_table(folder / f"rows-000{number}.parquet", partitioning=None).to_pylist():
            place, row = 100 * kept.pop("_row_group") + kept.pop("_row"), kept["row"]
            assert kept.pop("_file") == str(path) and (kept.pop("_column"), kept.pop("_reason")) == reasons.pop(row)
            assert place + start == row and str(kept) == str(whole[place])  # NaN equals itself as text
    assert not reasons, "all of them"
    assert json.loads((folder / "quarantine.json").read_text()) == {"day": str(DAY), **summary(plan)}


def test_what_is_kept_is_the_same_when_it_is_written_again_and_goes_when_the_day_is_good(tmp_path: Path) -> None:
    folder, storage = tmp_path / "logs" / f"day={DAY}", Storage(str(tmp_path / "kept"))
    write(folder, spoilt()[0])
    logs = open_logs(tmp_path / "logs")
    keep(storage, logs, sifted(logs))
    once = contents(tmp_path / "kept")
    logs = open_logs(tmp_path / "logs")
    keep(storage, logs, sifted(logs))
    assert contents(tmp_path / "kept") == once
    write(folder, good())
    logs = open_logs(tmp_path / "logs")
    keep(storage, logs, sifted(logs))
    assert contents(tmp_path / "kept") == {}


# Hours by a clock.


def test_rows_without_an_hour_are_set_aside_with_the_first_hour_of_their_day(tmp_path: Path) -> None:
    rows, reasons = spoilt()
    midnight = pd.Timestamp(DAY, tz="UTC")
    for row in rows:
        row["at"] = midnight + pd.Timedelta(hours=5 + row["row"] % 3)
    rows[100]["at"], rows[301]["at"] = None, midnight - pd.Timedelta(hours=1)
    write(tmp_path / f"day={DAY}", rows)
    logs = open_logs(tmp_path, by_hour=True, time="at")
    hours = logs.intervals()
    assert hours == [Interval(DAY, hour) for hour in (5, 6, 7)]
    plans = {interval.hour: sifted(logs, interval) for interval in hours}
    timeless = [(bad.index, bad.rows) for bad in plans[5].bad_rows if bad.reason == "no time on the day"]
    assert timeless == [(1, (0,)), (0, (51,))] and not any(b.column == "at" for h in (6, 7) for b in plans[h].bad_rows)
    for hour, plan in plans.items():
        of_hour = [row["row"] for row in rows if row["row"] % 3 == hour - 5 and row["row"] not in (100, 301)]
        left = [row for row in of_hour if row not in reasons]
        assert sorted(row[1] for step in everything(logs, plan, 2, seed=1) for row in step) == left
        assert summary(plan)["rows"] == len(of_hour) - len(left) + 2 * (hour == 5)
    keep(Storage(str(tmp_path / "kept")), logs, plans[5])
    assert (tmp_path / "kept" / f"day={DAY}" / "hour=05" / "quarantine.json").exists()


def test_too_many_rows_without_an_hour_stop_the_night(tmp_path: Path) -> None:
    rows = [row | {"at": None if row["row"] < 60 else pd.Timestamp(DAY, tz="UTC")} for row in good()]
    write(tmp_path / f"day={DAY}", rows)
    with pytest.raises(UserError, match="(?s)too many rows have no time on the day.*got 60 of 600.*at most 9.00%"):
        open_logs(tmp_path, 0.09, by_hour=True, time="at").intervals()
    assert len(open_logs(tmp_path, 0.11, by_hour=True, time="at").intervals()) == 1
