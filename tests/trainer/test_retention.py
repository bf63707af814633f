"""What is removed, and what never is. Oracles: the folder's listing, and that what is kept loads whole."""

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import FIRST_DAY, configure

from cluster.simulate import simulate
from embeddings.exchange import LocalExchange
from trainer.checkpoint import Checkpoints
from trainer.config import Config
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.learner import build, open_logs
from trainer.retention import prune, remove, sweep
from trainer.saving import Saving
from trainer.step import train_step
from trainer.storage import Storage

DAYS, BASE_EVERY = 12, 4
FIRST = Interval(FIRST_DAY)


class _Killed(BaseException):
    """As SIGKILL: nothing of ours may catch it."""


def day(number: int) -> Interval:
    return Interval(FIRST_DAY.replace(day=number))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("config")
    simulate(str(folder / "simulated"), days=1, start=FIRST_DAY, users=60, items=40, rows_per_day=400, seed=3)
    loaded: Config = configure(folder / "simulated" / "logs", folder)("train.batch_size=24")
    return loaded


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """Twelve committed days, each fourth a base: 1, 5, 9. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("chain")
    store, learner, logs = Checkpoints(str(folder), "model"), build(config, LocalExchange()), open_logs(config)
    saving, batches = Saving(store, learner, base_every=BASE_EVERY), logs.read(logs.plan(FIRST), batch_size=24, lanes=4)
    for number in range(1, DAYS + 1):
        saving.begin(day(number))
        learner.embeddings.shard.begin_day(day(number).day.toordinal())
        for batch in islice(batches, 1):
            train_step(learner, batch, number)
        saving.commit({"day": str(day(number))})
    return folder


@pytest.fixture
def store(chain: Path, tmp_path: Path) -> Checkpoints:
    shutil.copytree(chain, tmp_path / "copy")
    return Checkpoints(str(tmp_path / "copy"), "model")


def committed(store: Checkpoints) -> list[int]:
    return [interval.day.day for interval in store.intervals()]


def assert_whole(store: Checkpoints, *, loads: Config | None = None) -> None:
    """Every kept checkpoint has all of its files; and nothing else is there."""
    needed = set()
    for interval in store.intervals():
        checkpoint = store.open(interval)
        assert store.verify(checkpoint) > 0
        needed |= {name for name, _ in checkpoint.files()} | {f"{interval.folder}/manifest.json"}
        if loads is not None:
            store.load(build(loads, LocalExchange()), checkpoint)
    assert {name for name in store.storage.files(recursive=True) if not name.endswith("ledger.json")} == needed


def test_the_chain_is_bases_and_what_changed_since(store: Checkpoints, config: Config) -> None:
    layers = [len(store.open(interval).layers) for interval in store.intervals()]
    assert layers == [1, 2, 3, 4] * 3
    assert_whole(store, loads=config)


@pytest.mark.parametrize(
    ("keep_days", "keep_bases", "champion", "kept"),
    [
        (30, 0, (), [*range(1, 13)]),
        (12, 0, (), [*range(1, 13)]),
        (4, 0, (), [9, 10, 11, 12]),
        (1, 0, (), [12]),
        (2, 1, (), [9, 11, 12]),
        (2, 9, (), [1, 5, 9, 11, 12]),
        (6, 1, (), [5, *range(7, 13)]),
        (2, 0, (7,), [7, 11, 12]),
        (3, 1, (2, 3), [2, 3, 9, 10, 11, 12]),
    ],
)
def test_the_newest_days_some_bases_and_the_champion_stay_with_all_that_they_need(
    store: Checkpoints, config: Config, keep_days: int, keep_bases: int, champion: tuple[int, ...], kept: list[int]
) -> None:
    prune(store, keep_days=keep_days, keep_bases=keep_bases, keep=[day(number) for number in champion])
    assert committed(store) == kept
    assert_whole(store, loads=config)


def test_day_after_day_the_disk_is_flat_and_a_layer_goes_when_nobody_needs_it_any_more(
    chain: Path, tmp_path: Path
) -> None:
    """The days come one by one, as they were committed; after each, what is too old goes."""
    store, sizes = Checkpoints(str(tmp_path), "model"), []
    (tmp_path / "model").mkdir()
    for number in range(1, DAYS + 1):
        shutil.copytree(chain / "model" / day(number).folder, tmp_path / "model" / day(number).folder)
        prune(store, keep_days=2, keep_bases=1)
        assert_whole(store)
        sizes.append(len({name.split("/")[0] for name in store.storage.files(recursive=True)}))
    assert max(sizes[4:]) <= BASE_EVERY + 2  # the chain of the newest two days, and one base


def test_what_stays_of_a_pruned_day_is_its_ledger(store: Checkpoints) -> None:
    for number in (1, 2, 12):
        store.storage.write(f"{day(number).folder}/ledger.json", b"[]")
    prune(store, keep_days=1, keep_bases=0)
    ledgers = [name for name in store.storage.files(recursive=True) if name.endswith("ledger.json")]
    assert ledgers == [f"{day(number).folder}/ledger.json" for number in (1, 2, 12)]
    assert_whole(store)


@pytest.mark.parametrize("work", ["prune", "remove"])
def test_killed_anywhere_in_removing_what_is_committed_is_whole_and_the_next_call_ends_it(
    chain: Path, tmp_path: Path, work: str
) -> None:
    def act(store: Checkpoints) -> None:
        if work == "prune":
            prune(store, keep_days=2, keep_bases=1, keep=[day(3)])
        else:
            remove(store, day(7))

    kept = [3, 9, 11, 12] if work == "prune" else [*range(1, 7)]
    for at in range(1000):
        folder = tmp_path / str(at)
        shutil.copytree(chain, folder)
        store, calls = Checkpoints(str(folder), "model"), [at]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("delete", "delete_folder"):
                patch.setattr(Storage, name, _counted(getattr(Storage, name), calls))
            try:
                act(store)
            except _Killed:
                pass
            else:
                break
        for interval in store.intervals():
            store.verify(store.open(interval))
        assert set(kept) <= set(committed(store))
        act(store)
        assert committed(store) == kept
        assert_whole(store)
        shutil.rmtree(folder)
    assert at > 10


def _counted(call: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        if left[0] == 0:
            raise _Killed
        left[0] -= 1
        return call(*arguments)

    return counted


def test_removing_drops_a_day_and_all_later_ones_and_training_goes_on_from_the_day_before(
    store: Checkpoints, config: Config
) -> None:
    remove(store, day(7))
    assert committed(store) == [1, 2, 3, 4, 5, 6]
    assert_whole(store)
    saving = Saving(store, build(config, LocalExchange()), base_every=BASE_EVERY)
    saving.begin(day(7))
    assert saving.newest == day(6)
    saving.commit({})
    assert [layer["interval"] for layer in store.open(day(7)).layers] == [str(day(number)) for number in (5, 6, 7)]


def test_a_sweep_removes_what_killed_attempts_left_in_the_newest_days_and_nothing_that_is_needed(
    store: Checkpoints,
) -> None:
    for folder in (day(12).folder, day(13).folder):
        store.storage.write(f"{folder}/0123456789ab/rows/item/rows-0000-4095.parquet", b"")
        store.storage.write(f"{folder}/.manifest.json.0123456789ab.tmp", b"")
        store.storage.write(f"{folder}/ledger.json", b"[]")
    store.storage.write(f"{day(12).folder}/progress.json", b"{}")
    store.storage.write(f"{day(12).folder}/{store.open(day(12)).manifest['attempt']}/part-0.json", b"{}")
    sweep(store)
    assert_whole(store)
    hidden = [path for path in Path(store.path).rglob(".*")]
    assert hidden == []


def test_a_model_of_hours_keeps_days_and_an_hours_folder_is_no_leftover_of_its_day(
    config: Config, tmp_path: Path
) -> None:
    store, learner = Checkpoints(str(tmp_path), "model"), build(config, LocalExchange())
    saving = Saving(store, learner, base_every=2)
    hours = [Interval(FIRST_DAY, 22)]
    while len(hours) < 28:
        hours.append(hours[-1].next())
    for hour in hours:
        saving.begin(hour)
        saving.commit({})
    assert store.intervals() == store.begun() == hours
    sweep(store)
    prune(store, keep_days=2, keep_bases=0)
    assert store.intervals() == hours[2:]  # those of yesterday and today
    assert_whole(store)
    remove(store, hours[20])
    assert store.intervals() == hours[2:20]


# Verifying.


@pytest.mark.parametrize("what", ["rows of the base", "dense net"])
def test_verify_reads_every_file_down_to_the_base_and_names_the_one_that_is_damaged(
    store: Checkpoints, what: str
) -> None:
    checkpoint = store.open(day(8))
    sizes = [Path(store.path, name).stat().st_size for name, _ in checkpoint.files()]
    assert store.verify(checkpoint) == sum(sizes) and len(sizes) == 4 * 3 + 1
    name = next(name for name, _ in checkpoint.files() if ("dense" in name) == (what == "dense net"))
    assert name.startswith(day(5).folder if what == "rows of the base" else day(8).folder)
    path = Path(store.path, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"(?s)^{path}: a checkpoint file is damaged.*--again {day(8)}"):
        store.verify(checkpoint)
    assert store.verify(store.open(day(9))) > 0  # the next base needs nothing of it
    path.unlink()
    with pytest.raises(UserError, match=f"(?s)^{path}: a checkpoint file is missing"):
        store.verify(checkpoint)
    own = store.verify(checkpoint, own=True) if what == "rows of the base" else 0
    assert own < sum(sizes)
