"""What a part is: trials, each measured once and kept as JSON; and a report, made from whatever trials there are.

A trial is what distinguishes one training from the others: {"body": "mmoe", "p": 0.5, "seed": 3}. Its result lies in
FOLDER/part/mmoe-0.5-3.json, and is not measured again while that file is there: delete it after a change of the part.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Trial = dict[str, Any]
Found = list[
    dict[str, Any]
]  # of each trial that was measured: the trial itself, what was measured, seconds (of the processor)


class Row(NamedTuple):
    """A line of the table. verdict: starts with reproduced, partly, not reproduced or open, in plain words."""

    claim: str
    source: str
    ours: str
    verdict: str


class Report(NamedTuple):
    """text: Markdown; how it was measured, with how many seeds."""

    rows: Sequence[Row]
    text: str


def nothing() -> str:
    return ""


@dataclass(frozen=True)
class Part:
    """trials(short, seeds): what there is to measure, seeds outermost; seeds None: as many as the part thinks right.
    measure(**trial): numbers by name, the same for the same trial. report: from at least one trial. lacks: why the part
    cannot be run here, empty if it can. All are functions of a module, so that a part can go to another process.
    """

    title: str
    trials: Callable[[bool, int | None], Sequence[Trial]]
    measure: Callable[..., Mapping[str, Any]]
    report: Callable[[Found], Report]
    lacks: Callable[[], str] = nothing


def place(folder: Path, trial: Trial) -> Path:
    return folder / ("-".join(str(value) for value in trial.values()) + ".json")


def measured(part: Part, folder: Path, trial: Trial) -> float:
    """Measure a trial unless its result is there; returns the processor's seconds."""
    path = place(folder, trial)
    if path.exists():
        return 0.0
    started = time.process_time()
    result = part.measure(**trial)
    seconds = round(time.process_time() - started, 1)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(trial | dict(result) | {"seconds": seconds}) + "\n")
    unfinished.rename(path)
    return seconds


def found(folder: Path, trials: Sequence[Trial]) -> Found:
    """The results of those trials that were measured."""
    paths = [place(folder, trial) for trial in trials]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def by_seed(results: Found, value: str, **trial: Any) -> dict[int, float]:
    """One measured number of the trials that agree with all that is given, by seed."""
    return {r["seed"]: r[value] for r in results if all(r[name] == wanted for name, wanted in trial.items())}


@dataclass(frozen=True)
class Sample:
    """A number over seeds. t: of its mean against 0."""

    values: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.mean()) if len(self.values) else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN for fewer than two."""
        return float(self.values.std(ddof=1) / math.sqrt(len(self.values))) if len(self.values) > 1 else math.nan

    @property
    def t(self) -> float:
        return self.mean / self.error if self.error > 0 else math.nan

    @property
    def above(self) -> int:
        """How many are above 0."""
        return int((self.values > 0).sum())

    def __len__(self) -> int:
        return len(self.values)

    def against_zero(self, digits: int = 4) -> str:
        """The mean, its t, and in how many runs the number is above 0."""
        if len(self) < 2:
            return f"{self.mean:+.{digits}f} (one run)" if len(self) else "not measured"
        return f"{self.mean:+.{digits}f} (t {self.t:.1f}, {self.above} of {len(self)})"

    @property
    def margin(self) -> float:
        """Half of the 95 % interval of the mean (Student's t); NaN for fewer than two."""
        from scipy.stats import t

        return float(t.ppf(0.975, len(self) - 1)) * self.error if len(self) > 1 else math.nan

    def show(self, digits: int = 4) -> str:
        """Mean and 95 % interval of the mean."""
        if len(self) < 2:
            return f"{self.mean:.{digits}f}" if len(self) else "not measured"
        return f"{self.mean:.{digits}f} ± {self.margin:.{digits}f}"


def sample(values: Mapping[int, float]) -> Sample:
    return Sample(np.array(list(values.values()), dtype=float))


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Sample:
    """a - b on the seeds that both have."""
    return Sample(np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], dtype=float))


def between(values: Sample, low: float, high: float = math.inf) -> bool | None:
    """Whether t is; None where there are too few seeds for one."""
    return None if math.isnan(values.t) else low < values.t < high


def surely_above(values: Sample) -> bool | None:
    """Whether the whole 95 % interval of the mean is above 0; None where there are too few seeds for one."""
    return None if math.isnan(values.t) else values.mean > values.margin


def judged(*held: bool | None) -> str:
    """The verdict on a claim of several parts."""
    if not held or None in held:
        return "open: too few seeds"
    return "reproduced" if all(held) else "partly" if any(held) else "not reproduced"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])
