"""The lock of a night.

Oracles: a counter of who is inside, for mutual exclusion, over a store that promises as little as the worst that we run
on; the kernel's own word on processes that were killed or stopped, for takeovers.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import s3_server

from cluster.lock import Lock, Process, holder, is_alive, read_claims
from trainer.errors import UserError
from trainer.storage import Storage

FAST = {"beat_every_s": 0.02, "dead_after_s": 0.3}
ROOT = Path(__file__).parents[2]


class Memory:
    """Files in memory, each written whole; `pause` comes before every word and between the files of a listing. A
    listing looks at one file after the other while others write: it shows what was there `lag_s` before it began, and
    what came later by chance, as often as `shown` says.
    """

    path = "memory"

    def __init__(self, seed: int, pause: Callable[[], None], lag_s: float = 0.0, shown: float = 0.5):
        self._random, self._pause, self._lag_s, self._shown = random.Random(seed), pause, lag_s, shown
        self._content: dict[str, tuple[float, bytes]] = {}
        self._mutex = threading.Lock()

    def write(self, name: str, content: bytes) -> None:
        self._pause()
        with self._mutex:
            first, _ = self._content.get(name, (time.monotonic(), b""))
            self._content[name] = first, content

    def read(self, name: str) -> bytes:
        self._pause()
        try:
            return self._content[name][1]
        except KeyError:
            raise FileNotFoundError(name) from None

    def files(self) -> list[str]:
        began = time.monotonic()
        self._pause()
        with self._mutex:
            names = [*self._content]
        self._random.shuffle(names)
        shown = []
        for name in names:
            self._pause()
            there = self._content.get(name)
            if there and (there[0] < began - self._lag_s or self._random.random() < self._shown):
                shown.append(name)
        return sorted(shown)

    def exists(self, name: str) -> bool:
        return name in self._content

    def delete(self, name: str) -> None:
        self._pause()
        self._content.pop(name, None)


class Inside:
    """How many hold the lock at once, how often somebody did, and who was turned away for another reason than one who
    holds it.
    """

    def __init__(self) -> None:
        self.now = self.most = self.times = 0
        self.surprises: list[str] = []
        self._mutex = threading.Lock()

    def __enter__(self) -> None:
        with self._mutex:
            self.now, self.times = self.now + 1, self.times + 1
            self.most = max(self.most, self.now)

    def __exit__(self, *exception: object) -> None:
        with self._mutex:
            self.now -= 1


def at_once(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def contend(
    store: Memory | Storage, inside: Inside, seed: int, tries: int, settle_s: float | None = None
) -> Callable[[], None]:
    """One who wants the lock again and again, stays a while when he gets it, and goes away when he is refused."""
    chance = random.Random(seed)

    def work() -> None:
        for _ in range(tries):
            time.sleep(chance.random() * 0.003)
            try:
                with Lock(store, "nightly", settle_s=settle_s) as lock, inside:
                    time.sleep(chance.random() * 0.003)
                    lock.mine()
            except UserError as error:
                if "another night runs" not in str(error):
                    inside.surprises.append(str(error))

    return work


def slow(seed: int, delay_s: float) -> Callable[[], None]:
    """Waits for a random while, mostly short, now and then long."""
    chance = random.Random(seed)
    return lambda: time.sleep(chance.random() ** 6 * delay_s)


class Turns:
    """Lets one thread go on at a time, from pause to pause, in an order that a seed drew: every order may come, and the
    same seed gives the same one.
    """

    def __init__(self, seed: int):
        self._chance, self._back = random.Random(seed), threading.Semaphore(0)
        self._gates: dict[int, threading.Semaphore] = {}

    def pause(self) -> None:
        """Give the turn back, and wait for the next one."""
        if gate := self._gates.get(threading.get_ident()):
            self._back.release()
            gate.acquire()

    def run(self, *works: Callable[[], None]) -> None:
        gates = [threading.Semaphore(0) for _ in works]
        waiting, stays = set(range(len(works))), self._chance.random()  # how often the turn stays where it is

        def body(i: int) -> None:
            gates[i].acquire()
            self._gates[threading.get_ident()] = gates[i]
            works[i]()
            waiting.discard(i)
            self._back.release()

        threads = [threading.Thread(target=body, args=(i,)) for i in range(len(works))]
        for thread in threads:
            thread.start()
        now = 0
        while waiting:
            if now not in waiting or self._chance.random() > stays:
                now = self._chance.choice(sorted(waiting))
            gates[now].release()
            self._back.acquire()
        for thread in threads:
            thread.join()


def test_no_order_of_steps_lets_two_in(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Three who come, stay for some steps and go, twice each, in hundreds of orders."""
    won = 0
    for seed in range(200 * times):
        turns, inside, names = Turns(seed), Inside(), random.Random(seed)
        store = Memory(seed, turns.pause)
        monkeypatch.setattr("cluster.lock.time.sleep", lambda seconds, turns=turns: turns.pause())
        monkeypatch.setattr("cluster.lock.random.SystemRandom", lambda names=names: names)

        def night(store: Memory = store, turns: Turns = turns, inside: Inside = inside) -> None:
            for _ in range(2):
                try:
                    with Lock(store, "nightly", settle_s=0.0) as lock, inside:
                        turns.pause()
                        turns.pause()
                        lock.mine()
                except UserError as error:
                    if "another night runs" not in str(error):
                        inside.surprises.append(str(error))

        turns.run(night, night, night)
        assert inside.most == 1 and not inside.surprises, f"seed {seed}"
        assert store.files() == [], "nothing is left behind"
        won += inside.times
    assert 200 * times < won < 1200 * times, "somebody always gets it, and not everybody"


@pytest.mark.parametrize("seed", range(3))
def test_many_who_want_it_at_once_never_hold_it_together(seed: int) -> None:
    store, inside = Memory(seed, slow(seed, 0.01)), Inside()
    at_once(*(contend(store, inside, 100 * seed + i, tries=8) for i in range(8)))
    assert inside.most == 1 and inside.times > 1 and not inside.surprises
    assert store.files() == [], "nothing is left behind"


def test_a_listing_that_lags_behind_is_waited_for() -> None:
    store, inside = Memory(0, slow(0, 0.005), lag_s=0.01), Inside()
    at_once(*(contend(store, inside, i, tries=4, settle_s=0.02) for i in range(6)))
    assert inside.most == 1 and inside.times > 1 and not inside.surprises


def test_without_the_wait_a_listing_that_shows_nothing_new_lets_two_in() -> None:
    """What the tests above would see if the lock were wrong."""
    store, inside, together = Memory(0, lambda: None, lag_s=1.0, shown=0.0), Inside(), threading.Barrier(2)

    def night() -> None:
        with Lock(store, "nightly", settle_s=0.0), inside:
            together.wait(5)

    at_once(night, night)
    assert inside.most == 2


@pytest.mark.parametrize("seed", range(5))
def test_of_two_that_start_together_one_runs_and_one_is_refused(seed: int) -> None:
    store, got = Memory(seed, slow(seed, 0.005)), []
    together, over = threading.Barrier(2), threading.Event()

    def night() -> None:
        together.wait()
        try:
            with Lock(store, "nightly", settle_s=0.0):
                got.append("runs")
                over.wait(5)
        except UserError:
            got.append("refused")
            over.set()

    at_once(night, night)
    assert sorted(got) == ["refused", "runs"]


def test_in_an_object_store_it_is_the_same_lock(tmp_path: Path) -> None:
    """On a real S3 server, whose listings show at once what was written."""
    with s3_server() as server:
        store, inside = Storage(server.uri(tmp_path.name)), Inside()
        at_once(*(contend(store, inside, i, tries=2) for i in range(4)))
        assert inside.most == 1 and inside.times >= 1 and not inside.surprises
        with Lock(store, "nightly"), pytest.raises(UserError, match="another night runs"), Lock(store, "nightly"):
            pass
        assert store.files() == []


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "lock"))


def test_the_refused_one_is_told_who_holds_it_since_when(store: Storage) -> None:
    with Lock(store, "nightly"):
        with pytest.raises(UserError) as refused, Lock(store, "rollback"):
            pass
        [claim] = read_claims(store)
        assert holder(store) == claim
    text = str(refused.value)
    assert (
        f"another night runs\n  got nightly, process {os.getpid()} on {claim.process.host}, since {claim.since}" in text
    )
    with Lock(store, "rollback"):
        pass
    assert store.files() == [] and holder(store) is None


HOLD = """
import sys, time
from cluster.lock import Lock
from trainer.storage import Storage
with Lock(Storage(sys.argv[1]), "nightly", beat_every_s=0.02) as lock:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            lock.mine()
            print("mine", flush=True)
        except Exception as error:
            print(str(error).replace("\\n", " "), flush=True)
"""


@pytest.fixture
def other(store: Storage) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock; it says whether it still does for each line that it is given."""
    command = [sys.executable, "-c", HOLD, store.path]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def asked(process: "subprocess.Popen[str]") -> str:
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_a_killed_owners_lock_is_taken_over_at_once(store: Storage, other: "subprocess.Popen[str]") -> None:
    with pytest.raises(UserError, match=f"process {other.pid} on"), Lock(store, "nightly"):
        pass
    other.kill()
    other.wait()
    start = time.monotonic()
    with Lock(store, "nightly"):
        assert time.monotonic() - start < 1
        assert [claim.process.pid for claim in read_claims(store)] == [os.getpid()]
    assert store.files() == []


def test_a_killed_owner_whom_nobody_waits_for_is_dead_too(store: Storage, other: "subprocess.Popen[str]") -> None:
    other.kill()  # no wait(): a zombie keeps its number
    deadline = time.monotonic() + 5
    while not read_claims(store)[0].process.is_gone():
        assert time.monotonic() < deadline
    with Lock(store, "nightly"):
        pass


def test_a_number_that_another_process_got_is_not_the_owner(store: Storage, other: "subprocess.Popen[str]") -> None:
    [claim] = read_claims(store)
    assert not claim.process.is_gone()
    assert dataclasses.replace(claim.process, started=Process.this().started + "1").is_gone()
    of_other_host = dataclasses.replace(claim.process, started="1", boot="of another start of the machine")
    assert not of_other_host.is_gone(), "nobody here knows"
    assert not dataclasses.replace(claim.process, started="1", space="pid:[1]").is_gone(), "another container's number"


def test_a_stalled_owner_is_taken_over_after_its_heartbeat_and_must_not_write_when_it_wakes_up(
    store: Storage, other: "subprocess.Popen[str]"
) -> None:
    assert asked(other) == "mine\n"
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="another night runs"), Lock(store, "nightly", **FAST):
        pass  # not before the beat is old
    time.sleep(0.35)
    with Lock(store, "nightly", **FAST) as lock:
        other.send_signal(signal.SIGCONT)
        assert "another night took over" in asked(other) and f"process {os.getpid()} on" in asked(other)
        time.sleep(0.1)  # its heart goes on
        lock.mine()
    assert "another night took over" in asked(other), "also when the other night is over"
    with Lock(store, "nightly"):
        pass


def test_a_claim_that_was_taken_away_is_not_mine_although_nobody_holds_the_lock(store: Storage) -> None:
    with Lock(store, "nightly") as lock:
        lock.mine()
        store.delete(f"{lock.fence.id}.claim")
        with pytest.raises(UserError, match="(?s)another night took over.*no claim of this night is left"):
            lock.mine()


def test_a_beat_that_only_looks_old_is_watched(store: Storage, other: "subprocess.Popen[str]") -> None:
    """The other host's clock may be minutes behind ours: its beats are old, but they come."""
    [claim] = read_claims(store)
    elsewhere = dataclasses.replace(claim, process=dataclasses.replace(claim.process, boot="", pid=1))
    assert is_alive(store, elsewhere, beat_every_s=0.05, dead_after_s=0.0)
    other.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    assert not is_alive(store, elsewhere, beat_every_s=0.05, dead_after_s=0.0)


def test_an_owner_that_died_while_it_chose_is_in_nobodys_way(store: Storage) -> None:
    with Lock(store, "nightly"):
        [claim] = read_claims(store)
    dead = dataclasses.replace(claim, ticket=None, held=False, process=dataclasses.replace(claim.process, started="1"))
    store.write(f"{claim.id}.claim", json.dumps(dataclasses.asdict(dead)).encode())
    with Lock(store, "nightly"):
        pass
    assert store.files() == []


def test_one_that_chooses_is_waited_for(store: Storage) -> None:
    with Lock(store, "nightly"):
        [claim] = read_claims(store)
    name = f"{claim.id}.claim"
    choosing = dataclasses.replace(claim, ticket=None, held=False, at=time.time())
    store.write(name, json.dumps(dataclasses.asdict(choosing)).encode())
    threading.Timer(0.2, store.delete, [name]).start()
    start = time.monotonic()
    with Lock(store, "nightly"):
        assert time.monotonic() - start > 0.15


def test_a_lock_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="(?s)the lock cannot be taken.*same command again"):
        with Lock(Storage(str(tmp_path / "file" / "lock")), "nightly"):
            pass
