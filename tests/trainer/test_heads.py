"""Proof tests of trainer/heads.py: closed forms of composed probabilities in float64, targets and addresses by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.heads import Event, Task, TaskGraph

NAN = math.nan
FUNNEL = {"click": Task(), "cart": Task(given="click"), "buy": Task(given="cart")}


def exact(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(p) and log(1 - p) of p = sigmoid(first) sigmoid(second), from the odds against: a sum of positive terms."""
    odds_against = np.exp(-first) + np.exp(-second) + np.exp(-first - second)
    return -np.log1p(odds_against), -np.log1p(1 / odds_against)


def grid(largest: float) -> tuple[Tensor, Tensor]:
    """Every pair of float32 logits on a grid over [-largest, largest]."""
    points = torch.linspace(-largest, largest, 41)
    first, second = torch.meshgrid(points, points, indexing="ij")
    return first.flatten().requires_grad_(), second.flatten().requires_grad_()


def composed(first: Tensor, second: Tensor) -> Event:
    return Event.of(first).then(Event.of(second))


def test_composed_log_probabilities_are_exact_in_float32() -> None:
    first, second = grid(30)
    event = composed(first, second)
    log_p, log_not = exact(first.detach().double().numpy(), second.detach().double().numpy())
    # oracle: closed form in float64; exp(x) at |x| <= 60 in float32 is off by up to 60 units of rounding, 4e-6
    np.testing.assert_allclose(event.log_p_B.detach().numpy(), log_p, rtol=1e-5)
    np.testing.assert_allclose(event.log_not_B.detach().numpy(), log_not, rtol=1e-5)


@pytest.mark.parametrize(("logit", "surprise"), [(-10.0, 2.0609665e-09), (20.0, 19.306853), (30.0, 29.306853)])
def test_composed_surprise_neither_vanishes_nor_overflows(logit: float, surprise: float) -> None:
    z = torch.tensor([logit])
    # closed form -log(1 - p); 1 - p by subtraction gives 0 for the first and infinity for the others
    assert -composed(z, z).log_not_B.item() == pytest.approx(surprise, rel=1e-5)


def test_gradients_of_composed_log_probabilities_are_exact_in_float32() -> None:
    first, second = grid(30)
    event = composed(first, second)
    a, b = first.detach().double().numpy(), second.detach().double().numpy()
    odds = np.exp(np.subtract(*exact(a, b)))
    for logit, z in ((first, a), (second, b)):
        against = 1 / (1 + np.exp(z))
        (of_p,) = torch.autograd.grad(event.log_p_B.sum(), logit, retain_graph=True)
        (of_not,) = torch.autograd.grad(event.log_not_B.sum(), logit, retain_graph=True)
        # closed forms: d log p / dz = 1 - sigmoid(z) and d log(1 - p) / dz = -(1 - sigmoid(z)) p / (1 - p); rounding
        # as above
        np.testing.assert_allclose(of_p.numpy(), against, rtol=1e-5)
        np.testing.assert_allclose(of_not.numpy(), -against * odds, rtol=2e-5)


@pytest.mark.parametrize("largest", [80, 1e4])
def test_gradients_stay_finite_at_extreme_logits(largest: float) -> None:
    first, second = grid(largest)
    third = torch.zeros_like(first, requires_grad=True)
    event = composed(first, second).then(Event.of(third))
    gradients = torch.autograd.grad(event.log_p_B.sum() + event.log_not_B.sum(), (first, second, third))
    assert event.log_p_B.isfinite().all() and event.log_not_B.isfinite().all()
    for gradient in gradients:
        # |d log p / dz| <= 1 and |d log(1 - p) / dz| <= 1 in exact arithmetic; slack for rounding
        assert gradient.isfinite().all() and gradient.abs().max() <= 1 + 1e-5


def test_a_chain_of_three_is_the_product_of_its_probabilities() -> None:
    logits_BT = 4 * torch.randn(1_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    events = TaskGraph(FUNNEL).events(logits_BT)
    products_BT = torch.sigmoid(logits_BT).cumprod(1)
    for t, name in enumerate(FUNNEL):
        # definition; float64, three factors
        torch.testing.assert_close(events[name].log_p_B.exp(), products_BT[:, t], rtol=1e-12, atol=0)
        torch.testing.assert_close(events[name].log_not_B.exp(), 1 - products_BT[:, t], rtol=1e-9, atol=1e-12)


def test_the_order_in_which_tasks_are_written_changes_no_event() -> None:
    logits_BT = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    events = TaskGraph(FUNNEL).events(logits_BT)
    backwards = TaskGraph(dict(reversed(FUNNEL.items()))).events(logits_BT.flip(1))
    for name, event in events.items():  # the same operations, so the same bits
        assert torch.equal(event.log_p_B, backwards[name].log_p_B)
        assert torch.equal(event.log_not_B, backwards[name].log_not_B)


def test_a_conversion_is_never_likelier_than_its_click() -> None:
    logits_BT = 30 * torch.randn(10_000, 3, generator=torch.Generator().manual_seed(2))
    predictions = TaskGraph(FUNNEL).predictions(logits_BT)
    # law of products: a float32 log-probability is at most 0, and adding it never rounds upwards
    assert (predictions["cart@all"] <= predictions["click@all"] * (1 + 1e-6)).all()
    assert (predictions["buy@all"] <= predictions["cart@all"]).all()
    assert all(((p >= 0) & (p <= 1)).all() for p in predictions.values())


def test_every_prediction_has_its_address_and_kind() -> None:
    tasks = FUNNEL | {
        "watch": Task(binary=False, where="click"),
        "price": Task(binary=False),
        "like": Task(where="buy"),
    }
    assert TaskGraph(tasks).addresses == {  # by hand
        "click@all": "binary",
        "cart@click": "binary",
        "cart@all": "binary",
        "buy@cart": "binary",
        "buy@all": "binary",
        "watch@click": "regression",
        "price@all": "regression",
        "like@buy": "binary",
    }


def test_the_prediction_over_all_rows_is_the_product_of_the_conditional_ones() -> None:
    tasks = FUNNEL | {"watch": Task(binary=False, where="click"), "like": Task(where="click")}
    logits_BT = 3 * torch.randn(500, 5, generator=torch.Generator().manual_seed(3))
    p = TaskGraph(tasks).predictions(logits_BT)
    # definition; float32 logs of probabilities above 1e-13
    torch.testing.assert_close(p["cart@all"], p["click@all"] * p["cart@click"], rtol=1e-5, atol=0)
    torch.testing.assert_close(p["buy@all"], p["click@all"] * p["cart@click"] * p["buy@cart"], rtol=1e-5, atol=0)
    torch.testing.assert_close(p["like@click"], torch.sigmoid(logits_BT[:, 4]))
    assert torch.equal(p["watch@click"], logits_BT[:, 3])


def test_targets_are_zero_where_the_parent_did_not_happen_and_nan_where_unknown() -> None:
    tasks = {
        "click": Task(),
        "buy": Task(given="click"),
        "watch": Task(binary=False, where="click"),
        "like": Task(where="buy"),
    }
    labels_BT = torch.tensor(
        [
            [0.0, 1.0, 9.0, 1.0],  # not clicked: what hangs on a click cannot have happened, whatever the log says
            [1.0, 0.0, 9.0, 1.0],
            [1.0, 1.0, 0.0, 0.0],
            [1.0, NAN, NAN, 1.0],
            [NAN, 1.0, 9.0, 1.0],  # click unknown: nothing is known of what hangs on it
        ]
    )
    expected_BT = torch.tensor(  # by hand
        [[0.0, 0.0, NAN, NAN], [1.0, 0.0, 9.0, NAN], [1.0, 1.0, 0.0, 0.0], [1.0, NAN, NAN, NAN], [NAN, NAN, NAN, NAN]]
    )
    torch.testing.assert_close(TaskGraph(tasks).targets(labels_BT), expected_BT, rtol=0, atol=0, equal_nan=True)


def test_answers_are_nan_outside_their_space() -> None:
    tasks = {"click": Task(), "buy": Task(given="click"), "watch": Task(binary=False, where="click", scale=0.5)}
    labels_BT = torch.tensor([[0.0, 0.0, 8.0], [1.0, 1.0, 8.0], [1.0, NAN, NAN], [NAN, 1.0, 8.0]])
    expected = {  # by hand
        "click@all": [0.0, 1.0, 1.0, NAN],
        "buy@click": [NAN, 1.0, NAN, NAN],
        "buy@all": [0.0, 1.0, NAN, NAN],
        "watch@click": [NAN, 4.0, NAN, NAN],
    }
    answers = TaskGraph(tasks).answers(labels_BT)
    assert answers.keys() == expected.keys() == TaskGraph(tasks).predictions(torch.zeros(4, 3)).keys()
    for address, values in expected.items():
        torch.testing.assert_close(answers[address], torch.tensor(values), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("log1p", "scale"), [(False, 1.0), (False, 0.01), (True, 1.0), (True, 0.001)])
def test_a_regression_target_leads_back_to_its_label(log1p: bool, scale: float) -> None:
    task = Task(binary=False, log1p=log1p, scale=scale)
    label_B = torch.tensor([0.0, 0.5, 1.0, 37.0, 1_000.0, 86_400.0])
    plain = label_B.double().numpy() * scale
    target_B = task.to_target(label_B)
    # numpy in float64; float32 rounding, which expm1 multiplies by up to the target's size, here below 12
    np.testing.assert_allclose(target_B.numpy(), np.log1p(plain) if log1p else plain, rtol=1e-6)
    torch.testing.assert_close(task.to_label(target_B), label_B, rtol=2e-6, atol=0)
