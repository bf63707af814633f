"""The gate: may the model that was trained today serve?

In: today's report, the reports of the days before with what was decided about them, and the settings. Out: a Decision,
promoted or held, with one readable line that says why. A rejected model is a value, not an exception. What the day's
rows and weights say is in sanity.py; here, how good the model is.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.sanity import (
    check_delivery,
    check_experts,
    check_ids,
    check_labels,
    check_loss,
    check_nan,
    check_norms,
    check_nulls,
    check_rows,
    check_values,
)
from trainer.usual import Check, Days, GateConfig, Past, Report, Usual, allowed, excess, get, keys, log, past, usual

Earlier = TypeVar("Earlier")

_TOLD = 3  # findings in a reason; of the others only how many


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


def judge(today: Report, before: Sequence[Past], settings: GateConfig) -> Decision:
    """Promote, or hold. before: the earlier intervals, oldest first."""
    promoted = [earlier.report for earlier in before if _tells(earlier, settings)]
    alike = [report for report in promoted if hour(report["day"]) == hour(today["day"])][-settings.trailing :]
    days = Days(today, alike, promoted[-settings.trailing :], before, settings)
    first = (
        not any(earlier.state == "promoted" for earlier in before) and not today["metrics"]
    )  # there was no model by which it could have been scored
    checks = [(name, next(check(days), None)) for name, check in CHECKS.items() if not (first and name == "auc")]
    findings = [f"{name}: {finding}" for name, finding in checks if finding]
    if findings:
        return Decision("held", _told(findings, before, str(today["day"])), tuple(checks))
    return Decision("promoted", "the first model" if first else _good(days), tuple(checks))


def look_back(
    newest_first: Iterable[Earlier], read: Callable[[Earlier], Past], day: str, settings: GateConfig
) -> list[Past]:
    """The earlier intervals that judge needs, oldest first: the newest, and those of the same hour, as many of each as
    hold `trailing` that tell what is usual. No others are read. newest_first: whatever has an interval's name as its
    text.
    """
    found: list[Past] = []
    recent = alike = 0
    for earlier in newest_first:
        same = hour(str(earlier)) == hour(day)
        if recent < settings.trailing or (same and alike < settings.trailing):
            found.append(read(earlier))
            told = _tells(found[-1], settings)
            recent, alike = recent + told, alike + (told and same)
        elif alike >= settings.trailing:
            break
    return found[::-1]


def hour(name: str) -> str:
    """Which hour of the day an interval is, by its name; nothing for a day."""
    return name.partition("T")[2]


def _tells(earlier: Past, settings: GateConfig) -> bool:
    """Whether it tells what is usual: it was promoted, and no trickle of rows such as before a launch."""
    return earlier.state == "promoted" and earlier.report["rows"] >= settings.least_rows


def _told(findings: Sequence[str], before: Sequence[Past], day: str) -> str:
    """The reason of a held day, and what to do when it is always the same."""
    more = f"; and {len(findings) - _TOLD} more" if len(findings) > _TOLD else ""
    text, kind = "; ".join(findings[:_TOLD]) + more, findings[0].partition(":")[0]
    times = 1
    for earlier in reversed(before):
        if earlier.state != "held" or earlier.reason.partition(":")[0] != kind:
            break
        times += 1
    again = f" ({kind}: {times} times in a row; if that is how it is now, promote --force --day {day})"
    return text + again if times > 2 else text


def _good(days: Days) -> str:
    what, history = "of its hour " if hour(days.today["day"]) else "", days.settings.history
    if not days.alike:
        return f"nothing speaks against it; not compared, as none {what}with enough rows was promoted before"
    if len(days.alike) < history:
        few = f"only {len(days.alike)} {what}before it, of {history} that a comparison needs"
        return f"nothing speaks against it; not compared: {few}"
    return f"as good as the {len(days.alike)} promoted {what}before it"


def check_auc(days: Days) -> Iterator[str]:
    """An AUC that is undefined, below the floor or below what is usual; of the model of the day before."""
    settings, metrics = days.settings, days.today["metrics"]
    binary = [address for address in metrics if "auc" in metrics[address]]
    asked = settings.addresses or tuple(binary[:1])
    for address in dict.fromkeys([*asked, *binary]):
        auc, error = get(metrics, address, "auc"), auc_error(days.today, address)
        if auc is None:
            if address in asked:
                yield f"{address} is undefined{_few(days.today, address)}"
            continue
        normal = usual(past(days.alike, "metrics", address, "auc"), settings.history)
        chance = settings.sigmas * math.hypot(error, normal.spread if normal else 0.0)
        low = settings.floor is not None and auc + settings.sigmas * error < settings.floor
        if low and (normal is None or excess(auc, normal) < -chance):
            yield f"{address} is {auc:.4f} ± {error:.4f}, below the floor of {settings.floor}"
        if settings.tolerance is None or normal is None:
            continue
        if excess(auc, normal) < -max(settings.tolerance, chance):
            fall = f"{normal.low - auc:.4f} below the usual {normal.low:.4f}"
            yield f"{address} is {auc:.4f} ± {error:.4f}, {fall} of the {len(days.alike)} promoted before it"


def auc_error(report: Report, address: str) -> float:
    """The standard error of an AUC: by the bootstrap, but no less than that of scores that know nothing of as many
    independent labels. A bootstrap of a handful of users believes what it saw. Source: Hanley and McNeil, Radiology 143
    (1982), at an AUC of one half.
    """
    rows, mean = (get(report, "metrics", address, what) for what in ("rows", "mean_label"))
    positives = (rows or 0) * (mean or 0.0)
    negatives = (rows or 0) - positives
    least = math.sqrt((positives + negatives + 1) / (12 * positives * negatives)) if positives * negatives > 0 else 0.0
    return max(get(report, "errors", address, "auc") or 0.0, least)


def calibration_error(report: Report, address: str) -> float:
    """The standard error of a calibration's logarithm: by the bootstrap, but of an event no less than that of a count:
    of as many as came, or as were predicted, whichever are fewer.
    """
    metrics, error = get(report, "metrics", address), get(report, "errors", address, "calibration") or 0.0
    if "auc" not in metrics or not metrics.get("mean_label") or not metrics["calibration"]:
        return float(error)
    events = metrics["rows"] * metrics["mean_label"]
    return float(max(error, min(events, events * metrics["calibration"]) ** -0.5))


def _few(report: Report, address: str) -> str:
    rows, mean = (get(report, "metrics", address, what) for what in ("rows", "mean_label"))
    return f": {round(rows * mean)} of its {rows} labels are 1" if rows and mean is not None else ""


def check_champion(days: Days) -> Iterator[str]:
    """The model that was trained on is surely worse than the one that serves, on the same rows."""
    for address in keys(days.today, "rival", "differences"):
        found = get(days.today, "rival", "differences", address)
        if days.settings.paired_tolerance is None or found["high"] is None:
            continue
        if found["high"] < -days.settings.paired_tolerance:
            yield (
                f"the AUC of {address} on today's rows is {-found['auc']:.4f} below that of the champion of "
                f"{get(days.today, 'rival', 'day')} (95%: {-found['high']:.4f} to {-found['low']:.4f})"
            )


def check_calibration(days: Days) -> Iterator[str]:
    """Predictions that are too high or too low: outside fixed bounds, or farther than usual from 1."""
    settings = days.settings
    for address in keys(days.today, "metrics"):
        value = get(days.today, "metrics", address, "calibration")
        told, error = log(value), calibration_error(days.today, address)
        if told is None:
            continue
        if address in settings.calibration_bounds:
            low, high = settings.calibration_bounds[address]
            if not math.log(low) - settings.sigmas * error <= told <= math.log(high) + settings.sigmas * error:
                yield f"{address} is {value:.3f}, outside {low:g} to {high:g}"
        known = usual([log(each) for each in past(days.alike, "metrics", address, "calibration")], settings.history)
        if settings.calibration is None or known is None:
            continue
        normal = Usual(min(known.low, 0.0), max(known.high, 0.0), known.spread)  # nearer to 1 is never worse
        if abs(excess(told, normal)) > allowed(math.log(settings.calibration), settings.sigmas, known.spread, error):
            was = Usual(math.exp(known.low), math.exp(known.high), 0.0)
            yield f"{address} is {value:.3f} (usually {was.text})"


# In the order in which causes come before what they cause: the reason begins with the first that finds something.
CHECKS: dict[str, Check] = {
    "nan": check_nan,
    "delivery": check_delivery,
    "rows": check_rows,
    "nulls": check_nulls,
    "values": check_values,
    "ids": check_ids,
    "labels": check_labels,
    "experts": check_experts,
    "auc": check_auc,
    "champion": check_champion,
    "calibration": check_calibration,
    "norms": check_norms,
    "loss": check_loss,
}
