"""Checkpoints: a committed day comes back bit by bit, and nothing else is ever read.

Oracles: everything that a learner holds, taken from its parts and not through the checkpoint's own code, compared bit
by bit; hashlib for the fingerprints; the folder's listing for what is there.
"""

import dataclasses
import datetime
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import many
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed
from conftest import Columns, known, known_to_all
from small_disk import fill, small_disk
from torch import Tensor

import trainer.checkpoint
import trainer.saving
from embeddings.exchange import CollectiveExchange, Exchange, LocalExchange
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.config import Config
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.learner import Learner, build, open_logs
from trainer.saving import Saving
from trainer.step import train_step

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # no arithmetic goes wrong on the way
DAY = Interval(datetime.date(2026, 11, 1))
NEXT = DAY.next()
TABLES = ("user", "item", "position")
REPORT = {"day": str(DAY), "metrics": {"click@all": {"auc": 0.75}}}


def train(learner: Learner, config: Config, first: int, steps: int, day: Interval = DAY) -> None:
    """Some steps of a day, on this worker's share of them."""
    logs, exchange = open_logs(config), learner.exchange
    learner.embeddings.shard.begin_day(day.number)
    share = {"rank": exchange.rank, "num_workers": exchange.num_workers, "lanes": config.data.lanes}
    batches = logs.read(logs.plan(day), batch_size=config.train.batch_size, **share, seed=1, start_step=first)
    for batch in islice(batches, steps):
        train_step(learner, batch, day.number)


def dense(learner: Learner) -> dict[str, Tensor]:
    """The dense weights, their average, Adam's state and the statistics of the numbers, by name."""
    optimizer = learner.optimizer.state_dict()["state"]
    return {
        **{f"weight {name}": value.clone() for name, value in learner.model.state_dict().items()},
        **{f"average {name}": value.clone() for name, value in learner.averaged.state_dict().items()},
        **{f"adam {i} {name}": value.clone() for i, of in optimizer.items() for name, value in of.items()},
        **{f"statistic {name}": value.clone() for name, value in learner.stats.state().items()},
    }


def rows(learner: Learner) -> dict[str, np.ndarray]:
    """All that is known of each table's ids, by table and column, in the order of their keys."""
    return by_column(known(learner))


def by_column(tables: dict[str, Columns]) -> dict[str, np.ndarray]:
    return {f"{of} {what}": column for of, columns in tables.items() for what, column in columns.items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        mine, theirs = np.asarray(found[name]), np.asarray(value)
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs), name


def save(store: Checkpoints, learner: Learner, interval: Interval, report: dict[str, Any]) -> None:
    """Commit an interval of a model that builds on nothing: a base. A storage that refuses is not asked twice."""
    saving = Saving(store, learner, retries=0, fresh=False)
    saving.begin(interval)
    saving.commit(report)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def config(small_config: Callable[..., Config]) -> Config:
    return small_config()


@pytest.fixture
def store(config: Config) -> Checkpoints:
    return Checkpoints(config.checkpoints.path, config.name)


@pytest.fixture
def learner(config: Config) -> Learner:
    learner = build(config, LocalExchange())
    train(learner, config, 0, 3)
    return learner


@pytest.fixture
def folder(store: Checkpoints, learner: Learner) -> Path:
    """The day's folder, committed."""
    save(store, learner, DAY, REPORT)
    return Path(store.path, f"day={DAY}")


def loaded(store: Checkpoints, config: Config, day: Interval = DAY) -> Learner:
    fresh = build(config, LocalExchange())
    store.load(fresh, store.open(day))
    return fresh


def refusal(store: Checkpoints, config: Config) -> str:
    with pytest.raises(UserError) as raised:
        loaded(store, config)
    return str(raised.value)


# There and back.


def test_everything_that_learns_comes_back_bit_by_bit_and_learns_on_alike(
    store: Checkpoints, config: Config, learner: Learner, folder: Path
) -> None:
    found = loaded(store, config)
    assert_same(dense(found), dense(learner))
    assert_same(rows(found), rows(learner))
    assert learner.optimizer.state_dict()["state"][0]["step"] == 3 and rows(learner)["user rows adagrad_sum"].max() > 0
    for one in (learner, found):
        train(one, config, 3, 2)
    assert_same(dense(found), dense(learner))  # Adam's moments and steps are in use, not only stored
    assert_same(rows(found), rows(learner))


OPTIONS = (
    "tables.item={dim: 8, min_count: 9, default_row: trained, value: {click: 1, cart: 5}, dtype: float16}",
    "tables.user={dim: 8, min_count: 4, admission: {kind: sketch, cells: 65536}, default_row: trained}",
    "tables.user.budget_rows=60",
    "features.then={kind: id_stats, table: item, of: [impressions, click]}",
    "train.rows.optimizer=adam",
)


def test_who_waits_sketches_default_rows_values_and_statistics_come_back_and_count_on_alike(
    store: Checkpoints, small_config: Callable[..., Config]
) -> None:
    config = small_config(*OPTIONS)
    learner = build(config, LocalExchange())
    train(learner, config, 0, 2)
    learner.embeddings.shard.end_day()
    save(store, learner, DAY, REPORT)
    expected, found = rows(learner), loaded(store, config)
    assert_same(rows(found), expected)
    assert min(expected[name].size for name in ("item waiting key", "item rows key", "user rows key")) > 8
    assert expected["user sketch cells"].max() > 3 and expected["item rows tally"].shape[1] == 5  # two of them by day
    assert all(expected[f"{table} default weight"].any() for table in ("user", "item"))
    for one in (learner, found):
        train(one, config, 2, 2, NEXT)
        one.embeddings.shard.end_day()
    assert_same(dense(found), dense(learner))
    assert_same(rows(found), rows(learner))
    assert not np.array_equal(rows(found)["item waiting key"], expected["item waiting key"])


def test_a_day_is_its_report_and_an_identity_of_its_content(store: Checkpoints, learner: Learner, folder: Path) -> None:
    first = store.open(DAY)
    assert (first.interval, first.report) == (DAY, REPORT) and store.open(DAY).id == first.id
    save(store, learner, NEXT, REPORT)
    assert store.intervals() == [DAY, NEXT] and store.open(NEXT).id != first.id
    newest = [store.latest(), store.latest(before=NEXT), store.latest(before=DAY)]
    assert [found and found.interval for found in newest] == [NEXT, DAY, None]


def test_the_manifest_holds_the_size_and_hash_of_every_file(store: Checkpoints, folder: Path) -> None:
    manifest = store.open(DAY).manifest
    attempt = folder / manifest["attempt"]
    files = {path.relative_to(attempt).as_posix(): path.read_bytes() for path in attempt.rglob("*") if path.is_file()}
    entries = manifest["layers"][0]["files"] | manifest["files"]
    assert files.keys() == entries.keys() and len(manifest["layers"]) == 1
    assert {Path(name).suffix for name in files} == {".parquet", ".safetensors"}, "nothing that could run code"
    for name, content in files.items():
        entry = entries[name]
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_the_manifest_says_of_which_table_buckets_and_how_many_rows_a_file_is(
    store: Checkpoints, small_config: Callable[..., Config]
) -> None:
    config = small_config(*OPTIONS)
    learner = build(config, LocalExchange())
    train(learner, config, 0, 2)
    save(store, learner, DAY, REPORT)
    manifest = store.open(DAY).manifest
    attempt = Path(store.path, f"day={DAY}", manifest["attempt"])
    files = manifest["layers"][0]["files"]
    for file, entry in files.items():
        assert file == f"rows/{entry['path']}" == f"rows/{entry['table']}/{entry['kind']}-0000-4095.parquet"
        assert entry["buckets"] == [0, 4096] and entry["rows"] == pq.read_metadata(attempt / file).num_rows
    kinds = {(entry["table"], entry["kind"]) for entry in files.values()}
    of_each = {(table, "rows") for table in TABLES} | {("item", "waiting"), ("user", "sketch")}
    assert kinds == of_each | {("item", "default"), ("user", "default")}


def test_a_filesystem_uri_is_a_place_for_checkpoints(store: Checkpoints, config: Config, folder: Path) -> None:
    by_uri = Checkpoints(f"file://{config.checkpoints.path}/", config.name)
    assert by_uri.intervals() == [DAY]
    assert_same(dense(loaded(by_uri, config)), dense(loaded(store, config)))


# What is not a day.


def test_a_day_without_a_manifest_does_not_exist(store: Checkpoints, folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "manifest.json.tmp")  # killed just before the commit
    assert store.intervals() == [] and store.latest() is None
    with pytest.raises(UserError, match=f"no checkpoint of day {DAY}"):
        store.open(DAY)


def test_a_model_without_a_checkpoint_has_no_days(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path / "nowhere"), "model")
    assert store.intervals() == [] and store.latest() is None and not (tmp_path / "nowhere").exists()


def test_a_path_that_cannot_be_listed_is_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(UserError, match=f"(?s)^{tmp_path}/model: a folder cannot be listed.*-> check the path"):
        Checkpoints(str(tmp_path), "model").intervals()


def test_what_lies_beside_the_days_is_left_alone_but_a_wrong_day_is_told(store: Checkpoints, folder: Path) -> None:
    (folder.parent / ".DS_Store").write_text("")
    (folder.parent / "notes").mkdir()
    assert store.intervals() == [DAY]
    shutil.copytree(folder, f"{folder}.bak")
    with pytest.raises(UserError, match=f"(?s)day={DAY}.bak: not a day.*expected YYYY-MM-DD.*-> rename or remove"):
        store.intervals()


def test_killed_attempts_are_never_read_and_the_next_commit_removes_them(
    store: Checkpoints, config: Config, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "write_manifest", killed)  # all files are written, the manifest is not
        save(store, build(config, LocalExchange()), DAY, REPORT)
    folder = Path(store.path, f"day={DAY}")
    assert store.intervals() == [] and len(list(folder.iterdir())) == 1
    save(store, learner, DAY, REPORT)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", store.open(DAY).manifest["attempt"]}
    assert_same(dense(loaded(store, config)), dense(learner))


def test_a_day_saved_again_is_the_later_one(store: Checkpoints, config: Config, learner: Learner, folder: Path) -> None:
    train(learner, config, 3, 1)
    save(store, learner, DAY, REPORT)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1
    assert_same(rows(loaded(store, config)), rows(learner))


# Damage.


@pytest.mark.parametrize("place", [0, 1 / 3, 0.999])
@pytest.mark.parametrize("file", [*(f"rows/{t}/rows-0000-4095.parquet" for t in TABLES), "dense.safetensors"])
def test_a_flipped_bit_is_told_with_the_file(
    store: Checkpoints, config: Config, folder: Path, file: str, place: float
) -> None:
    path = folder / store.open(DAY).manifest["attempt"] / file
    flip(path, int(place * path.stat().st_size))
    text = refusal(store, config)
    assert text.startswith(f"{path}: a checkpoint file is damaged\n  got {path.stat().st_size} bytes, SHA-256 ")
    assert f"-> restore the file from a copy, or train again from there: nightly --again {DAY}" in text


def test_a_flipped_bit_anywhere_in_the_manifest_is_told_with_the_file(store: Checkpoints, folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        flip(path, place)
        with pytest.raises(UserError, match="manifest.json: the checkpoint's manifest (is damaged|cannot be read)"):
            store.open(DAY)
        path.write_bytes(whole)
    assert store.open(DAY).report == REPORT


@pytest.mark.parametrize("file", ["rows/item/rows-0000-4095.parquet", "dense.safetensors"])
def test_a_file_cut_short_or_gone_is_told_with_the_file(
    store: Checkpoints, config: Config, folder: Path, file: str
) -> None:
    path = folder / store.open(DAY).manifest["attempt"] / file
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: a checkpoint file is damaged" in refusal(store, config)
    path.unlink()
    assert f"{path}: a checkpoint file is missing\n  -> restore the file from a copy" in refusal(store, config)


def test_a_checkpoint_of_another_format_is_told(
    store: Checkpoints, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.checkpoint, "FORMAT", 7)
    with pytest.raises(UserError, match="(?s)manifest.json: a checkpoint of another version.*got format 2.*format 7"):
        store.open(DAY)


# Another configuration.


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("tables.user.dim=4", "tables.user: the table's width changed\n  got dim 4\n  expected dim 8\n  -> undo"),
        (
            "model.body={kind: shared_bottom}",
            "the one that was trained\n  got model/body.",
        ),
        (
            "model.body.num_experts=2",
            "got model/body.experts.0.layers.0.weight of shape [2, 16, 8]\n  expected model/body.experts.0.l",
        ),
        ("model.tower_layers=[4]", "got model/towers.towers.layers.0.weight of shape [3, 8, 4]"),
        ("model.position=null", "the dense net of the configuration is not the one that was trained"),
        ("features.age={kind: number, column: price}", "features: the features changed, or their order"),
        ("tasks.again={label: click}", "tasks: the tasks changed, or their order"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told_with_what_differs(
    store: Checkpoints, small_config: Callable[..., Config], folder: Path, override: str, text: str
) -> None:
    assert text in refusal(store, small_config(override))


@pytest.mark.parametrize("section", ["features", "tasks"])
def test_names_in_another_order_are_refused_because_the_dense_net_knows_places_only(
    store: Checkpoints, config: Config, folder: Path, section: str
) -> None:
    names = list(getattr(config, section).items())
    swapped = dataclasses.replace(config, **{section: dict([names[1], names[0], *names[2:]])})  # type: ignore[arg-type]
    text = refusal(store, swapped)  # every shape is as before: loaded, it would score nonsense
    assert f"{section}: the {section} changed, or their order\n  got {names[1][0]}, {names[0][0]}" in text


def test_a_table_that_is_new_in_the_configuration_starts_empty(
    store: Checkpoints, small_config: Callable[..., Config], learner: Learner, folder: Path
) -> None:
    found = rows(loaded(store, small_config("tables.brand={dim: 4}")))
    new = {name: found.pop(name) for name in list(found) if name.startswith("brand")}
    assert {"brand rows key", "brand rows weight"} <= new.keys() and not any(column.size for column in new.values())
    assert_same(found, rows(learner))


# Another optimizer, another size: what a configuration may change from one day to the next.


def trained(config: Config, store: Checkpoints) -> dict[str, np.ndarray]:
    """Some steps of two days, saved; what is known of the rows then."""
    learner = build(config, LocalExchange())
    train(learner, config, 0, 2)
    train(learner, config, 0, 1, NEXT)
    save(store, learner, NEXT, REPORT)
    return rows(learner)


def of_item(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("item rows "): c for name, c in found.items() if name.startswith("item rows ")}


@pytest.mark.parametrize(
    ("before", "after", "kept", "anew"),
    [
        ("rowwise_adagrad", "adam", (), ("adam_m", "adam_v", "adam_steps")),
        ("rowwise_adagrad", "adagrad", (), ("adagrad_sums",)),
        ("rowwise_adagrad", "sgd", (), ()),
        ("adam", "rowwise_adam", ("adam_m", "adam_steps"), ("adam_row_v",)),
        ("adam", "ftrl", (), ("ftrl_z", "ftrl_n")),
    ],
)
def test_under_another_row_optimizer_states_of_the_same_name_are_kept_and_the_others_start_anew(
    store: Checkpoints,
    small_config: Callable[..., Config],
    before: str,
    after: str,
    kept: tuple[str, ...],
    anew: tuple[str, ...],
) -> None:
    old = of_item(trained(small_config(f"train.rows.optimizer={before}"), store))
    config = small_config(f"train.rows.optimizer={after}")
    learner = loaded(store, config, NEXT)
    new = of_item(rows(learner))
    known_of_rows = ("key", "count", "tally", "weight", "last_seen_day")
    assert new.keys() == {*known_of_rows, *kept, *anew}
    assert_same({name: new[name] for name in (*known_of_rows, *kept)}, {n: old[n] for n in (*known_of_rows, *kept)})
    assert not any(new[name].any() for name in anew)
    train(learner, config, 1, 2, NEXT)
    assert not np.array_equal(of_item(rows(learner))["weight"][: new["key"].size], new["weight"])  # and goes on


def test_rows_that_are_kept_in_float16_from_now_on_are_the_nearest_float16(
    store: Checkpoints, small_config: Callable[..., Config]
) -> None:
    old = trained(small_config(), store)
    new = rows(loaded(store, small_config("tables.item.dtype=float16"), NEXT))
    old["item rows weight"] = old["item rows weight"].astype(np.float16).astype(np.float32)  # numpy's, to nearest
    assert_same(new, old)


FIXED = "{dim: 8, capacity_rows: %d, grow: false, when_full: %s, value: {click: 1, cart: 3}, value_half_life_days: 1}"


def test_a_table_that_may_not_grow_and_holds_more_than_it_may_from_now_on_is_told(
    store: Checkpoints, small_config: Callable[..., Config]
) -> None:
    num_rows = of_item(trained(small_config("tables.item=" + FIXED % (400, "reject")), store))["key"].size
    with pytest.raises(UserError) as raised:
        loaded(store, small_config("tables.item=" + FIXED % (num_rows - 1, "reject")), NEXT)
    assert str(raised.value) == (
        f"tables.item: a table holds more rows than it may\n  got {num_rows} rows\n"
        f"  expected at most {num_rows - 1}, its capacity_rows\n"
        "  -> raise capacity_rows, let it grow (grow: true), or evict (when_full: evict)"
    )
    loaded(store, small_config("tables.item=" + FIXED % (num_rows, "reject")), NEXT)


def test_a_table_that_evicts_loses_its_least_valuable_rows_when_it_is_made_smaller(
    store: Checkpoints, small_config: Callable[..., Config]
) -> None:
    """Oracle: values by a sort; those of ids that were last seen a day ago, of which there are some, halve."""
    old = trained(small_config("tables.item=" + FIXED % (400, "evict")), store)
    new = rows(loaded(store, small_config("tables.item=" + FIXED % (50, "evict")), NEXT))
    before, after = of_item(old), of_item(new)
    value = before["tally"][:, 0] * 0.5 ** (NEXT.number - before["last_seen_day"])
    stayed = np.isin(before["key"], after["key"])
    assert stayed.sum() == after["key"].size == 50 and len(np.unique(before["last_seen_day"])) == 2
    assert value[stayed].min() >= value[~stayed].max() and value[stayed].min() > 0
    assert_same(after, {name: column[stayed] for name, column in before.items()})
    others = [{name: c for name, c in of.items() if not name.startswith("item rows")} for of in (new, old)]
    assert_same(*others)


@pytest.mark.parametrize(
    "table", [FIXED % (500, "reject"), FIXED % (500, "evict"), "{dim: 8, value: {click: 1, cart: 3}}"]
)
def test_a_table_that_is_made_larger_or_may_grow_keeps_every_row(
    store: Checkpoints, small_config: Callable[..., Config], table: str
) -> None:
    config = small_config("tables.item=" + FIXED % (120, "evict"))
    old = trained(config, store)
    assert of_item(old)["key"].size == 120  # it was full
    learner = loaded(store, small_config("tables.item=" + table), NEXT)
    assert_same(rows(learner), old)
    train(learner, config, 1, 2, NEXT)
    assert of_item(rows(learner))["key"].size > 120


# A full disk.


@pytest.mark.parametrize("leave_kib", [8, 40])  # rows take 24, the dense net 44: either does not find room
def test_a_full_disk_commits_nothing_and_leaves_the_day_before_and_the_space_as_they_were(
    config: Config, learner: Learner, tmp_path: Path, leave_kib: int
) -> None:
    with small_disk(tmp_path / "disk", size_kib=1024) as disk:
        store = Checkpoints(str(disk), config.name)
        save(store, learner, DAY, REPORT)
        expected = dense(learner) | rows(learner)
        train(learner, config, 3, 1)
        filler = fill(disk, leave_kib)
        with pytest.raises(UserError, match=f"(?s)^{disk}.*No space left on device.*-> free space.*is untouched"):
            save(store, learner, NEXT, REPORT)
        assert store.intervals() == [DAY] and shutil.disk_usage(disk).free == leave_kib * 1024
        found = loaded(store, config)
        assert_same(dense(found) | rows(found), expected)
        filler.unlink()
        save(store, learner, NEXT, REPORT)
        assert_same(rows(loaded(store, config, NEXT)), rows(learner))


# Any number of workers.


def all_rows(learner: Learner) -> dict[str, np.ndarray]:
    """On worker 0 what all of them know. What lies with another worker than its owner fails."""
    return by_column(known_to_all(learner))


def as_lists(values: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in values.items()}


def refused(work: Callable[[], None]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def two_then_three(exchange: Exchange, config: Config, smaller: list[Config], folder: str) -> dict[str, Any]:
    """Two of the three workers train and save, then all three load: one start of processes for both."""
    torch.distributed.destroy_process_group()
    saved = None
    if exchange.rank < 2:
        saved = save_by_two(_group(f"{folder}/two", exchange.rank, 2), config)
        torch.distributed.destroy_process_group()
    three = _group(f"{folder}/three", exchange.rank, 3)
    return {"saved": saved, "loaded": load_and_save_by_three(three, config, smaller)}


def _group(file: str, rank: int, num_workers: int) -> Exchange:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=num_workers)
    return CollectiveExchange()


def save_by_two(exchange: Exchange, config: Config) -> dict[str, Any]:
    """Save a day; then fail to write and to read on one worker only."""
    store, learner = Checkpoints(config.checkpoints.path, config.name), build(config, exchange)
    train(learner, config, 0, 2)
    save(store, learner, DAY, REPORT)
    saved: dict[str, Any] = {"dense": as_lists(dense(learner)), "rows": all_rows(learner)}
    with pytest.MonkeyPatch.context() as patch:
        if exchange.rank == 1:
            patch.setattr(trainer.saving, "write_files", full)
        saved["not saved"] = refused(lambda: save(store, learner, NEXT, REPORT))
    broken = (_Broken if exchange.rank == 1 else Checkpoints)(config.checkpoints.path, config.name)
    saved["not loaded"] = refused(lambda: broken.load(build(config, exchange), store.open(DAY)))
    return saved | {"days": [str(day) for day in store.intervals()]}


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Broken(Checkpoints):
    """What a worker has whose part of the files is out of reach."""

    def _fill(self, learner: Learner, checkpoint: Checkpoint) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def load_and_save_by_three(exchange: Exchange, config: Config, smaller: list[Config]) -> dict[str, Any]:
    """Load and save; then load into tables that are too small, of which one evicts and one refuses."""
    store, learner = Checkpoints(config.checkpoints.path, config.name), build(config, exchange)
    store.load(learner, store.open(DAY))
    save(store, learner, NEXT, REPORT)
    evicting, refusing = (build(each, exchange) for each in smaller)
    store.load(evicting, store.open(DAY))
    text = refused(lambda: store.load(refusing, store.open(DAY)))
    found = {"dense": as_lists(dense(learner)), "rows": all_rows(learner)}
    return found | {"smaller": all_rows(evicting), "not loaded": text}


def files_of(checkpoint: Checkpoint, table: str) -> list[str]:
    return sorted(name for name in checkpoint.layers[0]["files"] if name.startswith(f"rows/{table}/rows-"))


def test_files_of_two_workers_load_into_one_and_three_and_of_three_into_one(
    small_config: Callable[..., Config], store: Checkpoints, tmp_path: Path
) -> None:
    config, few = small_config(*OPTIONS), ("tables.item.grow=false", "tables.item.capacity_rows=20")
    smaller = [small_config(*OPTIONS, *few, f"tables.item.when_full={how}") for how in ("evict", "reject")]
    workers = many.run(3, two_then_three, config, smaller, str(tmp_path))
    saved, other, _ = [worker["saved"] for worker in workers]
    by_three = [worker["loaded"] for worker in workers]
    by_one = [loaded(store, config, day) for day in (DAY, NEXT)]
    assert all(saved["rows"][f"{what} key"].size > 16 for what in ("user rows", "item rows", "item waiting"))
    for found in (by_three[0]["rows"], *map(all_rows, by_one)):
        assert_same(found, saved["rows"])
    everywhere = [found["dense"] for found in (other, *by_three)] + [as_lists(dense(one)) for one in by_one]
    assert all(found == saved["dense"] for found in everywhere)
    assert files_of(store.open(DAY), "user") == [f"rows/user/rows-{of}.parquet" for of in ("0000-2047", "2048-4095")]
    thirds = ("0000-1365", "1366-2730", "2731-4095")
    assert files_of(store.open(NEXT), "user") == [f"rows/user/rows-{of}.parquet" for of in thirds]
    for found in (saved, other):  # one worker's trouble stops both, and nothing is committed
        assert "No space left on device" in found["not saved"] and "Input/output error" in found["not loaded"]
        assert found["days"] == [str(DAY)]
    assert_same(by_three[0]["smaller"], all_rows(loaded(store, smaller[0])))  # three evict whom one evicts
    assert by_three[0]["smaller"]["item rows key"].size == 20
    assert all("tables.item: a table holds more rows than it may" in found["not loaded"] for found in by_three)


def test_the_manifest_is_plain_json_that_any_program_reads(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["report"] == REPORT and manifest["num_shards"] == 1
    widths = {table: (of["dim"], of["dtype"], of["columns"]) for table, of in manifest["tables"].items()}
    columns = ["adagrad_sum", "value"]
    expected = {"user": (8, "float32", columns), "item": (8, "float32", columns), "position": (4, "float32", columns)}
    assert widths == expected
