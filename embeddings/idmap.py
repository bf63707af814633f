"""Who has a row: (table, key) -> row, with what is known of each: sightings, value, when it was last seen.

An exact open-addressing hash map for every 64-bit key of every table. A slot holds a row (int32) with a tag, some bits
of the key, above it; keys and tables lie beside the rows, so that a match of tags is checked against the key itself:
nothing collides. Plain loops, compiled, on the host, outside Python's global lock.

Shape letters: U pairs of a batch, R rows, C tallies, E kinds of events.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from embeddings.dedupe import Bytes, Int64s

FREE = 255  # the table of a row that nobody has
MAX_TABLES = 255
_EMPTY = -1
_MAX_LOAD = 0.85


class IdMap:
    """Gives rows 0 .. capacity_rows - 1 to (table, key) pairs; doubles by itself.

    count_R: sightings in all. seen_R: the period in which a row was last seen, whatever a period is to the caller.
    tally_RC: num_tallies running sums beside each row.
    """

    def __init__(self, capacity_rows: int, num_tallies: int = 0):
        self.key_R = np.zeros(0, np.int64)
        self.table_R = np.zeros(0, np.uint8)
        self.count_R = np.zeros(0, np.int32)
        self.seen_R = np.zeros(0, np.int16)
        self.tally_RC = np.zeros((0, num_tallies), np.float32)
        self._freed = np.zeros(0, np.int32)
        self.num_rows_T = np.zeros(MAX_TABLES, np.int64)
        self._next_row = 0
        self._resize(max(capacity_rows, 1))

    @property
    def capacity_rows(self) -> int:
        return self.key_R.size

    @property
    def memory_bytes(self) -> int:
        held = (self.key_R, self.table_R, self.count_R, self.seen_R, self.tally_RC, self._freed, self._slots)
        return sum(array.nbytes for array in held)

    @property
    def num_rows(self) -> int:
        return int(self.num_rows_T.sum())

    def find(self, key_U: Int64s, table_U: Bytes) -> Int64s:
        """The row of each pair, -1 where there is none."""
        rows_U: Int64s = _find(self._slots, self._row_bits, self.key_R, self.table_R, key_U, table_U)
        return rows_U

    def insert(self, key_U: Int64s, table_U: Bytes) -> Int64s:
        """Rows for distinct pairs that have none; what is known of them starts at zero."""
        reused = self._freed[self._freed.size - min(key_U.size, self._freed.size) :].astype(np.int64)
        fresh = key_U.size - reused.size
        self.reserve(self._next_row + fresh)
        rows_U = np.concatenate([reused, np.arange(self._next_row, self._next_row + fresh)])
        self._freed = self._freed[: self._freed.size - reused.size].copy()
        self._next_row += fresh
        self.num_rows_T += np.bincount(table_U, minlength=MAX_TABLES)
        self.key_R[rows_U], self.table_R[rows_U] = key_U, table_U
        _enter(self._slots, self._row_bits, self.key_R, self.table_R, rows_U)
        return rows_U

    def remove(self, rows: Int64s) -> None:
        """Free rows: forget what was known of them, and give them out again later."""
        self.num_rows_T -= np.bincount(self.table_R[rows], minlength=MAX_TABLES)
        _leave(self._slots, self._row_bits, self.key_R, self.table_R, rows)
        self.table_R[rows] = FREE
        self.count_R[rows] = 0
        self.seen_R[rows] = 0
        self.tally_RC[rows] = 0
        self._freed = np.concatenate([self._freed, rows.astype(np.int32)])

    def rows(self, table: int) -> Int64s:
        """All rows of a table, rising."""
        return np.flatnonzero(self.table_R[: self._next_row] == table)

    def skip(self, rows: int) -> None:
        """Set the next rows aside: they belong to no key."""
        self.reserve(self._next_row + rows)
        self._next_row += rows

    def reserve(self, capacity_rows: int) -> None:
        """Make room for so many rows in all; at least doubles when there is too little."""
        if capacity_rows > self.capacity_rows:
            self._resize(max(capacity_rows, 2 * self.capacity_rows))

    def _resize(self, capacity_rows: int) -> None:
        assert capacity_rows < 2**31, "a shard holds less than 2^31 rows of one width: use more workers"
        more = capacity_rows - self.capacity_rows
        self.key_R = _longer(self.key_R, more)
        self.table_R = _longer(self.table_R, more, FREE)
        self.count_R = _longer(self.count_R, more)
        self.seen_R = _longer(self.seen_R, more)
        self.tally_RC = _longer(self.tally_RC, more)
        self._row_bits = max((capacity_rows - 1).bit_length(), 1)
        self._slots = np.full(int(capacity_rows / _MAX_LOAD) + 2, _EMPTY, np.int32)
        taken = np.flatnonzero(self.table_R[: self._next_row] != FREE)
        _enter(self._slots, self._row_bits, self.key_R, self.table_R, taken)


def _longer(array: NDArray, more: int, fill: int = 0) -> NDArray:
    return np.concatenate([array, np.full((more, *array.shape[1:]), fill, array.dtype)])


@njit(nogil=True, cache=True)
def _home(key, table, num_slots):  # type: ignore[no-untyped-def]
    """The slot where a pair is looked for first: the low half of the key, scaled. Tables of equal ids lie apart."""
    return (((key ^ (np.int64(table) * 0x9E3779B1)) & 0xFFFFFFFF) * num_slots) >> 32


@njit(nogil=True, cache=True)
def _tagged(row, key, row_bits):  # type: ignore[no-untyped-def]
    """A row with those bits of the key above it that int32 leaves free."""
    return np.int32(row | (((key >> 32) << row_bits) & 0x7FFFFFFF))


@njit(nogil=True, cache=True)
def _find(slots, row_bits, key_R, table_R, key_U, table_U):  # type: ignore[no-untyped-def]
    slot_U, entry_U = np.empty(key_U.size, np.int64), np.empty(key_U.size, np.int32)
    for u in range(key_U.size):  # a loop of its own: nothing waits for what it reads, so the reads overlap
        slot_U[u] = _home(key_U[u], table_U[u], slots.size)
        entry_U[u] = slots[slot_U[u]]
    rows_U = np.empty(key_U.size, np.int64)
    for u in range(key_U.size):
        key, table, slot, entry = key_U[u], table_U[u], slot_U[u], entry_U[u]
        tag = _tagged(0, key, row_bits)
        rows_U[u] = -1
        while entry != _EMPTY:
            row = entry ^ tag
            if (row >> row_bits) == 0 and key_R[row] == key and table_R[row] == table:
                rows_U[u] = row
                break
            slot = slot + 1 if slot + 1 < slots.size else 0
            entry = slots[slot]
    return rows_U


@njit(nogil=True, cache=True)
def _enter(slots, row_bits, key_R, table_R, rows):  # type: ignore[no-untyped-def]
    for row in rows:
        slot = _home(key_R[row], table_R[row], slots.size)
        while slots[slot] != _EMPTY:
            slot = slot + 1 if slot + 1 < slots.size else 0
        slots[slot] = _tagged(row, key_R[row], row_bits)


@njit(nogil=True, cache=True)
def _leave(slots, row_bits, key_R, table_R, rows):  # type: ignore[no-untyped-def]
    """Take rows out; entries behind the hole that may move nearer to their home do, so no hole breaks a search."""
    row_mask = (1 << row_bits) - 1
    for gone in rows:
        hole = _home(key_R[gone], table_R[gone], slots.size)
        while (slots[hole] & row_mask) != gone:
            hole = (hole + 1) % slots.size
        slot = hole
        while True:
            slot = (slot + 1) % slots.size
            if slots[slot] == _EMPTY:
                break
            row = slots[slot] & row_mask
            home = _home(key_R[row], table_R[row], slots.size)
            if (slot - home) % slots.size >= (slot - hole) % slots.size:
                slots[hole] = slots[slot]
                hole = slot
        slots[hole] = _EMPTY
