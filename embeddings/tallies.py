"""What happened to each id: sums that halve with age, as they stood before a batch and after it.

A tally adds up events on an id's sightings, each event with a weight, and halves every half_life_days. `value`, by
which rows are evicted, is one; statistics that a model reads are others. A row's tallies are kept as of the day it was
last seen; reading them decays them to today. Days are numbers; what a row stores is a period, a small number that
stands for a day.

Shape letters: U rows of a batch, R rows, P periods, T tables, S tallies, C their columns, E kinds of events.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embeddings.dedupe import Int64s
from embeddings.idmap import IdMap

Floats = NDArray[np.float32]
TODAY = "_today"
_MOST = 2**31 - 1  # sightings that a row's counter holds
SIGHTINGS, IMPRESSIONS = "sightings", "impressions"  # every id of a batch; only those that are a row's own


@dataclass(frozen=True)
class Tally:
    """weights: by event; `sightings`, `impressions`, or what happened on a row. by_day: as a statistic, what happens
    today is read from tomorrow on.
    """

    name: str
    weights: Mapping[str, float] = field(default_factory=lambda: {SIGHTINGS: 1.0})
    half_life_days: float = 30.0
    by_day: bool = False


class Periods:
    """The days so far, by period."""

    def __init__(self) -> None:
        self.days: list[int] = [0]

    @property
    def now(self) -> int:
        return len(self.days) - 1

    @property
    def today(self) -> int:
        return self.days[-1]

    def begin(self, day: int) -> None:
        assert len(self.days) < 2**15 - 1, "more periods than a row can tell apart: start anew from a checkpoint"
        self.days.append(day)

    def past(self, day_U: Int64s) -> Int64s:
        """Periods for the days of rows that come from a snapshot. A day has one, however many pieces name it."""
        days, which_U = np.unique(day_U, return_inverse=True)
        today, known = self.today, {day: period for period, day in enumerate(self.days)}
        for day in days.tolist():
            if day not in known:
                self.begin(day)
                known[day] = self.now
        if self.today != today:
            self.begin(today)
        return np.array([known[day] for day in days.tolist()], np.int64)[which_U]

    def ages(self) -> Int64s:
        """Days since each period: [P]."""
        return self.today - np.array(self.days, np.int64)


class Ledger:
    """The tallies of each table (by its number), and how they move on: first its value, then its statistics, of which
    today's part stands apart. events: what is counted, by column.
    """

    def __init__(self, tallies: Sequence[Sequence[Tally]], events: Sequence[str]):
        self.tallies, self.events = [list(of_table) for of_table in tallies], list(events)
        most = max((len(of_table) for of_table in tallies), default=0)
        self._weight_TSE = np.zeros((len(tallies), most, len(events)))
        self._half_life_TS = np.full((len(tallies), most), np.inf)
        self._by_day_TS = np.zeros((len(tallies), most), np.bool_)
        self._column_TS2 = np.full((len(tallies), most, 2), -1)  # where a tally stands, and what of it is of today
        for t, of_table in enumerate(tallies):
            columns = self.columns(t)
            for s, tally in enumerate(of_table):
                self._half_life_TS[t, s] = tally.half_life_days
                self._column_TS2[t, s, 0] = columns.index(tally.name)
                if s:
                    self._column_TS2[t, s, 1] = columns.index(tally.name + TODAY)
                    self._by_day_TS[t, s] = tally.by_day
                for event, weight in tally.weights.items():
                    self._weight_TSE[t, s, self.events.index(event)] = weight
        self.begin(Periods())

    def columns(self, table: int) -> list[str]:
        """What each column of a table's tally_RC holds."""
        names = [tally.name for tally in self.tallies[table]]
        return names + [name + TODAY for name in names[1:]]

    def begin(self, periods: Periods) -> None:
        """Reckon how much is left of what was counted in each period."""
        self._age_P = periods.ages()
        past_P11 = self._age_P.clip(min=0)[:, None, None]  # while a snapshot is read, its days lie ahead
        self._decay_PTS = np.exp2(-past_P11 / self._half_life_TS)

    def read(self, ids: IdMap, rows_U: Int64s, *, as_today_began: bool = False) -> Floats:
        """The rows' tallies as of today: [U, S]; zeros for row -1 and for tallies that a row's table has not."""
        by_day_TS = self._by_day_TS | as_today_began
        tally_US: Floats = _read(rows_U, ids.known_R, self._age_P, self._decay_PTS, self._column_TS2, by_day_TS)
        return tally_US

    def add(self, ids: IdMap, rows_U: Int64s, event_UE: Int64s, period: int) -> None:
        """Enter what happened to distinct rows, which count as changed; -1 is passed over. The first event is
        sightings.
        """
        of_rows, decays = (ids.known_R, ids.changed), (self._age_P, self._decay_PTS)
        _add(rows_U, event_UE, period, *of_rows, *decays, self._weight_TSE, self._column_TS2)


@njit(nogil=True, cache=True)
def add_happened(event_UE, index_N, offsets, happened_BE):  # type: ignore[no-untyped-def]
    """Add what happened on each row to the pairs of its ids."""
    for b in range(happened_BE.shape[0]):
        for n in range(offsets[b], offsets[b + 1]):
            for e in range(happened_BE.shape[1]):
                event_UE[index_N[n], e] += happened_BE[b, e]


@njit(nogil=True, cache=True)
def add_rows(total_OE, index_V, event_VE):  # type: ignore[no-untyped-def]
    """Add each row to the one of the totals that its index names."""
    for v in range(index_V.size):
        for e in range(event_VE.shape[1]):
            total_OE[index_V[v], e] += event_VE[v, e]


@njit(nogil=True, cache=True)
def _read(rows_U, known_R, age_P, decay_PTS, column_TS2, by_day_TS):  # type: ignore[no-untyped-def]
    tally_US = np.zeros((rows_U.size, decay_PTS.shape[2]), np.float32)
    for u in range(rows_U.size):
        if rows_U[u] < 0:
            continue
        row = known_R[rows_U[u]]
        for s in range(decay_PTS.shape[2]):
            column, today = column_TS2[row.table, s]
            if column < 0:
                continue
            total = np.float64(row.tally[column])
            if today >= 0 and (age_P[row.seen] > 0 or not by_day_TS[row.table, s]):
                total += row.tally[today]
            tally_US[u, s] = total * decay_PTS[row.seen, row.table, s]
    return tally_US


@njit(nogil=True, cache=True)
def _add(rows_U, event_UE, period, known_R, changed, age_P, decay_PTS, weight_TSE, column_TS2):  # type: ignore[no-untyped-def]
    for u in range(rows_U.size):
        if rows_U[u] < 0:
            continue
        row = known_R[rows_U[u]]
        table, seen = row.table, row.seen
        changed[rows_U[u] >> 3] |= np.uint8(1 << (rows_U[u] & 7))
        row.count = min(row.count + event_UE[u, 0], _MOST)
        left = 1.0 if seen == period else decay_PTS[seen, table, 0]
        row.tally[0] = row.tally[0] * left + _worth(event_UE, u, weight_TSE, table, 0)
        for s in range(1, decay_PTS.shape[2]):
            column, today = column_TS2[table, s, 0], column_TS2[table, s, 1]
            if column < 0:
                continue
            if age_P[seen] == 0:
                row.tally[today] += _worth(event_UE, u, weight_TSE, table, s)
            else:
                total = np.float64(row.tally[column]) + row.tally[today]
                row.tally[column] = total * decay_PTS[seen, table, s]
                row.tally[today] = _worth(event_UE, u, weight_TSE, table, s)
        row.seen = period


@njit(nogil=True, cache=True)
def _worth(event_UE, u, weight_TSE, t, s):  # type: ignore[no-untyped-def]
    """What the events of a row are worth to a tally. (Plain indices: a view of an array costs more than the sum.)"""
    worth = 0.0
    for e in range(event_UE.shape[1]):
        worth += event_UE[u, e] * weight_TSE[t, s, e]
    return worth
