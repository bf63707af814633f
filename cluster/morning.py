"""The morning: what the driver does with an interval, before it is trained and after it is committed.

    ledger: planned, scored, training   as the workers tell
    the manifest is there: written      from here on everything is done from what lies on disk, now or by a later night
    verify      every file is read again                                      ledger: verified
    gate        judge the day's report                                        ledger: gated, with what was judged
    MLflow      the day's run, its version
    promote     champion.json in one write, then the alias                    ledger: promoted | held
    prune       checkpoints that are too old are removed

Each step finds what an earlier one, killed in the middle, had done: so the same command goes on from anywhere, and the
ledger ends as that of an undisturbed night.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from cluster.lock import FOLDER, Lock
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.config import Config, as_dict, flatten
from trainer.errors import UserError
from trainer.gate import Decision, Past, judge, look_back
from trainer.intervals import Interval
from trainer.ledger import Champion, Entry, Ledger
from trainer.pictures import days_picture, gates_picture
from trainer.retention import prune, remove
from trainer.storage import Storage, without_credentials
from trainer.tracking import Tracking
from trainer.workers import Event

_DAYS_IN_PICTURE = 60
_PLANNED = "delivered, and not trained yet"


def open_checkpoints(config: Config, mine: Callable[[], None] = lambda: None) -> Checkpoints:
    """mine: of the lock, for whoever writes."""
    return Checkpoints(config.checkpoints.path, config.name, mine)


def open_storage(config: Config) -> Storage:
    """The model's folder: its intervals, its champion, its lock."""
    return Storage(config.checkpoints.path).within(config.name)


def open_ledger(config: Config, mine: Callable[[], None] = lambda: None) -> Ledger:
    """mine: of the lock, for whoever writes."""
    return Ledger(open_storage(config), mine)


def lock(config: Config, verb: str) -> Lock:
    """The model's lock, for a with block. verb: who holds it, as the others are told."""
    return Lock(open_storage(config).within(FOLDER), verb)


class Morning:
    """The ledger, the gate, MLflow and the champion of one model. Used by one thread at a time."""

    def __init__(self, config: Config, checkpoints: Checkpoints, ledger: Ledger):
        self._config, self._checkpoints, self._ledger = config, checkpoints, ledger
        self._planned: Sequence[Interval] = ()
        self._finishing: Interval | None = None
        self._reports: dict[Interval, dict[str, Any]] = {}
        self._training = ""  # the interval that is known to be trained now
        self._pruned = False
        self.finished: dict[Interval, dict[str, Any]] = {}  # what was decided here; its checkpoint may be gone by now

    @cached_property
    def tracking(self) -> Tracking:
        """Opened when it is asked for first: that takes seconds."""
        return Tracking(self._config.tracking.mlflow, self._config.name)

    def open(self) -> None:
        """Open the tracking store, a UserError when it cannot be, and let the alias follow the champion, should a kill
        have come between them.
        """
        if champion := self._ledger.champion():
            set_alias(self.tracking, self._ledger, champion)
        else:
            self.tracking  # noqa: B018 - the property opens it

    @contextlib.contextmanager
    def night(self) -> Iterator[None]:
        """An error that ends the with block is entered for the interval that it was about."""
        try:
            yield
        except Exception as error:
            self._fail(error)
            raise

    def plan(self, intervals: Sequence[Interval]) -> None:
        """These will be trained, in this order."""
        self._planned = intervals
        for interval in intervals:
            self._ledger.record(interval, "planned", _PLANNED)

    def hear(self, event: Event) -> None:
        """What the workers tell: that an interval is scored and being trained."""
        if event["event"] == "progress" and event["phase"] == "train" and event["day"] != self._training:
            self._training = event["day"]
            interval = Interval.parse(event["day"], "an event of the workers")
            for state, reason in _way(self._before(interval))[1:3]:
                self._ledger.record(interval, state, reason)

    def finish_all(self, before: Interval | None = None) -> None:
        """Every committed interval (before another) of which nothing is decided yet, in order."""
        committed = [i for i in self._checkpoints.intervals() if before is None or i < before]
        open_ones = []
        for interval in reversed(committed):
            last = self._ledger.state(interval)
            if last and last["state"] == "dropped":  # whoever dropped it was killed before it was gone
                self._checkpoints.stored(lambda interval=interval: remove(self._checkpoints, interval))  # type: ignore[misc]
            elif self._ledger.decision(interval):
                break  # intervals are decided in order
            else:
                open_ones.append(interval)
        for interval in reversed(open_ones):
            self._finishing = interval
            self._finish(self._checkpoints.open(interval), [i for i in committed if i < interval])
            self._finishing = None
        if open_ones or not self._pruned:  # a night that was killed in it left the rest to the next
            self._prune()
            self._pruned = True

    def written(self, interval: Interval, earlier: Sequence[Interval] | None = None) -> None:
        """An interval is committed: what led to that and was not told, because driver or worker was killed, is entered.
        What was entered before a later step failed is not entered again. earlier: those that are committed before it.
        """
        if not self._ledger.was_written(interval):
            before = self._before(interval) if earlier is None else max(earlier, default=None)
            for state, reason in _way(before):
                self._ledger.record(interval, state, reason)

    def _before(self, interval: Interval) -> Interval | None:
        return max((i for i in self._checkpoints.intervals() if i < interval), default=None)

    def _finish(self, checkpoint: Checkpoint, earlier: Sequence[Interval]) -> None:
        """From the manifest to the decision."""
        interval = checkpoint.interval
        self.written(interval, earlier)
        if not self._entered(interval, "verified"):
            self._checkpoints.verify(checkpoint, own=True)  # the layers below were, when they were new
            self._ledger.record(interval, "verified", "every file is as it was written")
        if not self._entered(interval, "gated"):
            judged = self._judge(checkpoint, earlier)
            self._ledger.record(interval, "gated", judged.reason, decision=judged.state)
        decision = self._overruled(interval, self._entered(interval, "gated"))
        run_id = self._log(checkpoint, decision, earlier)
        version = self.tracking.register(
            run_id, tags={"day": interval.name, "checkpoint": checkpoint.id, "state": decision.state}
        )
        if decision.state == "promoted":
            self._ledger.move_champion(interval, "gate", decision.reason)
            self.tracking.set_alias("champion", version)
        self._ledger.record(interval, decision.state, decision.reason, run_id=run_id, version=version)
        self.finished[interval] = day_entry(checkpoint, self._ledger.state(interval))

    def _prune(self) -> None:
        """Remove checkpoints that are older than is wanted, never the champion."""
        settings, champion = self._config.checkpoints, self._ledger.champion()
        keep = [champion.interval] if champion else []
        days, bases = settings.keep_days, settings.keep_bases
        self._checkpoints.stored(lambda: prune(self._checkpoints, keep_days=days, keep_bases=bases, keep=keep))

    def _entered(self, interval: Interval, state: str) -> Entry:
        return next((entry for entry in self._ledger.current(interval) if entry["state"] == state), {})

    def _judge(self, checkpoint: Checkpoint, earlier: Sequence[Interval]) -> Decision:
        report, gate = checkpoint.report, self._config.nightly.gate
        return judge(report, look_back(reversed(earlier), self._past, report["day"], gate), gate)

    def _past(self, interval: Interval) -> Past:
        """An earlier interval, as the gate sees it."""
        decision = self._ledger.decision(interval) or {"state": "undecided", "reason": ""}
        return Past(self._checkpoints.open(interval).report, decision["state"], decision["reason"])

    def _fail(self, error: Exception) -> None:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(UserError):  # who lost the lock, or the storage, has said so already
            committed = self._checkpoints.intervals()
            waiting = [interval for interval in self._planned if interval not in committed]
            for interval in [self._finishing] if self._finishing else waiting[:1]:
                self._ledger.record(interval, "failed", text.partition("\n")[0])

    def _overruled(self, interval: Interval, gated: Entry) -> Decision:
        """What the gate said, unless a person moved the champion when this interval was already there."""
        serving = self._ledger.champion()
        if gated["decision"] == "promoted" and serving and serving.passed and interval <= serving.passed:
            return Decision("held", f"a person had {serving.interval} serve when this model was there already")
        return Decision(gated["decision"], gated["reason"])

    def _log(self, checkpoint: Checkpoint, decision: Decision, earlier: Sequence[Interval]) -> str:
        report = checkpoint.report
        counted = flatten({key: value for key, value in report.items() if key != "metrics"})
        metrics = {key.replace(".", "/"): value for key, value in counted.items() if isinstance(value, int | float)}
        title = f"{self._config.name}, {report['day']}: mean shares of experts"
        gates = {"gates.png": gates_picture(report["gates"], title)} if report["gates"] else {}
        return self.tracking.log_day(
            report["day"],
            params=_shown(flatten(as_dict(self._config))),
            metrics=flatten_metrics(report) | metrics,
            tags={
                "checkpoint": checkpoint.id,
                "state": decision.state,
                "reason": decision.reason,
                "folder": checkpoint.folder,
            },
            files={
                "checkpoint/manifest.json": json.dumps(checkpoint.manifest, indent=1).encode(),
                "days.png": days_picture(self._history([*earlier, checkpoint.interval]), title=self._config.name),
            }
            | gates,
        )

    def _history(self, committed: Sequence[Interval]) -> list[tuple[str, dict[str, float]]]:
        """The metrics of the newest of them."""
        newest = committed[-_DAYS_IN_PICTURE:]
        self._reports = {i: self._reports.get(i) or self._checkpoints.open(i).report for i in newest}
        return [(i.name, flatten_metrics(report)) for i, report in self._reports.items()]


def _way(before: Interval | None) -> list[tuple[str, str]]:
    """The states that lead to the commit, with their reasons: the same ones whoever enters them, and when. before: the
    interval whose model it begins with.
    """
    return [
        ("planned", _PLANNED),
        ("scored", f"by the model of {before}" if before else "there is no model to score it with"),
        ("training", f"from the model of {before}" if before else "from the start"),
        ("written", "its manifest is there"),
    ]


def must_have_champion(checkpoints: Checkpoints, ledger: Ledger, before: Interval | None = None) -> Checkpoint:
    """The checkpoint that serves. With `before`, the one to score that interval with: the champion when it was trained
    before it, else the newest promoted one from before it, else the champion. A UserError while there is none.
    """
    champion = ledger.champion()
    if champion is None:
        raise UserError("no model is promoted yet", checkpoints.path, do="run nightly first")
    if before and champion.interval >= before:
        for interval in reversed(checkpoints.intervals()):
            if interval < before and ledger.is_promoted(interval):
                return checkpoints.open(interval)
    return checkpoints.open(champion.interval)


def set_alias(tracking: Tracking, ledger: Ledger, champion: Champion) -> None:
    """Point MLflow's alias to the champion's version, if it does not; it has one when its day was decided."""
    version = ledger.version(champion.interval)
    there = tracking.alias("champion")
    if version is not None and (there is None or there.version != version):
        tracking.set_alias("champion", version)


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as people may see them: of addresses neither key nor secret."""
    return {name: without_credentials(value) if isinstance(value, str) else value for name, value in settings.items()}


def flatten_metrics(report: dict[str, Any]) -> dict[str, float]:
    """A report's defined metrics as {"click@all/auc": value}."""
    return {
        f"{a}/{name}": value for a, of in report["metrics"].items() for name, value in of.items() if value is not None
    }


def day_entry(checkpoint: Checkpoint, stands: Entry | None) -> dict[str, Any]:
    """One committed interval as `nightly --json` prints it, and where it stands in the ledger."""
    wanted = "day rows seconds samples_per_s workers memory_bytes metrics losses weights gates nulls ids".split()
    report = checkpoint.report
    told = {"notes": report.get("notes", []), "quarantine": report.get("quarantine")}
    return {key: report.get(key) for key in wanted} | told | where_it_stands(stands)


def where_it_stands(last: Entry | None) -> dict[str, Any]:
    """state, since and reason of an entry of the ledger."""
    return {key: (last or {}).get(of) for key, of in (("state", "state"), ("since", "at"), ("reason", "reason"))}
