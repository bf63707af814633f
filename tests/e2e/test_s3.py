"""Nights whose logs and checkpoints lie on a real S3 server: real commands, one worker in each process.

Oracle: the same nights on the local disk, bit for bit.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FIRST_DAY, Run
from faults.nights import CONFIG, Night, differing, outcome
from s3_server import KEY, SECRET, Server, s3_server

from cluster.simulate import simulate
from trainer import storage as module
from trainer.storage import Storage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small days."""
    out = tmp_path_factory.mktemp("logs")
    simulate(str(out), days=2, start=FIRST_DAY, users=100, items=80, rows_per_day=6000, seed=3)
    return out / "logs"


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> dict[str, Any]:
    """What a night on the local disk leaves."""
    night = Night(tmp_path_factory.mktemp("disk"), logs)
    night.run("--no-ray", times=1)
    return outcome(night)


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[Server]:
    """A server that holds the logs."""
    with s3_server() as running:
        here, there = Storage(str(logs)), Storage(running.uri("the logs"))
        for name in here.files(recursive=True):
            there.write(name, here.read(name))
        yield running


@pytest.fixture
def on_s3(server: Server, tmp_path: Path) -> Callable[[], Night]:
    """A night that has not begun, with logs and checkpoints on the server."""
    text = CONFIG.replace("ROOT/checkpoints", f'"{server.uri(tmp_path.name)}"')
    text = text.replace("path: LOGS", f'path: "{server.uri("the logs")}"')
    return lambda: Night(tmp_path, Path("logs"), text)


def secrets(night: Night) -> list[str]:
    """The files in which a key or secret of the storage stands: those of the night, and those on the server."""
    kept = Storage(night.config.checkpoints.path)
    contents = {name: kept.read(name) for name in kept.files(recursive=True)}
    contents |= {str(path): path.read_bytes() for path in night.folder.rglob("*") if path.is_file()}
    found = [name for name, content in contents.items() if KEY.encode() in content or SECRET.encode() in content]
    return [name for name in found if not name.endswith("small.yaml")]


def test_a_night_on_a_server_that_refuses_now_and_then_leaves_what_one_on_the_disk_leaves(
    server: Server, on_s3: Callable[[], Night], on_disk: dict[str, Any]
) -> None:
    night = on_s3()
    with server.trouble("refuse", every=9):
        night.run("--no-ray", times=1)
    assert differing(outcome(night), on_disk) == []
    assert secrets(night) == []
    assert not list(night.folder.rglob("*.parquet")), "nothing lies on the local disk"


def test_a_night_on_s3_that_is_killed_goes_on(on_s3: Callable[[], Night], on_disk: dict[str, Any]) -> None:
    night = on_s3()
    model, day = Storage(night.config.checkpoints.path).within("small"), "day=2026-11-02"
    process = night.start("--no-ray")
    deadline = time.monotonic() + 300
    while not model.exists(f"{day}/ledger.json") or b'"training"' not in model.read(f"{day}/ledger.json"):
        assert process.poll() is None and time.monotonic() < deadline, night.error
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not model.exists(f"{day}/manifest.json"), "the day was over too soon to be killed"
    night.run("--no-ray", times=1)
    assert differing(outcome(night), on_disk) == []
    assert model.files("lock", recursive=True) == []


def test_a_night_whose_server_stays_away_ends_in_words_and_the_next_goes_on(
    server: Server,
    on_s3: Callable[[], Night],
    on_disk: dict[str, Any],
    daybreak: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    night = on_s3()
    monkeypatch.setattr(module, "_MAX_ATTEMPTS", 2)
    command = "nightly", str(night.folder / "small.yaml"), "--no-ray", "--json"
    for methods, containing in (("GET HEAD", "logs"), ("PUT", "manifest.json"), ("PUT", "rows")):
        with server.trouble("refuse", methods=methods, containing=containing):
            ended = daybreak(*command)
        assert ended.code == 2, ended
        assert "nights/" in ended.json["error"] and "->" in ended.json["error"]
        assert KEY not in ended.out + ended.err and SECRET not in ended.out + ended.err
    assert daybreak(*command).code == 0
    assert daybreak("verify", command[1]).code == daybreak("status", command[1]).code == 0
    trained = {name: value for name, value in outcome(night).items() if "/ledger" not in name}
    assert differing(trained, {name: value for name, value in on_disk.items() if "/ledger" not in name}) == []
