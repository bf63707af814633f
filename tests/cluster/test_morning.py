"""The morning, and what a person says of which model serves: killed at every write and every call of the registry.

Everything is real but the checkpoints' content (a manifest and one file) and MLflow, which is a registry in memory that
keeps what it has when a night is killed, as a server does. Oracles: the ledger, the champion file and the registry of a
night that was not killed; sequences of states, written down by hand.
"""

import dataclasses
import datetime
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import cluster.morning
import cluster.promotion
from cluster.morning import Morning, must_have_champion, open_checkpoints, open_ledger
from cluster.promotion import drop, promote, rollback
from embeddings.buckets import NUM_BUCKETS
from trainer.checkpoint import FORMAT, MANIFEST, fingerprint_of
from trainer.config import Config
from trainer.errors import UserError
from trainer.gate import Decision
from trainer.intervals import Interval
from trainer.ledger import WAY, Ledger
from trainer.storage import Storage
from trainer.tracking import ModelVersion

DAYS = [Interval(datetime.date(2026, 11, day)) for day in range(1, 7)]


class Killed(BaseException):
    """What SIGKILL would be: nothing catches it."""


@dataclass
class Registry:
    """What MLflow would hold. Each call is counted, and the night dies at the one that is wished for."""

    runs: list[dict[str, str]] = field(default_factory=list)
    versions: list[dict[str, str]] = field(default_factory=list)
    aliases: dict[str, int] = field(default_factory=dict)
    down: bool = False
    step: Callable[[], None] = lambda: None

    def log_day(self, day: str, *, params: Any, metrics: Any, tags: dict[str, str], files: Any) -> str:
        self._called()
        run = {name: tag for name, tag in tags.items() if name != "folder"} | {"day": day}
        if run not in self.runs:
            self.runs.append(run)
        self.step()
        return f"run {self.runs.index(run)}"

    def register(self, run_id: str, *, tags: dict[str, str]) -> int:
        self._called()
        if run_id not in [version["run_id"] for version in self.versions]:
            self.versions.append(tags | {"run_id": run_id})
        self.step()
        return 1 + [version["run_id"] for version in self.versions].index(run_id)

    def alias(self, name: str) -> ModelVersion | None:
        self._called()
        version = self.aliases.get(name)
        return None if version is None else ModelVersion(version, self.versions[version - 1]["run_id"], {})

    def set_alias(self, name: str, version: int) -> None:
        self._called()
        self.aliases[name] = version
        self.step()

    def _called(self) -> None:
        self.step()
        if self.down:
            raise UserError("the MLflow server does not answer")


@dataclass
class House:
    """One model's folder, its registry, and a gate that holds the days that it is told to hold."""

    config: Config
    registry: Registry = field(default_factory=Registry)
    bad: set[Interval] = field(default_factory=set)
    judged: list[Interval] = field(default_factory=list)

    @property
    def storage(self) -> Storage:
        return Storage(self.config.checkpoints.path).within(self.config.name)

    @property
    def ledger(self) -> Ledger:
        return open_ledger(self.config)

    @property
    def serves(self) -> tuple[Interval, str] | None:
        champion = self.ledger.champion()
        return champion and (champion.interval, champion.by)

    @property
    def alias(self) -> str | None:
        """The day of the version that the alias points to."""
        version = self.registry.aliases.get("champion")
        return None if version is None else self.registry.versions[version - 1]["day"]

    def judge(self, report: dict[str, Any], before: Any, settings: Any) -> Decision:
        interval = Interval.parse(report["day"], "a test")
        self.judged.append(interval)
        return Decision("held", "auc: it is bad") if interval in self.bad else Decision("promoted", "it is good")

    def train(self, *intervals: Interval, text: str = "rows") -> None:
        """What the workers leave: a file, and the manifest that commits it."""
        for interval in intervals:
            attempt, content = "0123456789ab", f"{text} of {interval}".encode()
            self.storage.write(f"{interval.folder}/{attempt}/dense.safetensors", content)
            own = {"interval": interval.name, "attempt": attempt}
            manifest = own | {
                "format": FORMAT,
                "num_buckets": NUM_BUCKETS,
                "layers": [own | {"files": {}}],
                "files": {"dense.safetensors": fingerprint_of(content)},
                "report": {"day": interval.name, "metrics": {}, "gates": {}, "rows": 10},
            }
            open_checkpoints(self.config).write_manifest(interval, MANIFEST, manifest)

    def night(self, *intervals: Interval, told: bool = True) -> None:
        """A night over these: what an earlier one left open, then each trained and finished. told: the workers' events
        reach the driver.
        """
        morning = Morning(self.config, open_checkpoints(self.config), self.ledger)
        with morning.night():
            morning.finish_all()
            morning.open()
            missing = [i for i in intervals if i not in open_checkpoints(self.config).intervals()]
            morning.plan(missing)
            for interval in missing:
                if told:
                    morning.hear({"event": "progress", "day": interval.name, "phase": "train", "rows": 1})
                self.train(interval)
                self.registry.step()
                if told:
                    morning.finish_all()
            morning.finish_all()

    def left(self) -> dict[str, Any]:
        """All that a night leaves, times apart."""
        files = {n: json.loads(self.storage.read(n)) for n in self.storage.files(recursive=True) if n.endswith(".json")}
        return {"files": timeless(files), "registry": (self.registry.runs, self.registry.versions, self.alias)}

    def states(self, interval: Interval) -> list[str]:
        return [entry["state"] for entry in self.ledger.entries(interval)]

    def last(self, interval: Interval) -> tuple[str, str]:
        entry = self.ledger.state(interval) or {}
        return entry["state"], entry["reason"]

    def promote(self, interval: Interval, force: bool = True) -> Any:
        return promote(self.config, open_checkpoints(self.config), self.ledger, interval, force)

    def rollback(self, interval: Interval) -> Any:
        return rollback(self.config, open_checkpoints(self.config), self.ledger, interval)

    def drop(self, first: Interval) -> list[Interval]:
        return drop(self.config, open_checkpoints(self.config), self.ledger, first, f"nightly --again {first}")


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in ("at", "since")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def houses(small_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], House]:
    """As many models as a test wants, each with a registry of its own, without the pictures: they take a second."""
    config, built = small_config(), []

    def build() -> House:
        settings = dataclasses.replace(config.checkpoints, path=f"{tmp_path}/{len(built)}")
        built.append(House(dataclasses.replace(config, checkpoints=settings)))
        return built[-1]

    def tracking(uri: str, model: str) -> Registry:
        if built[-1].registry.down:
            raise UserError("the MLflow server does not answer")
        return built[-1].registry

    for module in (cluster.morning, cluster.promotion):
        monkeypatch.setattr(module, "Tracking", tracking)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # nobody pulls the plug here
    monkeypatch.setattr(cluster.morning, "days_picture", lambda history, title: b"")
    monkeypatch.setattr(cluster.morning, "judge", lambda *of: built[-1].judge(*of))
    return build


@pytest.fixture
def house(houses: Callable[[], House]) -> House:
    return houses()


def dies_at(house: House, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the house dies at the nth of: before a file is written, after; before and after a call of MLflow;
    after a manifest; before a folder is removed.
    """
    steps = itertools.count()

    def tick() -> None:
        if next(steps) == step:
            raise Killed

    def around(work: Callable[..., None]) -> Callable[..., None]:
        def wrapped(self: Storage, *arguments: Any) -> None:
            tick()
            work(self, *arguments)
            tick()

        return wrapped

    house.registry.step = tick
    for name in ("write", "delete"):
        monkeypatch.setattr(Storage, name, around(getattr(Storage, name)))


def killed_everywhere(
    work: Callable[[House], None], houses: Callable[[], House], before: Callable[[House], None]
) -> int:
    """Kill the work at each of its steps, do it again, and compare what is left with an undisturbed one; how many steps
    there were.
    """
    undisturbed = houses()
    before(undisturbed)
    work(undisturbed)
    expected = undisturbed.left()
    for step in itertools.count():
        house = houses()
        before(house)
        with pytest.MonkeyPatch.context() as patch:
            dies_at(house, step, patch)
            try:
                work(house)
            except Killed:
                survived = False
            else:
                survived = True
        house.registry.step = lambda: None
        if survived:
            return step
        work(house)
        assert house.left() == expected, f"killed at step {step}"
    raise AssertionError


def test_a_morning_enters_every_state_with_its_reason_and_moves_champion_and_alias(house: House) -> None:
    house.bad = {DAYS[1]}
    house.night(*DAYS[:3])
    assert house.states(DAYS[0]) == [*WAY, "promoted"] and house.states(DAYS[1]) == [*WAY, "held"]
    reasons = [entry["reason"] for entry in house.ledger.entries(DAYS[1])]
    assert reasons == [
        "delivered, and not trained yet",
        "by the model of 2026-11-01",
        "from the model of 2026-11-01",
        "its manifest is there",
        "every file is as it was written",
        "auc: it is bad",
        "auc: it is bad",
    ]
    assert [entry["reason"] for entry in house.ledger.entries(DAYS[0])][1:3] == [
        "there is no model to score it with",
        "from the start",
    ]
    decision = house.ledger.decision(DAYS[2]) or {}
    assert (decision["run_id"], decision["version"]) == ("run 2", 3)
    assert house.serves == (DAYS[2], "gate") and house.alias == DAYS[2].name


@pytest.mark.parametrize("told", [True, False], ids=["told", "nothing was told"])
def test_a_night_killed_anywhere_goes_on_and_leaves_what_an_undisturbed_one_leaves(
    houses: Callable[[], House], told: bool
) -> None:
    """Three days, of which the gate holds one. Also when no event of the workers reaches the driver."""

    def before(house: House) -> None:
        house.bad = {DAYS[1]}

    steps = killed_everywhere(lambda house: house.night(*DAYS[:3], told=told), houses, before)
    assert steps == 77


def test_what_the_gate_said_is_not_asked_again(house: House) -> None:
    def killed() -> None:
        raise Killed

    house.train(DAYS[0])
    house.registry.step = killed
    with pytest.raises(Killed):
        house.night()
    house.registry.step, house.bad = (lambda: None), {DAYS[0]}
    house.night()
    assert house.judged == [DAYS[0]] and house.last(DAYS[0])[0] == "promoted"


def test_a_failure_is_entered_with_its_first_line_and_the_next_night_goes_on(house: House) -> None:
    house.night(DAYS[0])
    house.registry.down = True
    house.train(DAYS[1])
    with pytest.raises(UserError, match="does not answer"):
        house.night()
    assert house.last(DAYS[1]) == ("failed", "the MLflow server does not answer") and house.serves == (DAYS[0], "gate")
    house.registry.down = False
    house.night(DAYS[2])
    assert house.states(DAYS[1]) == [*WAY, "failed", "verified", "gated", "promoted"], "it is not trained again"
    assert house.alias == DAYS[2].name


@pytest.mark.parametrize("error", [UserError("a label is 7", "part-3.parquet"), ZeroDivisionError("by zero")])
def test_an_error_in_training_is_entered_for_the_first_day_that_is_not_trained(house: House, error: Exception) -> None:
    house.night(DAYS[0])
    morning = Morning(house.config, open_checkpoints(house.config), house.ledger)
    with pytest.raises(type(error)), morning.night():
        morning.plan(DAYS[1:3])
        raise error
    reason = "part-3.parquet: a label is 7" if isinstance(error, UserError) else "ZeroDivisionError: by zero"
    assert house.last(DAYS[1]) == ("failed", reason) and house.states(DAYS[2]) == ["planned"]
    house.night(*DAYS[:3])
    assert house.states(DAYS[1]) == ["planned", "failed", *WAY, "promoted"]
    assert house.states(DAYS[2]) == [*WAY, "promoted"]


def test_a_damaged_model_is_not_promoted_and_is_trained_again_by_again(house: House) -> None:
    house.night(DAYS[0])
    house.train(DAYS[1])
    house.storage.write(f"{DAYS[1].folder}/0123456789ab/dense.safetensors", b"rotten")
    with pytest.raises(UserError, match="(?s)damaged.*nightly --again 2026-11-02"):
        house.night()
    assert house.last(DAYS[1])[0] == "failed" and house.serves == (DAYS[0], "gate")
    house.drop(DAYS[1])
    house.night(*DAYS[:2])
    assert house.last(DAYS[1])[0] == "promoted" and house.serves == (DAYS[1], "gate")


# Who serves, by a person's word.


def test_rollback_moves_champion_and_alias_and_says_what_served_since_when(house: House) -> None:
    house.night(*DAYS[:3])
    before = house.ledger.champion()
    moved = house.rollback(DAYS[0])
    assert moved.before == before and moved.alias is None
    assert house.serves == (DAYS[0], "rollback") and house.alias == DAYS[0].name
    assert house.last(DAYS[2])[0] == "promoted", "what happened to it stays true"


def test_after_a_rollback_the_same_night_changes_nothing_and_the_next_may_promote(house: House) -> None:
    house.night(*DAYS[:3])
    house.rollback(DAYS[0])
    house.night(*DAYS[:3])
    assert house.serves == (DAYS[0], "rollback")
    house.bad = {DAYS[3]}
    house.night(*DAYS[:4])
    assert house.serves == (DAYS[0], "rollback") and house.alias == DAYS[0].name
    house.night(*DAYS[:5])
    assert house.serves == (DAYS[4], "gate") and house.alias == DAYS[4].name


def test_a_model_that_was_not_decided_when_a_person_rolled_back_does_not_come_back_by_itself(house: House) -> None:
    house.night(*DAYS[:2])
    house.train(DAYS[2])  # and the driver was killed
    house.rollback(DAYS[0])
    house.night()
    assert house.last(DAYS[2]) == ("held", "a person had 2026-11-01 serve when this model was there already")
    assert house.serves == (DAYS[0], "rollback")


def test_rollback_while_mlflow_is_down_moves_what_serves_and_the_next_night_the_alias(house: House) -> None:
    house.night(*DAYS[:2])
    house.registry.down = True
    assert "does not answer" in house.rollback(DAYS[0]).alias
    assert house.serves == (DAYS[0], "rollback") and house.alias == DAYS[1].name
    house.registry.down, house.bad = False, {DAYS[2]}
    house.night(DAYS[2])
    assert house.alias == DAYS[0].name


def test_rollback_killed_anywhere_and_said_again_is_done(houses: Callable[[], House]) -> None:
    steps = killed_everywhere(lambda house: house.rollback(DAYS[0]), houses, lambda house: house.night(*DAYS[:2]))
    assert steps == 5  # champion.json, asking for the alias, setting it


def test_rollback_refuses_what_was_held_is_damaged_or_is_not_kept(house: House) -> None:
    house.bad = {DAYS[1]}
    house.night(*DAYS[:3])
    with pytest.raises(UserError, match="(?s)was not promoted.*got held: auc: it is bad.*2026-11-01.*promote --force"):
        house.rollback(DAYS[1])
    with pytest.raises(UserError, match="no checkpoint of day 2026-11-06"):
        house.rollback(DAYS[5])
    house.storage.delete(f"{DAYS[0].folder}/0123456789ab/dense.safetensors")
    with pytest.raises(UserError, match="a checkpoint file is missing"):
        house.rollback(DAYS[0])
    assert house.serves == (DAYS[2], "gate")


def test_to_roll_back_to_what_serves_leaves_it_as_it_is(house: House) -> None:
    house.night(*DAYS[:2])
    before = house.ledger.champion()
    moved = house.rollback(DAYS[1])
    assert before and (moved.champion.since, moved.champion.by) == (before.since, "gate")


def test_a_held_model_is_promoted_by_force_only(house: House) -> None:
    house.bad = {DAYS[1]}
    house.night(*DAYS[:2])
    with pytest.raises(UserError, match="(?s)was held.*got auc: it is bad.*--force"):
        house.promote(DAYS[1], force=False)
    house.promote(DAYS[1])
    assert house.serves == (DAYS[1], "force") and house.alias == DAYS[1].name
    assert house.last(DAYS[1]) == ("promoted", "a person promoted it by force; it was held: auc: it is bad")
    assert (house.ledger.decision(DAYS[1]) or {})["version"] == 2
    house.night(DAYS[2])
    assert house.serves == (DAYS[2], "gate")


def test_promote_killed_anywhere_and_said_again_is_done(houses: Callable[[], House]) -> None:
    def before(house: House) -> None:
        house.bad = {DAYS[1]}
        house.night(*DAYS[:2])

    assert killed_everywhere(lambda house: house.promote(DAYS[1]), houses, before) == 7


def test_nothing_is_promoted_before_it_was_judged(house: House) -> None:
    house.train(DAYS[0])
    with pytest.raises(UserError, match="(?s)nothing is decided yet of day 2026-11-01.*run nightly"):
        house.promote(DAYS[0])


# Again.


def test_again_throws_the_models_away_and_the_night_trains_them_anew(house: House) -> None:
    house.night(*DAYS[:4])
    assert house.drop(DAYS[2]) == DAYS[2:4]
    assert open_checkpoints(house.config).intervals() == DAYS[:2]
    assert house.serves == (DAYS[1], "again") and house.alias == DAYS[1].name, (
        "until then the newest before them serves"
    )
    assert house.last(DAYS[2]) == ("dropped", "nightly --again 2026-11-03")
    house.night(*DAYS[:4])
    assert house.states(DAYS[2]) == [*WAY, "promoted", "dropped", *WAY, "promoted"]
    assert house.serves == (DAYS[3], "gate") and house.alias == DAYS[3].name


def test_again_killed_anywhere_and_said_again_ends_the_same(houses: Callable[[], House]) -> None:
    """The night may also be said without --again: what was dropped is trained anew."""

    def again(house: House) -> None:
        if house.states(DAYS[1]).count("dropped") == 0:
            house.drop(DAYS[1])
        house.night(*DAYS[:3])

    steps = killed_everywhere(again, houses, lambda house: house.night(*DAYS[:3]))
    assert steps > 50


def test_again_from_the_first_day_leaves_no_champion_until_the_night_promotes_one(house: House) -> None:
    house.night(*DAYS[:2])
    house.drop(DAYS[0])
    assert house.serves is None
    with pytest.raises(UserError, match="no model is promoted yet"):
        must_have_champion(open_checkpoints(house.config), house.ledger)
    house.night(*DAYS[:2])
    assert house.serves == (DAYS[1], "gate")


def test_what_is_trained_anew_after_a_rollback_may_serve(house: House) -> None:
    house.night(*DAYS[:4])
    house.rollback(DAYS[0])
    since = (house.ledger.champion() or pytest.fail()).since
    house.drop(DAYS[1])
    house.ledger.record(DAYS[1], "planned", "")
    champion = house.ledger.champion()
    assert champion and (champion.interval, champion.by, champion.since) == (DAYS[0], "rollback", since)
    house.train(DAYS[1])  # and the driver was killed
    house.night()
    assert house.serves == (DAYS[1], "gate")


def test_again_refuses_a_day_that_was_never_trained_and_one_whose_start_is_gone(house: House) -> None:
    house.night(*DAYS[:3])
    with pytest.raises(UserError, match="(?s)day 2020-01-01 was never trained.*2026-11-01, 2026-11-02, 2026-11-03"):
        house.drop(Interval(datetime.date(2020, 1, 1)))
    house.storage.delete(f"{DAYS[0].folder}/manifest.json")
    with pytest.raises(UserError, match="(?s)2026-11-02 was trained from is not kept.*got none.*expected 2026-11-01"):
        house.drop(DAYS[1])
    assert house.drop(DAYS[2]) == [DAYS[2]]


# What follows the champion.


@pytest.fixture
def rolled_back(house: House) -> House:
    house.bad = {DAYS[2]}
    house.night(*DAYS[:5])
    house.rollback(DAYS[3])
    return house


@pytest.mark.parametrize(
    ("before", "expected"), [(None, 3), (5, 3), (4, 3), (3, 1), (2, 1), (1, 0), (0, 3)]
)  # 2 was held; before 0 there is nothing: the champion
def test_a_day_is_scored_by_the_champion_or_by_the_newest_promoted_before_it(
    rolled_back: House, before: int | None, expected: int
) -> None:
    interval = None if before is None else DAYS[before]
    found = must_have_champion(open_checkpoints(rolled_back.config), rolled_back.ledger, interval)
    assert found.interval == DAYS[expected]


def test_old_checkpoints_go_and_the_champion_and_the_ledgers_stay(
    houses: Callable[[], House], small_config: Callable[..., Config], tmp_path: Path
) -> None:
    house = houses()
    keep = ("checkpoints.keep_days=2", "checkpoints.keep_bases=0", f"checkpoints.path={house.config.checkpoints.path}")
    house.config = small_config(*keep)
    house.bad = set(DAYS[1:])
    house.night(*DAYS)
    assert open_checkpoints(house.config).intervals() == [DAYS[0], *DAYS[4:]]
    assert house.ledger.intervals() == DAYS and house.serves == (DAYS[0], "gate")


def test_whoever_lost_the_lock_neither_decides_nor_enters_that_he_failed(house: House) -> None:
    def taken_over() -> None:
        raise UserError("another night took over")

    house.night(DAYS[0])
    house.train(DAYS[1])
    lost = Morning(house.config, open_checkpoints(house.config, taken_over), open_ledger(house.config, taken_over))
    with pytest.raises(UserError, match="took over"), lost.night():
        lost.finish_all()
    with pytest.raises(UserError, match="took over"):
        open_checkpoints(house.config, taken_over).write_manifest(DAYS[2], MANIFEST, {})
    assert house.states(DAYS[1]) == [] and house.serves == (DAYS[0], "gate")
    assert open_checkpoints(house.config).intervals() == DAYS[:2]
