"""Rows of one width: taken, grown, read and updated, against plain dicts and the optimizer's own step."""

import random

import pytest
import torch

from embeddings.kernels import FbgemmRows, RowKernel, TorchRows
from embeddings.optim import RowwiseAdagrad
from embeddings.pool import RowPool

DIM = 4
OPTIMIZER = RowwiseAdagrad(lr=0.5)


@pytest.fixture(params=[FbgemmRows, TorchRows])
def pool(request: pytest.FixtureRequest) -> RowPool:
    """An empty pool of capacity 2."""
    kernel: type[RowKernel] = request.param
    return RowPool(DIM, 2, OPTIMIZER, torch.device("cpu"), kernel)


def weights(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def test_taken_rows_are_fresh_and_hold_their_weights_and_state(pool: RowPool) -> None:
    first = pool.take(weights(2, seed=1), torch.tensor([1.0, 2.0]))
    second = pool.take(weights(3, seed=2), torch.tensor([3.0, 4.0, 5.0]))
    rows = torch.cat([first, second])
    assert rows.dtype == torch.int64 and rows.tolist() == [0, 1, 2, 3, 4] and pool.num_rows == 5
    assert torch.equal(pool.lookup(rows), torch.cat([weights(2, seed=1), weights(3, seed=2)]))
    assert pool.state(rows).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_taking_no_rows_changes_nothing(pool: RowPool) -> None:
    assert pool.take(weights(0), torch.zeros(0)).tolist() == []
    assert (pool.num_rows, pool.capacity_rows) == (0, 2)


def test_capacity_at_least_doubles_and_only_when_it_must(pool: RowPool) -> None:
    capacities = []
    for count in (2, 1, 1, 1, 40):
        pool.take(weights(count), torch.zeros(count))
        capacities.append(pool.capacity_rows)
    assert capacities == [2, 4, 4, 8, 45]


def test_memory_is_the_weights_and_one_number_of_state_a_row(pool: RowPool) -> None:
    assert pool.memory_bytes == 2 * (DIM * 4 + 4)  # float32


def test_random_takes_and_updates_equal_a_dict_of_rows_while_the_pool_grows(pool: RowPool) -> None:
    draw, twin = random.Random(0), dict[int, tuple[torch.Tensor, torch.Tensor]]()
    for step in range(40):
        count = draw.choice([0, 1, 5])
        taken = pool.take(weights(count, seed=step), torch.full((count,), float(step)))
        twin.update(
            {row: (weights(count, seed=step)[i], torch.tensor(float(step))) for i, row in enumerate(taken.tolist())}
        )
        touched = draw.sample(sorted(twin), k=draw.randrange(len(twin) + 1))
        grad = weights(len(touched), seed=1_000 + step)
        pool.update(torch.tensor(touched, dtype=torch.int64), grad)
        for row, g in zip(touched, grad, strict=True):
            state, move = OPTIMIZER.step(twin[row][1].view(1), g.view(1, -1))
            twin[row] = (twin[row][0] - move[0], state[0])
    rows = torch.tensor(sorted(twin))
    # the same float32 arithmetic a row at a time; a batch may add a row's four squares in another order
    torch.testing.assert_close(
        pool.lookup(rows), torch.stack([twin[r][0] for r in rows.tolist()]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(pool.state(rows), torch.stack([twin[r][1] for r in rows.tolist()]), rtol=1e-6, atol=0)


def test_an_update_leaves_every_other_row_and_its_state_bit_for_bit(pool: RowPool) -> None:
    rows = pool.take(weights(9), torch.arange(9.0))
    before, state = pool.lookup(rows), pool.state(rows)
    pool.update(rows[[6, 2]], weights(2, seed=3))
    others = [0, 1, 3, 4, 5, 7, 8]
    assert torch.equal(pool.lookup(rows)[others], before[others])
    assert torch.equal(pool.state(rows)[others], state[others])


def test_an_unknown_row_reads_zeros_beside_known_ones(pool: RowPool) -> None:
    assert torch.equal(pool.lookup(torch.tensor([-1, -1])), torch.zeros(2, DIM))  # no row is taken yet
    pool.take(weights(3), torch.zeros(3))
    expected = torch.stack([weights(3)[2], torch.zeros(DIM), weights(3)[0]])
    assert torch.equal(pool.lookup(torch.tensor([2, -1, 0])), expected)


def test_an_unknown_row_reads_zeros_whatever_the_known_rows_hold(pool: RowPool) -> None:
    pool.take(torch.full((1, DIM), torch.inf), torch.zeros(1))
    assert torch.equal(pool.lookup(torch.tensor([-1])), torch.zeros(1, DIM))


def test_rows_looked_up_are_a_copy(pool: RowPool) -> None:
    rows = pool.take(weights(2), torch.zeros(2))
    pool.lookup(rows).zero_()
    assert torch.equal(pool.lookup(rows), weights(2))
