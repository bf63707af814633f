"""The rows of a pool as they are at one instant, read out while training goes on: copy on write, row by row.

Taking hold of the instant marks the rows (one byte each). Whoever is about to change rows calls before_change, which
copies those that are marked; the reader copies the others, a chunk at a time. The two share a lock, so nobody waits
longer than for one chunk.

Shape letters: U rows, R rows of the pool, D numbers a row, C tallies.
"""

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from embeddings.dedupe import Int64s
from embeddings.pool import Columns, RowPool

_SCAN = 1 << 22
_OUT, _IN, _LISTED = 0, 1, 2  # not in the frozen rows, or copied; to be listed and copied; listed, to be copied


class FrozenRows:
    """A pool's rows, or only those that are marked as changed. Read them out once, in any thread."""

    def __init__(self, pool: RowPool, *, changed: bool = False):
        self._pool, self._lock = pool, threading.Lock()
        if changed:
            self._mark_R = np.zeros(pool.ids.capacity_rows, np.uint8)
            self._mark_R[pool.ids.changed_rows()] = _IN
        else:
            self._mark_R = pool.ids.taken()
        self._kept: list[Columns] = []

    def before_change(self, rows: Int64s) -> None:
        """Copy those of the rows that are frozen and not copied yet."""
        rows = rows[rows < self._mark_R.size]
        if self._mark_R[rows].any():
            with self._lock:
                rows = rows[self._mark_R[rows] != _OUT]
                self._kept.append(self._pool.known(rows) | {"mark": self._mark_R[rows]})
                self._mark_R[rows] = _OUT

    def chunks(self, most_rows: int) -> Iterator[tuple[int, Columns]]:
        """The rows, table by table, sorted by key: the table's number and at most so many rows at once."""
        row_U, key_U, table_U = self._list()
        for table in self._pool.tables:
            places = np.flatnonzero(table_U == table)
            places = places[np.argsort(key_U[places])]
            for first in range(0, places.size, most_rows):
                yield table, self._read(row_U[places[first : first + most_rows]])

    def _list(self) -> tuple[Int64s, Int64s, NDArray[np.uint8]]:
        """Which rows are frozen, and who had them."""
        found = []
        for first in range(0, self._mark_R.size, _SCAN):
            with self._lock:
                rows = first + np.flatnonzero(self._mark_R[first : first + _SCAN] == _IN)
                self._mark_R[rows] = _LISTED
                found.append((rows, self._pool.ids.key_R[rows], self._pool.ids.table_R[rows]))
        with self._lock:
            for kept in self._kept:
                early = kept["mark"] == _IN
                found.append((kept["row"][early], kept["key"][early], kept["table"][early]))
        row_U, key_U, table_U = (np.concatenate(column) for column in zip(*found, strict=True))
        return row_U, key_U, table_U

    def _read(self, rows: Int64s) -> Columns:
        """The rows in this order, from the pool or from the copies that were kept."""
        with self._lock:
            kept = self._mark_R[rows] == _OUT
            columns = self._pool.known(rows)
            self._mark_R[rows] = _OUT
            if len(self._kept) > 1:
                self._kept = [{name: np.concatenate([k[name] for k in self._kept]) for name in self._kept[0]}]
        if kept.any():
            copies = self._kept[0]
            order = np.argsort(copies["row"])
            places = order[np.searchsorted(copies["row"], rows[kept], sorter=order)]
            for name, column in columns.items():
                column[kept] = copies[name][places]
        return columns
