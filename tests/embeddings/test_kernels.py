"""The contract of RowKernel, one suite for every implementation and device.

A step is subtracted with learning rate 1, so the float32 difference is the only right answer: comparisons are exact.
"""

import pytest
import torch
from torch import Tensor

from embeddings.kernels import FbgemmRows, RowKernel, TorchRows

NUM_ROWS = 50
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
KERNELS = [
    pytest.param((TorchRows, "cpu"), id="torch-cpu"),
    pytest.param((FbgemmRows, "cpu"), id="fbgemm-cpu"),
    pytest.param((FbgemmRows, "cuda"), id="fbgemm-cuda", marks=GPU),
]


@pytest.fixture(params=[4, 16, 100])
def dim(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, dim: int) -> RowKernel:
    """NUM_ROWS rows of normal numbers, written through the view."""
    kernel_class, device = request.param
    kernel: RowKernel = kernel_class(NUM_ROWS, dim, torch.device(device))
    kernel.weight_RD[:] = normal(NUM_ROWS, dim, seed=0).to(device)
    return kernel


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_rows(kernel: RowKernel, count: int, seed: int) -> Tensor:
    """Distinct rows in a random order, on the kernel's device."""
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(seed))
    return order[:count].to(kernel.weight_RD.device)


def test_all_rows_are_float32_of_the_shape_asked_for(kernel: RowKernel, dim: int) -> None:
    assert kernel.weight_RD.shape == (NUM_ROWS, dim) and kernel.weight_RD.dtype == torch.float32


@pytest.mark.parametrize("count", [1, 17, NUM_ROWS])
def test_lookup_returns_what_was_written_in_the_order_asked(kernel: RowKernel, dim: int, count: int) -> None:
    rows = some_rows(kernel, count, seed=count)
    assert torch.equal(kernel.lookup(rows).cpu(), normal(NUM_ROWS, dim, seed=0)[rows.cpu()])


def test_lookup_is_a_copy_in_both_directions(kernel: RowKernel) -> None:
    rows = some_rows(kernel, 10, seed=1)
    found, before = kernel.lookup(rows), kernel.weight_RD.clone()
    found += 1  # does not reach the table
    assert torch.equal(kernel.weight_RD, before)
    kernel.subtract(rows, torch.ones_like(found))  # does not reach what was looked up
    assert torch.equal(found, before[rows] + 1)


def test_lookup_carries_no_gradient(kernel: RowKernel) -> None:
    assert not kernel.lookup(some_rows(kernel, 3, seed=2)).requires_grad


@pytest.mark.parametrize("count", [1, 17, NUM_ROWS])
def test_subtract_is_exact_and_every_other_row_keeps_its_bits(kernel: RowKernel, dim: int, count: int) -> None:
    rows, step = some_rows(kernel, count, seed=3), normal(count, dim, seed=4).to(kernel.weight_RD.device)
    expected = kernel.weight_RD.clone()
    for place, row in enumerate(rows.tolist()):  # plain loop
        expected[row] = expected[row] - step[place]
    kernel.subtract(rows, step)
    assert torch.equal(kernel.weight_RD, expected)


def test_subtract_takes_steps_of_any_memory_layout(kernel: RowKernel, dim: int) -> None:
    rows, before = some_rows(kernel, 6, seed=5), kernel.weight_RD.clone()
    columns = normal(dim, 6, seed=6).to(before.device)
    kernel.subtract(rows, columns.T)
    kernel.subtract(rows, torch.ones_like(columns[:1, :1]).expand(6, dim))
    assert torch.equal(kernel.lookup(rows), before[rows] - columns.T - 1)


def test_no_rows_are_looked_up_and_updated_like_any_others(kernel: RowKernel, dim: int) -> None:
    none, before = some_rows(kernel, 0, seed=7), kernel.weight_RD.clone()
    assert kernel.lookup(none).shape == (0, dim)
    kernel.subtract(none, before[:0])
    assert torch.equal(kernel.weight_RD, before)


def test_subtract_works_where_gradients_are_off(kernel: RowKernel, dim: int) -> None:
    rows, before = some_rows(kernel, 5, seed=8), kernel.weight_RD.clone()
    with torch.no_grad():
        kernel.subtract(rows, torch.ones(5, dim, device=before.device))
        assert torch.equal(kernel.lookup(rows), before[rows] - 1)


def test_a_row_that_is_not_finite_stays_alone(kernel: RowKernel, dim: int) -> None:
    before = kernel.weight_RD.clone()
    rows = torch.tensor([0, NUM_ROWS - 1], device=before.device)
    kernel.subtract(rows, torch.tensor([torch.inf, torch.nan], device=before.device).unsqueeze(1).expand(2, dim))
    assert torch.equal(kernel.weight_RD[1:-1], before[1:-1])
    assert kernel.weight_RD[0].isneginf().all() and kernel.weight_RD[-1].isnan().all()


def test_a_hundred_random_steps_leave_the_bits_of_the_plain_torch_twin(kernel: RowKernel, dim: int) -> None:
    device = kernel.weight_RD.device
    twin = TorchRows(NUM_ROWS, dim, device)
    twin.weight_RD[:] = kernel.weight_RD
    for step in range(100):
        rows = some_rows(kernel, step % (NUM_ROWS + 1), seed=step)
        steps = normal(rows.numel(), dim, seed=step).to(device)
        kernel.subtract(rows, steps)
        twin.subtract(rows, steps)
    assert torch.equal(kernel.weight_RD, twin.weight_RD)
