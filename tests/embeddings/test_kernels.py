"""The contract of RowKernel, one suite for every implementation, type and device.

float32 rows: the float32 difference is the only right answer, so comparisons are exact. float16 rows: the difference is
rounded by chance to one of its two neighbours, so that its mean is exact.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from embeddings.kernels import FbgemmRows, RowKernel, TorchRows, to_float16
from embeddings.optim import OPTIMIZERS, RowwiseAdagrad

NUM_ROWS = 150  # several of the blocks in which rows are read
FLOAT16_MAX = 65504.0
ALMOST_ONE = 1 - 2.0**-24  # the largest chance: in [0, 1), a multiple of 2^-24
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
KERNELS = [
    pytest.param((TorchRows, "cpu"), id="torch-cpu"),
    pytest.param((FbgemmRows, "cpu"), id="fbgemm-cpu"),
    pytest.param((FbgemmRows, "cuda"), id="fbgemm-cuda", marks=GPU),
]


@pytest.fixture(params=[4, 16, 100])
def dim(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, dim: int, dtype: torch.dtype) -> RowKernel:
    """NUM_ROWS rows of normal numbers, written through the view."""
    kernel_class, device = request.param
    kernel: RowKernel = kernel_class(NUM_ROWS, dim, dtype, torch.device(device))
    kernel.weight_RD[:] = normal(NUM_ROWS, dim, seed=0).to(device)
    return kernel


@pytest.fixture(params=[TorchRows, FbgemmRows])
def kernel_class(request: pytest.FixtureRequest) -> type[TorchRows] | type[FbgemmRows]:
    made: type[TorchRows] | type[FbgemmRows] = request.param
    return made


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_rows(kernel: RowKernel, count: int, seed: int) -> Tensor:
    """Distinct rows in a random order, on the kernel's device."""
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(seed))
    return order[:count].to(kernel.weight_RD.device)


def subtract(kernel: RowKernel, rows: Tensor, step: Tensor, seed: int = 0) -> Tensor | None:
    """With the chances that float16 rows need; returns them."""
    chance = torch.rand(step.shape, generator=torch.Generator().manual_seed(seed)).to(step.device)
    used = chance if kernel.weight_RD.dtype == torch.float16 else None
    kernel.subtract(rows, step, used)
    return used


def as_kept(values: Tensor, dtype: torch.dtype, chance: Tensor | None) -> Tensor:
    return values if chance is None else to_float16(values, chance).to(dtype)


def test_new_rows_are_zeros_of_the_shape_and_type_asked_for(
    kernel_class: type[TorchRows] | type[FbgemmRows], dim: int, dtype: torch.dtype
) -> None:
    kernel = kernel_class(NUM_ROWS, dim, dtype, torch.device("cpu"))
    assert kernel.weight_RD.shape == (NUM_ROWS, dim) and kernel.weight_RD.dtype == dtype
    assert not kernel.weight_RD.any()


@pytest.mark.parametrize("count", [1, 17, NUM_ROWS])
def test_lookup_returns_what_was_written_as_float32_in_the_order_asked(
    kernel: RowKernel, dim: int, dtype: torch.dtype, count: int
) -> None:
    rows = some_rows(kernel, count, seed=count)
    found = kernel.lookup(rows).cpu()
    assert found.dtype == torch.float32
    assert torch.equal(found, normal(NUM_ROWS, dim, seed=0).to(dtype).float()[rows.cpu()])


def test_lookup_is_a_copy_in_both_directions(kernel: RowKernel) -> None:
    rows = some_rows(kernel, 10, seed=1)
    found, before = kernel.lookup(rows), kernel.weight_RD.clone()
    found += 1  # does not reach the table
    assert torch.equal(kernel.weight_RD, before)
    subtract(kernel, rows, torch.ones_like(found))  # does not reach what was looked up
    assert torch.equal(found, before[rows].float() + 1)


def test_lookup_carries_no_gradient(kernel: RowKernel) -> None:
    assert not kernel.lookup(some_rows(kernel, 3, seed=2)).requires_grad


@pytest.mark.parametrize("count", [1, 17, NUM_ROWS])
def test_subtract_is_exact_and_every_other_row_keeps_its_bits(
    kernel: RowKernel, dim: int, dtype: torch.dtype, count: int
) -> None:
    rows, step = some_rows(kernel, count, seed=3), normal(count, dim, seed=4).to(kernel.weight_RD.device)
    expected, before = kernel.weight_RD.clone(), kernel.weight_RD.clone().float()
    chance = subtract(kernel, rows, step)
    for place, row in enumerate(rows.tolist()):  # plain loop
        expected[row] = as_kept(before[row] - step[place], dtype, None if chance is None else chance[place])
    assert torch.equal(kernel.weight_RD, expected)


def test_subtract_takes_steps_of_any_memory_layout(kernel: RowKernel, dim: int, dtype: torch.dtype) -> None:
    rows, before = some_rows(kernel, 6, seed=5), kernel.weight_RD.clone()
    columns = normal(dim, 6, seed=6).to(before.device)
    chance = subtract(kernel, rows, columns.T, seed=1)
    once = as_kept(before[rows].float() - columns.T, dtype, chance)
    assert torch.equal(kernel.lookup(rows), once.float())
    chance = subtract(kernel, rows, torch.ones_like(columns[:1, :1]).expand(6, dim), seed=2)
    assert torch.equal(kernel.lookup(rows), as_kept(once.float() - 1, dtype, chance).float())


def test_no_rows_are_looked_up_and_updated_like_any_others(kernel: RowKernel, dim: int) -> None:
    none, before = some_rows(kernel, 0, seed=7), kernel.weight_RD.clone()
    assert kernel.lookup(none).shape == (0, dim)
    subtract(kernel, none, before[:0].float())
    assert torch.equal(kernel.weight_RD, before)


def test_subtract_works_where_gradients_are_off(kernel: RowKernel, dim: int) -> None:
    rows, before = some_rows(kernel, 5, seed=8), kernel.weight_RD.clone()
    with torch.no_grad():
        subtract(kernel, rows, before[rows].float())
        assert torch.equal(kernel.lookup(rows), torch.zeros(5, dim, device=before.device))


def test_subtract_leaves_the_step_as_it_was(kernel: RowKernel, dim: int) -> None:
    step = normal(5, dim, seed=9).to(kernel.weight_RD.device)
    given = step.clone()
    subtract(kernel, some_rows(kernel, 5, seed=9), step)
    assert torch.equal(step, given)


def test_a_row_that_is_not_finite_stays_alone(kernel: RowKernel, dim: int, dtype: torch.dtype) -> None:
    before = kernel.weight_RD.clone()
    rows = torch.tensor([0, NUM_ROWS - 1], device=before.device)
    subtract(kernel, rows, torch.tensor([torch.inf, torch.nan], device=before.device).unsqueeze(1).expand(2, dim))
    assert torch.equal(kernel.weight_RD[1:-1], before[1:-1])
    assert (kernel.weight_RD[0] == (-torch.inf if dtype == torch.float32 else -FLOAT16_MAX)).all()
    assert kernel.weight_RD[-1].isnan().all()


def test_a_hundred_random_steps_leave_the_bits_of_the_plain_torch_twin(
    kernel: RowKernel, dim: int, dtype: torch.dtype
) -> None:
    device = kernel.weight_RD.device
    twin = TorchRows(NUM_ROWS, dim, dtype, device)
    twin.weight_RD[:] = kernel.weight_RD
    for step in range(100):
        rows = some_rows(kernel, step % (NUM_ROWS + 1), seed=step)
        steps = normal(rows.numel(), dim, seed=step).to(device)
        subtract(kernel, rows, steps, seed=step)
        subtract(twin, rows, steps, seed=step)
    assert torch.equal(kernel.weight_RD, twin.weight_RD)


def test_float16_rows_without_chances_are_refused(kernel_class: type[TorchRows] | type[FbgemmRows]) -> None:
    kernel = kernel_class(2, 4, torch.float16, torch.device("cpu"))
    with pytest.raises(AssertionError, match="by chance"):
        kernel.subtract(torch.tensor([0]), torch.ones(1, 4), None)


def test_steps_too_small_for_float16_move_a_row_by_their_sum_in_the_mean(
    kernel_class: type[TorchRows] | type[FbgemmRows],
) -> None:
    kernel = kernel_class(1, 4_000, torch.float16, torch.device("cpu"))
    kernel.weight_RD.fill_(1.0)  # below it float16 steps by 2^-11: rounded to nearest, 2^-14 would be lost every time
    for step in range(200):
        subtract(kernel, torch.tensor([0]), torch.full((1, 4_000), 2.0**-14), seed=step)
    # 800,000 roundings of a standard deviation below half a step each: the mean's is 2^-12 sqrt(200 / 4,000) = 5.5e-5
    assert abs(kernel.weight_RD.double().mean().item() - (1 - 200 * 2.0**-14)) < 5 * 5.5e-5


# to_float16


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The float16 below or at each number, and the one above or at it: by numpy, from the nearest one."""
    nearest = x.numpy().astype(np.float16)
    down, up = np.nextafter(nearest, np.float16(-np.inf)), np.nextafter(nearest, np.float16(np.inf))
    below = np.where(nearest.astype(np.float32) > x.numpy(), down, nearest)
    above = np.where(nearest.astype(np.float32) < x.numpy(), up, nearest)
    return torch.from_numpy(below), torch.from_numpy(above)


def of_every_size(count: int) -> Tensor:
    """Numbers of every exponent that float16 has, normal and subnormal, and of both signs."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.rand(count, generator=generator) * 44 - 28)
    return (size * (torch.randint(0, 2, (count,), generator=generator) * 2 - 1)).clamp(
        -FLOAT16_MAX / 2, FLOAT16_MAX / 2
    )


@pytest.mark.parametrize("chance", [0.0, 2.0**-24, 0.5, ALMOST_ONE])
def test_every_float16_stays_itself_whatever_the_chance(chance: float) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    assert torch.equal(to_float16(every.float(), torch.full(every.shape, chance)), every)


def test_rounding_never_leaves_the_two_neighbours() -> None:
    x, chance = of_every_size(300_000), torch.rand(300_000, generator=torch.Generator().manual_seed(1))
    below, above = neighbours(x)
    for given in (chance, torch.zeros_like(chance), torch.full_like(chance, ALMOST_ONE)):
        rounded = to_float16(x, given)
        assert rounded.dtype == torch.float16 and ((rounded == below) | (rounded == above)).all()
    assert (
        0.2 < (below != above).float().mean() and (to_float16(x, chance) == above)[below != above].float().mean() > 0.4
    )


def test_the_mean_over_all_chances_is_the_number_itself() -> None:
    """Closed form: a number k / 256 of the way from one float16 to the next goes there for k of 256 even chances."""
    chances = torch.arange(256) / 256.0
    first = torch.tensor([1.0, 1.5, 1024.0, 32768.0, 2.0**-14, 2.0**-24, 5 * 2.0**-24, -1.0, -(2.0**-20), 0.0])
    after = torch.from_numpy(np.nextafter(first.half().numpy(), np.float16(np.inf))).float()
    for k in range(257):
        x = first + (after - first) * (k / 256)  # exact in float32
        rounded = to_float16(x.unsqueeze(1).expand(-1, 256), chances.expand(10, -1)).float()
        assert ((rounded == first.unsqueeze(1)) | (rounded == after.unsqueeze(1))).all()
        assert ((rounded == after.unsqueeze(1)).sum(1) == k).all()


def test_what_is_beyond_float16_becomes_its_largest_number() -> None:
    beyond = torch.tensor([FLOAT16_MAX, 65504.1, 65519.9, 65520.0, 65536.0, 1e30, torch.inf])
    for chance in (0.0, 0.5, ALMOST_ONE):
        given = torch.full(beyond.shape, chance)
        assert (to_float16(beyond, given) == FLOAT16_MAX).all()
        assert (to_float16(-beyond, given) == -FLOAT16_MAX).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_in_one_pass_equals_the_optimizers_step_subtracted_or_does_nothing(
    kernel: RowKernel, dim: int, name: str
) -> None:
    optimizer, device = OPTIMIZERS[name](lr=0.5), kernel.weight_RD.device
    shapes = {state: (NUM_ROWS, dim) if each else (NUM_ROWS,) for state, each in optimizer.states.items()}
    states = {state: torch.rand(*shape).to(device) for state, shape in shapes.items()}
    rows, grad = some_rows(kernel, 100, seed=11), normal(100, dim, seed=12).to(device)
    weight, before = kernel.weight_RD.clone(), {state: values.clone() for state, values in states.items()}
    if kernel.update(optimizer, rows, grad, states):
        step, stepped = optimizer.step(grad, {state: values[rows] for state, values in before.items()}, weight[rows])
        weight[rows] -= step
        for state, values in stepped.items():
            before[state][rows] = values
    rest = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill_(0, rows.cpu(), False).to(device)
    assert torch.equal(kernel.weight_RD[rest], weight[rest])
    assert torch.allclose(kernel.weight_RD, weight, rtol=1e-6, atol=1e-6)
    for state, values in states.items():
        assert torch.equal(values[rest], before[state][rest]) and torch.allclose(values, before[state], rtol=1e-6)


def test_fbgemm_on_cpu_updates_float32_rows_by_rowwise_adagrad_in_one_pass() -> None:
    kernel, sums = FbgemmRows(3, 4, torch.float32, torch.device("cpu")), torch.tensor([0.0, 9.0, 0.0])
    grad = torch.tensor([[1.0, 7.0, 0.0, 0.0], [float("nan"), 0.0, 0.0, 0.0]])
    assert kernel.update(RowwiseAdagrad(lr=5.0, eps=0.0), torch.tensor([1, 2]), grad, {"adagrad_sum": sums})
    root = (9.0 + (1 + 49) / 4) ** 0.5  # closed form
    assert torch.allclose(kernel.weight_RD[1], torch.tensor([-5 / root, -35 / root, 0.0, 0.0])) and sums[1] == 21.5
    assert not kernel.weight_RD[0].any() and sums[0] == 0 and kernel.weight_RD[2].isnan().all()
