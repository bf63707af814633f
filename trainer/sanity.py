"""Is the day as days are? Its rows, its labels, and what training made of the weights, beside the days before.

Each check yields what it finds, in words; nothing when there is nothing to be said, or not enough to compare with.
docs/metrics.md ("The gate") tells why each is as it is.
"""

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from trainer.usual import Days, Report, Usual, allowed, excess, get, keys, log, median, past, usual

_WEEK = 7
_WEEKS = 2  # so often has the same weekday to come before it is usual
_FEWEST_ROWS = 10  # of fewer rows, two days may be equal by chance
_UNUSED = 0.005  # an expert with a smaller share is used by nobody
_SPREAD_FACTOR = 10.0  # by which a number's deviation may change before its unit is doubted


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
    for earlier in reversed(days.all):
        if earlier.report.get("content") == content:
            yield f"the {days.today['rows']:,} rows are those of {earlier.report['day']}, delivered again"


def check_rows(days: Days) -> Iterator[str]:
    """Far fewer or more rows than usual; a weekday that always differs is compared, more loosely, with its like."""
    factor, rows = days.settings.rows, days.today["rows"]
    counts = [report["rows"] for report in days.alike]
    if factor is None or len(counts) < max(days.settings.history, 1):
        return
    known = len(counts) >= _WEEK  # else nobody knows yet what weekends are like
    odd = _is_odd(rows, counts, factor if known else factor**2, days)
    middle, weekdays = median(counts), _on_the_same_weekday(days)
    if len(weekdays) >= _WEEKS and abs(math.log(median(weekdays) / middle)) > math.log(factor):
        odd = odd and _is_odd(rows, weekdays, factor**2, days)
    if odd:
        yield f"{rows:,} rows, {rows / middle:.2g} times the usual {middle:,.0f}"


def _is_odd(rows: int, counts: Sequence[int], factor: float, days: Days) -> bool:
    """Whether there are more or fewer rows than usual by the factor, and more surely than by chance."""
    normal = usual([math.log(count) for count in counts], 1)
    assert normal is not None, "there are days to compare with"
    chance = math.hypot(rows**-0.5, math.exp(-normal.low / 2))
    limit = allowed(math.log(factor), days.settings.sigmas, normal.spread, chance)
    return abs(excess(math.log(rows), normal)) > limit


def _on_the_same_weekday(days: Days) -> list[int]:
    """The rows of this weekday (and hour) in the weeks before, also where they alone had it held: what comes every week
    is no accident.
    """
    found = []
    for earlier in days.all:
        alone = earlier.reason.startswith("rows: ") and "; " not in earlier.reason
        same = _weekday(earlier.report) == _weekday(days.today)
        if same and (earlier.state == "promoted" or alone):
            found.append(int(earlier.report["rows"]))
    return found


def _weekday(report: Report) -> tuple[int, str]:
    day, _, hour = str(report["day"]).partition("T")
    return datetime.date.fromisoformat(day).weekday(), hour


def check_nulls(days: Days) -> Iterator[str]:
    """A column that is null much more, or much less, often than usual."""
    columns = dict.fromkeys(column for report in (days.today, *days.alike) for column in keys(report, "nulls"))
    for column in columns:
        share = _null_share(days.today, column)
        normal = usual([_null_share(report, column) for report in days.alike], days.settings.history)
        if days.settings.nulls is None or normal is None:
            continue
        chance = _binomial((normal.low + normal.high) / 2, _units(days.today))
        if abs(excess(share, normal)) > allowed(days.settings.nulls, days.settings.sigmas, normal.spread, chance):
            yield f"{column} is null in {share:.0%} of the rows (usually {normal.percent})"


def _null_share(report: Report, column: str) -> float:
    return (get(report, "nulls", column) or 0) / max(report["rows"], 1)


def _units(report: Report) -> float:
    """How many users (or requests, or rows) there were: so many independent observations at least."""
    return float(max(get(report, "units") or report["rows"], 1))


def _binomial(share: float, count: float) -> float:
    """Standard deviation of the share of `count` that are independent; of a share near 0 or 1 that of half a one."""
    share = min(max(share, 0.5 / count), 1 - 0.5 / count)
    return math.sqrt(share * (1 - share) / count)


def check_values(days: Days) -> Iterator[str]:
    """A number that lies elsewhere, or is spread otherwise, than usual: another unit, another meaning."""
    history, sigmas = days.settings.history, days.settings.sigmas
    few = 1 / math.sqrt(_units(days.today))
    for column in keys(days.today, "numbers"):
        mean, deviation = (get(days.today, "numbers", column, what) for what in ("mean", "deviation"))
        deviations = past(days.alike, "numbers", column, "deviation")
        normal, scale = usual(past(days.alike, "numbers", column, "mean"), history), usual(deviations, history)
        if days.settings.values is None or mean is None or normal is None or scale is None:
            continue
        unit = max(scale.high, 1e-12)
        if abs(excess(mean, normal)) > allowed(days.settings.values * unit, sigmas, normal.spread, unit * few):
            yield f"the mean of {column} is {mean:.4g} (usually {normal.text}, with a deviation of {unit:.3g})"
        wide, spread = log(deviation), usual([log(value) for value in deviations], history)
        if wide is None or spread is None:
            continue
        if abs(excess(wide, spread)) > allowed(math.log(_SPREAD_FACTOR), sigmas, spread.spread, few):
            yield f"the deviation of {column} is {deviation:.4g} (usually {scale.text})"


def check_ids(days: Days) -> Iterator[str]:
    """Many more ids than usual that nobody knows."""
    for table in keys(days.today, "ids"):
        share, seen = new_share(days.today, table)
        normal = usual([new_share(report, table)[0] for report in days.alike], days.settings.history)
        if days.settings.new_ids is None or share is None or normal is None:
            continue
        chance = _binomial((share + normal.high) / 2, seen)
        if excess(share, normal) > allowed(days.settings.new_ids, days.settings.sigmas, normal.spread, chance):
            yield f"{share:.0%} of the ids of table {table} are new (usually {normal.percent})"


def new_share(report: Report, table: str) -> tuple[float | None, int]:
    """Of a day's distinct ids the share that had no row when it began, and how many they were."""
    seen, wait = (get(report, "ids", table, what) or 0 for what in ("seen", "waiting_seen"))
    if seen + wait == 0:
        return None, 0
    return min((get(report, "ids", table, "new") + wait) / (seen + wait), 1.0), seen + wait


def check_labels(days: Days) -> Iterator[str]:
    """A task whose label is much rarer, commoner, smaller or larger than usual.

    Chance is told on the scale of the root, on which that of a count of rare events is the same whatever their rate.
    """
    factor = days.settings.labels
    for address in keys(days.today, "metrics"):
        mean, rows = (get(days.today, "metrics", address, what) for what in ("mean_label", "rows"))
        means = past(days.alike, "metrics", address, "mean_label")
        normal = usual(
            [None if value is None else math.sqrt(max(value, 0.0)) for value in means], days.settings.history
        )
        if factor is None or not rows or mean is None or normal is None:
            continue
        root, chance = math.sqrt(max(mean, 0.0)), math.sqrt(_worth_of_a_row(days, address) / rows) / 2
        tolerance = normal.low * (1 - factor**-0.5) if root < normal.low else normal.high * (factor**0.5 - 1)
        if abs(excess(root, normal)) > allowed(tolerance, days.settings.sigmas, normal.spread, chance):
            squared = Usual(normal.low**2, normal.high**2, 0.0)
            yield f"the mean label of {address} is {mean:.4g} (usually {squared.text})"


def _worth_of_a_row(days: Days, address: str) -> float:
    """The variance of the mean label times rows, over the mean label: 1 for rare events that are independent, more
    where rows of a user are alike. The middle of what the days' standard errors say.
    """
    found = []
    for report in (*days.alike, days.today):
        error = get(report, "errors", address, "mean_label")
        rows, mean = (get(report, "metrics", address, what) for what in ("rows", "mean_label"))
        if error and rows and mean and mean > 0:
            found.append(error**2 * rows / mean)
    return max(median(found), 1.0) if found else 1.0


def check_norms(days: Days) -> Iterator[str]:
    """Weights that grew, or moved, much more than usual on one day; the one that did so most."""
    settings, found = days.settings, []
    wanted: list[tuple[tuple[str, ...], str, float | None]] = [(("dense",), "dense weights", settings.dense_norm)]
    wanted += [
        (("rows", table), f"rows of table {table}", settings.row_norm) for table in keys(days.today, "norms", "rows")
    ]
    for path, what, factor in wanted:
        times, value, normal = _growth(days, path, factor, get(days.today, "ids", path[-1], "seen"))
        if times:
            found.append((times, f"the norm of the {what} is {value:.4g}, {times:.3g} times the usual {normal:.4g}"))
    if found:
        yield max(found)[1]
        return
    factor = None if settings.dense_norm is None else settings.dense_norm**2  # how far a few steps went varies more
    times, value, normal = _growth(days, ("lag",), factor, None)
    if times:
        yield f"the dense weights moved by {value:.4g}, {times:.3g} times the usual {normal:.4g}"


def _growth(days: Days, path: tuple[str, ...], factor: float | None, rows: int | None) -> tuple[float, float, float]:
    """How many times as large as usual a norm is, what it is and was; 0 times where that is well. Young weights grow
    fast: twice as much as on any of the days is allowed. rows: of so many it is the norm, where they are few.
    """
    logs = [log(value) for value in past(days.recent, "norms", *path)]
    value, normal = log(get(days.today, "norms", *path)), usual(logs, days.settings.history)
    if factor is None or value is None or normal is None:
        return 0.0, 0.0, 0.0
    known = [each for each in logs if each is not None]
    growth = max((after - before for before, after in pairwise(known)), default=0.0)
    chance = rows**-0.5 if rows else 0.0
    limit = max(2 * growth, allowed(math.log(factor), days.settings.sigmas, chance))
    if excess(value, normal) <= limit:
        return 0.0, 0.0, 0.0
    return math.exp(value - normal.high), math.exp(value), math.exp(normal.high)


def check_experts(days: Days) -> Iterator[str]:
    """An expert that nobody uses any more, or units that no longer answer."""
    settings = days.settings
    for level in keys(days.today, "gates"):
        least, dead = (get(days.today, "gates", level, what) for what in ("least", "dead_units"))
        used = usual(past(days.recent, "gates", level, "least"), settings.history)
        if least is not None and used is not None and least < _UNUSED and used.low >= 4 * _UNUSED:
            yield f"an expert of {level} has a share of {least:.2%} (usually at least {used.low:.1%})"
        alive = usual(past(days.recent, "gates", level, "dead_units"), settings.history)
        if settings.dead_units is None or dead is None or alive is None:
            continue
        if excess(dead, alive) > allowed(settings.dead_units, settings.sigmas, alive.spread):
            yield f"{dead:.0%} of the experts' units of {level} never answered (usually {alive.percent})"


def check_loss(days: Days) -> Iterator[str]:
    """A task that learnt worse than usual while it was trained. An event's loss is told over the entropy of its rate:
    rare events have small losses. It is about as uncertain as the events, or the users, are few.
    """
    for task in keys(days.today, "losses"):
        loss = _loss(days.today, task)
        normal = usual([_loss(report, task) for report in days.alike], days.settings.history)
        if days.settings.loss is None or loss is None or normal is None:
            continue
        near = abs(normal.high)
        chance = near * _relative_error(days.today, task)
        if excess(loss, normal) > allowed((days.settings.loss - 1) * near, days.settings.sigmas, normal.spread, chance):
            yield f"{task} in training is {loss / near:.3g} times the usual: {get(days.today, 'losses', task):.4g}"


def _loss(report: Report, task: str) -> float | None:
    """A task's loss; an event's over the entropy of its rate on the rows of its largest address."""
    loss = get(report, "losses", task)
    mine = [address for address in keys(report, "metrics") if address.partition("@")[0] == task]
    if loss is None or not any("auc" in report["metrics"][address] for address in mine):
        return loss if mine else None
    rate = get(report, "metrics", max(mine, key=lambda address: report["metrics"][address]["rows"]), "mean_label")
    if not rate or rate >= 1:
        return None
    return float(loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate)))


def _relative_error(report: Report, task: str) -> float:
    """Of a task's mean label, the largest of its addresses; no less than if each user were one observation."""
    found = []
    for address in keys(report, "metrics"):
        mean, error = (get(report, part, address, "mean_label") for part in ("metrics", "errors"))
        if address.partition("@")[0] == task and mean and error:
            found.append(error / abs(mean))
    return max([*found, _units(report) ** -0.5])
