"""How workers talk: one small protocol, for one process and for many.

Every call is collective: all workers make the same calls in the same order, a worker without work with empty tensors.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor


class Exchange(Protocol):
    """Worker `rank` of `num_workers`."""

    rank: int
    num_workers: int

    def all_to_all(self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        """Send send[0:s0] to worker 0, the next s1 to worker 1 ...; returns what the others sent here, worker 0's
        part first.
        """
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the workers, the same bits on every worker. May reuse the tensor's memory."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """On worker 0 every worker's tensor (1-D, any lengths, in worker order); elsewhere an empty list."""
        ...


class LocalExchange:
    """One worker, no process group."""

    rank = 0
    num_workers = 1

    def all_to_all(self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        return send

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


class CollectiveExchange:
    """The workers of the process group that is already there: gloo on CPU, NCCL on CUDA.

    device: where the group's tensors must lie; what lies elsewhere is moved there and back.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank = torch.distributed.get_rank()
        self.num_workers = torch.distributed.get_world_size()
        self._device = device or torch.device("cpu")

    def all_to_all(self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        moved = send.to(self._device).contiguous()
        received = moved.new_empty(sum(receive_sizes), *send.shape[1:])
        torch.distributed.all_to_all_single(received, moved, list(receive_sizes), list(send_sizes))
        return received.to(send.device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self._device)
        torch.distributed.all_reduce(moved)
        return moved.to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        sizes = torch.zeros(self.num_workers, dtype=torch.int64, device=tensor.device)
        sizes[self.rank] = tensor.numel()
        sizes = self.all_reduce(sizes)
        mine = [tensor.numel()] + [0] * (self.num_workers - 1)
        received = self.all_to_all(tensor, mine, sizes.tolist() if self.rank == 0 else [0] * self.num_workers)
        return list(received.split(sizes.tolist())) if self.rank == 0 else []


def smallest(order: Tensor, how_many: int, exchange: Exchange) -> Tensor:
    """A mask of the how_many smallest over all workers (collective). order: int64 [K, n], each worker's own n items as
    K words, the first decides, read as unsigned; no two items are equal.

    A radix selection: each round settles 16 bits by one histogram over all workers.
    """
    chosen = torch.zeros(order.shape[1], dtype=torch.bool, device=order.device)
    tied = ~chosen
    for word in order:
        for shift in (48, 32, 16, 0):
            digit = (word >> shift) & 0xFFFF
            count = exchange.all_reduce(torch.bincount(digit[tied], minlength=1 << 16))
            up_to = count.cumsum(0)
            cut = int(torch.searchsorted(up_to, how_many))  # the digit that the last of the smallest has
            chosen |= tied & (digit < cut)
            how_many -= int(up_to[cut - 1]) if cut else 0
            tied &= digit == cut
    return chosen | tied if how_many else chosen
