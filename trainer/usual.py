"""What is usual: the numbers of today's report beside those of the days before that were promoted.

What is usual lies between their median and the newest of them: the median forgets one odd day; the newest follows a
trend, and is where a day that a person promoted by force enters. Beyond that a number may go by a tolerance, or by
`sigmas` standard deviations where those are more: those of the days among each other, and those of its own few events.
So a tiny day is not held for its noise.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Report: TypeAlias = Mapping[str, Any]  # what day.py makes and a manifest holds: plain JSON

_MAD_OF_NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


@dataclass(frozen=True)
class GateConfig:
    """What a day may be like before its model is held. Every tolerance may be null: then that is not looked at.

    addresses: whose AUC must be defined (default: the first task's); the others are compared where they are. tolerance:
    how far an AUC may fall; floor: the least it may be; paired_tolerance: how far it may be below the champion's on the
    same rows. Factors, up or down: calibration (of what is usual, or of 1), rows, labels (rates and means). Factors,
    up: loss, dense_norm, row_norm. Shares: nulls (either way), new_ids (more of them), dead_units (more of them).
    values: by how many of its standard deviations a number's mean may move. calibration_bounds: lowest and highest, by
    address, whatever is usual. repeated: whether rows that were there before are looked for.

    trailing: so many promoted days, of at least least_rows rows each, tell what is usual; history: with fewer, nothing
    is compared. sigmas: how sure the gate must be that it is not chance.
    """

    addresses: tuple[str, ...] = ()
    tolerance: float | None = 0.03
    floor: float | None = 0.5
    paired_tolerance: float | None = 0.005
    calibration: float | None = 1.5
    calibration_bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: float | None = 1.6
    labels: float | None = 1.6
    nulls: float | None = 0.1
    values: float | None = 1.0
    new_ids: float | None = 0.2
    loss: float | None = 1.25
    dense_norm: float | None = 1.5
    row_norm: float | None = 2.0
    dead_units: float | None = 0.25
    repeated: bool = True
    trailing: int = 14
    history: int = 3
    least_rows: int = 100
    sigmas: float = 4.0


@dataclass(frozen=True)
class Past:
    """An earlier interval: its report, and what was decided of it: promoted (also by force) or held, and why."""

    report: Report
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Days:
    """Today, and the promoted days with which it is compared, oldest first. alike: those of the same hour, when an
    interval is an hour; recent: the newest, whatever their hour. all: also those that were held.
    """

    today: Report
    alike: Sequence[Report]
    recent: Sequence[Report]
    all: Sequence[Past]
    settings: GateConfig


Check: TypeAlias = Callable[[Days], Iterator[str]]  # what it finds, in words, the worst first


@dataclass(frozen=True)
class Usual:
    """What a number was on the days before. low, high: of the median and the newest. spread: standard deviation."""

    low: float
    high: float
    spread: float

    @property
    def text(self) -> str:
        return between(f"{self.low:.4g}", f"{self.high:.4g}")

    @property
    def percent(self) -> str:
        return between(f"{self.low:.0%}", f"{self.high:.0%}")


def between(low: str, high: str) -> str:
    """In words."""
    return low if low == high else f"{low} to {high}"


def usual(values: Sequence[float | None], history: int) -> Usual | None:
    """What is usual, from the days before, oldest first; None when fewer than `history` of them know."""
    known = [value for value in values if value is not None]
    if len(known) < max(history, 1):
        return None
    middle = median(known)
    spread = _MAD_OF_NORMAL * median([abs(value - middle) for value in known])
    return Usual(min(middle, known[-1]), max(middle, known[-1]), spread)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def excess(value: float, normal: Usual) -> float:
    """How far a value lies above (positive) or below (negative) what is usual; 0 within."""
    return value - min(max(value, normal.low), normal.high)


def allowed(tolerance: float, sigmas: float, *deviations: float) -> float:
    """The tolerance, or so many standard deviations (of a sum of independent parts) where they are more."""
    return max(tolerance, sigmas * math.hypot(*deviations))


def get(report: Report, *path: str) -> Any:
    """A value deep in a report; None where the path ends early."""
    value: Any = report
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def past(reports: Sequence[Report], *path: str) -> list[float | None]:
    """A value deep in each report."""
    return [get(report, *path) for report in reports]


def keys(report: Report, *path: str) -> list[str]:
    """The names under which values lie there."""
    return list(get(report, *path) or {})


def log(value: float | None) -> float | None:
    """None where there is none."""
    return None if value is None or value <= 0 else math.log(value)
