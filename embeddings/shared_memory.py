"""Workers of one host talk through memory that they share: several times faster than sockets, above all for the small
messages of which a step has many.

Each worker writes what it sends into a segment of its own and then raises its counter on the board; the others wait for
the counter and copy out their part. Two segments a worker are used in turns: whoever writes turn n + 2 has seen all
counters at n + 1, so everyone has read turn n. Segments are anonymous memory, reached through /proc: nothing is left
behind, however a worker ends.

Shape letters: W workers.
"""

import mmap
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor

from embeddings.exchange import CollectiveExchange

Bytes = NDArray[np.uint8]

_COUNTER, _SEGMENTS, _SIZES = 0, (1, 2), (3, 4)  # what a worker's line of the board tells: 8 numbers, a cache line
_FIRST_SIZE = 1 << 20
_SPINS = 2000  # of some microseconds, before waiting becomes sleeping
_LOOK_AFTER = 0.5  # seconds, between looks at whether those who are waited for still live


class SharedMemoryExchange(CollectiveExchange):
    """The workers of the process group that is already there, all on one host, with tensors on CPU. timeout: seconds
    after which a wait is given up with an error that names who is missing.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        super().__init__()
        self._timeout, self._turn = timeout, 0
        self._pids = self._told(os.getpid())
        size = 64 * self.num_workers
        board = os.memfd_create("daybreak") if self.rank == 0 else 0
        if self.rank == 0:
            os.ftruncate(board, size)
        self._board = _mapped(self._pids[0], self._told(board)[0], size).view(np.int64).reshape(-1, 8)
        self._fds, self._own = [-1, -1], [np.zeros(0, np.uint8)] * 2
        self._theirs: dict[tuple[int, int], Bytes] = {}
        for half in (0, 1):
            self._grow(half, _FIRST_SIZE)
        torch.distributed.barrier()

    def _told(self, number: int) -> list[int]:
        numbers = torch.zeros(self.num_workers, dtype=torch.int64)
        numbers[self.rank] = number
        return list(super().all_reduce(numbers).tolist())

    def _grow(self, half: int, size: int) -> None:
        """A larger segment for this half; only its next turn is in it, which nobody reads yet."""
        fd = os.memfd_create("daybreak")
        os.ftruncate(fd, size)
        self._own[half] = _mapped(os.getpid(), fd, size)
        self._board[self.rank, _SEGMENTS[half]], self._board[self.rank, _SIZES[half]] = fd, size
        if self._fds[half] >= 0:
            os.close(self._fds[half])
        self._fds[half] = fd

    def _segment(self, worker: int) -> Bytes:
        """What a worker wrote this turn: where its part for each worker ends, then the parts."""
        half = self._turn % 2
        size = int(self._board[worker, _SIZES[half]])
        known = self._theirs.get((worker, half))
        if known is None or known.size != size:
            fd = int(self._board[worker, _SEGMENTS[half]])
            self._theirs[worker, half] = known = _mapped(self._pids[worker], fd, size)
        return known

    def _publish(self, parts: Sequence[Bytes]) -> None:
        """Begin a turn: write one part a worker, or one that is for all."""
        self._turn += 1
        ends = np.cumsum([8 * (len(parts) + 1), *(part.size for part in parts)])
        if ends[-1] > self._own[self._turn % 2].size:
            self._grow(self._turn % 2, 2 * int(ends[-1]))
        own = self._own[self._turn % 2]
        own[: ends[0]].view(np.int64)[:] = ends
        for part, first, end in zip(parts, ends, ends[1:], strict=False):
            own[first:end] = part
        self._board[self.rank, _COUNTER] = self._turn

    def _wait(self) -> None:
        """Until everyone has written this turn."""
        counters_W = self._board[:, _COUNTER]
        start = looked = time.monotonic()
        spins = 0
        while (counters_W < self._turn).any():
            spins += 1
            if spins < _SPINS:
                os.sched_yield()
                continue
            time.sleep(0.0002)
            now = time.monotonic()
            if now - looked > _LOOK_AFTER:
                looked = now
                missing = [f"{w} (process {self._pids[w]})" for w in np.flatnonzero(counters_W < self._turn)]
                gone = [w for w in np.flatnonzero(counters_W < self._turn) if not _lives(self._pids[w])]
                if gone or now - start > self._timeout:
                    raise RuntimeError(f"lost the workers {', '.join(missing)} after {now - start:.0f} s of waiting")

    def _part(self, worker: int, number: int) -> Bytes:
        segment = self._segment(worker)
        first, end = segment[8 * number : 8 * number + 16].view(np.int64)
        return segment[first:end]

    def all_to_all(self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        sent, received = _bytes(send), send.new_empty(sum(receive_sizes), *send.shape[1:])
        ends = np.cumsum([0, *send_sizes]) * (sent.size // max(1, send.shape[0]))
        self._publish([sent[first:end] for first, end in zip(ends, ends[1:], strict=False)])
        self._wait()
        out, first = _bytes(received), 0
        for worker in range(self.num_workers):
            part = self._part(worker, self.rank)
            out[first : first + part.size] = part
            first += part.size
        return received

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._publish([_bytes(tensor)])
        self._wait()
        total = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        for worker in range(self.num_workers):  # in this order on every worker: the same bits
            total += torch.from_numpy(self._part(worker, 0)).view(tensor.dtype).view(tensor.shape)
        return total


def _bytes(tensor: Tensor) -> Bytes:
    """A tensor's memory (a copy's, when it is not contiguous)."""
    flat: Bytes = tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return flat


def _mapped(pid: int, fd: int, size: int) -> Bytes:
    with open(f"/proc/{pid}/fd/{fd}", "r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def connect(device: torch.device | None = None) -> CollectiveExchange:
    """The fastest exchange for the process group that is there. Collective."""
    on_cpu = device is None or device.type == "cpu"
    return SharedMemoryExchange() if on_cpu and _on_one_host() else CollectiveExchange(device)


def _on_one_host() -> bool:
    """Whether all workers can reach each other's memory. Collective."""
    able = platform.system() == "Linux" and platform.machine() == "x86_64"  # whose stores become visible in order
    host = Path("/proc/sys/kernel/random/boot_id")
    mine = (host.read_text(), os.readlink("/proc/self/ns/pid"), os.getuid()) if able else None
    everyone: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return None not in everyone and len(set(everyone)) == 1
