"""A few days of chaos; `make chaos` is the long run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.chaos import schedule
from faults.disturb import FAULTS

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_three_days_of_chaos_keep_all_promises(tmp_path: Path) -> None:
    """Every day promoted or held with a reason, each row trained on exactly once, nothing left behind."""
    command = [sys.executable, "-m", "faults.chaos", "--days", "3", "--rows", "5000", "--strikes", "5"]
    command += ["--recovery-s", "120", "--limit-min", "12"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "all promises hold" in ended.stdout


def test_a_seed_gives_one_schedule_with_every_fault_in_it() -> None:
    strikes = schedule(days=15, strikes=28, disk=True, seed=0)
    assert strikes == schedule(days=15, strikes=28, disk=True, seed=0)
    assert strikes != schedule(days=15, strikes=28, disk=True, seed=1)
    assert {strike.fault for strike in strikes} == set(FAULTS)
    assert {strike.phase for strike in strikes} == {"train", "score", "morning"}
    assert [strike.day for strike in strikes] == sorted(strike.day for strike in strikes)
    assert all(1 <= strike.day < 15 for strike in strikes), "the first day is left to begin well"


def test_without_a_disk_that_can_be_filled_the_other_faults_take_its_place() -> None:
    strikes = schedule(days=15, strikes=28, disk=False, seed=0)
    assert len(strikes) == 28 and {strike.fault for strike in strikes} == set(FAULTS) - {"disk full"}
