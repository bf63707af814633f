"""What every exchange must do: one script of calls, on one worker alone, on threads, on gloo processes and on processes
that share memory.

The oracle is numpy on one worker, which has what all of them bring: it comes from seeds.
"""

import platform
import subprocess
from collections.abc import Callable
from typing import Any

import many
import numpy as np
import pytest
import threads
import torch

from embeddings.exchange import Exchange, LocalExchange, smallest
from embeddings.shared_memory import SharedMemoryExchange, connect

Array = np.ndarray[Any, Any]
CALLS = 40
DTYPES = [torch.int64, torch.float32, torch.bfloat16, torch.int8]


def sizes(call: int, workers: int) -> Array:
    """How many rows each worker sends to each: some nothing, some to nobody."""
    random = np.random.default_rng([call, workers])
    return random.integers(0, 4, (workers, workers)) * random.integers(0, 2, (workers, 1))


def brought(call: int, rank: int, rows: int) -> Array:
    """Small whole numbers: exact in every type, and so are their sums."""
    shape = (rows,) if call % 3 == 0 else (rows, call % 3)
    return np.random.default_rng([call, rank, 7]).integers(-8, 8, shape)


def items(call: int, rank: int, workers: int) -> Array:
    """Two words each; the first has few values, or is the same for all. No two are equal."""
    random = np.random.default_rng([call, 3])
    first = random.choice([0, 1, 2**62, -1, -(2**63)], 60) if call % 2 else np.zeros(60, np.int64)
    order = np.stack([first, (random.permutation(60) - 30) * 2**57 + call])
    return order[:, rank::workers] if call % 5 else order[:, : 60 if rank == 0 else 0]


def script(exchange: Exchange) -> list[Any]:
    """What one worker gets of each call."""
    rank, workers, found = exchange.rank, exchange.num_workers, []
    for call in range(CALLS):
        dtype, rows = DTYPES[call % 4], sizes(call, workers)
        send = torch.tensor(brought(call, rank, int(rows[rank].sum()))).to(dtype)
        kept = send.clone()
        received = exchange.all_to_all(send, rows[rank].tolist(), rows[:, rank].tolist())
        assert torch.equal(send, kept) and received.dtype == dtype
        total = exchange.all_reduce(torch.tensor(brought(call, rank, 5)).to(dtype if call % 4 < 2 else torch.float64))
        gathered = exchange.gather(torch.tensor(brought(3 * call, rank, call * rank % 5)))
        chosen = smallest(torch.from_numpy(items(call, rank, workers)), call % 62, exchange)
        found.append((received.float().numpy(), total.numpy(), [part.numpy() for part in gathered], chosen.numpy()))
    return found


def truth(rank: int, workers: int) -> list[Any]:
    """The same from all that the workers bring."""
    found = []
    for call in range(CALLS):
        rows = sizes(call, workers)
        sent = [np.split(brought(call, w, int(rows[w].sum())), rows[w].cumsum()[:-1])[rank] for w in range(workers)]
        total = sum(brought(call, w, 5) for w in range(workers))
        gathered = [brought(3 * call, w, call * w % 5) for w in range(workers)] if rank == 0 else []
        everyone = np.concatenate([items(call, w, workers) for w in range(workers)], axis=1).view(np.uint64)
        cut = {tuple(item) for item in sorted(map(tuple, everyone.T.tolist()))[: call % 62]}
        mine = [tuple(item) in cut for item in items(call, rank, workers).view(np.uint64).T.tolist()]
        found.append((np.concatenate(sent), total, gathered, np.array(mine, bool)))
    return found


def check(seen: list[list[Any]]) -> None:
    for rank, found in enumerate(seen):
        for (received, total, gathered, chosen), expected in zip(found, truth(rank, len(seen)), strict=True):
            np.testing.assert_array_equal(received, expected[0])
            np.testing.assert_array_equal(total, expected[1])
            assert len(gathered) == len(expected[2]) and all(map(np.array_equal, gathered, expected[2]))
            np.testing.assert_array_equal(chosen, expected[3])


def test_one_worker_alone_keeps_the_contract() -> None:
    check([script(LocalExchange())])


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_threads_keep_the_contract(workers: int) -> None:
    check(threads.run(workers, script))


@pytest.mark.slow
def test_gloo_processes_keep_the_contract() -> None:
    check(many.run(3, script))


def script_through_memory(_: Exchange) -> list[Any]:
    return script(SharedMemoryExchange())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_processes_that_share_memory_keep_the_contract(workers: int) -> None:
    check(many.run(workers, script_through_memory))


def larger_and_larger(_: Exchange) -> list[bool]:
    exchange, found = SharedMemoryExchange(), []
    for rows in (1, 400_000, 3, 1_000_000, 2_000_000, 5, 0, 700_000):  # a segment begins with a megabyte
        sent = torch.arange(2 * rows) * (exchange.rank + 1)
        received = exchange.all_to_all(sent, [rows, rows], [rows, rows])
        mine = torch.arange(2 * rows).view(2, rows)[exchange.rank]
        found.append(torch.equal(received, torch.cat([mine, 2 * mine])))
        found.append(torch.equal(exchange.all_reduce(sent), 3 * torch.arange(2 * rows)))
    return found


@pytest.mark.slow
def test_messages_of_any_size_go_through_shared_memory() -> None:
    assert all(map(all, many.run(2, larger_and_larger)))


def wait_in_vain(exchange: Exchange) -> str:
    """Worker 1 is late for the first call; for the second it looks as if its process had ended."""
    shared, texts = SharedMemoryExchange(timeout=1.0), []
    ended = subprocess.Popen(["true"])
    ended.wait()
    if exchange.rank == 0:
        for pid in (shared._pids[1], ended.pid):
            shared._pids[1] = pid
            with pytest.raises(RuntimeError) as raised:
                shared.all_reduce(torch.zeros(1))
            texts.append(f"{raised.value} ({pid})")
    exchange.all_reduce(torch.zeros(1))
    return "\n".join(texts)


@pytest.mark.slow
def test_who_is_late_or_gone_is_named() -> None:
    late, gone = many.run(2, wait_in_vain)[0].splitlines()
    for text, seconds in ((late, "1 s"), (gone, "s")):
        pid = text.rpartition("(")[2].rstrip(")")
        assert text.startswith(f"lost the workers 1 (process {pid}) after") and seconds in text


def connected(exchange: Exchange) -> list[str]:
    kinds = [type(connect()).__name__, type(connect(torch.device("meta"))).__name__]
    with pytest.MonkeyPatch.context() as patch:
        if exchange.rank:
            patch.setattr(platform, "machine", lambda: "riscv")  # one that cannot is enough
        return [*kinds, type(connect()).__name__]


@pytest.mark.slow
def test_workers_of_one_host_are_connected_through_memory_and_others_through_the_group() -> None:
    other = "CollectiveExchange"
    assert many.run(2, connected) == [["SharedMemoryExchange", other, other]] * 2


@pytest.mark.parametrize(
    "misfit",
    [
        lambda exchange: exchange.all_reduce(torch.zeros(exchange.rank + 1)),
        lambda exchange: exchange.all_reduce(torch.zeros(1)) if exchange.rank else None,
        lambda exchange: exchange.all_reduce(torch.zeros(1)) if exchange.rank == 0 else None,
        lambda exchange: exchange.all_to_all(torch.zeros(3), [1, 1, 1], [1, 1, 2]),
        lambda exchange: exchange.gather(torch.zeros(1)) if exchange.rank else exchange.all_reduce(torch.zeros(1)),
    ],
)
def test_threads_refuse_calls_that_do_not_fit_together(misfit: Callable[[Exchange], Any]) -> None:
    with pytest.raises(AssertionError, match="same call|not sent"):
        threads.run(3, misfit)


def test_a_worker_that_fails_stops_the_others_and_its_error_is_raised() -> None:
    def fail(exchange: Exchange) -> None:
        exchange.all_reduce(torch.zeros(1))
        assert exchange.rank != 1, "one of three"
        exchange.all_reduce(torch.zeros(1))

    with pytest.raises(AssertionError, match="one of three"):
        threads.run(3, fail)
