"""Sightings of ids that have no row yet: an exact counter each, or a count-min sketch of fixed size.

Both are cut by bucket, so they move with their buckets when the number of workers changes, and give the same answers
on any number of workers.

Shape letters: U distinct keys, A hash functions of a sketch.
"""

import numpy as np
from numba import njit

from embeddings.buckets import NUM_BUCKETS, bucket_of
from embeddings.dedupe import Bytes, Int64s
from embeddings.idmap import IdMap

_NUM_HASHES = 4
_MOST = 255  # a cell is one byte


class Waiting:
    """Exact counters of ids that wait for their row, for all tables."""

    def __init__(self) -> None:
        self.ids = IdMap(1024)

    def add(self, key_U: Int64s, table_U: Bytes, count_U: Int64s, period: int) -> Int64s:
        """Count more sightings of distinct pairs; returns all of each so far."""
        rows_U = self.ids.find(key_U, table_U)
        new = rows_U < 0
        rows_U[new] = self.ids.insert(key_U[new], table_U[new])
        self.ids.count_R[rows_U] += count_U.astype(np.int32)
        self.ids.seen_R[rows_U] = period
        self.ids.change(rows_U)
        return self.ids.count_R[rows_U].astype(np.int64)

    def remove(self, key_U: Int64s, table_U: Bytes) -> None:
        """Forget pairs; those that do not wait are passed over."""
        rows_U = self.ids.find(key_U, table_U)
        self.ids.remove(rows_U[rows_U >= 0])


class CountSketch:
    """Counts of one table's ids in `cells` bytes over all shards, never too low, at most 255.

    Conservative update: only the cells that hold an id's smallest count are raised. Source: Cormode, Muthukrishnan: An
    improved data stream summary: the count-min sketch, 2005; Estan, Varghese: New directions in traffic measurement
    and accounting, SIGCOMM 2002, section 3.2.1.
    """

    def __init__(self, cells: int, buckets: range = range(NUM_BUCKETS)):
        width = max(1, cells // (NUM_BUCKETS * _NUM_HASHES))
        self.first_bucket = buckets.start
        self.cells = np.zeros((len(buckets), _NUM_HASHES, width), np.uint8)
        self.day = 0  # none yet

    def add(self, key_U: Int64s, count_U: Int64s) -> Int64s:
        """Count more sightings of distinct keys; returns the estimate of each so far."""
        estimate_U: Int64s = _add(self.cells, self.first_bucket, key_U, count_U)
        return estimate_U

    def begin_day(self, day: int, forget_days: int) -> None:
        """Halve the counts once for every forget_days that ended since the last day."""
        ended = day // forget_days - self.day // forget_days if self.day else 0
        self.cells >>= min(max(ended, 0), 8)
        self.day = max(self.day, day)


@njit(nogil=True, cache=True)
def _cell(key, a, width):  # type: ignore[no-untyped-def]
    mixed = (key ^ (key >> 31)) * (2 * a + 0x1CE4E5B9)
    return ((mixed & 0xFFFFFFFF) * width) >> 32


@njit(nogil=True, cache=True)
def _add(cells, first_bucket, key_U, count_U):  # type: ignore[no-untyped-def]
    """All estimates first, then the updates, so that the order of the keys does not matter."""
    estimate_U = np.empty(key_U.size, np.int64)
    _, num_hashes, width = cells.shape
    for u in range(key_U.size):
        of_bucket = cells[bucket_of(key_U[u]) - first_bucket]
        least = np.int64(_MOST)
        for a in range(num_hashes):
            least = min(least, np.int64(of_bucket[a, _cell(key_U[u], a, width)]))
        estimate_U[u] = min(least + count_U[u], _MOST)
    for u in range(key_U.size):
        of_bucket = cells[bucket_of(key_U[u]) - first_bucket]
        for a in range(num_hashes):
            cell = _cell(key_U[u], a, width)
            of_bucket[a, cell] = max(np.int64(of_bucket[a, cell]), estimate_U[u])
    return estimate_U
