"""Which intervals a night has to train: those after the newest trained one, as far as their labels are complete."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data import Logs
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.lanes import DayPlan
from trainer.plan import NoRows


@dataclass(frozen=True)
class Due:
    """plans: what is to be trained, in order. waiting: the days that are there and whose labels are not complete yet.
    skipped: what is not there, or has no row.
    """

    plans: list[DayPlan]
    waiting: list[datetime.date]
    skipped: list[Interval]


def due(
    logs: Logs,
    trained: Sequence[Interval],
    first: Interval | None,
    through: Interval | None,
    *,
    skip_missing: bool = False,
    label_delay_days: int = 0,
) -> Due:
    """What is to be trained within first .. through; footers are read and checked here. Without skip_missing a gap, or
    an interval without rows, is an error.

    An interval's labels are complete when label_delay_days later days are there.
    """
    first, through = _begin(logs, first), _end(logs, through)
    begin = max((i for i in (first, _after(logs, trained)) if i), default=None)
    present = logs.intervals(begin, through)
    end = through or (present[-1] if present else None)
    skipped = []
    if end and (start := begin or (present[0] if present else None)):
        skipped = list(logs.missing(start, end))
    if skipped and not skip_missing:
        days, do = logs.days(), "deliver it, narrow --from and --through, or set nightly.missing_days=skip"
        raise UserError(f"{skipped[0].words} is missing", logs.path, got=f"days {days[0]} .. {days[-1]}", do=do)
    newest_ripe = logs.days()[-1] - datetime.timedelta(days=label_delay_days)
    waiting = sorted({interval.day for interval in present if interval.day > newest_ripe})
    plans: list[DayPlan] = []
    before = trained[-1] if trained else None
    for interval in present:
        if interval.day > newest_ripe:
            break
        try:
            plans.append(logs.plan(interval, before))
            before = interval
        except NoRows:
            if not skip_missing:
                raise
            skipped.append(interval)
    return Due(plans, waiting, sorted(skipped))


def _begin(logs: Logs, option: Interval | None) -> Interval | None:
    """Where to start, as an option says it: a day is its first hour."""
    _check_sort(logs, option, "--from")
    return Interval(option.day, option.hour or 0) if option and logs.by_hour else option


def _end(logs: Logs, option: Interval | None) -> Interval | None:
    """Where to end, as an option says it: a day is its last hour."""
    _check_sort(logs, option, "--through")
    return Interval(option.day, 23) if option and logs.by_hour and option.hour is None else option


def _check_sort(logs: Logs, option: Interval | None, where: str) -> None:
    if option and option.hour is not None and not logs.by_hour:
        do = "name the day, or set data.period: hour"
        raise UserError("an hour of a model that is trained by days", where, got=option.name, expected="a day", do=do)


def _after(logs: Logs, trained: Sequence[Interval]) -> Interval | None:
    """The interval after the newest trained one, also when that was of the other sort."""
    if not trained:
        return None
    following = trained[-1].next()
    if logs.by_hour:
        return Interval(following.day, following.hour or 0)
    return Interval(following.day) if not following.hour else Interval(following.day).next()
