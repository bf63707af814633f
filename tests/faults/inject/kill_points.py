"""Where a night can be killed: each point is a moment of a real function, on the second of three days where it can be.

A file has three moments: before it is written; between, when it is whole under its temporary name; after, when it has
its name and nobody knows it yet. Plain Python only: see rig.py.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Condition = Callable[[dict[str, Any]], bool]
DAY = "2026-11-02"  # of the three days, the one with a day before and a day after


@dataclass(frozen=True)
class Point:
    """Killed before or after the nth call of module.function for which `holds` is true of its arguments. rank: only on
    this worker. workers: 0 is the one process of --no-ray. slow_step_s: what a training step takes longer, so that the
    night comes by this point. where: who dies.
    """

    module: str
    function: str
    when: str
    nth: int = 1
    holds: Condition = lambda named: True
    rank: int | None = None
    workers: int = 0
    slow_step_s: float = 0.0
    sample: bool = False


def opened(pattern: str) -> Condition:
    """Of Storage.open_output and Storage.write: the file's path matches."""
    return lambda named: bool(re.search(pattern, f"{named['self'].root}/{named['name']}"))


def renamed(pattern: str) -> Condition:
    """Of os.replace: the new path matches."""
    return lambda named: bool(re.search(pattern, str(named["dst"])))


def state_renamed(state: str) -> Condition:
    """Of os.replace: it is the second day's ledger, and its newest entry is this state."""

    def holds(named: dict[str, Any]) -> bool:
        if not renamed(rf"day={DAY}/ledger\.json$")(named):
            return False
        with open(named["src"]) as file:
            return bool(json.load(file)["entries"][-1]["state"] == state)

    return holds


def of_day(named: dict[str, Any]) -> bool:
    """Some argument is the second day."""
    return any(DAY in str(getattr(value, "name", value)) for name, value in named.items() if name != "self")


def moments(name: str, pattern: str, nth: int = 1, **more: Any) -> dict[str, Point]:
    """The three moments of a file's write."""
    return {
        f"{name}-before": Point("trainer.storage", "Storage.open_output", "before", nth, opened(pattern), **more),
        f"{name}-between": Point("os", "replace", "before", nth, renamed(pattern), **more),
        f"{name}-after": Point("os", "replace", "after", nth, renamed(pattern), **more),
    }


def around(name: str, module: str, function: str, **more: Any) -> dict[str, Point]:
    """Before and after a call."""
    return {f"{name}-{when}": Point(module, function, when, **more) for when in ("before", "after")}


POINTS: dict[str, Point] = {
    **around("scoring", "trainer.day", "score_day", holds=of_day),
    "scoring-a-step": Point("trainer.step", "score_step", "after", nth=5),
    **around("first-train-step", "trainer.step", "train_step"),
    "train-step-between-pull-and-push": Point("embeddings.client", "ShardedEmbeddings.push", "before", nth=75),
    "a-later-train-step-after": Point("trainer.step", "train_step", "after", nth=90, sample=True),
    "last-train-step-before-evictions": Point("embeddings.shard", "Shard.end_day", "before", nth=2),
    **moments("manifest", rf"day={DAY}/manifest\.json$"),
    "log_day-before": Point("trainer.tracking", "Tracking.log_day", "before", nth=2),
    "log_day-after": Point("trainer.tracking", "Tracking.log_day", "after", nth=2),
}
