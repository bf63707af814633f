"""Checkpoints in an object store: a real server, which refuses, and loses its answers.

Oracle: the same night on a local disk, bit by bit.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import pytest
from conftest import FIRST_DAY, configure, known
from s3_server import Server, s3_server

from cluster.simulate import simulate
from embeddings.exchange import LocalExchange
from trainer.checkpoint import Checkpoints
from trainer.config import Config
from trainer.counted import Counted
from trainer.day import run_day
from trainer.errors import UserError
from trainer.learner import build, open_logs
from trainer.retention import prune, remove, sweep
from trainer.saving import Saving

pytestmark = pytest.mark.slow


class _Killed(BaseException):
    """As SIGKILL: nothing of ours may catch it."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    folder = tmp_path_factory.mktemp("config")
    simulate(str(folder / "simulated"), days=3, start=FIRST_DAY, users=60, items=40, rows_per_day=400, seed=3)
    return configure(folder / "simulated" / "logs", folder)


def live(
    config: Config, store: Checkpoints, *, snapshots: tuple[int, ...] = (), kill_at: int = 0, days: int = 3
) -> None:
    """The days that are not committed, killed after that many steps in all."""
    logs, learner, made = open_logs(config), build(config, LocalExchange()), [0]
    saving = Saving(store, learner, base_every=2, every_s=0, pause_s=0)

    def after_step(counted: Counted) -> None:
        if counted.steps in snapshots:
            saving.after_step(counted)
            if saving._writing:
                saving._writing.join()
        made[0] += 1
        if made[0] == kill_at:
            raise _Killed

    committed = store.intervals()
    for interval in islice((each for each in logs.intervals() if each not in committed), days):
        under_way = saving.begin(interval)
        report = run_day(
            learner,
            logs,
            logs.plan(interval),
            batch_size=100,
            lanes=4,
            gauc="impressions",
            score=saving.newest is not None,
            progress=lambda *_: None,
            under_way=under_way,
            after_step=after_step,
        )
        saving.commit(report)


def rows(config: Config, store: Checkpoints) -> dict[str, dict[str, bytes]]:
    learner = build(config, LocalExchange())
    store.load(learner, store.open(store.intervals()[-1]))
    return {table: {name: column.tobytes() for name, column in of.items()} for table, of in known(learner).items()}


@pytest.fixture(scope="module")
def expected(load: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    config, store = load("train.batch_size=100"), Checkpoints(str(tmp_path_factory.mktemp("local")), "model")
    live(config, store)
    return rows(config, store)


def test_a_night_in_an_object_store_goes_on_from_its_snapshots_and_removes_what_is_old(
    load: Callable[..., Config], server: Server, expected: dict[str, dict[str, bytes]]
) -> None:
    config, store = load("train.batch_size=100"), Checkpoints(server.uri("killed"), "model")
    for kill_at in (2, 4, 3):
        with pytest.raises(_Killed):
            live(config, store, snapshots=(1, 3), kill_at=kill_at)
    sweep(store)
    live(config, store, snapshots=(2,))
    assert rows(config, store) == expected
    for interval in store.intervals():
        store.verify(store.open(interval))
    needed = {name for interval in store.intervals() for name, _ in store.open(interval).files()}
    assert {name for name in store.storage.files(recursive=True) if not name.endswith(".json")} == needed
    prune(store, keep_days=1, keep_bases=0)
    assert [interval.name for interval in store.intervals()] == ["2026-11-03"] and rows(config, store) == expected
    remove(store, store.intervals()[0])
    assert store.intervals() == [] and store.storage.files(recursive=True) == []


@pytest.mark.parametrize("file", ["manifest.json", "dense.safetensors", "rows-0000-4095.parquet"])
@pytest.mark.parametrize("kind", ["refuse", "lose"])
def test_a_commit_of_which_the_store_refuses_a_file_or_loses_its_answer_stands(
    load: Callable[..., Config], server: Server, expected: dict[str, dict[str, bytes]], kind: str, file: str
) -> None:
    config, store = load("train.batch_size=100"), Checkpoints(server.uri(f"{kind} {file}"), "model")
    live(config, store, days=2)
    with server.trouble(kind, times=2, methods="PUT POST", containing=file):
        live(config, store, snapshots=(2,))
    assert rows(config, store) == expected
    for interval in store.intervals():
        store.verify(store.open(interval))


def test_a_store_that_has_gone_is_told_and_the_night_goes_on_when_it_is_back(
    load: Callable[..., Config], server: Server, expected: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.storage._MAX_ATTEMPTS", 2)
    config, store = load("train.batch_size=100"), Checkpoints(server.uri("gone"), "model")
    live(config, store, days=1)
    with server.trouble("refuse", methods="PUT POST"), pytest.raises(UserError, match="the day before is untouched"):
        live(config, store, snapshots=(1, 3))
    assert [interval.name for interval in store.intervals()] == ["2026-11-01"]
    live(config, store)
    assert rows(config, store) == expected
