"""The gate over real nights, in this process: thirty good ones in a row are all promoted, and each of the bad ones that
branch off after the twentieth is held for its own reason. Every number is seeded. The oracle is the law of the
simulation: of a good night nothing is wrong but chance, of a bad one what was done to it.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import FIRST_DAY

from cluster.simulate import simulate
from embeddings.exchange import LocalExchange
from trainer.config import Config
from trainer.configfile import load
from trainer.day import run_day
from trainer.gate import Decision, judge, look_back
from trainer.intervals import Interval
from trainer.learner import Learner, build, open_logs
from trainer.usual import Past

pytestmark = pytest.mark.slow
NIGHTS, BAD_AFTER, ROWS = 30, 20, 10_000
CONFIG = """
name: gate
data: {path: LOGS, group: request_id, user: user_id}
features:
  user_id: {kind: id, table: user, dropout: 0.1}
  item_id: {kind: id, table: item, dropout: 0.1}
  category: {kind: id, table: category}
  device: {kind: id, table: device}
  history: {kind: ids, table: item, max_len: 10}
  position: {kind: id, table: position}
  price: {kind: number, transform: log1p}
  item_age_h: {kind: number}
tables:
  user: {dim: 8, capacity_rows: 512}
  item: {dim: 8, capacity_rows: 512}
  category: {dim: 8, capacity_rows: 64}
  device: {dim: 4, capacity_rows: 16}
  position: {dim: 4, capacity_rows: 16}
tasks:
  click: {}
  cart: {given: click}
  watch: {label: watch_s, loss: mse, where: click, transform: log1p}
model:
  body: {kind: mmoe, num_experts: 3, expert_layers: [32, 16]}
  tower_layers: [16]
  position: {features: [position], tasks: [click]}
  balance: {kind: fixed, weights: {watch: 0.1}}
train: {workers: 1, batch_size: 256, dense: {lr: 0.003, average: 0.99}}
"""

Change = Callable[["Nights"], pa.Table]
Tune = Callable[[Learner], None]


@dataclass
class Nights:
    """What the good nights left: their reports and decisions, and the learner as it was before the bad ones."""

    folder: Path
    config: Config
    past: list[Past]
    learner: Learner

    def day(self, number: int) -> Interval:
        return open_logs(self.config).intervals()[number]

    def rows(self, number: int) -> pa.Table:
        """A day's rows as they were delivered."""
        files = sorted((self.folder / "logs" / self.day(number).folder).glob("*.parquet"))
        return pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])

    @property
    def before(self) -> list[Past]:
        return self.past[:BAD_AFTER]


def night(config: Config, learner: Learner, day: Interval, before: list[Past], rival: Any = None) -> Past:
    """One night: scored, trained on, judged; its report as a manifest would hold it."""
    logs = open_logs(config)
    report = run_day(
        learner,
        logs,
        logs.plan(day),
        batch_size=config.train.batch_size,
        lanes=4,
        gauc="impressions",
        score=bool(before),
        progress=lambda what, rows: None,
        rival=rival,
    )
    decision = decide(json.loads(json.dumps(report, allow_nan=False)), before, config)
    return Past(report, decision.state, decision.reason)


def decide(report: dict[str, Any], before: list[Past], config: Config) -> Decision:
    gate = config.nightly.gate
    by_day = {earlier.report["day"]: earlier for earlier in reversed(before)}
    return judge(report, look_back(by_day, by_day.__getitem__, report["day"], gate), gate)


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """Thirty days of the simulation, each a night."""
    folder = tmp_path_factory.mktemp("nights")
    simulate(str(folder), days=NIGHTS, start=FIRST_DAY, users=300, items=100, rows_per_day=ROWS, seed=1)
    (folder / "gate.yaml").write_text(CONFIG.replace("LOGS", str(folder / "logs")))
    config = load(str(folder / "gate.yaml"), ())
    learner, past, kept = build(config, LocalExchange()), [], None
    for day in open_logs(config).intervals():
        if len(past) == BAD_AFTER:
            kept = copy.deepcopy(learner)
        past.append(night(config, learner, day, past))
    assert kept is not None
    return Nights(folder, config, past, kept)


def test_thirty_good_nights_in_a_row_are_all_promoted(nights: Nights) -> None:
    alarms = [f"{past.report['day']}: {past.reason}" for past in nights.past if past.state != "promoted"]
    print(f"\nfalse alarms: {len(alarms)} of {len(nights.past)} good nights", *alarms, sep="\n")
    assert len(nights.past) == NIGHTS and not alarms


def replaced(table: pa.Table, **columns: Any) -> pa.Table:
    """The table with other columns of the same types; NaN is null."""
    for name, values in columns.items():
        place = table.column_names.index(name)
        array = values if isinstance(values, pa.ChunkedArray) else pa.array(values, table[name].type, from_pandas=True)
        table = table.set_column(place, name, array)
    return table


def floats(table: pa.Table, column: str) -> Any:
    """NaN where null."""
    return table[column].cast(pa.float64()).to_numpy()


LABELS = ("click", "cart", "buy", "watch_s")


def today(nights: Nights) -> pa.Table:
    return nights.rows(BAD_AFTER)


def labels_shuffled(nights: Nights) -> pa.Table:
    order = pa.array(np.random.default_rng(1).permutation(ROWS))
    return replaced(today(nights), **{name: today(nights)[name].take(order) for name in LABELS})


def half_of_the_rows(nights: Nights) -> pa.Table:
    return today(nights).filter(pa.array(np.arange(ROWS) % 2 == 0))


def one_hour(nights: Nights) -> pa.Table:
    return today(nights).slice(ROWS // 2, ROWS // 24)


def a_feature_nulled(nights: Nights) -> pa.Table:
    return replaced(today(nights), price=np.full(ROWS, np.nan))


def yesterday_again(nights: Nights) -> pa.Table:
    return nights.rows(BAD_AFTER - 1)


def last_week(nights: Nights) -> pa.Table:
    return nights.rows(BAD_AFTER - 7)


def half_of_the_clicks_lost(nights: Nights) -> pa.Table:
    table = today(nights)
    lost = (np.random.default_rng(1).random(ROWS) < 0.5) & (floats(table, "click") == 1)
    unclicked = {name: np.where(lost, np.nan, floats(table, name)) for name in ("cart", "buy", "watch_s")}
    return replaced(table, click=np.where(lost, 0, floats(table, "click")), **unclicked)


def ids_of_another_key(nights: Nights) -> pa.Table:
    return replaced(today(nights), item_id=today(nights)["item_id"].to_numpy() ^ 0x5BD1E995)


def users_and_items_swapped(nights: Nights) -> pa.Table:
    return replaced(today(nights), user_id=today(nights)["item_id"], item_id=today(nights)["user_id"])


def no_cart(nights: Nights) -> pa.Table:
    return replaced(today(nights), cart=floats(today(nights), "cart") * 0)


def another_unit(nights: Nights) -> pa.Table:
    return replaced(today(nights), item_age_h=floats(today(nights), "item_age_h") * 1000)


def learns(dense: float = 1, rows: float = 1) -> Tune:
    """Learning rates times so much."""

    def tune(learner: Learner) -> None:
        for group in learner.optimizer.param_groups:
            group["lr"] *= dense
        for pool in learner.embeddings.shard.pools:
            optimizer: Any = pool.optimizer
            pool.optimizer = dataclasses.replace(optimizer, lr=optimizer.lr * rows)

    return tune


@torch.no_grad()
def predicts_twice_as_much(learner: Learner) -> None:
    """Every head's odds are 2.6 times as high, as by a serving path that forgot a correction; nothing else is wrong."""
    for model in (learner.model, learner.averaged.module):
        model.get_parameter("towers.out.bias").add_(0.95)


def as_it_is(learner: Learner) -> None:
    """No harm is done to the learner."""


# What is done to the night, the check that must lead the reason, and what the reason must say.
BAD: dict[str, tuple[Change, Tune, str, str]] = {
    "the labels are shuffled": (labels_shuffled, as_it_is, "auc", "click@all is 0.5"),
    "half of the rows are missing": (half_of_the_rows, as_it_is, "rows", "0.5 times the usual 10,000"),
    "one hour of the day": (one_hour, as_it_is, "rows", "416 rows"),
    "a feature is null": (a_feature_nulled, as_it_is, "nulls", "price is null in 100% of the rows (usually 2%)"),
    "the net learns 100 times as fast": (today, learns(dense=100), "norms", "the norm of the dense weights"),
    "the rows learn 100 times as fast": (today, learns(rows=100), "norms", "the norm of the rows of table"),
    "yesterday's rows once more": (yesterday_again, as_it_is, "delivery", "those of 2026-11-20, delivered again"),
    "a file of last week": (last_week, as_it_is, "delivery", "those of 2026-11-14, delivered again"),
    "half of the clicks are lost": (half_of_the_clicks_lost, as_it_is, "labels", "calibration: click@all is"),
    "predictions are doubled": (today, predicts_twice_as_much, "calibration", "click@all is"),
    "the items' ids are of another key": (
        ids_of_another_key,
        as_it_is,
        "ids",
        "of the ids of table item are new (usually 5% to 6%)",
    ),
    "users and items are swapped": (users_and_items_swapped, as_it_is, "ids", "100% of the ids of table user are new"),
    "a task's label is always 0": (no_cart, as_it_is, "labels", "the mean label of cart@click is 0 "),
    "a number in another unit": (another_unit, as_it_is, "values", "the mean of item_age_h is"),
}


def bad_night(nights: Nights, change: Change, tune: Tune) -> tuple[Past, Learner]:
    """The night after the twentieth good one, with other rows or another learner; and what was learnt."""
    day, folder = nights.day(BAD_AFTER), nights.folder / "bad" / f"{change.__name__}-{id(tune)}"
    (folder / day.folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(change(nights), folder / day.folder / "part-0.parquet", row_group_size=4096)
    config = dataclasses.replace(nights.config, data=dataclasses.replace(nights.config.data, path=str(folder)))
    learner = copy.deepcopy(nights.learner)
    tune(learner)
    return night(config, learner, day, nights.before), learner


@pytest.mark.parametrize("what", BAD)
def test_a_bad_night_is_held_for_its_reason(nights: Nights, what: str) -> None:
    change, tune, check, words = BAD[what]
    found, _ = bad_night(nights, change, tune)
    print(f"\n{what}: {found.state}: {found.reason}")
    assert found.state == "held"
    assert found.reason.startswith(f"{check}: ") and words in found.reason


def test_the_same_night_without_harm_is_promoted(nights: Nights) -> None:
    """Its files are others than those of the chain, its rows are not."""
    found, _ = bad_night(nights, today, as_it_is)
    assert found.state == "promoted"
    assert found.report["metrics"] == nights.past[BAD_AFTER].report["metrics"]
    assert found.report["content"] == nights.past[BAD_AFTER].report["content"]


@pytest.mark.parametrize("what", ["the labels are shuffled", "half of the rows are missing", "a file of last week"])
def test_the_night_after_bad_rows_is_promoted_beside_the_champion(nights: Nights, what: str) -> None:
    """What a day of bad rows did to the model is too little to see: it costs one night of freshness."""
    held, learner = bad_night(nights, *BAD[what][:2])
    name, champion = str(nights.before[-1].report["day"]), copy.deepcopy(nights.learner)
    after = night(nights.config, learner, nights.day(BAD_AFTER + 1), [*nights.before, held], (name, lambda: champion))
    difference = after.report["rival"]["differences"]["click@all"]
    print(f"\nafter {what}: {after.state}: {after.reason}; from the champion {difference}")
    assert held.state == "held" and after.state == "promoted"
    assert abs(difference["auc"]) < 0.01 and difference["low"] < difference["auc"] < difference["high"]


def test_the_night_after_a_broken_one_is_held_since_experts_died_and_the_champion_is_better(nights: Nights) -> None:
    """The chain goes on from a held night; what its model is worth is measured beside the champion on the same rows."""
    day, learner, champion = nights.day(BAD_AFTER), copy.deepcopy(nights.learner), copy.deepcopy(nights.learner)
    learns(dense=100)(learner)
    held = night(nights.config, learner, day, nights.before)
    learns(dense=0.01)(learner)
    name = str(nights.before[-1].report["day"])
    after = night(nights.config, learner, nights.day(BAD_AFTER + 1), [*nights.before, held], (name, lambda: champion))
    print(f"\nthe night after: {after.state}: {after.reason}")
    assert held.state == after.state == "held"
    decision = decide(after.report, [*nights.before, held], nights.config)
    assert decision.found[:3] == ["experts", "auc", "champion"] and f"that of the champion of {name}" in after.reason
    difference = after.report["rival"]["differences"]["click@all"]
    ours, its = (found["click@all"]["auc"] for found in (after.report["metrics"], after.report["rival"]["metrics"]))
    assert difference["auc"] == ours - its and difference["low"] < difference["auc"] < difference["high"] < -0.1
