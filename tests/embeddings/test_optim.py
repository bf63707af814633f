"""Row-wise Adagrad against a float64 plain loop and against FBGEMM's own EXACT_ROWWISE_ADAGRAD."""

import math

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

from embeddings.optim import RowwiseAdagrad

NUM_ROWS, DIM = 20, 8
SETTINGS = [(0.05, 1e-8), (1.0, 1e-2), (0.3, 1.0)]  # a large eps shows whether it stands outside the root


def gradients(step: int) -> tuple[Tensor, Tensor]:
    """Distinct rows and their gradients, of sizes that differ a thousandfold."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randperm(NUM_ROWS, generator=generator)[: 1 + step % NUM_ROWS]
    sizes = 10.0 ** torch.randint(-2, 2, (rows.numel(), 1), generator=generator)
    return rows, torch.randn(rows.numel(), DIM, generator=generator) * sizes


def trained(optimizer: RowwiseAdagrad, num_steps: int) -> tuple[Tensor, Tensor]:
    weight, state = torch.zeros(NUM_ROWS, DIM), torch.zeros(NUM_ROWS)
    for step in range(num_steps):
        rows, grad = gradients(step)
        state[rows], move = optimizer.step(state[rows], grad)
        weight[rows] -= move
    return weight, state


def loop_trained(lr: float, eps: float, num_steps: int) -> tuple[list[list[float]], list[float]]:
    """The definition in Python floats, one number at a time."""
    weight, state = [[0.0] * DIM for _ in range(NUM_ROWS)], [0.0] * NUM_ROWS
    for step in range(num_steps):
        rows, grad = gradients(step)
        for row, g in zip(rows.tolist(), grad.tolist(), strict=True):
            state[row] += sum(x * x for x in g) / DIM
            weight[row] = [w - lr * x / (math.sqrt(state[row]) + eps) for w, x in zip(weight[row], g, strict=True)]
    return weight, state


def fbgemm_trained(lr: float, eps: float, num_steps: int) -> tuple[Tensor, Tensor]:
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(NUM_ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=lr,
        eps=eps,
        pooling_mode=PoolingMode.SUM,
        device=torch.device("cpu"),
    )
    tbe.split_embedding_weights()[0].zero_()
    for step in range(num_steps):
        rows, grad = gradients(step)
        tbe(rows, torch.arange(rows.numel() + 1)).backward(grad)
    return tbe.split_embedding_weights()[0], tbe.split_optimizer_states()[0][0]


@pytest.mark.parametrize("lr, eps", SETTINGS)
def test_rowwise_adagrad_equals_a_float64_plain_loop(lr: float, eps: float) -> None:
    weight, state = trained(RowwiseAdagrad(lr, eps), num_steps=60)
    expected_weight, expected_state = loop_trained(lr, eps, num_steps=60)
    # float32 rounds each of 60 additions by 6e-8 of the running value, whose size is a few lr: far below 1e-5 of it
    torch.testing.assert_close(state.double(), torch.tensor(expected_state).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(weight.double(), torch.tensor(expected_weight).double(), rtol=1e-5, atol=1e-5 * lr)


@pytest.mark.parametrize("lr, eps", SETTINGS)
def test_rowwise_adagrad_equals_fbgemms_exact_rowwise_adagrad(lr: float, eps: float) -> None:
    weight, state = trained(RowwiseAdagrad(lr, eps), num_steps=60)
    fbgemm_weight, fbgemm_state = fbgemm_trained(lr, eps, num_steps=60)
    # both float32: only the order of a row's squares and the place of one rounding may differ
    torch.testing.assert_close(state, fbgemm_state.view(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(weight, fbgemm_weight, rtol=1e-5, atol=1e-5 * lr)


def test_the_first_step_of_a_row_has_root_mean_square_lr_whatever_the_gradients_size() -> None:
    for size in (1e-3, 1.0, 1e6):
        grad = torch.randn(50, DIM, generator=torch.Generator().manual_seed(0)) * size
        _, step = RowwiseAdagrad(lr=0.05).step(torch.zeros(50), grad)
        # closed form lr * g / rms(g): eps 1e-8 is at most 1e-4 of the smallest rms here
        torch.testing.assert_close(step.square().mean(dim=1).sqrt(), torch.full((50,), 0.05), rtol=1e-4, atol=0)


def test_a_zero_gradient_makes_no_step_and_keeps_the_state() -> None:
    state = torch.tensor([0.0, 4.0])
    new_state, step = RowwiseAdagrad().step(state, torch.zeros(2, DIM))
    assert torch.equal(new_state, state) and torch.equal(step, torch.zeros(2, DIM))  # not 0 / 0


def test_a_step_leaves_its_inputs_as_they_were() -> None:
    state, grad = torch.ones(3), torch.ones(3, DIM)
    RowwiseAdagrad().step(state, grad)
    assert torch.equal(state, torch.ones(3)) and torch.equal(grad, torch.ones(3, DIM))


def test_no_rows_make_no_steps() -> None:
    state, step = RowwiseAdagrad().step(torch.zeros(0), torch.zeros(0, DIM))
    assert state.shape == (0,) and step.shape == (0, DIM)
