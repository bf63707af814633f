"""The night in this process, whose workers are lost where a test says so. The oracle is a night that lost none."""

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FIRST_DAY, configure

import cluster.nightly
from cluster.morning import open_checkpoints
from cluster.nightly import nightly
from cluster.simulate import simulate
from trainer.config import Config
from trainer.intervals import Interval
from trainer.workers import Event, Worker, run_here

DAYS = [Interval(FIRST_DAY + datetime.timedelta(days=i)) for i in range(3)]


class Lost(Exception):
    """What the driver sees of a worker that was killed."""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("logs")
    simulate(str(out), days=3, start=FIRST_DAY, users=60, items=40, rows_per_day=800, seed=1)
    return out / "logs"


@pytest.fixture
def config(logs: Path, tmp_path: Path) -> Callable[[str], Config]:
    """A night of a folder of its own, whose gate lets everything pass."""

    def build(name: str) -> Config:
        (tmp_path / name).mkdir()
        gate = "{addresses: [click@all], floor: null, tolerance: null, paired_tolerance: null}"
        loaded: Config = configure(logs, tmp_path / name)(f"nightly.gate={gate}", "train.workers=1")
        return loaded

    return build


def rivals(config: Config) -> list[str | None]:
    """Beside whom each day was scored."""
    opened = [open_checkpoints(config).open(interval) for interval in DAYS]
    return [(checkpoint.report.get("rival") or {}).get("day") for checkpoint in opened]


def run(config: Config) -> None:
    nightly(config, use_ray=False, on_event=lambda event: None)


def test_a_worker_lost_after_a_commit_of_which_it_did_not_tell_changes_nothing(
    config: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The day is decided before the next round scores another: else that would be scored beside an older champion."""
    undisturbed, disturbed = config("undisturbed"), config("disturbed")
    run(undisturbed)

    def rounds(job: Callable[[Worker], Any], on_event: Callable[[Event], Any]) -> Any:
        def dies(event: Event) -> Any:
            if event["event"] == "committed" and event["day"] == DAYS[1].name:
                raise Lost
            return on_event(event)

        with pytest.raises(Lost):
            run_here(lambda worker: job(replace(worker, ask=dies)), on_event)
        return run_here(job, on_event)

    monkeypatch.setattr(cluster.nightly, "run_here", rounds)
    run(disturbed)
    assert rivals(undisturbed) == rivals(disturbed) == [None, None, None]
