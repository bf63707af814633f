"""Proof tests of trainer/heads.py: closed forms of composed probabilities in float64, enumeration, tables by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.heads import Event, Propensity, Task, TaskGraph
from trainer.losses import Huber, Pairwise, SquaredError, Thresholds
from trainer.towers import Head

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
    events = TaskGraph(FUNNEL).nodes(logits_BT).whole
    products_BT = torch.sigmoid(logits_BT).cumprod(1)
    for t, name in enumerate(FUNNEL):
        # definition; float64, three factors
        torch.testing.assert_close(events[name].log_p_B.exp(), products_BT[:, t], rtol=1e-12, atol=0)
        torch.testing.assert_close(events[name].log_not_B.exp(), 1 - products_BT[:, t], rtol=1e-9, atol=1e-12)


def test_the_order_in_which_tasks_are_written_changes_no_event() -> None:
    logits_BT = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    whole = TaskGraph(FUNNEL).nodes(logits_BT).whole
    backwards = TaskGraph(dict(reversed(FUNNEL.items()))).nodes(logits_BT.flip(1)).whole
    for name, event in whole.items():  # the same operations, so the same bits
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
        "watch": Task(SquaredError(), where="click"),
        "price": Task(SquaredError()),
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
    tasks = FUNNEL | {"watch": Task(SquaredError(), where="click"), "like": Task(where="click")}
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
        "watch": Task(SquaredError(), where="click"),
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
    tasks = {"click": Task(), "buy": Task(given="click"), "watch": Task(SquaredError(), where="click", scale=0.5)}
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
    task = Task(SquaredError(), log1p=log1p, scale=scale)
    label_B = torch.tensor([0.0, 0.5, 1.0, 37.0, 1_000.0, 86_400.0])
    plain = label_B.double().numpy() * scale
    target_B = task.to_target(label_B)
    # numpy in float64; float32 rounding, which expm1 multiplies by up to the target's size, here below 12
    np.testing.assert_allclose(target_B.numpy(), np.log1p(plain) if log1p else plain, rtol=1e-6)
    torch.testing.assert_close(task.to_label(target_B), label_B, rtol=2e-6, atol=0)


# Total probability (ESM2).

ESM2 = {"click": Task(), "cart": Task(given="click"), "buy": Task(given="click", via="cart")}


def test_mixed_log_probabilities_and_their_gradients_are_exact_in_float32() -> None:
    points = torch.linspace(-30, 30, 25)
    logits = [z.flatten().requires_grad_() for z in torch.meshgrid(points, points, points, indexing="ij")]
    through, if_so, if_not = (Event.of(z) for z in logits)
    event = through.either(if_so, if_not)
    a, b, c = (z.detach().double().numpy() for z in logits)
    # closed form in float64, its odds a quotient of sums of positive terms: p = (e^a s(b) + s(c)) / (1 + e^a)
    s_b, s_c, not_b, not_c = (1 / (1 + np.exp(z)) for z in (-b, -c, b, c))
    odds = (np.exp(a) * s_b + s_c) / (np.exp(a) * not_b + not_c)
    np.testing.assert_allclose(event.log_p_B.detach().numpy(), -np.log1p(1 / odds), rtol=1e-5)
    np.testing.assert_allclose(event.log_not_B.detach().numpy(), -np.log1p(odds), rtol=1e-5)
    gradients = torch.autograd.grad(event.log_p_B.sum(), logits)
    p, chance, against = odds / (1 + odds), 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(a))
    # derivatives of log p by hand; float32 as above, and differences of chances in the first
    expected = (chance * against * (s_b - s_c) / p, chance * s_b * not_b / p, against * s_c * not_c / p)
    for found, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("largest", [80, 1e4])
def test_gradients_of_mixtures_stay_finite_at_extreme_logits(largest: float) -> None:
    first, second = grid(largest)
    third = (-second.detach()).requires_grad_()
    event = Event.of(first).either(Event.of(second), Event.of(third))
    gradients = torch.autograd.grad(event.log_p_B.sum() + event.log_not_B.sum(), (first, second, third))
    assert (event.log_p_B <= 0).all() and (event.log_not_B <= 0).all()  # a probability, never above 1
    for gradient in gradients:
        # |d log p / dz| <= 1 and |d log(1 - p) / dz| <= 1 in exact arithmetic; slack for rounding
        assert gradient.isfinite().all() and gradient.abs().max() <= 1 + 1e-5


def test_enumerating_click_cart_and_buy_gives_one_and_the_total_probability() -> None:
    logits_BL = 3 * torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y1, y2, y3, y4 = torch.sigmoid(logits_BL).unbind(1)  # click, cart | click, buy | cart, buy | click and no cart
    chance: dict[tuple[int, ...], Tensor] = {}
    for click, cart, buy in itertools.product((0, 1), repeat=3):
        if not click:
            chance[click, cart, buy] = (1 - y1) * (not cart) * (not buy)
            continue
        bought = y3 if cart else y4
        chance[click, cart, buy] = y1 * (y2 if cart else 1 - y2) * (bought if buy else 1 - bought)
    whole = TaskGraph(ESM2).nodes(logits_BL).whole
    torch.testing.assert_close(
        torch.stack([*chance.values()]).sum(0), torch.ones(200, dtype=torch.float64), rtol=1e-14, atol=0
    )
    of = {
        "click": [(1, cart, buy) for cart in (0, 1) for buy in (0, 1)],
        "cart": [(1, 1, 0), (1, 1, 1)],
        "buy": [(1, 0, 1), (1, 1, 1)],
    }
    for name, cases in of.items():  # enumeration; Wen et al., eq. 3-6; float64
        expected_B = torch.stack([chance[case] for case in cases]).sum(0)
        torch.testing.assert_close(whole[name].log_p_B.exp(), expected_B, rtol=1e-12, atol=0)
        torch.testing.assert_close(whole[name].log_not_B.exp(), 1 - expected_B, rtol=1e-9, atol=1e-14)


def test_esm2_is_esmm_where_the_cart_makes_no_difference_or_never_happens() -> None:
    click_B, cart_B, buy_B, other_B = 3 * torch.randn(
        4, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    esmm = TaskGraph({"click": Task(), "buy": Task(given="click")}).nodes(torch.stack([click_B, buy_B], 1))
    same = torch.stack([click_B, cart_B, buy_B, buy_B], 1)
    never = torch.stack([click_B, torch.full_like(cart_B, -800.0), other_B, buy_B], 1)
    always = torch.stack([click_B, torch.full_like(cart_B, 800.0), buy_B, other_B], 1)
    for logits_BL in (same, never, always):
        nodes = TaskGraph(ESM2).nodes(logits_BL)
        for of, wanted in ((nodes.whole, esmm.whole), (nodes.conditional, esmm.conditional)):
            # identities of total probability: p3 = p4, p2 = 0, p2 = 1; float64 rounding of a sum in log space
            torch.testing.assert_close(of["buy"].log_p_B, wanted["buy"].log_p_B, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(of["buy"].log_not_B, wanted["buy"].log_not_B, rtol=1e-12, atol=1e-15)


def test_a_purchase_via_the_cart_has_three_addresses_and_the_right_answers() -> None:
    graph = TaskGraph(ESM2)
    labels_BT = torch.tensor(
        [
            [0.0, 1.0, 1.0],  # not clicked: whatever else the log says
            [1.0, 0.0, 1.0],
            [1.0, 1.0, 0.0],
            [1.0, 1.0, 1.0],
            [1.0, NAN, 1.0],  # the cart unknown: the purchase is known all the same, but not of which kind it is
            [1.0, 1.0, NAN],
            [NAN, 1.0, 1.0],
        ]
    )
    expected = {  # by hand
        "click@all": [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, NAN],
        "cart@click": [NAN, 0.0, 1.0, 1.0, NAN, 1.0, NAN],
        "cart@all": [0.0, 0.0, 1.0, 1.0, NAN, 1.0, NAN],
        "buy@click": [NAN, 1.0, 0.0, 1.0, 1.0, NAN, NAN],
        "buy@cart": [NAN, NAN, 0.0, 1.0, NAN, NAN, NAN],
        "buy@all": [0.0, 1.0, 0.0, 1.0, 1.0, NAN, NAN],
    }
    answers = graph.answers(labels_BT)
    assert answers.keys() == expected.keys() == graph.addresses.keys()
    for address, values in expected.items():
        torch.testing.assert_close(answers[address], torch.tensor(values), rtol=0, atol=0, equal_nan=True)
    logits_BL = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    y1, y2, y3, y4 = torch.sigmoid(logits_BL).unbind(1)
    p = graph.predictions(logits_BL)
    # definitions; float64
    torch.testing.assert_close(p["buy@cart"], y3, rtol=1e-12, atol=0)
    torch.testing.assert_close(p["buy@click"], y2 * y3 + (1 - y2) * y4, rtol=1e-12, atol=0)
    torch.testing.assert_close(p["buy@all"], y1 * (y2 * y3 + (1 - y2) * y4), rtol=1e-12, atol=0)


def test_a_via_may_itself_go_via_another_in_any_written_order() -> None:
    tasks = {"pay": Task(given="click", via="buy"), "buy": ESM2["buy"], "cart": ESM2["cart"], "click": Task()}
    pay, other_pay, buy, other_buy, cart, click = torch.zeros(6, 1, dtype=torch.float64) + torch.arange(6).view(6, 1)
    nodes = TaskGraph(tasks).nodes(torch.cat([pay, other_pay, buy, other_buy, cart, click]).unsqueeze(0))
    s = torch.sigmoid
    bought = s(cart) * s(buy) + (1 - s(cart)) * s(other_buy)
    expected = s(click) * (bought * s(pay) + (1 - bought) * s(other_pay))  # total probability, twice; float64
    torch.testing.assert_close(nodes.whole["pay"].log_p_B.exp(), expected, rtol=1e-12, atol=0)


# Rows that are looked at (PAL), heads, and losses on others' heads.


def test_a_click_is_looking_times_clicking_and_is_served_without_looking() -> None:
    graph = TaskGraph({"like": Task(), "click": Task(), "buy": Task(given="click")}, shown=["click"])
    logits_BL = 2 * torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    shown_BP = 2 * torch.randn(100, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    like_B, click_B, buy_B = torch.sigmoid(logits_BL).unbind(1)
    looked_B, nodes = torch.sigmoid(shown_BP[:, 0]), graph.nodes(logits_BL, shown_BP)
    expected = {"like": like_B, "click": looked_B * click_B, "buy": looked_B * click_B * buy_B}
    for name, expected_B in expected.items():  # Guo et al. 2019, eq. 2; what hangs on the click goes with it; float64
        torch.testing.assert_close(nodes.whole[name].log_p_B.exp(), expected_B, rtol=1e-12, atol=0)
    served = graph.predictions(logits_BL)
    torch.testing.assert_close(served["click@all"], click_B, rtol=1e-12, atol=0)  # as if every row were looked at
    torch.testing.assert_close(served["buy@all"], click_B * buy_B, rtol=1e-12, atol=0)


def test_the_gradient_of_an_unclicked_row_is_shared_between_looking_and_clicking() -> None:
    graph = TaskGraph({"click": Task()}, shown=["click"])
    z_BL = 2 * torch.randn(100, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    shown_BP = 2 * torch.randn(100, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    leaves = (z_BL.requires_grad_(), shown_BP.requires_grad_())
    event = graph.nodes(*leaves).whole["click"]
    of_click = torch.autograd.grad(-event.log_p_B.sum(), leaves, retain_graph=True)
    of_none = torch.autograd.grad(-event.log_not_B.sum(), leaves)
    joint_B = (torch.sigmoid(z_BL) * torch.sigmoid(shown_BP)).detach()
    for leaf, clicked, not_clicked in zip(leaves, of_click, of_none, strict=True):
        against = 1 - torch.sigmoid(leaf.detach())
        # closed form, as ESMM's: (t - y) (1 - sigmoid(z)) / (1 - t) for t = P(seen) P(click | seen); float64
        torch.testing.assert_close(clicked, -against, rtol=1e-12, atol=0)
        torch.testing.assert_close(not_clicked, against * joint_B / (1 - joint_B), rtol=1e-9, atol=1e-15)


def test_each_head_has_as_many_logits_as_its_loss_and_its_place_need() -> None:
    tasks = {
        "click": Task(),
        "watch": Task(Thresholds(thresholds=(1.0, 2.0, 5.0)), where="click", links=("click",)),
        "rank": Task(Pairwise(), head="click@all"),
        "cart": Task(given="click", transfer="click", calibrator=0.6),
        "buy": Task(given="click", via="cart", cascade="cart", propensity=Propensity(doubly_robust=True)),
        "price": Task(Huber()),
    }
    graph = TaskGraph(tasks)
    assert graph.heads == [  # by hand; `rank` has none of its own
        Head(1),
        Head(3, links=(0,)),
        Head(1, transfer=0),
        Head(3, cascade=2),
        Head(1),
    ]
    assert [graph.places(name) for name in graph.with_head] == [[0], [1, 2, 3], [4], [5, 6, 7], [8]]
    logits = graph.nodes(torch.arange(9.0).expand(2, 9)).logits
    assert {name: each[0].tolist() for name, each in logits.items()} == {
        name: [float(place) for place in graph.places(name)] for name in graph.with_head
    }


def test_a_loss_on_another_head_adds_no_prediction() -> None:
    plain = {"click": Task(), "buy": Task(given="click")}
    more = plain | {"order": Task(Pairwise(), head="click@all"), "again": Task(head="buy@click")}
    logits_BL = torch.randn(20, 2, generator=torch.Generator().manual_seed(11))
    assert TaskGraph(more).addresses == TaskGraph(plain).addresses
    before, after = TaskGraph(plain).predictions(logits_BL), TaskGraph(more).predictions(logits_BL)
    assert all(torch.equal(before[address], after[address]) for address in before)  # the same bits


def test_a_loss_on_a_conditional_has_targets_in_its_space_alone() -> None:
    more = {"again": Task(head="buy@click"), "total": Task(head="buy@all")}
    tasks = {"click": Task(), "buy": Task(given="click")} | more
    labels_BT = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [NAN, 1.0, 1.0, 1.0]])
    expected_BT = torch.tensor([[NAN, 1.0], [1.0, 1.0], [0.0, 0.0], [NAN, 1.0]])  # by hand
    found_BT = TaskGraph(tasks).targets(labels_BT)[:, 2:]
    torch.testing.assert_close(found_BT, expected_BT, rtol=0, atol=0, equal_nan=True)
