"""Pooling against plain loops over rows and ids; its gradients against embedding_bag's and finite differences."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from embeddings.client import Block
from embeddings.jagged import Jagged
from embeddings.pooling import Pooling, pool, sequence, statistics

DIM, NUM_DISTINCT = 4, 6
Lists = list[list[int]]
NOTHING: Any = None  # the block's way back to the owners, which pooling does not look at


def jagged_of(lists: Lists) -> Jagged:
    values = torch.tensor([place for of_row in lists for place in of_row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(of_row) for of_row in lists], dtype=torch.int64))


def block_of(rows_UD: Tensor, lists: dict[str, Lists], statistics_US: Tensor | None = None) -> Block:
    """A block whose features hold these lists of places in the rows."""
    told = torch.zeros(rows_UD.shape[0], 0) if statistics_US is None else statistics_US
    return Block(
        list(lists), rows_UD, told, jagged_of([of for lists_B in lists.values() for of in lists_B]), *[NOTHING] * 2
    )


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def example() -> dict[str, Lists]:
    """Three features of seven rows; ids repeat within a list and across lists. All lengths, also those of the last few
    ids, are powers of two: a mean of small whole numbers is exact in float32.
    """
    draw = random.Random(0)
    lengths = {"item": [1] * 7, "history": [2, 0, 1, 4, 0, 8, 0], "seen": [0, 0, 16, 0, 2, 1, 1]}
    return {
        name: [[draw.randrange(NUM_DISTINCT) for _ in range(length)] for length in of] for name, of in lengths.items()
    }


KEEP = torch.tensor([0.0, 1, 1, 0, 0, 1, 1])
POOLINGS = {
    "means": {"item": Pooling(), "history": Pooling(), "seen": Pooling()},
    "sums": {"item": Pooling(mean=False), "history": Pooling(mean=False), "seen": Pooling(mean=False)},
    "mixed": {"item": Pooling(mean=False, keep_B=KEEP), "history": Pooling(keep_B=1 - KEEP), "seen": Pooling()},
    "last": {"item": Pooling(last=4), "history": Pooling(last=2), "seen": Pooling(mean=False, last=8)},
    "last of one": {"item": Pooling(), "history": Pooling(mean=False, last=1, keep_B=KEEP), "seen": Pooling()},
    "none": {"item": Pooling(last=0), "history": Pooling(), "seen": Pooling(mean=False, last=0)},
}


def by_loop(rows_UD: Tensor, lists: dict[str, Lists], poolings: dict[str, Pooling]) -> Tensor:
    """[F, B, D], a row and an id at a time."""
    pooled = torch.zeros(len(lists), len(lists["item"]), DIM, dtype=rows_UD.dtype)
    for f, (name, lists_B) in enumerate(lists.items()):
        how = poolings[name]
        for b, places in enumerate(lists_B):
            taken = places if how.last is None else places[len(places) - min(how.last, len(places)) :]
            for place in taken:
                pooled[f, b] += rows_UD[place] / (len(taken) if how.mean else 1)
            if how.keep_B is not None:
                pooled[f, b] *= how.keep_B[b]
    return pooled


@pytest.mark.parametrize("name", POOLINGS)
def test_pool_equals_a_plain_loop_with_zeros_for_empty_lists(name: str) -> None:
    rows_UD, lists = whole_numbers(NUM_DISTINCT, DIM, seed=0), example()
    pooled = pool(block_of(rows_UD, lists), POOLINGS[name])
    assert torch.equal(pooled, by_loop(rows_UD, lists, POOLINGS[name]))  # exact: see example
    assert not pooled[1, [1, 4, 6]].any() and pooled.shape == (3, 7, DIM)


def test_by_default_a_feature_is_the_mean_of_all_its_ids() -> None:
    assert Pooling() == Pooling(mean=True, keep_B=None, last=None)


@pytest.mark.parametrize("how", [Pooling(), Pooling(mean=False), Pooling(last=7)], ids=["mean", "sum", "last"])
def test_pool_equals_a_plain_loop_on_random_lists(how: Pooling) -> None:
    draw, rows_UD = random.Random(1), torch.randn(50, DIM, generator=torch.Generator().manual_seed(2))
    lists = {"item": [[draw.randrange(50) for _ in range(draw.choice([0, 1, 3, 30]))] for _ in range(100)]}
    pooled = pool(block_of(rows_UD, lists), {"item": how})
    # float32 sums of up to 30 numbers in another order
    torch.testing.assert_close(pooled, by_loop(rows_UD, lists, {"item": how}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", POOLINGS)
def test_the_gradient_of_the_rows_equals_finite_differences(name: str) -> None:
    lists, coefficients = example(), whole_numbers(3, 7, DIM, seed=3)
    rows_UD = whole_numbers(NUM_DISTINCT, DIM, seed=0)
    leaf = rows_UD.clone().requires_grad_()
    (pool(block_of(leaf, lists), POOLINGS[name]) * coefficients).sum().backward()
    bumps = torch.eye(rows_UD.numel()).view(-1, NUM_DISTINCT, DIM)
    values = [
        [(by_loop(r, lists, POOLINGS[name]) * coefficients).sum() for r in (rows_UD + b, rows_UD - b)] for b in bumps
    ]
    # pooling is linear and all numbers are small multiples of 1/16, so a difference of step 1 is the exact gradient
    expected = torch.stack([(more - less) / 2 for more, less in values]).view(NUM_DISTINCT, DIM)
    assert leaf.grad is not None and torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_values_and_gradients_are_those_of_embedding_bag(mode: str) -> None:
    generator, draw = torch.Generator().manual_seed(4), random.Random(4)
    rows_UD = torch.randn(200, 16, generator=generator)
    lists = {"item": [[draw.randrange(200) for _ in range(draw.randrange(9))] for _ in range(300)]}
    block = block_of(rows_UD.clone().requires_grad_(), lists)
    leaf, theirs = block.rows_UD, rows_UD.clone().requires_grad_()
    coefficients = torch.randn(300, 16, generator=generator)
    pooled = pool(block, {"item": Pooling(mean=mode == "mean")})[0]
    expected = embedding_bag(block.ids.values_N, theirs, block.ids.offsets, mode=mode, include_last_offset=True)
    (pooled * coefficients).sum().backward()
    (expected * coefficients).sum().backward()
    # float32 sums of a handful of numbers of order 1, in another order
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_gradcheck_of_everything_at_once_in_float64() -> None:
    lists, rows_UD = example(), torch.randn(NUM_DISTINCT, DIM, dtype=torch.float64, requires_grad=True)

    def value(rows: Tensor) -> tuple[Tensor, Tensor]:
        block = block_of(rows, lists)
        return pool(block, POOLINGS["mixed"]), sequence(block, "history", 5)[0]

    assert torch.autograd.gradcheck(value, rows_UD)


def test_rows_of_dropped_lists_and_of_ids_that_do_not_count_get_no_gradient() -> None:
    leaf = torch.ones(4, DIM, requires_grad=True)
    block = block_of(leaf, {"item": [[3, 0, 1], [2, 1]]})
    pool(block, {"item": Pooling(keep_B=torch.tensor([1.0, 0.0]), last=2)}).sum().backward()
    assert leaf.grad is not None and leaf.grad[:, 0].tolist() == [0.5, 0.5, 0.0, 0.0]  # closed form: 1 / length


def test_features_of_one_block_add_their_gradients_in_the_shared_rows() -> None:
    leaf = torch.ones(2, DIM, requires_grad=True)
    block = block_of(leaf, {"a": [[0, 1]], "b": [[1]]})
    a, b = pool(block, {"a": Pooling(mean=False), "b": Pooling()})
    (a + 10 * b).sum().backward()
    assert leaf.grad is not None and leaf.grad[:, 0].tolist() == [1.0, 11.0]  # closed form


def test_gradients_that_arrive_expanded_or_transposed_are_taken_as_they_are() -> None:
    lists, grads = {"item": [[0, 1], [1, 1]]}, list[Tensor]()
    for coefficients in (torch.arange(8.0).view(4, 2).T, torch.tensor(3.0).expand(2, 4)):
        for given in (coefficients, coefficients.contiguous()):
            leaf = torch.ones(2, DIM, requires_grad=True)
            pool(block_of(leaf, lists), {"item": Pooling()})[0].backward(given)
            assert leaf.grad is not None
            grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[2], grads[3])


EMPTY: list[Lists] = [[], [[]], [[], [], []]]


@pytest.mark.parametrize("how", [Pooling(), Pooling(mean=False), Pooling(last=3)], ids=["mean", "sum", "last"])
@pytest.mark.parametrize("num_rows", [0, 2])
@pytest.mark.parametrize("lists_B", EMPTY, ids=len)
def test_a_batch_without_ids_pools_to_zeros_and_backward_runs(lists_B: Lists, num_rows: int, how: Pooling) -> None:
    leaf = torch.ones(num_rows, DIM, requires_grad=True)
    pooled = pool(block_of(leaf, {"a": lists_B, "b": lists_B}), {"a": how, "b": how})
    assert torch.equal(pooled, torch.zeros(2, len(lists_B), DIM))
    pooled.sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros(num_rows, DIM))


# Sequences


def sequence_by_loop(rows_UD: Tensor, lists_B: Lists, length: int) -> tuple[Tensor, Tensor]:
    rows, present = torch.zeros(len(lists_B), length, DIM), torch.zeros(len(lists_B), length, dtype=torch.bool)
    for b, places in enumerate(lists_B):
        for s, place in enumerate(places[max(len(places) - length, 0) :]):
            rows[b, s], present[b, s] = rows_UD[place], True
    return rows, present


@pytest.mark.parametrize("length", [1, 3, 8, 20])
@pytest.mark.parametrize("feature", ["item", "history", "seen"])
def test_a_sequence_is_the_last_ids_rows_in_their_order_with_zeros_behind(feature: str, length: int) -> None:
    rows_UD, lists = whole_numbers(NUM_DISTINCT, DIM, seed=0) + 100, example()
    rows, present = sequence(block_of(rows_UD, lists), feature, length)
    expected, there = sequence_by_loop(rows_UD, lists[feature], length)
    assert torch.equal(rows, expected) and torch.equal(present, there)  # copies: bits


@pytest.mark.parametrize("length", [1, 3, 20])
def test_a_sequences_gradient_reaches_each_place_an_id_stands_at(length: int) -> None:
    lists, coefficients = example(), whole_numbers(7, length, DIM, seed=5)
    leaf = torch.ones(NUM_DISTINCT, DIM, requires_grad=True)
    (sequence(block_of(leaf, lists), "seen", length)[0] * coefficients).sum().backward()
    expected = torch.zeros(NUM_DISTINCT, DIM)
    for b, places in enumerate(lists["seen"]):
        for s, place in enumerate(places[max(len(places) - length, 0) :]):
            expected[place] += coefficients[b, s]
    assert leaf.grad is not None and torch.equal(leaf.grad, expected)  # sums of small whole numbers


@pytest.mark.parametrize("num_rows", [0, 2])
@pytest.mark.parametrize("lists_B", EMPTY, ids=len)
def test_a_sequence_without_ids_is_zeros_and_backward_runs(lists_B: Lists, num_rows: int) -> None:
    leaf = torch.ones(num_rows, DIM, requires_grad=True)
    rows, present = sequence(block_of(leaf, {"a": lists_B}), "a", 4)
    assert torch.equal(rows, torch.zeros(len(lists_B), 4, DIM)) and not present.any()
    assert present.shape == (len(lists_B), 4)
    rows.sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros(num_rows, DIM))


# Statistics


@pytest.mark.parametrize("feature", ["item", "history", "seen"])
def test_statistics_are_summed_over_a_rows_ids(feature: str) -> None:
    told_US, lists = whole_numbers(NUM_DISTINCT, 3, seed=6), example()
    block = block_of(torch.zeros(NUM_DISTINCT, DIM), lists, told_US)
    expected = torch.zeros(7, 3)
    for b, places in enumerate(lists[feature]):
        for place in places:
            expected[b] += told_US[place]
    assert torch.equal(statistics(block, feature), expected)
    assert statistics(replace(block, statistics_US=told_US[:, :0]), feature).shape == (7, 0)


def test_statistics_of_a_batch_without_ids_are_zeros() -> None:
    block = block_of(torch.zeros(0, DIM), {"a": [[], []]}, torch.zeros(0, 3))
    assert torch.equal(statistics(block, "a"), torch.zeros(2, 3))
