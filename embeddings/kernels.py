"""The rows themselves: FBGEMM's table-batched kernels, and a plain-torch twin that keeps the same contract.

This is the only file that imports fbgemm_gpu. Row optimizers live beside the kernel (optim.py): what arrives here is
the finished step of each row, applied by the kernel's fastest update, plain SGD with learning rate 1, on CPU and CUDA
alike.

Shape letters: U distinct rows, D floats a row, R rows of the kernel.
"""

from typing import Protocol

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor


class RowKernel(Protocol):
    """R rows of D floats. Rows passed in are distinct, int64, within 0 .. R - 1."""

    @property
    def weight_RD(self) -> Tensor:
        """All rows, a view: writes go through."""
        ...

    def lookup(self, rows_U: Tensor) -> Tensor:
        """A copy of the rows: [U, D]."""
        ...

    def subtract(self, rows_U: Tensor, step_UD: Tensor) -> None:
        """weight[rows] -= step, in place; every other row keeps its bits."""
        ...


class FbgemmRows:
    """Rows in an FBGEMM table-batched embedding: HOST memory on CPU, DEVICE memory on CUDA. One row a bag, summed."""

    def __init__(self, num_rows: int, dim: int, device: torch.device):
        cuda = device.type == "cuda"
        location = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
        compute = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
        self._tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(num_rows, dim, location, compute)],
            optimizer=EmbOptimType.EXACT_SGD,
            learning_rate=1.0,
            pooling_mode=PoolingMode.SUM,
            device=device,
        )

    @property
    def weight_RD(self) -> Tensor:
        weight: Tensor = self._tbe.split_embedding_weights()[0]
        return weight

    def lookup(self, rows_U: Tensor) -> Tensor:
        with torch.no_grad():
            return self._bags(rows_U)

    def subtract(self, rows_U: Tensor, step_UD: Tensor) -> None:
        with torch.enable_grad():
            self._bags(rows_U).backward(step_UD)

    def _bags(self, rows_U: Tensor) -> Tensor:
        bags: Tensor = self._tbe(rows_U, torch.arange(rows_U.numel() + 1, device=rows_U.device))
        return bags


class TorchRows:
    """The twin in plain torch, for the contract tests and for machines without FBGEMM's kernels."""

    def __init__(self, num_rows: int, dim: int, device: torch.device):
        self._weight = torch.zeros(num_rows, dim, device=device)

    @property
    def weight_RD(self) -> Tensor:
        return self._weight

    def lookup(self, rows_U: Tensor) -> Tensor:
        return self._weight[rows_U]

    def subtract(self, rows_U: Tensor, step_UD: Tensor) -> None:
        self._weight.index_add_(0, rows_U, step_UD, alpha=-1)
