"""A month of nights: bases and deltas, rows that come and go, and nothing that grows for ever.

Each night begins with what is on the disk alone, as cron would start it; only MLflow, which has tests of its own, is
left out.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import FIRST_DAY, configure

from cluster.nightly import nightly
from cluster.predict import evaluate
from cluster.simulate import simulate
from trainer.checkpoint import Checkpoints
from trainer.config import Config
from trainer.intervals import Interval

pytestmark = pytest.mark.slow
DAYS, ROWS, KEPT_DAYS, BASE_EVERY = 30, 2400, 9, 5

# Rows are evicted by age and by value, and every table begins far too small.
SETTINGS = (
    "tables.user={dim: 8, capacity_rows: 16, ttl_days: 2, init_scale: 0.01}",
    "tables.item={dim: 8, capacity_rows: 16, budget_rows: 60, value: {click: 1}, value_half_life_days: 2}",
    f"checkpoints.keep_days={KEPT_DAYS}",
    "checkpoints.keep_bases=1",
    "train.batch_size=64",
    "nightly.gate.tolerance=1",
)


@dataclass
class Month:
    """Thirty nights: what each day reported, and the memory of the process and the bytes on disk after each."""

    config: Config
    reports: list[dict[str, Any]]
    memory_bytes: list[int]
    disk_bytes: list[int]

    def auc(self) -> list[float]:
        """click@all of each day, scored with the model of the day before; from the second day on."""
        return [report["metrics"]["click@all"]["auc"] for report in self.reports[1:]]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("month")
    simulate(str(out), days=DAYS, start=FIRST_DAY, users=300, items=120, rows_per_day=ROWS, seed=3)
    return out / "logs"


@pytest.fixture(scope="module", autouse=True)
def no_mlflow() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.morning.Tracking", Nowhere)
        yield


class Nowhere:
    """An MLflow that keeps nothing."""

    def __init__(self, uri: str, model: str):
        self._versions = 0

    def log_day(self, day: str, **logged: Any) -> str:
        return day

    def register(self, run_id: str, **more: Any) -> int:
        self._versions += 1
        return self._versions

    def set_alias(self, name: str, version: int) -> None:
        pass

    def alias(self, name: str) -> None:
        return None


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Callable[..., Month]:
    """month(name, *settings): a month of one night a day, or of one night over all days where name is `at once`."""

    def run(name: str, *settings: str) -> Month:
        folder = tmp_path_factory.mktemp(name)
        config = configure(logs, folder)(*SETTINGS, *settings)
        days = [FIRST_DAY + datetime.timedelta(days=i) for i in range(DAYS)]
        process, memory, disk, reports = psutil.Process(), [], [], []
        for day in days if name != "at once" else days[-1:]:
            ended = nightly(config, through=Interval(day), use_ray=False, on_event=lambda event: None)
            reports += [entry for entry in ended["days"] if entry["trained"]]
            memory.append(process.memory_info().rss)
            disk.append(sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file()))
        return Month(config, reports, memory, disk)

    return run


@pytest.fixture(scope="module")
def deltas(month: Callable[..., Month]) -> Month:
    """Nights that write a base every few days and in between what changed."""
    return month("deltas", f"checkpoints.base_every={BASE_EVERY}")


def num_layers(month: Month) -> list[int]:
    """Of how many layers each kept model is made."""
    checkpoints = Checkpoints(month.config.checkpoints.path, month.config.name)
    return [len(checkpoints.open(interval).layers) for interval in checkpoints.intervals()]


def test_a_month_of_deltas_is_a_month_of_full_snapshots_bit_for_bit(deltas: Month, month: Callable[..., Month]) -> None:
    full = month("full", "checkpoints.base_every=1")
    assert max(num_layers(deltas)) == BASE_EVERY and set(num_layers(full)) == {1}
    assert [report["metrics"] for report in deltas.reports] == [report["metrics"] for report in full.reports]
    assert [report["losses"] for report in deltas.reports] == [report["losses"] for report in full.reports]


def test_a_month_of_nights_is_one_continuous_run_within_noise(deltas: Month, month: Callable[..., Month]) -> None:
    """Law 7; the AUC of one day of so few rows has a standard error of about .015."""
    by_day, at_once = np.array(deltas.auc()), np.array(month("at once", f"checkpoints.keep_days={DAYS}").auc())
    assert by_day.size == at_once.size == DAYS - 1
    assert np.abs(by_day - at_once).max() < 0.01 and abs(by_day.mean() - at_once.mean()) < 0.001
    assert by_day.mean() > 0.53, "the nights learn: chance is .5, and the mean of all days is known to .003"


def test_rows_come_and_go(deltas: Month) -> None:
    """Else the month would prove little."""
    evicted = [sum(table["evicted"] for table in report["ids"].values()) for report in deltas.reports]
    assert sum(count > 0 for count in evicted) > DAYS // 2


def test_memory_and_disk_are_flat(deltas: Month) -> None:
    """Once the oldest kept day is as old as it may be, the disk has seen its largest; a night leaves no memory."""
    full = KEPT_DAYS + BASE_EVERY
    assert max(deltas.disk_bytes[full:]) < 1.2 * max(deltas.disk_bytes[:full])
    grown = deltas.memory_bytes[-1] / deltas.memory_bytes[full]
    assert grown < 1.08, (
        f"{grown:.2f} times the memory after {DAYS - full} further nights"
    )  # 1.03 in a process of its own


def test_any_kept_day_is_restored_and_scores_the_next_as_its_night_did(deltas: Month) -> None:
    config = deltas.config
    kept = Checkpoints(config.checkpoints.path, config.name).intervals()
    assert len(kept) >= KEPT_DAYS
    reports = {report["day"]: report for report in deltas.reports}
    for interval in kept[:-1]:
        again = evaluate(config, interval.next(), interval, use_ray=False, on_event=lambda event: None)
        assert again["metrics"] == reports[interval.next().name]["metrics"], f"the model of {interval}"
