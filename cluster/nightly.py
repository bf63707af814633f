"""The night: every day that is not done yet is scored, trained on, committed, logged, judged and promoted or held.

    driver                                            workers, all days of one call in one run
    which days are pending; read their footers   ->   for each day: score with the model of the day before,
                                                      train from its checkpoint, commit the checkpoint
    log the day to MLflow, judge, promote or hold <-  event: committed
    write the decision down

A day is trained when its manifest is there, and done when its decision is there: a night that was killed anywhere goes
on from that.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from trainer.agree import together
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.config import Config, as_dict, flatten
from trainer.data import DayPlan, Logs
from trainer.day import run_day
from trainer.errors import UserError
from trainer.gate import Decision, Past, judge, look_back
from trainer.intervals import Interval
from trainer.learner import Learner, build, check, open_logs
from trainer.pictures import days_picture, gates_picture
from trainer.saving import Saving
from trainer.tracking import Tracking
from trainer.workers import Event, Worker, run_here, run_on_ray

_PROGRESS_EVERY_S = 0.25
_LEARNT_BY = ("data", "features", "tables", "tasks", "model", "train")


def nightly(
    config: Config,
    *,
    first: Interval | None = None,
    through: Interval | None = None,
    use_ray: bool = True,
    on_event: Callable[[Event], None],
) -> dict[str, Any]:
    """Do every day that is not done. Returns {"model", "days": [...]}: one entry a committed day of the range, in
    order.
    """
    checkpoints = open_checkpoints(config)
    plans = pending(config, open_logs(config), checkpoints, first, through)
    morning = Morning(config, checkpoints)
    morning.decide_all()

    def hear(event: Event) -> None:
        if event["event"] == "committed":
            morning.decide_all()
        on_event(event)

    if plans:
        check(config)  # a body or a database that cannot be made is found out now, not after hours
        morning.open()
        try:
            train(config, plans, use_ray=use_ray, on_event=hear)
        finally:
            morning.decide_all()  # also when the night ended early, or a worker was lost before it told of a commit
    trained = {plan.interval for plan in plans}
    done = [i for i in checkpoints.intervals() if (first is None or i >= first) and (through is None or i <= through)]
    return {"model": config.name, "days": [day_entry(checkpoints, i, i in trained) for i in done]}


def open_checkpoints(config: Config) -> Checkpoints:
    return Checkpoints(config.checkpoints.path, config.name)


def pending(
    config: Config, logs: Logs, checkpoints: Checkpoints, first: Interval | None, through: Interval | None
) -> list[DayPlan]:
    """The intervals to train on: after the newest committed one, within first .. through. Their footers are read and
    checked here.
    """
    committed, present = checkpoints.intervals(), logs.intervals()
    start = max(i for i in (first, committed[-1].next() if committed else present[0]) if i)
    end = through or present[-1]
    wanted = [i for i in present if start <= i <= end]
    if config.nightly.missing_days == "stop":
        expected = start
        while expected <= end:
            if expected not in wanted:
                got, do = f"days {present[0]} .. {present[-1]}", "deliver it, narrow --from and --through, or set "
                raise UserError(f"{expected.words} is missing", logs.path, got, do=f"{do}nightly.missing_days=skip")
            expected = expected.next()
    return [logs.plan(interval) for interval in wanted]


def train(config: Config, plans: list[DayPlan], *, use_ray: bool, on_event: Callable[[Event], None]) -> None:
    """Train on the days, in order, on the configured workers or in this process."""
    run(partial(work, config=config, plans=plans), config, use_ray, on_event)


def run(job: Callable[[Worker], Any], config: Config, use_ray: bool, on_event: Callable[[Event], None]) -> Any:
    """A job on the configured Ray workers, or as the only worker in this process; returns worker 0's result."""
    if not use_ray:
        return run_here(job, on_event)
    nightly, workers = config.nightly, config.train.workers_between
    return run_on_ray(job, on_event, workers=workers, max_failures=nightly.max_failures, hang_s=nightly.hang_s)


def work(worker: Worker, *, config: Config, plans: list[DayPlan]) -> None:
    """What each worker does: the days that are not committed yet, in order, from the newest checkpoint before them."""
    checkpoints, logs = open_checkpoints(config), open_logs(config)
    committed = together(worker.exchange, checkpoints.intervals)
    saving = saving_of(config, checkpoints, build(config, worker.exchange, worker.device))
    for plan in plans:
        if committed and plan.interval <= committed[-1]:
            continue  # committed before the workers were started again
        if worker.more_workers():
            return  # and is called again, with them
        under_way = saving.begin(plan.interval, _about(config, plan))
        report = run_day(
            saving.learner,
            logs,
            plan,
            batch_size=config.train.batch_size,
            lanes=config.data.lanes,
            gauc=config.data.gauc,
            score=saving.newest is not None,
            progress=teller(worker, plan),
            under_way=under_way,
            after_step=saving.after_step,
        )
        worker.at(plan.interval.name, "commit", 0)
        saving.commit(report, delivery=plan.delivery)
        if worker.exchange.rank == 0:
            worker.emit({"event": "committed", "day": plan.interval.name, "report": report})


def saving_of(config: Config, checkpoints: Checkpoints, learner: Learner) -> Saving:
    """How a configuration keeps a learner on the disk."""
    settings = config.checkpoints
    every_s = 60 * settings.progress_minutes or None
    return Saving(checkpoints, learner, base_every=settings.base_every, every_s=every_s, retries=settings.retries)


def _about(config: Config, plan: DayPlan) -> dict[str, Any]:
    """What a snapshot within an interval is of: the rows, and all settings by which they are learnt. When any of it is
    another, the interval begins anew.
    """
    learnt_by = {name: part for name, part in as_dict(config).items() if name in _LEARNT_BY}
    learnt_by["train"] = {name: value for name, value in learnt_by["train"].items() if name != "workers"}
    settings = hashlib.sha256(json.dumps(learnt_by, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return {"settings": settings, "rows": plan.num_rows, "delivery": plan.delivery}


def teller(worker: Worker, plan: DayPlan) -> Callable[[str, int], None]:
    """Tells the driver how far worker 0 is, a few times a second at most, and of every worker in which step it is."""
    told, steps = 0.0, Counter[str]()

    def progress(phase: str, rows: int) -> None:
        nonlocal told
        worker.at(plan.interval.name, phase, steps[phase])
        steps[phase] += 1
        if worker.exchange.rank == 0 and time.monotonic() - told > _PROGRESS_EVERY_S:
            told = time.monotonic()
            event = {"event": "progress", "day": plan.interval.name, "phase": phase, "rows": min(rows, plan.num_rows)}
            worker.emit(event | {"of": plan.num_rows})

    return progress


class Morning:
    """What the driver does with a committed day: log it, judge it, promote or hold it, write the decision down."""

    def __init__(self, config: Config, checkpoints: Checkpoints):
        self._config, self._checkpoints = config, checkpoints

    @cached_property
    def _tracking(self) -> Tracking:
        return Tracking(self._config.tracking.mlflow, self._config.name)

    def open(self) -> None:
        """Open the tracking store; a UserError when it cannot be."""
        self._tracking  # noqa: B018 - the property opens it

    def decide_all(self) -> None:
        """Every committed day that has no decision yet, in order."""
        for interval in self._checkpoints.intervals():
            if self._checkpoints.decision(interval) is None:
                self._decide(self._checkpoints.open(interval))

    def _decide(self, checkpoint: Checkpoint) -> None:
        report, gate = checkpoint.report, self._config.nightly.gate
        earlier = [interval for interval in self._checkpoints.intervals() if interval < checkpoint.interval]
        before = look_back(map(self._past, reversed(earlier)), report["day"], gate)
        decision = judge(report, before, gate)
        run_id = self._log(checkpoint, decision)
        version = self._tracking.register(
            run_id, tags={"day": report["day"], "checkpoint": checkpoint.id, "state": decision.state}
        )
        if decision.state == "promoted":
            self._tracking.set_alias("champion", version)
        record = {"state": decision.state, "reason": decision.reason, "run_id": run_id, "version": version}
        self._checkpoints.decide(checkpoint.interval, record)

    def champion(self, before: Interval | None = None) -> Checkpoint | None:
        """The checkpoint that serves: the newest promoted day's, or that of the newest one before a day."""
        for interval in reversed(self._checkpoints.intervals()):
            if (before is None or interval < before) and self._state(interval) == "promoted":
                return self._checkpoints.open(interval)
        return None

    def must_have_champion(self, before: Interval | None = None) -> Checkpoint:
        """The champion from before a day, or the champion; a UserError while there is none."""
        champion = self.champion(before) or self.champion()
        if champion is None:
            raise UserError("no model is promoted yet", self._checkpoints.path, do="run nightly first")
        return champion

    def _past(self, interval: Interval) -> Past:
        """An earlier interval, as the gate sees it."""
        decision = self._checkpoints.decision(interval) or {"state": "undecided", "reason": ""}
        return Past(self._checkpoints.open(interval).report, decision["state"], decision["reason"])

    def _state(self, interval: Interval) -> str | None:
        return (self._checkpoints.decision(interval) or {}).get("state")

    def _log(self, checkpoint: Checkpoint, decision: Decision) -> str:
        report = checkpoint.report
        counted = flatten({key: value for key, value in report.items() if key != "metrics"})
        metrics = {key.replace(".", "/"): value for key, value in counted.items() if isinstance(value, int | float)}
        history = [
            (interval.name, flatten_metrics(self._checkpoints.open(interval).report))
            for interval in self._checkpoints.intervals()
            if interval <= checkpoint.interval
        ]
        title = f"{self._config.name}, {report['day']}: mean shares of experts"
        gates = {"gates.png": gates_picture(report["gates"], title)} if report["gates"] else {}
        return self._tracking.log_day(
            report["day"],
            params=flatten(as_dict(self._config)),
            metrics=flatten_metrics(report) | metrics,
            tags={
                "checkpoint": checkpoint.id,
                "state": decision.state,
                "reason": decision.reason,
                "folder": checkpoint.folder,
            },
            files={
                "checkpoint/manifest.json": json.dumps(checkpoint.manifest, indent=1).encode(),
                "days.png": days_picture(history, title=self._config.name),
            }
            | gates,
        )


def flatten_metrics(report: dict[str, Any]) -> dict[str, float]:
    """A report's defined metrics as {"click@all/auc": value}."""
    return {
        f"{a}/{name}": value for a, of in report["metrics"].items() for name, value in of.items() if value is not None
    }


def day_entry(checkpoints: Checkpoints, interval: Interval, trained: bool) -> dict[str, Any]:
    """One interval as `nightly --json` prints it."""
    report = checkpoints.open(interval).report
    decision = checkpoints.decision(interval) or {"state": "undecided", "reason": "not logged and judged yet"}
    wanted = "day rows seconds samples_per_s workers memory_bytes metrics losses weights gates nulls ids".split()
    return {key: report[key] for key in wanted} | {
        "state": decision["state"],
        "reason": decision["reason"],
        "trained": trained,
    }
