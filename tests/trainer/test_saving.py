"""Saving: a night that ends anywhere goes on from its newest snapshot, and is then the night that was not disturbed.

Oracles: the undisturbed night, compared bit by bit; full snapshots beside the chain of deltas; and counts of the ids in
the logs, taken by pyarrow.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import threads
import torch
from conftest import known, known_to_all

import trainer.day
import trainer.saving
import trainer.writing
from embeddings.buckets import keys_of
from embeddings.exchange import Exchange, LocalExchange
from embeddings.snapshot import Snapshot
from trainer.checkpoint import Checkpoints
from trainer.config import Config, flatten
from trainer.counted import Counted
from trainer.day import run_day
from trainer.dense import dense_state
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.learner import Learner, build, open_logs
from trainer.retention import sweep
from trainer.saving import Saving
from trainer.storage import Storage

TIMES = {"seconds", "score_seconds", "train_seconds", "samples_per_s", "memory_bytes"}
ROOM = {"free", "bytes", "load"}  # for rows to come: after a start from the disk, as much as the rows need
OPTIONS = (
    "train.batch_size=500",
    "tables.item={dim: 8, capacity_rows: 90, grow: false, when_full: evict, min_count: 2, default_row: trained}",
    "tables.user={dim: 8, min_count: 4, admission: {kind: sketch, cells: 65536}, budget_rows: 120, ttl_days: 2}",
    "features.then={kind: id_stats, table: item, of: [impressions, click/impressions], until: batch}",
    "model.balance={kind: gradnorm, first: 3}",
)


class _Killed(BaseException):
    """As SIGKILL: nothing of ours may catch it."""


def live(
    exchange: Exchange,
    settings: Config,
    *,
    snapshots: tuple[int, ...] = (),
    kill_at: tuple[str, int] | None = None,
    base_every: int = 2,
    more: dict[str, Any] | None = None,
    see: Callable[[Saving, str, int], None] = lambda saving, day, steps: None,
) -> dict[str, Any]:
    """A night over all days that are not committed, with snapshots after these steps of each day, killed after a step
    of a day. Returns what then is on the disk, on worker 0 of all, and the days' reports.
    """
    checkpoints, logs = Checkpoints(settings.checkpoints.path, settings.name), open_logs(settings)
    if exchange.rank == 0:
        sweep(checkpoints)
    exchange.all_reduce(torch.zeros(1))
    learner = build(settings, exchange)
    saving = Saving(checkpoints, learner, base_every=base_every, every_s=0, pause_s=0, **(more or {}))
    committed = checkpoints.intervals()
    for interval in [each for each in logs.intervals() if each not in committed]:
        under_way = saving.begin(interval, {"batch_size": settings.train.batch_size})
        see(saving, interval.name, int(under_way.counted["alike/made"][0]) if under_way.counted else -1)

        def after_step(counted: Counted, name: str = interval.name) -> None:
            if counted.steps in snapshots:
                saving.after_step(counted)
                exchange.all_reduce(torch.zeros(1))  # all have begun to write
                if saving._writing:
                    saving._writing.join()
            see(saving, name, counted.steps)
            if kill_at == (name, counted.steps):
                raise _Killed

        report = run_day(
            learner,
            logs,
            logs.plan(interval),
            batch_size=settings.train.batch_size,
            lanes=settings.data.lanes,
            gauc="impressions",
            score=saving.newest is not None,
            progress=lambda *_: None,
            under_way=under_way,
            after_step=after_step,
        )
        saving.commit(report)
    learner = build(settings, exchange)
    checkpoints.load(learner, checkpoints.open(checkpoints.intervals()[-1]))
    return told(learner) | {"reports": [checkpoints.open(each).report for each in checkpoints.intervals()]}


def told(learner: Learner) -> dict[str, Any]:
    return {"rows": known_to_all(learner), "dense": {name: v.numpy() for name, v in dense_state(learner).items()}}


def timeless(reports: list[dict[str, Any]], *without: str) -> list[dict[str, Any]]:
    left_out = {*TIMES, "workers", *without}
    found = [{name: value for name, value in report.items() if name not in left_out} for report in reports]
    ids = [{t: {n: v for n, v in of.items() if n not in ROOM} for t, of in report["ids"].items()} for report in found]
    return [report | {"ids": of} for report, of in zip(found, ids, strict=True)]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit by bit: rows, dense net, reports but for the times."""
    for mine, theirs in zip(timeless(found["reports"]), timeless(expected["reports"]), strict=True):
        mine, theirs = flatten(mine), flatten(theirs)
        assert {n: (v, theirs.get(n)) for n, v in mine.items() if v != theirs.get(n)} == {}
        assert mine.keys() == theirs.keys()
    assert_same_arrays(found["rows"] | {"dense": found["dense"]}, expected["rows"] | {"dense": expected["dense"]})


def assert_same_arrays(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for of, columns in expected.items():
        assert found[of].keys() == columns.keys()
        for name, column in columns.items():
            got = found[of][name]
            assert (got.dtype, got.shape, got.tobytes()) == (column.dtype, column.shape, column.tobytes()), (of, name)


def assert_close(found: Any, expected: Any, path: str = "") -> None:
    """Float32 sums in another order: 1e-5 of the largest of their vector."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for name in expected:
            assert_close(found[name], expected[name], f"{path}/{name}")
    else:
        got, want = (np.atleast_1d(np.asarray(value, float)) for value in (found, expected))
        assert got.shape == want.shape, path
        scale = np.abs(want).max(initial=1e-3)
        assert np.abs(got - want).max(initial=0) <= 1e-5 * scale, path


@pytest.fixture
def folders(tmp_path: Path, small_config: Callable[..., Config]) -> Callable[..., Config]:
    """The configuration, its checkpoints in a folder of that name."""
    return lambda name, *more: small_config(*OPTIONS, *more, f"checkpoints.path={tmp_path / name}")


def night(num_workers: int, settings: Config, **how: Any) -> dict[str, Any] | None:
    """What worker 0 tells, or None when the night was killed."""
    try:
        return threads.run(num_workers, partial(live, settings=settings, **how))[0]
    except _Killed:
        return None


# A night that was killed goes on.


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_night_that_is_killed_and_goes_on_is_the_undisturbed_night_to_the_last_bit(
    folders: Callable[..., Config], num_workers: int
) -> None:
    begun: list[tuple[str, int]] = []
    how: dict[str, Any] = {"snapshots": (2, 3, 6), "see": lambda saving, day, steps: begun.append((day, steps))}
    expected = night(num_workers, folders("undisturbed"))
    assert expected is not None
    settings, kills = folders("killed"), [("2026-11-01", 5), ("2026-11-02", 1), ("2026-11-02", 8), ("2026-11-03", 4)]
    for kill_at in kills:
        assert night(num_workers, settings, kill_at=kill_at, **how) is None
    found = night(num_workers, settings, **how)
    assert found is not None
    assert_same(found, expected)
    first = [begun[i] for i in range(len(begun)) if begun[i][1] == -1 or (i and begun[i - 1] in kills)]
    gone_on = [steps for day, steps in first if steps > 0]
    assert gone_on and ("2026-11-02", -1) in begun  # some began anew, some went on from a snapshot
    items = [report["ids"]["item"] for report in found["reports"]]
    assert min(of["evicted"] for of in items) > 0 and items[1]["admitted"] > 0


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2)])
def test_a_snapshot_is_gone_on_from_by_another_number_of_workers_to_1e_5(
    folders: Callable[..., Config], before: int, after: int
) -> None:
    expected = night(before, folders("undisturbed"))
    settings = folders("killed")
    assert night(before, settings, snapshots=(2, 5), kill_at=("2026-11-02", 6)) is None
    gone_on: list[tuple[str, int]] = []
    found = night(after, settings, see=lambda saving, day, steps: gone_on.append((day, steps)))
    assert found is not None and expected is not None and gone_on[0] == ("2026-11-02", 5)
    exact = {"key", "count", "tally", "last_seen_day", "cells"}
    for of, columns in expected["rows"].items():
        for name in columns.keys() & exact:
            assert np.array_equal(found["rows"][of][name], columns[name]), (of, name)
    assert_close(found["rows"], expected["rows"])
    assert_close(found["dense"], expected["dense"])
    per_worker = ("distinct", "repeats", "imbalance")
    for mine, theirs in zip(timeless(found["reports"]), timeless(expected["reports"]), strict=True):
        assert mine["nulls"] == theirs["nulls"] and mine["steps"] == theirs["steps"]
        for table, of in theirs["ids"].items():
            wanted = {name: value for name, value in of.items() if name not in per_worker}
            assert {name: mine["ids"][table][name] for name in wanted} == wanted
        assert_close(mine["losses"], theirs["losses"])
        assert_close(mine["weights"], theirs["weights"])


def test_a_day_that_was_scored_is_not_scored_again(
    folders: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, scored = folders("killed"), list[str]()
    expected = night(1, folders("undisturbed"))
    assert night(1, settings, snapshots=(1,), kill_at=("2026-11-02", 2)) is None
    rate = trainer.day.rate_day

    def counting(learner: Learner, logs: Any, plan: Any, *rest: Any) -> Any:
        scored.append(plan.interval.name)
        return rate(learner, logs, plan, *rest)

    monkeypatch.setattr(trainer.day, "rate_day", counting)
    found = night(1, settings)
    assert scored == ["2026-11-03"] and found is not None and expected is not None
    assert_same(found, expected)


def test_a_snapshot_of_other_data_or_settings_is_not_gone_on_from(folders: Callable[..., Config]) -> None:
    assert night(1, folders("killed"), snapshots=(2,), kill_at=("2026-11-02", 3)) is None
    gone_on: list[tuple[str, int]] = []
    night(1, folders("killed", "train.batch_size=400"), see=lambda saving, day, steps: gone_on.append((day, steps)))
    assert gone_on[0] == ("2026-11-02", -1)


def test_a_snapshot_of_which_a_file_is_damaged_is_not_gone_on_from(folders: Callable[..., Config]) -> None:
    settings, expected = folders("killed"), night(1, folders("undisturbed"))
    assert night(1, settings, snapshots=(2,), kill_at=("2026-11-02", 3)) is None
    checkpoints = Checkpoints(settings.checkpoints.path, settings.name)
    progress = checkpoints.progress(Interval.parse("2026-11-02", ""))
    assert progress is not None
    (layer,) = [layer for layer in progress.layers if layer["interval"] == "2026-11-02"]
    path = Path(progress.folder, layer["attempt"], next(iter(layer["files"])))
    path.write_bytes(path.read_bytes()[:-1])
    found = night(1, settings)
    assert found is not None and expected is not None
    assert_same(found, expected)


# Each row is trained on exactly once.


def occurrences(settings: Config, days: int) -> dict[int, int]:
    """How often each user stands in the logs of the first days."""
    found = Counter[int]()
    for folder in sorted(Path(settings.data.path).iterdir())[:days]:
        for path in folder.glob("*.parquet"):
            found.update(pq.read_table(path, columns=["user_id"], partitioning=None)["user_id"].to_pylist())
    return dict(zip(keys_of(np.array(list(found), np.int64)).tolist(), found.values(), strict=True))


def plus_one(learner: Learner, batch: Any, day: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A step after which each number of a row is higher by one for each of its sightings in the batch."""
    blocks = learner.embeddings.pull(batch.ids, insert=True)
    for block in blocks:
        seen_U = torch.bincount(block.ids.values_N, minlength=block.rows_UD.shape[0]).float()
        block.rows_UD.grad = -seen_U.unsqueeze(1).expand_as(block.rows_UD).contiguous()
    learner.embeddings.push(blocks)
    learner.averaged.update_parameters(learner.model)
    return torch.zeros(len(learner.losses)), torch.ones(len(learner.losses))


@pytest.mark.parametrize("workers", [(1, 1, 1), (2, 2, 2), (3, 1, 2)])
def test_each_row_is_trained_on_exactly_once_however_often_the_night_is_killed(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, workers: tuple[int, ...]
) -> None:
    """A model that counts: what it has learnt of an id is how often it was trained on it."""
    monkeypatch.setattr(trainer.day, "train_step", plus_one)
    options = ("train.batch_size=500", "train.rows={optimizer: sgd, lr: 1}", "tables.user={dim: 8, capacity_rows: 64}")
    settings, random = small_config(*options), np.random.default_rng(sum(workers))
    for day in ("2026-11-01", "2026-11-02", "2026-11-03"):
        for workers_now, step in zip(workers, sorted(random.choice(range(1, 9), 3, replace=False)), strict=True):
            snapshots = tuple(random.choice(range(1, 9), 3, replace=False).tolist())
            assert night(workers_now, settings, snapshots=snapshots, kill_at=(day, int(step))) is None
    found = night(workers[0], settings)
    assert found is not None and len(found["reports"]) == 3
    users = found["rows"]["user rows"]
    expected = occurrences(settings, days=3)
    assert dict(zip(users["key"].tolist(), users["count"].tolist(), strict=True)) == expected
    assert dict(zip(users["key"].tolist(), users["weight"][:, 0].tolist(), strict=True)) == expected
    assert all(report["ids"]["user"]["ids"] == 4_000 == report["rows"] for report in found["reports"])


# Bases and deltas.


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_chain_of_deltas_holds_what_full_snapshots_hold_bit_for_bit(
    folders: Callable[..., Config], num_workers: int
) -> None:
    chain, full = folders("chain"), folders("full")
    night(num_workers, chain, snapshots=(3, 5), base_every=3)
    night(num_workers, full, base_every=1)
    stores = [Checkpoints(settings.checkpoints.path, settings.name) for settings in (chain, full)]
    layers = [[len(store.open(each).layers) for each in store.intervals()] for store in stores]
    assert layers == [[1, 4, 7], [1, 1, 1]]  # a base, then two snapshots and the rest of a day each
    for interval in stores[0].intervals():
        loaded = []
        for store in stores:
            learner = build(chain, LocalExchange())
            store.load(learner, store.open(interval))
            loaded.append({of: dict(columns) for of, columns in known(learner).items()} | {"dense": as_arrays(learner)})
        assert_same_arrays(*loaded)


def as_arrays(learner: Learner) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in dense_state(learner).items()}


def test_a_base_is_written_every_so_many_days_and_whenever_the_columns_are_others(
    folders: Callable[..., Config],
) -> None:
    def bases(name: str, base_every: int, *more: str) -> list[bool]:
        settings = folders(name, *more)
        night(1, settings, base_every=base_every)
        store = Checkpoints(settings.checkpoints.path, settings.name)
        return [store.open(each).is_base for each in store.intervals()]

    assert [bases(f"every {k}", k) for k in (1, 2, 3)] == [[True] * 3, [True, False, True], [True, False, False]]
    night(1, folders("changed"), kill_at=("2026-11-02", 1), base_every=9)
    assert bases("changed", 9, "train.rows.optimizer=adam") == [True, True, False]


def test_a_delta_holds_the_rows_that_were_touched_and_a_manifest_needs_no_other(
    folders: Callable[..., Config],
) -> None:
    settings = folders("chain", "tables.user={dim: 8}")
    night(1, settings, base_every=3)
    store = Checkpoints(settings.checkpoints.path, settings.name)
    first, second = (store.open(each) for each in store.intervals()[:2])
    assert [layer["interval"] for layer in second.layers] == [first.interval.name, second.interval.name]
    assert second.layers[0] == first.layers[0]
    rows = second.layers[1]["files"]["rows/user/rows-0000-4095.parquet"]["rows"]
    [seen] = [len(set(read_users(settings, 1)))]
    assert rows == seen
    for name in ("manifest.json", "decision.json"):
        store.storage.delete(f"{first.interval.folder}/{name}")
    learner = build(settings, LocalExchange())
    store.load(learner, store.open(second.interval))


def read_users(settings: Config, day: int) -> list[int]:
    folder = sorted(Path(settings.data.path).iterdir())[day]
    tables = [pq.read_table(path, columns=["user_id"], partitioning=None) for path in folder.glob("*.parquet")]
    return [user for table in tables for user in table["user_id"].to_pylist()]


def test_a_worker_reads_only_the_files_that_overlap_its_buckets(
    folders: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, opened = folders("chain"), [list[str](), list[str]()]
    night(2, settings, snapshots=(4,))
    store = Checkpoints(settings.checkpoints.path, settings.name)
    newest = store.open(store.intervals()[1])
    fingerprint = Storage.fingerprint

    def load(exchange: Exchange) -> None:
        def watched(self: Storage, name: str) -> dict[str, Any]:
            opened[exchange.rank].append(name)
            return fingerprint(self, name)

        exchange.all_reduce(torch.zeros(1))
        monkeypatch.setattr(Storage, "fingerprint", watched)  # the threads run one at a time, between collectives
        store.check(build(settings, exchange), newest)

    threads.run(2, load)
    assert len(newest.layers) == 3
    for names, foreign in zip(opened, ("2048-4095", "0000-2047"), strict=True):
        assert names and not any(foreign in name for name in names)
        assert sum("dense" in name for name in names) == 1


# Trouble while a snapshot is written.


@pytest.mark.parametrize("failing", [0, 1])
def test_a_snapshot_that_fails_on_one_worker_is_no_error_and_the_next_holds_it_all(
    folders: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    expected = night(2, folders("undisturbed"))
    settings, tried = folders("failing"), Counter[int]()
    write = trainer.writing.write_files

    def sometimes(folder: Storage, snapshot: Snapshot, states: Any) -> Any:
        rank = next(int(name[len("counted-")]) for name in states if name.startswith("counted-"))
        tried[rank] += 1
        if rank == failing and tried[rank] in (1, 4):
            snapshot.write(folder.filesystem, f"{folder.root}/rows")  # on the disk, and yet lost
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, snapshot, states)

    monkeypatch.setattr(trainer.writing, "write_files", sometimes)
    assert night(2, settings, snapshots=(1, 3, 5), kill_at=("2026-11-02", 7)) is None
    found = night(2, settings)
    assert found is not None and expected is not None
    assert_same(found, expected)
    store = Checkpoints(settings.checkpoints.path, settings.name)
    assert store.open(store.intervals()[0]).manifest["snapshots"] == {"written": 2, "failed": 1}
    layers = store.open(store.intervals()[1]).layers
    assert [layer["interval"] for layer in layers] == ["2026-11-01", *["2026-11-02"] * 3]  # one of three was lost
    for interval in store.intervals():
        attempts = [path.name for path in Path(store.path, interval.folder).iterdir() if path.is_dir()]
        assert {*attempts} <= {layer["attempt"] for layer in store.open(store.intervals()[1]).layers} | {
            store.open(interval).manifest["attempt"]
        }


def test_worker_0_waits_no_longer_than_its_patience_for_a_part_that_does_not_come(
    folders: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage of one worker takes nothing at all, not even the word that it failed."""
    settings = folders("silent")
    write = Storage.write

    def silent(self: Storage, name: str, content: bytes) -> None:
        if name == "part-1.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", silent)
        assert night(2, settings, snapshots=(3,), more={"patience_s": 0.3}) is not None
    store = Checkpoints(settings.checkpoints.path, settings.name)
    assert [store.open(each).manifest["snapshots"]["failed"] for each in store.intervals()] == [1, 1, 1]


def test_a_commit_is_tried_again_and_then_told_on_all_workers_with_nothing_committed(
    folders: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, left = folders("refusing"), [0]
    expected = night(2, folders("undisturbed"))
    write = trainer.saving.write_files

    def refusing(folder: Storage, snapshot: Snapshot, states: Any) -> Any:
        if "dense.safetensors" in states and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, snapshot, states)

    monkeypatch.setattr(trainer.saving, "write_files", refusing)
    left[0] = 4
    with pytest.raises(UserError, match="(?s)No space left on device.*the day before is untouched"):
        night(2, settings)
    store = Checkpoints(settings.checkpoints.path, settings.name)
    assert store.intervals() == [] and store.storage.files(recursive=True) == []
    left[0] = 3
    found = night(2, settings)
    assert found is not None and expected is not None
    assert_same(found, expected)


# Killed between any two writes.


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[str], Config]:
    """Two days of 400 rows, four steps each."""
    from conftest import FIRST_DAY, configure

    from cluster.simulate import simulate

    simulate(str(tmp_path / "simulated"), days=2, start=FIRST_DAY, users=60, items=40, rows_per_day=400, seed=3)
    load = configure(tmp_path / "simulated" / "logs", tmp_path)
    options = ("train.batch_size=100", "tables.item={dim: 8, capacity_rows: 30, grow: false, when_full: evict}")
    return lambda name: load(*options, f"checkpoints.path={tmp_path / name}")


class Killer:
    """Kills the process before or after its n-th write to the disk."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None, after: bool):
        self.writes = list[str]()
        self._at, self._after = at, after
        for of, name in ((Storage, "write"), (Storage, "delete"), (Storage, "delete_folder"), (Snapshot, "write")):
            patch.setattr(of, name, partial_method(self._around, getattr(of, name)))
        patch.setattr(trainer.writing.Writing, "start", trainer.writing.Writing.run)  # in this thread: every run alike
        patch.setattr(trainer.writing.Writing, "join", lambda self: None)

    def _around(self, call: Callable[..., Any], *arguments: Any) -> Any:
        number = len(self.writes)
        self.writes.append(f"{call.__qualname__} {arguments[1:2]}")
        if number == self._at and not self._after:
            raise _Killed
        result = call(*arguments)
        if number == self._at:
            raise _Killed
        return result


def partial_method(around: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: around(call, *arguments)


def run_killed(settings: Config, at: int | None, after: bool) -> tuple[dict[str, Any] | None, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, at, after)
        return night(1, settings, snapshots=(1, 3), base_every=2), killer.writes


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_what_is_read_is_the_snapshot_before_or_this_one_and_the_night_ends_alike(
    tiny: Callable[[str], Config], after: bool
) -> None:
    states: dict[tuple[str, int], dict[str, Any]] = {}

    def see(saving: Saving, day: str, steps: int) -> None:
        states[day, steps] = told(saving.learner)

    expected = night(1, tiny("undisturbed"), see=see)
    assert expected is not None
    found, writes = run_killed(tiny("counted"), None, after)
    assert found is not None and len(writes) > 20
    assert_same(found, expected)
    for at in range(len(writes)):
        settings = tiny(f"killed-{at}")
        assert run_killed(settings, at, after)[0] is None
        read: list[tuple[str, int]] = []

        def check(saving: Saving, day: str, steps: int, read: list[tuple[str, int]] = read) -> None:
            if not read and steps > 0:  # gone on from a snapshot: it is what was known then
                mine = told(saving.learner)
                assert_same_arrays(
                    mine["rows"] | {"dense": mine["dense"]},
                    states[day, steps]["rows"] | {"dense": states[day, steps]["dense"]},
                )
            read.append((day, steps))

        again = night(1, settings, see=check, base_every=2)
        assert again is not None, writes[at]
        assert_same(again, expected)
        store = Checkpoints(settings.checkpoints.path, settings.name)
        needed = {name for each in store.intervals() for name, _ in store.open(each).files()}
        there = {name for name in store.storage.files(recursive=True) if not name.endswith(".json")}
        assert there == needed, f"killed at {writes[at]}: leftovers"
