"""How many workers a round begins with, and when a node is taken for lost; no Ray is started."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from trainer import nodes
from trainer.errors import ClusterError

CPU = {"CPU": 1.0}


class Offered:
    """A cluster that has room for `everything` workers, of which `free` gives what is free at each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, everything: int, *free: int):
        self._free, self.looks = free, 0
        monkeypatch.setattr(nodes, "free_workers", self._look)
        monkeypatch.setattr(nodes, "_all_workers", lambda needs: everything)
        monkeypatch.setattr(nodes, "_LOOK_EVERY_S", 0.01)

    def _look(self, needs: Any) -> int:
        self.looks += 1
        return self._free[min(self.looks, len(self._free)) - 1]


def wait(least: int, most: int, wait_s: float = 5.0, settle_s: float = 0.2) -> tuple[int, list[str]]:
    said: list[str] = []
    return nodes.wait_for_workers(least, most, CPU, wait_s, settle_s, said.append), said


def test_a_round_begins_at_once_with_as_many_as_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Offered(monkeypatch, 8, 8)
    assert wait(1, 4) == (4, []) and cluster.looks == 1


def test_it_begins_at_once_with_fewer_when_the_nodes_have_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Offered(monkeypatch, 2, 2)
    assert wait(1, 4) == (2, []) and cluster.looks == 1


def test_what_the_round_before_had_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Offered(monkeypatch, 4, 1, 1, 3, 4)
    assert wait(1, 4) == (4, [])


def test_what_others_use_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, begun = Offered(monkeypatch, 4, 3), time.monotonic()
    assert wait(1, 4, settle_s=0.2) == (3, []) and cluster.looks > 1
    assert 0.2 <= time.monotonic() - begun < 2


def test_too_few_are_waited_for_and_what_is_missing_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Offered(monkeypatch, 2, *[1] * 60, 2)
    assert wait(2, 4) == (2, ["waits for 2 CPUs, 1 is there"])


def test_the_wait_has_an_end_that_tells_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    Offered(monkeypatch, 0, 0)
    with pytest.raises(ClusterError, match="^waits for 2 CPUs, 0 are there after 1 s: start more nodes, or lower"):
        wait(2, 2, wait_s=1.0)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_node_is_lost_when_it_does_not_answer_although_ray_says_that_it_lives(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        closed = gone.getsockname()[1]
    alive = [
        {"NodeID": name, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": p}
        for name, p in [("a", port), ("b", closed)]
    ]
    monkeypatch.setattr(nodes, "_alive", lambda: alive)
    assert nodes.lost_among({"a", "b", "c"}) == {"b", "c"}, "c is not known to Ray any more"
    assert nodes.away_from_the_dead() == {"ray.io/node-id": "!in(b)"}
    assert nodes._fit({"a": {"CPU": 2.5}, "b": {"CPU": 4.0}}, CPU) == 2, "no half workers, none on a lost node"
    assert nodes._fit({"a": {"CPU": 8.0}}, {"GPU": 1.0}) == 0


def test_a_number_that_belongs_to_another_process_by_now_is_left_alone() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        nodes._kill([other.pid, os.getpid()])
        time.sleep(0.2)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
