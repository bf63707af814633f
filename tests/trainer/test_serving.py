"""Proof tests of a model in two parts. The oracle is the whole model on the same rows, read from a log."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from embeddings.exchange import LocalExchange
from trainer.bodies import BODIES
from trainer.config import Config
from trainer.configfile import load
from trainer.data import Logs
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.learner import Learner, build, fusion_powers, open_logs
from trainer.predictions import told
from trainer.serving import Served, save
from trainer.step import score_step, train_step

CONFIG = """
name: tiny
data: {path: LOGS, group: request}
features:
  user: {kind: id, table: user, dropout: 0.1}
  clicked: {kind: ids, table: item, max_len: 4}
  item: {kind: id, table: item}
  brand: {kind: id, table: brand}
  tags: {kind: ids, table: brand, pool: sum}
  hour: {kind: number}
  price: {kind: number, transform: log1p}
  age: {kind: number, column: item_age}
  counts: {kind: id_stats, table: item, id: item, of: [impressions, click, click/impressions]}
  position: {kind: id, table: position}
tables:
  user: {dim: 8, capacity_rows: 64, init_scale: 0.5}
  item: {dim: 8, capacity_rows: 64, init_scale: 0.5, dtype: float16}
  brand: {dim: 4, capacity_rows: 16, init_scale: 0.5, default_row: trained}
  position: {dim: 4, capacity_rows: 16, init_scale: 0.5}
tasks:
  click: {}
  buy: {given: click}
  watch: {loss: mse, where: click, transform: log1p}
model:
  body: {kind: mmoe, num_experts: 3, expert_layers: [8, 8], normalise: true, gate_dropout: 0.1}
  tower_layers: [8]
  position: {features: [position], tasks: [click], layers: [4]}
train: {workers: 1, batch_size: 40}
fusion: {powers: {click@all: 1, watch@click: 0.5}}
serving: {item: [item, brand, tags, price, age, counts]}
"""
USER = ("user", "clicked", "hour", "when", "done")
DAY = datetime.date(2026, 11, 20)
NUM_REQUESTS, ITEMS = 12, 10


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A day of requests, each of one user and some items, with nulls, unknown ids and string ids among them."""
    folder, rng = tmp_path_factory.mktemp("logs"), np.random.default_rng(0)
    rows = []
    for request in range(NUM_REQUESTS):
        length = int(rng.integers(0, 7))
        clicked = [int(i) for i in rng.integers(-20, 20, length)]
        user = {"user": int(rng.integers(-8, 8)), "clicked": clicked, "hour": float(rng.normal()), "request": request}
        user |= {"done": [int(i) for i in rng.integers(0, 3, length)]}
        for place in range(ITEMS):
            click = int(rng.random() < 0.5)
            item = {"item": int(rng.integers(-20, 20)), "brand": str(rng.choice(["acme", "köln", "z"]))}
            item |= {"tags": [str(t) for t in rng.choice(["a", "b", "c"], int(rng.integers(0, 3)))]}
            item |= {"price": float(rng.exponential(9)), "item_age": float(rng.normal()), "length": float(place * 9)}
            labels = {"click": click, "buy": int(click and rng.random() < 0.5), "watch": float(rng.exponential(20))}
            rows.append(user | item | labels | {"position": place})
    for row in rows[::7]:
        row |= {"item_age": None, "brand": None}
    (folder / f"day={DAY}").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / f"day={DAY}" / "part.parquet")
    return folder


def config(logs: Path, folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Config:
    import yaml

    tree = yaml.safe_load(CONFIG.replace("LOGS", str(logs)))
    if change:
        change(tree)
    (folder / "model.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load(str(folder / "model.yaml"))


def trained(settings: Config) -> tuple[Learner, Logs]:
    """A model after some steps on half of the day: the other half has ids without a row."""
    torch.manual_seed(0)
    learner, logs = build(settings, LocalExchange()), open_logs(settings)
    learner.embeddings.shard.begin_day(DAY.toordinal())
    batch = logs.decode(logs.plan(Interval(DAY)).row_groups[0]).select(torch.arange(NUM_REQUESTS * ITEMS // 2))
    batch.lane_B = torch.zeros(batch.num_rows, dtype=torch.int64)
    for _ in range(5):
        train_step(learner, batch, DAY.toordinal())
    learner.embeddings.shard.end_day()
    learner.embeddings.shard.begin_day(DAY.toordinal() + 1)
    return learner, logs


def exported(settings: Config, out: Path) -> tuple[Learner, Logs, Served]:
    learner, logs = trained(settings)
    save(learner, logs.schema, settings.serving.item, fusion_powers(settings), str(out), {"model": settings.name})
    return learner, logs, Served(str(out))


def whole(learner: Learner, logs: Logs, settings: Config) -> dict[str, Tensor]:
    """By address what the whole model tells of the day's rows."""
    batch = logs.decode(logs.plan(Interval(DAY)).row_groups[0])
    return told(learner.graph, score_step(learner, batch), batch.labels_BT, fusion_powers(settings))


def in_parts(served: Served, logs: Path) -> dict[str, Tensor]:
    """The same from what a server is asked: for each request the user once, then his items."""
    table = pq.read_table(logs / f"day={DAY}" / "part.parquet")
    found = []
    for request in range(NUM_REQUESTS):
        rows = table.filter(pa.compute.equal(table["request"], request)).to_pydict()
        user = {name: values[0] for name, values in rows.items() if name in USER}
        found.append(served.score(user, {name: values for name, values in rows.items() if name not in USER}))
    return {address: torch.cat([each[address] for each in found]) for address in found[0]}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """To 1e-6: float32 sums in another order. Values of a regression are larger: relative to them."""
    assert list(got) == list(want)
    for address in want:
        torch.testing.assert_close(
            got[address], want[address], rtol=2e-6, atol=1e-6, msg=lambda t, a=address: f"{a}: {t}"
        )


def sequences(tree: dict[str, Any]) -> None:
    tree["features"] |= {
        "trail": {"kind": "ids", "column": "clicked", "table": "item", "pool": "none", "max_len": 5},
        "outcomes": {"kind": "ids", "column": "done", "table": "done", "pool": "none", "max_len": 5},
    }
    tree["tables"]["done"] = {"dim": 4, "capacity_rows": 8, "init_scale": 0.5}
    tree["model"]["encoder"] = {
        "kind": "dupn",
        "items": "trail",
        "properties": "outcomes",
        "query": ["user"],
        "hidden": 8,
    }


def auxiliary(tree: dict[str, Any]) -> None:
    sequences(tree)
    tree["model"]["auxiliary"] = {
        "match": {"kind": "matching", "user": ["user"], "item": ["item"], "label": "click"},
        "near": {"kind": "correlation", "sequence": "trail"},
    }


def quantiles(tree: dict[str, Any]) -> None:
    tree["tasks"]["watch"] = {"loss": {"kind": "d2q", "by": "2 * length", "lengths": [40, 90]}, "where": "click"}


def total_probability(tree: dict[str, Any]) -> None:
    tree["tasks"] = {"click": {}, "cart": {"label": "buy", "given": "click"}, "buy": {"given": "click", "via": "cart"}}
    tree["tasks"]["grade"] = {"label": "click + buy", "loss": "softmax", "links": ["click"]}
    tree["fusion"] = {"powers": {"buy@all": 1, "grade@all": 0.1}}


def looked_at(tree: dict[str, Any]) -> None:
    tree["model"]["position"]["form"] = "product"


def weighed(tree: dict[str, Any]) -> None:
    tree["tasks"]["click"] = {"positive_weight": 3, "negatives_kept": 0.5}


@pytest.fixture(scope="module")
def out(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export, to be read."""
    folder = tmp_path_factory.mktemp("export")
    exported(config(logs, folder, quantiles), folder / "out")
    return folder / "out"


CHANGES = [sequences, auxiliary, quantiles, total_probability, looked_at, weighed]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_two_parts_tell_what_the_whole_model_tells(logs: Path, tmp_path: Path, change: Any) -> None:
    settings = config(logs, tmp_path, change)
    learner, read, served = exported(settings, tmp_path / "out")
    assert_equal(in_parts(served, logs), whole(learner, read, settings))


@pytest.mark.parametrize("kind", BODIES)
def test_every_body_can_be_split(logs: Path, tmp_path: Path, kind: str) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["model"]["body"] = {"kind": kind}

    settings = config(logs, tmp_path, change)
    learner, read, served = exported(settings, tmp_path / "out")
    assert_equal(in_parts(served, logs), whole(learner, read, settings))


def test_a_request_with_n_items_calls_the_user_part_once(logs: Path, out: Path) -> None:
    served = Served(str(out))
    calls = dict.fromkeys(served.programs, 0)

    def counted(part: str) -> Callable[..., Any]:
        program = served.programs[part]

        def call(*inputs: Any) -> Any:
            calls[part] += 1
            return program(*inputs)

        return call

    served.programs = {part: counted(part) for part in calls}
    in_parts(served, logs)
    assert calls == {"user": NUM_REQUESTS, "item": NUM_REQUESTS}


def test_auxiliary_nets_and_the_position_tower_are_not_exported(logs: Path, tmp_path: Path) -> None:
    """P18, P10: not one of their tensors is in the programs, and no table that only they read is in the folder."""
    learner, _, served = exported(config(logs, tmp_path, auxiliary), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out/rows").iterdir()} == {
        f"{t}.arrow" for t in ("user", "item", "brand", "done")
    }
    assert learner.model.position is not None
    theirs = [
        p.shape for module in (learner.auxiliary, learner.model.position) for p in module.parameters() if p.dim() > 1
    ]
    exported_shapes = [p.shape for part in served.programs.values() for p in part.parameters()]
    assert theirs and not [shape for shape in theirs if shape in exported_shapes]
    names = [name for part in served.programs.values() for name, _ in part.named_parameters()]
    assert not [name for name in names if "position" in name or "auxiliary" in name]


@pytest.mark.parametrize(
    ("change", "item", "words"),
    [
        (sequences, ["item", "user"], "the encoder reads 'user', which belongs to an item"),
        (sequences, ["item", "trail"], "the encoder reads 'trail', which belongs to an item"),
        (None, ["item"], "'counts' tells of the id 'item': both belong to the item, or neither"),
        (None, ["position"], "no feature of the main input belongs to the item"),
        (None, ["user", "clicked", "hour", "item", "brand", "tags", "price", "age", "counts"], "belongs to the user"),
    ],
)
def test_a_model_whose_user_part_would_read_an_item_is_refused(
    logs: Path, tmp_path: Path, change: Any, item: list[str], words: str
) -> None:
    settings = config(logs, tmp_path, change)
    learner = build(settings, LocalExchange())
    learner.embeddings.shard.begin_day(DAY.toordinal())
    with pytest.raises(UserError, match="the model cannot be split") as refused:
        save(learner, open_logs(settings).schema, item, {}, str(tmp_path / "out"), {})
    assert words in str(refused.value) and not (tmp_path / "out").exists()


def test_an_export_is_never_written_over_another(logs: Path, tmp_path: Path, out: Path) -> None:
    settings = config(logs, tmp_path, quantiles)
    before = (out / "export.json").read_bytes()
    with pytest.raises(UserError, match="a model is exported there already"):
        exported(settings, out)
    assert (out / "export.json").read_bytes() == before


@pytest.mark.parametrize("name", ["user.pt2", "item.pt2", "rows/item.arrow"])
def test_a_damaged_export_is_refused(tmp_path: Path, out: Path, name: str) -> None:
    shutil.copytree(out, tmp_path / "out")
    content = bytearray((tmp_path / "out" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: a file of the export is damaged or missing"):
        Served(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("user", "item", "words"),
    [
        ({"hour": "late"}, {}, "the user's values: column 'hour' cannot be read"),
        ({}, {"price": [-2.0, 1.0]}, "the item's values, column 'price', row 0: log1p is not defined here"),
        ({}, {"item": [1.5, 2.5]}, "column 'item' has the wrong type"),
        ({}, {"item": [1]}, "columns of different lengths"),
        ({"clicked": 3}, {}, "column 'clicked' has the wrong type"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_in_words(
    out: Path, user: dict[str, Any], item: dict[str, Any], words: str
) -> None:
    served = Served(str(out))
    good = {"user": 1, "clicked": [2, 3], "hour": 0.5}
    items = {
        "item": [1, 2],
        "brand": ["a", None],
        "tags": [[], ["a"]],
        "price": [1.0, 2.0],
        "item_age": [None, 2.0],
        "length": [9, 50],
    }
    assert served.score(good, items)["score"].shape == (2,)
    with pytest.raises(UserError) as refused:
        served.score(good | user, items | item)
    assert words in str(refused.value)
    with pytest.raises(UserError, match="column 'hour' is missing"):
        served.user({"user": 1, "clicked": []})


def test_export_json_says_all_that_another_server_must_know(out: Path) -> None:
    about = json.loads((out / "export.json").read_text())
    assert about["item"]["features"]["tags"] == {
        "kind": "ids",
        "column": "tags",
        "table": "brand",
        "pool": "sum",
        "max_len": 50,
    }
    assert about["item"]["features"]["price"] == {"kind": "number", "column": "price", "transform": "log1p"}
    assert about["item"]["expressions"] == {"watch by": "2 * length"}
    assert set(about["user"]["features"]) == {"user", "clicked", "hour"}
    assert about["tables"]["item"]["dim"] == 8 and about["tables"]["user"]["default"] is None
    assert len(about["tables"]["brand"]["default"]) == 4
    assert about["outputs"]["buy@all"] == "binary" and about["outputs"]["watch@click"] == "regression"
