"""Pooling against a plain loop over rows and ids, and its gradient against finite differences."""

import itertools

import pytest
import torch
from torch import Tensor

from embeddings.client import Pulled
from embeddings.pooling import pool

DIM, NUM_DISTINCT = 4, 6
LENGTHS = [2, 0, 1, 4, 0, 8, 0]  # powers of two: a mean of small whole numbers is exact in float32


def pulled_of(rows_UD: Tensor, index: Tensor, lengths: list[int]) -> Pulled:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return Pulled({DIM: rows_UD}, {"history": index}, {"history": offsets}, {})


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def example() -> tuple[Tensor, Tensor]:
    """Distinct rows, and the places in them of a batch of LENGTHS; ids repeat within a list and across lists."""
    index = torch.randint(NUM_DISTINCT, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return whole_numbers(NUM_DISTINCT, DIM, seed=0), index


def loop_pool(rows_UD: Tensor, index: Tensor, lengths: list[int], mean: bool, keep: list[float]) -> Tensor:
    pooled, first = torch.zeros(len(lengths), DIM), 0
    for b, length in enumerate(lengths):
        for n in range(first, first + length):
            pooled[b] += keep[b] * rows_UD[index[n]] / (length if mean else 1)
        first += length
    return pooled


@pytest.mark.parametrize("mean", [False, True])
def test_pool_equals_a_plain_loop_with_zeros_for_empty_lists(mean: bool) -> None:
    rows_UD, index = example()
    pooled = pool(pulled_of(rows_UD, index, LENGTHS), "history", DIM, mean=mean)
    assert torch.equal(pooled, loop_pool(rows_UD, index, LENGTHS, mean, [1.0] * len(LENGTHS)))  # exact: see LENGTHS
    assert torch.equal(pooled[1], torch.zeros(DIM))


@pytest.mark.parametrize("mean", [False, True])
def test_pool_equals_a_plain_loop_on_random_lists(mean: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(0, 30, (100,), generator=generator).tolist()
    rows_UD, index = torch.randn(50, DIM, generator=generator), torch.randint(50, (sum(lengths),), generator=generator)
    pooled = pool(pulled_of(rows_UD, index, lengths), "history", DIM, mean=mean)
    # float32 sums of up to 30 numbers in another order
    torch.testing.assert_close(pooled, loop_pool(rows_UD, index, lengths, mean, [1.0] * 100), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [False, True])
def test_rows_not_kept_pool_to_zeros_and_the_others_as_without_a_mask(mean: bool) -> None:
    rows_UD, index = example()
    keep = [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    pulled = pulled_of(rows_UD, index, LENGTHS)
    pooled = pool(pulled, "history", DIM, mean=mean, keep_B=torch.tensor(keep))
    assert torch.equal(pooled, loop_pool(rows_UD, index, LENGTHS, mean, keep))
    assert torch.equal(pooled, pool(pulled, "history", DIM, mean=mean) * torch.tensor(keep).unsqueeze(1))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("keep", [None, [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
def test_the_gradient_of_the_rows_equals_finite_differences(mean: bool, keep: list[float] | None) -> None:
    rows_UD, index = example()
    coefficients, keep_B = whole_numbers(len(LENGTHS), DIM, seed=3), None if keep is None else torch.tensor(keep)

    def value(rows: Tensor) -> Tensor:
        return (pool(pulled_of(rows, index, LENGTHS), "history", DIM, mean=mean, keep_B=keep_B) * coefficients).sum()

    leaf = rows_UD.clone().requires_grad_()
    value(leaf).backward()
    bumps = torch.eye(rows_UD.numel()).view(-1, NUM_DISTINCT, DIM)
    differences = torch.stack([(value(rows_UD + bump) - value(rows_UD - bump)) / 2 for bump in bumps])
    # pooling is linear and all numbers are small multiples of 1/8, so a difference of step 1 is the exact gradient
    assert leaf.grad is not None and torch.equal(leaf.grad, differences.view(NUM_DISTINCT, DIM))


def test_rows_of_dropped_lists_get_no_gradient() -> None:
    leaf = torch.ones(3, DIM, requires_grad=True)
    pulled = pulled_of(leaf, torch.tensor([0, 1, 2, 1]), [2, 2])
    pool(pulled, "history", DIM, mean=True, keep_B=torch.tensor([1.0, 0.0])).sum().backward()
    assert leaf.grad is not None and leaf.grad[:, 0].tolist() == [0.5, 0.5, 0.0]  # closed form: 1 / length, or nothing


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_a_batch_without_ids_pools_to_zeros_and_backward_runs(lengths: list[int], mean: bool) -> None:
    leaf = torch.zeros(0, DIM, requires_grad=True)
    pooled = pool(pulled_of(leaf, torch.zeros(0, dtype=torch.int64), lengths), "history", DIM, mean=mean)
    assert torch.equal(pooled, torch.zeros(len(lengths), DIM))
    pooled.sum().backward()
    assert leaf.grad is not None and leaf.grad.shape == (0, DIM)


def test_features_of_one_width_add_their_gradients_in_the_shared_rows() -> None:
    leaf, none = torch.ones(2, DIM, requires_grad=True), torch.tensor([0, 1])
    pulled = Pulled({DIM: leaf}, {"a": none, "b": none[1:]}, {"a": torch.tensor([0, 2]), "b": torch.tensor([0, 1])}, {})
    (pool(pulled, "a", DIM, mean=False) + 10 * pool(pulled, "b", DIM, mean=True)).sum().backward()
    assert leaf.grad is not None and leaf.grad[:, 0].tolist() == [1.0, 11.0]  # closed form
