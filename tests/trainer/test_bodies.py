"""Proof tests of trainer/bodies.py: plain torch twins, identities between bodies, what a gate may and may not do."""

import pytest
import torch
from torch import Tensor, nn

from trainer.bodies import BODIES, MultiGateExperts, OneGateExperts, SharedBottom, StackedLinear, StackedMlp
from trainer.draws import Draws

INPUT, TASKS, EXPERTS = 12, 3, 5
SMALL = {"shared_bottom": {"layers": (8, 6)}} | {
    kind: {"num_experts": 4, "expert_layers": (8, 6)} for kind in ("omoe", "mmoe")
}


def assert_close(got: Tensor, want: Tensor) -> None:
    """Float32 sums of at most 16 products of numbers below 10, in another order."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(num_rows: int = 64) -> Tensor:
    return torch.randn(num_rows, INPUT)


def layers(mlp: StackedMlp) -> list[StackedLinear]:
    return [layer for layer in mlp.layers if isinstance(layer, StackedLinear)]


def mmoe(gate_dropout: float = 0.0, num_experts: int = EXPERTS, num_tasks: int = TASKS) -> MultiGateExperts:
    return MultiGateExperts(INPUT, num_tasks, num_experts=num_experts, expert_layers=(16, 8), gate_dropout=gate_dropout)


def separate(mlp: StackedMlp, index: int) -> nn.Sequential:
    """One of the stacked networks as plain nn.Linear and nn.ReLU with the same weights."""
    found: list[nn.Module] = []
    for layer in layers(mlp):
        linear = nn.Linear(*layer.weight.shape[1:])
        linear.load_state_dict({"weight": layer.weight[index].T, "bias": layer.bias[index, 0]})
        found += [linear, nn.ReLU()]
    return nn.Sequential(*found)


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("num", [1, 3])
def test_stacked_networks_equal_separate_linear_layers(num: int, shared_input: bool) -> None:
    mlp, x = StackedMlp(num, INPUT, (16, 8)), torch.randn(1 if shared_input else num, 40, INPUT)
    out = mlp(x)
    assert out.shape == (num, 40, 8)
    for index in range(num):
        twin = separate(mlp, index)
        expected = twin(x[0 if shared_input else index])
        assert_close(out[index], expected)  # torch.nn.Linear
        expected.sum().backward()
        gradient = torch.autograd.grad(out[index].sum(), list(mlp.parameters()), retain_graph=True)[0][index]
        torch.testing.assert_close(gradient.T, next(twin.parameters()).grad, rtol=1e-4, atol=1e-5)


def test_stacked_layers_start_like_linear_layers() -> None:
    layer, linear = StackedLinear(50, 100, 20), nn.Linear(100, 1_000)
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        # the same uniform law: bounds by definition, spread of 1,000 draws or more to within 10 %
        assert ours.abs().max() <= 0.1 and theirs.abs().max() <= 0.1
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)


def test_a_network_without_layers_hands_its_input_through() -> None:
    mlp, x = StackedMlp(1, INPUT, ()), torch.randn(1, 4, INPUT)
    assert mlp(x) is x and mlp.output_dim == INPUT


def test_shared_bottom_gives_every_task_the_same_network() -> None:
    body, x_BI = SharedBottom(INPUT, TASKS, layers=(16, 8)), inputs()
    h_TBH = body(x_BI, None)
    assert h_TBH.shape == (TASKS, 64, body.output_dim)
    for h_BH in h_TBH:
        assert_close(h_BH, separate(body.bottom, 0)(x_BI))  # torch.nn.Linear


def test_mmoe_equals_a_plain_loop_over_tasks_and_experts() -> None:
    body, x_BI = mmoe(), inputs()
    h_TBH = body(x_BI, None)
    assert h_TBH.shape == (TASKS, 64, body.output_dim)
    for t in range(TASKS):
        share_BE = torch.softmax(x_BI @ body.gates[t], dim=1)
        expected = sum(share_BE[:, e : e + 1] * separate(body.experts, e)(x_BI) for e in range(EXPERTS))
        assert_close(h_TBH[t], expected)  # Ma et al. 2018, eq. 5-7, written out


@pytest.mark.parametrize("body_class", [MultiGateExperts, OneGateExperts])
def test_one_expert_equals_the_shared_bottom(body_class: type[MultiGateExperts]) -> None:
    experts = body_class(INPUT, TASKS, num_experts=1, expert_layers=(16, 8))
    bottom = SharedBottom(INPUT, TASKS, layers=(16, 8))
    bottom.bottom.load_state_dict(experts.experts.state_dict())
    x_BI = inputs()
    assert_close(experts(x_BI, None), bottom(x_BI, None))  # a softmax over one is 1


def test_tied_gates_equal_one_gate() -> None:
    many_gates, one_gate = mmoe(), OneGateExperts(INPUT, TASKS, num_experts=EXPERTS, expert_layers=(16, 8))
    many_gates.experts.load_state_dict(one_gate.experts.state_dict())
    many_gates.gates.data.copy_(one_gate.gates.expand_as(many_gates.gates))
    x_BI = inputs()
    assert one_gate.gates.shape[0] == 1
    assert_close(many_gates(x_BI, None), one_gate(x_BI, None))  # OMoE by definition


def test_the_order_of_the_experts_does_not_matter() -> None:
    body, x_BI, order = mmoe(), inputs(), torch.tensor([3, 0, 4, 1, 2])
    before_TBH, gate_BGE = body(x_BI, None), body.gate(x_BI, None)
    for layer in layers(body.experts):
        layer.weight.data, layer.bias.data = layer.weight.data[order], layer.bias.data[order]
    body.gates.data = body.gates.data[..., order]
    assert_close(body(x_BI, None), before_TBH)  # a sum does not depend on its order
    assert_close(body.gate(x_BI, None), gate_BGE[..., order])


@pytest.mark.parametrize("gate_dropout", [0.0, 0.5])
def test_gates_are_positive_shares_that_sum_to_one(gate_dropout: float) -> None:
    shares_BGE = mmoe(gate_dropout).gate(10 * inputs(1_000), Draws(torch.arange(1_000), 0, 1))
    assert shares_BGE.shape == (1_000, TASKS, EXPERTS) and (shares_BGE >= 0).all()
    torch.testing.assert_close(shares_BGE.sum(-1), torch.ones(1_000, TASKS))  # definition of softmax


def test_without_dropout_a_gate_is_the_same_in_training_and_scoring_and_in_any_batch() -> None:
    body, x_BI = mmoe(), inputs()
    scoring = body.eval().gate(x_BI, None)
    training = body.train().gate(x_BI, Draws(torch.arange(64), 0, 1))
    assert torch.equal(training, scoring)  # the same operations: no batch statistics, no mode
    one_by_one = torch.cat([body.gate(x_BI[b : b + 1], None) for b in range(64)])
    assert_close(one_by_one, scoring)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("num_rows", [0, 1])
def test_a_batch_of_one_row_or_none_keeps_its_shape(kind: str, num_rows: int) -> None:
    body, x_BI = BODIES[kind](INPUT, TASKS, **SMALL[kind]), inputs(2)
    draws = Draws(torch.arange(num_rows), 0, 1)
    assert body(x_BI[:num_rows], draws).shape == (TASKS, num_rows, 6)
    # the row alone gives what it gives beside another one
    assert_close(body(x_BI[:num_rows], None), body(x_BI, None)[:, :num_rows])


def test_experts_start_different_and_of_full_rank() -> None:
    body = mmoe()
    for layer in layers(body.experts):
        flat = layer.weight.detach().flatten(1)
        assert torch.linalg.matrix_rank(flat) == EXPERTS  # equal or constant starts would stay of rank 1 for ever
        assert all(torch.linalg.matrix_rank(w) == min(w.shape) for w in layer.weight.detach())
    assert torch.linalg.matrix_rank(body.gates.detach().flatten(1)) == TASKS


def test_an_expert_that_no_gate_uses_gets_no_gradient() -> None:
    body, x_BI = mmoe(), inputs().abs() + 0.1
    body.gates.data[:, :, 2] = -1e4  # its softmax share underflows to exactly 0
    body(x_BI, None).square().sum().backward()
    for layer in layers(body.experts):
        for gradient in (layer.weight.grad, layer.bias.grad):
            assert gradient is not None
            assert (gradient[2] == 0).all() and (gradient[[0, 1, 3, 4]] != 0).flatten(1).any(1).all()  # exactly


def test_gate_dropout_renormalises_over_the_experts_that_are_left() -> None:
    body, x_BI, draws = mmoe(0.3), inputs(2_000), Draws(torch.arange(2_000), 0, 1)
    full_BGE, dropped_BGE = body.gate(x_BI, None), body.gate(x_BI, draws)
    left_BGE = dropped_BGE > 0
    assert not left_BGE.all()
    expected_BGE = full_BGE * left_BGE / (full_BGE * left_BGE).sum(-1, keepdim=True)
    assert_close(dropped_BGE, expected_BGE)  # Zhao et al. 2019, section 5.2, written out
    assert left_BGE.any(-1).all()


@pytest.mark.parametrize(("rate", "num_experts"), [(0.1, 2), (0.1, 8), (0.5, 2), (0.5, 4)])
def test_gate_dropout_drops_the_named_share_but_never_all_experts_of_a_row(rate: float, num_experts: int) -> None:
    num_rows = 50_000
    body = MultiGateExperts(INPUT, 2, num_experts=num_experts, expert_layers=(), gate_dropout=rate)
    shares_BGE = body.gate(torch.zeros(num_rows, INPUT), Draws(torch.arange(num_rows), 0, 1))
    # closed form: an expert is dropped with probability p unless all are, which falls back to none: p - p^E; five
    # standard deviations of the mean over rows and gates, where the experts of one gate may be dependent
    sigma = (rate * (1 - rate) / (2 * num_rows)) ** 0.5
    assert (shares_BGE == 0).float().mean().item() == pytest.approx(rate - rate**num_experts, abs=5 * sigma)
    assert shares_BGE.isfinite().all() and shares_BGE.sum(-1).min() > 0.999


def test_a_row_that_lost_all_experts_keeps_all() -> None:
    body, x_BI = mmoe(gate_dropout=1.0), inputs()
    shares_BGE = body.gate(x_BI, Draws(torch.arange(64), 0, 1))
    assert torch.equal(shares_BGE, body.gate(x_BI, None))  # the fallback; a softmax over nothing would be NaN


def test_gate_dropout_is_a_property_of_the_row_not_of_the_batch() -> None:
    body, x_BI = mmoe(0.3), inputs(300)
    row_B = torch.randperm(10_000)[:300]
    whole_TBH, order = body(x_BI, Draws(row_B, 0, 1)), torch.randperm(300)
    parts = [body(x_BI[part], Draws(row_B[part], 0, 1)) for part in order.split([1, 99, 0, 200])]
    assert_close(torch.cat(parts, dim=1), whole_TBH[:, order])  # oracle: all rows in one batch


def test_tasks_and_experts_of_a_row_are_dropped_independently() -> None:
    body = MultiGateExperts(INPUT, 2, num_experts=3, expert_layers=(), gate_dropout=0.3)
    gone = (body.gate(torch.zeros(50_000, INPUT), Draws(torch.arange(50_000), 0, 1)) == 0).double().flatten(1).T
    correlations = torch.corrcoef(gone)
    # between gates: independent, five standard deviations; within a gate never all three, a small known dependence
    assert correlations[:3, 3:].abs().max() < 5 / 50_000**0.5
    assert correlations[:3, :3].fill_diagonal_(0).abs().max() < 0.15
