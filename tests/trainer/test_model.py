"""Proof tests of trainer/model.py: plain torch twins, linearity of the shared part, the reach of the position tower."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.bodies import MultiGateExperts, OneGateExperts, SharedBottom
from trainer.errors import UserError
from trainer.heads import Task, TaskGraph
from trainer.losses import denominators, task_losses
from trainer.model import MultiTaskModel, PositionTower, make_body

INPUT, TASKS, BIASED = 6, 4, [0, 2]  # the position tower belongs to tasks 0 and 2
OTHERS = [1, 3]
DIMS = (4, 3)
Selection = list[tuple[Tensor, Tensor]]


def assert_close(got: Tensor, want: Tensor) -> None:
    """Float32 sums of at most 16 products of numbers below 10, in another order."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def model(position: PositionTower | None = None) -> MultiTaskModel:
    body = MultiGateExperts(INPUT, TASKS, num_experts=3, expert_layers=(16, 8))
    return MultiTaskModel(body, TASKS, (8,), position)


def biased_model() -> tuple[MultiTaskModel, PositionTower]:
    tower = PositionTower(DIMS, (16,), BIASED, TASKS)
    for missing in tower.missing:
        nn.init.normal_(missing)  # as after training
    return model(tower), tower


def selected(num_rows: int, present: float = 0.5) -> Selection:
    """Vectors of two selection features, zeros where missing, as leaves."""
    found = []
    for dim in DIMS:
        present_B = (torch.rand(num_rows) < present).float()
        found.append(((torch.randn(num_rows, dim) * present_B.unsqueeze(1)).requires_grad_(), present_B))
    return found


def test_towers_equal_separate_linear_layers_a_task() -> None:
    net, x_BI = model(), torch.randn(32, INPUT)
    h_TBH, logits_BT = net.body(x_BI, None), net(x_BI, [], None)
    assert logits_BT.shape == (32, TASKS) and logits_BT.dtype == torch.float32
    weight, bias = net.towers.parameters()
    for t in range(TASKS):
        tower_BH = torch.relu(nn.functional.linear(h_TBH[t], weight[t].T, bias[t, 0]))
        expected_B1 = nn.functional.linear(tower_BH, net.out.weight[t].T, net.out.bias[t, 0])
        assert_close(logits_BT[:, t], expected_B1[:, 0])  # torch.nn.functional


@pytest.mark.parametrize("tower_layers", [(), (8,), (8, 4)])
def test_a_batch_of_one_row_gives_one_row_of_logits(tower_layers: tuple[int, ...]) -> None:
    net, x_BI = MultiTaskModel(SharedBottom(INPUT, TASKS, layers=(8,)), TASKS, tower_layers), torch.randn(5, INPUT)
    one_by_one = [net(x_BI[b : b + 1], [], None) for b in range(5)]
    assert all(row.shape == (1, TASKS) for row in one_by_one)
    assert_close(torch.cat(one_by_one), net(x_BI, [], None))  # oracle: the rows together


def test_the_gradient_of_the_shared_part_is_the_weighted_sum_of_the_tasks_gradients() -> None:
    net, x_BI, weights_T = model(), torch.randn(64, INPUT), torch.tensor([1.0, 0.5, 0.0, 3.0])
    losses_T = net(x_BI, [], None).square().mean(0)
    shared = list(net.body.parameters())
    together = torch.autograd.grad((losses_T * weights_T).sum(), shared, retain_graph=True)
    alone = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses_T]
    for parameter, gradient in enumerate(together):
        expected = sum(weight * task[parameter] for weight, task in zip(weights_T, alone, strict=True))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # linearity; float32


def test_identical_tasks_with_identical_towers_are_one_task_several_times() -> None:
    several, single = (MultiTaskModel(SharedBottom(INPUT, k, layers=(16, 8)), k, (8,)) for k in (3, 1))
    weights = dict(single.named_parameters())
    for name, parameter in several.named_parameters():
        parameter.data.copy_(weights[name].expand_as(parameter))
    x_BI = torch.randn(64, INPUT)
    of_several, of_one = (
        torch.autograd.grad(net(x_BI, [], None).square().mean(0).sum(), list(net.body.parameters()))
        for net in (several, single)
    )
    for ours, theirs in zip(of_several, of_one, strict=True):
        torch.testing.assert_close(ours, 3 * theirs, rtol=1e-4, atol=1e-6)  # Caruana 1997: a sum of equal terms


def test_one_expert_under_one_gate_is_esmm_on_a_shared_bottom() -> None:
    graph = TaskGraph({"click": Task(), "buy": Task(given="click")})
    experts = MultiTaskModel(OneGateExperts(INPUT, 2, num_experts=1, expert_layers=(16, 8)), 2, (8,))
    bottom = MultiTaskModel(SharedBottom(INPUT, 2, layers=(16, 8)), 2, (8,))
    bottom.load_state_dict(
        {k.replace("experts.", "bottom."): v for k, v in experts.state_dict().items() if "gates" not in k}
    )
    x_BI, labels_BT, weights_B = torch.randn(64, INPUT), (torch.rand(64, 2) < 0.5).float(), torch.ones(64)
    sums_T = denominators(graph, labels_BT, weights_B)
    losses = [task_losses(graph, net(x_BI, [], None), labels_BT, weights_B, sums_T) for net in (experts, bottom)]
    assert_close(*losses)  # identity of the two bodies


def test_the_position_tower_leaves_the_logits_of_other_tasks_alone() -> None:
    (net, tower), x_BI, selection = biased_model(), torch.randn(64, INPUT), selected(64)
    logits_BT, added_BT = net(x_BI, selection, None), tower(selection)
    net.position = None
    plain_BT = net(x_BI, [], None)
    assert torch.equal(logits_BT[:, OTHERS], plain_BT[:, OTHERS])  # the same bits: exactly 0 is added
    assert torch.equal(logits_BT[:, BIASED], (plain_BT + added_BT)[:, BIASED])
    assert (added_BT[:, BIASED] != 0).all() and (added_BT[:, OTHERS] == 0).all()


def test_the_losses_of_other_tasks_reach_neither_the_position_tower_nor_its_tables() -> None:
    (net, tower), x_BI, selection = biased_model(), torch.randn(64, INPUT), selected(64)
    logits_BT = net(x_BI, selection, None)
    shallow = [*tower.parameters(), *(vector_BD for vector_BD, _ in selection)]
    for t in OTHERS:
        gradients = torch.autograd.grad(logits_BT[:, t].square().sum(), shallow, retain_graph=True)
        assert all((gradient == 0).all() for gradient in gradients)  # exactly, by definition
    for t in BIASED:
        gradients = torch.autograd.grad(logits_BT[:, t].square().sum(), shallow, retain_graph=True)
        assert all((gradient != 0).any() for gradient in gradients)


def test_a_position_tower_is_a_plain_network_on_the_selection_features() -> None:
    tower, selection = PositionTower(DIMS, (16,), BIASED, TASKS), selected(32, present=1.0)
    weight, bias = tower.net.parameters()
    x_BD = torch.cat([vector_BD for vector_BD, _ in selection], dim=1)
    hidden_BH = torch.relu(nn.functional.linear(x_BD, weight[0].T, bias[0, 0]))
    assert_close(tower(selection)[:, BIASED], tower.out(hidden_BH))  # torch.nn.functional


def test_the_missing_vector_learns_only_from_rows_where_the_feature_is_missing() -> None:
    (_, tower), selection = biased_model(), selected(64)
    (_, present_B), missing = selection[0], tower.missing[0]
    missing_B = present_B == 0
    assert 0 < missing_B.sum() < 64
    added_BT = tower(selection)
    (of_present,) = torch.autograd.grad(added_BT[~missing_B].sum(), missing, retain_graph=True)
    assert (of_present == 0).all()  # exactly
    of_missing, of_vectors = torch.autograd.grad(added_BT[missing_B].sum(), [missing, selection[0][0]])
    # where it is missing it stands for the row's vector, so it gets those rows' gradients; float32 sum of 32 rows
    torch.testing.assert_close(of_missing, of_vectors[missing_B].sum(0), rtol=1e-4, atol=1e-5)


def test_a_missing_selection_feature_reads_as_the_missing_vector_whatever_the_others_say() -> None:
    (_, tower), selection = biased_model(), selected(8, present=0.0)
    added_BT = tower(selection)
    as_vectors = [(missing.expand(8, -1), torch.ones(8)) for missing in tower.missing]
    assert torch.equal(added_BT, tower(as_vectors))  # the learnt vector put in by hand
    assert torch.equal(added_BT, added_BT[:1].expand_as(added_BT))  # the same for every row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mmoee"}, r"no body is called 'mmoee'\n.*did you mean 'mmoe'"),
        ({}, r"no body is called ''\n.*known: mmoe, omoe, shared_bottom"),
        ({"kind": "mmoe", "num_expert": 4}, r"unknown key 'num_expert'\n.*did you mean 'num_experts'"),
        ({"kind": "shared_bottom", "num_experts": 4}, r"model.body \(shared_bottom\): unknown key 'num_experts'"),
        ({"kind": "mmoe", "num_experts": "four"}, r"model.body \(mmoe\): wrong value\n  got \{'num_experts': 'four'\}"),
        ({"kind": "shared_bottom", "layers": 64}, r"model.body \(shared_bottom\): wrong value"),
    ],
)
def test_a_wrong_body_is_named_with_what_was_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_body(settings, INPUT, TASKS)


@pytest.mark.parametrize("kind", ["shared_bottom", "omoe", "mmoe"])
def test_a_body_is_made_with_the_settings_that_the_configuration_gives(kind: str) -> None:
    key = "layers" if kind == "shared_bottom" else "expert_layers"
    body = make_body({"kind": kind, key: [10, 5]}, INPUT, TASKS)
    assert body.output_dim == 5 and body(torch.zeros(2, INPUT), None).shape == (TASKS, 2, 5)
