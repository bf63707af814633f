"""Two nights of one model, as cron and an impatient person start them: real commands, one worker in each process."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIG, FIRST_DAY

from cluster.simulate import simulate

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DAYS = ["2026-11-01", "2026-11-02"]
TIMES = ("seconds", "samples_per_s", "memory_bytes", "since", "trained")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days that take a few seconds each."""
    out = tmp_path_factory.mktemp("logs")
    simulate(str(out), days=2, start=FIRST_DAY, users=200, items=150, rows_per_day=24_000, seed=1)
    return out / "logs"


class Nights:
    """Commands over one folder of checkpoints."""

    def __init__(self, folder: Path, logs: Path):
        self.folder, self.started = folder, []
        (folder / "small.yaml").write_text(CONFIG.replace("LOGS", str(logs)).replace("ROOT", str(folder)))

    def start(self, *options: str) -> "subprocess.Popen[str]":
        sets = "train.batch_size=64", "train.workers=1"
        command = [sys.executable, "-m", "cluster.cli", "nightly", f"{self.folder}/small.yaml", "--no-ray", "--json"]
        command += [part for each in sets for part in ("--set", each)]
        pipe = subprocess.PIPE
        self.started.append(subprocess.Popen([*command, *options], cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        return self.started[-1]

    def wait_for(self, day: str, state: str) -> None:
        ledger = self.folder / "checkpoints" / "small" / f"day={day}" / "ledger.json"
        deadline = time.monotonic() + 200
        while not ledger.exists() or f'"{state}"' not in ledger.read_text():
            assert time.monotonic() < deadline, f"{day} is not {state}"
            time.sleep(0.02)

    def files(self) -> dict[Path, bytes]:
        """All that stands beside the checkpoints, and they themselves."""
        folder = self.folder / "checkpoints"
        return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    def states(self) -> dict[str, list[str]]:
        files = {day: self.folder / "checkpoints" / "small" / f"day={day}" / "ledger.json" for day in DAYS}
        return {day: [e["state"] for e in json.loads(file.read_text())["entries"]] for day, file in files.items()}


def ended(process: "subprocess.Popen[str]") -> tuple[int, dict[str, Any]]:
    """Its exit code, and the JSON of its last line."""
    out, err = process.communicate(timeout=300)
    assert out, err
    return process.returncode, json.loads(out.splitlines()[-1])


def lasting(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in day.items() if key not in TIMES} for day in report["days"]]


@pytest.fixture
def nights(tmp_path: Path, logs: Path) -> Iterator[Callable[[str], Nights]]:
    """As many folders as a test wants; what still runs at its end is killed."""
    made: list[Nights] = []

    def build(name: str) -> Nights:
        (tmp_path / name).mkdir()
        made.append(Nights(tmp_path / name, logs))
        return made[-1]

    yield build
    for process in (process for each in made for process in each.started):
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> list[dict[str, Any]]:
    code, report = ended(Nights(tmp_path_factory.mktemp("undisturbed"), logs).start())
    assert code == 0
    return lasting(report)


def test_of_two_nights_started_together_one_runs_and_one_is_refused_with_2(
    nights: Callable[[str], Nights], undisturbed: list[dict[str, Any]]
) -> None:
    two = nights("together")
    both = [two.start(), two.start()]
    (code, report), (refused, why) = sorted(map(ended, both), key=lambda end: end[0])
    assert (code, refused) == (0, 2) and lasting(report) == undisturbed
    assert "another night runs" in why["error"]
    assert any(f"got nightly, process {process.pid} on" in why["error"] for process in both)
    assert not list((two.folder / "checkpoints" / "small" / "lock").iterdir()), "no lock is left"


def test_a_killed_nights_lock_is_taken_over_and_its_night_goes_on(
    nights: Callable[[str], Nights], undisturbed: list[dict[str, Any]]
) -> None:
    one = nights("killed")
    first = one.start()
    one.wait_for(DAYS[1], "training")
    first.kill()
    start = time.monotonic()
    code, report = ended(one.start())
    assert code == 0 and lasting(report) == undisturbed and time.monotonic() - start < 60, (
        "the dead is known to be dead"
    )
    way = ["planned", "scored", "training", "written", "verified", "gated", "promoted"]
    assert one.states() == {day: way for day in DAYS}


def test_a_night_that_stood_still_is_taken_over_and_writes_nothing_when_it_wakes_up(
    nights: Callable[[str], Nights], undisturbed: list[dict[str, Any]]
) -> None:
    """Takes the heartbeat's minute and the three beats after it."""
    one = nights("stalled")
    first = one.start()
    one.wait_for(DAYS[1], "training")
    first.send_signal(signal.SIGSTOP)
    refused, why = ended(one.start())
    assert refused == 2 and f"process {first.pid} on" in why["error"]
    time.sleep(60)
    code, report = ended(one.start())
    assert code == 0 and lasting(report) == undisturbed
    before = one.files()
    first.send_signal(signal.SIGCONT)
    lost, why = ended(first)
    assert lost == 2 and "another night took over" in why["error"]
    assert one.files() == before
