"""All rows of one width on one worker: the kernel's weights, the optimizer's states beside them, who has which row.

Tables of one layout (width, type, number of tallies) share a pool, so that a step makes one kernel call a layout, not
one a table. The pool's first rows are its tables' default rows: what an id without a row reads.

Shape letters: R rows, U distinct rows, D numbers a row.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.buckets import hash64
from embeddings.dedupe import Bytes, Int64s
from embeddings.idmap import IdMap
from embeddings.kernels import FbgemmRows, RowKernel
from embeddings.optim import RowOptimizer

Columns = dict[str, NDArray[Any]]  # one array a column, equally long
MakeKernel = Callable[[int, int, torch.dtype, torch.device], RowKernel]


class Layout(NamedTuple):
    """What rows that share a pool have in common."""

    dim: int
    dtype: str
    num_tallies: int


class RowPool:
    """Rows for the tables (their numbers) that share a layout. kernel: makes a RowKernel of rows, dim, type, device."""

    def __init__(
        self,
        layout: Layout,
        tables: Sequence[int],
        capacity_rows: int,
        optimizer: RowOptimizer,
        device: torch.device,
        kernel: MakeKernel = FbgemmRows,
    ):
        self.layout, self.tables, self.optimizer, self.device = layout, list(tables), optimizer, device
        self._make_kernel = kernel
        self.ids = IdMap(len(tables) + capacity_rows, layout.num_tallies)
        self.ids.skip(len(tables))
        self._default_row = np.full(256, -1, np.int64)
        self._default_row[self.tables] = np.arange(len(tables))
        self._kernel, self._states = self._allocate()

    @property
    def dim(self) -> int:
        return self.layout.dim

    @property
    def memory_bytes(self) -> int:
        tensors = [self._kernel.weight_RD, *self._states.values()]
        return self.ids.memory_bytes + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _allocate(self) -> tuple[RowKernel, dict[str, Tensor]]:
        rows, dim = self.ids.capacity_rows, self.layout.dim
        shapes = {name: (rows, dim) if each else (rows,) for name, each in self.optimizer.states.items()}
        states = {name: torch.zeros(shape, device=self.device) for name, shape in shapes.items()}
        return self._make_kernel(rows, dim, getattr(torch, self.layout.dtype), self.device), states

    def _fit(self) -> None:
        """As many rows as the map may give out."""
        rows = self._kernel.weight_RD.shape[0]
        if rows < self.ids.capacity_rows:
            kernel, states = self._allocate()
            kernel.weight_RD[:rows] = self._kernel.weight_RD
            for name, state in self._states.items():
                states[name][:rows] = state
            self._kernel, self._states = kernel, states  # only now: a snapshot may be reading them

    def add(self, key_U: Int64s, table_U: Bytes, weight_UD: Tensor | None) -> Int64s:
        """Rows for distinct pairs that have none, with these weights (None: zeros) and fresh states: int64 [U]."""
        rows_U = self.ids.insert(key_U, table_U)
        self._fit()
        if weight_UD is not None:
            self.write(rows_U, weight_UD, {})
        return rows_U

    def remove(self, rows_U: Int64s) -> None:
        """Free rows; who gets them next finds zeros."""
        rows = self._on_device(rows_U)
        self._kernel.weight_RD.index_fill_(0, rows, 0)
        for state in self._states.values():
            state.index_fill_(0, rows, 0)
        self.ids.remove(rows_U)

    def default_rows(self, table_U: Bytes) -> Int64s:
        """The default row of each of these tables."""
        return self._default_row[table_U]

    def lookup(self, rows_U: Int64s) -> Tensor:
        """The rows' weights in float32: [U, D], a copy."""
        return self._kernel.lookup(self._on_device(rows_U))

    def states(self, rows_U: Int64s) -> dict[str, Tensor]:
        """The optimizer's states of the rows, copies: [U] or [U, D]."""
        rows = self._on_device(rows_U)
        return {name: state.index_select(0, rows) for name, state in self._states.items()}

    def known(self, rows_U: Int64s) -> Columns:
        """All that is known of some rows, copies: row, key, table, count, seen, tally [U, C], weight [U, D] and the
        optimizer's states.
        """
        ids = self.ids
        columns: Columns = {"row": rows_U, "key": ids.key_R[rows_U], "table": ids.table_R[rows_U]}
        columns |= {"count": ids.count_R[rows_U], "seen": ids.seen_R[rows_U], "tally": ids.tally_RC[rows_U]}
        columns |= {"weight": self.lookup(rows_U).cpu().numpy()}
        return columns | {name: state.cpu().numpy() for name, state in self.states(rows_U).items()}

    def write(self, rows_U: Int64s, weight_UD: Tensor, states: dict[str, Tensor]) -> None:
        """Set the rows' weights, and the states that are given."""
        rows = self._on_device(rows_U)
        self._kernel.weight_RD.index_copy_(0, rows, weight_UD.to(self.device, self._kernel.weight_RD.dtype))
        for name, state in states.items():
            self._states[name].index_copy_(0, rows, state.to(self.device))

    def update(self, rows_U: Int64s, grad_UD: Tensor) -> None:
        """One optimizer step of distinct rows from their summed gradients."""
        rows = self._on_device(rows_U)
        if self._kernel.update(self.optimizer, rows, grad_UD, self._states):
            return
        states = {name: state.index_select(0, rows) for name, state in self._states.items()}
        weight_UD = self._kernel.lookup(rows) if self.optimizer.reads_weight else None
        step_UD, states = self.optimizer.step(grad_UD, states, weight_UD)
        for name, state in states.items():
            self._states[name].index_copy_(0, rows, state)
        self._kernel.subtract(rows, step_UD, self._chance(rows_U) if self.layout.dtype == "float16" else None)

    def _chance(self, rows_U: Int64s) -> Tensor:
        """Uniform in [0, 1): [U, D], a pure function of who has the row and of how often it was seen."""
        seen_U = torch.from_numpy(self.ids.key_R[rows_U] ^ (self.ids.count_R[rows_U].astype(np.int64) << 20))
        seen_U = hash64(seen_U.to(self.device))
        columns_D = torch.arange(self.dim, device=self.device)
        return (hash64(seen_U.unsqueeze(1) + columns_D) >> 40).bitwise_and_(2**24 - 1).float() / 2**24

    def _on_device(self, rows_U: Int64s) -> Tensor:
        return torch.from_numpy(rows_U).to(self.device)
