"""The dense net: an encoder of behaviours if any, a body, the towers, and the shallow position tower.

Shape letters: B rows, I input width, R encoder's width, L logits, D floats of a selection feature, P tasks with a
position tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.bodies import Body, Shared
from trainer.draws import Draws
from trainer.encoders import Encoder
from trainer.features import Inputs
from trainer.layers import StackedMlp
from trainer.towers import Towers


class PositionTower(nn.Module):
    """A shallow net on selection features, one logit for each of some tasks; a missing feature has a learnt vector.

    Source: Zhao et al.: Recommending what video to watch next, RecSys 2019, section 4.3.
    """

    def __init__(self, dims: Sequence[int], layers: tuple[int, ...], num_tasks: int):
        super().__init__()
        self.missing = nn.ParameterList(torch.zeros(dim) for dim in dims)
        self.net = StackedMlp(1, sum(dims), layers)
        self.out = nn.Linear(self.net.output_dim, num_tasks)

    def forward(self, selection: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """[B, P]. selection: vectors [B, D] (zeros where missing), presence [B]."""
        vectors = [
            vector_BD + (1 - present_B).unsqueeze(1) * missing_D
            for (vector_BD, present_B), missing_D in zip(selection, self.missing, strict=True)
        ]
        hidden = self.net(torch.cat(vectors, dim=1).unsqueeze(0))[0]
        logits_BP: Tensor = self.out(hidden)
        return logits_BP


@dataclass(frozen=True)
class Outputs:
    """logits_BL: of all heads. shown_BP: what the position tower gives, where it is no part of the logits. shared: what
    the body made.
    """

    logits_BL: Tensor
    shown_BP: Tensor | None
    shared: Shared


class MultiTaskModel(nn.Module):
    """position: the shallow tower, if any. adds_to: for each of its tasks the logits that it is added to; None: it
    stands beside them.
    """

    adds_PL: Tensor | None

    def __init__(
        self,
        body: Body,
        towers: Towers,
        *,
        encoder: Encoder | None = None,
        position: PositionTower | None = None,
        adds_to: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__()
        self.encoder, self.body, self.towers, self.position = encoder, body, towers, position
        adds_PL = None
        if adds_to is not None:
            adds_PL = torch.zeros(len(adds_to), towers.num_logits)
            for place, logits in enumerate(adds_to):
                adds_PL[place, list(logits)] = 1.0
        self.register_buffer("adds_PL", adds_PL, persistent=False)

    def forward(self, inputs: Inputs, draws: Draws | None) -> Outputs:
        """draws None: scoring."""
        x_BI = inputs.x_BI
        if self.encoder is not None:
            x_BI = torch.cat([x_BI, self.encoder(inputs, draws).float()], dim=1)
        shared = self.body(self.body.entry(x_BI), draws)
        logits_BL = self.towers(shared.h_TBH)
        if self.position is None:
            return Outputs(logits_BL, None, shared)
        shown_BP = self.position(inputs.selection).float()
        if self.adds_PL is None:
            return Outputs(logits_BL, shown_BP, shared)
        return Outputs(logits_BL + shown_BP @ self.adds_PL, None, shared)
