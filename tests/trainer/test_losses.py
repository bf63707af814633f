"""Proof tests of trainer/losses.py: closed forms, copied and removed rows, any split over workers, missing labels."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from trainer.heads import Event, Task, TaskGraph
from trainer.losses import denominators, task_losses

NAN = math.nan
ESMM = TaskGraph({"click": Task(), "buy": Task(given="click")})
FUNNEL = TaskGraph({"click": Task(), "cart": Task(given="click"), "buy": Task(given="cart")})
EVERYTHING = TaskGraph(
    {
        "click": Task(),
        "cart": Task(given="click"),
        "buy": Task(given="cart"),
        "watch": Task(binary=False, where="click", log1p=True),
        "like": Task(where="click"),
        "price": Task(binary=False),
    }
)


def drawn(probability: float, num_rows: int, seed: int) -> Tensor:
    return (torch.rand(num_rows, generator=torch.Generator().manual_seed(seed)) < probability).double()


def logged(num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (one in ten null) and weights for EVERYTHING, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits_BT = torch.randn(num_rows, 6, dtype=torch.float64, generator=generator)
    labels_BT = torch.stack([drawn(0.4, num_rows, seed + t) for t in range(6)], dim=1)
    labels_BT[torch.rand(num_rows, 6, generator=generator) < 0.1] = NAN
    weights_B = torch.rand(num_rows, dtype=torch.float64, generator=generator) * 3
    return logits_BT.requires_grad_(), labels_BT, weights_B


def whole(graph: TaskGraph, logits_BT: Tensor, labels_BT: Tensor, weights_B: Tensor) -> Tensor:
    """The losses of a batch that one worker has alone: [T]."""
    return task_losses(graph, logits_BT, labels_BT, weights_B, denominators(graph, labels_BT, weights_B))


def gradient(graph: TaskGraph, logits_BT: Tensor, labels_BT: Tensor, weights_B: Tensor) -> Tensor:
    return torch.autograd.grad(whole(graph, logits_BT, labels_BT, weights_B).sum(), logits_BT)[0]


def test_esmm_gradient_of_the_conversion_logit_is_the_closed_form_on_every_row() -> None:
    logits_BT = (
        2 * torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    click_B, buy_B = drawn(0.3, 64, 1), drawn(0.5, 64, 2)
    gradient_BT = gradient(ESMM, logits_BT, torch.stack([click_B, buy_B], 1), torch.ones(64, dtype=torch.float64))
    p_BT = torch.sigmoid(logits_BT.detach())
    joint_B = p_BT.prod(1)
    # closed form, Ma et al. 2018 eq. 4 derived by hand, over 64 rows; float64
    expected_B = (joint_B - click_B * buy_B) * (1 - p_BT[:, 1]) / (1 - joint_B) / 64
    torch.testing.assert_close(gradient_BT[:, 1], expected_B, rtol=1e-9, atol=1e-15)
    assert (gradient_BT[click_B == 0, 1] > 0).all()  # un-clicked rows train the conversion tower too, downwards


def test_the_conversion_loss_reaches_the_click_logit_too() -> None:
    logits_BT = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels_BT, ones_B = torch.stack([drawn(0.3, 64, 4), drawn(0.5, 64, 5)], 1), torch.ones(64, dtype=torch.float64)
    (gradient_BT,) = torch.autograd.grad(whole(ESMM, logits_BT, labels_BT, ones_B)[1], logits_BT)
    p_BT, joint_B = torch.sigmoid(logits_BT.detach()), torch.sigmoid(logits_BT.detach()).prod(1)
    # the same closed form with the factors exchanged: the product is symmetric; float64
    expected_B = (joint_B - labels_BT.prod(1)) * (1 - p_BT[:, 0]) / (1 - joint_B) / 64
    torch.testing.assert_close(gradient_BT[:, 0], expected_B, rtol=1e-9, atol=1e-15)


def test_losses_equal_a_plain_loop_over_rows() -> None:
    logits_BT, labels_BT, weights_B = logged(200)
    graph = TaskGraph({"click": Task(), "watch": Task(binary=False, where="click", log1p=True)})
    logits_BT, labels_BT = logits_BT[:, :2].detach(), labels_BT[:, :2]
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for (click_logit, watch), (click, seconds), weight in zip(
        logits_BT.tolist(), labels_BT.tolist(), weights_B, strict=True
    ):
        if not math.isnan(click):
            p = 1 / (1 + math.exp(-click_logit))
            sums[0] += weight * torch.tensor([-math.log(p if click else 1 - p), 1.0])
        if click == 1 and not math.isnan(seconds):
            sums[1] += weight * torch.tensor([(watch - math.log1p(seconds)) ** 2, 1.0])
    # plain loop on Python floats; the denominator is rounded to float32
    torch.testing.assert_close(
        whole(graph, logits_BT, labels_BT, weights_B), sums[:, 0] / sums[:, 1], rtol=1e-6, atol=0
    )


def test_a_where_task_learns_nothing_outside_its_space() -> None:
    logits_BT, labels_BT, weights_B = logged(200)
    outside_B = labels_BT[:, 0] != 1
    gradient_BT = gradient(EVERYTHING, logits_BT, labels_BT, weights_B)
    assert (gradient_BT[outside_B][:, 3:5] == 0).all()  # watch and like: exactly, by definition
    assert (gradient_BT[~outside_B][:, 3:5] != 0).any(0).all()
    changed_BT = labels_BT.clone()
    changed_BT[outside_B, 3:5] = 1e6  # whatever the log says there
    torch.testing.assert_close(gradient(EVERYTHING, logits_BT, changed_BT, weights_B), gradient_BT, rtol=0, atol=0)


def test_a_null_label_counts_as_if_its_row_were_not_there() -> None:
    logits_BT, labels_BT, weights_B = logged(300)
    for t, name in ((0, "click"), (5, "price")):
        graph = TaskGraph({name: EVERYTHING.tasks[name]})
        column = logits_BT[:, t : t + 1].detach().requires_grad_()
        known_B = ~labels_BT[:, t].isnan()
        masked = gradient(graph, column, labels_BT[:, t : t + 1], weights_B)
        removed = gradient(graph, column, labels_BT[:, t : t + 1], weights_B * known_B)
        without = gradient(
            graph, column[known_B].detach().requires_grad_(), labels_BT[known_B, t : t + 1], weights_B[known_B]
        )
        assert (masked[~known_B] == 0).all()  # exactly
        # oracle: the rows removed; float64, denominators rounded to float32
        torch.testing.assert_close(masked[known_B], without, rtol=1e-6, atol=0)
        torch.testing.assert_close(masked, removed, rtol=1e-6, atol=0)


def test_a_task_without_any_known_label_has_loss_zero_and_gradient_zero() -> None:
    logits_BT, labels_BT, weights_B = logged(50)
    nothing = gradient(EVERYTHING, logits_BT, torch.full_like(labels_BT, NAN), weights_B)
    assert (nothing == 0).all()  # nothing to learn from; no 0 / 0
    labels_BT[:, 0] = 0.0  # no click: cart and buy are known not to have happened, watch and like have no row
    losses_T = whole(EVERYTHING, logits_BT, labels_BT, weights_B)
    assert losses_T.isfinite().all() and (losses_T[3:5] == 0).all() and (losses_T[:3] > 0).all()


def test_an_integer_weight_is_that_many_copies_of_the_row() -> None:
    logits_BT, labels_BT, _ = logged(100)
    copies_B = torch.arange(100) % 4  # weight 0: the row removed
    rows = torch.arange(100).repeat_interleave(copies_B)
    ones_N = torch.ones(rows.numel(), dtype=torch.float64)
    weighted = whole(EVERYTHING, logits_BT, labels_BT, copies_B.double())
    copied = whole(EVERYTHING, logits_BT[rows], labels_BT[rows], ones_N)
    # oracle: the rows copied; float64, another order of summation
    torch.testing.assert_close(weighted, copied, rtol=1e-12, atol=0)
    by_weight, by_copies = (torch.autograd.grad(losses.sum(), logits_BT)[0] for losses in (weighted, copied))
    torch.testing.assert_close(by_weight, by_copies, rtol=1e-12, atol=1e-15)
    assert (by_weight[copies_B == 0] == 0).all()


def shares(labels_BT: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Each worker's rows, those without a click first, so that a first worker of 30 rows has none."""
    return (labels_BT[:, 0] == 1).long().argsort(stable=True).split(sizes)


@pytest.mark.parametrize("sizes", [[200], [30, 170], [30, 0, 170], [0, 60, 139, 1]])
def test_the_parts_of_any_number_of_workers_add_up_to_the_loss_and_gradient_of_one(sizes: list[int]) -> None:
    logits_BT, labels_BT, weights_B = logged(200)
    expected_T = whole(EVERYTHING, logits_BT, labels_BT, weights_B)
    (expected_BT,) = torch.autograd.grad(expected_T.sum(), logits_BT)
    workers = shares(labels_BT, sizes)
    sums_T = torch.stack([denominators(EVERYTHING, labels_BT[rows], weights_B[rows]) for rows in workers]).sum(0)
    parts = [task_losses(EVERYTHING, logits_BT[rows], labels_BT[rows], weights_B[rows], sums_T) for rows in workers]
    # oracle: one process; float64 sums in another order, denominators rounded to float32
    torch.testing.assert_close(torch.stack(parts).sum(0), expected_T, rtol=1e-6, atol=0)
    (summed_BT,) = torch.autograd.grad(torch.stack(parts).sum(), logits_BT)
    torch.testing.assert_close(summed_BT, expected_BT, rtol=1e-6, atol=1e-12)


def test_denominators_of_each_worker_alone_would_give_another_loss() -> None:
    logits_BT, labels_BT, weights_B = logged(200)
    expected_T = whole(EVERYTHING, logits_BT, labels_BT, weights_B)
    workers = shares(labels_BT, [30, 170])
    local_T = torch.stack([whole(EVERYTHING, logits_BT[r], labels_BT[r], weights_B[r]) for r in workers]).mean(0)
    # the mistake that the test above must see: watch has all its rows on one of two workers, so half its loss is lost
    assert local_T[3].item() == pytest.approx(expected_T[3].item() / 2, rel=1e-6)


def test_without_missing_labels_every_row_counts_exactly_once() -> None:
    generator = torch.Generator().manual_seed(6)
    logits_BT, weights_B = torch.randn(500, 3, generator=generator), torch.rand(500, generator=generator)
    labels_BT = torch.stack([drawn(0.5, 500, seed) for seed in (7, 8, 9)], dim=1).float()
    events, happened_BT = FUNNEL.events(logits_BT), labels_BT.cumprod(1)
    losses_T = whole(FUNNEL, logits_BT, labels_BT, weights_B)
    for t, event in enumerate(events.values()):
        loss_B = -torch.where(happened_BT[:, t] == 1, event.log_p_B, event.log_not_B)
        # the plain weighted mean over all rows: the same operations, so the same bits
        assert losses_T[t] == (weights_B * loss_B).sum() / weights_B.double().sum().float()


def constant(probabilities: list[float], num_rows: int) -> Tensor:
    """One constant logit a task, as a leaf behind every row."""
    return torch.logit(torch.tensor(probabilities, dtype=torch.float64)).expand(num_rows, -1).clone().requires_grad_()


def test_labels_missing_after_a_click_leave_the_fitted_joint_unbiased() -> None:
    num_rows, p_click, p_buy = 200_000, 0.3, 0.4
    click_B, buy_B = drawn(p_click, num_rows, 10), drawn(p_buy, num_rows, 11)
    buy_B[drawn(0.7, num_rows, 12) == 1] = NAN
    known_B = (click_B == 1) & ~buy_B.isnan()
    # the optimum in closed form: the click rate, and the buyers' share of the clicks with a label
    fitted = [click_B.mean().item(), buy_B[known_B].mean().item()]
    labels_BT, ones_B = torch.stack([click_B, buy_B], 1), torch.ones(num_rows, dtype=torch.float64)
    at_optimum_T = gradient(ESMM, constant(fitted, num_rows), labels_BT, ones_B).sum(0)
    assert at_optimum_T.abs().max() < 1e-7  # the loss is strictly convex there; weights are rounded to float32
    # and the optimum is the truth: 18,000 labels, so one standard deviation is 0.9 % of the joint; four of them
    assert fitted[0] * fitted[1] == pytest.approx(p_click * p_buy, rel=0.04)
    kept_B = known_B | (click_B == 0)
    dropped = [fitted[0], (known_B & (buy_B == 1)).sum().item() / kept_B.sum().item() / fitted[0]]
    # what leaving those rows out would fit instead is no optimum
    assert gradient(ESMM, constant(dropped, num_rows), labels_BT, ones_B).sum(0)[1] < -0.01


def test_labels_missing_in_the_middle_of_a_chain_leave_its_end_unbiased() -> None:
    num_rows = 200_000
    click_B, cart_B, buy_B = (drawn(p, num_rows, seed) for p, seed in ((0.5, 13), (0.4, 14), (0.3, 15)))
    cart_B[drawn(0.6, num_rows, 16) == 1] = NAN
    buy_B[drawn(0.5, num_rows, 17) == 1] = NAN
    in_cart_B = (click_B == 1) & (cart_B == 1)
    rates = [click_B, cart_B[(click_B == 1) & ~cart_B.isnan()], buy_B[in_cart_B & ~buy_B.isnan()]]
    logits_BT = constant([rate.mean().item() for rate in rates], num_rows)  # the optimum in closed form, as above
    labels_BT, ones_B = torch.stack([click_B, cart_B, buy_B], 1), torch.ones(num_rows, dtype=torch.float64)
    losses_T = whole(FUNNEL, logits_BT, labels_BT, ones_B)
    for t in range(3):  # each loss alone is at its minimum; weights are rounded to float32
        (gradient_BT,) = torch.autograd.grad(losses_T[t], logits_BT, retain_graph=True)
        assert gradient_BT.sum(0).abs().max() < 1e-7


def test_the_loss_of_rare_conversions_is_not_rounded_to_zero() -> None:
    logits_BT = torch.full((4, 2), -10.0, requires_grad=True)
    zeros_BT, ones_B = torch.zeros(4, 2), torch.ones(4)
    losses_T = whole(ESMM, logits_BT, zeros_BT, ones_B)
    # closed form -log(1 - sigmoid(-10)^2); float32
    assert losses_T[1].item() == pytest.approx(2.0609665e-09, rel=1e-5)
    assert losses_T[0].item() == pytest.approx(-Event.of(torch.tensor(-10.0)).log_not_B.item(), rel=1e-6)
    (gradient_BT,) = torch.autograd.grad(losses_T[1], logits_BT)
    assert (gradient_BT > 0).all()
