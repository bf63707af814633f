"""The contract of Exchange: one worker without a process group, two and three in real gloo processes.

Each worker runs all checks once and returns what it saw; the tests compare that with what the others must have sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import many
import numpy as np
import pytest
import torch

from embeddings.exchange import Exchange, LocalExchange, smallest

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


# Items to choose from: all[:, i] is item i as words of 64 bits, of which the first decides; each has one worker.


def wide(rng: np.random.Generator) -> tuple[Array, int]:
    """One word, any bits; every worker has some."""
    return rng.integers(-(2**63), 2**63, (1, 500)), 0


def tied(rng: np.random.Generator) -> tuple[Array, int]:
    """Few first words, and second words that agree in most of their digits: the last digit decides."""
    second = (rng.permutation(1 << 11)[:500] << 3) + (77 << 32)
    return np.stack([rng.integers(-2, 3, 500), second]), 0


def three(rng: np.random.Generator) -> tuple[Array, int]:
    """Three words, the first two all the same: -1, the largest there is."""
    return np.stack([np.full(300, -1), np.zeros(300, np.int64), rng.permutation(300) - 150]), 0


def extremes(rng: np.random.Generator) -> tuple[Array, int]:
    """Unsigned: 0 is the least, -1 the most. Some workers have no item."""
    return np.array([[0, -1, 1, 2**63 - 1, -(2**63), 2**16, 2**32, 2**48, -(2**48)]]), 1


def lonely(rng: np.random.Generator) -> tuple[Array, int]:
    """All on the last worker."""
    return np.stack([rng.integers(0, 9, 100), rng.permutation(100)]), 2


def nobody(rng: np.random.Generator) -> tuple[Array, int]:
    return np.zeros((2, 0), np.int64), 0


HOW_MANY = [0, 1, 2, 7, 99, 100, 101, 299, 300, 499, 500, 501, 10_000]
SMALLEST = [(make, many) for make in (wide, tied, three, extremes, lonely, nobody) for many in HOW_MANY]
MakeItems = Callable[[np.random.Generator], tuple[Array, int]]


def items(make: MakeItems, num_workers: int) -> tuple[Array, Array]:
    """All items, and whose each is."""
    rng = np.random.default_rng(7)
    every, unfair = make(rng)
    owner = rng.integers(0, num_workers, every.shape[1])
    return every, [owner, owner * 0, owner * 0 + num_workers - 1][unfair]


def chosen(exchange: Exchange, make: MakeItems, how_many: int) -> Array:
    every, owner = items(make, exchange.num_workers)
    return smallest(torch.from_numpy(every[:, owner == exchange.rank]), how_many, exchange).numpy()


@dataclass
class Seen:
    """What one worker saw."""

    place: tuple[int, int]
    received: list[Array]
    from_strides: Array
    reduced: Array
    counts: Array
    gathered: list[list[Array]]
    chosen: list[Array]


def checks(exchange: Exchange) -> Seen:
    floats, counts = torch.tensor(scattered(exchange.rank)), torch.tensor([exchange.rank + 1, 2**40])
    return Seen(
        place=(exchange.rank, exchange.num_workers),
        received=[received(exchange, *case) for case in CASES],
        from_strides=received_columns(exchange),
        reduced=exchange.all_reduce(floats).numpy(),
        counts=exchange.all_reduce(counts).numpy(),
        gathered=[
            [t.numpy() for t in exchange.gather(torch.tensor(gathered(exchange.rank, salt)))] for salt in range(4)
        ],
        chosen=[chosen(exchange, *case) for case in SMALLEST],
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


def test_all_reduce_is_the_sum_over_the_workers(seen: list[Seen]) -> None:
    inputs = np.stack([scattered(rank) for rank in range(len(seen))]).astype(np.float64)
    # float64 sum; float32 rounds each of at most two additions by 6e-8 of the largest term
    assert np.all(np.abs(seen[0].reduced - inputs.sum(axis=0)) <= 2e-7 * np.abs(inputs).sum(axis=0))


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


@pytest.mark.parametrize("case", range(len(SMALLEST)), ids=[f"{make.__name__}-{many}" for make, many in SMALLEST])
def test_smallest_marks_the_head_of_a_numpy_sort_over_all_workers(seen: list[Seen], case: int) -> None:
    make, how_many = SMALLEST[case]
    every, owner = items(make, len(seen))
    head = np.lexsort(every.astype(np.uint64)[::-1])[:how_many]  # lexsort's last word decides
    expected = np.isin(np.arange(every.shape[1]), head)
    for rank, worker in enumerate(seen):
        assert worker.chosen[case].dtype == np.bool_
        assert np.array_equal(worker.chosen[case], expected[owner == rank])


def test_items_to_choose_from_are_unequal_and_tie_in_their_first_words() -> None:
    for make, _ in SMALLEST:
        every, _ = items(make, 2)
        assert np.unique(every, axis=1).shape == every.shape
    assert len(set(items(tied, 2)[0][0])) == 5  # or the test above would promise too little
