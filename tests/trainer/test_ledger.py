"""The ledger. Oracles: the files themselves, read with json; sequences of states, written down by hand."""

import datetime
import errno
import json
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.ledger import WAY, Champion, Ledger
from trainer.storage import Storage

DAY, NEXT = Interval(datetime.date(2026, 11, 20)), Interval(datetime.date(2026, 11, 21))
HOURS = [Interval(DAY.day, hour) for hour in (0, 13)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Storage(str(tmp_path)))


def states(ledger: Ledger, interval: Interval = DAY) -> list[str]:
    return [entry["state"] for entry in ledger.entries(interval)]


def record(ledger: Ledger, text: str, interval: Interval = DAY) -> None:
    for state in text.split():
        ledger.record(interval, state, f"why {state}")


def test_an_interval_goes_its_way_and_its_last_entry_is_the_decision(ledger: Ledger, tmp_path: Path) -> None:
    record(ledger, " ".join(WAY))
    assert ledger.decision(DAY) is None
    ledger.record(DAY, "held", "click@all is worse", run_id="r1", version=7)
    written = json.loads((tmp_path / "day=2026-11-20" / "ledger.json").read_text())
    assert written["interval"] == "2026-11-20" and [e["state"] for e in written["entries"]] == [*WAY, "held"]
    last = written["entries"][-1]
    assert (last["reason"], last["run_id"], last["version"]) == ("click@all is worse", "r1", 7)
    assert datetime.datetime.fromisoformat(last["at"]).tzinfo is datetime.UTC
    assert ledger.state(DAY) == ledger.decision(DAY) == last


@pytest.mark.parametrize(
    ("entered", "kept"),
    [
        ("planned planned scored scored training scored planned", "planned scored training"),
        ("planned scored training written scored planned training", "planned scored training written"),
        ("planned training failed planned training written", "planned training failed planned training written"),
        ("planned failed failed", "planned failed"),
        ("failed", ""),
        ("planned written gated promoted promoted gated", "planned written gated promoted"),
        ("planned written gated held promoted", "planned written gated held promoted"),  # by a person
        ("planned written gated promoted dropped dropped planned", "planned written gated promoted dropped planned"),
    ],
)
def test_a_state_is_entered_once_since_the_interval_last_began(ledger: Ledger, entered: str, kept: str) -> None:
    record(ledger, entered)
    assert " ".join(states(ledger)) == kept


@pytest.mark.parametrize("killed_after", range(len(WAY) + 1))
def test_a_night_killed_after_any_entry_and_run_again_leaves_the_ledger_of_an_undisturbed_one(
    tmp_path: Path, killed_after: int
) -> None:
    way = [*WAY, "promoted"]
    undisturbed, disturbed = (Ledger(Storage(str(tmp_path / name))) for name in ("a", "b"))
    record(undisturbed, " ".join(way))
    record(disturbed, " ".join(way[:killed_after]))
    record(disturbed, " ".join(way))
    timeless = [[entry | {"at": ""} for entry in each.entries(DAY)] for each in (undisturbed, disturbed)]
    assert timeless[0] == timeless[1]


def test_days_and_hours_are_found_in_order(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.intervals() == []
    (tmp_path / "day=2026-11-19" / "0123456789ab").mkdir(parents=True)  # an attempt of which nobody wrote anything
    (tmp_path / "lock").mkdir()
    for interval in (NEXT, HOURS[1], HOURS[0]):
        ledger.record(interval, "planned", "")
    assert ledger.intervals() == [*HOURS, NEXT]
    assert (tmp_path / "day=2026-11-20" / "hour=13" / "ledger.json").exists()


def test_the_champion_moves_and_says_who_moved_it_and_what_served_before(ledger: Ledger) -> None:
    assert ledger.champion() is None
    ledger.move_champion(DAY, "gate", "the first model")
    first = ledger.champion()
    assert first == Champion(DAY, first.since if first else "", "gate", "the first model")
    ledger.move_champion(NEXT, "gate", "better")
    ledger.move_champion(DAY, "rollback", "by a person", passed=NEXT)
    moved = ledger.champion()
    assert moved and (moved.interval, moved.by, moved.before, moved.passed) == (DAY, "rollback", NEXT, NEXT)
    ledger.no_champion()
    assert ledger.champion() is None


def test_to_move_the_champion_where_it_is_changes_nothing(ledger: Ledger, tmp_path: Path) -> None:
    ledger.move_champion(HOURS[0], "gate", "the first model")
    before = (tmp_path / "champion.json").stat()
    ledger.move_champion(HOURS[0], "gate", "again")
    after = (tmp_path / "champion.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "its since and reason stay"


def test_whoever_lost_the_lock_writes_nothing(tmp_path: Path) -> None:
    def taken_over() -> None:
        raise UserError("another night took over")

    lost = Ledger(Storage(str(tmp_path)), taken_over)
    record(Ledger(Storage(str(tmp_path))), "planned")
    for work in (
        lambda: lost.record(DAY, "scored", ""),
        lambda: lost.move_champion(DAY, "gate", ""),
        lost.no_champion,
    ):
        with pytest.raises(UserError, match="took over"):
            work()
    assert states(lost) == ["planned"] and lost.champion() is None, "he may read"


@pytest.mark.parametrize("file", ["day=2026-11-20/ledger.json", "champion.json"])
def test_a_damaged_file_is_told_with_the_way_to_mend_it(ledger: Ledger, tmp_path: Path, file: str) -> None:
    (tmp_path / "day=2026-11-20").mkdir()
    (tmp_path / file).write_text('{"interval": "2026-')
    with pytest.raises(UserError, match=f"(?s){file}: the file cannot be read.*-> restore the file from a copy, or"):
        assert ledger.champion() or ledger.entries(DAY)


def test_a_ledger_that_cannot_be_written_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = Storage(str(tmp_path))
    monkeypatch.setattr(storage, "write", full)
    text = "(?s)day=2026-11-20/ledger.json: the file cannot be written.*No space.*same command again"
    with pytest.raises(UserError, match=text):
        Ledger(storage).record(DAY, "planned", "")
