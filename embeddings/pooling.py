"""From a batch's distinct rows to vectors: one sum or mean a feature and row, or the rows themselves in sequence.

Shape letters: B rows of the batch, G bags, N ids, U distinct rows, D numbers a row, S places or statistics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embeddings.client import Block
from embeddings.dedupe import sums_by_pair
from embeddings.jagged import Jagged


@dataclass(frozen=True)
class Pooling:
    """How a feature's ids become one vector. mean: of the rows, else their sum. keep_B: 0/1 for each row of the batch,
    whether its ids count at all. last: only the last so many ids of a list count.
    """

    mean: bool = True
    keep_B: Tensor | None = None
    last: int | None = None


def pool(block: Block, poolings: Mapping[str, Pooling]) -> Tensor:
    """Each feature's vector, zeros for an empty list: [F, B, D], F the block's features in their order."""
    hows = [poolings[feature] for feature in block.features]
    bags = _last(block.ids, hows) if any(how.last is not None for how in hows) else block.ids
    pooled_GD: Tensor = _Bags.apply(block.rows_UD, bags, _scale(hows, bags.lengths_B.view(len(hows), -1)))
    return pooled_GD.view(len(hows), -1, block.rows_UD.shape[1])


def _scale(hows: Sequence[Pooling], lengths_FB: Tensor) -> Tensor | None:
    """By what each bag's sum is multiplied: [G, 1]; None when all keep theirs."""
    if not any(how.mean or how.keep_B is not None for how in hows):
        return None
    is_mean_F1 = torch.tensor([[how.mean] for how in hows], device=lengths_FB.device)
    scale_FB = torch.where(is_mean_F1, 1.0 / lengths_FB.clamp(min=1), 1.0)
    for scale_B, how in zip(scale_FB, hows, strict=True):
        if how.keep_B is not None:
            scale_B *= how.keep_B
    return scale_FB.view(-1, 1)


def _last(ids: Jagged, hows: Sequence[Pooling]) -> Jagged:
    """The lists without those ids that a feature's `last` leaves out."""
    most_F = torch.tensor([ids.values_N.numel() if how.last is None else how.last for how in hows])
    most_G = most_F.to(ids.offsets.device).repeat_interleave(ids.num_rows // len(hows))
    return _tails(ids, torch.minimum(ids.lengths_B, most_G))


def _tails(ids: Jagged, taken_G: Tensor) -> Jagged:
    """The last so many values of each list."""
    shorter = Jagged.from_lengths(ids.values_N, taken_G)
    shift_G = (ids.offsets[1:] - taken_G) - shorter.offsets[:-1]
    places = torch.arange(int(shorter.offsets[-1]), device=taken_G.device) + shift_G.repeat_interleave(taken_G)
    return Jagged(ids.values_N[places], shorter.offsets)


def sequence(block: Block, feature: str, length: int) -> tuple[Tensor, Tensor]:
    """A feature's last `length` ids of each row in their order, unpooled: rows [B, S, D], zeros behind the end, and
    whether there is an id: bool [B, S].
    """
    num_rows = block.ids.num_rows // len(block.features)
    first = block.features.index(feature) * num_rows
    lists = block.ids.select(torch.arange(first, first + num_rows, device=block.ids.offsets.device))
    taken_B = lists.lengths_B.clamp(max=length)
    present_BS = torch.arange(length, device=taken_B.device) < taken_B.unsqueeze(1)
    one_each = Jagged.from_lengths(_tails(lists, taken_B).values_N, present_BS.flatten().long())
    rows_GD: Tensor = _Bags.apply(block.rows_UD, one_each, None)
    return rows_GD.view(num_rows, length, block.rows_UD.shape[1]), present_BS


def statistics(block: Block, feature: str) -> Tensor:
    """What happened until now to a feature's ids, summed over each row's: [B, S], zeros for ids without a row."""
    num_rows = block.ids.num_rows // len(block.features)
    first = block.features.index(feature) * num_rows
    lists = block.ids.select(torch.arange(first, first + num_rows, device=block.ids.offsets.device))
    return lists.sums(block.statistics_US)


class _Bags(torch.autograd.Function):
    """The sum of each bag's rows, times the bag's scale: [G, D]. Backward is the same operation turned round: for each
    row the sum over the bags that hold it. Autograd's own backward of embedding_bag takes ten times as long on CPU.
    """

    @staticmethod
    def forward(ctx: Any, rows_UD: Tensor, bags: Jagged, scale_G1: Tensor | None) -> Tensor:
        ctx.bags, ctx.scale_G1, ctx.num_rows = bags, scale_G1, rows_UD.shape[0]
        pooled_GD = bags.sums(rows_UD)
        return pooled_GD if scale_G1 is None else pooled_GD.mul_(scale_G1)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor, None, None]:
        scaled_GD = grad_GD.contiguous() if ctx.scale_G1 is None else grad_GD * ctx.scale_G1
        return sums_by_pair(ctx.bags, scaled_GD, ctx.num_rows), None, None
