"""The reader: which rows come in which step on which worker, and what becomes of a column.

Oracles: the table that was written (plain Python, one row at a time), hashlib for the ids of strings, and one worker's
undisturbed read for every other way of reading. Everything is compared exactly: nothing is computed but log1p, and that
in float64 as numpy does it.
"""

import datetime
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.jagged import Jagged
from trainer.columns import _ids
from trainer.data import Batch, Logs
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.lanes import DayPlan, RowGroup, prefetch
from trainer.schema import Allowed, Schema

DAY = datetime.date(2026, 11, 20)
TODAY = Interval(DAY)
ROWS, LANES, BATCH = 301, 8, 40
BINARY = Allowed("loss: bce", "0, 1", lambda values: np.isin(values, (0, 1)))
SCHEMA = Schema(
    {"user": "user_id", "seen": "history"},
    {"price": "price", "age": "age"},
    {"click": "click", "watch": "watch_s"},
    max_len={"seen": 3},
    log1p=frozenset({"price"}),
    allowed={"click": [BINARY]},
    weight="weight",
    group="request_id",
    keys=("impression_id",),
)
# Rows of the row groups of each file: one for all workers, as many as a careless exporter makes, and uneven files.
FILES = {"one row group": [[ROWS]], "many small": [[19] * 15, [16]], "several files": [[60, 1], [150], [], [30, 60]]}


def table(rows: int = ROWS) -> pa.Table:
    """Rows that are all different, with nulls in every column that may have them."""
    rng = np.random.default_rng(rows)
    histories = [rng.integers(0, 99, rng.integers(0, 6)).tolist() for _ in range(rows)]
    return pa.table(
        {
            "impression_id": pa.array(range(1000, 1000 + rows)),
            "request_id": pa.array([f"r{row // 8}" for row in range(rows)]),
            "user_id": pa.array(rng.integers(-(2**62), 2**62, rows), mask=rng.random(rows) < 0.1),
            "history": pa.array([None if row % 11 == 0 else ids for row, ids in enumerate(histories)]),
            "price": pa.array(rng.random(rows) * 100, pa.float32(), mask=rng.random(rows) < 0.2),
            "age": pa.array(rng.integers(0, 90, rows), pa.int8()),
            "click": pa.array(rng.integers(0, 2, rows), pa.int8(), mask=rng.random(rows) < 0.1),
            "watch_s": pa.array(rng.random(rows), mask=rng.random(rows) < 0.5),
            "weight": pa.array(rng.random(rows).astype(np.float32)),
        }
    )


def write_day(root: Path, content: pa.Table, files: list[list[int]], day: datetime.date = DAY) -> None:
    folder = root / f"day={day}"
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, groups in enumerate(files):
        with pq.ParquetWriter(folder / f"part-{number}.parquet", content.schema) as writer:
            for rows in groups:
                writer.write_table(content.slice(first, rows), row_group_size=rows)
                first += rows
    assert first == content.num_rows


def read(logs: Logs, plan: DayPlan, rank: int = 0, workers: int = 1, **options: Any) -> list[Batch]:
    return list(logs.read(plan, rank=rank, num_workers=workers, **{"batch_size": BATCH, "lanes": LANES, **options}))


def global_batches(logs: Logs, plan: DayPlan, workers: int, **options: Any) -> list[list[int]]:
    """The rows of each step over all workers, sorted; zip is strict: all workers make the same number of steps."""
    per_worker = [read(logs, plan, rank, workers, **options) for rank in range(workers)]
    return [sorted(torch.cat([b.row_B for b in parts]).tolist()) for parts in zip(*per_worker, strict=True)]


def one_column(tmp_path: Path, column: pa.Array, **schema: Any) -> Batch:
    """The one row group of a day that has one column, 'x'; schema: for what it is read."""
    write_day(tmp_path, pa.table({"x": column}), [[len(column)]])
    logs = Logs(str(tmp_path), "day", Schema(**{"ids": {}, "numbers": {}, "labels": {}, **schema}))
    return logs.decode(logs.plan(TODAY).row_groups[0])


def as_lists(ids: Jagged) -> list[list[int]]:
    offsets = ids.offsets.tolist()
    return [ids.values_N[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]


def blake2b(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Logs]:
    """The same rows in each layout of files."""
    root = tmp_path_factory.mktemp("logs")
    for name, files in FILES.items():
        write_day(root / name, table(), files)
    return {name: Logs(str(root / name), "day", SCHEMA) for name in FILES}


@pytest.fixture(params=FILES)
def logs(days: dict[str, Logs], request: pytest.FixtureRequest) -> Logs:
    return days[request.param]


# Which rows, when, where.


@pytest.mark.parametrize("seed", [None, 5])
def test_global_batches_are_those_of_one_worker_for_any_number_of_workers(logs: Logs, seed: int | None) -> None:
    plan = logs.plan(TODAY)
    alone = global_batches(logs, plan, 1, seed=seed)
    assert len(alone) == plan.num_steps(BATCH) == -(-ROWS // BATCH)
    for workers in (2, 3, 5):
        assert global_batches(logs, plan, workers, seed=seed) == alone


@pytest.mark.parametrize(("lanes", "batch_size"), [(1, 64), (8, 64), (24, 24), (24, 100), (7, 1000)])
def test_every_row_comes_once_in_steps_of_nearly_equal_size(logs: Logs, lanes: int, batch_size: int) -> None:
    steps = global_batches(logs, logs.plan(TODAY), 1, seed=1, lanes=lanes, batch_size=batch_size)
    sizes = [len(rows) for rows in steps]
    assert sorted(row for rows in steps for row in rows) == list(range(ROWS))
    assert max(sizes) - min(sizes) <= lanes  # each lane gives a step the floor or the ceiling of its share


def test_a_day_with_fewer_rows_than_workers_has_the_same_steps_everywhere(tmp_path: Path) -> None:
    write_day(tmp_path, table(3), [[3]])
    logs = Logs(str(tmp_path), "day", SCHEMA)
    per_worker = [read(logs, logs.plan(TODAY), rank, 5, seed=1) for rank in range(5)]
    assert [len(batches) for batches in per_worker] == [1] * 5
    assert sorted(row for [batch] in per_worker for row in batch.row_B.tolist()) == [0, 1, 2]
    nobodys = next(batch for [batch] in per_worker if not batch.num_rows)
    assert nobodys.numbers_BK.shape == (0, 2) and nobodys.labels_BT.shape == (0, 2)
    assert as_lists(nobodys.ids["user"]) == [] and nobodys.weights_BT.shape == (0, 2)


def test_the_seed_orders_the_rows_and_the_day_has_its_own_order(tmp_path: Path) -> None:
    for day in (DAY, DAY + datetime.timedelta(days=1)):
        write_day(tmp_path, table(), [[100, 100, 101]], day)
    logs = Logs(str(tmp_path), "day", SCHEMA)

    def order(seed: int | None, day: datetime.date = DAY) -> list[int]:
        return torch.cat([batch.row_B for batch in read(logs, logs.plan(Interval(day)), seed=seed)]).tolist()

    assert order(1) == order(1)
    orders = [order(None), order(1), order(2), order(1, DAY + datetime.timedelta(days=1))]
    assert len({tuple(rows) for rows in orders}) == 4
    assert len({rows[0] // 100 for rows in (order(seed) for seed in range(9))}) == 3, "row groups are shuffled too"


def test_without_a_seed_the_rows_of_a_lane_come_in_the_order_of_the_files(logs: Logs) -> None:
    plan = logs.plan(TODAY)
    rows = torch.cat([batch.row_B for batch in read(logs, plan)]).tolist()
    for lane in range(LANES):
        of_lane = range(ROWS * lane // LANES, ROWS * (lane + 1) // LANES)
        assert [row for row in rows if row in of_lane] == list(of_lane)
    assert torch.cat([batch.row_B for batch in read(logs, plan, lanes=1)]).tolist() == list(range(ROWS))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_resumed_read_goes_on_as_the_undisturbed_one(logs: Logs, workers: int) -> None:
    plan, rank = logs.plan(TODAY), workers - 1
    whole = read(logs, plan, rank, workers, seed=3)
    for start in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        resumed = read(logs, plan, rank, workers, seed=3, start_step=start)
        assert [b.row_B.tolist() for b in resumed] == [b.row_B.tolist() for b in whole[start:]]
        for batch, expected in zip(resumed, whole[start:], strict=True):
            torch.testing.assert_close(batch.numbers_BK, expected.numbers_BK, rtol=0, atol=0, equal_nan=True)
            assert as_lists(batch.ids["seen"]) == as_lists(expected.ids["seen"])


def test_a_row_group_is_decoded_once_and_twice_only_where_two_workers_meet(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, decode = logs.plan(TODAY), logs.decode
    decoded: list[RowGroup] = []

    def counted(group: RowGroup) -> Batch:
        decoded.append(group)
        return decode(group)

    monkeypatch.setattr(logs, "decode", counted)
    read(logs, plan, seed=1)
    assert Counter(decoded) == Counter(plan.row_groups)
    decoded.clear()
    for rank in range(3):
        read(logs, plan, rank, 3, seed=1)
    assert len(decoded) <= len(plan.row_groups) + 2


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("whole_groups", [False, True])
def test_a_row_says_the_lane_it_was_read_from_whoever_reads_it(
    logs: Logs, seed: int | None, whole_groups: bool
) -> None:
    plan, options = logs.plan(TODAY), {"seed": seed, "whole_groups": whole_groups}
    alone = lane_of_row(logs, plan, 1, **options)
    for workers in (2, 3, 5):
        assert lane_of_row(logs, plan, workers, **options) == alone
    sizes = Counter(alone.values())
    if not whole_groups:
        assert [sizes[lane] for lane in range(LANES)] == [
            ROWS * (lane + 1) // LANES - ROWS * lane // LANES for lane in range(LANES)
        ]
    if seed is None:
        assert [lane for _, lane in sorted(alone.items())] == sorted(alone.values()), "lanes are segments of the day"


def lane_of_row(logs: Logs, plan: DayPlan, workers: int, **options: Any) -> dict[int, int]:
    found: dict[int, int] = {}
    for rank in range(workers):
        for batch in read(logs, plan, rank, workers, **options):
            assert batch.lane_B is not None and batch.lane_B.dtype == torch.int64
            assert set(batch.lane_B.tolist()) <= set(range(rank * LANES // workers, (rank + 1) * LANES // workers))
            found |= dict(zip(batch.row_B.tolist(), batch.lane_B.tolist(), strict=True))
    return found


# Lists that stay whole.

RAGGED: dict[str, list[list[int]]] = {  # rows of the row groups of each file; lists go on over their borders
    "one row group": [[400]],
    "many small": [[16] * 25],
    "several files": [[120, 1], [150], [], [30, 99]],
}


def ragged() -> pa.Table:
    """Lists of 1 to 12 rows, one of 90, and neighbours of the same list come back later under the same name."""
    rng = np.random.default_rng(3)
    lengths = [*rng.integers(1, 13, 20).tolist(), 90, *rng.integers(1, 13, 90).tolist()]
    names = np.repeat([f"r{number % 50}" for number in range(len(lengths))], lengths)[:400]
    return table(400).set_column(1, "request_id", pa.array(names))


@pytest.fixture(scope="module")
def ragged_days(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Logs]:
    root = tmp_path_factory.mktemp("ragged")
    for name, files in RAGGED.items():
        write_day(root / name, ragged(), files)
    return {name: Logs(str(root / name), "day", SCHEMA) for name in RAGGED}


@pytest.fixture(params=RAGGED)
def ragged_logs(ragged_days: dict[str, Logs], request: pytest.FixtureRequest) -> Logs:
    return ragged_days[request.param]


def lists(plan: DayPlan) -> list[list[int]]:
    """Neighbouring rows of one request in one row group: a plain loop."""
    names, found = ragged()["request_id"].to_pylist(), []
    for group in plan.row_groups:
        for row in range(group.first_row, group.first_row + group.num_rows):
            if row == group.first_row or names[row] != names[row - 1]:
                found.append([row])
            else:
                found[-1].append(row)
    return found


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [None, 5])
def test_every_row_comes_once_and_every_list_whole_in_its_order(
    ragged_logs: Logs, seed: int | None, workers: int
) -> None:
    plan = ragged_logs.plan(TODAY)
    slices: list[list[int]] = []  # what each lane gives each batch
    for rank in range(workers):
        batches = read(ragged_logs, plan, rank, workers, seed=seed, whole_groups=True)
        assert len(batches) == plan.num_steps(BATCH)
        for batch in batches:
            assert batch.lane_B is not None
            slices += [batch.row_B[batch.lane_B == lane].tolist() for lane in range(LANES)]
    assert sorted(row for rows in slices for row in rows) == list(range(400))
    for whole in lists(plan):
        rows = next(rows for rows in slices if whole[0] in rows)
        at = rows.index(whole[0])
        assert rows[at : at + len(whole)] == whole


@pytest.mark.parametrize("seed", [None, 5])
def test_global_batches_of_whole_lists_are_those_of_one_worker(ragged_logs: Logs, seed: int | None) -> None:
    plan = ragged_logs.plan(TODAY)
    alone = global_batches(ragged_logs, plan, 1, seed=seed, whole_groups=True)
    for workers in (2, 3, 5):
        assert global_batches(ragged_logs, plan, workers, seed=seed, whole_groups=True) == alone


@pytest.mark.parametrize("workers", [1, 3])
def test_a_resumed_read_of_whole_lists_goes_on_as_the_undisturbed_one(ragged_logs: Logs, workers: int) -> None:
    plan, rank = ragged_logs.plan(TODAY), workers - 1
    whole = read(ragged_logs, plan, rank, workers, seed=3, whole_groups=True)
    for start in range(len(whole) + 1):
        resumed = read(ragged_logs, plan, rank, workers, seed=3, whole_groups=True, start_step=start)
        assert [b.row_B.tolist() for b in resumed] == [b.row_B.tolist() for b in whole[start:]]


def test_a_batch_of_whole_lists_holds_each_column_of_its_rows(ragged_logs: Logs) -> None:
    written = ragged().to_pylist()
    for batch in read(ragged_logs, ragged_logs.plan(TODAY), 1, 2, seed=9, whole_groups=True):
        rows = [written[row] for row in batch.row_B.tolist()]
        assert batch.groups_B is not None and batch.groups_B.tolist() == [blake2b(r["request_id"]) for r in rows]
        assert as_lists(batch.ids["seen"]) == [(r["history"] or [])[-3:] for r in rows]


def test_a_list_longer_than_a_batch_stays_whole_and_others_shares_are_empty(tmp_path: Path) -> None:
    write_day(tmp_path, table(60).set_column(1, "request_id", pa.array(["one"] * 60)), [[60]])
    logs = Logs(str(tmp_path), "day", SCHEMA)
    per_worker = [read(logs, logs.plan(TODAY), rank, 3, batch_size=10, seed=1, whole_groups=True) for rank in range(3)]
    assert [len(batches) for batches in per_worker] == [6] * 3
    assert sorted(b.num_rows for batches in per_worker for b in batches) == [0] * 17 + [60]
    empty = next(b for batches in per_worker for b in batches if not b.num_rows)
    assert empty.lane_B is not None and empty.groups_B is not None
    assert empty.lane_B.shape == empty.groups_B.shape == (0,) and empty.weights_BT.shape == (0, 2)


def test_lists_that_go_on_in_the_next_row_group_are_counted(ragged_days: dict[str, Logs]) -> None:
    names = ragged()["request_id"].to_pylist()
    for logs in ragged_days.values():
        firsts = [group.first_row for group in logs.plan(TODAY).row_groups[1:]]
        assert logs.cut_groups(logs.plan(TODAY)) == sum(names[first] == names[first - 1] for first in firsts)
    assert ragged_days["one row group"].cut_groups(ragged_days["one row group"].plan(TODAY)) == 0
    assert ragged_days["many small"].cut_groups(ragged_days["many small"].plan(TODAY)) > 10


def test_whole_lists_need_a_column_that_says_what_a_list_is(tmp_path: Path) -> None:
    write_day(tmp_path, table(), [[ROWS]])
    logs = Logs(str(tmp_path), "day", Schema({}, {}, {"click": "click"}))
    for ask in (lambda: read(logs, logs.plan(TODAY), whole_groups=True), lambda: logs.cut_groups(logs.plan(TODAY))):
        with pytest.raises(UserError, match="(?s)^data.group: lists are to stay whole.*-> add data.group"):
            ask()


def test_a_row_group_of_whole_lists_is_decoded_once_and_twice_only_where_two_workers_meet(
    ragged_logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, decode = ragged_logs.plan(TODAY), ragged_logs.decode
    decoded: list[RowGroup] = []

    def counted(group: RowGroup) -> Batch:
        decoded.append(group)
        return decode(group)

    monkeypatch.setattr(ragged_logs, "decode", counted)
    read(ragged_logs, plan, seed=1, whole_groups=True)
    assert Counter(decoded) == Counter(plan.row_groups)
    decoded.clear()
    for rank in range(3):
        read(ragged_logs, plan, rank, 3, seed=1, whole_groups=True)
    assert len(decoded) <= len(plan.row_groups) + 2


# What a batch holds.


@pytest.mark.parametrize("seed", [None, 9])
def test_a_batch_holds_each_column_of_its_rows(logs: Logs, seed: int | None) -> None:
    written = table().to_pylist()
    for batch in read(logs, logs.plan(TODAY), 1, 2, seed=seed):
        rows = [written[row] for row in batch.row_B.tolist()]
        assert as_lists(batch.ids["user"]) == [[] if r["user_id"] is None else [r["user_id"]] for r in rows]
        assert as_lists(batch.ids["seen"]) == [(r["history"] or [])[-3:] for r in rows]
        ages, clicks = batch.numbers_BK[:, 1].tolist(), batch.labels_BT[:, 0]
        assert ages == [r["age"] for r in rows]
        assert [None if c != c else int(c) for c in clicks.tolist()] == [r["click"] for r in rows]
        assert batch.weights_BT.tolist() == [[r["weight"]] * 2 for r in rows]
        assert batch.groups_B is not None and batch.groups_B.tolist() == [blake2b(r["request_id"]) for r in rows]
        assert batch.keys.to_pylist() == [{"impression_id": r["impression_id"]} for r in rows]


STRINGS = ["a", "Zürich", "", "a", "x" * 300]
IDS = {
    "int64": (pa.array([-(2**63), 2**63 - 1, 2**53 + 1]), [-(2**63), 2**63 - 1, 2**53 + 1]),
    "int8": (pa.array([-128, 0, 127], pa.int8()), [-128, 0, 127]),
    "uint64": (pa.array([0, 2**63, 2**64 - 1], pa.uint64()), [0, -(2**63), -1]),  # the same 64 bits
    "string": (pa.array(STRINGS), [blake2b(s) for s in STRINGS]),
    "large string": (pa.array(STRINGS, pa.large_string()), [blake2b(s) for s in STRINGS]),
    "dictionary of strings": (pa.array(STRINGS).dictionary_encode(), [blake2b(s) for s in STRINGS]),
    "dictionary of integers": (pa.array([7, 2**60 + 1, 7]).dictionary_encode(), [7, 2**60 + 1, 7]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("column", "expected"), IDS.values(), ids=list(IDS))
def test_an_id_keeps_its_bits_or_is_the_documented_hash_of_its_text(
    tmp_path: Path, column: pa.Array, expected: list[int]
) -> None:
    batch = one_column(tmp_path, column, ids={"f": "x"}, group="x")
    assert batch.groups_B is not None and batch.groups_B.tolist() == expected
    assert batch.ids["f"].values_N.tolist() == expected
    assert batch.ids["f"].values_N.dtype == torch.int64


@pytest.mark.parametrize("column", [pa.array([5, None, 2**60 + 1]), pa.array(["a", None, "b"]).dictionary_encode()])
def test_a_null_id_is_an_empty_list(tmp_path: Path, column: pa.Array) -> None:
    first, none, last = as_lists(one_column(tmp_path, column, ids={"f": "x"}).ids["f"])
    assert none == [] and len(first) == len(last) == 1
    assert last == [2**60 + 1] or last == [blake2b("b")]


LISTS = [[1, 2, 3, 4, 5], None, [], [None], [6, None, 7, None], [None, 8], [2**60 + 1]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("max_len", [1, 2, 3, 50])
@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.uint64())], ids=str)
def test_the_last_ids_of_a_list_count_and_nulls_among_them_are_left_out(
    tmp_path: Path, kind: pa.DataType, max_len: int
) -> None:
    found = one_column(tmp_path, pa.array(LISTS, kind), ids={"f": "x"}, max_len={"f": max_len}).ids["f"]
    assert as_lists(found) == [[id_ for id_ in (ids or [])[-max_len:] if id_ is not None] for ids in LISTS]


def test_a_list_of_strings_is_hashed_as_strings_are(tmp_path: Path) -> None:
    column = pa.array([["a", None, "b"], None, ["c"]], pa.list_(pa.dictionary(pa.int32(), pa.string())))
    found = one_column(tmp_path, column, ids={"f": "x"}, max_len={"f": 2}).ids["f"]
    assert as_lists(found) == [[blake2b("b")], [], [blake2b("c")]]


@pytest.mark.parametrize(("first", "rows"), [(0, 3), (1, 4), (4, 3), (6, 1), (7, 0)])
def test_a_slice_of_a_list_column_is_read_as_its_own_rows(first: int, rows: int) -> None:
    column = pa.array(LISTS).slice(first, rows)  # shares the buffers of the whole
    assert as_lists(_ids(column, 2)) == as_lists(_ids(pa.array(column.to_pylist(), pa.list_(pa.int64())), 2))
    taken = pa.array([[ids] for ids in LISTS]).flatten().slice(first, rows)
    assert as_lists(_ids(taken, 2)) == as_lists(_ids(column, 2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1.5, None, -2.0], pa.float32()), [1.5, None, -2.0]),
        (pa.array([1.5, None], pa.float16()), [1.5, None]),
        (pa.array([True, None, False]), [1.0, None, 0.0]),
        (pa.array([2**62 + 1, None]), [2.0**62, None]),  # more digits than a float has: rounded, not refused
        (pa.array([2**64 - 1], pa.uint64()), [2.0**64]),
        (pa.array([None, None], pa.float64()), [None, None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_number_or_label_is_a_float_and_null_is_nan(
    tmp_path: Path, column: pa.Array, expected: list[float | None]
) -> None:
    batch = one_column(tmp_path, column, numbers={"n": "x"}, labels={"t": "x"})
    for values in (batch.numbers_BK[:, 0], batch.labels_BT[:, 0]):
        assert [None if v != v else v for v in values.tolist()] == expected


def test_log1p_is_numpys_in_float64_before_it_is_rounded(tmp_path: Path) -> None:
    values = [0.0, -0.9999999, 1e-12, 3.5, 1e30]
    batch = one_column(tmp_path, pa.array([*values, None]), numbers={"n": "x"}, log1p=frozenset({"n"}))
    assert batch.numbers_BK[:5, 0].tolist() == np.log1p(values).astype(np.float32).tolist()
    assert batch.numbers_BK[5, 0].isnan()


ROLES: dict[str, dict[str, Any]] = {
    "number": {"numbers": {"n": "x"}},
    "log1p": {"numbers": {"n": "x"}, "log1p": frozenset({"n"})},
    "label": {"labels": {"t": "x"}, "allowed": {"t": [BINARY]}},
    "target": {"labels": {"t": "x"}},
    "weight": {"weight": "x"},
    "group": {"group": "x"},
    "id": {"ids": {"f": "x"}},
    "ids": {"ids": {"f": "x"}, "max_len": {"f": 5}},
}


@pytest.mark.parametrize(
    ("role", "values", "text"),
    [
        ("number", [0.0, float("nan"), float("nan")], "row 1: not a finite number.*got nan, the first of 2 such rows"),
        ("number", [0.0, float("inf")], "row 1: not a finite number.*got inf\n.*expected finite.*or null"),
        ("number", [1e39], "row 0: not a finite number.*got 1e[+]39"),  # infinite as the float32 that it would become
        ("target", [0.0, float("-inf")], "row 1: not a finite number.*got -inf"),
        ("log1p", [0.0, -1.0], "row 1: log1p is not defined here.*got -1.0.*expected numbers above -1"),
        ("label", [0.0, 1.0, 2.0], "row 2: not the label.*loss: bce.*got 2.0.*expected 0, 1 or null"),
        ("label", [0.5], "row 0: not the label.*got 0.5"),
        ("weight", [1.0, -0.25], "row 1: not a sample weight.*got -0.25.*expected numbers from 0 up"),
        ("weight", [1.0, None], "row 1: not a sample weight.*none of them null"),
        ("group", [7, None, 2**60 + 1], "row 1: not a group.*got null in 1 rows.*expected a group for every row"),
    ],
)
def test_a_value_that_means_nothing_stops_with_its_file_row_group_column_and_row(
    tmp_path: Path, role: str, values: list[Any], text: str
) -> None:
    with pytest.raises(UserError, match=f"(?s)part-0.parquet, row group 0, column 'x', {text}.*-> re-export the day"):
        one_column(tmp_path, pa.array(values), **ROLES[role])


# Lists that are read side by side.


def side_by_side(tmp_path: Path, *columns: pa.Array, max_len: int = 3) -> Batch:
    """The features a, b ... of one row group, read side by side."""
    names = "abc"[: len(columns)]
    write_day(tmp_path, pa.table(dict(zip(names, columns, strict=True))), [[len(columns[0])]])
    ids, lengths = {name: name for name in names}, dict.fromkeys(names, max_len)
    logs = Logs(str(tmp_path), "day", Schema(ids, {}, {}, max_len=lengths, aligned=(tuple(names),)))
    return logs.decode(logs.plan(TODAY).row_groups[0])


def test_a_row_without_a_user_is_somebody_of_its_own(tmp_path: Path) -> None:
    users = one_column(tmp_path, pa.array([7, None, 7, None, 9]), user="x").users_B
    assert users is not None
    first, second, third, fourth, fifth = users.tolist()
    assert (first, third, fifth) == (7, 7, 9) and len({7, 9, second, fourth}) == 4


def test_lists_of_equal_length_are_read_side_by_side_and_null_is_as_empty(tmp_path: Path) -> None:
    items = [[1, 2, 3, 4], [], None, [5], None]
    batch = side_by_side(tmp_path, pa.array(items), pa.array([["v", "w", "x", "y"], None, [], ["z"], None]))
    assert as_lists(batch.ids["a"]) == [[2, 3, 4], [], [], [5], []]
    assert as_lists(batch.ids["b"]) == [[blake2b(text) for text in texts] for texts in ("wxy", "", "", "z", "")]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ([[[1], [1, 2], [3]], [[1], [1], []]], "columns 'a' and 'b', row 1: .*differ in.*got 2 and 1, the first of 2"),
        ([[[1], None], [[1], None], [[1], [2]]], "columns 'b' and 'c', row 1: .*differ in length.*got 0 and 1"),
        ([[[1], [2]], [[1], None]], "columns 'a' and 'b', row 1: .*got 1 and 0.*expected equally many ids"),
        ([[[1], [2, 3]], [[1], [None, 2]]], "column 'b', row 1: .*has gaps.*got 1 null ids.*an id in every place"),
        ([[[], [None] * 9], [None, [1] * 9]], "column 'a', row 1: .*has gaps.*got 9 null ids"),
    ],
)
def test_lists_that_cannot_be_read_side_by_side_stop_with_their_columns_and_row(
    tmp_path: Path, columns: list[list[Any]], text: str
) -> None:
    arrays = [pa.array(column, pa.list_(pa.int64())) for column in columns]
    with pytest.raises(UserError, match=f"(?s)part-0.parquet, row group 0, {text}.*-> re-export the day"):
        side_by_side(tmp_path, *arrays)


def test_lists_cut_to_different_lengths_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="need one max_len"):
        Schema({"a": "a", "b": "b"}, {}, {}, max_len={"a": 3, "b": 4}, aligned=(("a", "b"),))


# Labels and weights that are made of columns.


def expressed(tmp_path: Path, content: pa.Table, **schema: Any) -> Batch:
    """The one row group of a day; schema: labels, weights and what goes with them."""
    write_day(tmp_path, content, [[content.num_rows]])
    logs = Logs(str(tmp_path), "day", Schema(**{"ids": {}, "numbers": {}, "labels": {}, **schema}))
    return logs.decode(logs.plan(TODAY).row_groups[0])


def test_a_label_is_what_its_expression_makes_of_each_row(tmp_path: Path) -> None:
    labels = {"long": "watch_s > 0.4 * age / 90", "fan": "click or watch_s > 0.9", "time": "log1p(60 * watch_s)"}
    batch = expressed(tmp_path, table(), labels=labels, allowed={"long": [BINARY], "fan": [BINARY]})
    for row, (long, fan, time_) in zip(table().to_pylist(), batch.labels_BT.tolist(), strict=True):
        watch_s, click = row["watch_s"], row["click"]
        unsure = watch_s is None and click != 1 or click is None and not (watch_s or 0) > 0.9
        assert (fan != fan) if unsure else fan == float(click == 1 or watch_s > 0.9)
        if watch_s is None:
            assert long != long and time_ != time_
        else:
            assert long == float(watch_s > 0.4 * row["age"] / 90)
            assert time_ == pytest.approx(np.log1p(60 * watch_s), rel=1e-6)  # rounded to float32


def test_a_row_weighs_for_a_task_its_own_weight_times_that_of_the_task(tmp_path: Path) -> None:
    content = table()
    weights = {"watch": "1 + 2 * (age > 40)", "late": "3"}
    labels = {"click": "click", "watch": "watch_s", "late": "watch_s > 0.5"}
    both = expressed(tmp_path / "both", content, labels=labels, weights=weights, weight="weight").weights_BT
    own = expressed(tmp_path / "own", content, labels=labels, weights=weights).weights_BT
    none = expressed(tmp_path / "none", content, labels=labels).weights_BT
    for row, of_both, of_own in zip(content.to_pylist(), both.tolist(), own.tolist(), strict=True):
        factors = [1.0, 3.0 if row["age"] > 40 else 1.0, 3.0]
        assert of_own == factors
        assert of_both == [float(np.float32(row["weight"] * factor)) for factor in factors]
    assert none.dtype == both.dtype == torch.float32 and torch.equal(none, torch.ones(ROWS, 3))


def test_a_column_alone_in_backticks_or_brackets_reads_as_the_column(tmp_path: Path) -> None:
    content = table().rename_columns(["watch-time" if c == "watch_s" else c for c in table().column_names])
    labels = {"a": "`watch-time`", "b": "(`watch-time`)", "c": "`watch-time` + 0"}
    a, b, c = expressed(tmp_path, content, labels=labels).labels_BT.unbind(1)
    expected = [float("nan") if row["watch_s"] is None else row["watch_s"] for row in table().to_pylist()]
    for found in (a, b, c):
        np.testing.assert_array_equal(found.numpy(), np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (
            {"labels": {"t": "x - y"}, "allowed": {"t": [BINARY]}},
            "'x - y', row 2: not the label.*bce.*got -2.0.*0, 1 or null",
        ),
        ({"labels": {"t": "x / y"}}, "'x / y', row 0: not a finite number.*got inf"),
        ({"labels": {"t": "0 * x / y"}}, "'0 [*] x / y', row 0: not a finite number.*got nan.*or null where there is"),
        ({"labels": {"t": "y"}, "weights": {"t": "x - y"}}, "'x - y', row 2: not a sample weight.*got -2.0.*from 0 up"),
        ({"labels": {"t": "y"}, "weights": {"t": "x + z"}}, "'x [+] z', row 1: not a sample weight.*none of them null"),
        ({"labels": {"t": "y"}, "weights": {"t": "-1"}}, "'-1', row 0: not a sample weight.*got -1.0, the first of 3"),
        ({"labels": {"t": "y"}, "weights": {"t": "exp(99 * x)"}}, "'exp.99 [*] x.', row 0: not a finite.*got 9.8"),
        ({"labels": {"t": "y"}, "weights": {"t": "w"}, "weight": "w"}, "column 'w', row 0: not a finite.*got 1e[+]40"),
    ],
)
def test_what_an_expression_makes_wrong_stops_with_its_text_and_row(
    tmp_path: Path, schema: dict[str, Any], text: str
) -> None:
    content = pa.table({"x": [1.0, 1.0, 0.0], "y": [0.0, 1.0, 2.0], "z": [0.0, None, 1.0], "w": [1e20, 1.0, 1.0]})
    with pytest.raises(UserError, match=f"(?s)part-0.parquet, row group 0, .*{text}.*-> re-export the day"):
        expressed(tmp_path, content, **schema)


def test_an_expression_of_nulls_is_null_and_one_of_undefined_arithmetic_beside_a_null_too(tmp_path: Path) -> None:
    content = pa.table({"x": pa.array([0.0, None, 1.0]), "y": pa.array([None, 0.0, 2.0])})
    batch = expressed(tmp_path, content, labels={"t": "x / x + y", "u": "y and x"})
    np.testing.assert_array_equal(batch.labels_BT.numpy(), [[np.nan, 0], [np.nan, 0], [3, 1]])


@pytest.mark.parametrize(
    ("schema", "user"),
    [
        ({"labels": {"t": "y + x"}}, "task 't'"),
        ({"labels": {"t": "y"}, "weights": {"t": "x"}}, "the weight of task 't'"),
    ],
)
def test_each_column_of_an_expression_is_there_and_a_number(tmp_path: Path, schema: dict[str, Any], user: str) -> None:
    with pytest.raises(UserError, match=f"part-0.parquet: column 'x' of {user} is missing"):
        expressed(tmp_path / "missing", pa.table({"y": [1]}), **schema)
    with pytest.raises(UserError, match=f"(?s)part-0.parquet: column 'x' of {user} has the wrong type.*got string"):
        expressed(tmp_path / "text", pa.table({"y": [1], "x": ["1"]}), **schema)


def test_a_text_that_is_no_expression_is_told_with_its_task(tmp_path: Path) -> None:
    for schema, what in (
        ({"labels": {"t": "x ^ 2"}}, "label"),
        ({"labels": {"t": "x"}, "weights": {"t": "f(x)"}}, "weight"),
    ):
        with pytest.raises(UserError, match=f"^the {what} of task 't': an expression does not know this"):
            expressed(tmp_path / what, pa.table({"x": [1]}), **schema)


# Files and folders.


@pytest.mark.parametrize(
    ("role", "column", "expected"),
    [
        ("id", pa.array([1.5]), "got double\n.*an integer or a string"),
        ("id", pa.array([[1]]), "got list<.*an integer or a string"),
        ("ids", pa.array([1]), "got int64\n.*a list of integers or strings"),
        ("ids", pa.array([[1.5]]), "got list<.*double>\n.*a list of integers or strings"),
        ("number", pa.array(["1"]), "got string\n.*an integer, a float or a boolean"),
        ("label", pa.array([DAY]), "got date32.*an integer, a float or a boolean"),
        ("weight", pa.array(["1"]), "got string\n.*an integer, a float or a boolean"),
        ("group", pa.array([0.5]), "got double\n.*an integer or a string"),
    ],
)
def test_a_column_of_a_wrong_type_is_found_before_a_row_is_read(
    tmp_path: Path, role: str, column: pa.Array, expected: str
) -> None:
    write_day(tmp_path, pa.table({"x": column}), [[1]])
    logs = Logs(str(tmp_path), "day", Schema(**{"ids": {}, "numbers": {}, "labels": {}, **ROLES[role]}))
    with pytest.raises(UserError, match=f"(?s)part-0.parquet: column 'x' of .*wrong type.*{expected}.*-> re-export"):
        logs.plan(TODAY)


def test_a_missing_column_is_named_with_what_wants_it_and_what_is_there(tmp_path: Path) -> None:
    for column, user in [("user_id", "feature 'user'"), ("click", "task 'click'"), ("weight", "data.weight")]:
        write_day(tmp_path / column, table().drop_columns([column]), [[ROWS]])
        with pytest.raises(
            UserError, match=f"(?s)part-0.parquet: column '{column}' of {user} is missing.*got columns.*"
        ):
            Logs(str(tmp_path / column), "day", SCHEMA).plan(TODAY)


def test_files_of_a_day_that_disagree_about_a_key_are_refused(tmp_path: Path) -> None:
    # A key is handed through as it is: predictions could not be one table. Everything else is converted.
    write_day(tmp_path, table(20), [[20]])
    other = table(10).to_pandas().astype({"impression_id": "int32", "age": "float64", "user_id": "string"})
    pq.write_table(pa.Table.from_pandas(other), tmp_path / f"day={DAY}" / "part-1.parquet")
    with pytest.raises(UserError, match="(?s)part-1.parquet: column 'impression_id' of data.keys.*got int32.*int64"):
        Logs(str(tmp_path), "day", SCHEMA).plan(TODAY)


def test_files_that_write_down_or_hide_something_are_no_data(tmp_path: Path) -> None:
    write_day(tmp_path, table(), FILES["several files"])
    folder = tmp_path / f"day={DAY}"
    (folder / "_temporary" / "0").mkdir(parents=True)
    for name in ("_SUCCESS", ".part-0.parquet.crc", ".part-9.parquet", "_temporary/0/part-0.parquet", "notes.txt"):
        (folder / name).write_bytes(b"no Parquet")
    (tmp_path / "_logs").mkdir()
    logs = Logs(str(tmp_path), "day", SCHEMA)
    assert logs.intervals() == [TODAY] and logs.plan(TODAY).num_rows == ROWS


def test_a_day_is_its_files_in_the_order_of_their_names_and_folders_below_it_belong_to_it(tmp_path: Path) -> None:
    write_day(tmp_path, table(), FILES["several files"])
    for folder in ("hour=07", "late.parquet"):  # some writers give folders the names of files
        (tmp_path / f"day={DAY}" / folder).mkdir()
        pq.write_table(table(5), tmp_path / f"day={DAY}" / folder / "part-0.parquet")
    plan = Logs(str(tmp_path), "day", SCHEMA).plan(TODAY)
    names = [Path(group.path).relative_to(tmp_path / f"day={DAY}").as_posix() for group in plan.row_groups]
    late = [f"{folder}/part-0.parquet" for folder in ("hour=07", "late.parquet")]
    assert names == [*late, *(f"part-{n}.parquet" for n in (0, 0, 1, 3, 3))]
    assert [group.num_rows for group in plan.row_groups] == [5, 5, 60, 1, 150, 30, 60]
    assert [group.first_row for group in plan.row_groups] == [0, 5, 10, 70, 71, 221, 251]


@pytest.mark.parametrize("path", ["{root}", "{root}/", "file://{root}", "file://{root}/"])
def test_a_local_path_and_a_filesystem_uri_lead_to_the_same_days(tmp_path: Path, path: str) -> None:
    for day in (DAY, DAY - datetime.timedelta(days=40)):
        write_day(tmp_path, table(9), [[9]], day)
    logs = Logs(path.format(root=tmp_path), "day", SCHEMA)
    assert logs.intervals() == [Interval(DAY - datetime.timedelta(days=40)), TODAY]
    assert sorted(row for batch in read(logs, logs.plan(TODAY), seed=1) for row in batch.row_B.tolist()) == list(
        range(9)
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        ([], "no days found.*got no folders.*expected folders such as day=2026-11-20.*correct data.path"),
        (["date=2026-11-20"], "no days found.*got 1 folders of other names.*data.day_column"),
        (["day=2026-11-31"], "day=2026-11-31: not a day.*got 2026-11-31.*expected YYYY-MM-DD.*rename or remove"),
        (["day=2026-11-20", "day=today"], "day=today: not a day"),
    ],
)
def test_folders_that_are_no_days_are_told_with_what_is_expected(tmp_path: Path, make: list[str], text: str) -> None:
    for name in make:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"(?s)^{tmp_path}.*{text}"):
        Logs(str(tmp_path), "day", SCHEMA).intervals()


def test_a_folder_that_cannot_be_listed_is_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match=f"(?s)^{tmp_path}/logs: a folder cannot be listed.*got .*-> check the path"):
        Logs(str(tmp_path / "logs"), "day", SCHEMA).intervals()


def test_a_day_without_a_row_is_an_error_and_not_a_day_of_zero_steps(tmp_path: Path) -> None:
    logs = Logs(str(tmp_path), "day", SCHEMA)
    with pytest.raises(UserError, match=f"(?s)day {DAY} is empty.*got no Parquet files.*-> deliver the day"):
        logs.plan(TODAY)
    write_day(tmp_path, table(9).slice(0, 0), [[], []])
    with pytest.raises(UserError, match=f"(?s)day {DAY} is empty.*got 2 Parquet files without a row"):
        logs.plan(TODAY)


def test_an_address_of_an_unknown_filesystem_is_told_as_such() -> None:
    with pytest.raises(UserError, match="(?s)ftp://host/logs: cannot open the filesystem.*check the address"):
        Logs("ftp://host/logs", "day", SCHEMA)


# The thread that reads ahead.


def wait_for_no_reader() -> bool:
    end = time.monotonic() + 10  # it looks every 0.1 s whether it shall stop
    while readers() and time.monotonic() < end:
        time.sleep(0.01)
    return not readers()


def test_leaving_the_reader_early_stops_its_thread(logs: Logs) -> None:
    reader = logs.read(logs.plan(TODAY), batch_size=LANES, lanes=LANES, seed=1)
    assert not readers(), "nothing is read before somebody asks"
    assert next(reader).num_rows and readers()
    del reader  # what leaving a for loop does
    assert wait_for_no_reader()


def test_an_error_in_the_thread_is_raised_where_the_batches_are_read(tmp_path: Path) -> None:
    write_day(tmp_path, table(), [[150, 151]])
    logs = Logs(str(tmp_path), "day", SCHEMA)
    plan = logs.plan(TODAY)
    path = tmp_path / f"day={DAY}" / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="part-0.parquet: not a readable Parquet file"):
        read(logs, plan)
    assert wait_for_no_reader()


def test_the_thread_runs_ahead_by_no_more_than_its_depth() -> None:
    made: list[int] = []

    def endless() -> Iterator[Any]:
        while True:
            made.append(len(made))
            yield made[-1]

    reader = prefetch(endless(), depth=4)
    for taken in range(1, 4):
        next(reader)
        time.sleep(0.05)  # time to run too far ahead, if it did
        assert len(made) <= taken + 4 + 1  # in the queue, and one in hand
    del reader
    assert wait_for_no_reader()


def test_a_file_whose_column_was_left_without_a_type_reads_as_a_column_of_nulls(tmp_path: Path) -> None:
    """As pandas writes a column that has no value on that day."""
    content = table()
    for name in ("user_id", "history", "price", "click"):
        content = content.set_column(content.column_names.index(name), name, pa.nulls(ROWS))
    write_day(tmp_path, content, [[ROWS]])
    logs = Logs(str(tmp_path), "day", SCHEMA)
    (batch,) = read(logs, logs.plan(TODAY), batch_size=ROWS, lanes=1)
    assert batch.ids["user"].values_N.numel() == batch.ids["seen"].values_N.numel() == 0
    assert batch.numbers_BK[:, 0].isnan().all() and batch.labels_BT[:, 0].isnan().all()
    assert not batch.numbers_BK[:, 1].isnan().any()
