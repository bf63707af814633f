"""Workers as threads of this process, one of which runs at a time: a collective takes microseconds.

Each worker runs until its next collective, then the next one does: every run is the same, and sums are in worker order.
ThreadExchange keeps the contract of embeddings.exchange.Exchange and holds the workers to it: calls that do not fit
together fail at once, where a process group would hang or mix up memory.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_PATIENCE_S = 120.0  # a worker whose turn does not come in this time waits for one that hangs
Combine = Callable[[list[Any]], Sequence[Any]]


class _Stopped(Exception):
    """Another worker failed."""


class _Meeting:
    """Where the workers meet. Each brings something; the last to come combines it to what each of them takes away."""

    def __init__(self, num_workers: int):
        self._brought: list[Any] = [None] * num_workers
        self._taken: Sequence[Any] = ()
        self._turns = [threading.Semaphore(0) for _ in range(num_workers)]
        self.stopped = False

    def meet(self, rank: int, call: tuple[Any, ...], value: Any, combine: Combine) -> Any:
        self._brought[rank] = (call, value)
        if rank == len(self._turns) - 1:
            calls = {come and come[0] for come in self._brought}
            assert len(calls) == 1, f"the workers do not make the same call: {calls}"
            self._taken = combine([value for _, value in self._brought])
            self._brought = [None] * len(self._turns)
        self.pass_on(rank)
        self.wait(rank)
        return self._taken[rank]

    def wait(self, rank: int) -> None:
        assert self._turns[rank].acquire(timeout=_PATIENCE_S), "a worker hangs"
        if self.stopped:
            raise _Stopped

    def pass_on(self, rank: int) -> None:
        self._turns[(rank + 1) % len(self._turns)].release()


class ThreadExchange:
    """Worker `rank` of those that share a meeting. Like gloo's, all_reduce leaves the sum in the tensor itself."""

    def __init__(self, rank: int, num_workers: int, meeting: _Meeting):
        self.rank, self.num_workers, self._meeting = rank, num_workers, meeting

    def all_to_all(self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        assert len(send_sizes) == len(receive_sizes) == self.num_workers and sum(send_sizes) == send.shape[0]
        call = ("all_to_all", send.dtype, send.shape[1:], send.device)
        value = (send.detach().split(list(send_sizes)), list(receive_sizes))
        return self._meeting.meet(self.rank, call, value, _all_to_all)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        call = ("all_reduce", tensor.dtype, tensor.shape, tensor.device)
        return self._meeting.meet(self.rank, call, tensor, _all_reduce)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        call = ("gather", tensor.dtype, tensor.dim(), tensor.device)
        return self._meeting.meet(self.rank, call, tensor, _gather)


def _all_to_all(brought: list[Any]) -> list[Tensor]:
    taken = []
    for rank, (_, receive_sizes) in enumerate(brought):
        parts = [parts[rank] for parts, _ in brought]
        assert [part.shape[0] for part in parts] == receive_sizes, "a worker expects what was not sent"
        taken.append(torch.cat(parts))
    return taken


def _all_reduce(brought: list[Tensor]) -> list[Tensor]:
    total = sum(brought[1:], start=brought[0].clone())
    return [tensor.copy_(total) for tensor in brought]


def _gather(brought: list[Tensor]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in brought], *([] for _ in brought[1:])]


def run(num_workers: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(exchange, *args) in num_workers threads and return the results in worker order."""
    meeting = _Meeting(num_workers)
    results: list[Any] = [None] * num_workers
    errors: list[BaseException] = []

    def enter(rank: int) -> None:
        try:
            if rank:
                meeting.wait(rank)
            results[rank] = function(ThreadExchange(rank, num_workers, meeting), *args)
            meeting.meet(rank, ("end",), None, list)
        except BaseException as error:  # of all errors the first is the cause
            errors.append(error)
            meeting.stopped = True
        meeting.pass_on(rank)

    threads = [threading.Thread(target=enter, args=(rank,), daemon=True) for rank in range(1, num_workers)]
    for thread in threads:
        thread.start()
    enter(0)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
