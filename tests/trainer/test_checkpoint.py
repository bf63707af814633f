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
import pytest
import torch
import torch.distributed
from small_disk import fill, small_disk
from torch import Tensor

import trainer.checkpoint
from embeddings.buckets import shard_sizes, unhash64
from embeddings.exchange import CollectiveExchange, Exchange, LocalExchange
from trainer.agree import gather_json
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.config import Config
from trainer.errors import UserError
from trainer.learner import Learner, build, open_logs
from trainer.step import train_step

DAY = datetime.date(2026, 11, 1)
NEXT = DAY + datetime.timedelta(days=1)
TABLES = ("user", "item", "position")
REPORT = {"day": str(DAY), "metrics": {"click@all": {"auc": 0.75}}}


def train(learner: Learner, config: Config, first: int, steps: int) -> None:
    """Some steps of the first day, on this worker's share of them."""
    logs, exchange = open_logs(config), learner.exchange
    share = {"rank": exchange.rank, "num_workers": exchange.num_workers, "lanes": config.data.lanes}
    batches = logs.read(logs.plan(DAY), batch_size=config.train.batch_size, **share, seed=1, start_step=first)
    for batch in islice(batches, steps):
        train_step(learner, batch, DAY.toordinal())


def dense(learner: Learner) -> dict[str, Tensor]:
    """The dense weights, their average, Adam's state and the statistics of the numbers, by name."""
    optimizer = learner.optimizer.state_dict()["state"]
    return {
        **{f"weight {name}": value.clone() for name, value in learner.model.state_dict().items()},
        **{f"average {name}": value.clone() for name, value in learner.averaged.state_dict().items()},
        **{f"adam {i} {name}": value.clone() for i, of in optimizer.items() for name, value in of.items()},
        **{f"statistic {name}": value.clone() for name, value in learner.stats.state().items()},
    }


def rows(learner: Learner) -> dict[str, Tensor]:
    """Each table's ids, weights and row state, in the order of their keys."""
    tables = {name: learner.embeddings.shard.export(name) for name in learner.embeddings.shard.tables}
    return {
        f"{table} {what}": value.clone()
        for table, parts in tables.items()
        for what, value in zip(("keys", "weights", "state"), parts, strict=True)
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name  # the same bits


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
    store.save(learner, DAY, REPORT)
    return Path(store.path, f"day={DAY}")


def loaded(store: Checkpoints, config: Config, day: datetime.date = DAY) -> Learner:
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
    assert learner.optimizer.state_dict()["state"][0]["step"] == 3 and rows(learner)["user state"].max() > 0
    for one in (learner, found):
        train(one, config, 3, 2)
    assert_same(dense(found), dense(learner))  # Adam's moments and steps are in use, not only stored
    assert_same(rows(found), rows(learner))


def test_a_day_is_its_report_its_decision_and_an_identity_of_its_content(
    store: Checkpoints, learner: Learner, folder: Path
) -> None:
    first = store.open(DAY)
    assert (first.day, first.report) == (DAY, REPORT) and store.open(DAY).id == first.id
    assert store.decision(DAY) is None
    store.decide(DAY, {"state": "held", "reason": "why"})
    assert store.decision(DAY) == {"state": "held", "reason": "why"} and store.open(DAY).id == first.id
    store.save(learner, NEXT, REPORT)
    assert store.days() == [DAY, NEXT] and store.open(NEXT).id != first.id
    newest = [store.latest(), store.latest(before=NEXT), store.latest(before=DAY)]
    assert [found and found.day for found in newest] == [NEXT, DAY, None]


def test_the_manifest_holds_the_size_and_hash_of_every_file(store: Checkpoints, folder: Path) -> None:
    manifest = store.open(DAY).manifest
    attempt = folder / manifest["attempt"]
    files = {path.relative_to(attempt).as_posix(): path.read_bytes() for path in attempt.rglob("*") if path.is_file()}
    assert files.keys() == manifest["files"].keys()
    assert {Path(name).suffix for name in files} == {".parquet", ".safetensors"}, "nothing that could run code"
    for name, content in files.items():
        entry = manifest["files"][name]
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_filesystem_uri_is_a_place_for_checkpoints(store: Checkpoints, config: Config, folder: Path) -> None:
    by_uri = Checkpoints(f"file://{config.checkpoints.path}/", config.name)
    assert by_uri.days() == [DAY]
    assert_same(dense(loaded(by_uri, config)), dense(loaded(store, config)))


# What is not a day.


def test_a_day_without_a_manifest_does_not_exist(store: Checkpoints, folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "manifest.json.tmp")  # killed just before the commit
    assert store.days() == [] and store.latest() is None
    with pytest.raises(UserError, match="(?s)manifest.json.*cannot be read"):
        store.open(DAY)


def test_a_model_without_a_checkpoint_has_no_days(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path / "nowhere"), "model")
    assert store.days() == [] and store.latest() is None and not (tmp_path / "nowhere").exists()


def test_a_path_that_cannot_be_listed_is_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(UserError, match=f"(?s)^{tmp_path}/model: a folder cannot be listed.*-> check the path"):
        Checkpoints(str(tmp_path), "model").days()


def test_what_lies_beside_the_days_is_left_alone_but_a_wrong_day_is_told(store: Checkpoints, folder: Path) -> None:
    (folder.parent / ".DS_Store").write_text("")
    (folder.parent / "notes").mkdir()
    assert store.days() == [DAY]
    shutil.copytree(folder, f"{folder}.bak")
    with pytest.raises(UserError, match=f"(?s)day={DAY}.bak: not a day.*expected YYYY-MM-DD.*-> rename or remove"):
        store.days()


def test_killed_attempts_are_never_read_and_the_next_commit_removes_them(
    store: Checkpoints, config: Config, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "_commit", killed)  # all files are written, the manifest is not
        store.save(build(config, LocalExchange()), DAY, REPORT)
    folder = Path(store.path, f"day={DAY}")
    assert store.days() == [] and len(list(folder.iterdir())) == 1
    store.save(learner, DAY, REPORT)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", store.open(DAY).manifest["attempt"]}
    assert_same(dense(loaded(store, config)), dense(learner))


def test_a_day_saved_again_is_the_later_one(store: Checkpoints, config: Config, learner: Learner, folder: Path) -> None:
    train(learner, config, 3, 1)
    store.save(learner, DAY, REPORT)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1
    assert_same(rows(loaded(store, config)), rows(learner))


# Damage.


@pytest.mark.parametrize("place", [0, 1 / 3, 0.999])
@pytest.mark.parametrize("file", [*(f"rows/{t}/00000-of-00001.parquet" for t in TABLES), "dense.safetensors"])
def test_a_flipped_bit_is_told_with_the_file(
    store: Checkpoints, config: Config, folder: Path, file: str, place: float
) -> None:
    path = folder / store.open(DAY).manifest["attempt"] / file
    flip(path, int(place * path.stat().st_size))
    text = refusal(store, config)
    assert text.startswith(f"{path}: a checkpoint file is damaged\n  got {path.stat().st_size} bytes, SHA-256 ")
    assert f"-> restore the file from a copy, or remove the folder day={DAY} and run again" in text


def test_a_flipped_bit_anywhere_in_the_manifest_is_told_with_the_file(store: Checkpoints, folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        flip(path, place)
        with pytest.raises(UserError, match="manifest.json: the checkpoint's manifest (is damaged|cannot be read)"):
            store.open(DAY)
        path.write_bytes(whole)
    assert store.open(DAY).report == REPORT


@pytest.mark.parametrize("file", ["rows/item/00000-of-00001.parquet", "dense.safetensors"])
def test_a_file_cut_short_or_gone_is_told_with_the_file(
    store: Checkpoints, config: Config, folder: Path, file: str
) -> None:
    path = folder / store.open(DAY).manifest["attempt"] / file
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: a checkpoint file is damaged" in refusal(store, config)
    path.unlink()
    assert f"{path}: a checkpoint file is missing\n  -> restore the file from a copy" in refusal(store, config)


def test_a_damaged_decision_is_told_with_the_file(store: Checkpoints, folder: Path) -> None:
    store.decide(DAY, {"state": "promoted"})
    (folder / "decision.json").write_text('{"state": "prom')
    with pytest.raises(UserError, match="(?s)decision.json: the day's decision cannot be read.*-> restore.*remove it"):
        store.decision(DAY)


def test_a_checkpoint_of_another_format_is_told(
    store: Checkpoints, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.checkpoint, "FORMAT", 7)
    with pytest.raises(UserError, match="(?s)manifest.json: a checkpoint of another version.*got format 1.*format 7"):
        store.open(DAY)


# Another configuration.


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("tables.user.dim=4", "tables.user: the table's width changed\n  got dim 4\n  expected dim 8\n  -> undo"),
        ("model.body={kind: shared_bottom}", "the one that was trained\n  got body.bottom.layers.0.weight of shape ["),
        ("model.body.num_experts=2", "got body.gates of shape [3, 26, 2]\n  expected body.gates of shape [3, 26, 3]\n"),
        ("model.tower_layers=[4]", "got towers.layers.0.weight of shape [3, 8, 4]"),
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
    assert [found.pop(f"brand {what}").numel() for what in ("keys", "weights", "state")] == [0, 0, 0]
    assert_same(found, rows(learner))


# A full disk.


def test_a_full_disk_commits_nothing_and_leaves_the_day_before_and_the_space_as_they_were(
    config: Config, learner: Learner, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", size_kib=1024) as disk:
        store = Checkpoints(str(disk), config.name)
        store.save(learner, DAY, REPORT)
        expected = dense(learner) | rows(learner)
        train(learner, config, 3, 1)
        filler = fill(disk, leave_kib=40)  # a checkpoint takes 100: some of its files are written
        with pytest.raises(UserError, match=f"(?s)^{disk}.*No space left on device.*-> free space.*is untouched"):
            store.save(learner, NEXT, REPORT)
        assert store.days() == [DAY] and shutil.disk_usage(disk).free == 40 * 1024
        found = loaded(store, config)
        assert_same(dense(found) | rows(found), expected)
        fill(disk, leave_kib=0)
        with pytest.raises(UserError, match=f"(?s)^{disk}.*No space left on device"):
            store.decide(DAY, {"state": "promoted"})
        assert store.decision(DAY) is None
        filler.unlink()
        store.save(learner, NEXT, REPORT)
        assert_same(rows(loaded(store, config, NEXT)), rows(learner))


# Any number of workers.


def all_rows(learner: Learner) -> dict[str, dict[int, list[float]]]:
    """On worker 0, by table and id: the row's weights and state. An id on two workers fails."""
    found: dict[str, dict[int, list[float]]] = {}
    for table in learner.embeddings.shard.tables:
        keys, weights, state = learner.embeddings.shard.export(table)
        sizes = shard_sizes(keys, learner.exchange.num_workers)
        assert sizes[learner.exchange.rank] == keys.numel(), "rows lie with the owner of their bucket"
        mine = [unhash64(keys).tolist(), torch.cat([weights, state.unsqueeze(1)], dim=1).tolist()]
        parts = gather_json(learner.exchange, mine)
        ids = [id_ for part in parts for id_ in part[0]]
        assert len(ids) == len(set(ids))
        found[table] = dict(zip(ids, [row for part in parts for row in part[1]], strict=True))
    return found


def as_lists(values: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in values.items()}


def refused(work: Callable[[], None]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def two_then_three(exchange: Exchange, config: Config, folder: str) -> dict[str, Any]:
    """Two of the three workers train and save, then all three load: one start of processes for both."""
    torch.distributed.destroy_process_group()
    saved = None
    if exchange.rank < 2:
        saved = save_by_two(_group(f"{folder}/two", exchange.rank, 2), config)
        torch.distributed.destroy_process_group()
    return {"saved": saved, "loaded": load_and_save_by_three(_group(f"{folder}/three", exchange.rank, 3), config)}


def _group(file: str, rank: int, num_workers: int) -> Exchange:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=num_workers)
    return CollectiveExchange()


def save_by_two(exchange: Exchange, config: Config) -> dict[str, Any]:
    """Save a day; then fail to write and to read on one worker only."""
    store, learner = Checkpoints(config.checkpoints.path, config.name), build(config, exchange)
    train(learner, config, 0, 2)
    store.save(learner, DAY, REPORT)
    saved: dict[str, Any] = {"dense": as_lists(dense(learner)), "rows": all_rows(learner)}
    broken = (_Broken if exchange.rank == 1 else Checkpoints)(config.checkpoints.path, config.name)
    saved["not saved"] = refused(lambda: broken.save(learner, NEXT, REPORT))
    saved["not loaded"] = refused(lambda: broken.load(build(config, exchange), store.open(DAY)))
    return saved | {"days": [str(day) for day in store.days()]}


class _Broken(Checkpoints):
    """What one worker has when its disk is full, or its part of the files out of reach."""

    def _write_parts(self, learner: Learner, folder: str) -> dict[str, dict[str, Any]]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _read_parts(self, learner: Learner, checkpoint: Checkpoint) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def load_and_save_by_three(exchange: Exchange, config: Config) -> dict[str, Any]:
    store, learner = Checkpoints(config.checkpoints.path, config.name), build(config, exchange)
    store.load(learner, store.open(DAY))
    store.save(learner, NEXT, REPORT)
    return {"dense": as_lists(dense(learner)), "rows": all_rows(learner)}


def files_of(checkpoint: Checkpoint, table: str) -> list[str]:
    return sorted(name for name in checkpoint.manifest["files"] if name.startswith(f"rows/{table}/"))


def test_files_of_two_workers_load_into_one_and_three_and_of_three_into_one(
    config: Config, store: Checkpoints, tmp_path: Path
) -> None:
    workers = many.run(3, two_then_three, config, str(tmp_path))
    saved, other, _ = [worker["saved"] for worker in workers]
    by_three = [worker["loaded"] for worker in workers]
    by_one = [loaded(store, config, day) for day in (DAY, NEXT)]
    assert all(len(table) > 16 for table in saved["rows"].values() if table is not saved["rows"]["position"])
    assert by_three[0]["rows"] == saved["rows"] and [all_rows(one) for one in by_one] == [saved["rows"]] * 2
    everywhere = [found["dense"] for found in (other, *by_three)] + [as_lists(dense(one)) for one in by_one]
    assert all(found == saved["dense"] for found in everywhere)
    assert files_of(store.open(DAY), "user") == [f"rows/user/0000{n}-of-00002.parquet" for n in range(2)]
    assert files_of(store.open(NEXT), "user") == [f"rows/user/0000{n}-of-00003.parquet" for n in range(3)]
    for found in (saved, other):  # one worker's trouble stops both, and nothing is committed
        assert "No space left on device" in found["not saved"] and "Input/output error" in found["not loaded"]
        assert found["days"] == [str(DAY)]


def test_the_manifest_is_plain_json_that_any_program_reads(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["report"] == REPORT and manifest["num_shards"] == 1
    assert manifest["tables"] == {"user": {"dim": 8}, "item": {"dim": 8}, "position": {"dim": 4}}
