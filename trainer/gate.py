"""The gate: may the model that was trained today serve?

In: today's report, the reports of the days before with what was decided about them, and the settings. Out: a Decision,
promoted or held, with one readable line that says why. Reports are what day.py makes and manifests hold: plain JSON. A
rejected model is a value, not an exception. docs/metrics.md ("The gate") tells why each check is as it is.

Most checks compare a number of today with what it was on the days that were promoted. What is usual lies between their
median and the newest of them: the median forgets one odd day, the newest follows a trend, and is where a day that a
person promoted by force enters. Beyond that a number may go by a tolerance, or by `sigmas` standard deviations where
those are more: those of the days among each other, and those of its own few events. So a tiny day is not held for its
noise.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Report: TypeAlias = Mapping[str, Any]

_MAD_OF_NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
_WEEK = 7
_FEWEST_ROWS = 10  # of fewer rows, two days may be equal by chance
_UNUSED = 0.005  # an expert with a smaller share is used by nobody
_SPREAD_FACTOR = 10.0  # by which a number's deviation may change before its unit is doubted
_TOLD = 3  # findings in a reason; of the others only how many


@dataclass(frozen=True)
class GateConfig:
    """What a day may be like before its model is held. Every tolerance may be null: then that is not looked at.

    addresses: whose AUC must be defined (default: the first task's); the others are compared where they are. tolerance:
    how far an AUC may fall; floor: the least it may be; paired_tolerance: how far it may be below the champion's on the
    same rows. Factors, up or down: calibration (of what is usual, or of 1), rows, labels (rates and means). Factors,
    up: loss, dense_norm, row_norm. Shares: nulls (either way), new_ids (more of them), dead_units (more of them).
    values: by how many of its standard deviations a number's mean may move. calibration_bounds: lowest and highest, by
    address, whatever is usual. repeated: whether rows that were there before are looked for.

    trailing: so many promoted days tell what is usual; history: with fewer, nothing is compared. sigmas: how sure the
    gate must be that it is not chance.
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
    sigmas: float = 4.0


@dataclass(frozen=True)
class Past:
    """An earlier interval: its report, and what was decided of it: promoted (also by force) or held, and why."""

    report: Report
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    """state: promoted or held. reason: one readable line; of a held one it begins with the name of the check. checks:
    each that was made, with what it found, or None.
    """

    state: str
    reason: str
    checks: tuple[tuple[str, str | None], ...] = ()

    @property
    def found(self) -> list[str]:
        """The names of the checks that found something."""
        return [name for name, finding in self.checks if finding]


@dataclass(frozen=True)
class Usual:
    """What a number was on the days before. low, high: of the median and the newest. spread: standard deviation."""

    low: float
    high: float
    spread: float

    @property
    def text(self) -> str:
        low, high = f"{self.low:.4g}", f"{self.high:.4g}"
        return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Days:
    """Today, and the promoted days that it is compared with, oldest first. alike: those of the same hour, when an
    interval is an hour; recent: the newest, whatever their hour. all: also those that were held.
    """

    today: Report
    alike: Sequence[Report]
    recent: Sequence[Report]
    all: Sequence[Past]
    settings: GateConfig


Check: TypeAlias = Callable[[Days], Iterator[str]]


def judge(today: Report, before: Sequence[Past], settings: GateConfig) -> Decision:
    """Promote, or hold. before: the earlier intervals, oldest first."""
    promoted = [past.report for past in before if past.state == "promoted"]
    alike = [report for report in promoted if _hour(report) == _hour(today)][-settings.trailing :]
    days = Days(today, alike, promoted[-settings.trailing :], before, settings)
    first = not promoted and not today["metrics"]  # there was no model that it could have been scored by
    checks = [(name, next(check(days), None)) for name, check in CHECKS.items() if not (first and name == "auc")]
    findings = [f"{name}: {finding}" for name, finding in checks if finding]
    if findings:
        return Decision("held", _told(findings, before, str(today["day"])), tuple(checks))
    return Decision("promoted", "the first model" if first else _good(days), tuple(checks))


def look_back(newest_first: Iterable[Past], day: str, settings: GateConfig) -> list[Past]:
    """The earlier intervals that judge needs, oldest first: as many as hold `trailing` promoted ones (of the same
    hour). No more of them are asked for.
    """
    found, promoted = [], 0
    for past in newest_first:
        if promoted >= settings.trailing:
            break
        found.append(past)
        promoted += past.state == "promoted" and _hour(past.report) == _hour({"day": day})
    return found[::-1]


def _told(findings: Sequence[str], before: Sequence[Past], day: str) -> str:
    """The reason of a held day, and what to do when it is always the same."""
    more = f"; and {len(findings) - _TOLD} more" if len(findings) > _TOLD else ""
    text, kind = "; ".join(findings[:_TOLD]) + more, findings[0].partition(":")[0]
    again = 0
    for past in reversed(before):
        if past.state != "held" or past.reason.partition(":")[0] != kind:
            break
        again += 1
    if again >= 2:
        text += f" (held for its {kind} {again + 1} times in a row: if that is how it is now, promote --force {day})"
    return text


def _good(days: Days) -> str:
    what = "of its hour " if _hour(days.today) else ""
    if not days.alike:
        return f"nothing speaks against it; not compared, as none {what}was promoted before"
    if len(days.alike) < days.settings.history:
        few = f"only {len(days.alike)} {what}before it, of {days.settings.history} that a comparison needs"
        return f"nothing speaks against it; not compared: {few}"
    return f"as good as the {len(days.alike)} promoted {what}before it"


def _hour(report: Report) -> str:
    return str(report["day"]).partition("T")[2]


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


def _allowed(tolerance: float, sigmas: float, *deviations: float) -> float:
    """The tolerance, or so many standard deviations where they are more."""
    return max(tolerance, sigmas * math.sqrt(sum(deviation**2 for deviation in deviations)))


def _get(report: Report, *path: str) -> Any:
    """A value deep in a report; None where the path ends early."""
    value: Any = report
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _past(reports: Sequence[Report], *path: str) -> list[float | None]:
    return [_get(report, *path) for report in reports]


def _keys(report: Report, *path: str) -> list[str]:
    return list(_get(report, *path) or {})


def _log(value: float | None) -> float | None:
    return None if value is None or value <= 0 else math.log(value)


# The checks, in the order in which causes come before what they cause. Each yields what it finds, in words.


def check_nan(days: Days) -> Iterator[str]:
    """A number of the report that is none."""
    for path, value in _numbers(days.today, ""):
        if not math.isfinite(value):
            yield f"{path} is {value}"


def _numbers(tree: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, float):
        yield path, tree


def check_delivery(days: Days) -> Iterator[str]:
    """The rows of an earlier interval, delivered again."""
    content = days.today.get("content")
    if not days.settings.repeated or not content or days.today["rows"] < _FEWEST_ROWS:
        return
    for past in reversed(days.all):
        if past.report.get("content") == content:
            yield f"the {days.today['rows']:,} rows are those of {past.report['day']}, delivered again"


def check_rows(days: Days) -> Iterator[str]:
    """Far fewer or more rows than usual; until a whole week is known, twice as far (on a logarithmic scale), for
    weekends.
    """
    factor, rows = days.settings.rows, days.today["rows"]
    counts = [report["rows"] for report in days.alike]
    normal = usual([math.log(count) for count in counts], days.settings.history)
    if factor is None or normal is None:
        return
    middle = median([math.log(count) for count in counts])
    widest = max(abs(math.log(count) - middle) for count in counts)  # what was promoted once is no surprise
    tolerance = math.log(factor) * (2 if len(counts) < _WEEK else 1) + (widest if widest > 2 * normal.spread else 0)
    chance = math.sqrt(1 / rows + math.exp(-normal.low))
    if abs(excess(math.log(rows), normal)) > _allowed(tolerance, days.settings.sigmas, normal.spread, chance):
        times = rows / math.exp(middle)
        yield f"{rows:,} rows, {times:.2g} times the usual {math.exp(middle):,.0f}"


def check_nulls(days: Days) -> Iterator[str]:
    """A column that is null much more, or much less, often than usual."""
    for column in dict.fromkeys([*_keys(days.today, "nulls"), *(c for r in days.alike for c in _keys(r, "nulls"))]):
        share = _null_share(days.today, column)
        normal = usual([_null_share(report, column) for report in days.alike], days.settings.history)
        if days.settings.nulls is None or normal is None:
            continue
        chance = _binomial(share, normal, _units(days.today))
        allowed = _allowed(days.settings.nulls, days.settings.sigmas, normal.spread, chance)
        if abs(excess(share, normal)) > allowed:
            yield f"{column} is null in {share:.0%} of the rows (usually {_percent(normal)})"


def _null_share(report: Report, column: str) -> float:
    return (_get(report, "nulls", column) or 0) / max(report["rows"], 1)


def _units(report: Report) -> float:
    """How many users (or requests, or rows) there were: so many independent observations at least."""
    return max(_get(report, "units") or report["rows"], 1)


def _binomial(share: float, normal: Usual, count: float) -> float:
    """Standard deviation of a share of `count` that are independent, if it were what is usual."""
    middle = min(max((normal.low + normal.high) / 2, 0.5 / count), 1 - 0.5 / count)
    return math.sqrt(middle * (1 - middle) / count)


def _percent(normal: Usual) -> str:
    low, high = f"{normal.low:.0%}", f"{normal.high:.0%}"
    return low if low == high else f"{low} to {high}"


def check_values(days: Days) -> Iterator[str]:
    """A number that lies elsewhere, or is spread otherwise, than usual: another unit, another meaning."""
    history, sigmas = days.settings.history, days.settings.sigmas
    for column in _keys(days.today, "numbers"):
        mean, deviation = (_get(days.today, "numbers", column, what) for what in ("mean", "deviation"))
        deviations = _past(days.alike, "numbers", column, "deviation")
        normal = usual(_past(days.alike, "numbers", column, "mean"), history)
        scale = usual(deviations, history)
        if days.settings.values is None or mean is None or normal is None or scale is None:
            continue
        unit = max(scale.high, 1e-12)
        allowed = _allowed(days.settings.values * unit, sigmas, normal.spread, unit / math.sqrt(_units(days.today)))
        if abs(excess(mean, normal)) > allowed:
            yield f"the mean of {column} is {mean:.4g} (usually {normal.text}, with a deviation of {unit:.3g})"
        spread = usual([_log(value) for value in deviations], history)
        if deviation and spread is not None:
            few = 1 / math.sqrt(_units(days.today))
            if abs(excess(math.log(deviation), spread)) > _allowed(
                math.log(_SPREAD_FACTOR), sigmas, spread.spread, few
            ):
                yield f"the deviation of {column} is {deviation:.4g} (usually {scale.text})"


def check_labels(days: Days) -> Iterator[str]:
    """A task whose label is much rarer, commoner, smaller or larger than usual.

    Chance is told on the scale of a count's square root, where it does not depend on the rate: a count of events as
    many as make the mean label's own standard error.
    """
    factor = days.settings.labels
    for address in _keys(days.today, "metrics"):
        mean, rows = (_get(days.today, "metrics", address, what) for what in ("mean_label", "rows"))
        means = _past(days.alike, "metrics", address, "mean_label")
        normal = usual(
            [None if value is None else math.sqrt(max(value, 0.0)) for value in means], days.settings.history
        )
        if factor is None or not rows or mean is None or normal is None:
            continue
        chance = math.sqrt(max(_variance_of_a_label(days, address), 1e-12) / rows) / 2
        root, near = math.sqrt(max(mean, 0.0)), normal.low if math.sqrt(max(mean, 0.0)) < normal.low else normal.high
        tolerance = near * (1 - factor**-0.5 if root < near else factor**0.5 - 1)
        if abs(excess(root, normal)) > _allowed(tolerance, days.settings.sigmas, normal.spread, chance):
            yield f"the mean label of {address} is {mean:.4g} (usually {normal.low**2:.4g} to {normal.high**2:.4g})"


def _variance_of_a_label(days: Days, address: str) -> float:
    """What one row adds to the variance of the mean label, over that mean, with its user's other rows: at least as on
    the days before (1 for independent rare events).
    """
    found = []
    for report in (*days.alike, days.today):
        error = _get(report, "errors", address, "mean_label")
        rows, mean = (_get(report, "metrics", address, what) for what in ("rows", "mean_label"))
        if error and rows and mean:
            found.append(error**2 * rows / mean)
    return max(median(found), 1.0) if found else 1.0


def check_new_ids(days: Days) -> Iterator[str]:
    """Many more ids than usual that nobody knows."""
    for table in _keys(days.today, "ids"):
        share, seen = new_share(days.today, table)
        normal = usual([new_share(report, table)[0] for report in days.alike], days.settings.history)
        if days.settings.new_ids is None or share is None or normal is None:
            continue
        middle = min(max((share + normal.high) / 2, 1e-9), 1.0)
        chance = math.sqrt(middle * (1 - middle) / seen)
        if excess(share, normal) > _allowed(days.settings.new_ids, days.settings.sigmas, normal.spread, chance):
            yield f"{share:.0%} of the ids of table {table} are new (usually {_percent(normal)})"


def new_share(report: Report, table: str) -> tuple[float | None, int]:
    """Of a day's distinct ids the share that had no row when it began, and how many they were."""
    seen, wait = (_get(report, "ids", table, what) or 0 for what in ("seen", "waiting_seen"))
    if seen + wait == 0:
        return None, 0
    return min((_get(report, "ids", table, "new") + wait) / (seen + wait), 1.0), seen + wait


def check_auc(days: Days) -> Iterator[str]:
    """An AUC that is undefined, below the floor, or below what is usual; all of the day's rows, by the model of the
    day before.
    """
    settings, measured = days.settings, _keys(days.today, "metrics")
    binary = [address for address in measured if "auc" in days.today["metrics"][address]]
    for address in dict.fromkeys([*(settings.addresses or binary[:1] or ("",)), *binary]):
        auc, error = (_get(days.today, part, address, "auc") for part in ("metrics", "errors"))
        if auc is None:
            if address in settings.addresses or address in (binary or [""])[:1]:
                yield f"{address or 'every address'} is undefined{_few(days.today, address)}"
            continue
        error = error or 0.0
        if settings.floor is not None and auc + settings.sigmas * error < settings.floor:
            yield f"{address} is {auc:.4f}, below the floor of {settings.floor}"
        normal = usual(_past(days.alike, "metrics", address, "auc"), settings.history)
        if settings.tolerance is None or normal is None:
            continue
        if excess(auc, normal) < -_allowed(settings.tolerance, settings.sigmas, normal.spread, error):
            fall = f"{normal.low - auc:.4f} below the usual {normal.low:.4f}"
            yield f"{address} is {auc:.4f} ± {error:.4f}, {fall} of the {len(days.alike)} promoted before it"


def _few(report: Report, address: str) -> str:
    rows, mean = (_get(report, "metrics", address, what) for what in ("rows", "mean_label"))
    return f": {round(rows * mean)} of its {rows} labels are 1" if rows and mean is not None else ""


def check_champion(days: Days) -> Iterator[str]:
    """The model that was trained on is worse than the one that serves, on the same rows."""
    for address in _keys(days.today, "rival", "differences"):
        found = _get(days.today, "rival", "differences", address)
        if days.settings.paired_tolerance is None or found["auc"] is None or found["high"] is None:
            continue
        if found["high"] < -days.settings.paired_tolerance:
            yield (
                f"the AUC of {address} on today's rows is {-found['auc']:.4f} below that of the champion of "
                f"{_get(days.today, 'rival', 'day')} (95%: {-found['high']:.4f} to {-found['low']:.4f})"
            )


def check_calibration(days: Days) -> Iterator[str]:
    """Predictions that are too high or too low: outside fixed bounds, or farther than usual from 1."""
    settings = days.settings
    for address in _keys(days.today, "metrics"):
        value, error = (_get(days.today, part, address, "calibration") for part in ("metrics", "errors"))
        log, error = _log(value), error or 0.0
        if log is None:
            continue
        if address in settings.calibration_bounds:
            low, high = settings.calibration_bounds[address]
            wide = settings.sigmas * error
            if not math.log(low) - wide <= log <= math.log(high) + wide:
                yield f"{address} is {value:.3f}, outside {low:g} to {high:g}"
        known = usual([_log(v) for v in _past(days.alike, "metrics", address, "calibration")], settings.history)
        if settings.calibration is None or known is None:
            continue
        normal = Usual(min(known.low, 0.0), max(known.high, 0.0), known.spread)  # nearer to 1 is never worse
        if abs(excess(log, normal)) > _allowed(math.log(settings.calibration), settings.sigmas, known.spread, error):
            yield f"{address} is {value:.3f} (usually {math.exp(known.low):.3f} to {math.exp(known.high):.3f})"


def check_loss(days: Days) -> Iterator[str]:
    """A task that learnt worse than usual while it was trained."""
    for task in _keys(days.today, "losses"):
        loss = _get(days.today, "losses", task)
        normal = usual(_past(days.alike, "losses", task), days.settings.history)
        if days.settings.loss is None or normal is None:
            continue
        near = abs(normal.high)
        chance = near * _relative_error(days.today, task)
        allowed = _allowed((days.settings.loss - 1) * near, days.settings.sigmas, normal.spread, chance)
        if excess(loss, normal) > allowed:
            yield f"the loss of {task} in training is {loss:.4g} (usually {normal.text})"


def _relative_error(report: Report, task: str) -> float:
    """Of a task's mean label: a loss is about as uncertain as the events that it is made of are few."""
    found = []
    for address in _keys(report, "metrics"):
        mean, error = (_get(report, part, address, "mean_label") for part in ("metrics", "errors"))
        if address.partition("@")[0] == task and mean and error:
            found.append(error / abs(mean))
    return max(found, default=0.0)


def check_norms(days: Days) -> Iterator[str]:
    """Weights that grew, or moved, much more than usual on one day."""
    settings = days.settings
    wanted: list[tuple[tuple[str, ...], str, float | None]] = [(("dense",), "the dense weights", settings.dense_norm)]
    wanted += [(("lag",), "the dense weights' distance from their average", settings.dense_norm)]
    wanted += [
        (("rows", table), f"the rows of table {table}", settings.row_norm)
        for table in _keys(days.today, "norms", "rows")
    ]
    for path, what, factor in wanted:
        logs = [_log(value) for value in _past(days.recent, "norms", *path)]
        value, normal = _get(days.today, "norms", *path), usual(logs, settings.history)
        if factor is None or not value or normal is None:
            continue
        known = [log for log in logs if log is not None]
        growth = max((b - a for a, b in zip(known, known[1:], strict=False)), default=0.0)  # young weights grow fast
        if excess(math.log(value), normal) > max(math.log(factor), 2 * growth):
            times = value / math.exp(normal.high)
            yield f"the norm of {what} is {value:.4g}, {times:.3g} times the usual {math.exp(normal.high):.4g}"


def check_experts(days: Days) -> Iterator[str]:
    """An expert that nobody uses any more, or units that no longer answer."""
    settings = days.settings
    for level in _keys(days.today, "gates"):
        least, dead = (_get(days.today, "gates", level, what) for what in ("least", "dead_units"))
        used = usual(_past(days.recent, "gates", level, "least"), settings.history)
        if least is not None and used is not None and least < _UNUSED and used.low >= 4 * _UNUSED:
            yield f"level {level} has an expert with a share of {least:.2%} (usually at least {used.low:.1%})"
        alive = usual(_past(days.recent, "gates", level, "dead_units"), settings.history)
        if settings.dead_units is None or dead is None or alive is None:
            continue
        if excess(dead, alive) > max(settings.dead_units, settings.sigmas * alive.spread):
            yield f"{dead:.0%} of the experts' units of level {level} never answered (usually {_percent(alive)})"


CHECKS: dict[str, Check] = {
    "nan": check_nan,
    "delivery": check_delivery,
    "rows": check_rows,
    "nulls": check_nulls,
    "values": check_values,
    "ids": check_new_ids,
    "labels": check_labels,
    "auc": check_auc,
    "champion": check_champion,
    "calibration": check_calibration,
    "norms": check_norms,
    "experts": check_experts,
    "loss": check_loss,
}
