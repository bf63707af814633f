"""What can happen to a night on a cluster: each fault strikes, yields how many seconds it lasts, and is mended."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from faults.nights import Night
from ray.cluster_utils import Cluster
from small_disk import fill

_NET = f"127.{os.getpid() >> 8 & 127}.{os.getpid() & 255}"  # beside other clusters on this machine
HEAD, NODES = f"{_NET}.2", (f"{_NET}.3", f"{_NET}.4")  # nodes of one processor each; the head has none
AWAY_S, FULL_S, REFUSES_S, SLOW_S, HANGS_S = 15.0, 6.0, 5.0, 8.0, 120.0
SLOW_CALL_S = 0.3
_SOON = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 2000}


@dataclass
class World:
    """A cluster of two nodes that can be lost, the night that runs on it, and the small disk of its checkpoints."""

    night: Night
    disk: Path | None
    chance: random.Random
    driver: subprocess.Popen[bytes] | None = None
    starts: int = 0
    nodes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        head = {"num_cpus": 0, "node_ip_address": HEAD, "include_dashboard": False}
        system = _SOON | {"health_check_failure_threshold": 3}
        self.cluster = Cluster(True, head_node_args=head | {"_system_config": system, "object_store_memory": 10**8})
        self.session = Path(self.cluster.head_node.get_session_dir_path())
        for address in NODES:
            self.join(address)

    def join(self, address: str) -> None:
        """A node comes, or comes back."""
        self.nodes[address] = self.cluster.add_node(num_cpus=1, node_ip_address=address, object_store_memory=10**8)

    def start(self) -> None:
        """Give the command, as cron or systemd would."""
        self.driver = self.night.start(RAY_ADDRESS=self.cluster.address)
        self.starts += 1

    def workers(self) -> list[psutil.Process]:
        """Those that have made a step of late, by their ages."""
        diaries = (self.night.folder / "faults" / "steps").iterdir()
        newest = [path for path in diaries if time.time() - path.stat().st_mtime < 3]
        found = []
        for path in newest:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(path.stem))
                found += [process] if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED) else []
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def weather(self, **told: Any) -> None:
        """How the storage is from now on; nothing: well."""
        path = self.night.folder / "faults" / "storage.json"
        if told:
            path.with_suffix(".new").write_text(json.dumps(told))
            os.replace(path.with_suffix(".new"), path)
        else:
            path.unlink(missing_ok=True)

    def end(self) -> None:
        """Stop all that was started."""
        if self.driver and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()


Fault = Callable[[World], Iterator[float]]


def worker_killed(world: World) -> Iterator[float]:
    """SIGKILL, as the kernel does when memory is out."""
    world.chance.choice(world.workers()).kill()
    yield from ()


def worker_hangs(world: World) -> Iterator[float]:
    """SIGSTOP: alive, and silent. It would wake up after a while; by then it must be gone."""
    worker = world.chance.choice(world.workers())
    worker.suspend()
    yield HANGS_S
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.resume()


def node_killed(world: World) -> Iterator[float]:
    """The node of a worker loses its power, with all that runs on it, and comes back later."""
    raylet = world.chance.choice(world.workers()).ppid()
    address = next(a for a, node in world.nodes.items() if raylet in _raylets(node))
    on_it = psutil.Process(raylet).children(recursive=True)
    world.cluster.remove_node(world.nodes.pop(address), allow_graceful=False)
    for process in on_it:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    yield AWAY_S
    world.join(address)


def _raylets(node: Any) -> list[int]:
    return [info.process.pid for info in node.all_processes.get("raylet", [])]


def driver_killed(world: World) -> Iterator[float]:
    """SIGKILL of the command itself; all that it started is left as it is."""
    if world.driver:
        with contextlib.suppress(ProcessLookupError):
            os.kill(world.driver.pid, signal.SIGKILL)
    yield from ()


def disk_full(world: World) -> Iterator[float]:
    """Not a kilobyte is left for the checkpoints, until somebody makes room."""
    assert world.disk is not None
    filler = fill(world.disk, leave_kib=0)
    yield FULL_S
    filler.unlink()


def storage_refuses(world: World) -> Iterator[float]:
    """Every call to the storage of the checkpoints fails."""
    world.weather(refuse=True)
    yield REFUSES_S
    world.weather()


def storage_slow(world: World) -> Iterator[float]:
    """Every call to the storage of the checkpoints takes its time."""
    world.weather(slow_s=SLOW_CALL_S)
    yield SLOW_S
    world.weather()


FAULTS: dict[str, Fault] = {
    "worker killed": worker_killed,
    "worker hangs": worker_hangs,
    "node killed": node_killed,
    "driver killed": driver_killed,
    "disk full": disk_full,
    "storage refuses": storage_refuses,
    "storage slow": storage_slow,
}
NEEDS_WORKERS = {"worker killed", "worker hangs", "node killed"}  # and starts new ones
STARTS_WORKERS = NEEDS_WORKERS | {"driver killed"}
MORNINGS = {"driver killed", "storage refuses", "storage slow", "disk full"}  # may strike when a day was just committed
