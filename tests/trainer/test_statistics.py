"""Statistics of ids as features, against a plain dict of what happened: the closed form of decayed counts and rates."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import threads
import torch
from torch import Tensor

from embeddings.exchange import Exchange, LocalExchange
from embeddings.jagged import Jagged
from embeddings.snapshot import Layer, Snapshot, load
from embeddings.table import TableConfig
from trainer.config import Config, DataConfig, FeatureConfig, ModelConfig, TaskConfig
from trainer.data import Batch
from trainer.learner import Learner, build

HALF_LIFE, SMOOTHING, TTL = 2.0, 3.0, 3
ITEMS, ROWS, BATCHES, DAYS = 9, 40, 3, range(100, 106)
OF = ("impressions", "click", "buy", "click/impressions", "buy/click")
Row = tuple[int | None, float, float]  # item, click and buy, NaN where not known


def config(until: str) -> Config:
    statistics = FeatureConfig(
        "id_stats", table="item", of=OF, half_life_days=HALF_LIFE, smoothing=SMOOTHING, until=until
    )
    features = {"item": FeatureConfig("id", table="item"), "seen": FeatureConfig("ids", table="item")}
    return Config(
        name="statistics",
        data=DataConfig("nowhere"),
        features=features | {"happened": statistics},
        tables={"item": TableConfig(dim=4, capacity_rows=4, ttl_days=TTL)},
        tasks={"click": TaskConfig(), "buy": TaskConfig(given="click")},
        model=ModelConfig({"kind": "shared_bottom", "layers": [4]}),
    )


def days(seed: int = 0) -> dict[int, list[list[Row]]]:
    """Global batches by day. On any day a third of the items stays away, so that some are evicted and come back."""
    rng, found = np.random.default_rng(seed), {}
    for day in DAYS:
        present = [item for item in range(ITEMS) if (day + item) % 6 not in (0, 1, 2, 3) or item < 5]
        rows = []
        for _ in range(BATCHES * ROWS):
            click = float(rng.random() < 0.4)
            buy = float(rng.random() < 0.5) if click else 0.0
            item = int(rng.choice(present)) if rng.random() < 0.9 else None
            rows.append((item, click, math.nan if rng.random() < 0.2 else buy))
        found[day] = [rows[first : first + ROWS] for first in range(0, len(rows), ROWS)]
    return found


def batch(rows: Sequence[Row]) -> Batch:
    """The rows as the reader hands them over; each row's list mentions item 0 twice, which happens to nobody."""
    lengths = torch.tensor([int(item is not None) for item, *_ in rows], dtype=torch.int64)
    ids = torch.tensor([item for item, *_ in rows if item is not None], dtype=torch.int64)
    labels = torch.tensor([row[1:] for row in rows], dtype=torch.float32).reshape(-1, 2)
    mentions = Jagged(torch.zeros(2 * len(rows), dtype=torch.int64), 2 * torch.arange(len(rows) + 1))
    lists = {"item": Jagged.from_lengths(ids, lengths), "seen": mentions}
    return Batch(lists, torch.empty(len(rows), 0), labels, torch.ones(len(rows)), torch.arange(len(rows)))


def numbers(learner: Learner, rows: Sequence[Row], train: bool = True) -> Tensor:
    """What the net would read of these rows; in training they happen."""
    shared = batch(rows)
    labels = learner.happened(shared) if train else None
    blocks = learner.embeddings.pull(shared.ids, insert=train, labels_BL=labels)
    found = learner.features.numbers(shared, blocks, learner.embeddings.shard.overall_S)
    if train:
        learner.embeddings.push(blocks)
    return found


def share(rows: Sequence[Row], exchange: Exchange) -> Sequence[Row]:
    cuts = [len(rows) * rank // exchange.num_workers for rank in range(exchange.num_workers + 1)]
    return rows[cuts[exchange.rank] : cuts[exchange.rank + 1]]


def run(exchange: Exchange, settings: Config, logs: dict[int, list[list[Row]]]) -> list[Any]:
    """The numbers of every batch in training, this worker's share."""
    learner, found = build(settings, exchange), []
    for day, batches in logs.items():
        learner.embeddings.shard.begin_day(day)
        found += [numbers(learner, share(rows, exchange)).tolist() for rows in batches]
        learner.embeddings.shard.end_day()
    return found


def by_batch(settings: Config, logs: dict[int, list[list[Row]]], num_workers: int) -> list[list[list[float]]]:
    """The numbers of every global batch, with so many workers."""
    shares = threads.run(num_workers, run, settings, logs)
    return [sum(parts, []) for parts in zip(*shares, strict=True)]


class Oracle:
    """By item: [impressions, clicks, buys] until yesterday, decayed to today, and today's; the day it was last seen."""

    def __init__(self, until: str):
        self.until = until
        self.past: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self.today: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self.seen: dict[int, int] = {}

    def day(self, day: int, batches: list[list[Row]]) -> list[list[list[float]]]:
        overall = [sum(counts[e] for counts in self.past.values()) for e in range(3)]
        found = []
        for rows in batches:
            found.append([self.row(item, overall) for item, *_ in rows])
            for item, click, buy in rows:
                if item is not None:
                    self.seen[item] = day
                    for e, happened in enumerate((1, click, buy)):
                        self.today[item][e] += 0 if math.isnan(happened) else happened
            self.seen[0] = day  # every list mentions item 0
        for item in list(self.past | self.today):
            counts = zip(self.past.pop(item, [0.0] * 3), self.today.pop(item, [0.0] * 3), strict=True)
            if day - self.seen[item] < TTL:
                self.past[item] = [(past + today) * 2 ** (-1 / HALF_LIFE) for past, today in counts]
        return found

    def row(self, item: int | None, overall: list[float]) -> list[float]:
        past, today = (counts.get(item, [0.0] * 3) for counts in (self.past, self.today))
        shown, click, buy = (p + (t if self.until == "batch" else 0) for p, t in zip(past, today, strict=True))
        click_rate, buy_rate = (a / max(b, 1e-9) for a, b in ((overall[1], overall[0]), (overall[2], overall[1])))
        rates = [
            (click + SMOOTHING * click_rate) / (shown + SMOOTHING),
            (buy + SMOOTHING * buy_rate) / (click + SMOOTHING),
        ]
        return [*(math.log1p(count) for count in (shown, click, buy)), *rates]


@pytest.mark.parametrize("until", ["day", "batch"])
def test_statistics_are_the_decayed_counts_and_smoothed_rates_of_what_happened_before(until: str) -> None:
    oracle, logs = Oracle(until), days()
    wanted = [rows for day, batches in logs.items() for rows in oracle.day(day, batches)]
    found = by_batch(config(until), logs, 1)
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=2e-6, atol=1e-7)  # float32 against float64
    assert np.ptp(np.array(wanted)[BATCHES:], axis=(0, 1)).min() > 0.1  # every number varies


def test_items_are_evicted_and_come_back_with_nothing_counted() -> None:
    learner, logs = build(config("day"), LocalExchange()), days()
    evicted = 0
    for day, batches in logs.items():
        learner.embeddings.shard.begin_day(day)
        for rows in batches:
            numbers(learner, rows)
        learner.embeddings.shard.end_day()
        evicted = int(learner.embeddings.shard.counts["evicted"].sum())
    assert evicted >= 2 and learner.embeddings.shard.counts["new"].sum() > ITEMS  # the oracle above saw both


@pytest.mark.parametrize("until", ["day", "batch"])
@pytest.mark.parametrize("num_workers", [2, 3])
def test_statistics_do_not_depend_on_the_number_of_workers(until: str, num_workers: int) -> None:
    logs = days()
    assert by_batch(config(until), logs, num_workers) == by_batch(config(until), logs, 1)  # bit for bit


@pytest.mark.parametrize("until", ["day", "batch"])
def test_nothing_that_happens_later_changes_what_is_read_now(until: str) -> None:
    logs, first = days(), BATCHES + 1  # the second batch of the second day
    other = days()
    for place, rows in enumerate(rows for batches in other.values() for rows in batches):
        if place >= first:
            rows[:] = [(item, 1 - click, 1.0) for item, click, _ in rows]
    found, changed = (by_batch(config(until), each, 1) for each in (logs, other))
    assert found[: first + 1] == changed[: first + 1] and found[first + 1 :] != changed[first + 1 :]


def test_what_happens_today_is_read_from_tomorrow_on() -> None:
    logs = days()
    found = by_batch(config("day"), logs, 1)
    by_item = [
        dict(zip((i for i, *_ in rows), each, strict=True))
        for rows, each in zip(sum(logs.values(), []), found, strict=True)
    ]
    for first in range(0, len(found), BATCHES):
        for later in by_item[first + 1 : first + BATCHES]:
            assert all(later[item] == numbers for item, numbers in by_item[first].items() if item in later)


def restarted(exchange: Exchange, settings: Config, folder: Path, layers: list[Layer], rest: Any) -> Any:
    """Go on from a snapshot taken in the middle of a day."""
    day, batches = rest
    learner = build(settings, exchange)
    load(learner.embeddings.shard, pyarrow.fs.LocalFileSystem(), layers)
    learner.embeddings.shard.begin_day(day)
    return [numbers(learner, share(rows, exchange)).tolist() for rows in batches]


@pytest.mark.parametrize("until", ["day", "batch"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_restart_in_the_middle_of_a_day_reads_on_as_if_nothing_was(
    until: str, num_workers: int, tmp_path: Path
) -> None:
    logs, settings = days(), config(until)
    learner = build(settings, LocalExchange())
    *before, last = DAYS
    for day in before:
        learner.embeddings.shard.begin_day(day)
        for rows in logs[day]:
            numbers(learner, rows)
        learner.embeddings.shard.end_day()
    base = Snapshot(learner.embeddings.shard, base=True).write(pyarrow.fs.LocalFileSystem(), str(tmp_path / "base"))
    learner.embeddings.shard.begin_day(last)
    numbers(learner, logs[last][0])
    delta = Snapshot(learner.embeddings.shard, base=False).write(pyarrow.fs.LocalFileSystem(), str(tmp_path / "delta"))
    wanted = [numbers(learner, rows).tolist() for rows in logs[last][1:]]
    layers = [Layer(str(tmp_path / "base"), base), Layer(str(tmp_path / "delta"), delta)]
    shares = threads.run(num_workers, restarted, settings, tmp_path, layers, (last, logs[last][1:]))
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == wanted


def test_scoring_reads_statistics_and_leaves_them_as_they_are() -> None:
    learner, logs = build(config("batch"), LocalExchange()), days()
    learner.embeddings.shard.begin_day(DAYS[0])
    numbers(learner, logs[DAYS[0]][0])
    first, second = (numbers(learner, logs[DAYS[0]][1], train=False) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, numbers(learner, logs[DAYS[0]][1]))
