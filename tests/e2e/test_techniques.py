"""Every technique that is offered has a short configuration, and trains: two small days, from one to the next."""

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from cluster.simulate import simulate

CONFIGS = Path(__file__).parents[2] / "configs" / "techniques"
TECHNIQUES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("techniques")
    simulate(str(out), days=2, start=datetime.date(2026, 11, 1), users=300, items=200, rows_per_day=6_000, seed=1)
    return out / "logs"


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict | list):
        return [number for part in (tree.values() if isinstance(tree, dict) else tree) for number in numbers(part)]
    return [tree] if isinstance(tree, float) else []


@pytest.mark.slow
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_trains_two_days_and_predicts_better_than_chance(
    daybreak: Run, logs: Path, tmp_path: Path, technique: str
) -> None:
    config = str(CONFIGS / f"{technique}.yaml")
    places = {"data.path": logs, "checkpoints.path": tmp_path, "train.batch_size": 100}
    settings = [part for key, value in places.items() for part in ("--set", f"{key}={value}")]
    for day in ("2026-11-01", "2026-11-02"):
        ended = daybreak("train", config, "--day", day, "--no-ray", "--json", *settings)
        assert ended.code == 0, ended.err
    report = ended.json
    assert all(map(math.isfinite, numbers([report["losses"], report["weights"], report["gates"]])))
    address, metrics = next((a, m) for a, m in report["metrics"].items() if a.endswith("@all"))
    assert metrics["rows"] == 6_000 and metrics["auc"] > 0.53, address  # by the model of the first day's 60 steps
