"""Bodies: how tasks share. From the features of a row to one input a task's tower.

Each takes (input_dim, num_tasks, **its settings) and maps x_BI to h_TBH. To add one: a class here, a line in BODIES, a
test. Shape letters: B rows, I input width, E experts, H expert width, T tasks, G gates.
"""

import math

import torch
from torch import Tensor, nn

from trainer.draws import Draws


class StackedLinear(nn.Module):
    """num linear layers side by side, each initialised like nn.Linear: x [num or 1, B, in] -> [num, B, out] in one
    product.
    """

    def __init__(self, num: int, input_dim: int, output_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(input_dim)
        self.weight = nn.Parameter(torch.empty(num, input_dim, output_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num, 1, output_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:  # a shared input: one wide product instead of num narrow ones
            num, _, width = self.weight.shape
            wide = x[0] @ self.weight.transpose(0, 1).flatten(1)
            return wide.view(-1, num, width).transpose(0, 1) + self.bias
        return torch.baddbmm(self.bias, x, self.weight)


class StackedMlp(nn.Module):
    """num ReLU networks side by side: x [num or 1, B, in] -> [num, B, layers[-1]], or x itself when there are no
    layers.
    """

    def __init__(self, num: int, input_dim: int, layers: tuple[int, ...]):
        super().__init__()
        widths = (input_dim, *layers)
        self.layers = nn.ModuleList(StackedLinear(num, a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.output_dim = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Body(nn.Module):
    """What every body is: built from (input_dim, num_tasks, **settings), called with (x_BI, draws) for h_TBH of
    width output_dim.
    """

    output_dim: int


class SharedBottom(Body):
    """One network for all tasks. Source: Caruana: Multitask learning, Machine Learning 28, 1997."""

    def __init__(self, input_dim: int, num_tasks: int, *, layers: tuple[int, ...] = (256, 128)):
        super().__init__()
        self.num_tasks = num_tasks
        self.bottom = StackedMlp(1, input_dim, tuple(layers))
        self.output_dim = self.bottom.output_dim

    def forward(self, x_BI: Tensor, draws: Draws | None) -> Tensor:
        return self.bottom(x_BI.unsqueeze(0)).expand(self.num_tasks, -1, -1)


class MultiGateExperts(Body):
    """MMoE: shared experts, one softmax gate a task, linear and without bias.

    gate_dropout: in training, the chance that a row does without an expert; the gate is renormalised over the rest, and
    a row that lost all keeps all. Source: Ma et al.: Modeling task relationships in multi-task learning with MMoE, KDD
    2018, eq. 5-7; the dropout: Zhao et al.: Recommending what video to watch next, RecSys 2019, section 5.2.
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        *,
        num_experts: int = 4,
        expert_layers: tuple[int, ...] = (256, 128),
        gate_dropout: float = 0.0,
        num_gates: int | None = None,
    ):
        super().__init__()
        self.num_tasks, self.gate_dropout = num_tasks, gate_dropout
        self.experts = StackedMlp(num_experts, input_dim, tuple(expert_layers))
        self.gates = nn.Parameter(torch.empty(num_gates or num_tasks, input_dim, num_experts))
        bound = 1 / math.sqrt(input_dim)
        nn.init.uniform_(self.gates, -bound, bound)
        self.output_dim = self.experts.output_dim

    def gate(self, x_BI: Tensor, draws: Draws | None) -> Tensor:
        """The experts' shares: [B, G, E], summing to 1 over E."""
        num_gates, _, num_experts = self.gates.shape
        logits_BGE = (x_BI @ self.gates.transpose(0, 1).flatten(1)).view(-1, num_gates, num_experts).float()
        if draws is None or self.gate_dropout == 0:
            return logits_BGE.softmax(-1)
        dropped = draws.uniform("gates", num_gates * num_experts).view_as(logits_BGE) < self.gate_dropout
        dropped &= ~dropped.all(-1, keepdim=True)
        return logits_BGE.masked_fill(dropped, -math.inf).softmax(-1)

    def forward(self, x_BI: Tensor, draws: Draws | None) -> Tensor:
        h_BEH = self.experts(x_BI.unsqueeze(0)).transpose(0, 1)
        mixed_BGH = self.gate(x_BI, draws).to(h_BEH.dtype) @ h_BEH
        return mixed_BGH.transpose(0, 1).expand(self.num_tasks, -1, -1)


class OneGateExperts(MultiGateExperts):
    """OMoE: experts mixed by one gate that all tasks share. Source: the same paper, section 4.1."""

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        *,
        num_experts: int = 4,
        expert_layers: tuple[int, ...] = (256, 128),
        gate_dropout: float = 0.0,
    ):
        super().__init__(
            input_dim,
            num_tasks,
            num_experts=num_experts,
            expert_layers=expert_layers,
            gate_dropout=gate_dropout,
            num_gates=1,
        )


BODIES: dict[str, type[Body]] = {"shared_bottom": SharedBottom, "omoe": OneGateExperts, "mmoe": MultiGateExperts}
