"""The night as a user runs it: the real command, real Ray workers, real kills."""

import json
import signal
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import CONFIG, FIRST_DAY

from cluster.simulate import simulate
from trainer.serving import Served
from trainer.tracking import Tracking

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
DAYS = ["2026-11-01", "2026-11-02", "2026-11-03"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three days that take a few seconds each at a batch size of 128: long enough to be killed in the middle."""
    out = tmp_path_factory.mktemp("logs")
    simulate(str(out), days=3, start=FIRST_DAY, users=200, items=150, rows_per_day=24_000, seed=1)
    return out / "logs"


class Night:
    """One folder with a configuration, its checkpoints and its MLflow database."""

    def __init__(self, folder: Path, logs: Path):
        folder.mkdir(exist_ok=True)
        self.config = folder / "small.yaml"
        self.config.write_text(CONFIG.replace("LOGS", str(logs)).replace("ROOT", str(folder)))
        self.folder = folder

    def start(self, verb: str, *options: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "cluster.cli",
            verb,
            str(self.config),
            "--set",
            "train.batch_size=128",
            "--json",
            *options,
        ]
        stdout, stderr = (self.folder / "out.txt").open("w"), (self.folder / "err.txt").open("w")
        return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, text=True)

    def run(self, verb: str = "nightly", *options: str) -> dict[str, Any]:
        """Run a verb to its end and return its JSON."""
        self.finish(self.start(verb, *options))
        result: dict[str, Any] = json.loads((self.folder / "out.txt").read_text().splitlines()[-1])
        return result

    def finish(self, process: subprocess.Popen[str], code: int = 0) -> None:
        """Wait for a command; one that does not end in time is killed with all of its children."""
        try:
            assert process.wait(timeout=300) == code, self.error
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            raise

    @property
    def error(self) -> str:
        return (self.folder / "err.txt").read_text()

    def wait_for_the_middle_of_the_second_day(self) -> None:
        manifest = self.folder / "checkpoints" / "small" / "day=2026-11-01" / "manifest.json"
        deadline = time.monotonic() + 200
        while not manifest.exists():
            assert time.monotonic() < deadline, self.error
            time.sleep(0.05)
        time.sleep(0.7)
        assert not (manifest.parents[1] / "day=2026-11-02" / "manifest.json").exists(), (
            "the day was over too soon to be disturbed"
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> tuple[Night, dict[str, Any]]:
    """A night over all three days on two Ray workers, and what it printed."""
    night = Night(tmp_path_factory.mktemp("undisturbed"), logs)
    return night, night.run()


@pytest.fixture
def night(tmp_path: Path, logs: Path) -> Night:
    """A night that has not begun."""
    return Night(tmp_path / "night", logs)


def test_a_night_on_two_ray_workers_trains_scores_and_promotes_every_day(undisturbed) -> None:
    night, report = undisturbed
    assert [day["day"] for day in report["days"]] == DAYS
    assert all(
        day["state"] == "promoted" and day["trained"] and day["workers"] == 2 and day["rows"] == 24_000
        for day in report["days"]
    )
    assert report["days"][0]["metrics"] == {}, "the first day has no model to be scored with"
    assert report["days"][2]["metrics"]["click@all"]["auc"] > 0.55, "a learnable law: chance is .5"
    champion = Tracking(f"sqlite:///{night.folder}/mlflow.db", "small").alias("champion")
    assert champion is not None and champion.tags["day"] == DAYS[-1]


def test_the_same_command_again_trains_nothing_and_tells_the_same(undisturbed) -> None:
    night, report = undisturbed
    start = time.monotonic()
    again = night.run()
    assert time.monotonic() - start < 20
    assert [day["trained"] for day in again["days"]] == [False] * 3
    assert [day["metrics"] for day in again["days"]] == [day["metrics"] for day in report["days"]]


def test_a_day_is_predicted_into_parquet_by_the_model_of_the_day_before(undisturbed, tmp_path: Path) -> None:
    night, report = undisturbed
    said = night.run("predict", "--day", DAYS[2], "--out", str(tmp_path / "scores"), "--no-ray")
    assert said["trained_through"] == DAYS[1] and said["rows"] == 24_000
    scores = pq.read_table(tmp_path / "scores")
    assert {"impression_id", "user_id", "click@all", "cart@click", "cart@all", "watch@click", "score"} <= set(
        scores.column_names
    )
    assert len(set(scores["impression_id"].to_pylist())) == 24_000
    mean = sum(scores["click@all"].to_pylist()) / 24_000
    clicks = report["days"][2]["metrics"]["click@all"]
    logged = sum(pq.read_table(night_logs(night) / f"day={DAYS[2]}", columns=["click"])["click"].to_pylist())
    assert mean * 24_000 / logged == pytest.approx(clicks["calibration"], rel=1e-4), (
        "the scores are those that the night reported"
    )


def test_an_exported_model_scores_a_request_as_predict_does(undisturbed, tmp_path: Path) -> None:
    night, _ = undisturbed
    night.run("predict", "--day", DAYS[2], "--out", str(tmp_path / "scores"), "--no-ray")
    said = night.run("export", "--day", DAYS[1], "--out", str(tmp_path / "served"))
    assert said["trained_through"] == DAYS[1]
    rows = pq.read_table(night_logs(night) / f"day={DAYS[2]}").to_pylist()[:500]
    scores = {row["impression_id"]: row for row in pq.read_table(tmp_path / "scores").to_pylist()}
    served = Served(str(tmp_path / "served"))
    for _, request in groupby(rows, key=lambda row: row["request_id"]):
        items = list(request)
        got = served.score(items[0], {column: [row[column] for row in items] for column in items[0]})
        for address, values in got.items():
            want = [scores[row["impression_id"]][address] for row in items]
            assert values.tolist() == pytest.approx(want, rel=1e-5, abs=1e-6), address


def night_logs(night: Night) -> Path:
    return Path(night.config.read_text().split("path: ")[1].split(",")[0])


def test_status_tells_the_days_and_the_champion(undisturbed) -> None:
    night, _ = undisturbed
    status = night.run("status")
    assert status["champion"] == DAYS[2] and [day["state"] for day in status["days"]] == ["promoted"] * 3


def assert_same_metrics(report: dict[str, Any], want: dict[str, Any]) -> None:
    """Within 1e-6 of the undisturbed night: the same rows in the same order from the same checkpoint."""
    for day, wanted in zip(report["days"], want["days"], strict=True):
        for address, metrics in wanted["metrics"].items():
            assert day["metrics"][address] == pytest.approx(metrics, rel=1e-6, nan_ok=True), f"{day['day']} {address}"
        assert day["ids"] == wanted["ids"]


def test_a_driver_killed_in_the_middle_of_a_day_changes_nothing_but_the_time(undisturbed, night: Night) -> None:
    driver = night.start("nightly")
    night.wait_for_the_middle_of_the_second_day()
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    report = night.run()
    assert [day["trained"] for day in report["days"]] == [False, True, True], (
        "the first day was committed and is not done again"
    )
    assert_same_metrics(report, undisturbed[1])
    assert not psutil.wait_procs(started, timeout=30)[1], "the killed driver's Ray goes, too"


def test_a_worker_killed_in_the_middle_of_a_day_is_replaced_and_the_night_completes(undisturbed, night: Night) -> None:
    driver = night.start("nightly")
    night.wait_for_the_middle_of_the_second_day()
    workers = [
        p for p in psutil.Process(driver.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    night.finish(driver)
    report = json.loads((night.folder / "out.txt").read_text().splitlines()[-1])
    assert [day["trained"] for day in report["days"]] == [True, True, True]
    assert_same_metrics(report, undisturbed[1])


def test_a_bad_value_found_by_one_worker_ends_the_night_on_all_with_its_text(
    night: Night, logs: Path, tmp_path: Path
) -> None:
    """The bad row lies in one worker's half: the other one must neither hang nor hide what happened."""
    bad = tmp_path / "bad"
    for day in sorted(logs.iterdir())[:1]:
        (bad / day.name).mkdir(parents=True)
        for path in sorted(day.glob("*.parquet")):
            table = pq.read_table(path, partitioning=None)
            if path.name == "part-1.parquet":
                click = table["click"].to_numpy().copy()
                click[-1] = 7
                table = table.set_column(table.column_names.index("click"), "click", [click])
            pq.write_table(table, bad / day.name / path.name)
    process = night.start("nightly", "--set", f"data.path={bad}")
    night.finish(process, code=2)
    assert "part-1.parquet" in night.error and "'click'" in night.error and "7" in night.error
    assert "Traceback" not in night.error
    assert not (night.folder / "checkpoints").exists() or not list(
        (night.folder / "checkpoints").rglob("manifest.json")
    )
