"""One night at a time: the lock of a model, with an owner and a heartbeat, on any storage.

In: a folder for the lock. Out: the lock, or a UserError that says who holds it since when. Nothing is asked of the
storage but that a file is written whole and that a listing shows what was written before it (or `settle_s` before it):
neither rename, nor exclusive create, nor conditional put. It is Lamport's bakery (Comm. ACM 17(8), 1974) with files:

    <id>.claim   "I am choosing"; then a ticket, one more than the highest that was seen; then "I hold it"
    <id>.beat    the time, every five seconds

Who sees a lower ticket, or somebody who holds it, gives up; for one that is choosing he waits. So two never hold it: of
two tickets, the owner of the higher one saw the lower, or that one was chosen after his was there and is not lower. A
claim whose owner is dead does not count: at once when the process is gone from this host; else when its beat is older
than a minute and stands still.

A stalled owner can be taken for dead and wake up: therefore `mine` is to be asked before each commit. Between that
question and the write it allows, nothing protects but that every file is written whole.
"""

import contextlib
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trainer.errors import UserError
from trainer.ledger import now
from trainer.storage import Storage

FOLDER = "lock"
BEAT_EVERY_S = 5.0
DEAD_AFTER_S = 60.0
_WATCHED_BEATS = 3  # for so long a beat that looks old must stand still: clocks of two hosts may differ
_POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """A process, told from every other one that ever was: its number alone is used again.

    boot, space: of the machine's start and of the process numbers' space (a container has its own). started: in the
    clock ticks of the kernel. Empty where there is no /proc: there, only a missing beat tells that somebody is dead.
    """

    host: str
    pid: int
    started: str
    boot: str
    space: str

    @staticmethod
    def this() -> "Process":
        boot, space = "", ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            space = os.readlink("/proc/self/ns/pid")
        return Process(socket.gethostname(), os.getpid(), _started(os.getpid()), boot, space)

    def is_gone(self) -> bool:
        """Is it certain that it ended? False for one of another host."""
        here = Process.this()
        comparable = bool(self.boot and self.space) and (self.boot, self.space) == (here.boot, here.space)
        return comparable and _started(self.pid) != self.started


@dataclass(frozen=True)
class Claim:
    """Who wants or holds the lock. ticket: None while he chooses one. verb: what he runs; since: when he came; at: when
    he wrote this, in seconds since 1970 by his clock.
    """

    id: str
    process: Process
    verb: str
    since: str
    at: float
    ticket: int | None = None
    held: bool = False

    def __str__(self) -> str:
        return f"{self.verb}, process {self.process.pid} on {self.process.host}, since {self.since}"


@dataclass(frozen=True)
class Fence:
    """An owner's right to write, as it can be handed to other processes of his night."""

    storage: Storage
    id: str

    def mine(self) -> None:
        """A UserError when another one took the lock over."""
        me = _read(self.storage, f"{self.id}.claim")
        others = [claim for claim in read_claims(self.storage) if claim.held and claim.id != self.id]
        over = [claim for claim in others if me is None or _order(claim) > _order(me)]
        if me is None or over:
            got = f"{over[0]}" if over else "no claim of this night is left"
            do = "nothing: what this night had committed is kept, and the other one goes on from it"
            raise UserError("another night took over", self.storage.path, got=got, do=do)


class Lock:
    """The lock of a model, for a with block; refused with a UserError while another one holds it."""

    def __init__(
        self,
        storage: Storage,
        verb: str,
        *,
        beat_every_s: float = BEAT_EVERY_S,
        dead_after_s: float = DEAD_AFTER_S,
        settle_s: float | None = None,
    ):
        """storage: the lock's own folder. settle_s: how long a listing may lag behind a write; None: not at all on a
        disk, a quarter of a second elsewhere.
        """
        self._storage, self._beat_every_s, self._dead_after_s = storage, beat_every_s, dead_after_s
        self._settle_s = (0.25 if "://" in storage.path else 0.0) if settle_s is None else settle_s
        process = Process.this()
        name = f"{process.host}-{process.pid}-{random.SystemRandom().getrandbits(32):08x}"
        self._claim = Claim(name, process, verb, now(), time.time())
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="lock", daemon=True)

    @property
    def fence(self) -> Fence:
        return Fence(self._storage, self._claim.id)

    def mine(self) -> None:
        """A UserError when another one took the lock over: to be asked before each commit."""
        self.fence.mine()

    def __enter__(self) -> "Lock":
        with _told(self._storage, "the lock cannot be taken"):
            try:
                self._choose()
                dead = self._wait()
                self._write(replace(self._claim, held=True))
                self._bury(dead)
                self.mine()  # whoever stalled on the way here may have been taken for dead
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave()

    def _choose(self) -> None:
        """Take a ticket, higher than all that are there."""
        self._write(self._claim)
        self._beat()
        self._heart.start()
        time.sleep(self._settle_s)
        highest = max((claim.ticket or 0 for claim in self._others()), default=0)
        self._write(replace(self._claim, ticket=highest + 1))
        time.sleep(self._settle_s)

    def _wait(self) -> list[Claim]:
        """Until nobody is before us: the claims of the dead. A UserError when somebody living is."""
        dead: dict[str, Claim] = {}
        while True:
            choosing = False
            for claim in self._others():
                if claim.id in dead or not (claim.held or claim.ticket is None or _order(claim) < _order(self._claim)):
                    continue
                if not is_alive(self._storage, claim, self._beat_every_s, self._dead_after_s):
                    dead[claim.id] = claim
                elif claim.ticket is None:
                    choosing = True
                else:
                    do = "wait until it ends, or end it; the lock of one that died is taken over by itself"
                    raise UserError("another night runs", self._storage.path, got=str(claim), do=do)
            if not choosing:
                return list(dead.values())
            time.sleep(_POLL_S)

    def _bury(self, dead: list[Claim]) -> None:
        """Remove the claims of the dead, and beats without a claim."""
        for claim in dead:
            _remove(self._storage, claim.id)
        names = self._storage.files()
        for name in names:
            if name.endswith(".beat") and name.replace(".beat", ".claim") not in names:
                self._storage.delete(name)

    def _others(self) -> list[Claim]:
        return [claim for claim in read_claims(self._storage) if claim.id != self._claim.id]

    def _write(self, claim: Claim) -> None:
        self._claim = replace(claim, at=time.time())
        name, content = f"{claim.id}.claim", json.dumps(asdict(self._claim)).encode()
        try:
            self._storage.write(name, content)
        except FileNotFoundError:  # who holds the lock took it, under its temporary name, for one of a killed night
            self._storage.write(name, content)

    def _beat(self) -> None:
        self._storage.write(f"{self._claim.id}.beat", json.dumps(time.time()).encode())

    def _beat_on(self) -> None:
        """A beat that fails is no harm: another follows. Whose claim is gone has nothing to beat for."""
        while not self._ended.wait(self._beat_every_s):
            with contextlib.suppress(OSError):
                if not self._storage.exists(f"{self._claim.id}.claim"):
                    return
                self._beat()

    def _leave(self) -> None:
        self._ended.set()
        if self._heart.is_alive():
            self._heart.join()
        with contextlib.suppress(OSError):  # a claim that stays is one of a dead process, soon
            _remove(self._storage, self._claim.id)


def read_claims(storage: Storage) -> list[Claim]:
    """Everybody's, the dead ones' too."""
    claims = [_read(storage, name) for name in storage.files() if name.endswith(".claim")]
    return [claim for claim in claims if claim]


def _read(storage: Storage, name: str) -> Claim | None:
    """None when its owner left, maybe between the listing and the reading."""
    try:
        claim = json.loads(storage.read(name))
    except FileNotFoundError:
        return None
    return Claim(**claim | {"process": Process(**claim["process"])})


def is_alive(storage: Storage, claim: Claim, beat_every_s: float, dead_after_s: float) -> bool:
    """Is the owner of a claim alive, as far as can be known? Takes a few beats when he seems dead."""
    if claim.process.is_gone():
        return False
    beat = last_beat(storage, claim)
    if abs(time.time() - beat) < dead_after_s:
        return True
    for _ in range(_WATCHED_BEATS):
        time.sleep(beat_every_s)
        if last_beat(storage, claim) != beat:
            return True
    return False


def last_beat(storage: Storage, claim: Claim) -> float:
    """When the owner gave his last sign, in seconds since 1970 by his clock."""
    try:
        return float(json.loads(storage.read(f"{claim.id}.beat")))
    except FileNotFoundError:
        return claim.at


def holder(storage: Storage) -> Claim | None:
    """Who holds the lock, for people; of a dead owner, too."""
    held = [claim for claim in read_claims(storage) if claim.held]
    return max(held, key=_order) if held else None


def sign_of_life(storage: Storage, claim: Claim) -> str:
    """What is known of an owner, for people, without waiting for him."""
    if claim.process.is_gone():
        return "its process is gone: the next night takes over"
    return f"last heartbeat {max(time.time() - last_beat(storage, claim), 0):.0f} s ago"


def _remove(storage: Storage, name: str) -> None:
    """The claim first: a beat without it means nothing."""
    storage.delete(f"{name}.claim")
    storage.delete(f"{name}.beat")


def _order(claim: Claim) -> tuple[int, str]:
    assert claim.ticket is not None, "who holds the lock or is before another has a ticket"
    return claim.ticket, claim.id


def _started(pid: int) -> str:
    """When a process started, in ticks; "" when there is none, or it ended and only its number is left."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # its name may hold anything
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def _told(storage: Storage, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        do = "mend the storage or the rights of the folder, then run the same command again"
        raise UserError(what, storage.path, got=str(error), do=do) from None
