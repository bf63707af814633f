"""What a run of chaos sees: its strikes, and the diaries of all processes as they grow."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from faults.inject.diary import TRAIN, Step, steps_of
from faults.nights import Night


@dataclass
class Strike:
    """One fault and its place: `share` of a day's rows trained on, or its phase `score` or `morning`. What came of it:
    when it struck, seconds to the next step of a process that lives, rows that were trained on once more.
    """

    fault: str
    day: int
    phase: str
    share: float
    struck_at: float = 0.0
    pids: set[int] = field(default_factory=set)
    recovered_s: float | None = None
    repeated: int = 0


class Watch:
    """Reads the diaries as they grow: which rows were trained on, and who does the steps."""

    def __init__(self, night: Night, first: datetime.date, days: int, rows: int):
        self._night, self._read, self._first = night, dict[Path, int](), first.toordinal()
        self._done = np.zeros((days, rows), np.int64)
        self.newest: dict[int, float] = {}  # process -> its newest step
        self.scored_at = 0.0

    def read(self, strikes: Sequence[Strike]) -> None:
        """Take in what is new; the strikes, the newest last, learn when work went on and what was done again."""
        for path in (self._night.folder / "faults" / "steps").iterdir():
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                content = file.read()
            size = 0
            for step in steps_of(content):
                size += step.size
                self._take(int(path.stem), step, strikes)
            self._read[path] = self._read.get(path, 0) + size

    def _take(self, pid: int, step: Step, strikes: Sequence[Strike]) -> None:
        time_s = step.time_s
        self.newest[pid] = time_s
        before = [strike for strike in strikes if strike.struck_at < time_s]
        for strike in before:
            if strike.recovered_s is None and pid not in strike.pids:
                strike.recovered_s = time_s - strike.struck_at
        if step.phase != TRAIN:
            self.scored_at = time_s
            return
        times = self._done[step.day - self._first]
        places = np.frombuffer(step.rows, np.int32)
        again = int((times[places] > 0).sum())
        times[places] += 1
        if before:
            before[-1].repeated += again

    @property
    def rows_done(self) -> list[int]:
        """Of each day, how many rows were trained on."""
        return [int((times > 0).sum()) for times in self._done]

    @property
    def rows_again(self) -> int:
        return int((self._done - 1).clip(min=0).sum())
