"""What is counted of a day under way: gone on with, it is what it would have been.

Oracle: the same day without an interruption.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import threads
import torch
from conftest import FIRST_DAY, known

from embeddings.exchange import Exchange, LocalExchange
from trainer.config import Config
from trainer.counted import Counted, State, share
from trainer.day import train_day
from trainer.intervals import Interval
from trainer.learner import build, open_logs

OPTIONS = (
    "features.then={kind: id_stats, table: item, of: [impressions, click]}",
    "tables.item={dim: 8, capacity_rows: 70, grow: false, when_full: evict, min_count: 2}",
    "tables.user={dim: 8, capacity_rows: 64, grow: false, when_full: reject}",
)


class _Interrupted(Exception):
    pass


def day(exchange: Exchange, settings: Config, stops: tuple[int, ...], states: list[State]) -> dict[str, Any]:
    """A day's report and rows; interrupted after some of its steps, and gone on with from what had been counted."""
    learner, logs = build(settings, exchange), open_logs(settings)

    def after_step(counted: Counted) -> None:
        if counted.steps in left:
            left.remove(counted.steps)
            states[exchange.rank] = counted.state()
            exchange.all_reduce(torch.zeros(1))  # all have written theirs
            raise _Interrupted

    left, counted = list(stops), Counted(learner)
    while True:
        try:
            report = train_day(
                learner, logs, logs.plan(Interval(FIRST_DAY)), 250, 4, lambda *_: None, counted, after_step
            )
        except _Interrupted:
            learner.embeddings.shard.reset_counts()
            counted = Counted(learner)
            counted.load(share(states.__getitem__, len(states), exchange.rank, exchange.num_workers))
            exchange.all_reduce(torch.zeros(1))  # all have read them
        else:
            return {
                "report": report,
                "rows": {of: c.tobytes() for n, t in known(learner).items() for of, c in t.items()},
            }


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_day_gone_on_with_is_the_day_that_was_not_interrupted_to_the_last_bit(
    small_config: Callable[..., Config], num_workers: int
) -> None:
    settings, found = small_config(*OPTIONS), []
    for stops in ((), (1, 7, 16)):  # 16: its last step
        job = partial(day, settings=settings, stops=stops, states=[{}] * num_workers)
        found.append(threads.run(num_workers, job))
    assert found[0][0]["report"]["ids"]["item"]["evicted"] > 0 < found[0][0]["report"]["ids"]["user"]["rejected"]
    assert found[0] == found[1]


def test_another_number_of_workers_finds_the_sums_on_worker_0(small_config: Callable[..., Config]) -> None:
    settings, states = small_config(), [State()] * 2
    job = partial(day, settings=settings, stops=(3,), states=states)
    threads.run(2, job)

    def sums(exchange: Exchange) -> State:
        counted = Counted(build(settings, exchange))
        counted.load(share(states.__getitem__, 2, exchange.rank, exchange.num_workers))
        return counted.state()

    for found in (threads.run(3, sums), [sums(LocalExchange())]):
        for name, values in ((name, values) for name, values in states[0].items() if name != "alike/seconds"):
            both = values if name.startswith("alike/") else values + states[1][name]
            total = found[0][name] if name.startswith("alike/") else sum(part[name] for part in found)
            assert torch.equal(found[0][name], both) and torch.equal(torch.as_tensor(total), both), name
        assert int(found[0]["alike/made"][0]) == 3
