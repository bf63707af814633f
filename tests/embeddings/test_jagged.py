"""Lists of different lengths against plain Python lists."""

import random

import pytest
import torch

from embeddings.jagged import Jagged

Lists = list[list[int]]


def jagged_of(lists: Lists) -> Jagged:
    values = torch.tensor([v for row in lists for v in row], dtype=torch.int64)
    return Jagged.from_lengths(values, torch.tensor([len(row) for row in lists], dtype=torch.int64))


def lists_of(jagged: Jagged) -> Lists:
    values, offsets = jagged.values_N.tolist(), jagged.offsets.tolist()
    assert (offsets[0], offsets[-1]) == (0, len(values)) and jagged.num_rows == len(offsets) - 1
    return [values[start:end] for start, end in zip(offsets, offsets[1:], strict=False)]


def random_lists(draw: random.Random, num_rows: int) -> Lists:
    return [[draw.randrange(-(2**63), 2**63) for _ in range(draw.choice([0, 0, 1, 2, 7]))] for _ in range(num_rows)]


@pytest.mark.parametrize("num_rows", [0, 1, 50])
def test_from_lengths_keeps_every_list_and_its_length(num_rows: int) -> None:
    lists = random_lists(random.Random(num_rows), num_rows)
    assert lists_of(jagged_of(lists)) == lists
    assert jagged_of(lists).lengths_B.tolist() == [len(row) for row in lists]


def test_from_lengths_of_narrow_integers_gives_int64_offsets() -> None:
    jagged = Jagged.from_lengths(torch.arange(300), torch.tensor([100, 100, 100], dtype=torch.int8))
    assert jagged.offsets.dtype == torch.int64 and jagged.offsets.tolist() == [0, 100, 200, 300]


def test_select_equals_indexing_python_lists_in_any_order_with_repeats() -> None:
    draw = random.Random(0)
    for _ in range(50):
        lists = random_lists(draw, draw.randrange(1, 20))
        rows = [draw.randrange(len(lists)) for _ in range(draw.randrange(30))]
        selected = jagged_of(lists).select(torch.tensor(rows, dtype=torch.int64))
        assert lists_of(selected) == [lists[row] for row in rows]


def test_select_of_rows_that_are_all_empty_holds_no_values() -> None:
    selected = jagged_of([[], [5, 6], []]).select(torch.tensor([2, 0, 2]))
    assert lists_of(selected) == [[], [], []]


def test_cat_equals_joining_python_lists() -> None:
    draw = random.Random(1)
    for _ in range(20):
        parts = [random_lists(draw, draw.randrange(5)) for _ in range(draw.randrange(1, 6))]
        joined = Jagged.cat([jagged_of(part) for part in parts])
        assert lists_of(joined) == [row for part in parts for row in part]


def test_splitting_a_batch_by_rows_and_joining_it_gives_the_batch_back() -> None:
    lists = random_lists(random.Random(2), 30)
    whole, rows = jagged_of(lists), torch.arange(30)
    parts = [whole.select(rows[start:end]) for start, end in ((0, 0), (0, 11), (11, 12), (12, 30))]
    assert lists_of(Jagged.cat(parts)) == lists


@pytest.mark.parametrize("num_lists", [0, 1, 40])
def test_sums_equal_a_loop_that_adds_the_rows_each_list_names(num_lists: int) -> None:
    draw = random.Random(num_lists)
    lists = [[draw.randrange(7) for _ in range(draw.choice([0, 0, 1, 2, 30]))] for _ in range(num_lists)]
    rows = torch.randint(-8, 9, (7, 3), generator=torch.Generator().manual_seed(0)).float()  # sums are exact
    expected = torch.zeros(num_lists, 3)
    for b, of_list in enumerate(lists):
        for row in of_list:
            expected[b] += rows[row]
    assert torch.equal(jagged_of(lists).sums(rows), expected)


def test_sums_of_no_rows_or_of_rows_of_no_width_are_zeros_of_the_right_shape() -> None:
    assert torch.equal(jagged_of([[], []]).sums(torch.zeros(0, 3)), torch.zeros(2, 3))
    assert torch.equal(jagged_of([[], []]).sums(torch.ones(4, 3)), torch.zeros(2, 3))
    assert jagged_of([[0, 1], []]).sums(torch.zeros(2, 0)).shape == (2, 0)
