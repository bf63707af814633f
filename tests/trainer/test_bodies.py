"""Proof tests of trainer/bodies.py: twins in plain torch.nn, identities between bodies, what a gate may and may not do.

Shape letters as in trainer/bodies.py, and P parameters of a task, K kept experts.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.bodies import (
    BODIES,
    Body,
    LayeredExperts,
    MultiGateExperts,
    OneGateExperts,
    ProgressiveExtraction,
    Separate,
    Shared,
    SharedBottom,
    SoftSharing,
    SparseExperts,
    StackedExperts,
)
from trainer.draws import Draws
from trainer.layers import Entry, Experts
from trainer.step import slope

INPUT, TASKS, EXPERTS, ROWS = 12, 3, 5, 64
FIRST, WIDTH = 8, 6  # of an expert's two layers
LAYERS = (FIRST, WIDTH)

VARIANTS: dict[str, dict[str, Any]] = {
    "separate": {"kind": "separate", "layers": LAYERS},
    "soft_sharing": {"kind": "soft_sharing", "layers": LAYERS},
    "shared_bottom": {"kind": "shared_bottom", "layers": LAYERS},
    "shared_bottom of no layers": {"kind": "shared_bottom", "layers": ()},
    "omoe": {"kind": "omoe", "expert_layers": LAYERS},
    "mmoe": {"kind": "mmoe", "expert_layers": LAYERS, "gate_dropout": 0.3},
    "mmoe of one layer": {"kind": "mmoe", "expert_layers": (WIDTH,)},
    "mmoe, normalised": {"kind": "mmoe", "expert_layers": LAYERS, "normalise": True, "activation": "swish"},
    "sparse_moe": {"kind": "sparse_moe", "num_experts": 4, "expert_layers": LAYERS},
    "sparse_moe of one gate": {"kind": "sparse_moe", "num_experts": 4, "expert_layers": LAYERS, "per_task": False},
    "stacked_moe": {"kind": "stacked_moe", "expert_layers": LAYERS, "gate_dropout": 0.3},
    "stacked_moe of three": {"kind": "stacked_moe", "num_levels": 3, "expert_layers": LAYERS, "normalise": True},
    "ple": {"kind": "ple", "expert_layers": LAYERS, "gate_dropout": 0.3},
    "ple of three": {"kind": "ple", "num_levels": 3, "own_experts": 2, "expert_layers": LAYERS, "normalise": True},
}


def assert_close(got: Tensor, want: Tensor) -> None:
    """Float32 sums of at most 16 products of numbers below 10, in another order."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(num_rows: int = ROWS) -> Tensor:
    return torch.randn(num_rows, INPUT)


def chance(num_rows: int = ROWS) -> Draws:
    return Draws(torch.arange(num_rows), 0, 1)


def made(variant: str, num_tasks: int = TASKS) -> Body:
    settings = dict(VARIANTS[variant])
    return BODIES[settings.pop("kind")](INPUT, num_tasks, **settings)


def run(body: Body, x_BI: Tensor, draws: Draws | None = None) -> Shared:
    shared: Shared = body(body.entry(x_BI), draws)
    return shared


def gate_of(body: Body, x_BI: Tensor, draws: Draws | None = None, level: int = 1) -> Tensor:
    return run(body, x_BI, draws).gates[f"level {level}"]


def entry_of(body: Body) -> Entry:
    assert isinstance(body.entry, Entry)
    return body.entry


def penalty_of(body: Body, parts: Sequence[Shared]) -> Tensor:
    """What the workers who made these parts of a batch learn from the body's penalty: their sum, as trainer/step.py
    makes it.
    """
    moments = torch.stack([part.moments_M for part in parts if part.moments_M is not None])
    return slope(body.penalty, moments.detach().double().sum(0)) @ moments.sum(0)


def train(body: Body, x_BI: Tensor, target_TBH: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.SGD(body.parameters(), rate)
    for _ in range(steps):
        shared = run(body, x_BI, chance(len(x_BI)))
        loss = (shared.h_TBH - target_TBH).square().mean()
        if shared.moments_M is not None:
            loss = loss + penalty_of(body, [shared])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# --- plain twins: the same weights in nn.Linear, one network at a time ---


def linear(weight_IO: Tensor, bias_O: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight_IO.shape[0], weight_IO.shape[1], bias=bias_O is not None)
    layer.weight.data = weight_IO.detach().T.clone()
    if bias_O is not None:
        layer.bias.data = bias_O.detach().clone()
    return layer


def network(first: nn.Linear, experts: Experts, index: int) -> nn.Sequential:
    """One of the networks side by side whose first layer is given."""
    found: list[nn.Module] = [first, nn.ReLU()]
    for layer in experts.layers:
        found += [linear(layer.get_parameter("weight")[index], layer.get_parameter("bias")[index, 0]), nn.ReLU()]
    return nn.Sequential(*found)


def first_layer(body: Body, index: int) -> nn.Linear:
    """The index-th of the first layers in the entry, each FIRST wide."""
    entry, columns = entry_of(body), slice(index * FIRST, (index + 1) * FIRST)
    return linear(entry.weight[:, columns], entry.bias[columns])


def networks(body: LayeredExperts, level: int) -> list[nn.Sequential]:
    experts = body.experts[level]
    assert isinstance(experts, Experts)
    if level == 0:
        return [network(first_layer(body, e), experts, e) for e in range(len(body.levels[0].experts))]
    stack = body.first_layers[level - 1]
    weight, bias = stack.get_parameter("weight"), stack.get_parameter("bias")
    return [network(linear(weight[e], bias[e, 0]), experts, e) for e in range(len(weight))]


def first_gates(body: LayeredExperts) -> Tensor:
    """The gates of the first level: a view of the entry's weights [I, G, E]."""
    num_gates, num_experts = len(body.levels[0].gates), len(body.levels[0].experts)
    return entry_of(body).weight.data[:, -num_gates * num_experts :].unflatten(1, (num_gates, num_experts))


def gates(body: LayeredExperts, level: int) -> list[Tensor]:
    """Each gate's weights [input, E]."""
    return list(first_gates(body).unbind(1) if level == 0 else body.gates[level - 1].detach())


def mixture(stream: Tensor, gate_IE: Tensor, expert_outputs: Sequence[Tensor]) -> Tensor:
    """softmax(W x) over these experts, and their outputs so mixed."""
    share_BE = linear(gate_IE)(stream).softmax(dim=1)
    return torch.stack([share_BE[:, [e]] * h_BH for e, h_BH in enumerate(expert_outputs)]).sum(0)


def stacked_twin(body: LayeredExperts, x_BI: Tensor) -> Tensor:
    """Levels of mixtures, each of one gate; the last has one a task. One level: MMoE."""
    stream, last = x_BI, len(body.levels) - 1
    for level in range(last):
        stream = mixture(stream, gates(body, level)[0], [net(stream) for net in networks(body, level)])
    outputs = [net(stream) for net in networks(body, last)]
    return torch.stack([mixture(stream, gate_IE, outputs) for gate_IE in gates(body, last)])


def ple_twin(body: LayeredExperts, x_BI: Tensor, own: int, num_shared: int) -> Tensor:
    """Tang et al. 2020, eq. 1-6, written out."""
    streams, shared, last = [x_BI] * (TASKS + 1), TASKS * own, len(body.levels) - 1
    for level in range(last + 1):
        nets, gate = networks(body, level), gates(body, level)
        common = list(range(shared, shared + num_shared))
        mine = [list(range(task * own, (task + 1) * own)) for task in range(TASKS)]
        output = {e: nets[e](streams[task]) for task in range(TASKS) for e in mine[task]}
        output |= {e: nets[e](streams[TASKS]) for e in common}
        seen = [mine[task] + common for task in range(TASKS)] + [sorted(output)]
        streams = [
            mixture(streams[s], gate[s][:, seen[s]], [output[e] for e in seen[s]])
            for s in range(TASKS + (level < last))
        ]
    return torch.stack(streams)


def assert_twins(body: Body, twin: Any) -> None:
    """Equal outputs, and equal gradients to the input."""
    x_BI = inputs().requires_grad_()
    got, want = run(body, x_BI).h_TBH, twin(x_BI)
    assert_close(got, want)
    [slope_got], [slope_want] = (torch.autograd.grad(h.square().sum(), x_BI) for h in (got, want))
    assert_close(slope_got, slope_want)


# --- every body ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_entry_is_affine(variant: str) -> None:
    body, a_BI, b_BI = made(variant), inputs(), inputs()
    with torch.no_grad():
        whole = body.entry(a_BI + b_BI)
        assert_close(whole, body.entry(a_BI) + body.entry(b_BI) - body.entry(torch.zeros(1, INPUT)))  # the definition
        user, item = a_BI.clone(), a_BI.clone()
        user[:, 7:], item[:, :7] = 0, 0
        parts = body.entry(user) + body.entry(item) - body.entry(torch.zeros(1, INPUT))
        if "sparse" not in variant:  # where a rounding might change which experts are kept
            assert_close(body(parts, None).h_TBH, run(body, a_BI).h_TBH)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_but_the_entry_reads_the_features(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, x_BI = made(variant), inputs()
    want_TBH, entry_BO = run(body, x_BI).h_TBH, body.entry(x_BI)
    assert list(inspect.signature(type(body).forward).parameters) == ["self", "entry_BO", "draws"]

    def fail(_: Tensor) -> Tensor:
        raise AssertionError("the entry is called again")

    monkeypatch.setattr(body.entry, "forward", fail)
    assert torch.equal(body(entry_BO, None).h_TBH, want_TBH)  # the same operations


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_task_gets_rows_of_the_promised_width(variant: str, num_tasks: int, training: bool) -> None:
    body = made(variant, num_tasks)
    shared = run(body, inputs(), chance() if training else None)
    assert shared.h_TBH.shape == (num_tasks, ROWS, body.output_dim) and shared.h_TBH.dtype == torch.float32
    assert body.output_dim == (INPUT if variant == "shared_bottom of no layers" else WIDTH)
    assert shared.h_TBH.isfinite().all()
    if shared.moments_M is not None:
        assert body.penalty(shared.moments_M).shape == () and body.penalty(shared.moments_M) >= 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_worker_without_rows_learns_nothing_from_them(variant: str) -> None:
    body, x_BI = made(variant), inputs(0).requires_grad_()
    shared = run(body, x_BI, chance(0))
    assert shared.h_TBH.shape == run(body, x_BI).h_TBH.shape == (TASKS, 0, body.output_dim)
    loss = shared.h_TBH.square().sum()
    if isinstance(body, SparseExperts):
        assert shared.moments_M is not None and not shared.moments_M.any()
        loss = loss + penalty_of(body, [shared])
    loss.backward()
    assert all((p.grad == 0).all() for p in body.parameters() if p.grad is not None)  # sums over no rows; never NaN


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_the_rows_beside_it(variant: str, training: bool) -> None:
    body, x_BI, row_B = made(variant), inputs(), torch.randperm(10_000)[:ROWS]

    def h(rows: Tensor) -> Tensor:
        return run(body, x_BI[rows], Draws(row_B[rows], 0, 1) if training else None).h_TBH

    whole_TBH, order = h(torch.arange(ROWS)), torch.randperm(ROWS)
    parts = [h(rows) for rows in order.split([1, 40, 1, 22])]  # a batch of one row too
    assert [part.shape[1] for part in parts] == [1, 40, 1, 22]
    assert_close(torch.cat(parts, dim=1), whole_TBH[:, order])  # oracle: all rows in one batch


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_draws_give_the_same_bits_and_scoring_leaves_nothing_to_chance(variant: str) -> None:
    body, x_BI = made(variant), inputs()
    assert torch.equal(run(body, x_BI, chance()).h_TBH, run(body, x_BI, chance()).h_TBH)
    first_TBH = run(body.train(), x_BI).h_TBH
    torch.manual_seed(17)
    assert torch.equal(run(body.eval(), x_BI).h_TBH, first_TBH)  # neither torch's generator nor the mode tells


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant: str) -> None:
    body, x_BI = made(variant), inputs(256).requires_grad_()
    if isinstance(body, SparseExperts):
        torch.nn.init.normal_(body.gates)  # all zeros, the experts are equally good and two rounds are needed
    shared = run(body, x_BI, chance(256))
    loss = (shared.h_TBH - torch.randn_like(shared.h_TBH)).square().mean()
    if shared.moments_M is not None:
        loss = loss + penalty_of(body, [shared])
    loss.backward()
    for name, parameter in [("the features", x_BI), *body.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name  # a parameter without gradient is dead weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_bodies_work_in_bfloat16(variant: str) -> None:
    body, x_BI = made(variant), inputs(256).requires_grad_()
    want_TBH = run(body, x_BI).h_TBH
    with torch.autocast("cpu", torch.bfloat16):
        got_TBH, shared = run(body, x_BI).h_TBH.float(), run(body, x_BI, chance(256))
    # 8 bits of mantissa through at most six layers; a row of sparse_moe may change its expert: so on average
    assert (got_TBH - want_TBH).abs().mean() < 0.03 * want_TBH.abs().mean()
    for gate in shared.gates.values():
        torch.testing.assert_close(gate.float().sum(-1), torch.ones(gate.shape[:2]))  # shares are made in float32
    loss = shared.h_TBH.float().square().mean()
    (loss if shared.moments_M is None else loss + penalty_of(body, [shared])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x_BI, *body.parameters()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_body_is_its_state(variant: str) -> None:
    body, again, x_BI = made(variant), made(variant), inputs()
    assert not torch.equal(run(again, x_BI).h_TBH, run(body, x_BI).h_TBH) or body.output_dim == INPUT
    again.load_state_dict(body.state_dict())
    assert torch.equal(run(again, x_BI).h_TBH, run(body, x_BI).h_TBH)
    assert set(body.state_dict()) == {name for name, _ in body.named_parameters()}  # what is built is not stored


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("variant", ["soft_sharing", "sparse_moe", "sparse_moe of one gate"])
def test_workers_together_learn_from_a_penalty_what_one_worker_does(variant: str, num_workers: int) -> None:
    body, x_BI = made(variant), inputs()
    if isinstance(body, SparseExperts):
        torch.nn.init.normal_(body.gates)

    def learnt(parts: Sequence[Tensor]) -> Tensor:
        shared = [run(body, x_BI[rows], Draws(rows, 0, 1)) for rows in parts]
        found = torch.autograd.grad(penalty_of(body, shared), list(body.parameters()), materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    sizes = [ROWS - 10 * (num_workers - 1)] + [10] * (num_workers - 1)
    alone_P = learnt([torch.arange(ROWS)])
    assert (alone_P != 0).any()
    assert_close(learnt(torch.arange(ROWS).split(sizes)), alone_P)  # oracle: all rows on one worker


# --- P06: separate networks and soft sharing ---


def by_task(body: Separate, tensors: Sequence[Tensor]) -> Tensor:
    """What belongs to each task of the parameters, or of something of their shapes: [T, P]."""
    weight, bias, *stacks = tensors
    own = [weight.view(INPUT, TASKS, -1).movedim(1, 0), bias.view(TASKS, -1), *stacks]
    return torch.cat([each.flatten(1) for each in own], dim=1)


def parameters(body: Separate) -> list[nn.Parameter]:
    return [entry_of(body).weight, entry_of(body).bias, *body.nets.parameters()]


@pytest.mark.parametrize("body_class", [Separate, SoftSharing])
def test_every_task_has_a_network_of_its_own(body_class: type[Separate]) -> None:
    body = body_class(INPUT, TASKS, layers=LAYERS)
    # oracle: torch.nn.Linear
    assert_twins(body, lambda x: torch.stack([network(first_layer(body, t), body.nets, t)(x) for t in range(TASKS)]))
    h_TBH = run(body, inputs()).h_TBH
    for task in range(TASKS):
        found = torch.autograd.grad(h_TBH[task].sum(), parameters(body), retain_graph=True)
        assert (by_task(body, found) != 0).any(1).tolist() == [other == task for other in range(TASKS)]  # exactly 0


def test_soft_sharing_of_strength_0_learns_what_separate_networks_learn() -> None:
    soft, separate = SoftSharing(INPUT, TASKS, layers=LAYERS, strength=0.0), Separate(INPUT, TASKS, layers=LAYERS)
    separate.load_state_dict(soft.state_dict())
    x_BI, target_TBH = inputs(), torch.randn(TASKS, ROWS, WIDTH)
    for body in (soft, separate):
        train(body, x_BI, target_TBH, steps=5, rate=0.1)
    assert torch.equal(run(soft, x_BI).h_TBH, run(separate, x_BI).h_TBH)  # bit for bit: nothing is added but zeros
    for name, parameter in separate.named_parameters():
        assert torch.equal(soft.get_parameter(name), parameter)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_soft_sharing_pulls_each_network_to_the_others(num_workers: int) -> None:
    body, strength = SoftSharing(INPUT, TASKS, layers=LAYERS, strength=0.25), 0.25
    shared = [run(body, rows_BI, chance(len(rows_BI))) for rows_BI in inputs().chunk(num_workers)]
    found_TP = by_task(body, torch.autograd.grad(penalty_of(body, shared), parameters(body)))
    theta_TP = by_task(body, parameters(body))
    pairs_TTP = theta_TP.unsqueeze(1) - theta_TP.unsqueeze(0)
    # closed form, for any number of workers: d/d theta_a of strength * sum of |theta_a - theta_b|^2
    assert_close(found_TP, 2 * strength * pairs_TTP.sum(1))


def test_the_penalty_of_soft_sharing_is_the_squared_distance_of_every_pair() -> None:
    body = SoftSharing(INPUT, TASKS, layers=LAYERS, strength=0.5)
    shared, theta_TP = run(body, inputs(), chance()), by_task(body, parameters(body))
    distance = sum((theta_TP[a] - theta_TP[b]).square().sum().item() for a in range(TASKS) for b in range(a))
    assert shared.moments_M is not None
    for num_workers in (1, 2, 5):
        penalty = body.penalty(num_workers * shared.moments_M)
        assert penalty.item() == pytest.approx(0.5 * distance, rel=1e-5)  # the formula by a plain loop


def test_a_large_strength_makes_one_network_of_all() -> None:
    body, x_BI, target_TBH = SoftSharing(INPUT, TASKS, layers=LAYERS, strength=1000.0), inputs(), torch.zeros(3, 64, 6)
    target_TBH[0] = 1.0  # the tasks want different things
    train(body, x_BI, target_TBH, steps=100, rate=1e-4)  # 2 * strength * tasks * rate = 0.6: below 2, so it converges
    theta_TP, h_TBH = by_task(body, parameters(body)), run(body, x_BI).h_TBH
    for task in (1, 2):
        assert (theta_TP[task] - theta_TP[0]).norm() / theta_TP[0].norm() < 1e-3
        # parameters within 1e-3 of each other, and predictions of the same order
        torch.testing.assert_close(h_TBH[task], h_TBH[0], rtol=0, atol=3e-3)
    alone = SoftSharing(INPUT, TASKS, layers=LAYERS, strength=0.0)
    train(alone, x_BI, target_TBH, steps=200, rate=0.2)
    apart = run(alone, x_BI).h_TBH
    assert (apart[0] - apart[1]).abs().mean() > 0.3  # without it they go their own ways


def test_shared_bottom_gives_every_task_the_same_network() -> None:
    body = SharedBottom(INPUT, TASKS, layers=LAYERS)
    assert isinstance(body.bottom, Experts)
    bottom = network(first_layer(body, 0), body.bottom, 0)
    assert_twins(body, lambda x: torch.stack([bottom(x)] * TASKS))  # oracle: torch.nn.Linear
    empty, x_BI = SharedBottom(INPUT, TASKS, layers=()), inputs()
    assert torch.equal(run(empty, x_BI).h_TBH, torch.stack([x_BI] * TASKS))  # no layers: the features themselves


def test_a_shared_bottom_learns_the_sum_of_what_the_tasks_teach() -> None:
    body, target_TBH = SharedBottom(INPUT, TASKS, layers=LAYERS), torch.randn(TASKS, ROWS, WIDTH)
    loss_T = (run(body, inputs()).h_TBH - target_TBH).square().mean((1, 2))
    weights_T = torch.tensor([0.5, 2.0, 1.0])
    together = torch.autograd.grad((weights_T * loss_T).sum(), list(body.parameters()), retain_graph=True)
    single = [torch.autograd.grad(loss, list(body.parameters()), retain_graph=True) for loss in loss_T]
    for number, gradient in enumerate(together):
        # linearity of the derivative
        assert_close(
            gradient, torch.stack([w * each[number] for w, each in zip(weights_T, single, strict=True)]).sum(0)
        )


# --- P08: mixtures and their gates ---


def mmoe(gate_dropout: float = 0.0, num_experts: int = EXPERTS) -> MultiGateExperts:
    return MultiGateExperts(INPUT, TASKS, num_experts=num_experts, expert_layers=LAYERS, gate_dropout=gate_dropout)


def ple(num_levels: int, own: int = 2, num_shared: int = 1, gate_dropout: float = 0.0) -> ProgressiveExtraction:
    return ProgressiveExtraction(
        INPUT,
        TASKS,
        num_levels=num_levels,
        own_experts=own,
        shared_experts=num_shared,
        expert_layers=LAYERS,
        gate_dropout=gate_dropout,
    )


def test_mmoe_equals_a_plain_loop_over_tasks_and_experts() -> None:
    body = mmoe()
    assert len(gates(body, 0)) == TASKS
    assert_twins(body, lambda x: stacked_twin(body, x))  # Ma et al. 2018, section 4.2, written out


def test_omoe_equals_a_plain_loop_over_experts() -> None:
    body = OneGateExperts(INPUT, TASKS, num_experts=EXPERTS, expert_layers=LAYERS)
    assert len(gates(body, 0)) == 1
    assert_twins(body, lambda x: stacked_twin(body, x).expand(TASKS, -1, -1))  # eq. 5 of the same, for all tasks


@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_stacked_mixtures_equal_a_plain_loop_over_levels(num_levels: int) -> None:
    body = StackedExperts(INPUT, TASKS, num_levels=num_levels, num_experts=EXPERTS, expert_layers=LAYERS)
    assert [len(gates(body, level)) for level in range(num_levels)] == [1] * (num_levels - 1) + [TASKS]
    assert_twins(body, lambda x: stacked_twin(body, x))  # Eigen et al. 2013, eq. 2, with one gate a task at the end


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize(("own", "num_shared"), [(1, 1), (2, 1), (1, 3)])
def test_ple_equals_a_plain_loop_over_levels_and_tasks(num_levels: int, own: int, num_shared: int) -> None:
    body = ple(num_levels, own, num_shared)
    assert [len(gates(body, level)) for level in range(num_levels)] == [TASKS + 1] * (num_levels - 1) + [TASKS]
    assert_twins(body, lambda x: ple_twin(body, x, own, num_shared))  # Tang et al. 2020, eq. 1-6, written out


@pytest.mark.parametrize("num_levels", [1, 2])
@pytest.mark.parametrize("task", range(TASKS))
def test_a_task_of_ple_hears_nothing_from_the_own_experts_of_another(task: int, num_levels: int) -> None:
    body = ple(num_levels)  # experts 0 and 1 of task 0, 2 and 3 of task 1, 4 and 5 of task 2; 6 is shared
    shared = run(body, inputs(), chance())
    found = torch.autograd.grad(shared.h_TBH[task].square().sum(), list(shared.units.values()))
    heard = [{e for e, gradient in enumerate(units) if (gradient != 0).any()} for units in found]  # exactly 0
    mine, everything = {2 * task, 2 * task + 1, 6}, set(range(7))
    # by hand: Tang et al. 2020, figures 4 and 5; a level below, the shared stream has passed on all of them
    assert heard == ([mine] if num_levels == 1 else [everything, mine])


def test_a_gate_of_ple_belongs_to_one_task() -> None:
    body = ple(1)
    for task, h_BH in enumerate(run(body, inputs()).h_TBH):
        [gradient] = torch.autograd.grad(h_BH.square().sum(), [entry_of(body).weight], retain_graph=True)
        taught_GE = (gradient[:, -TASKS * 7 :].unflatten(1, (TASKS, 7)) != 0).any(0)
        expected = [[g == task and e in (2 * task, 2 * task + 1, 6) for e in range(7)] for g in range(TASKS)]
        assert taught_GE.tolist() == expected  # by hand: its own gate, and in it the experts that it may mix


@pytest.mark.parametrize("body_class", [MultiGateExperts, OneGateExperts])
def test_one_expert_equals_the_shared_bottom(body_class: type[LayeredExperts]) -> None:
    experts = body_class(INPUT, TASKS, num_experts=1, expert_layers=LAYERS)  # type: ignore[call-arg]
    bottom = SharedBottom(INPUT, TASKS, layers=LAYERS)
    assert isinstance(bottom.bottom, Experts)
    bottom.bottom.load_state_dict(experts.experts[0].state_dict())
    entry_of(bottom).weight.data, entry_of(bottom).bias.data = (
        entry_of(experts).weight.data[:, :FIRST],
        entry_of(experts).bias.data,
    )
    x_BI = inputs()
    assert_close(run(experts, x_BI).h_TBH, run(bottom, x_BI).h_TBH)  # a softmax over one is 1


def test_equal_gates_equal_one_gate() -> None:
    many, one, x_BI = mmoe(), OneGateExperts(INPUT, TASKS, num_experts=EXPERTS, expert_layers=LAYERS), inputs()
    many.experts.load_state_dict(one.experts.state_dict())
    first = EXPERTS * FIRST
    entry_of(many).weight.data[:, :first], entry_of(many).bias.data = (
        entry_of(one).weight.data[:, :first],
        one.entry.bias,
    )
    first_gates(many).copy_(first_gates(one).expand(-1, TASKS, -1))
    assert_close(run(many, x_BI).h_TBH, run(one, x_BI).h_TBH)  # OMoE by definition


def test_one_level_of_ple_that_may_mix_all_is_mmoe() -> None:
    body, x_BI = ple(1, own=1, num_shared=1), inputs()
    plain = mmoe(num_experts=TASKS + 1)
    plain.load_state_dict(body.state_dict())  # the same parts in the same places
    body.get_buffer("unseen_0").zero_()
    assert torch.equal(run(body, x_BI).h_TBH, run(plain, x_BI).h_TBH)  # they differ in what a gate may mix alone


def test_the_order_of_the_experts_does_not_matter() -> None:
    body, x_BI, order = mmoe(), inputs(), torch.tensor([3, 0, 4, 1, 2])
    before, entry, first = run(body, x_BI), entry_of(body), EXPERTS * FIRST
    entry.weight.data[:, :first] = entry.weight.data[:, :first].unflatten(1, (EXPERTS, FIRST))[:, order].flatten(1)
    entry.bias.data = entry.bias.data.unflatten(0, (EXPERTS, FIRST))[order].flatten()
    for parameter in body.experts.parameters():
        parameter.data = parameter.data[order]
    first_gates(body).copy_(first_gates(body)[..., order].clone())
    after = run(body, x_BI)
    assert_close(after.h_TBH, before.h_TBH)  # a sum does not depend on its order
    assert_close(after.gates["level 1"], before.gates["level 1"][..., order])
    assert_close(after.units["level 1"], before.units["level 1"][order])


LAYERED = [variant for variant, settings in VARIANTS.items() if issubclass(BODIES[settings["kind"]], LayeredExperts)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", [*LAYERED, "sparse_moe", "sparse_moe of one gate"])
def test_gates_are_shares_that_sum_to_one(variant: str, training: bool) -> None:
    for gate_BGE in run(made(variant), 10 * inputs(), chance() if training else None).gates.values():
        assert gate_BGE.dtype == torch.float32 and gate_BGE.shape[0] == ROWS and (gate_BGE >= 0).all()
        torch.testing.assert_close(gate_BGE.sum(-1), torch.ones(gate_BGE.shape[:2]))  # the definition of softmax


@pytest.mark.parametrize("variant", LAYERED)
def test_what_a_body_gives_is_what_its_gates_make_of_its_units(variant: str) -> None:
    body = made(variant)
    shared = run(body, inputs(), chance())
    name = f"level {len(body.levels)}" if isinstance(body, LayeredExperts) else ""
    assert list(shared.gates) == list(shared.units) and list(shared.gates)[-1] == name
    mixed = torch.einsum("bge,ebh->gbh", shared.gates[name], shared.units[name])  # oracle: einsum
    assert_close(shared.h_TBH, mixed.expand_as(shared.h_TBH))


def test_without_dropout_a_gate_is_the_same_in_training_and_scoring() -> None:
    body, x_BI = mmoe(), inputs()
    scoring = gate_of(body.eval(), x_BI)
    assert torch.equal(gate_of(body.train(), x_BI, chance()), scoring)  # the same operations: no statistics, no mode


@pytest.mark.parametrize("steps", [0, 20])
def test_the_weights_of_every_expert_are_of_full_rank(steps: int) -> None:
    body, x_BI = mmoe(), inputs(256)
    train(body, x_BI, torch.randn(TASKS, 256, WIDTH), steps, rate=0.1)
    first = entry_of(body).weight.detach()[:, : EXPERTS * FIRST].unflatten(1, (EXPERTS, FIRST))
    [second] = [layer.get_parameter("weight").detach() for layer in body.experts[0].layers]  # type: ignore[union-attr]
    # an expert that starts constant stays of rank 1 for ever: all of its units learn the same
    assert [int(torch.linalg.matrix_rank(w)) for w in first.unbind(1)] == [FIRST] * EXPERTS
    assert [int(torch.linalg.matrix_rank(w)) for w in second] == [WIDTH] * EXPERTS
    assert torch.linalg.matrix_rank(first.movedim(1, 0).flatten(1)) == EXPERTS  # no two experts are alike
    assert torch.linalg.matrix_rank(first_gates(body).movedim(1, 0).flatten(1)) == TASKS


def test_an_expert_that_no_gate_uses_gets_no_gradient() -> None:
    body, x_BI = mmoe(), inputs().abs() + 0.1
    first_gates(body)[:, :, 2] = -1e4  # its share underflows to exactly 0
    learnt = [entry_of(body).weight, entry_of(body).bias, *body.experts.parameters()]
    weight, bias, *others = torch.autograd.grad(run(body, x_BI).h_TBH.square().sum(), learnt)
    first = weight[:, : EXPERTS * FIRST].unflatten(1, (EXPERTS, FIRST)).movedim(1, 0)
    for gradient in (first, bias.view(EXPERTS, -1), *others):
        assert (gradient != 0).flatten(1).any(1).tolist() == [e != 2 for e in range(EXPERTS)]  # exactly 0


@pytest.mark.parametrize("variant", ["mmoe, normalised", "stacked_moe of three", "ple of three"])
def test_normalised_experts_speak_equally_loud_before_their_activation(variant: str) -> None:
    body, seen = made(variant), []
    assert isinstance(body, LayeredExperts)
    for experts in body.experts:
        assert isinstance(experts, Experts) and experts.norm is not None
        experts.norm.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    run(body, 100 * inputs())
    assert len(seen) == len(body.levels)
    for given_EBH, out_EBH in seen:
        assert_close(out_EBH.mean(-1), torch.zeros(out_EBH.shape[:2]))  # the definition
        variance_EB = given_EBH.var(-1, correction=0)
        assert_close(out_EBH.var(-1, correction=0), variance_EB / (variance_EB + 1e-5))  # 1 but for the usual epsilon


@pytest.mark.parametrize(("activation", "function"), [("relu", nn.ReLU()), ("swish", nn.SiLU())])
def test_units_are_what_the_activation_makes(activation: Any, function: nn.Module) -> None:
    body, x_BI = (
        MultiGateExperts(INPUT, TASKS, num_experts=EXPERTS, expert_layers=(WIDTH,), activation=activation),
        inputs(),
    )
    first = entry_of(body)(x_BI)[:, : EXPERTS * WIDTH].unflatten(1, (EXPERTS, WIDTH)).transpose(0, 1)
    assert_close(run(body, x_BI).units["level 1"], function(first))  # oracle: torch.nn


# --- P11: gates that do without an expert ---


def seen_by(body: LayeredExperts, level: int) -> Tensor:
    """Which experts each gate may mix, as the level says: [G, E]."""
    mixes, num_experts = body.levels[level - 1].mixes, len(body.levels[level - 1].experts)
    return torch.tensor([[e in mixed for e in range(num_experts)] for mixed in mixes])


def test_gate_dropout_renormalises_over_the_experts_that_are_left() -> None:
    for body in (mmoe(0.3), ple(1, gate_dropout=0.3)):
        x_BI = inputs(2_000)
        full_BGE, dropped_BGE = gate_of(body, x_BI), gate_of(body, x_BI, chance(2_000))
        left_BGE = dropped_BGE > 0
        assert left_BGE.any(-1).all() and (full_BGE > 0)[~left_BGE].any()
        expected_BGE = full_BGE * left_BGE / (full_BGE * left_BGE).sum(-1, keepdim=True)
        assert_close(dropped_BGE, expected_BGE)  # Zhao et al. 2019, section 5.2, written out


@pytest.mark.parametrize(("rate", "num_experts"), [(0.1, 2), (0.1, 8), (0.5, 2), (0.5, 4)])
def test_gate_dropout_drops_the_named_share_but_never_all_experts_of_a_row(rate: float, num_experts: int) -> None:
    num_rows = 20_000
    body = MultiGateExperts(INPUT, 2, num_experts=num_experts, expert_layers=(2,), gate_dropout=rate)
    shares_BGE = gate_of(body, torch.zeros(num_rows, INPUT), chance(num_rows))
    # closed form: an expert is dropped with probability p unless all are, which falls back to none: p - p^E; five
    # standard deviations of the mean over rows and gates, where the experts of one gate may be dependent
    sigma = (rate * (1 - rate) / (2 * num_rows)) ** 0.5
    assert (shares_BGE == 0).float().mean().item() == pytest.approx(rate - rate**num_experts, abs=5 * sigma)
    assert shares_BGE.isfinite().all() and shares_BGE.sum(-1).min() > 0.999


@pytest.mark.parametrize("body", [mmoe(1.0), ple(2, gate_dropout=1.0)])
def test_a_row_that_lost_all_experts_keeps_all(body: LayeredExperts) -> None:
    x_BI = inputs()
    training, scoring = run(body, x_BI, chance()), run(body, x_BI)
    for name, gate_BGE in training.gates.items():
        assert torch.equal(gate_BGE, scoring.gates[name])  # the fallback; a softmax over nothing would be NaN
    assert torch.equal(training.h_TBH, scoring.h_TBH)


@pytest.mark.parametrize("kind", ["omoe", "mmoe", "stacked_moe", "ple"])
def test_a_scored_row_loses_no_expert(kind: str) -> None:
    with_dropout = BODIES[kind](INPUT, TASKS, expert_layers=LAYERS, gate_dropout=0.9)
    without = BODIES[kind](INPUT, TASKS, expert_layers=LAYERS)
    without.load_state_dict(with_dropout.state_dict())
    x_BI = inputs()
    assert torch.equal(run(with_dropout, x_BI).h_TBH, run(without, x_BI).h_TBH)  # the same operations
    assert not torch.equal(run(with_dropout, x_BI, chance()).h_TBH, run(without, x_BI, chance()).h_TBH)


@pytest.mark.parametrize("gate_dropout", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("num_levels", [1, 2])
def test_experts_that_a_gate_may_not_mix_stay_unseen(num_levels: int, gate_dropout: float) -> None:
    body, x_BI = ple(num_levels, gate_dropout=gate_dropout), inputs(500)
    for draws in (None, chance(500)):
        for level in range(1, num_levels + 1):
            gate_BGE, seen_GE = gate_of(body, x_BI, draws, level), seen_by(body, level)
            assert (gate_BGE[:, ~seen_GE] == 0).all()  # exactly, also where a row lost all that it may mix
            assert (gate_BGE > 0).any(0).equal(seen_GE)
            assert_close(gate_BGE.sum(-1), torch.ones(gate_BGE.shape[:2]))


def test_gates_experts_and_levels_of_a_row_are_dropped_independently() -> None:
    body = StackedExperts(INPUT, 2, num_experts=3, expert_layers=(2,), gate_dropout=0.3)
    gates_of_levels = run(body, torch.zeros(20_000, INPUT), chance(20_000)).gates.values()
    gone = torch.cat([(gate_BGE == 0).double().flatten(1) for gate_BGE in gates_of_levels], dim=1).T
    correlations = torch.corrcoef(gone).view(3, 3, 3, 3)  # gate, expert, gate, expert
    for a in range(3):
        for b in range(3):
            # between gates: independent, five standard deviations; in one never all three, a small known dependence
            between = correlations[a, :, b].clone().fill_diagonal_(0) if a == b else correlations[a, :, b]
            assert between.abs().max() < (0.15 if a == b else 5 / 20_000**0.5)


# --- P07: sparse gates ---


def sparse(**settings: Any) -> SparseExperts:
    """With gates that prefer some experts to others, and noise that depends on the row."""
    settings = {"num_experts": EXPERTS, "top_k": 2, "expert_layers": LAYERS, **settings}
    body = SparseExperts(INPUT, TASKS, **settings)
    body.gates.data.normal_(std=0.3)
    body.noise.data.normal_(std=0.3)
    return body


def loads(shared: Shared, num_gates: int = 1) -> Tensor:
    """The estimated numbers of rows: [G, E]."""
    assert shared.moments_M is not None
    return shared.moments_M.view(2, num_gates, -1)[1].detach()


def noisy_logits(body: SparseExperts, x_BI: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Shazeer et al. 2017, eq. 4, of the first gate: clean, spread and noisy [B, E]."""
    clean_BE = (x_BI @ body.gates[0]).detach()
    spread_BE = (nn.functional.softplus(x_BI @ body.noise[0]) + 0.01).detach()
    normal_BE = draws.normal("gate noise", body.gates.shape[0] * clean_BE.shape[1])[:, : clean_BE.shape[1]]
    return clean_BE, spread_BE, clean_BE + spread_BE * normal_BE


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_sparse_gate_keeps_the_greatest_logits_and_nothing_else(top_k: int, training: bool) -> None:
    body, x_BI = sparse(top_k=top_k), inputs()
    gate_BGE = gate_of(body, x_BI, chance() if training else None)
    clean_BE, _, noisy_BE = noisy_logits(body, x_BI, chance())
    for gate_E, logit_E in zip(gate_BGE[:, 0], noisy_BE if training else clean_BE, strict=True):
        kept = sorted(range(EXPERTS), key=logit_E.tolist().__getitem__, reverse=True)[:top_k]
        expected_E = torch.zeros(EXPERTS)
        expected_E[kept] = logit_E[kept].softmax(0)  # Shazeer et al. 2017, eq. 3-5, by a plain loop
        assert_close(gate_E, expected_E)
    assert ((gate_BGE > 0).sum(-1) == top_k).all()


def test_of_equal_logits_the_first_experts_are_kept() -> None:
    body, x_BI = sparse(), torch.eye(INPUT)[:2]
    body.gates.data[:] = 0
    body.gates.data[:, 1] = torch.tensor([0.0, 2, 1, 2, 2])
    gate_BE = gate_of(body, x_BI)[:, 0]
    assert gate_BE.tolist() == [[0.5, 0.5, 0, 0, 0], [0, 0.5, 0, 0.5, 0]]  # by hand


def test_a_fresh_sparse_gate_has_no_preference() -> None:
    body = SparseExperts(INPUT, TASKS, num_experts=EXPERTS)
    assert not body.gates.any() and not body.noise.any()  # appendix A: zeros
    counts_E = (gate_of(body, inputs(20_000), chance(20_000)) > 0).float().mean((0, 1))
    # by symmetry each expert is kept by 2 of 5 rows; five standard deviations
    assert (counts_E - 0.4).abs().max() < 5 * (0.4 * 0.6 / 60_000) ** 0.5


def test_the_estimated_load_is_the_chance_to_be_kept_under_fresh_noise() -> None:
    body, x_BI, num_noises = sparse(per_task=False), inputs(500), 1_000
    load_E = loads(run(body, x_BI, chance(500)))[0]
    clean_BE, spread_BE, noisy_BE = noisy_logits(body, x_BI, chance(500))
    for e in range(EXPERTS):
        others_BE = noisy_BE[:, [other for other in range(EXPERTS) if other != e]]
        least_B = others_BE.sort(dim=1, descending=True).values[:, 1]
        fresh_NB = clean_BE[:, e] + spread_BE[:, e] * torch.randn(num_noises, 500)
        expected = (fresh_NB > least_B).float().mean(0).sum().item()
        # Monte Carlo: 500,000 draws, so a standard deviation of 0.4 % at the most
        assert load_E[e].item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("fresh", [False, True])
def test_estimated_loads_sum_to_the_experts_that_are_kept(fresh: bool) -> None:
    body, x_BI = sparse(per_task=False, num_experts=8), inputs(4_000)
    if fresh:
        body.gates.data[:], body.noise.data[:] = 0, 0
    # the law: k * B in expectation over the noise; 3 % is five standard deviations of this sum
    assert loads(run(body, x_BI, chance(4_000))).sum().item() == pytest.approx(2 * 4_000, rel=0.03)
    clean_BE, spread_BE, noisy_BE = noisy_logits(body, x_BI, chance(4_000))
    top_BK = noisy_BE.softmax(1).topk(3, dim=1).values  # a known wrong version: thresholds taken after the softmax
    least_BE = torch.where(noisy_BE > top_BK[:, [2]], top_BK[:, [2]], top_BK[:, [1]])
    wrong = torch.special.ndtr((clean_BE - least_BE) / spread_BE).sum().item()
    assert wrong / (2 * 4_000) > 1.3  # the same law tells it apart


@pytest.mark.parametrize("per_task", [False, True])
def test_the_moments_of_a_sparse_body_are_sums_over_rows(per_task: bool) -> None:
    body, x_BI, num_gates = sparse(per_task=per_task), inputs(), TASKS if per_task else 1
    whole = run(body, x_BI, chance())
    assert whole.moments_M is not None
    importance_GE = whole.moments_M.view(2, num_gates, EXPERTS)[0]
    assert_close(importance_GE, whole.gates["level 1"].sum(0))  # eq. 6
    single = [run(body, x_BI[[b]], Draws(torch.tensor([b]), 0, 1)).moments_M for b in range(ROWS)]
    assert_close(torch.stack([moments_M for moments_M in single if moments_M is not None]).sum(0), whole.moments_M)


def test_the_penalty_is_the_squared_variation_of_importance_and_load() -> None:
    body, moments_2GE = sparse(importance=0.3, load=0.7), torch.rand(2, TASKS, EXPERTS) * 100
    variation = moments_2GE.double().numpy().var(axis=2, ddof=0) / moments_2GE.double().numpy().mean(axis=2) ** 2
    # eq. 7 and 11 by numpy: the variance of the population; a penalty for each gate
    assert body.penalty(moments_2GE.flatten()).item() == pytest.approx(
        float(0.3 * variation[0].sum() + 0.7 * variation[1].sum()), rel=1e-5
    )
    assert body.penalty(torch.full((2 * TASKS * EXPERTS,), 7.0)).item() == pytest.approx(0, abs=1e-12)
    assert body.penalty(torch.zeros(2 * TASKS * EXPERTS)).item() == 0  # a batch without rows


def test_the_load_can_be_learnt_where_a_number_of_rows_cannot() -> None:
    body = sparse(importance=0.0, load=1.0)
    shared = run(body, inputs(), chance())
    assert not (shared.gates["level 1"] > 0).sum(0).requires_grad  # a count has no derivative
    gates_slope, noise_slope = torch.autograd.grad(penalty_of(body, [shared]), [body.gates, body.noise])
    assert (gates_slope != 0).any((0, 1)).all() and (noise_slope != 0).any((0, 1)).all()  # of every expert


def test_the_penalties_balance_a_lopsided_gate() -> None:
    body, x_BI, counts = sparse(importance=0.1, load=0.1, per_task=False), inputs(512), []
    x_BI[:, 0] = 1.0
    body.gates.data[:, 0, :2] += 5.0  # nearly all rows go to two of the experts
    optimizer = torch.optim.Adam(body.parameters(), lr=0.05)
    for step in range(200):
        shared = run(body, x_BI, Draws(torch.arange(512), 0, step))
        counts.append((shared.gates["level 1"] > 0).sum((0, 1)).double())
        optimizer.zero_grad()
        penalty_of(body, [shared]).backward()
        optimizer.step()
    last_E = torch.stack(counts[-10:]).sum(0)
    variation = [float(count_E.std(correction=0) / count_E.mean()) for count_E in (counts[0], last_E)]
    # the paper's table 6, for weights of 0.1: the variation of the load falls from 3.01 to 0.05
    assert variation[0] > 1 and variation[1] < 0.1


def test_a_scored_row_meets_no_noise() -> None:
    body, x_BI = sparse(), inputs()
    before = run(body, x_BI)
    body.noise.data.fill_(100.0)
    after = run(body, x_BI)
    assert torch.equal(after.h_TBH, before.h_TBH)  # the noise's weights do not reach scoring
    assert torch.equal(after.gates["level 1"], before.gates["level 1"]) and after.moments_M is None
    assert not torch.equal(run(body, x_BI, chance()).gates["level 1"], before.gates["level 1"])


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_sparse_experts_equal_a_plain_loop(top_k: int, per_task: bool) -> None:
    body = sparse(top_k=top_k, per_task=per_task)

    def twin(x_BI: Tensor) -> Tensor:
        outputs = []
        for e in range(EXPERTS):
            h_BH = x_BI
            for weight, bias in body.experts.weights:
                h_BH = torch.relu(linear(weight[e], bias[e, 0])(h_BH))
            outputs.append(h_BH)
        found = []
        for gate_IE in body.gates.detach():
            logits_BE = linear(gate_IE)(x_BI)
            out_BE = logits_BE < logits_BE.topk(top_k, dim=1).values[:, -1:]
            share_BE = logits_BE.masked_fill(out_BE, -torch.inf).softmax(1)  # all experts kept: a dense mixture
            found.append(torch.stack([share_BE[:, [e]] * outputs[e] for e in range(EXPERTS)]).sum(0))
        return torch.stack(found).expand(TASKS, -1, -1)

    assert_twins(body, twin)  # every expert computed for every row, in torch.nn.Linear


def test_the_order_of_sparse_experts_does_not_matter() -> None:
    body, x_BI, order = sparse(), inputs(), torch.tensor([3, 0, 4, 1, 2])
    before = run(body, x_BI)
    for parameter in body.experts.parameters():
        parameter.data = parameter.data[order]
    body.gates.data = body.gates.data[..., order]
    after = run(body, x_BI)
    assert_close(after.h_TBH, before.h_TBH)  # a sum does not depend on its order
    assert_close(after.gates["level 1"], before.gates["level 1"][..., order])


@pytest.mark.parametrize("num_rows", [0, 1, ROWS])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_an_expert_computes_only_the_rows_that_keep_it(top_k: int, num_rows: int) -> None:
    body, x_BI = sparse(top_k=top_k, per_task=False), inputs(num_rows)
    with FlopCounterMode(display=False) as counter:
        run(body, x_BI)
    gate, expert = 2 * INPUT * EXPERTS, 2 * (INPUT * FIRST + FIRST * WIDTH)
    assert counter.get_total_flops() == num_rows * (gate + top_k * expert)  # torch's own count, against the formula


def test_rows_that_several_gates_keep_are_computed_once() -> None:
    body, x_BI = sparse(), inputs()
    with FlopCounterMode(display=False) as counter:
        gate_BGE = gate_of(body, x_BI)
    rows = int((gate_BGE > 0).any(1).sum())
    assert ROWS * 2 < rows < ROWS * EXPERTS
    gate, expert = 2 * INPUT * EXPERTS * TASKS, 2 * (INPUT * FIRST + FIRST * WIDTH)
    assert counter.get_total_flops() == ROWS * gate + rows * expert


def test_more_experts_to_keep_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k 5 is more than num_experts 4"):
        SparseExperts(INPUT, TASKS, num_experts=4, top_k=5)


def test_an_expert_that_no_row_keeps_gets_no_gradient_from_the_tasks() -> None:
    body, x_BI = sparse(), inputs().abs() + 0.1
    body.gates.data[:, :, 2] = -100.0
    run(body, x_BI).h_TBH.square().sum().backward()
    for parameter in body.experts.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).flatten(1).any(1).tolist() == [e != 2 for e in range(EXPERTS)]  # exactly 0


def test_every_body_is_tested() -> None:
    assert {settings["kind"] for settings in VARIANTS.values()} == set(BODIES)
    assert np.unique([body.__doc__ for body in BODIES.values()]).size == len(BODIES)
