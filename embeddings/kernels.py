"""Where rows are kept: the one place that knows FBGEMM, beside a twin in plain torch that keeps the same contract.

A kernel holds R rows of D numbers, float32 or float16, and does two things with them: look up, and subtract a step.
The optimizer's arithmetic lives in optim.py: on CPU, FBGEMM's fused optimizers cost several times more than the step
itself, and most of its optimizers have no CPU kernel at all. Its backward is not used either: a plain loop that
subtracts takes a tenth of its time on CPU. For the optimizer that most tables have, a kernel may know a shorter way:
the whole update in one pass.

Shape letters: R rows, U distinct rows, D numbers a row.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from numba import njit
from torch import Tensor

from embeddings.optim import RowOptimizer, RowwiseAdagrad

_BLOCK = 64
_FLOAT16_MAX = 65504.0
_FLOAT16_DIGITS = 11  # binary digits of its mantissa
_FLOAT16_EXPONENT = -13  # of its smallest normal number, as frexp gives it


class RowKernel(Protocol):
    """R rows of D numbers. Rows passed in are int64, within 0 .. R - 1; those of subtract are distinct."""

    @property
    def weight_RD(self) -> Tensor:
        """All rows as they are kept, a view: writes go through."""
        ...

    def lookup(self, rows_U: Tensor) -> Tensor:
        """A copy of the rows in float32: [U, D]."""
        ...

    def subtract(self, rows_U: Tensor, step_UD: Tensor, chance_UD: Tensor | None) -> None:
        """weight[rows] -= step, in place; every other row keeps its bits. chance: uniform in [0, 1), with which
        float16 rows are rounded.
        """
        ...

    def update(self, optimizer: RowOptimizer, rows_U: Tensor, grad_UD: Tensor, states: Mapping[str, Tensor]) -> bool:
        """The optimizer's step of the rows, and of all rows' states, in one pass. False where the kernel has no such
        pass: then nothing was done.
        """
        ...


class FbgemmRows:
    """Rows in an FBGEMM table-batched embedding: HOST memory on CPU, DEVICE memory on CUDA. One row a bag, summed."""

    def __init__(self, num_rows: int, dim: int, dtype: torch.dtype, device: torch.device):
        cuda = device.type == "cuda"
        location = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
        compute = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
        self._tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(num_rows, dim, location, compute)],
            optimizer=EmbOptimType.EXACT_SGD,
            weights_precision=SparseType.FP16 if dtype == torch.float16 else SparseType.FP32,
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,
            device=device,
        )

    @property
    def weight_RD(self) -> Tensor:
        weight: Tensor = self._tbe.split_embedding_weights()[0]
        return weight

    def lookup(self, rows_U: Tensor) -> Tensor:
        with torch.no_grad():
            bags: Tensor = self._tbe(rows_U, torch.arange(rows_U.numel() + 1, device=rows_U.device))
            return bags

    def subtract(self, rows_U: Tensor, step_UD: Tensor, chance_UD: Tensor | None) -> None:
        _subtract(self.weight_RD, rows_U, step_UD, chance_UD)

    def update(self, optimizer: RowOptimizer, rows_U: Tensor, grad_UD: Tensor, states: Mapping[str, Tensor]) -> bool:
        weight_RD = self.weight_RD
        if not isinstance(optimizer, RowwiseAdagrad) or not _plain(weight_RD):
            return False
        of_rows = weight_RD.numpy(), states["adagrad_sum"].numpy()
        settings = np.float32(optimizer.lr), np.float32(optimizer.eps)
        _rowwise_adagrad_on_host(*of_rows, rows_U.numpy(), grad_UD.numpy(), *settings)
        return True


class TorchRows:
    """The twin in plain torch, for the contract tests and for machines without FBGEMM's kernels."""

    def __init__(self, num_rows: int, dim: int, dtype: torch.dtype, device: torch.device):
        self._weight = torch.zeros(num_rows, dim, dtype=dtype, device=device)

    @property
    def weight_RD(self) -> Tensor:
        return self._weight

    def lookup(self, rows_U: Tensor) -> Tensor:
        return self._weight[rows_U].float()

    def subtract(self, rows_U: Tensor, step_UD: Tensor, chance_UD: Tensor | None) -> None:
        _subtract(self._weight, rows_U, step_UD, chance_UD)

    def update(self, optimizer: RowOptimizer, rows_U: Tensor, grad_UD: Tensor, states: Mapping[str, Tensor]) -> bool:
        return False


def _plain(weight_RD: Tensor) -> bool:
    """Whether the loops on the host can work on the rows."""
    return weight_RD.dtype == torch.float32 and weight_RD.device.type == "cpu"


def _subtract(weight_RD: Tensor, rows_U: Tensor, step_UD: Tensor, chance_UD: Tensor | None) -> None:
    if _plain(weight_RD):
        _subtract_on_host(weight_RD.numpy(), rows_U.numpy(), step_UD.numpy())
        return
    stepped_UD = weight_RD.index_select(0, rows_U).float().sub_(step_UD)
    if weight_RD.dtype == torch.float16:
        assert chance_UD is not None, "float16 rows are rounded by chance"
        stepped_UD = to_float16(stepped_UD, chance_UD)
    weight_RD.index_copy_(0, rows_U, stepped_UD)


@njit(nogil=True, cache=True)
def _subtract_on_host(weight_RD, rows_U, step_UD):  # type: ignore[no-untyped-def]
    """In blocks: first a number of each row is read, so that the rows' cache misses overlap; several times faster."""
    touched = np.float32(0)
    for first in range(0, rows_U.size, _BLOCK):
        end = min(first + _BLOCK, rows_U.size)
        for u in range(first, end):
            touched += weight_RD[rows_U[u], 0]
        for u in range(first, end):
            weight_D, step_D = weight_RD[rows_U[u]], step_UD[u]
            for d in range(step_D.size):
                weight_D[d] -= step_D[d]
    return touched  # else the compiler would drop the reads


@njit(nogil=True, cache=True)
def _rowwise_adagrad_on_host(weight_RD, sum_R, rows_U, grad_UD, lr, eps):  # type: ignore[no-untyped-def]
    """RowwiseAdagrad.step and its subtraction, in blocks as above."""
    touched, dim = np.float32(0), np.float32(weight_RD.shape[1])
    for first in range(0, rows_U.size, _BLOCK):
        end = min(first + _BLOCK, rows_U.size)
        for u in range(first, end):
            touched += weight_RD[rows_U[u], 0] + sum_R[rows_U[u]]
        for u in range(first, end):
            weight_D, grad_D, squares = weight_RD[rows_U[u]], grad_UD[u], np.float32(0)
            for d in range(grad_D.size):
                squares += grad_D[d] * grad_D[d]
            sum_R[rows_U[u]] += squares / dim
            rate = lr / (np.sqrt(sum_R[rows_U[u]]) + eps)
            for d in range(grad_D.size):
                weight_D[d] -= rate * grad_D[d]
    return touched


def to_float16(x: Tensor, chance: Tensor) -> Tensor:
    """Round to one of the two nearest float16, to each with the probability that makes the mean exact; the largest
    float16 stands for everything beyond it. chance: uniform in [0, 1).

    Source: Gupta et al.: Deep learning with limited numerical precision, ICML 2015, section 3.
    """
    _, exponent = torch.frexp(x)
    spacing = torch.ldexp(torch.ones_like(x), exponent.clamp(min=_FLOAT16_EXPONENT) - _FLOAT16_DIGITS)
    units = x / spacing
    below = units.floor()
    rounded = (below + (chance < units - below)) * spacing  # floor(units + chance) would round the sum first
    return rounded.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()
