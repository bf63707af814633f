"""The night: every interval that is not done yet is scored, trained on, committed, and in the morning judged and
promoted or held.

    driver (holds the lock)                           workers, all days of one call in one run
    what an earlier night left open is finished
    which days are pending; read their footers   ->   for each day: score with the model of the day before (and with the
                                                      champion, when that is another), train on, commit
    morning.py: verify, judge, promote or hold   <-   committed, and wait: who serves now?

A day is trained when its manifest is there, and done when its decision is in the ledger: a night that was killed
anywhere goes on from that.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from cluster.late import back_to, come_late, first_after
from cluster.morning import Morning, day_entry, lock, open_checkpoints, open_ledger, open_storage
from cluster.promotion import drop
from trainer.agree import together, told
from trainer.checkpoint import Checkpoints
from trainer.config import Config, as_dict
from trainer.data import DayPlan, Logs
from trainer.day import run_day
from trainer.due import Due, due
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.learner import Learner, build, check, open_logs
from trainer.quarantine import keep, sift
from trainer.retention import sweep
from trainer.saving import Saving
from trainer.workers import Event, Worker, run_here, run_on_ray

_PROGRESS_EVERY_S = 0.25
_LEARNT_BY = ("data", "features", "tables", "tasks", "model", "train")


def nightly(
    config: Config,
    *,
    first: Interval | None = None,
    through: Interval | None = None,
    again: Interval | None = None,
    use_ray: bool = True,
    on_event: Callable[[Event], None],
) -> dict[str, Any]:
    """Do every interval that is not done; with `again`, throw away the models from that one on first, and so from the
    first that came late on, where the configuration says so. Returns {"model", "days", "late", "waiting", "skipped"}:
    days has one entry a committed interval of the range, in order.
    """
    with lock(config, "nightly") as held:
        checkpoints, ledger = open_checkpoints(config, held.mine), open_ledger(config, held.mine)
        morning = Morning(config, checkpoints, ledger)

        def hear(event: Event) -> None:
            morning.hear(event)
            if event["event"] in ("round", "committed"):
                morning.finish_all()
            on_event(event)

        checkpoints.stored(lambda: sweep(checkpoints))
        with morning.night():
            logs = open_logs(config)
            came_late = come_late(logs, checkpoints, ledger)
            dropped, reason = again, f"nightly --again {again}"
            if again is None and config.nightly.late == "retrain" and (back := back_to(came_late, checkpoints, ledger)):
                again, reason = back.interval, f"nightly.late: {back.interval} was {back.what}"
                dropped = first_after(checkpoints, again)
            morning.finish_all(before=again)
            found = look(config, logs, checkpoints, first, through, again)
            plans = found.plans
            if plans:
                check(config)  # a body or a database that cannot be made is found out now, not after hours
                morning.open()
            if dropped:
                drop(config, checkpoints, ledger, dropped, reason)
            morning.plan([plan.interval for plan in plans])
            try:
                if plans:
                    train(config, plans, use_ray=use_ray, on_event=hear, mine=held.fence.mine)
            finally:
                morning.finish_all()  # also when the night ended early, or a worker was lost before it told of a commit
    trained, entries = {plan.interval for plan in plans}, morning.finished
    for interval in checkpoints.intervals():
        if interval not in entries:
            entries[interval] = day_entry(checkpoints.open(interval), ledger.state(interval))
    days = [entries[i] | {"trained": i in trained} for i in sorted(entries) if i.is_within(first, through)]
    return {
        "model": config.name,
        "days": days,
        "late": [{"day": each.interval.name, "what": each.what} for each in came_late],
        "waiting": [str(day) for day in found.waiting],
        "skipped": [interval.name for interval in found.skipped],
    }


def train_one(
    config: Config, interval: Interval, *, use_ray: bool, on_event: Callable[[Event], None]
) -> dict[str, Any]:
    """Train on one interval, from the newest checkpoint before it, unless that was done. Returns its entry."""
    with lock(config, "train") as held:
        checkpoints, ledger = open_checkpoints(config, held.mine), open_ledger(config, held.mine)
        committed = checkpoints.intervals()
        if committed and interval < committed[-1] and interval not in committed:
            raise UserError(
                f"{interval.words} lies before the newest checkpoint",
                checkpoints.path,
                got=f"trained through {committed[-1]}",
                do="days are trained in order: drop the later ones with nightly --again",
            )
        if interval not in committed:
            before = max((each for each in committed if each < interval), default=None)
            morning, plan = Morning(config, checkpoints, ledger), open_logs(config).plan(interval, before)

            def hear(event: Event) -> None:
                morning.hear(event)
                on_event(event)

            with morning.night():
                morning.plan([interval])
                train(config, [plan], use_ray=use_ray, on_event=hear, mine=held.fence.mine)
                morning.written(interval)
        entry = day_entry(checkpoints.open(interval), ledger.state(interval))
        return entry | {"trained": interval not in committed}


def look(
    config: Config,
    logs: Logs,
    checkpoints: Checkpoints,
    first: Interval | None,
    through: Interval | None,
    again: Interval | None = None,
) -> Due:
    """The intervals to train on: after the newest committed one before `again`, within first .. through, their labels
    complete. Their footers are read and checked here.
    """
    committed = [interval for interval in checkpoints.intervals() if again is None or interval < again]
    skip, delay_days = config.nightly.missing_days == "skip", config.data.label_delay_days
    return due(logs, committed, first, through, skip_missing=skip, label_delay_days=delay_days)


def train(
    config: Config,
    plans: list[DayPlan],
    *,
    use_ray: bool,
    on_event: Callable[[Event], None],
    mine: Callable[[], None] = lambda: None,
) -> None:
    """Train on the days, in order, on the configured workers or in this process. mine: asked before each commit, raises
    when another night took over.
    """
    run(partial(work, config=config, plans=plans, mine=mine), config, use_ray, on_event)


def run(job: Callable[[Worker], Any], config: Config, use_ray: bool, on_event: Callable[[Event], None]) -> Any:
    """A job on the configured Ray workers, or as the only worker in this process; returns worker 0's result."""
    if not use_ray:
        return run_here(job, on_event)
    nightly, workers = config.nightly, config.train.workers_between
    return run_on_ray(job, on_event, workers=workers, max_failures=nightly.max_failures, hang_s=nightly.hang_s)


def work(worker: Worker, *, config: Config, plans: list[DayPlan], mine: Callable[[], None] = lambda: None) -> None:
    """What each worker does: the days that are not committed yet, in order, from the newest checkpoint before them.
    mine: asked before each commit.
    """
    checkpoints, logs = open_checkpoints(config, mine), open_logs(config)
    if worker.exchange.rank == 0:
        worker.ask({"event": "round"})  # of the round before, a commit may not have been told
    committed = together(worker.exchange, checkpoints.intervals)
    saving = saving_of(config, checkpoints, build(config, worker.exchange, worker.device))
    for plan in plans:
        if committed and plan.interval <= committed[-1]:
            continue  # committed before the workers were started again
        if worker.more_workers():
            return  # and is called again, with them
        plan = set_aside(config, worker, logs, plan)
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
            rival=rival(config, checkpoints, saving),
            under_way=under_way,
            after_step=saving.after_step,
        )
        worker.at(plan.interval.name, "commit", 0)
        saving.commit(report, delivery=plan.delivery)
        if worker.exchange.rank == 0:  # who serves from now on must be known before the next one is scored
            worker.ask({"event": "committed", "day": plan.interval.name, "report": report})


def rival(config: Config, checkpoints: Checkpoints, saving: Saving) -> tuple[str, Callable[[], Learner]] | None:
    """The champion, and what loads it, when another model than the newest one serves. Collective."""
    exchange = saving.learner.exchange

    def serving() -> str | None:
        champion = None if exchange.rank else open_ledger(config).champion()
        return champion.interval.name if champion and champion.interval != saving.newest else None

    name = told(exchange, together(exchange, serving))

    def loaded() -> Learner:
        learner = build(config, exchange, saving.learner.device)
        champion = together(exchange, lambda: checkpoints.open(Interval.parse(name, "the champion's file")))
        checkpoints.load(learner, champion)
        return learner

    return (name, loaded) if name else None


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


def set_aside(config: Config, worker: Worker, logs: Logs, plan: DayPlan) -> DayPlan:
    """The plan without malformed rows and files, where the configuration allows for some; worker 0 keeps them beside
    the checkpoints.
    """
    exchange = worker.exchange
    if not logs.max_bad_rows:
        return plan
    worker.at(plan.interval.name, "check", 0)
    plan = sift(exchange, logs, plan)
    place = open_storage(config).within("quarantine")
    together(exchange, lambda: None if exchange.rank else keep(place, logs, plan))
    return plan


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
