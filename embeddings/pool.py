"""All rows of one width on one worker: the kernel's weights, the optimizer's state beside them, and which rows are
taken.

Tables of equal dim share a pool, so that a step makes one kernel call a width, not one a table.
Shape letters: U distinct rows, D floats a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from embeddings.kernels import FbgemmRows, RowKernel
from embeddings.optim import RowwiseAdagrad


class RowPool:
    """Rows 0 .. num_rows - 1 are taken; the pool doubles when they do not suffice. kernel: makes a RowKernel from
    rows, dim and device.
    """

    def __init__(
        self,
        dim: int,
        capacity_rows: int,
        optimizer: RowwiseAdagrad,
        device: torch.device,
        kernel: Callable[[int, int, torch.device], RowKernel] = FbgemmRows,
    ):
        self.dim, self.num_rows, self.optimizer = dim, 0, optimizer
        self._device, self._make_kernel = device, kernel
        self._kernel: RowKernel = kernel(max(capacity_rows, 1), dim, device)
        self._state_R = torch.zeros(max(capacity_rows, 1), device=device)

    @property
    def capacity_rows(self) -> int:
        return self._state_R.numel()

    @property
    def memory_bytes(self) -> int:
        return self.capacity_rows * (self.dim + 1) * 4

    def take(self, weight_UD: Tensor, state_U: Tensor) -> Tensor:
        """Fresh rows that hold these weights and this state: int64 [U]."""
        first, self.num_rows = self.num_rows, self.num_rows + state_U.numel()
        if self.num_rows > self.capacity_rows:
            self._grow(max(self.num_rows, 2 * self.capacity_rows))
        self._kernel.weight_RD[first : self.num_rows] = weight_UD
        self._state_R[first : self.num_rows] = state_U
        return torch.arange(first, self.num_rows, device=self._device)

    def _grow(self, capacity_rows: int) -> None:
        kernel = self._make_kernel(capacity_rows, self.dim, self._device)
        kernel.weight_RD[: self.capacity_rows] = self._kernel.weight_RD
        self._state_R = torch.cat([self._state_R, self._state_R.new_zeros(capacity_rows - self.capacity_rows)])
        self._kernel = kernel

    def lookup(self, rows_U: Tensor) -> Tensor:
        """The rows' weights [U, D]; zeros for row -1, an id that has no row."""
        weight_UD = self._kernel.lookup(rows_U.clamp(min=0))
        return weight_UD.masked_fill_((rows_U < 0).unsqueeze(1), 0.0)  # not a product: row 0 may hold infinity

    def update(self, rows_U: Tensor, grad_UD: Tensor) -> None:
        """One optimizer step of distinct rows from their summed gradients."""
        self._state_R[rows_U], step_UD = self.optimizer.step(self._state_R[rows_U], grad_UD)
        self._kernel.subtract(rows_U, step_UD)

    def state(self, rows_U: Tensor) -> Tensor:
        """The optimizer's state of the rows: [U]."""
        return self._state_R[rows_U]
