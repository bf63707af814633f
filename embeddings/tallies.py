"""What happened to each id: sums that halve with age, as they stood before a batch and after it.

A tally adds up events on an id's sightings, each event with a weight, and halves every half_life_days. `value`, by
which rows are evicted, is one; statistics that a model reads are others. A row's tallies are kept as of the day it was
last seen; reading them decays them to today. Days are numbers; what a row stores is a period, a small number that
stands for a day and for being before or after the last snapshot.

Shape letters: U rows of a batch, R rows, P periods, T tables, C tallies, E kinds of events.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embeddings.dedupe import Int64s
from embeddings.idmap import IdMap

Floats = NDArray[np.float32]
SIGHTINGS, IMPRESSIONS = "sightings", "impressions"  # every id of a batch; only those that are a row's own


@dataclass(frozen=True)
class Tally:
    """weights: by event; `sightings`, `impressions`, or what happened on a row."""

    name: str
    weights: Mapping[str, float] = field(default_factory=lambda: {SIGHTINGS: 1.0})
    half_life_days: float = 30.0


class Periods:
    """The days so far, by period. A snapshot begins a new period of the same day."""

    def __init__(self) -> None:
        self.days: list[int] = [0]
        self.first_unsaved = 0

    @property
    def now(self) -> int:
        return len(self.days) - 1

    @property
    def today(self) -> int:
        return self.days[-1]

    def begin(self, day: int) -> None:
        assert len(self.days) < 2**15 - 1, "more periods than a row can tell apart: start anew from a checkpoint"
        self.days.append(day)

    def saved(self) -> None:
        """From here on rows count as changed since the snapshot."""
        self.begin(self.today)
        self.first_unsaved = self.now

    def past(self, day_U: Int64s) -> Int64s:
        """Periods for the days of rows that come from a snapshot."""
        days, which_U = np.unique(day_U, return_inverse=True)
        first, today = len(self.days), self.today
        for day in days.tolist():
            self.begin(day)
        self.begin(today)
        return first + which_U

    def ages(self) -> Int64s:
        """Days since each period: [P]."""
        return self.today - np.array(self.days, np.int64)


class Ledger:
    """The tallies of each table (by its number), and how they move on. events: what is counted, by column."""

    def __init__(self, tallies: Sequence[Sequence[Tally]], events: Sequence[str]):
        self.tallies, self.events = [list(of_table) for of_table in tallies], list(events)
        most = max((len(of_table) for of_table in tallies), default=0)
        self._weight_TCE = np.zeros((len(tallies), most, len(events)))
        self._half_life_TC = np.full((len(tallies), most), np.inf)
        for t, of_table in enumerate(tallies):
            for c, tally in enumerate(of_table):
                self._half_life_TC[t, c] = tally.half_life_days
                for event, weight in tally.weights.items():
                    self._weight_TCE[t, c, self.events.index(event)] = weight
        self._decay_PTC = np.ones((1, len(tallies), most))

    def begin(self, periods: Periods) -> None:
        """Reckon how much is left of what was counted in each period."""
        self._decay_PTC = np.exp2(-periods.ages()[:, None, None] / self._half_life_TC)

    def read(self, ids: IdMap, rows_U: Int64s) -> Floats:
        """The rows' tallies as of today: [U, C]; zeros for row -1."""
        tally_UC: Floats = _read(rows_U, ids.tally_RC, ids.table_R, ids.seen_R, self._decay_PTC)
        return tally_UC

    def add(self, ids: IdMap, rows_U: Int64s, event_UE: Int64s, period: int) -> None:
        """Enter what happened to distinct rows; -1 is passed over. The first event is sightings."""
        known = (ids.count_R, ids.tally_RC, ids.table_R, ids.seen_R)
        _add(rows_U, event_UE, period, *known, self._decay_PTC, self._weight_TCE)


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
def _read(rows_U, tally_RC, table_R, seen_R, decay_PTC):  # type: ignore[no-untyped-def]
    tally_UC = np.zeros((rows_U.size, tally_RC.shape[1]), np.float32)
    for u in range(rows_U.size):
        row = rows_U[u]
        if row >= 0:
            for c in range(tally_RC.shape[1]):
                tally_UC[u, c] = tally_RC[row, c] * decay_PTC[seen_R[row], table_R[row], c]
    return tally_UC


@njit(nogil=True, cache=True)
def _add(rows_U, event_UE, period, count_R, tally_RC, table_R, seen_R, decay_PTC, weight_TCE):  # type: ignore[no-untyped-def]
    for u in range(rows_U.size):
        row = rows_U[u]
        if row < 0:
            continue
        count_R[row] += event_UE[u, 0]
        for c in range(tally_RC.shape[1]):
            total = tally_RC[row, c] * decay_PTC[seen_R[row], table_R[row], c]
            for e in range(event_UE.shape[1]):
                total += event_UE[u, e] * weight_TCE[table_R[row], c, e]
            tally_RC[row, c] = total
        seen_R[row] = period
