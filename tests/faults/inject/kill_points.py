"""Where a night can be killed: each point is a moment of a real function, on the second of three days where it can be.

A file has three moments: before it is written; between, when it is whole under its temporary name; after, when it has
its name and nobody knows it yet. Plain Python only: see rig.py.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """Some argument is the second day, or a plan of it."""
    return any(DAY in str(getattr(value, "interval", value)) for name, value in named.items() if name != "self")


def into_day(named: dict[str, Any]) -> bool:
    """Of Snapshot.write: into the second day's folder."""
    return f"day={DAY}" in named["folder"]


def moments(name: str, pattern: str, nth: int = 1, **more: Any) -> dict[str, Point]:
    """The three moments of a file's write."""
    return {
        f"{name}-before": Point("trainer.storage", "Storage.open_output", "before", nth, opened(pattern), **more),
        f"{name}-between": Point("os", "replace", "before", nth, renamed(pattern), **more),
        f"{name}-after": Point("os", "replace", "after", nth, renamed(pattern), **more),
    }


def entered(state: str, **more: Any) -> dict[str, Point]:
    """The three moments of an entry of the second day's ledger."""
    recorded = lambda named: named["state"] == state and of_day(named)  # noqa: E731
    return {
        f"ledger-{state}-before": Point("trainer.ledger", "Ledger.record", "before", holds=recorded, **more),
        f"ledger-{state}-between": Point("os", "replace", "before", holds=state_renamed(state), **more),
        f"ledger-{state}-after": Point("os", "replace", "after", holds=state_renamed(state), **more),
    }


def around(name: str, module: str, function: str, nth: int = 1, **more: Any) -> dict[str, Point]:
    """Before and after a call."""
    return {f"{name}-{when}": Point(module, function, when, nth, **more) for when in ("before", "after")}


def renamed_to(where: str, points: dict[str, Point], **more: Any) -> dict[str, Point]:
    """The same points somewhere else: on one of two Ray workers, or in their driver."""
    return {f"{name}-{where}": replace(point, workers=2, **more) for name, point in points.items()}


def sampled(points: dict[str, Point], *names: str) -> dict[str, Point]:
    """The same points, those named for the short run, too."""
    assert points.keys() >= set(names), set(names) - points.keys()
    return {name: replace(point, sample=point.sample or name in names) for name, point in points.items()}


LOCK = {
    **moments("lock-choosing", r"/lock/.*\.claim$"),
    **moments("lock-ticket", r"/lock/.*\.claim$", nth=2),
    **moments("lock-held", r"/lock/.*\.claim$", nth=3),
    **moments("lock-heartbeat", r"/lock/.*\.beat$", nth=2, slow_step_s=0.05),
    **around("lock-release", "cluster.lock", "_remove"),
    "lock-release-between": Point("trainer.storage", "Storage.delete", "after", holds=opened(r"/lock/.*\.claim$")),
}
LEARNING = {
    **around("scoring", "trainer.day", "score_day", holds=of_day),
    "scoring-a-step": Point("trainer.step", "score_step", "after", nth=5),
    **around("first-train-step", "trainer.step", "train_step"),
    "a-train-step-between-pull-and-push": Point("embeddings.client", "ShardedEmbeddings.push", "before", nth=75),
    "a-later-train-step-after": Point("trainer.step", "train_step", "after", nth=110, slow_step_s=0.01),
    "last-train-step-before-evictions": Point("embeddings.shard", "Shard.end_day", "before", nth=2),
    "evictions-after": Point("embeddings.shard", "Shard.end_day", "after", nth=2),
}
SNAPSHOTS = {
    **around("row-files", "embeddings.snapshot", "Snapshot.write", holds=into_day),
    "row-files-between-two": Point("embeddings.snapshot", "_Parts.add", "after", nth=8),
    **moments("dense-file", rf"day={DAY}/.*dense"),
    **moments("counted-file", rf"day={DAY}/.*counted", slow_step_s=0.01),
    **moments("part-of-progress", rf"day={DAY}/.*part-0\.json$", slow_step_s=0.01),
    **moments("progress", rf"day={DAY}/progress\.json$", slow_step_s=0.01),
    "second-progress-after": Point(
        "os", "replace", "after", 2, renamed(rf"day={DAY}/progress\.json$"), slow_step_s=0.02
    ),
    **moments("manifest", rf"day={DAY}/manifest\.json$"),
}
RETENTION = {
    **around("progress-deleted", "trainer.storage", "Storage.delete", holds=opened(rf"day={DAY}/progress\.json$")),
    **around("superseded-deleted", "trainer.storage", "Storage.delete", holds=opened(rf"day={DAY}/[0-9a-f]{{12}}/")),
    **around("old-manifest-deleted", "trainer.storage", "Storage.delete", holds=opened(rf"day={DAY}/manifest\.json$")),
    **around("old-files-deleted", "trainer.storage", "Storage.delete_folder", holds=opened(rf"day={DAY}/")),
}
ENTRIES = {
    **entered("planned"),
    **entered("scored"),
    **entered("training"),
    **entered("written"),
    **entered("verified"),
    **entered("gated"),
    **entered("promoted"),
}
MORNING = {
    **around("log_day", "trainer.tracking", "Tracking.log_day", nth=2),
    "log_day-between-numbers-and-files": Point("trainer.tracking", "Tracking._log_numbers", "after", nth=2),
    "log_day-between-files-and-end": Point("trainer.tracking", "Tracking._log_files", "after", nth=2),
    **around("register", "trainer.tracking", "Tracking.register", nth=2),
    **around("set_alias", "trainer.tracking", "Tracking.set_alias", nth=2),
    **moments("champion", r"/champion\.json$", nth=2),
}
IN_ONE_PROCESS = LOCK | LEARNING | SNAPSHOTS | RETENTION | ENTRIES | MORNING
ON_RAY = {
    **renamed_to("worker-1", {name: LEARNING[name] for name in ("scoring-a-step", "a-later-train-step-after")}, rank=1),
    **renamed_to("worker-1", around("row-files", "embeddings.snapshot", "Snapshot.write", holds=into_day), rank=1),
    **renamed_to("worker-1", moments("part-of-progress", rf"day={DAY}/.*part-1\.json$", slow_step_s=0.01), rank=1),
    **renamed_to("worker-0", moments("progress", rf"day={DAY}/progress\.json$", slow_step_s=0.01), rank=0),
    **renamed_to("worker-0", moments("manifest", rf"day={DAY}/manifest\.json$"), rank=0),
    **renamed_to("driver", moments("lock-heartbeat", r"/lock/.*\.beat$", nth=2, slow_step_s=0.05)),
    **renamed_to("driver", entered("gated")),
    **renamed_to("driver", {name: MORNING[name] for name in ("log_day-after", "register-after", "champion-between")}),
}
POINTS: dict[str, Point] = sampled(
    IN_ONE_PROCESS | ON_RAY,
    "a-later-train-step-after",
    "progress-between",
    "manifest-after",
    "log_day-between-files-and-end",
    "champion-between",
    "part-of-progress-after-worker-1",
)
