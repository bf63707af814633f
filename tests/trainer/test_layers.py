"""Proof tests of trainer/layers.py: every stack of layers against torch.nn's own layers with the same weights."""

import pytest
import torch
from torch import Tensor, nn

from trainer.layers import Entry, Experts, StackedLinear, StackedMlp, StackedNorm

INPUT, ROWS = 12, 40


def assert_close(got: Tensor, want: Tensor) -> None:
    """Float32 sums of at most 40 products of numbers below 10, in another order."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def linear(weight_IO: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """torch.nn.Linear with the same weights."""
    made = nn.Linear(weight_IO.shape[0], weight_IO.shape[1], bias=bias_O is not None)
    made.weight.data = weight_IO.detach().T.clone()
    if bias_O is not None:
        made.bias.data = bias_O.detach().clone()
    return made


def one_of(layer: nn.Module, index: int) -> nn.Linear:
    """One of the layers side by side."""
    return linear(layer.get_parameter("weight")[index], layer.get_parameter("bias")[index, 0])


# --- side by side ---


@pytest.mark.parametrize("rows", [0, 1, ROWS])
@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("num", [1, 3])
def test_stacked_networks_equal_separate_linear_layers(num: int, shared_input: bool, rows: int) -> None:
    mlp, x = StackedMlp(num, INPUT, (16, 8)), torch.randn(1 if shared_input else num, rows, INPUT)
    out = mlp(x)
    assert out.shape == (num, rows, 8) and mlp.output_dim == 8
    for index in range(num):
        first, second = (one_of(layer, index) for layer in mlp.layers)
        expected = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())(x[0 if shared_input else index])
        assert_close(out[index], expected)  # oracle: torch.nn.Linear
        expected.square().sum().backward()
        gradient = torch.autograd.grad(out[index].square().sum(), list(mlp.parameters()), retain_graph=True)[0][index]
        assert first.weight.grad is not None
        torch.testing.assert_close(gradient.T, first.weight.grad, rtol=1e-4, atol=1e-4)


def test_a_shared_input_gives_what_copies_of_it_give() -> None:
    layer, x = StackedLinear(4, INPUT, 8), torch.randn(1, ROWS, INPUT)
    assert_close(layer(x), layer(x.expand(4, -1, -1)))  # oracle: the path with an input each


def test_the_weights_of_a_stack_are_its_layers_in_order() -> None:
    mlp = StackedMlp(2, INPUT, (16, 8))
    assert [(w.shape, b.shape) for w, b in mlp.weights] == [
        ((2, INPUT, 16), (2, 1, 16)),
        ((2, 16, 8), (2, 1, 8)),
    ]  # by hand
    assert mlp.weights[0][0] is mlp.layers[0].weight


def test_a_network_without_layers_hands_its_input_through() -> None:
    mlp, x = StackedMlp(1, INPUT, ()), torch.randn(1, 4, INPUT)
    assert mlp(x) is x and mlp.output_dim == INPUT and mlp.weights == []


@pytest.mark.parametrize("made", [StackedLinear(50, 100, 20), Entry(100, (40, 20), (200, 1))])
def test_layers_start_like_linear_layers(made: nn.Module) -> None:
    theirs = nn.Linear(100, 1_000)
    for name in ("weight", "bias"):
        start = made.get_parameter(name)
        # the same uniform law: bounds by definition, spread of 1,000 draws or more to within 10 %
        assert start.abs().max() <= 0.1
        assert start.std().item() == pytest.approx(theirs.get_parameter(name).std().item(), rel=0.1)


# --- the entry ---


@pytest.mark.parametrize("unbiased", [0, 1, 2, 3])
def test_an_entry_is_separate_linear_layers_side_by_side(unbiased: int) -> None:
    stacks = [(3, 8), (2, 5), (1, 4)]
    entry, x_BI = Entry(INPUT, *stacks, unbiased=unbiased), torch.randn(ROWS, INPUT)
    parts, column = entry.split(entry(x_BI)), 0
    assert [part.shape for part in parts] == [(num, ROWS, width) for num, width in stacks]
    for number, ((num, width), part) in enumerate(zip(stacks, parts, strict=True)):
        for index in range(num):
            columns = slice(column, column + width)
            bias_O = None if number >= len(stacks) - unbiased else entry.bias[columns]
            assert_close(part[index], linear(entry.weight[:, columns], bias_O)(x_BI))  # oracle: torch.nn.Linear
            column += width
    assert column == entry.weight.shape[1] and entry.bias.numel() == sum(n * w for n, w in stacks[: 3 - unbiased])


def test_an_entry_teaches_as_separate_linear_layers_do() -> None:
    entry, x_BI = Entry(INPUT, (2, 8), (1, 4), unbiased=1), torch.randn(ROWS, INPUT)
    twins = [linear(entry.weight[:, c : c + 8], entry.bias[c : c + 8]) for c in (0, 8)]
    gate = linear(entry.weight[:, 16:], None)
    loss = torch.stack([part.square().sum() for part in entry.split(entry(x_BI))]).sum()
    weight, bias = torch.autograd.grad(loss, [entry.weight, entry.bias])
    loss = torch.stack([twin(x_BI).square().sum() for twin in (*twins, gate)]).sum()
    weights = torch.autograd.grad(loss, [twin.weight for twin in (*twins, gate)], retain_graph=True)
    biases = torch.autograd.grad(loss, [twin.bias for twin in twins])
    # oracle: torch.nn.Linear; float32 sums of 40 products below 100
    torch.testing.assert_close(weight, torch.cat(weights).T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bias, torch.cat(biases), rtol=1e-4, atol=1e-3)


def test_the_parts_of_an_entry_that_belong_to_a_user_and_to_an_item_add_up() -> None:
    entry, x_BI = Entry(INPUT, (3, 8), (2, 4), unbiased=1), torch.randn(ROWS, INPUT)
    user, item = x_BI[:, :7] @ entry.weight[:7], x_BI[:, 7:] @ entry.weight[7:]
    bias = torch.cat([entry.bias, torch.zeros(8)])
    assert_close(user + item + bias, entry(x_BI))  # a matrix product by blocks


# --- experts ---


def plain(experts: Experts, index: int, activation: type[nn.Module]) -> nn.Sequential:
    """One of the experts from its second layer on, in torch.nn's layers."""
    found: list[nn.Module] = [activation()]
    for layer in experts.layers:
        found += [one_of(layer, index), activation()]
    if experts.norm is not None:
        norm = nn.LayerNorm(experts.output_dim)
        norm.weight.data, norm.bias.data = experts.norm.scale.data[index, 0], experts.norm.shift.data[index, 0]
        found.insert(len(found) - 1, norm)
    return nn.Sequential(*found)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("activation", ["relu", "swish"])
@pytest.mark.parametrize("layers", [(8,), (8, 6), (8, 6, 5)])
def test_experts_equal_separate_networks(layers: tuple[int, ...], activation: str, normalise: bool) -> None:
    experts, first_NBH = Experts(3, layers, activation, normalise), torch.randn(3, ROWS, layers[0])
    if experts.norm is not None:
        experts.norm.scale.data.normal_()
        experts.norm.shift.data.normal_()
    out = experts(first_NBH)
    assert out.shape == (3, ROWS, experts.output_dim) and experts.output_dim == layers[-1]
    for index in range(3):
        twin = plain(experts, index, {"relu": nn.ReLU, "swish": nn.SiLU}[activation])
        assert_close(out[index], twin(first_NBH[index]))  # oracle: nn.Linear, nn.LayerNorm, nn.ReLU, nn.SiLU


def test_an_expert_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        Experts(2, ())


def test_a_stacked_norm_equals_layer_norms() -> None:
    norm, x_NBH = StackedNorm(3, 16), torch.randn(3, ROWS, 16) * 5 + 2
    norm.scale.data.normal_()
    norm.shift.data.normal_()
    for index, got in enumerate(norm(x_NBH)):
        twin = nn.LayerNorm(16)
        twin.weight.data, twin.bias.data = norm.scale.data[index, 0], norm.shift.data[index, 0]
        assert_close(got, twin(x_NBH[index]))  # oracle: torch.nn.LayerNorm


def test_a_fresh_norm_gives_rows_of_mean_0_and_deviation_1() -> None:
    out = StackedNorm(3, 64)(torch.randn(3, ROWS, 64) * 100 - 30)
    assert_close(out.mean(-1), torch.zeros(3, ROWS))  # the definition; rounding of sums of 64
    # the population's deviation, of inputs so wide that the 1e-5 under the root does not show
    torch.testing.assert_close(out.std(-1, correction=0), torch.ones(3, ROWS), rtol=1e-4, atol=0)
