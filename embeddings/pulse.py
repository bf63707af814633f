"""Signs of life. Whoever works for long without a collective beats after each piece that is done: a file's chunk that
was written, a row group that was read, a metric that was computed. The watchdog takes a worker that does not for one
that hangs. A beat costs less than a microsecond; it is given only when something moved, never while waiting.
"""

_beats = 0


def beat() -> None:
    """A piece of long work is done. Two threads at once may count as one: it only matters that the count moves."""
    global _beats
    _beats += 1


def beats() -> int:
    """How often this process beat."""
    return _beats
