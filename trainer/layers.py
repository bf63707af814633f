"""Layers from which bodies, towers and encoders are made: many small networks side by side, each step one product.

Shape letters: N networks side by side, B rows, I input width, O output width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": torch.relu, "swish": nn.functional.silu}


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

    def __init__(self, num: int, input_dim: int, layers: Sequence[int]):
        super().__init__()
        widths = (input_dim, *layers)
        self.layers = nn.ModuleList(StackedLinear(num, a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.output_dim = widths[-1]

    @property
    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's weight [num, in, out] and bias [num, 1, out]."""
        return [(layer.get_parameter("weight"), layer.get_parameter("bias")) for layer in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Entry(nn.Module):
    """Everything that a body does first with x_BI, side by side in one product: stacks of linear layers, each
    (number, width); the last `unbiased` of the stacks have no bias.

    It is affine, and nothing else of a body reads x_BI: so the parts of it that belong to a user and to an item can be
    made apart, and added.
    """

    def __init__(self, input_dim: int, *stacks: tuple[int, int], unbiased: int = 0):
        super().__init__()
        self._stacks, self._widths = stacks, [num * width for num, width in stacks]
        bound = 1 / math.sqrt(input_dim)
        self.weight = nn.Parameter(torch.empty(input_dim, sum(self._widths)).uniform_(-bound, bound))
        biased = sum(self._widths[: len(stacks) - unbiased])
        self.bias = nn.Parameter(torch.empty(biased).uniform_(-bound, bound))

    def forward(self, x_BI: Tensor) -> Tensor:
        bias = nn.functional.pad(self.bias, (0, self.weight.shape[1] - self.bias.numel()))
        return torch.addmm(bias, x_BI, self.weight)

    def split(self, entry_BO: Tensor) -> list[Tensor]:
        """For each stack its layers' outputs: [num, B, width]."""
        parts = entry_BO.split(self._widths, dim=1)
        return [part.unflatten(1, stack).transpose(0, 1) for part, stack in zip(parts, self._stacks, strict=True)]


class StackedNorm(nn.Module):
    """Layer normalisation of num networks side by side, each with its own scale and shift."""

    def __init__(self, num: int, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num, 1, width))
        self.shift = nn.Parameter(torch.zeros(num, 1, width))

    def forward(self, x_NBH: Tensor) -> Tensor:
        return nn.functional.layer_norm(x_NBH, x_NBH.shape[-1:]) * self.scale + self.shift


class Experts(nn.Module):
    """num networks side by side whose first layer was made by whoever calls: first [num, B, layers[0]] ->
    [num, B, layers[-1]].

    normalise: each network's output has mean 0 and deviation 1 a row before its last activation, then a learnt scale
    and shift, so that no expert outgrows the others or dies. (Layer normalisation: batch normalisation would make a
    row's score depend on the other rows.) Source: HoME: Hierarchy of multi-gate experts, 2024, section 3.1.
    """

    def __init__(self, num: int, layers: Sequence[int], activation: str = "relu", normalise: bool = False):
        super().__init__()
        if not layers:
            raise ValueError("an expert needs at least one layer")
        self.layers = nn.ModuleList(StackedLinear(num, a, b) for a, b in zip(layers, layers[1:], strict=False))
        self._activation = ACTIVATIONS[activation]
        self.output_dim = layers[-1]
        self.norm = StackedNorm(num, layers[-1]) if normalise else None

    def forward(self, first_NBH: Tensor) -> Tensor:
        x = first_NBH
        for layer in self.layers:
            x = layer(self._activation(x))
        if self.norm is not None:
            x = self.norm(x)
        return self._activation(x)
