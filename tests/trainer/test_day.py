"""Proof tests of trainer/day.py: what a day's global batches are made of, and that it is scored before it is learnt."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import threads
from conftest import FIRST_DAY

from embeddings.exchange import Exchange, LocalExchange
from trainer.config import Config
from trainer.day import run_day, score_day, shares
from trainer.intervals import Interval
from trainer.learner import build, open_logs


def parts(exchange: Exchange, settings: Config) -> list[list[int]]:
    """The request of each row, in each of this worker's shares of the first day's training batches."""
    learner, logs = build(settings, exchange), open_logs(settings)
    batches = shares(learner, logs, logs.plan(Interval(FIRST_DAY)), 100, 4, seed=1)
    return [batch.groups_B.tolist() for batch in batches if batch.groups_B is not None]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_under_a_loss_in_lists_every_request_is_in_one_share_of_one_batch(
    small_config: Callable[..., Any], num_workers: int
) -> None:
    settings = small_config("tasks.order={label: click, loss: bpr, head: click}")
    found = [
        part for worker in threads.run(num_workers, functools.partial(parts, settings=settings)) for part in worker
    ]
    # a request of the simulated logs is eight rows that stand side by side: 100 is no multiple of it
    assert sum(map(len, found)) == 4_000
    assert all(part.count(request) == 8 for part in found for request in set(part))


def test_without_a_loss_in_lists_batches_are_cut_at_any_row(small_config: Callable[..., Any]) -> None:
    [found] = threads.run(1, functools.partial(parts, settings=small_config()))
    assert [len(part) for part in found] == [100] * 40
    assert any(part.count(request) < 8 for part in found for request in set(part))


def test_a_day_is_scored_by_the_model_that_has_not_seen_it(small_config: Callable[..., Any]) -> None:
    settings = small_config()
    logs, found = open_logs(settings), []
    how: dict[str, Any] = {"batch_size": 500, "lanes": 4, "gauc": "impressions", "progress": lambda what, rows: None}
    for together in (True, False):
        learner = build(settings, LocalExchange())
        days = [logs.plan(Interval(FIRST_DAY)), logs.plan(Interval(FIRST_DAY).next())]
        run_day(learner, logs, days[0], score=False, **how)
        score = functools.partial(run_day, score=True) if together else score_day
        found.append(score(learner, logs, days[1], **how))
    assert (
        found[0]["metrics"] == found[1]
    )  # oracle: the same model, scored and never trained on that day; the same bits
