"""Row optimizers against plain float64 loops over single numbers, torch.optim, FBGEMM's kernels and closed forms."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from embeddings.optim import OPTIMIZERS, Adagrad, Adam, Ftrl, RowOptimizer, RowwiseAdagrad, RowwiseAdam, Sgd

NUM_ROWS, NUM_STEPS = 40, 200
OF_EACH_KIND: list[RowOptimizer] = [make() for make in OPTIMIZERS.values()]
# settings as used, and such that show where each one stands: a large eps outside the root, betas that do not hide
SETTINGS: list[RowOptimizer] = [
    Sgd(lr=0.3),
    Adagrad(lr=0.3, eps=1e-8),
    Adagrad(lr=0.3, eps=1.0),
    RowwiseAdagrad(lr=0.05, eps=1e-8),
    RowwiseAdagrad(lr=0.3, eps=1.0),
    Adam(lr=0.01),
    Adam(lr=0.3, beta1=0.6, beta2=0.8, eps=0.5),
    Adam(lr=0.01, beta1=0.0, beta2=0.9),
    RowwiseAdam(lr=0.01),
    RowwiseAdam(lr=0.3, beta1=0.6, beta2=0.8, eps=0.5),
    Ftrl(lr=0.1),
    Ftrl(lr=0.3, beta=0.5, l1=0.7, l2=2.0),
    Ftrl(lr=0.3, beta=0.0, l1=0.1),
]
DOUBLE = torch.float64


@dataclass
class Rows:
    """A pool in miniature: gathers the rows of a step, lets the optimizer step, scatters."""

    optimizer: RowOptimizer
    weight: Tensor
    state: dict[str, Tensor]

    def update(self, rows: Tensor, grad: Tensor) -> None:
        weight = self.weight[rows] if self.optimizer.reads_weight else None
        step, states = self.optimizer.step(grad.to(self.weight), {k: v[rows] for k, v in self.state.items()}, weight)
        self.weight[rows] -= step
        for name, value in states.items():
            self.state[name][rows] = value


def random(rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def first_weight(dim: int) -> Tensor:
    return random(NUM_ROWS, dim, seed=dim)


def fresh(optimizer: RowOptimizer, weight: Tensor) -> Rows:
    shapes = {name: weight.shape if element else weight.shape[:1] for name, element in optimizer.states.items()}
    return Rows(optimizer, weight.clone(), {n: weight.new_zeros(shape) for n, shape in shapes.items()})


@functools.cache
def gradients(step: int, dim: int, num_rows: int = NUM_ROWS) -> tuple[Tensor, Tensor]:
    """Distinct rows and their gradients, of sizes that differ a thousandfold; one number in ten is zero."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randperm(num_rows, generator=generator)[: 1 + step % (num_rows // 2)]
    sizes = 10.0 ** torch.randint(-2, 2, (rows.numel(), 1), generator=generator)
    grad = torch.randn(rows.numel(), dim, generator=generator) * sizes
    return rows, grad * (torch.rand(grad.shape, generator=generator) > 0.1)


def trained(optimizer: RowOptimizer, dim: int, dtype: torch.dtype = torch.float32, num_steps: int = NUM_STEPS) -> Rows:
    rows = fresh(optimizer, first_weight(dim).to(dtype))
    for step in range(num_steps):
        rows.update(*gradients(step, dim))
    return rows


# The definitions, one row at a time, in Python floats: w and the lists of s change in place.
Floats = list[float]


def loop_sgd(o: Sgd, w: Floats, g: Floats, s: dict[str, Floats]) -> None:
    for i, x in enumerate(g):
        w[i] = w[i] - o.lr * x


def loop_adagrad(o: Adagrad, w: Floats, g: Floats, s: dict[str, Floats]) -> None:
    for i, x in enumerate(g):
        s["adagrad_sums"][i] += x**2
        w[i] -= o.lr * x / (math.sqrt(s["adagrad_sums"][i]) + o.eps)


def loop_rowwise_adagrad(o: RowwiseAdagrad, w: Floats, g: Floats, s: dict[str, Floats]) -> None:
    s["adagrad_sum"][0] += sum(x**2 for x in g) / len(g)
    for i, x in enumerate(g):
        w[i] -= o.lr * x / (math.sqrt(s["adagrad_sum"][0]) + o.eps)


def loop_adam(o: Adam, w: Floats, g: Floats, s: dict[str, Floats]) -> None:
    s["adam_steps"][0] += 1
    t = s["adam_steps"][0]
    for i, x in enumerate(g):
        s["adam_m"][i] = o.beta1 * s["adam_m"][i] + (1 - o.beta1) * x
        s["adam_v"][i] = o.beta2 * s["adam_v"][i] + (1 - o.beta2) * x**2
        m_hat, v_hat = s["adam_m"][i] / (1 - o.beta1**t), s["adam_v"][i] / (1 - o.beta2**t)
        w[i] -= o.lr * m_hat / (math.sqrt(v_hat) + o.eps)


def loop_rowwise_adam(o: RowwiseAdam, w: Floats, g: Floats, s: dict[str, Floats]) -> None:
    s["adam_steps"][0] += 1
    t = s["adam_steps"][0]
    s["adam_row_v"][0] = o.beta2 * s["adam_row_v"][0] + (1 - o.beta2) * sum(x**2 for x in g) / len(g)
    for i, x in enumerate(g):
        s["adam_m"][i] = o.beta1 * s["adam_m"][i] + (1 - o.beta1) * x
        m_hat, v_hat = s["adam_m"][i] / (1 - o.beta1**t), s["adam_row_v"][0] / (1 - o.beta2**t)
        w[i] -= o.lr * m_hat / (math.sqrt(v_hat) + o.eps)


def loop_ftrl(o: Ftrl, w: Floats, g: Floats, s: dict[str, Floats]) -> None:
    for i, x in enumerate(g):
        inverse_rate_before = (o.beta + math.sqrt(s["ftrl_n"][i])) / o.lr if s["ftrl_n"][i] else 0.0
        s["ftrl_n"][i] += x**2
        if s["ftrl_n"][i] == 0:
            continue  # no gradient so far
        inverse_rate = (o.beta + math.sqrt(s["ftrl_n"][i])) / o.lr
        s["ftrl_z"][i] += x - (inverse_rate - inverse_rate_before) * w[i]
        z = s["ftrl_z"][i]
        w[i] = 0.0 if abs(z) <= o.l1 else -(z - math.copysign(o.l1, z)) / (inverse_rate + o.l2)


LOOPS: dict[type, Callable[..., None]] = {
    Sgd: loop_sgd,
    Adagrad: loop_adagrad,
    RowwiseAdagrad: loop_rowwise_adagrad,
    Adam: loop_adam,
    RowwiseAdam: loop_rowwise_adam,
    Ftrl: loop_ftrl,
}


def loop_trained(optimizer: RowOptimizer, dim: int) -> tuple[Tensor, dict[str, Tensor]]:
    weight = first_weight(dim).tolist()
    widths = {name: dim if element else 1 for name, element in optimizer.states.items()}
    states: list[dict[str, Floats]] = [{n: [0.0] * width for n, width in widths.items()} for _ in range(NUM_ROWS)]
    for step in range(NUM_STEPS):
        rows, grad = gradients(step, dim)
        for row, g in zip(rows.tolist(), grad.tolist(), strict=True):
            LOOPS[type(optimizer)](optimizer, weight[row], g, states[row])
    stacked = {name: torch.tensor([s[name] for s in states], dtype=DOUBLE) for name in widths}
    return torch.tensor(weight, dtype=DOUBLE), stacked


@pytest.mark.parametrize("dim", [1, 4, 16])
@pytest.mark.parametrize("optimizer", SETTINGS, ids=repr)
def test_weights_and_states_equal_a_plain_loop_over_single_numbers(optimizer: RowOptimizer, dim: int) -> None:
    expected_weight, expected_states = loop_trained(optimizer, dim)
    # float64 differs by the order of a few operations, 2e-16 each. float32 rounds some 60 updates a row by 6e-8 each;
    # FTRL's z most, as it sums weights times tens
    for dtype, of_weight, of_state in ((DOUBLE, 1e-13, 1e-13), (torch.float32, 3e-6, 5e-5)):
        rows = trained(optimizer, dim, dtype)
        torch.testing.assert_close(rows.weight.double(), expected_weight, rtol=of_weight, atol=of_weight)
        assert rows.state.keys() == expected_states.keys()
        for name, expected in expected_states.items():
            state = rows.state[name].double().view(NUM_ROWS, -1)
            torch.testing.assert_close(state, expected, rtol=of_state, atol=of_state)


TORCH_TWINS: list[tuple[RowOptimizer, Callable[[list[Tensor]], torch.optim.Optimizer], int]] = [
    (Sgd(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3), 8),
    (Adagrad(lr=0.3, eps=0.1), lambda p: torch.optim.Adagrad(p, lr=0.3, eps=0.1), 8),
    (RowwiseAdagrad(lr=0.3, eps=0.1), lambda p: torch.optim.Adagrad(p, lr=0.3, eps=0.1), 1),
    (Adam(lr=0.1, eps=0.1), lambda p: torch.optim.Adam(p, lr=0.1, eps=0.1), 8),
    (RowwiseAdam(lr=0.1, eps=0.1), lambda p: torch.optim.Adam(p, lr=0.1, eps=0.1), 1),
    (Ftrl(lr=0.3, beta=0.7), lambda p: torch.optim.Adagrad(p, lr=0.3, eps=0.7), 8),
    (Ftrl(lr=0.3, beta=0.0), lambda p: torch.optim.Adagrad(p, lr=0.3, eps=0.0), 8),
]


@pytest.mark.parametrize("optimizer, twin, dim", TORCH_TWINS, ids=[repr(optimizer) for optimizer, _, _ in TORCH_TWINS])
def test_rows_seen_on_every_step_equal_torch_optim_on_a_dense_parameter(
    optimizer: RowOptimizer, twin: Callable[[list[Tensor]], torch.optim.Optimizer], dim: int
) -> None:
    """Row-wise optimizers are those of elements where a row is one element; FTRL without penalties is Adagrad."""
    rows, dense = fresh(optimizer, first_weight(dim).double()), first_weight(dim).double().requires_grad_()
    torch_optimizer = twin([dense])
    for step in range(NUM_STEPS):
        dense.grad = random(NUM_ROWS, dim, seed=step).double()
        rows.update(torch.arange(NUM_ROWS), dense.grad)
        torch_optimizer.step()
    torch.testing.assert_close(rows.weight, dense.detach(), rtol=0, atol=1e-12)  # 200 float64 roundings of 2e-16


FBGEMM_KINDS: list[tuple[Sgd | Adagrad | RowwiseAdagrad, EmbOptimType]] = [
    (Sgd(lr=0.05), EmbOptimType.EXACT_SGD),
    (Adagrad(lr=0.3, eps=1.0), EmbOptimType.EXACT_ADAGRAD),
    (RowwiseAdagrad(lr=0.05, eps=1e-8), EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    (RowwiseAdagrad(lr=0.3, eps=1.0), EmbOptimType.EXACT_ROWWISE_ADAGRAD),
]


@pytest.mark.parametrize("optimizer, kind", FBGEMM_KINDS, ids=[repr(optimizer) for optimizer, _ in FBGEMM_KINDS])
def test_weights_and_states_equal_fbgemms_own_optimizers(
    optimizer: Sgd | Adagrad | RowwiseAdagrad, kind: EmbOptimType
) -> None:
    """Those that FBGEMM has on CPU: no Adam."""
    dim = 8
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(NUM_ROWS, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=kind,
        learning_rate=optimizer.lr,
        eps=getattr(optimizer, "eps", 0.0),
        pooling_mode=PoolingMode.SUM,
        device=torch.device("cpu"),
    )
    tbe.split_embedding_weights()[0].copy_(first_weight(dim))
    for step in range(NUM_STEPS):
        rows, grad = gradients(step, dim)
        tbe(rows, torch.arange(rows.numel() + 1)).backward(grad)
    ours = trained(optimizer, dim)
    # both float32: only the order of a row's squares and the places of single roundings may differ
    torch.testing.assert_close(ours.weight, tbe.split_embedding_weights()[0], rtol=1e-5, atol=1e-5)
    states = [state for of_table in tbe.split_optimizer_states() for state in of_table]
    for state, theirs in zip(ours.state.values(), states, strict=True):
        torch.testing.assert_close(state.flatten(), theirs.flatten(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", OF_EACH_KIND, ids=repr)
def test_a_step_gives_exactly_the_declared_states_and_leaves_its_arguments_as_they_were(
    optimizer: RowOptimizer,
) -> None:
    rows = trained(optimizer, dim=4, num_steps=50)
    grad = random(NUM_ROWS, 4)
    before = [t.clone() for t in (grad, rows.weight, *rows.state.values())]
    step, states = optimizer.step(grad, rows.state, rows.weight)
    for then, now in zip(before, (grad, rows.weight, *rows.state.values()), strict=True):
        assert torch.equal(then, now)
    shapes = {name: (NUM_ROWS, 4) if element else (NUM_ROWS,) for name, element in optimizer.states.items()}
    assert step.shape == (NUM_ROWS, 4) and {name: tuple(state.shape) for name, state in states.items()} == shapes
    assert all(t.dtype == torch.float32 for t in (step, *states.values()))


def test_the_configurations_names_are_those_of_the_classes() -> None:
    names = {"sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam", "ftrl"}
    assert OPTIMIZERS.keys() == names and all(n.replace("_", "") == c.__name__.lower() for n, c in OPTIMIZERS.items())


def test_the_same_state_name_means_the_same_shape_under_every_optimizer() -> None:
    """A checkpoint's columns are matched by name, also under another optimizer than wrote them."""
    shapes: dict[str, bool] = {}
    for optimizer in OF_EACH_KIND:
        for name, element in optimizer.states.items():
            assert shapes.setdefault(name, element) == element
    assert shapes["adagrad_sum"] is False  # as in checkpoints that exist


@pytest.mark.parametrize("optimizer", OF_EACH_KIND, ids=repr)
def test_rows_absent_from_a_step_keep_every_bit_of_weight_and_state(optimizer: RowOptimizer) -> None:
    rows = trained(optimizer, dim=4, num_steps=50)
    before = [t.clone() for t in (rows.weight, *rows.state.values())]
    for step in range(50, 100):
        rows.update(*gradients(step, 4, num_rows=30))  # rows 30 to 39 stay away
    for then, now in zip(before, (rows.weight, *rows.state.values()), strict=True):
        assert torch.equal(then[30:], now[30:]) and not torch.equal(then[:30], now[:30])


@pytest.mark.parametrize("optimizer", OF_EACH_KIND, ids=repr)
def test_a_row_learns_the_same_alone_as_in_company(optimizer: RowOptimizer) -> None:
    """Oracle: the step of all rows at once. float32: the order of a row's squares may differ with the shape."""
    rows, grad = trained(optimizer, dim=16, num_steps=50), random(NUM_ROWS, 16)
    step, states = optimizer.step(grad, rows.state, rows.weight)
    for i in range(NUM_ROWS):
        one = slice(i, i + 1)
        alone, alone_states = optimizer.step(grad[one], {k: v[one] for k, v in rows.state.items()}, rows.weight[one])
        torch.testing.assert_close(alone, step[one], rtol=1e-6, atol=1e-7)
        for name, state in states.items():
            torch.testing.assert_close(alone_states[name], state[one], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", OF_EACH_KIND, ids=repr)
def test_no_rows_make_no_steps(optimizer: RowOptimizer) -> None:
    nobody = fresh(optimizer, torch.zeros(0, 4))
    step, states = optimizer.step(torch.zeros(0, 4), nobody.state, nobody.weight)
    assert step.shape == (0, 4) and {n: s.shape for n, s in states.items()} == {
        n: s.shape for n, s in nobody.state.items()
    }


@pytest.mark.parametrize("optimizer", OF_EACH_KIND, ids=repr)
def test_a_zero_gradient_makes_no_step_of_a_fresh_row_and_only_counts_it(optimizer: RowOptimizer) -> None:
    rows = fresh(optimizer, first_weight(4))
    step, states = optimizer.step(torch.zeros(NUM_ROWS, 4), rows.state, rows.weight)
    assert torch.equal(step, torch.zeros(NUM_ROWS, 4))  # not 0 / 0
    counted = {"adam_steps": 1.0}
    assert all(torch.equal(s, torch.full_like(s, counted.get(n, 0.0))) for n, s in states.items())


@pytest.mark.parametrize("optimizer", OF_EACH_KIND, ids=repr)
def test_a_gradient_that_is_not_a_number_shows_in_its_rows_weights_and_nowhere_else(optimizer: RowOptimizer) -> None:
    rows, grad = trained(optimizer, dim=4, num_steps=50), torch.ones(NUM_ROWS, 4)
    grad[7] = math.nan
    rows.update(torch.arange(NUM_ROWS), grad)
    for tensor in (rows.weight, *(s for name, s in rows.state.items() if name != "adam_steps")):
        assert tensor[7].isnan().all() and tensor[:7].isfinite().all() and tensor[8:].isfinite().all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize(
    "optimizer", [Adagrad(lr=0.02), RowwiseAdagrad(lr=0.02), Adam(lr=0.02), RowwiseAdam(lr=0.02)], ids=repr
)
def test_the_first_step_of_a_late_row_has_size_lr_whatever_the_gradients_size(
    optimizer: RowOptimizer, size: float
) -> None:
    """Closed form lr * sign(g) for numbers an element, lr * g / rms(g) for numbers a row."""
    rows, everybody = fresh(optimizer, first_weight(8)), torch.arange(NUM_ROWS)
    for step in range(300):
        rows.update(everybody[:-1], random(NUM_ROWS - 1, 8, seed=step))
    before, grad = rows.weight[-1].clone(), random(NUM_ROWS, 8) * size
    rows.update(everybody, grad)
    a_row = isinstance(optimizer, RowwiseAdagrad | RowwiseAdam)
    expected = 0.02 * (grad[-1] / grad[-1].square().mean().sqrt() if a_row else grad[-1].sign())
    # eps is 1e-3 of the smallest gradients here, and weights near 1 are rounded by 6e-8
    torch.testing.assert_close(before - rows.weight[-1], expected, rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("optimizer", [Adam(lr=0.02), RowwiseAdam(lr=0.02)], ids=repr)
def test_adams_bias_correction_keeps_all_digits_of_float32(optimizer: RowOptimizer) -> None:
    """Closed form lr: m and v are (1 - beta) of g and g^2. 1 - 0.999 in float32 would be off by 1.3e-5 of itself."""
    step, _ = optimizer.step(torch.full((1, 4), 100.0), fresh(optimizer, torch.zeros(1, 4)).state, None)
    torch.testing.assert_close(step, torch.full((1, 4), 0.02), rtol=5e-7, atol=0)  # some roundings of 6e-8


def test_ftrl_weights_are_exactly_zero_where_and_only_where_z_is_within_l1() -> None:
    rows = trained(Ftrl(lr=0.3, l1=20.0), dim=16)
    seen, within = rows.state["ftrl_n"] > 0, rows.state["ftrl_z"].abs() <= 20.0
    assert torch.equal(rows.weight[seen] == 0, within[seen])
    assert 100 < (rows.weight == 0).sum() < 500  # of 640: both happen


def minimum(slope: Callable[[float], float]) -> float:
    """Where a convex function's slope changes sign, by halving."""
    low, high = -100.0, 100.0
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def slope_of_ftrls_objective(o: Ftrl, gs: Sequence[float], ws: Sequence[float], w: float) -> float:
    """The derivative of g_1:t w + 1/2 sum_s sigma_s (w - w_s)^2 + l1 |w| + l2/2 w^2, where sigma_1:t = 1 / rate_t."""
    squares = [sum(g**2 for g in gs[: t + 1]) for t in range(len(gs))]
    inverse_rates = [0.0] + [(o.beta + math.sqrt(n)) / o.lr for n in squares]
    sigmas = [after - before for before, after in zip(inverse_rates, inverse_rates[1:], strict=False)]
    proximal = sum(sigma * (w - past) for sigma, past in zip(sigmas, ws, strict=True))
    return sum(gs) + proximal + o.l1 * ((w > 0) - (w < 0)) + o.l2 * w


@pytest.mark.parametrize("optimizer", [Ftrl(lr=0.3), Ftrl(lr=0.3, beta=0.1, l1=1.0, l2=0.5), Ftrl(l1=8.0)], ids=repr)
@pytest.mark.parametrize("first", [0.0, 1.5])
def test_every_ftrl_weight_minimises_the_papers_objective_over_all_gradients_so_far(
    optimizer: Ftrl, first: float
) -> None:
    rows = fresh(optimizer, torch.full((1, 1), first, dtype=DOUBLE))
    gs, ws = random(30, 1).flatten().tolist(), [first]
    for t, g in enumerate(gs):
        rows.update(torch.tensor([0]), torch.tensor([[g]]))
        expected = minimum(functools.partial(slope_of_ftrls_objective, optimizer, gs[: t + 1], ws))
        assert rows.weight.item() == pytest.approx(expected, abs=1e-12)  # float64, and 70 halvings of 200
        ws.append(rows.weight.item())


def test_ftrl_keeps_first_weights_that_gradients_are_small_against() -> None:
    """Closed form w - lr * g / (beta + |g|), that of Adagrad: beta must not wipe out what another optimizer learnt."""
    weight = torch.tensor([[1.0, -0.5, 0.25]])
    step, _ = Ftrl(lr=0.1, beta=1.0).step(
        torch.full((1, 3), 1e-3), {"ftrl_z": torch.zeros(1, 3), "ftrl_n": torch.zeros(1, 3)}, weight
    )
    # z is near 10 times the weight in float32: off by 1e-6 times the rate of 0.1
    torch.testing.assert_close(step, torch.full((1, 3), 0.1 * 1e-3 / 1.001), rtol=0, atol=2e-7)


def test_ftrl_moves_no_element_before_its_first_gradient() -> None:
    rows = fresh(Ftrl(l1=0.5, l2=0.5), first_weight(4))
    grad = torch.ones(NUM_ROWS, 4)
    grad[:, 2] = 0.0
    for _ in range(5):
        rows.update(torch.arange(NUM_ROWS), grad)
    assert torch.equal(rows.weight[:, 2], first_weight(4)[:, 2]) and (rows.weight[:, 0] < first_weight(4)[:, 0]).any()
