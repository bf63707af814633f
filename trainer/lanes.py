"""Which rows of a day come when: lanes, read side by side.

    row groups, shuffled -> one long line -> `lanes` equal segments -> every global batch takes an equal slice of each

A worker reads a contiguous run of lanes. So the global batches are the same for any number of workers, all workers make
the same number of steps, files may have fewer row groups than there are workers, and a row group is decoded twice only
where two workers' lanes meet. Where rows must not be parted, lanes and slices end at the nearest place where a row
group may be cut. What it costs: a worker holds one decoded row group a lane (fewer when lanes share one).
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.intervals import Interval

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowGroup:
    """The rows of a file's row group that an interval has: num_rows of them.

    first_row: the place of the first of them in the interval. hour: the one whose rows they are, when the rows of a
    row group are parted by hours. left_out: the places in the row group of rows that are set aside.
    """

    path: str
    index: int
    num_rows: int
    first_row: int
    hour: Interval | None = None
    left_out: NDArray[np.int64] | None = field(default=None, compare=False)

    @property
    def where(self) -> str:
        """For errors."""
        return f"{self.path}, row group {self.index}"


@dataclass(frozen=True)
class BadFile:
    """A file that is set aside whole."""

    path: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class BadRows:
    """Rows of a row group that are set aside, by their places in it, for one reason."""

    path: str
    index: int
    column: str
    reason: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class DayPlan:
    """An interval's row groups, in the order of their files. All footers were read and all columns checked.

    delivery: what was delivered, by file: {"file", "bytes", "rows", "footer"}. notes: what is new in it, in words.
    bad_files, bad_rows: what is set aside, and is not in the row groups.
    """

    interval: Interval
    row_groups: tuple[RowGroup, ...]
    delivery: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    bad_files: tuple[BadFile, ...] = ()
    bad_rows: tuple[BadRows, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.row_groups)

    def num_steps(self, batch_size: int) -> int:
        return -(-self.num_rows // batch_size)


Edges: TypeAlias = NDArray[np.int64]  # where the rows of a row group may be parted: 0, ..., their number
EdgesOf: TypeAlias = Callable[[RowGroup], Edges]


def between_rows(num_rows: int) -> Edges:
    """Any two rows may be parted."""
    return np.arange(num_rows + 1)


def between_runs(values: NDArray[np.int64]) -> Edges:
    """Neighbours of equal value are not parted."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1, [values.size]])


def nearest(edges: Edges, place: int) -> int:
    """The edge nearest to a place; of two the later."""
    after = int(np.searchsorted(edges, place))
    before = max(after - 1, 0)
    return int(edges[after] if edges[after] - place <= place - edges[before] else edges[before])


def open_lanes(plan: DayPlan, lanes: int, mine: range, seed: int | None, edges_of: EdgesOf) -> Iterator["Lane"]:
    """The lanes of one worker. seed None: rows stay in order."""
    key = None if seed is None else (seed, plan.interval.number)
    line: Sequence[RowGroup] = plan.row_groups
    if key is not None:
        line = [plan.row_groups[i] for i in np.random.default_rng(key).permutation(len(plan.row_groups))]
    first = _cut(line, plan.num_rows * mine.start // lanes, edges_of)
    for lane in mine:
        end = _cut(line, plan.num_rows * (lane + 1) // lanes, edges_of)
        yield Lane(lane, _pieces(line, first, end), edges_of, key)
        first = end


def _cut(line: Sequence[RowGroup], place: int, edges_of: EdgesOf) -> int:
    """The place in the line nearest to the given one at which it may be cut."""
    start = 0
    for group in line:
        if start < place < start + group.num_rows:
            return start + nearest(edges_of(group), place - start)
        start += group.num_rows
    return place


@dataclass(frozen=True)
class _Piece:
    """Rows a to b of a row group, from a place of their lane on."""

    group: RowGroup
    a: int
    b: int
    place: int


def _pieces(line: Sequence[RowGroup], first: int, end: int) -> list[_Piece]:
    """What lies between two places of the line."""
    pieces, start = [], 0
    for group in line:
        a, b = max(first - start, 0), min(end - start, group.num_rows)
        if a < b:
            pieces.append(_Piece(group, a, b, start + a - first))
        start += group.num_rows
    return pieces


class Lane:
    """One of the equal segments of a day's line of rows, taken from its beginning.

    What is not parted is shuffled within each piece (the part of a row group that lies in this lane), the row groups by
    all lanes alike.
    """

    def __init__(self, number: int, pieces: list[_Piece], edges_of: EdgesOf, key: tuple[int, ...] | None):
        self.number, self._edges_of, self._key = number, edges_of, key
        self.num_rows = sum(piece.b - piece.a for piece in pieces)
        self._pieces = pieces[::-1]  # taken from the end
        self._taken = 0  # of the piece in hand
        self._rows: NDArray[np.int64] | None = None
        self._edges = between_rows(0)  # in the order of its rows

    def rows_left(self) -> dict[RowGroup, int]:
        """The row groups still to be read here and how many of their rows."""
        left = {piece.group: piece.b - piece.a for piece in self._pieces}
        if self._pieces:
            left[self._pieces[-1].group] -= self._taken
        return left

    def skip(self, until: int) -> None:
        """As take, but what is passed over whole is not looked at."""
        while self._pieces and self._pieces[-1].place + self._pieces[-1].b - self._pieces[-1].a <= until:
            self._pieces.pop()
        self.take(until)

    def take(self, until: int) -> list[tuple[RowGroup, NDArray[np.int64]]]:
        """The rows from those taken last up to the given place of the lane, or the nearest one at which rows may be
        parted: row groups, and rows within them.
        """
        taken = []
        while self._pieces and self._pieces[-1].place < until:
            piece = self._pieces[-1]
            if self._rows is None:
                self._rows, self._edges = self._shuffled(piece)
            end = nearest(self._edges, min(until - piece.place, self._rows.size))
            if end > self._taken:
                taken.append((piece.group, self._rows[self._taken : end]))
            self._taken = end
            if end < self._rows.size:
                break
            self._pieces.pop()
            self._rows, self._taken = None, 0
        return taken

    def _shuffled(self, piece: _Piece) -> tuple[NDArray[np.int64], Edges]:
        """A piece's rows in the order in which they come, and where these may be parted."""
        edges = self._edges_of(piece.group)
        edges = edges[np.searchsorted(edges, piece.a) : np.searchsorted(edges, piece.b) + 1]
        starts, lengths = edges[:-1], np.diff(edges)
        if self._key is not None:
            order = np.random.default_rng((*self._key, self.number, piece.group.first_row)).permutation(starts.size)
            starts, lengths = starts[order], lengths[order]
        ends = lengths.cumsum()
        rows = (starts - (ends - lengths)).repeat(lengths) + np.arange(piece.b - piece.a)
        return rows, np.concatenate([[0], ends])


def prefetch(ahead: Iterator[Item], depth: int) -> Iterator[Item]:
    """Run an iterator ahead in a thread, at most depth items; its exception is raised here, and leaving early stops
    the thread.
    """
    items: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in ahead:
                put(item)
                if stopped.is_set():
                    return
            put(end)
        except BaseException as error:  # noqa: BLE001 - handed over to the reader
            put(error)

    threading.Thread(target=run, name="read-ahead", daemon=True).start()
    try:
        while (item := items.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
