"""The contract of Exchange: one worker without a process group, two and three in real gloo processes.

Each worker runs all checks once and returns what it saw; the tests compare that with what the others must have sent.
"""

from dataclasses import dataclass
from typing import Any

import many
import numpy as np
import pytest
import torch

from embeddings.exchange import Exchange, LocalExchange

DTYPES = ["int64", "float32", "int8"]
WIDTHS = [None, 1, 5]  # None: 1-D
CASES = [(dtype, width, salt) for dtype in DTYPES for width in WIDTHS for salt in range(4)]
Array = np.ndarray[Any, Any]


def part(source: int, target: int, dtype: str, width: int | None, salt: int) -> Array:
    """What source sends to target: uneven, some parts empty; salt 3: nothing but worker 0's word to the last."""
    rng = np.random.default_rng([source, target, salt])
    rows = int(rng.integers(0, 4)) * int(rng.integers(0, 2)) if salt < 3 else 4 * (source == 0 and target > 0)
    return rng.integers(-128, 128, rows if width is None else (rows, width)).astype(dtype)


def scattered(rank: int) -> Array:
    """Floats whose float32 sum depends on the order of additions."""
    rng = np.random.default_rng(rank)
    return (rng.normal(size=1_000) * 10.0 ** rng.integers(-6, 6, 1_000)).astype(np.float32)


def gathered(rank: int, salt: int) -> Array:
    """Of different lengths; salt 0: nobody has any, 1: worker 0 has none, 2: only worker 0 has some."""
    length = {0: 0, 1: 7 * rank, 2: 5 * (rank == 0), 3: 3 + rank}[salt]
    return np.arange(length, dtype=np.int64) + 1_000 * rank


@dataclass
class Seen:
    """What one worker saw."""

    place: tuple[int, int]
    received: list[Array]
    from_strides: Array
    reduced: Array
    reduced_in_place: bool
    counts: Array
    gathered: list[list[Array]]


def checks(exchange: Exchange) -> Seen:
    floats, counts = torch.tensor(scattered(exchange.rank)), torch.tensor([exchange.rank + 1, 2**40])
    reduced = exchange.all_reduce(floats)
    return Seen(
        place=(exchange.rank, exchange.num_workers),
        received=[received(exchange, *case) for case in CASES],
        from_strides=received_columns(exchange),
        reduced=reduced.numpy(),
        reduced_in_place=reduced.data_ptr() == floats.data_ptr(),
        counts=exchange.all_reduce(counts).numpy(),
        gathered=[
            [t.numpy() for t in exchange.gather(torch.tensor(gathered(exchange.rank, salt)))] for salt in range(4)
        ],
    )


def received(exchange: Exchange, dtype: str, width: int | None, salt: int) -> Array:
    workers = range(exchange.num_workers)
    outgoing = [part(exchange.rank, target, dtype, width, salt) for target in workers]
    sizes = [len(part(source, exchange.rank, dtype, width, salt)) for source in workers]
    return exchange.all_to_all(torch.tensor(np.concatenate(outgoing)), [len(p) for p in outgoing], sizes).numpy()


def received_columns(exchange: Exchange) -> Array:
    """One row to each worker out of a transposed matrix."""
    matrix = torch.arange(3 * exchange.num_workers).view(3, -1) + 100 * exchange.rank
    each = [1] * exchange.num_workers
    return exchange.all_to_all(matrix.T, each, each).numpy()


@pytest.fixture(scope="module", params=[1, 2, 3])
def seen(request: pytest.FixtureRequest) -> list[Seen]:
    """What each worker saw, in worker order."""
    return [checks(LocalExchange())] if request.param == 1 else many.run(request.param, checks)


def test_workers_know_their_rank_and_number(seen: list[Seen]) -> None:
    assert [worker.place for worker in seen] == [(rank, len(seen)) for rank in range(len(seen))]


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_all_to_all_delivers_every_part_in_worker_order(seen: list[Seen], case: int) -> None:
    for rank, worker in enumerate(seen):
        expected = np.concatenate([part(source, rank, *CASES[case]) for source in range(len(seen))])
        received = worker.received[case]
        assert (received.dtype, received.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(received, expected)


def test_the_parts_sent_are_uneven_and_some_are_empty() -> None:
    sizes = {len(part(source, target, *case)) for case in CASES for source in range(3) for target in range(3)}
    assert {0, 1, 2, 3, 4} <= sizes  # or the test above would promise too little


def test_all_to_all_takes_tensors_of_any_memory_layout(seen: list[Seen]) -> None:
    for rank, worker in enumerate(seen):
        own_column = np.arange(3) * len(seen) + rank  # closed form of the transposed matrix
        assert np.array_equal(worker.from_strides, own_column + 100 * np.arange(len(seen))[:, None])


def test_all_reduce_is_the_sum_over_the_workers_in_place(seen: list[Seen]) -> None:
    inputs = np.stack([scattered(rank) for rank in range(len(seen))]).astype(np.float64)
    # float64 sum; float32 rounds each of at most two additions by 6e-8 of the largest term
    assert np.all(np.abs(seen[0].reduced - inputs.sum(axis=0)) <= 2e-7 * np.abs(inputs).sum(axis=0))
    assert all(worker.reduced_in_place for worker in seen)


def test_all_reduce_gives_the_same_bits_to_every_worker(seen: list[Seen]) -> None:
    assert len({worker.reduced.tobytes() for worker in seen}) == 1


def test_all_reduce_of_whole_numbers_is_exact(seen: list[Seen]) -> None:
    workers = len(seen)
    assert all(worker.counts.tolist() == [workers * (workers + 1) // 2, workers * 2**40] for worker in seen)


@pytest.mark.parametrize("salt", range(4))
def test_gather_gives_worker_0_every_tensor_and_the_others_an_empty_list(seen: list[Seen], salt: int) -> None:
    expected = [gathered(rank, salt) for rank in range(len(seen))]
    assert [tensor.tolist() for tensor in seen[0].gathered[salt]] == [tensor.tolist() for tensor in expected]
    assert all(worker.gathered[salt] == [] for worker in seen[1:])
