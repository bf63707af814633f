"""What a day's rows are like, and how large the weights are. Oracles: by hand, and one worker beside several."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import threads
import torch
from conftest import FIRST_DAY

from embeddings.exchange import Exchange, LocalExchange
from embeddings.jagged import Jagged
from trainer.config import Config
from trainer.data import Batch
from trainer.day import rate_day, run_day
from trainer.facts import Facts, content
from trainer.intervals import Interval
from trainer.learner import build, open_logs
from trainer.norms import norms

NAN = float("nan")
DAYS = [Interval(FIRST_DAY), Interval(FIRST_DAY).next()]


def batch(users: list[int], histories: list[list[int]], prices: list[float]) -> Batch:
    num = len(users)
    lists = torch.tensor([id for each in histories for id in each], dtype=torch.int64)
    ids = {
        "user": Jagged(torch.tensor(users), torch.arange(num + 1)),
        "history": Jagged.from_lengths(lists, torch.tensor([len(each) for each in histories])),
    }
    ones = torch.ones(num, 1)
    return Batch(ids, torch.tensor(prices).unsqueeze(1), ones, ones, torch.arange(num))


ROWS: tuple[list[int], list[list[int]], list[float]] = ([1, 2, 3, 3], [[5], [], [5, 6], [7]], [1.0, NAN, 3.0, 8.0])


def told(*batches: Batch) -> dict[str, Any]:
    facts = Facts(["price"])
    for each in batches:
        facts.add(each)
    return facts.report(LocalExchange())


def test_the_content_is_that_of_the_rows_in_any_order_and_any_batches() -> None:
    order = [2, 0, 3, 1]
    parts = [batch(*([column[i] for i in part] for column in ROWS)) for part in (order[:1], order[1:])]
    assert told(*parts)["content"] == told(batch(*ROWS))["content"]
    assert len(told(batch(*ROWS))["content"]) == 16


@pytest.mark.parametrize(
    "other",
    [
        ([1, 2, 3, 4], ROWS[1], ROWS[2]),
        (ROWS[0], [[5], [], [5, 6], [8]], ROWS[2]),
        (ROWS[0], [[5], [5], [6], [7]], ROWS[2]),  # the same ids in other lists
        (ROWS[0], ROWS[1], [1.0, NAN, 3.0, 8.5]),
        ([2, 1, 3, 3], ROWS[1], ROWS[2]),  # the same values in other rows
    ],
)
def test_any_other_row_is_other_content(other: tuple[Any, Any, Any]) -> None:
    assert told(batch(*other))["content"] != told(batch(*ROWS))["content"]


def test_labels_are_no_content_as_they_may_arrive_later() -> None:
    later = batch(*ROWS)
    later.labels_BT = later.labels_BT * 0
    assert torch.equal(content(later.ids, later.numbers_BK), content(batch(*ROWS).ids, batch(*ROWS).numbers_BK))


def test_numbers_are_told_by_mean_and_deviation_without_their_nulls() -> None:
    found = told(batch(*ROWS))["numbers"]["price"]
    assert found == {"mean": 4.0, "deviation": pytest.approx(np.std([1, 3, 8]))}
    nothing = batch([1], [[2]], [NAN])
    assert told(nothing)["numbers"]["price"] == {"mean": None, "deviation": None}


def test_norms_are_root_mean_squares_of_weights_and_of_the_rows_that_were_seen(
    small_config: Callable[..., Any],
) -> None:
    learner = build(small_config(), LocalExchange())
    shard, pool = learner.embeddings.shard, learner.embeddings.shard.pool_of("user")
    numbers = np.zeros(3, np.uint8) + shard.number["user"]
    shard.begin_day(5)
    rows = pool.add(np.array([11, 12, 13]), numbers, torch.arange(24.0).view(3, 8))
    pool.ids.seen_R[rows] = [shard.periods.now, shard.periods.now - 1, shard.periods.now]
    with torch.no_grad():
        for weight in learner.model.parameters():
            weight.fill_(2.0)
        for weight in learner.averaged.module.parameters():
            weight.fill_(-1.0)
    found = norms(learner)
    seen = [*range(8), *range(16, 24)]
    assert found == {"dense": 2.0, "lag": 3.0, "rows": {"user": pytest.approx(np.sqrt(np.mean(np.square(seen))))}}


def two_days(exchange: Exchange, config: Config) -> dict[str, Any]:
    """The second day's report, scored by its model and by another."""
    learner, rival, logs = build(config, exchange), build(config, exchange), open_logs(config)
    how: dict[str, Any] = {"batch_size": 500, "lanes": 6, "gauc": "impressions", "progress": lambda what, rows: None}
    run_day(learner, logs, logs.plan(DAYS[0]), score=False, **how)
    return run_day(learner, logs, logs.plan(DAYS[1]), score=True, rival=("untrained", lambda: rival), **how)


def near(value: Any) -> Any:
    """The same tree with room for the rounding of sums in another order."""
    if isinstance(value, dict):
        return {key: near(of) for key, of in value.items()}
    return pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize("override", ["data.user=user_id", "data.keys=[]"])
def test_what_the_gate_is_told_is_the_same_for_any_number_of_workers(
    small_config: Callable[..., Any], override: str
) -> None:
    config = small_config(override, "model.body.gate_dropout=0")
    alone, three = (threads.run(n, functools.partial(two_days, config=config))[0] for n in (1, 3))
    for part in ("content", "units", "nulls"):
        assert alone[part] == three[part], part  # of whole numbers: exactly
    for part in ("numbers", "norms", "errors", "metrics", "rival", "losses"):
        assert three[part] == near(alone[part]), part
    for table, counts in alone["ids"].items():
        assert [three["ids"][table][what] for what in ("seen", "waiting_seen")] == [
            counts[what] for what in ("seen", "waiting_seen")
        ]
    assert alone["rival"]["day"] == "untrained"
    column = config.data.user or config.data.group
    day = pq.read_table(f"{config.data.path}/{DAYS[1].folder}", columns=[column], partitioning=None)
    assert alone["units"] == len(day[column].unique())


def test_a_model_beside_itself_differs_by_nothing(small_config: Callable[..., Any]) -> None:
    config = small_config()
    learner, logs = build(config, LocalExchange()), open_logs(config)
    how: dict[str, Any] = {"batch_size": 500, "lanes": 6, "gauc": "impressions", "progress": lambda what, rows: None}
    found = rate_day(learner, logs, logs.plan(DAYS[0]), rival=("itself", learner), **how)
    assert found["rival"]["metrics"] == found["metrics"]
    assert set(found["rival"]["differences"]) == {"click@all", "cart@click", "cart@all"}
    assert all(each == {"auc": 0.0, "low": 0.0, "high": 0.0} for each in found["rival"]["differences"].values())
