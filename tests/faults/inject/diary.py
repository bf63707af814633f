"""The diary of a night's processes: when each step was done, and which rows it learnt from. One file a process."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

SCORE, TRAIN = 0, 1
_HEAD = struct.Struct("<dqqq")  # time, phase, day, bytes of what follows


class Step(NamedTuple):
    """One step of one worker. rows: the places of its rows in their day, int32. In the phase SCORE there are none, and
    the day is 0.
    """

    time_s: float
    phase: int
    day: int
    rows: bytes

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        return _HEAD.size + len(self.rows)


def record(time_s: float, phase: int, day: int, rows: bytes) -> bytes:
    """A step as it stands in the file."""
    return _HEAD.pack(time_s, phase, day, len(rows)) + rows


def steps_of(content: bytes) -> Iterator[Step]:
    """The steps of a file; the last may not be whole: its process was killed."""
    at = 0
    while at + _HEAD.size <= len(content):
        time_s, phase, day, size = _HEAD.unpack_from(content, at)
        at += _HEAD.size + size
        if at <= len(content):
            yield Step(time_s, phase, day, content[at - size : at])
