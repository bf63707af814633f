"""Killed at any point, the same command again ends as if nothing had happened.

A sample runs with all tests; `make faults` (--faults) runs every point of inject/kill_points.py and prints a table.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIRST_DAY
from faults.inject.kill_points import POINTS, Point
from faults.nights import Night, differing, leftovers, outcome, rows_in_steps, times_trained

from cluster.simulate import simulate

pytestmark = pytest.mark.slow
DAYS, ROWS = 3, 4000
KILLED = -9


@dataclass
class Ended:
    """A night that ended, after being killed at a point or undisturbed."""

    night: Night
    seconds: float

    @cached_property
    def outcome(self) -> dict[str, Any]:
        return outcome(self.night)


Nights = Callable[[str | None, int], Future[Ended]]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("logs")
    simulate(str(out), days=DAYS, start=FIRST_DAY, users=200, items=150, rows_per_day=ROWS, seed=1)
    return out / "logs"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, logs: Path, database: Path) -> Iterator[Nights]:
    """nights(point, workers): the future of that night, begun with the others; the undisturbed one where point is
    None. Nights in one process run side by side, those on Ray one after the other.
    """
    here, on_ray = ThreadPoolExecutor(2), ThreadPoolExecutor(1)
    begun: dict[tuple[str | None, int], Future[Ended]] = {}

    def begin(point: str | None, workers: int) -> Future[Ended]:
        if (point, workers) not in begun:
            folder = tmp_path_factory.mktemp(f"{point}-{workers}")
            night = Night(folder, logs, database=database)
            begun[point, workers] = (on_ray if workers else here).submit(run, night, point, workers)
        return begun[point, workers]

    yield begin
    for pool in (here, on_ray):
        pool.shutdown(cancel_futures=True)


def run(night: Night, name: str | None, workers: int) -> Ended:
    start = time.monotonic()
    told = {"DAYBREAK_KILL_AT": name, "DAYBREAK_SLOW_STEP": str(POINTS[name].slow_step_s)} if name else {}
    night.run(*([] if workers else ["--no-ray"]), **told)
    return Ended(night, time.monotonic() - start)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" in metafunc.fixturenames:
        chosen = [name for name, p in POINTS.items() if p.sample or metafunc.config.getoption("--faults")]
        marks = {name: [pytest.mark.ray] if POINTS[name].workers else [] for name in chosen}
        metafunc.parametrize("point", [pytest.param(name, marks=marks[name]) for name in chosen])


@pytest.fixture(scope="module", autouse=True)
def begin(request: pytest.FixtureRequest, nights: Nights) -> None:
    """Begin every night of this run before the first is waited for."""
    names = [item.callspec.params["point"] for item in request.session.items if "point" in _params(item)]
    for point in names:
        nights(None, POINTS[point].workers)
    for point in names:
        nights(point, POINTS[point].workers)


def _params(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec and item.path == Path(__file__) else {}


def test_a_night_killed_at_a_point_ends_as_if_nothing_had_happened(
    point: str, nights: Nights, record_property: Callable[[str, Any], None]
) -> None:
    ended, undisturbed = nights(point, POINTS[point].workers).result(), nights(None, POINTS[point].workers).result()
    trained = rows_in_steps(ended.night)
    record_property(
        "fault", (point, who(POINTS[point]), ended.night.codes, round(ended.seconds), trained - DAYS * ROWS)
    )
    assert ended.night.fired(point), "the night never came by this point"
    assert ended.night.codes == ([0] if in_a_worker(POINTS[point]) else [KILLED, 0])
    if others := differing(ended.outcome, undisturbed.outcome):
        pytest.fail(f"{len(others)} values are not those of an undisturbed night: {others[:20]}", pytrace=False)
    assert leftovers(ended.night) == [], "nothing is left behind"


def test_each_row_is_trained_on_exactly_once(point: str, nights: Nights) -> None:
    """The counter model: each impression is an id of its own, and its row counts how often it was trained on."""
    counts = times_trained(nights(point, POINTS[point].workers).result().night)
    assert counts.size == DAYS * ROWS
    assert np.array_equal(counts, np.ones_like(counts))


def who(point: Point) -> str:
    if not point.workers:
        return "the one process"
    return "the driver" if point.rank is None else f"worker {point.rank} of {point.workers}"


def in_a_worker(point: Point) -> bool:
    """Ray starts the workers again without a second command."""
    return point.workers > 0 and point.rank is not None


def test_there_are_points_of_every_kind() -> None:
    """At least 25; before, between and after; in one process, in workers and in a driver."""
    assert len(POINTS) >= 25
    assert {point.when for point in POINTS.values()} == {"before", "after"}
    assert {who(point).split()[0] for point in POINTS.values()} == {"the", "worker"}
    assert sum(point.sample for point in POINTS.values()) >= 6
