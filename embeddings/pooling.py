"""From a batch's distinct rows to one vector a feature and row.

Shape letters: B rows of the batch, N ids of the feature, U distinct rows, D floats a row.
"""

import torch
from torch import Tensor

from embeddings.client import Pulled


def pool(pulled: Pulled, feature: str, dim: int, *, mean: bool, keep_B: Tensor | None = None) -> Tensor:
    """The sum (or mean) of the feature's rows: [B, D], zeros for an empty list. keep_B: rows (0/1) whose ids count
    at all.
    """
    offsets = pulled.offsets[feature]
    lengths_B = offsets[1:] - offsets[:-1]
    weight_B = torch.ones_like(lengths_B, dtype=torch.float32) if keep_B is None else keep_B
    weight_B = weight_B / lengths_B.clamp(min=1) if mean else weight_B
    return torch.nn.functional.embedding_bag(
        pulled.index_N[feature],
        pulled.rows_UD[dim],
        offsets,
        mode="sum",
        per_sample_weights=weight_B.repeat_interleave(lengths_B),
        include_last_offset=True,
    )
