"""Who has a row: (table, key) -> row, with what is known of each: sightings, value, when it was last seen.

An exact open-addressing hash map for every 64-bit key of every table. A slot holds a row (int32) with a tag, some bits
of the key, above it; a match of tags is checked against the key itself: nothing collides. What is known of a row is one
record, so that a lookup touches one cache line a row. Plain loops, compiled, on the host, outside Python's global lock.

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

    known_R: a record a row: its key and table (FREE when nobody has it); count: sightings in all; seen: the period in
    which it was last seen, whatever a period is to the caller; tally: num_tallies running sums. changed: a bit a row,
    set by those who change what is known of it.
    """

    def __init__(self, capacity_rows: int, num_tallies: int = 0):
        record = [("key", "i8"), ("count", "i4"), ("tally", "f4", (num_tallies,)), ("seen", "i2"), ("table", "u1")]
        self.known_R = np.zeros(0, record)
        self.changed = np.zeros(0, np.uint8)
        self._freed = np.zeros(0, np.int32)
        self.num_rows_T = np.zeros(MAX_TABLES, np.int64)
        self._first_row = self._next_row = 0
        self._resize(max(capacity_rows, 1))

    @property
    def key_R(self) -> Int64s:
        return self.known_R["key"]

    @property
    def table_R(self) -> Bytes:
        return self.known_R["table"]

    @property
    def count_R(self) -> NDArray[np.int32]:
        return self.known_R["count"]

    @property
    def seen_R(self) -> NDArray[np.int16]:
        return self.known_R["seen"]

    @property
    def tally_RC(self) -> NDArray[np.float32]:
        return self.known_R["tally"]

    @property
    def capacity_rows(self) -> int:
        return self.known_R.size

    @property
    def memory_bytes(self) -> int:
        return self.known_R.nbytes + self.changed.nbytes + self._freed.nbytes + self._slots.nbytes

    @property
    def num_rows(self) -> int:
        return int(self.num_rows_T.sum())

    def find(self, key_U: Int64s, table_U: Bytes) -> Int64s:
        """The row of each pair, -1 where there is none."""
        rows_U: Int64s = _find(self._slots, self._row_bits, self.known_R, key_U, table_U)
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
        _enter(self._slots, self._row_bits, self.known_R, rows_U)
        return rows_U

    def remove(self, rows: Int64s) -> None:
        """Free rows: forget what was known of them, and give them out again later."""
        self.num_rows_T -= np.bincount(self.table_R[rows], minlength=MAX_TABLES)
        _leave(self._slots, self._row_bits, self.known_R, rows)
        self.known_R[rows] = np.zeros(1, self.known_R.dtype)
        self.table_R[rows] = FREE
        self._freed = np.concatenate([self._freed, rows.astype(np.int32)])

    def rows(self, table: int) -> Int64s:
        """All rows of a table, rising."""
        return np.flatnonzero(self.table_R[: self._next_row] == table)

    def taken(self) -> Bytes:
        """For each row 1 when somebody has it, else 0."""
        taken_R = np.zeros(self.capacity_rows, np.uint8)
        taken_R[self._first_row : self._next_row] = 1
        taken_R[self._freed] = 0
        return taken_R

    def change(self, rows: Int64s) -> None:
        """Mark rows as changed."""
        np.bitwise_or.at(self.changed, rows >> 3, (1 << (rows & 7)).astype(np.uint8))

    def changed_rows(self) -> Int64s:
        """The rows that somebody has and that are marked as changed, rising."""
        places = np.flatnonzero(self.changed != 0)
        place, bit = np.nonzero(np.unpackbits(self.changed[places], bitorder="little").reshape(-1, 8))
        rows = places[place] * 8 + bit
        return rows[self.table_R[rows] != FREE]

    def skip(self, rows: int) -> None:
        """Set the first rows aside: they belong to no key."""
        assert self._next_row == 0, "rows were given out before"
        self.reserve(rows)
        self._first_row = self._next_row = rows

    def reserve(self, capacity_rows: int) -> None:
        """Make room for so many rows in all; at least doubles when there is too little."""
        if capacity_rows > self.capacity_rows:
            self._resize(max(capacity_rows, 2 * self.capacity_rows))

    def _resize(self, capacity_rows: int) -> None:
        assert capacity_rows < 2**31, "a shard holds less than 2^31 rows of one width: use more workers"
        more = capacity_rows - self.capacity_rows
        self.known_R = np.concatenate([self.known_R, np.zeros(more, self.known_R.dtype)])
        self.table_R[capacity_rows - more :] = FREE
        self.changed = np.concatenate([self.changed, np.zeros(-(-capacity_rows // 8) - self.changed.size, np.uint8)])
        self._row_bits = max((capacity_rows - 1).bit_length(), 1)
        self._slots = np.full(int(capacity_rows / _MAX_LOAD) + 2, _EMPTY, np.int32)
        taken = np.flatnonzero(self.table_R[: self._next_row] != FREE)
        _enter(self._slots, self._row_bits, self.known_R, taken)


@njit(nogil=True, cache=True)
def _home(key, table, num_slots):  # type: ignore[no-untyped-def]
    """The slot where a pair is looked for first: the low half of the key, scaled. Tables of equal ids lie apart."""
    low = np.uint64((key ^ (np.int64(table) * 0x9E3779B1)) & 0xFFFFFFFF)
    return np.int64((low * np.uint64(num_slots)) >> np.uint64(32))  # 32 bits times 32: too wide for int64


@njit(nogil=True, cache=True)
def _tagged(row, key, row_bits):  # type: ignore[no-untyped-def]
    """A row with those bits of the key above it that int32 leaves free."""
    return np.int32(row | (((key >> 32) << row_bits) & 0x7FFFFFFF))


@njit(nogil=True, cache=True)
def _find(slots, row_bits, known_R, key_U, table_U):  # type: ignore[no-untyped-def]
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
            if (row >> row_bits) == 0 and known_R[row].key == key and known_R[row].table == table:
                rows_U[u] = row
                break
            slot = slot + 1 if slot + 1 < slots.size else 0
            entry = slots[slot]
    return rows_U


@njit(nogil=True, cache=True)
def _enter(slots, row_bits, known_R, rows):  # type: ignore[no-untyped-def]
    for row in rows:
        slot = _home(known_R[row].key, known_R[row].table, slots.size)
        while slots[slot] != _EMPTY:
            slot = slot + 1 if slot + 1 < slots.size else 0
        slots[slot] = _tagged(row, known_R[row].key, row_bits)


@njit(nogil=True, cache=True)
def _leave(slots, row_bits, known_R, rows):  # type: ignore[no-untyped-def]
    """Take rows out; entries behind the hole that may move nearer to their home do, so no hole breaks a search."""
    row_mask = (1 << row_bits) - 1
    for gone in rows:
        hole = _home(known_R[gone].key, known_R[gone].table, slots.size)
        while (slots[hole] & row_mask) != gone:
            hole = (hole + 1) % slots.size
        slot = hole
        while True:
            slot = (slot + 1) % slots.size
            if slots[slot] == _EMPTY:
                break
            row = slots[slot] & row_mask
            home = _home(known_R[row].key, known_R[row].table, slots.size)
            if (slot - home) % slots.size >= (slot - hole) % slots.size:
                slots[hole] = slots[slot]
                hole = slot
        slots[hole] = _EMPTY
