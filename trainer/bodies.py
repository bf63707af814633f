"""Bodies: how tasks share. From the features of a row to one input a task's tower.

Each is built from (input_dim, num_tasks, **its settings): `entry` maps x_BI to entry_BO, the call maps that to what is
shared. To add one: a class here, a line in BODIES, a test. docs/models.md walks through one.

Shape letters: B rows, I input width, O width of the entry, E experts, H expert width, T tasks, G gates, S streams from
one level of experts to the next, M moments.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.draws import Draws
from trainer.layers import Entry, Experts, StackedLinear, StackedMlp
from trainer.pieces import Share

Activation = Literal["relu", "swish"]


@dataclass(frozen=True)
class Shared:
    """What a body made of a batch: h_TBH, an input for each task's tower. gates: by name, the shares [B, G, E] in which
    experts were mixed; units: by the same name, what the experts gave [E, B, H]; choices: by the same name, how many
    experts each gate may mix (all, where it says nothing). moments_M: sums over rows, of which the body's penalty is a
    function.
    """

    h_TBH: Tensor
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    units: Mapping[str, Tensor] = field(default_factory=dict)
    choices: Mapping[str, Sequence[int]] = field(default_factory=dict)
    moments_M: Tensor | None = None


class Body(nn.Module):
    """What every body is. entry: an affine map of x_BI, and all that reads it. output_dim: H of h_TBH. draws None:
    scoring; nothing is left to chance.
    """

    entry: nn.Module
    output_dim: int

    def forward(self, entry_BO: Tensor, draws: Draws | None) -> Shared:
        raise NotImplementedError

    def penalty(self, moments_M: Tensor) -> Tensor:
        """What is added to the loss, from the moments summed over all workers."""
        return moments_M.new_zeros(())


class SharedBottom(Body):
    """One network for all tasks. Source: Caruana: Multitask learning, Machine Learning 28, 1997."""

    def __init__(self, input_dim: int, num_tasks: int, *, layers: tuple[int, ...] = (256, 128)):
        super().__init__()
        self.num_tasks = num_tasks
        self.entry: nn.Module = Entry(input_dim, (1, layers[0])) if layers else nn.Identity()
        self.bottom = Experts(1, layers) if layers else None
        self.output_dim = layers[-1] if layers else input_dim

    def forward(self, entry_BO: Tensor, draws: Draws | None) -> Shared:
        h_1BH = entry_BO.unsqueeze(0) if self.bottom is None else self.bottom(entry_BO.unsqueeze(0))
        return Shared(h_1BH.expand(self.num_tasks, -1, -1))


class Separate(Body):
    """A network for each task; only the rows of the tables are shared."""

    def __init__(self, input_dim: int, num_tasks: int, *, layers: tuple[int, ...] = (256, 128)):
        super().__init__()
        self.nets = Experts(num_tasks, layers)
        self.entry: Entry = Entry(input_dim, (num_tasks, layers[0]))
        self.output_dim = self.nets.output_dim

    def forward(self, entry_BO: Tensor, draws: Draws | None) -> Shared:
        [first_TBH] = self.entry.split(entry_BO)
        return Shared(self.nets(first_TBH))


class SoftSharing(Separate):
    """A network for each task, drawn towards each other: a penalty of strength * |theta_a - theta_b|^2 for each pair.

    The dense networks alone are drawn together; every task reads the same rows anyway. Source: Duong et al.: Low
    resource dependency parsing, ACL 2015; L2-constrained in Ma et al., KDD 2018, section 6.1.
    """

    def __init__(
        self, input_dim: int, num_tasks: int, *, layers: tuple[int, ...] = (256, 128), strength: float = 0.0001
    ):
        super().__init__(input_dim, num_tasks, layers=layers)
        self._num_tasks, self._strength = num_tasks, strength

    def forward(self, entry_BO: Tensor, draws: Draws | None) -> Shared:
        apart = self._apart()
        return Shared(super().forward(entry_BO, draws).h_TBH, moments_M=torch.stack([apart, torch.ones_like(apart)]))

    def _apart(self) -> Tensor:
        """Squared distances of the tasks' parameters, added up over pairs."""
        width = self.entry.weight.shape[1] // self._num_tasks
        mine = [self.entry.weight.unflatten(1, (-1, width)).movedim(1, 0), self.entry.bias.unflatten(0, (-1, width))]
        stacks = [*mine, *self.nets.parameters()]
        pairs = combinations(range(self._num_tasks), 2)
        distances = [(stack[a] - stack[b]).square().sum() for a, b in pairs for stack in stacks]
        return torch.stack([self.entry.weight.new_zeros(()), *distances]).sum()

    def penalty(self, moments_M: Tensor) -> Tensor:
        return self._strength * moments_M[0] / moments_M[1]  # every worker told the same: their mean


@dataclass(frozen=True)
class Level:
    """Experts and gates. Which stream of the level below each of them reads, and which experts each gate may mix. A
    gate makes a stream; the gates of the last level are the tasks'.
    """

    experts: Sequence[int]
    gates: Sequence[int]
    mixes: Sequence[Sequence[int]]

    @staticmethod
    def dense(num_experts: int, num_gates: int) -> "Level":
        """All read the one stream, and every gate mixes all experts."""
        return Level([0] * num_experts, [0] * num_gates, [range(num_experts)] * num_gates)


class LayeredExperts(Body):
    """Levels of experts that softmax gates mix: MMoE and its kin, which differ only in their levels. Gates are linear
    and without bias.

    gate_dropout: in training, the chance that a row does without an expert; the gate is renormalised over the rest, and
    a row that lost all keeps all (Zhao et al.: Recommending what video to watch next, RecSys 2019, section 5.2).
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        levels: Sequence[Level],
        expert_layers: tuple[int, ...],
        gate_dropout: float,
        activation: str,
        normalise: bool,
    ):
        super().__init__()
        self.num_tasks, self.gate_dropout, self.levels = num_tasks, gate_dropout, levels
        first, *above = levels
        made = [Experts(len(level.experts), expert_layers, activation, normalise) for level in levels]
        self.experts = nn.ModuleList(made)
        self.output_dim = made[0].output_dim
        self.entry: Entry = Entry(
            input_dim, (len(first.experts), expert_layers[0]), (len(first.gates), len(first.experts)), unbiased=1
        )
        self.first_layers = nn.ModuleList(
            StackedLinear(len(level.experts), self.output_dim, expert_layers[0]) for level in above
        )
        bound = 1 / math.sqrt(self.output_dim)
        self.gates = nn.ParameterList(
            torch.empty(len(level.gates), self.output_dim, len(level.experts)).uniform_(-bound, bound)
            for level in above
        )
        for number, level in enumerate(levels):
            unseen_GE = torch.ones(len(level.gates), len(level.experts), dtype=torch.bool)
            for gate, mixed in enumerate(level.mixes):
                unseen_GE[gate, list(mixed)] = False
            self.register_buffer(f"unseen_{number}", unseen_GE, persistent=False)

    def forward(self, entry_BO: Tensor, draws: Draws | None) -> Shared:
        first_EBH, logits_GBE = self.entry.split(entry_BO)
        gate_BGE, unit_EBH = self._gate(0, logits_GBE, draws), self.experts[0](first_EBH)
        gates, units = {"level 1": gate_BGE}, {"level 1": unit_EBH}
        for number, level in enumerate(self.levels[1:], start=1):
            streams_SBH = _mixed(gate_BGE, unit_EBH)
            logits_GBE = torch.bmm(streams_SBH[list(level.gates)], self.gates[number - 1])
            unit_EBH = self.experts[number](self.first_layers[number - 1](streams_SBH[list(level.experts)]))
            gate_BGE = self._gate(number, logits_GBE, draws)
            gates[f"level {number + 1}"], units[f"level {number + 1}"] = gate_BGE, unit_EBH
        choices = {name: [len(mixed) for mixed in level.mixes] for name, level in zip(gates, self.levels, strict=True)}
        return Shared(_mixed(gate_BGE, unit_EBH).expand(self.num_tasks, -1, -1), gates, units, choices)

    def _gate(self, number: int, logits_GBE: Tensor, draws: Draws | None) -> Tensor:
        """The experts' shares: [B, G, E], summing to 1 over E."""
        unseen_GE = self.get_buffer(f"unseen_{number}")
        logits_BGE = logits_GBE.transpose(0, 1).float().masked_fill(unseen_GE, -math.inf)
        if draws is None or self.gate_dropout == 0:
            return logits_BGE.softmax(-1)
        uniform = draws.uniform(f"gates of level {number + 1}", unseen_GE.numel()).view_as(logits_BGE)
        dropped_BGE = (uniform < self.gate_dropout) | unseen_GE
        dropped_BGE &= ~dropped_BGE.all(-1, keepdim=True)
        return logits_BGE.masked_fill(dropped_BGE, -math.inf).softmax(-1)


def _mixed(gate_BGE: Tensor, unit_EBH: Tensor) -> Tensor:
    """What each gate makes of the experts: [G, B, H]."""
    return (gate_BGE.to(unit_EBH.dtype) @ unit_EBH.transpose(0, 1)).transpose(0, 1)


class MultiGateExperts(LayeredExperts):
    """MMoE: shared experts, one gate a task. Source: Ma et al.: Modeling task relationships in multi-task learning with
    multi-gate mixture-of-experts, KDD 2018, eq. 5-7.
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        *,
        num_experts: int = 4,
        expert_layers: tuple[int, ...] = (256, 128),
        gate_dropout: Share = 0.0,
        activation: Activation = "relu",
        normalise: bool = False,
    ):
        levels = [Level.dense(num_experts, self._num_gates(num_tasks))]
        super().__init__(input_dim, num_tasks, levels, expert_layers, gate_dropout, activation, normalise)

    def _num_gates(self, num_tasks: int) -> int:
        return num_tasks


class OneGateExperts(MultiGateExperts):
    """OMoE: experts mixed by one gate that all tasks share. Source: the same paper, section 4.1."""

    def _num_gates(self, num_tasks: int) -> int:
        return 1


class StackedExperts(LayeredExperts):
    """Mixtures on mixtures: what one gate made of a level's experts is what the next level reads; the last has one gate
    a task. Source: Eigen, Ranzato, Sutskever: Learning factored representations in a deep mixture of experts, 2013.
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        *,
        num_levels: int = 2,
        num_experts: int = 4,
        expert_layers: tuple[int, ...] = (128,),
        gate_dropout: Share = 0.0,
        activation: Activation = "relu",
        normalise: bool = False,
    ):
        levels = [Level.dense(num_experts, 1)] * (num_levels - 1) + [Level.dense(num_experts, num_tasks)]
        super().__init__(input_dim, num_tasks, levels, expert_layers, gate_dropout, activation, normalise)


class ProgressiveExtraction(LayeredExperts):
    """PLE: each task has experts of its own beside the shared ones, and its gate mixes only these; with one level it is
    CGC. Between levels there is a stream a task and one that all may feed.

    Source: Tang et al.: Progressive layered extraction, RecSys 2020, eq. 1-6.
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        *,
        num_levels: int = 1,
        own_experts: int = 1,
        shared_experts: int = 1,
        expert_layers: tuple[int, ...] = (128, 64),
        gate_dropout: Share = 0.0,
        activation: Activation = "relu",
        normalise: bool = False,
    ):
        owner = [task for task in range(num_tasks) for _ in range(own_experts)] + [num_tasks] * shared_experts
        everything = range(len(owner))
        of_tasks = [[e for e in everything if owner[e] in (task, num_tasks)] for task in range(num_tasks)]
        streams = range(num_tasks + 1)
        levels = []
        for number in range(num_levels):
            last, reads = number == num_levels - 1, [[0] * (num_tasks + 1), list(streams)][number > 0]
            gates, mixes = (reads[:-1], of_tasks) if last else (reads, [*of_tasks, everything])
            levels.append(Level([reads[task] for task in owner], gates, mixes))
        super().__init__(input_dim, num_tasks, levels, expert_layers, gate_dropout, activation, normalise)


class SparseExperts(Body):
    """Each row's gate keeps its top_k experts, and only these are computed. In training the gates are noisy, and two
    penalties keep the experts equally important (sums of shares) and equally loaded (numbers of rows).

    per_task: a gate for each task, else one for all. With top_k 1 a gate learns from the penalties alone, since its one
    share is always 1. Source: Shazeer et al.: Outrageously large neural networks: the
    sparsely-gated mixture-of-experts layer, ICLR 2017, eq. 3-11; gate weights start at zero (appendix A).
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        expert_layers: tuple[int, ...] = (128, 64),
        per_task: bool = True,
        importance: float = 0.1,
        load: float = 0.1,
    ):
        super().__init__()
        if top_k > num_experts:
            raise ValueError(f"top_k {top_k} is more than num_experts {num_experts}")
        self.num_tasks, self.top_k, self._importance, self._load = num_tasks, top_k, importance, load
        num_gates = num_tasks if per_task else 1
        self.entry: nn.Module = nn.Identity()
        self.experts = StackedMlp(num_experts, input_dim, expert_layers)
        self.gates = nn.Parameter(torch.zeros(num_gates, input_dim, num_experts))
        self.noise = nn.Parameter(torch.zeros(num_gates, input_dim, num_experts))
        self.output_dim = self.experts.output_dim

    def forward(self, entry_BO: Tensor, draws: Draws | None) -> Shared:
        clean_BGE = self._linear(entry_BO, self.gates)
        if draws is None:
            gate_BGE, _ = self._keep(clean_BGE)
            return Shared(self._mix(entry_BO, gate_BGE), {"level 1": gate_BGE})
        spread_BGE = nn.functional.softplus(self._linear(entry_BO, self.noise)) + 0.01
        noisy_BGE = clean_BGE + spread_BGE * draws.normal("gate noise", clean_BGE.shape[1:].numel()).view_as(clean_BGE)
        gate_BGE, falling_BGE = self._keep(noisy_BGE)
        load_BGE = self._chance(clean_BGE, spread_BGE, gate_BGE > 0, falling_BGE)
        moments_M = torch.cat([gate_BGE.sum(0).flatten(), load_BGE.sum(0).flatten()])
        return Shared(self._mix(entry_BO, gate_BGE), {"level 1": gate_BGE}, moments_M=moments_M)

    def _linear(self, x_BI: Tensor, weight_GIE: Tensor) -> Tensor:
        num_gates, _, num_experts = weight_GIE.shape
        return (x_BI @ weight_GIE.transpose(0, 1).flatten(1)).view(-1, num_gates, num_experts).float()

    def _keep(self, logits_BGE: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax over the top_k logits (of equal ones the first), zeros elsewhere; and all logits, falling."""
        falling_BGE, order_BGE = logits_BGE.sort(dim=-1, descending=True, stable=True)
        shares_BGK = falling_BGE[..., : self.top_k].softmax(-1)
        gate_BGE = torch.zeros_like(logits_BGE).scatter(-1, order_BGE[..., : self.top_k], shares_BGK)
        return gate_BGE, falling_BGE

    def _chance(self, clean_BGE: Tensor, spread_BGE: Tensor, kept_BGE: Tensor, falling_BGE: Tensor) -> Tensor:
        """The chance that an expert is kept when only its own noise is drawn anew: it must pass the k-th largest of the
        others' noisy logits (before any softmax). A smooth stand-in for the number of rows.
        """
        falling_BGE = nn.functional.pad(falling_BGE, (0, 1), value=-1e9)  # where all are kept nothing is to be passed
        if_kept_BG1, if_not_BG1 = falling_BGE[..., self.top_k, None], falling_BGE[..., self.top_k - 1, None]
        least_BGE = torch.where(kept_BGE, if_kept_BG1, if_not_BG1)
        return torch.special.ndtr((clean_BGE - least_BGE) / spread_BGE)

    def _mix(self, x_BI: Tensor, gate_BGE: Tensor) -> Tensor:
        """Each expert sees only the rows that keep it."""
        mixed_GBH = x_BI.new_zeros(gate_BGE.shape[1], x_BI.shape[0], self.output_dim)
        for expert in range(gate_BGE.shape[2]):
            rows = (gate_BGE[:, :, expert] > 0).any(1).nonzero().squeeze(1)
            h_BH = x_BI[rows]
            for weight, bias in self.experts.weights:
                h_BH = torch.relu(torch.addmm(bias[expert, 0], h_BH, weight[expert]))
            share_GB1 = gate_BGE[rows, :, expert].T.unsqueeze(2).to(h_BH.dtype)
            mixed_GBH = mixed_GBH.to(h_BH.dtype).index_add(1, rows, share_GB1 * h_BH)
        return mixed_GBH.expand(self.num_tasks, -1, -1)

    def penalty(self, moments_M: Tensor) -> Tensor:
        importance_GE, load_GE = moments_M.view(2, -1, self.gates.shape[2])
        return self._importance * _variation(importance_GE).sum() + self._load * _variation(load_GE).sum()


def _variation(x_GE: Tensor) -> Tensor:
    """The squared coefficient of variation along E: variance (of the population) over squared mean."""
    return x_GE.var(-1, correction=0) / x_GE.mean(-1).square().clamp(min=1e-10)


BODIES: dict[str, type[Body]] = {
    "separate": Separate,
    "soft_sharing": SoftSharing,
    "shared_bottom": SharedBottom,
    "omoe": OneGateExperts,
    "mmoe": MultiGateExperts,
    "sparse_moe": SparseExperts,
    "stacked_moe": StackedExperts,
    "ple": ProgressiveExtraction,
}
