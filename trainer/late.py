"""Which trained intervals were delivered again, or only after a later one was trained: by footers, not by rows."""

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trainer.data import Logs
from trainer.delivery import Delivery, differences
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.plan import NoRows

_AT_ONCE = 16  # footers in object stores are waited for, not worked on


@dataclass(frozen=True)
class Late:
    """what: in words."""

    interval: Interval
    what: str


def late(logs: Logs, trained: Mapping[Interval, Delivery], known: Collection[Interval]) -> list[Late]:
    """What came late, in order. trained: what was delivered of each interval when it was trained; known: all intervals
    that ever were, also those whose checkpoint was removed. Days whose files are no longer there are left alone.

    A model that is to know what came late is trained anew from the first of these on.
    """
    if not trained:
        return []
    found = _late_hours(logs, trained, known) if logs.parts_days else _late_folders(logs, trained, known)
    return sorted(found, key=lambda each: each.interval)


def _late_folders(logs: Logs, trained: Mapping[Interval, Delivery], known: Collection[Interval]) -> list[Late]:
    """Of days, or of hours that have folders."""
    asked = [i for i in logs.intervals(min(trained), max(trained)) if trained.get(i) or i not in known]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        now = dict(zip(asked, pool.map(logs.delivered, asked), strict=True))
    found = []
    for interval in (interval for interval in asked if now[interval]):
        if interval in trained:
            found.append(_compared(interval, trained[interval], now[interval]))
        elif any(file["rows"] for file in now[interval]):
            found.append(_unseen(interval))
    return [each for each in found if each]


def _late_hours(logs: Logs, trained: Mapping[Interval, Delivery], known: Collection[Interval]) -> list[Late]:
    """Of hours that a clock parts: times are read only of days that have other files than before."""
    first, newest = min(trained), max(trained)
    present = [day for day in logs.days() if first.day <= day <= newest.day]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        now = dict(zip(present, pool.map(lambda day: logs.delivered(Interval(day)), present), strict=True))
    found = []
    for day in present:
        hours = {interval: delivery for interval, delivery in trained.items() if interval.day == day}
        if not now[day] or _files(now[day]) == _files(file for of in hours.values() for file in of):
            continue
        try:
            for interval in sorted({*hours, *logs.intervals(Interval(day, 0), Interval(day, 23))}):
                if hours.get(interval):
                    found.append(_compared(interval, hours[interval], _of_hour(logs, interval)))
                elif first < interval < newest and interval not in known:
                    found.append(_unseen(interval))
        except UserError as error:  # to be told; what was trained on stays good
            found.append(
                Late(min(hours, default=Interval(day, 0)), f"delivered again, and cannot be read: {error.what}")
            )
    return [each for each in found if each]


def _files(delivery: Iterable[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    """Those that have rows."""
    return {(file["file"], file["bytes"], file["footer"]) for file in delivery if file["rows"]}


def _of_hour(logs: Logs, interval: Interval) -> Delivery:
    try:
        return logs.plan(interval).delivery
    except NoRows:
        return []


def _compared(interval: Interval, before: Delivery, now: Delivery) -> Late | None:
    changed = differences(before, now)
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    return Late(interval, f"delivered again: {', '.join(changed[:3])}{more}") if changed else None


def _unseen(interval: Interval) -> Late:
    return Late(interval, "delivered only after a later one was trained")
