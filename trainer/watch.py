"""Who hangs: every worker tells twice a second where it is, and the driver looks at what was told.

    worker:  WatchedExchange   numbers each collective and writes into Place whether the worker is inside it
             Telling           a thread that tells the Place
    driver:  Watchdog          names who shows no sign of life

A sign of life is whatever moves: a collective that is entered or left, a step, a beat (embeddings/pulse.py). A worker
hangs when it shows none for hang_s outside of collectives, or when its thread, too, is silent (a stopped process). Who
waits inside a collective does not hang, unless everybody does: then the collective itself is stuck. Time is counted by
the driver alone, so that clocks need not agree.
"""

import os
import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from embeddings.exchange import Exchange
from embeddings.pulse import beats

TELL_EVERY_S = 0.5
_LATE_S = 3 * TELL_EVERY_S  # until a sign is told and looked at, and who hangs is ended
_PATIENCE = 5  # so many times hang_s until the first step of a phase: kernels are compiled, a checkpoint is read
_LOOK_S = 4 * TELL_EVERY_S  # what counts at most between two looks: a driver that slept must not blame the workers
_IN_WORDS = {"score": "scoring", "train": "training", "commit": "committing", "start": "starting"}


@dataclass
class Place:
    """Where a worker is; its own threads alone write here. number: of the newest collective, and collective: its name
    while the worker is inside. beats: what it has done beside. node: Ray's id of the machine.
    """

    rank: int
    node: str = ""
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    interval: str = ""
    phase: str = "start"
    step: int = 0
    number: int = 0
    collective: str = ""
    beats: int = 0
    tellings: int = 0

    @property
    def who(self) -> str:
        return f"worker {self.rank} (process {self.pid} on {self.host})"

    @property
    def where(self) -> str:
        work = f"{_IN_WORDS.get(self.phase, self.phase)} {self.interval}".rstrip()
        at = f"in step {self.step + 1} of {work}" if self.step else work
        return f"{at}, inside {self.call}" if self.collective else at

    @property
    def call(self) -> str:
        return f"{self.collective} {self.number}"

    def at(self, interval: str, phase: str, step: int) -> None:
        """So many steps of a phase of an interval are done."""
        self.interval, self.phase, self.step = interval, phase, step


class WatchedExchange:
    """An exchange whose collectives are written into a worker's place, by name and number. When one fails the worker
    stays inside: that is where it was.
    """

    def __init__(self, exchange: Exchange, place: Place):
        self.rank, self.num_workers = exchange.rank, exchange.num_workers
        self._exchange, self._place = exchange, place

    def _enter(self, name: str) -> None:
        self._place.number += 1
        self._place.collective = name

    def all_to_all(self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        self._enter("all_to_all")
        received = self._exchange.all_to_all(send, send_sizes, receive_sizes)
        self._place.collective = ""
        return received

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._enter("all_reduce")
        total = self._exchange.all_reduce(tensor)
        self._place.collective = ""
        return total

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self._enter("gather")
        gathered = self._exchange.gather(tensor)
        self._place.collective = ""
        return gathered


class Telling:
    """Tells a place every half second, in a thread, until the end of the with block."""

    def __init__(self, place: Place, tell: Callable[[Place], None]):
        self._place, self._tell = place, tell
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telling", daemon=True)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._tell_now()
            self._ended.wait(TELL_EVERY_S)

    def _tell_now(self) -> None:
        self._place.tellings += 1
        self._place.beats = beats()
        self._tell(replace(self._place))

    def __enter__(self) -> "Telling":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._tell_now()


@dataclass(frozen=True)
class Hang:
    """Who hangs, and what there is to say about it."""

    places: Sequence[Place]
    text: str


@dataclass
class _Seen:
    """What was told last, and when it was another thing before, by the watchdog's clock."""

    place: Place
    told_at: float
    moved_at: float


class Watchdog:
    """Looks at the workers of one round. hang_s: who shows no sign of life is named within so many seconds."""

    def __init__(self, hang_s: float):
        self._hang_s = max(hang_s / 2, hang_s - _LATE_S)
        self._clock = 0.0
        self._seen: dict[int, _Seen] = {}
        self._begun: set[str] = set()  # the phases that have come through a step

    def look(self, places: Sequence[Place], elapsed_s: float) -> Hang | None:
        """What the workers told last, elapsed_s after the look before; a worker that is ended is left out."""
        self._clock += min(elapsed_s, _LOOK_S)
        self._seen = {place.rank: self._update(place) for place in places}
        self._begun |= {place.phase for place in places if place.step}
        if not places:
            return None
        return self._silent() or self._outside() or self._inside()

    def _update(self, place: Place) -> _Seen:
        seen = self._seen.get(place.rank)
        if seen is None:
            return _Seen(place, self._clock, self._clock)
        told = place.tellings != seen.place.tellings
        moved = replace(place, tellings=0) != replace(seen.place, tellings=0)
        return _Seen(place, self._clock if told else seen.told_at, self._clock if moved else seen.moved_at)

    def _still(self, seen: _Seen) -> bool:
        patience = 1 if seen.place.phase in self._begun else _PATIENCE
        return self._clock - seen.moved_at > patience * self._hang_s

    def _silent(self) -> Hang | None:
        """A stopped process tells nothing more."""
        silent = [seen for seen in self._seen.values() if self._clock - seen.told_at > self._hang_s]
        return self._hang(silent)

    def _outside(self) -> Hang | None:
        """Stuck between two collectives: an endless loop, a file system that does not answer."""
        stuck = [seen for seen in self._seen.values() if not seen.place.collective and self._still(seen)]
        return self._hang(stuck)

    def _inside(self) -> Hang | None:
        """Everybody waits in a collective: those in the earliest one hold up the others."""
        if not all(seen.place.collective and self._still(seen) for seen in self._seen.values()):
            return None
        earliest = min(seen.place.number for seen in self._seen.values())
        stuck = [seen for seen in self._seen.values() if seen.place.number == earliest]
        return self._hang(stuck)

    def _hang(self, stuck: Sequence[_Seen]) -> Hang | None:
        if not stuck:
            return None
        still_s = max(self._clock - seen.moved_at for seen in stuck)
        told = "; ".join(self._what(seen) for seen in stuck)
        return Hang([seen.place for seen in stuck], f"{told} (no sign of life for {still_s:.0f} s)")

    def _what(self, seen: _Seen) -> str:
        """Who hangs where, and who waits for it where."""
        place = seen.place
        text = f"{place.who} {'is silent' if self._clock - seen.told_at > _LATE_S else 'hangs'} {place.where}"
        waiting = [
            other for other in self._seen.values() if other.place.collective and other.place.number > place.number
        ]
        if not waiting or place.collective:
            return text
        who = " and ".join(f"worker {other.place.rank}" for other in waiting)
        waited_s = max(self._clock - other.moved_at for other in waiting)
        return f"{text}, before {waiting[0].place.call}, in which {who} waited for {waited_s:.0f} s"
