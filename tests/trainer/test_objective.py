"""Proof tests of trainer/objective.py: closed forms, copied and removed rows, any split over workers, missing labels,
and laws that training must find again.

Populations are written as rows with weights (each case once, weighed by its chance), so that what is learnt has no
sampling error.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor

from trainer.heads import Event, Propensity, Task, TaskGraph
from trainer.losses import (
    ApproxNdcg,
    Huber,
    ListMle,
    Pairwise,
    Softmax,
    SquaredError,
    Thresholds,
    WeightedLogistic,
)
from trainer.objective import Objective, Term, known_rows, shares_of_losses

NAN = math.nan
ESMM = TaskGraph({"click": Task(), "buy": Task(given="click")})
ESM2 = TaskGraph({"click": Task(), "cart": Task(given="click"), "buy": Task(given="click", via="cart")})
FUNNEL = TaskGraph({"click": Task(), "cart": Task(given="click"), "buy": Task(given="cart")})
ONE_A_ROW = {
    "click": Task(positive_weight=3.0, negatives_kept=0.5),
    "cart": Task(given="click", positive_weight=2.0),
    "buy": Task(given="click", via="cart", propensity=Propensity(doubly_robust=True)),
    "pay": Task(given="cart", propensity=Propensity(least=0.3, product=0.5), positive_weight=1.5),
    "like": Task(where="click"),
    "share": Task(transfer="click", calibrator=0.6),
    "watch": Task(Huber(delta=0.7), where="click", log1p=True),
    "stay": Task(WeightedLogistic(), where="click"),
    "dwell": Task(Thresholds(thresholds=(0.5, 1.5)), where="click"),
    "price": Task(SquaredError()),
    "cart_again": Task(head="cart@click"),
    "pay_again": Task(head="pay@all"),
}
IN_LISTS = {
    "pairs": Task(Pairwise(), head="click@all"),
    "shares": Task(Softmax()),
    "order": Task(ListMle(), where="click"),
    "gain": Task(ApproxNdcg(temperature=0.5), head="pay@all"),
}
EVERYTHING = TaskGraph(ONE_A_ROW | IN_LISTS)


def exact(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def drawn(probability: float, num_rows: int, seed: int) -> Tensor:
    return (torch.rand(num_rows, generator=torch.Generator().manual_seed(seed)) < probability).double()


def num_logits(graph: TaskGraph) -> int:
    return sum(head.num_logits for head in graph.heads)


def logged(num_rows: int, nulls: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (some null) and groups of 1 to 6 rows for EVERYTHING, in float64."""
    logits_BL = normal(num_rows, num_logits(EVERYTHING)).requires_grad_()
    labels = [drawn(0.4, num_rows, 100 + t) for t in range(len(EVERYTHING.tasks))]
    for t, task in enumerate(EVERYTHING.tasks.values()):
        if task.loss.kind == "regression":
            labels[t] = labels[t] * normal(num_rows, seed=200 + t).abs()
        if task.loss.kind == "ranking":
            labels[t] += drawn(0.5, num_rows, 300 + t) * 2
    labels_BT, generator = torch.stack(labels, 1), torch.Generator().manual_seed(1)
    labels_BT[torch.rand(labels_BT.shape, generator=generator) < nulls] = NAN
    sizes = torch.randint(1, 7, (num_rows,), generator=generator)
    return logits_BL, labels_BT, torch.arange(num_rows).repeat_interleave(sizes)[:num_rows]


def terms_of(
    graph: TaskGraph,
    logits_BL: Tensor,
    labels_BT: Tensor,
    weights_BT: Tensor | None = None,
    groups_B: Tensor | None = None,
    shown_BP: Tensor | None = None,
) -> list[Term]:
    """The terms of a batch that one worker has alone."""
    weights_BT = torch.ones_like(labels_BT) if weights_BT is None else weights_BT
    known_2T = known_rows(graph, labels_BT, weights_BT)
    return Objective(graph, graph.nodes(logits_BL, shown_BP), labels_BT, weights_BT, known_2T, groups_B).terms()


def losses_of(
    graph: TaskGraph,
    logits_BL: Tensor,
    labels_BT: Tensor,
    weights_BT: Tensor | None = None,
    groups_B: Tensor | None = None,
    shown_BP: Tensor | None = None,
) -> Tensor:
    """The losses of a batch that one worker has alone: [T]."""
    terms = terms_of(graph, logits_BL, labels_BT, weights_BT, groups_B, shown_BP)
    return shares_of_losses(terms, torch.stack([term.weight for term in terms])) @ torch.stack([t.sum for t in terms])


def gradient(
    graph: TaskGraph,
    logits_BL: Tensor,
    labels_BT: Tensor,
    weights_BT: Tensor | None = None,
    groups_B: Tensor | None = None,
) -> Tensor:
    return torch.autograd.grad(losses_of(graph, logits_BL, labels_BT, weights_BT, groups_B).sum(), logits_BL)[0]


def minimise(loss_of: Callable[[Tensor], Tensor], num_weights: int) -> Tensor:
    """The weights at which a smooth loss is smallest."""
    weights_N = torch.zeros(num_weights, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights_N], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(weights_N)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights_N.detach()


def at_rest(loss_of: Callable[[Tensor], Tensor], num_weights: int) -> Tensor:
    """Where training ends when it is no descent of one function, some gradients being cut off: steps along the gradient
    until it is near, then the point at which all of it vanishes.
    """
    weights_N = torch.zeros(num_weights, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights_N], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(weights_N).backward()
        optimizer.step()

    def slope(weights: Any) -> Any:
        at_N = exact(weights).requires_grad_()
        return torch.autograd.grad(loss_of(at_N), at_N)[0].numpy()

    found = scipy.optimize.root(slope, weights_N.tolist(), tol=1e-12)
    assert abs(found.fun).max() < 1e-9, found.message
    return exact(found.x)


# ESMM.


def test_esmm_gradient_of_the_conversion_logit_is_the_closed_form_on_every_row() -> None:
    logits_BL, click_B, buy_B = (2 * normal(64, 2)).requires_grad_(), drawn(0.3, 64, 1), drawn(0.5, 64, 2)
    gradient_BL = gradient(ESMM, logits_BL, torch.stack([click_B, buy_B], 1))
    p_BL = torch.sigmoid(logits_BL.detach())
    joint_B = p_BL.prod(1)
    # closed form, Ma et al. 2018 eq. 4 derived by hand, over 64 rows; float64
    expected_B = (joint_B - click_B * buy_B) * (1 - p_BL[:, 1]) / (1 - joint_B) / 64
    torch.testing.assert_close(gradient_BL[:, 1], expected_B, rtol=1e-9, atol=1e-15)
    assert (gradient_BL[click_B == 0, 1] > 0).all()  # un-clicked rows train the conversion head too, downwards


def test_the_conversion_loss_reaches_the_click_logit_too() -> None:
    logits_BL = normal(64, 2, seed=3).requires_grad_()
    labels_BT = torch.stack([drawn(0.3, 64, 4), drawn(0.5, 64, 5)], 1)
    (gradient_BL,) = torch.autograd.grad(losses_of(ESMM, logits_BL, labels_BT)[1], logits_BL)
    p_BL, joint_B = torch.sigmoid(logits_BL.detach()), torch.sigmoid(logits_BL.detach()).prod(1)
    # the same closed form with the factors exchanged: the product is symmetric; float64
    expected_B = (joint_B - labels_BT.prod(1)) * (1 - p_BL[:, 0]) / (1 - joint_B) / 64
    torch.testing.assert_close(gradient_BL[:, 0], expected_B, rtol=1e-9, atol=1e-15)


def test_the_loss_of_rare_conversions_is_not_rounded_to_zero_in_float32() -> None:
    logits_BL = torch.full((4, 2), -10.0, requires_grad=True)
    losses_T = losses_of(ESMM, logits_BL, torch.zeros(4, 2))
    # closed form -log(1 - sigmoid(-10)^2); float32
    assert losses_T[1].item() == pytest.approx(2.0609665e-09, rel=1e-5)
    assert losses_T[0].item() == pytest.approx(-Event.of(torch.tensor(-10.0)).log_not_B.item(), rel=1e-6)
    (gradient_BL,) = torch.autograd.grad(losses_T[1], logits_BL)
    assert (gradient_BL > 0).all()


# Which rows count.


def test_losses_equal_a_plain_loop_over_rows() -> None:
    tasks = {"click": Task(positive_weight=2.0), "watch": Task(SquaredError(), where="click", log1p=True)}
    logits_BL, labels_BT, weights_BT = normal(200, 2), normal(200, 2, seed=1).abs(), normal(200, 2, seed=2).abs()
    labels_BT[:, 0] = drawn(0.4, 200, 3)
    labels_BT[drawn(0.1, 200, 4) == 1, 0] = labels_BT[drawn(0.1, 200, 5) == 1, 1] = NAN
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for (z, guess), (click, seconds), weights in zip(
        logits_BL.tolist(), labels_BT.tolist(), weights_BT.tolist(), strict=True
    ):
        if not math.isnan(click):
            p, weight = 1 / (1 + math.exp(-z - math.log(2))), weights[0] * (2 if click else 1)
            sums[0] += weight * torch.tensor([-math.log(p if click else 1 - p), 1.0])
        if click == 1 and not math.isnan(seconds):
            sums[1] += weights[1] * torch.tensor([(guess - math.log1p(seconds)) ** 2, 1.0])
    found_T = losses_of(TaskGraph(tasks), logits_BL, labels_BT, weights_BT)
    torch.testing.assert_close(found_T, sums[:, 0] / sums[:, 1], rtol=1e-6, atol=0)  # plain loop in float32 and float64


def test_without_missing_labels_every_row_counts_exactly_once() -> None:
    logits_BL, weights_B = normal(500, 3), normal(500, seed=1).abs()
    labels_BT = torch.stack([drawn(0.5, 500, seed) for seed in (7, 8, 9)], dim=1)
    whole, happened_BT = FUNNEL.nodes(logits_BL).whole, labels_BT.cumprod(1)
    losses_T = losses_of(FUNNEL, logits_BL, labels_BT, weights_B.unsqueeze(1).expand(500, 3))
    for t, event in enumerate(whole.values()):
        loss_B = -torch.where(happened_BT[:, t] == 1, event.log_p_B, event.log_not_B)
        # the plain weighted mean over all rows; float64
        torch.testing.assert_close(losses_T[t], (weights_B * loss_B).sum() / weights_B.sum(), rtol=1e-14, atol=0)


def test_a_where_task_learns_nothing_outside_its_space() -> None:
    logits_BL, labels_BT, groups_B = logged(200)
    outside_B = labels_BT[:, 0] != 1
    masked = [t for t, task in enumerate(EVERYTHING.tasks.values()) if task.where == "click"]
    own = [place for t in masked for place in EVERYTHING.places(list(EVERYTHING.tasks)[t])]
    before_BL = gradient(EVERYTHING, logits_BL, labels_BT, groups_B=groups_B)
    assert (before_BL[outside_B][:, own] == 0).all()  # exactly, by definition
    assert (before_BL[~outside_B][:, own] != 0).any(0).all()
    changed_BT = labels_BT.clone()
    changed_BT[outside_B.unsqueeze(1) & torch.isin(torch.arange(labels_BT.shape[1]), torch.tensor(masked))] = 1e6
    after_BL = gradient(EVERYTHING, logits_BL, changed_BT, groups_B=groups_B)
    torch.testing.assert_close(after_BL, before_BL, rtol=0, atol=0)  # whatever the log says there


@pytest.mark.parametrize("name", ["click", "price", "stay", "dwell", "watch", "like"])
def test_a_null_label_counts_as_if_its_row_were_not_there(name: str) -> None:
    logits_BL, labels_BT, _ = logged(300)
    graph = TaskGraph({name: replace(EVERYTHING.tasks[name], where=None)})
    t, places = list(EVERYTHING.tasks).index(name), EVERYTHING.places(name)
    own_BL, labels_B1 = logits_BL[:, places].detach().requires_grad_(), labels_BT[:, t : t + 1]
    known_B, weights_B1 = ~labels_B1[:, 0].isnan(), normal(300, 1, seed=1).abs()
    masked_BL = gradient(graph, own_BL, labels_B1, weights_B1)
    weightless_BL = gradient(graph, own_BL, labels_B1, weights_B1 * known_B.unsqueeze(1))
    kept_BL = own_BL[known_B].detach().requires_grad_()
    assert (masked_BL[~known_B] == 0).all()  # exactly
    # oracle: the rows removed; their stand-ins' weight is a common factor, rounded to float32
    torch.testing.assert_close(
        masked_BL[known_B], gradient(graph, kept_BL, labels_B1[known_B], weights_B1[known_B]), rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(masked_BL, weightless_BL, rtol=1e-12, atol=1e-15)


def test_a_task_without_any_known_label_has_loss_zero_and_gradient_zero() -> None:
    logits_BL, labels_BT, groups_B = logged(50)
    unknown_BT = torch.full_like(labels_BT, NAN)
    share = list(EVERYTHING.tasks).index("share")
    assert (gradient(EVERYTHING, logits_BL, unknown_BT, groups_B=groups_B) == 0).all()  # nothing to learn from; no 0/0
    labels_BT[:, 0] = 0.0  # no click: what is given a click is known not to have happened, what is where has no row
    losses_T = losses_of(EVERYTHING, logits_BL, labels_BT, groups_B=groups_B)
    assert losses_T.isfinite().all() and losses_T[share] > 0
    for t, (name, task) in enumerate(EVERYTHING.tasks.items()):
        nothing = task.where == "click" or name == "cart_again"
        assert losses_T[t] == 0 if nothing else losses_T[t] > 0
    empty = losses_of(EVERYTHING, logits_BL[:0], labels_BT[:0], groups_B=groups_B[:0])
    assert (empty == 0).all()


# P01: weights.


def test_an_integer_weight_is_that_many_copies_of_the_row_or_list() -> None:
    logits_BL, labels_BT, groups_B = logged(150)
    copies_B = groups_B % 4  # of a whole list; 0: the list removed
    rows = torch.arange(150).repeat_interleave(copies_B)
    which = torch.cat([torch.arange(int(copies)) for copies in copies_B])
    weighted = losses_of(
        EVERYTHING, logits_BL, labels_BT, copies_B.double().unsqueeze(1).expand_as(labels_BT), groups_B=groups_B
    )
    copied = losses_of(EVERYTHING, logits_BL[rows], labels_BT[rows], groups_B=groups_B[rows] * 4 + which)
    # oracle: the rows copied, the copies of a list being lists of their own; float64, another order of summation
    torch.testing.assert_close(weighted, copied, rtol=1e-12, atol=0)
    assert (weighted > 0).all()
    for t in range(len(EVERYTHING.tasks)):
        by_weight, by_copies = (
            torch.autograd.grad(losses[t], logits_BL, retain_graph=True)[0] for losses in (weighted, copied)
        )
        torch.testing.assert_close(by_weight, by_copies, rtol=1e-12, atol=1e-15)
        assert (by_weight[copies_B == 0] == 0).all()


def test_each_row_of_a_loss_without_lists_has_a_weight_of_its_own() -> None:
    graph, (logits_BL, labels_BT, _) = TaskGraph(ONE_A_ROW), logged(100)
    logits_BL, labels_BT = logits_BL[:, : num_logits(graph)].detach().requires_grad_(), labels_BT[:, : len(ONE_A_ROW)]
    copies_B = torch.arange(100) % 4
    rows = torch.arange(100).repeat_interleave(copies_B)
    by_weight = gradient(graph, logits_BL, labels_BT, copies_B.double().unsqueeze(1).expand_as(labels_BT))
    by_copies = torch.autograd.grad(losses_of(graph, logits_BL[rows], labels_BT[rows]).sum(), logits_BL)[0]
    # oracle: the rows copied; float64, another order of summation
    torch.testing.assert_close(by_weight, by_copies, rtol=1e-11, atol=1e-15)


def test_each_task_has_weights_of_its_own() -> None:
    logits_BL, labels_BT, groups_B = logged(150, nulls=0.0)
    weights_BT = normal(150, len(EVERYTHING.tasks), seed=1).abs()
    together = losses_of(EVERYTHING, logits_BL, labels_BT, weights_BT, groups_B=groups_B)
    for t in range(len(EVERYTHING.tasks)):
        alone = losses_of(
            EVERYTHING, logits_BL, labels_BT, weights_BT[:, t : t + 1].expand_as(weights_BT), groups_B=groups_B
        )
        assert alone[t] == together[t]  # the same operations, so the same bits
        assert sum(a == b for a, b in zip(alone, together, strict=True)) == 1


def test_a_list_weighs_what_its_rows_with_a_label_weigh_on_average() -> None:
    graph, scores_BL = TaskGraph({"order": Task(Pairwise())}), normal(6, 1)
    labels_BT = exact([[1.0, 0.0, NAN, 0.0, 1.0, 0.0]]).T
    weights_BT = exact([[1.0, 4.0, 100.0, 0.5, 0.5, 9.0]]).T
    groups_B = torch.tensor([5, 5, 5, 8, 8, 9])
    pair_B = torch.nn.functional.softplus(torch.stack([scores_BL[1] - scores_BL[0], scores_BL[3] - scores_BL[4]]))[:, 0]
    expected = (2.5 * pair_B[0] + 0.5 * pair_B[1]) / 3  # by hand; the last list has one row and says nothing
    found = losses_of(graph, scores_BL, labels_BT, weights_BT, groups_B=groups_B)[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


# P03: any split over workers.


def parts_of(
    workers: Sequence[Tensor], logits_BL: Tensor, labels_BT: Tensor, weights_BT: Tensor, groups_B: Tensor
) -> Tensor:
    """Each worker's part of the losses, when sums are added over the workers as train_step does: [W, T]."""
    known_2T = torch.stack([known_rows(EVERYTHING, labels_BT[rows], weights_BT[rows]) for rows in workers]).sum(0)
    shares = []
    for rows in workers:
        nodes = EVERYTHING.nodes(logits_BL[rows])
        objective = Objective(EVERYTHING, nodes, labels_BT[rows], weights_BT[rows], known_2T, groups_B[rows])
        shares.append(objective.terms())
    weight_M = torch.stack([torch.stack([term.weight for term in terms]) for terms in shares]).sum(0)
    sums = [torch.stack([term.sum for term in terms]) for terms in shares]
    return torch.stack([shares_of_losses(shares[0], weight_M) @ sum_M for sum_M in sums])


def split(labels_BT: Tensor, groups_B: Tensor, cuts: Sequence[float]) -> list[Tensor]:
    """Whole lists to each worker, those without a click first, so that a small first worker has none."""
    clicks_G = torch.zeros(int(groups_B.max()) + 1).index_add_(0, groups_B, (labels_BT[:, 0] == 1).float())
    place_B = clicks_G.argsort(stable=True).argsort()[groups_B]  # of its list in the order of clicks
    bounds = [round(cut * len(clicks_G)) for cut in (0.0, *cuts, 1.0)]
    return [((place_B >= low) & (place_B < high)).nonzero()[:, 0] for low, high in itertools.pairwise(bounds)]


@pytest.mark.parametrize("cuts", [[], [0.15], [0.15, 0.15], [0.0, 0.3, 0.99]], ids=lambda cuts: f"{len(cuts) + 1}")
def test_the_parts_of_any_number_of_workers_add_up_to_the_losses_and_gradients_of_one(cuts: list[float]) -> None:
    logits_BL, labels_BT, groups_B = logged(240)
    weights_BT = 3 * normal(*labels_BT.shape, seed=1).abs()
    workers = split(labels_BT, groups_B, cuts)
    assert sum(map(len, workers)) == 240 and (len(workers) < 3 or 0 in map(len, workers))
    assert (
        len(workers) == 1 or any(len(rows) and not (labels_BT[rows, 0] == 1).any() for rows in workers) or cuts[0] == 0
    )
    expected_T = losses_of(EVERYTHING, logits_BL, labels_BT, weights_BT, groups_B=groups_B)
    found_T = parts_of(workers, logits_BL, labels_BT, weights_BT, groups_B).sum(0)
    # oracle: one process; float64 sums in another order, the stand-ins' weights rounded to float32
    torch.testing.assert_close(found_T, expected_T, rtol=1e-6, atol=0)
    for t in range(len(EVERYTHING.tasks)):
        expected, found = (torch.autograd.grad(x[t], logits_BL, retain_graph=True)[0] for x in (expected_T, found_T))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_sums_of_each_worker_alone_would_give_another_loss() -> None:
    logits_BL, labels_BT, groups_B = logged(240)
    weights_BT, first = torch.ones_like(labels_BT), split(labels_BT, groups_B, [0.15])
    expected_T = losses_of(EVERYTHING, logits_BL, labels_BT, weights_BT, groups_B=groups_B)
    alone = [losses_of(EVERYTHING, logits_BL[r], labels_BT[r], weights_BT[r], groups_B=groups_B[r]) for r in first]
    for name in ("watch", "stay", "dwell", "like", "cart_again", "order"):
        t = list(EVERYTHING.tasks).index(name)
        # the mistake that the test above must see: all clicks are on one of two workers, so half of the loss is lost
        assert (alone[0] + alone[1])[t].item() / 2 == pytest.approx(expected_T[t].item() / 2, rel=1e-6)


# Missing labels.


def rates(*probabilities: float) -> Callable[[int], Tensor]:
    """One constant logit a head, behind every row."""
    return lambda num_rows: torch.logit(torch.tensor(probabilities, dtype=torch.float64)).expand(num_rows, -1)


def test_labels_missing_after_a_click_leave_the_fitted_joint_unbiased() -> None:
    # click 0.3, buy 0.4 of clicks; 70 % of the labels after a click are missing
    cases = exact([[0.0, 0.0, 0.7], [1.0, 0.0, 0.054], [1.0, 1.0, 0.036], [1.0, NAN, 0.21]])
    labels_BT, weights_BT = cases[:, :2], cases[:, 2:].expand(4, 2)
    fitted_L = minimise(lambda z_L: losses_of(ESMM, z_L.expand(4, 2), labels_BT, weights_BT).sum(), 2)
    # oracle: the truth; the stand-ins' weight, 1 / 0.3, is rounded to float32
    torch.testing.assert_close(torch.sigmoid(fitted_L), exact([0.3, 0.4]), rtol=1e-6, atol=0)
    dropped = labels_BT[:3], weights_BT[:3]
    biased_L = minimise(lambda z_L: losses_of(ESMM, z_L.expand(3, 2), *dropped)[1], 2)
    assert torch.sigmoid(biased_L).prod() < 0.05  # what leaving those rows out would make of 0.12


def test_labels_missing_in_the_middle_of_a_chain_leave_its_end_unbiased() -> None:
    truth, known = (0.5, 0.4, 0.3), (1.0, 0.4, 0.5)  # click, cart, buy; the share of labels that is there
    rows, weights = [], []
    for click, cart, buy in itertools.product((0.0, 1.0), repeat=3):
        for has_cart, has_buy in itertools.product((0, 1), repeat=2):
            chance = [p if y else 1 - p for p, y in zip(truth, (click, cart, buy), strict=True)]
            chance += [k if has else 1 - k for k, has in zip(known[1:], (has_cart, has_buy), strict=True)]
            rows.append([click, cart if has_cart else NAN, buy if has_buy else NAN])
            weights.append(math.prod(chance))
    labels_BT, weights_B = exact(rows), exact(weights)
    logits_BL = rates(*truth)(len(rows)).clone().requires_grad_()
    losses_T = losses_of(FUNNEL, logits_BL, labels_BT, weights_B.unsqueeze(1).expand_as(labels_BT))
    for loss in losses_T:  # each loss alone is at its minimum; the stand-ins' weights are rounded to float32
        (gradient_BL,) = torch.autograd.grad(loss, logits_BL, retain_graph=True)
        assert gradient_BL.sum(0).abs().max() < 1e-7


# P02: weighted positives and a sampled log, taken back in the predictions.


@pytest.mark.parametrize("weight", [1.0, 5.0, 0.2])
@pytest.mark.parametrize("kept", [1.0, 0.1])
def test_a_fitted_logit_is_the_true_rate_under_weighting_and_sampling(weight: float, kept: float) -> None:
    rate, labels_BT = 0.03, exact([[1.0], [0.0]])
    weights_BT = exact([[rate], [(1 - rate) * kept]])  # what the log still has of each label
    graph = TaskGraph({"click": Task(positive_weight=weight, negatives_kept=kept)})
    plain = TaskGraph({"click": Task()})
    fitted = minimise(lambda z_L: losses_of(graph, z_L.expand(2, 1), labels_BT, weights_BT).sum(), 1)
    assert torch.sigmoid(fitted).item() == pytest.approx(rate, rel=1e-6)  # oracle: the truth; a float32 weight
    raised_BT = weights_BT * torch.tensor([[weight], [1.0]])
    learnt = minimise(lambda z_L: losses_of(plain, z_L.expand(2, 1), labels_BT, raised_BT).sum(), 1)
    p = torch.sigmoid(learnt).item()
    p = p / (p + (1 - p) * weight)  # the closed forms, weighting first: q = p' / (p' + (1 - p') w),
    assert p / (p + (1 - p) / kept) == pytest.approx(rate, rel=1e-6)  # then He et al. 2014: q = p / (p + (1 - p) / r)


def sampled_funnel(click: float, buy: float, kept: float) -> tuple[Tensor, Tensor]:
    """Labels and weights of a log with the given share of its un-clicked rows."""
    weights_B = exact([(1 - click) * kept, click * (1 - buy), click * buy])
    return exact([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), weights_B.unsqueeze(1).expand(3, 2)


@pytest.mark.parametrize(("weight", "kept"), [(5.0, 1.0), (3.0, 0.05)])
@pytest.mark.parametrize("kind", ["product", "ips", "dr"])
def test_true_rates_are_found_through_a_product_too(weight: float, kept: float, kind: str) -> None:
    batch = sampled_funnel(0.05, 0.3, kept)
    propensity = None if kind == "product" else Propensity(kind == "dr", product=0.0)
    tasks = {
        "click": Task(positive_weight=2.0, negatives_kept=kept),
        "buy": Task(given="click", positive_weight=weight, propensity=propensity),
    }
    graph = TaskGraph(tasks)
    size = num_logits(graph)
    fitted_L = at_rest(lambda z_L: losses_of(graph, z_L.expand(3, size), *batch).sum(), size)
    p = graph.predictions(fitted_L.expand(1, size))
    # oracle: the truth; weights of positives are float32
    for address, truth in {"click@all": 0.05, "buy@click": 0.3, "buy@all": 0.015}.items():
        assert p[address].item() == pytest.approx(truth, rel=1e-6)


def test_a_second_loss_on_a_product_knows_of_the_sampled_log_too() -> None:
    labels_BT, weights_BT = sampled_funnel(0.05, 0.3, 0.1)
    tasks = {"click": Task(negatives_kept=0.1), "buy": Task(given="click"), "again": Task(head="buy@all")}
    batch = torch.cat([labels_BT, labels_BT[:, 1:]], 1), weights_BT[:, :1].expand(3, 3)
    losses_T = losses_of(TaskGraph(tasks), normal(1, 2).expand(3, 2), *batch)
    assert losses_T[2].item() == pytest.approx(losses_T[1].item(), rel=1e-12)  # the same label, head and space


# P12: PAL.


def test_an_examination_law_is_found_again_up_to_a_factor() -> None:
    looked_K, liked_I = exact([0.95, 0.7, 0.5, 0.3, 0.2]), torch.linspace(0.05, 0.6, 8, dtype=torch.float64)
    position, item, click = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (5, 8, 2)), indexing="ij"))
    shown = torch.exp(-((item / 7 - 1 + position / 4) ** 2))  # better items stand further up, as in a log
    chance = looked_K[position] * liked_I[item]
    batch = click.double().unsqueeze(1), (shown * torch.where(click == 1, chance, 1 - chance)).unsqueeze(1)
    graph = TaskGraph({"click": Task()}, shown=["click"])

    def loss_of(z_N: Tensor) -> Tensor:
        return losses_of(graph, z_N[5 + item].unsqueeze(1), *batch, shown_BP=z_N[position].unsqueeze(1)).sum()

    fitted_N = minimise(loss_of, 13)
    p_N = torch.sigmoid(fitted_N)
    # oracle: the law; only the product is seen, so one factor stays free. Rounded where the loss is flat
    torch.testing.assert_close(p_N[:5] / p_N[0], looked_K / looked_K[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(p_N[5:] / p_N[5], liked_I / liked_I[0], rtol=1e-5, atol=0)
    served_I = graph.predictions(fitted_N[5:].unsqueeze(1))["click@all"]
    torch.testing.assert_close(served_I, p_N[5:])
    seen_I = torch.zeros(8).double().index_add_(0, item, shown * chance / 2)
    naive_I = seen_I / torch.zeros(8).double().index_add_(0, item, shown.double() / 2)
    assert (naive_I[-1] / naive_I[0]) / (liked_I[-1] / liked_I[0]) > 1.3  # click rates alone flatter what stood on top


# P15: ESM2.


def test_the_rates_of_a_funnel_are_found_again_in_every_segment() -> None:
    # the cart depends on one feature (a), the purchase on another (b): y3 and y4 are then two unknowns in as many
    # equations as there are values of a; in a single segment only their mixture could be known
    y1_AB = exact([[0.3, 0.1], [0.2, 0.4], [0.15, 0.25]])
    y2_A, y3_B = exact([0.2, 0.5, 0.8]), exact([0.6, 0.9])
    y4_B = exact([0.05, 0.3])
    grids = torch.meshgrid(*map(torch.arange, (3, 2, 2, 2, 2)), indexing="ij")
    a, b, click, cart, buy = (x.flatten() for x in grids)
    bought = torch.where(cart == 1, y3_B[b], y4_B[b])
    chances = [torch.where(y == 1, p, 1 - p) for y, p in ((click, y1_AB[a, b]), (cart, y2_A[a]), (buy, bought))]
    labels_BT = torch.stack([click, cart, buy], 1).double()
    weights_BT = torch.stack(chances).prod(0).unsqueeze(1).expand_as(labels_BT)

    def loss_of(z_N: Tensor) -> Tensor:
        logits_BL = torch.stack([z_N[2 * a + b], z_N[6 + a], z_N[9 + b], z_N[11 + b]], 1)
        return losses_of(ESM2, logits_BL, labels_BT, weights_BT).sum()

    fitted_N = torch.sigmoid(minimise(loss_of, 13))
    # oracle: the law, population exact; labels outside the space (a cart without a click) count as not having happened
    torch.testing.assert_close(fitted_N, torch.cat([y1_AB.flatten(), y2_A, y3_B, y4_B]), rtol=1e-5, atol=0)


def test_a_cart_without_a_click_does_not_count() -> None:
    logits_BL, labels_BT = normal(50, 4).requires_grad_(), torch.stack([drawn(0.4, 50, t) for t in range(3)], 1)
    masked_BT = labels_BT * labels_BT[:, :1]
    assert (masked_BT != labels_BT).any()
    torch.testing.assert_close(
        gradient(ESM2, logits_BL, labels_BT), gradient(ESM2, logits_BL, masked_BT), rtol=0, atol=0
    )
    y1, y2, y3, y4 = torch.sigmoid(logits_BL.detach()).unbind(1)
    carts_B, buys_B = y1 * y2, y1 * (y2 * y3 + (1 - y2) * y4)
    expected = [
        torch.nn.functional.binary_cross_entropy(p_B, masked_BT[:, t]) for t, p_B in enumerate((y1, carts_B, buys_B))
    ]
    # Wen et al., eq. 7-9, on plain probabilities; float64
    torch.testing.assert_close(losses_of(ESM2, logits_BL, labels_BT), torch.stack(expected), rtol=1e-12, atol=0)


# P14: selection bias, ESCM2.


def biased_world() -> tuple[Tensor, Tensor, Tensor, float]:
    """Inputs [B, 3] (1, x1, x2), labels and weights of a world where clicks and conversions both depend on x2; and the
    mean chance of a conversion over all rows, were all clicked.
    """
    points = torch.linspace(-3, 3, 15, dtype=torch.float64)
    x1, x2, case = (x.flatten() for x in torch.meshgrid(points, points, exact([0, 1, 2]), indexing="ij"))
    density = torch.exp(-(x1**2 + x2**2) / 2)
    click, buy = torch.sigmoid(-1 + 0.5 * x1 + 1.2 * x2), torch.sigmoid(-2 + x1 + 1.5 * x2)
    chance = torch.where(case == 0, 1 - click, click * torch.where(case == 1, 1 - buy, buy))
    labels_BT = torch.stack([case > 0, case == 2], 1).double()
    weights_BT = (density * chance).unsqueeze(1).expand_as(labels_BT)
    truth = (density * buy).sum() / density.sum()
    return torch.stack([torch.ones_like(x1), x1, x2], 1), labels_BT, weights_BT, truth.item()


def mean_conversion(propensity: Propensity | None) -> float:
    """What a linear conversion head that does not see x2 says on average over all rows, relative to the truth; the
    click head, and what is imputed, see everything.
    """
    x_BI, labels_BT, weights_BT, truth = biased_world()
    graph = TaskGraph({"click": Task(), "buy": Task(given="click", propensity=propensity)})

    def logits_of(w_N: Tensor) -> Tensor:
        buy_B = x_BI[:, :2] @ w_N[3:5]
        columns = [x_BI @ w_N[:3], buy_B, x_BI @ w_N[5:]]
        return torch.stack(columns[: num_logits(graph)], 1)

    fitted_N = at_rest(lambda w_N: losses_of(graph, logits_of(w_N), labels_BT, weights_BT).sum(), 8)
    buy_B = graph.predictions(logits_of(fitted_N))["buy@click"]
    return ((weights_BT[:, 0] * buy_B).sum() / weights_BT[:, 0].sum()).item() / truth


def test_selection_bias_stays_with_the_product_and_goes_with_propensities() -> None:
    # oracle: the mean chance of the simulated law over all rows; bounds as in Wang et al. 2022, table 1's direction
    assert mean_conversion(None) > 1.15
    assert mean_conversion(Propensity(product=0.0)) == pytest.approx(1, abs=0.05)
    assert mean_conversion(Propensity(doubly_robust=True, product=0.0)) == pytest.approx(1, abs=0.05)


def escm2(doubly_robust: bool, least: float = 1e-6, weight: float = 1.0) -> TaskGraph:
    propensity = Propensity(doubly_robust, least=least, product=0.0)
    return TaskGraph({"click": Task(), "buy": Task(given="click", positive_weight=weight, propensity=propensity)})


def enumerated(click_X: Tensor, buy_X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every case of every x with its chance: not clicked, clicked and not bought, bought, not known, which a quarter of
    the labels after a click are. Returns the rows' x, labels and weights.
    """
    x, case = (each.flatten() for each in torch.meshgrid(torch.arange(len(click_X)), torch.arange(4), indexing="ij"))
    of_clicked_B4 = torch.stack([0 * buy_X, 0.25 * (1 - buy_X), 0.25 * buy_X, 0 * buy_X + 0.75], 1)
    weight_B = torch.where(case == 0, 1 - click_X[x], click_X[x] * of_clicked_B4[x, case])
    labels_BT = torch.stack([(case > 0).double(), exact([0.0, 0.0, 1.0, NAN])[case]], 1)
    return x, labels_BT, weight_B.unsqueeze(1).expand_as(labels_BT)


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("right", ["propensity", "imputation", "neither"])
def test_the_doubly_robust_loss_is_right_if_one_of_its_two_models_is(right: str, weight: float) -> None:
    click_X, buy_X = exact([0.05, 0.15, 0.3, 0.4, 0.5, 0.6]), exact([0.5, 0.1, 0.7, 0.3, 0.05, 0.4])
    x, labels_BT, weights_BT = enumerated(click_X, buy_X)
    click_logit_X = torch.logit(click_X) + (0.0 if right == "propensity" else normal(6, seed=1))
    imputed_logit_X = torch.logit(buy_X) + (0.0 if right == "imputation" else normal(6, seed=2))
    logit_X = normal(6).requires_grad_()  # of the conversion, anywhere
    logits_BL = torch.stack([click_logit_X, logit_X, imputed_logit_X], 1)[x]
    term = terms_of(escm2(True, weight=weight), logits_BL, labels_BT, weights_BT)[-2]
    z_X, log_p = logit_X + math.log(weight), torch.nn.functional.logsigmoid
    found, truth = term.sum / term.weight, -(weight * buy_X * log_p(z_X) + (1 - buy_X) * log_p(-z_X)).mean()
    slopes = [torch.autograd.grad(each, logit_X, retain_graph=True)[0] for each in (found, truth)]
    # oracle: the mean loss over all rows, were the conversion seen on every one; float64, and the stand-ins' weight of
    # 4 is exact
    if right == "neither":
        assert (slopes[0] - slopes[1]).abs().max() > 0.02 * slopes[1].abs().max()
    else:
        assert found.item() == pytest.approx(truth.item(), rel=1e-12)
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("doubly_robust", [False, True])
def test_losses_with_propensities_equal_a_plain_loop(doubly_robust: bool) -> None:
    logits_BL, weights_BT = 2 * normal(80, 2 + doubly_robust), normal(80, 2, seed=1).abs()
    labels_BT = torch.stack([drawn(0.5, 80, 2), drawn(0.5, 80, 3)], 1)
    sums = [0.0] * 4  # clicked over propensity, their weights; corrected everywhere, missed
    for (click_z, z, *rest), (click, buy), (_, weight) in zip(
        logits_BL.tolist(), labels_BT.tolist(), weights_BT.tolist(), strict=True
    ):
        chance = max(1 / (1 + math.exp(-click_z)), 0.2)
        costs = [math.log1p(math.exp(z)), math.log1p(math.exp(-z))]  # of no purchase, of one
        inverse, cost = click * weight / chance, costs[int(buy)]
        sums[0], sums[1] = sums[0] + inverse * cost, sums[1] + inverse
        if doubly_robust:
            imputed = 1 / (1 + math.exp(-rest[0]))
            guess = imputed * costs[1] + (1 - imputed) * costs[0]
            sums[2] += weight * guess + inverse * (cost - guess)
            sums[3] += inverse * (cost - guess) ** 2
    found = [t.sum / t.weight for t in terms_of(escm2(doubly_robust, least=0.2), logits_BL, labels_BT, weights_BT)[2:]]
    total = weights_BT[:, 1].sum().item()
    expected = [sums[2] / total, sums[3] / total] if doubly_robust else [sums[0] / sums[1]]
    # Wang et al. 2022, eq. 8-14, in Python floats; chances below 0.2 count as 0.2
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-12)
    assert (torch.sigmoid(logits_BL[labels_BT[:, 0] == 1, 0]) < 0.2).any()


def test_rows_over_their_propensities_are_normalised_by_their_own_sum() -> None:
    logits_BL, labels_BT = normal(50, 2), torch.stack([drawn(0.5, 50, 2), torch.ones(50).double()], 1)
    logits_BL[:, 1] = 0.4  # the same loss on every row
    for shift in (0.0, -3.0, 3.0):  # whatever the propensities say
        term = terms_of(escm2(False), logits_BL + exact([shift, 0.0]), labels_BT)[-1]
        assert (term.sum / term.weight).item() == pytest.approx(math.log1p(math.exp(-0.4)), rel=1e-12)  # closed form


@pytest.mark.parametrize("doubly_robust", [False, True])
def test_propensities_teach_no_click_and_each_head_learns_from_its_own_term(doubly_robust: bool) -> None:
    logits_BL = normal(50, 2 + doubly_robust).requires_grad_()
    labels_BT = torch.stack([drawn(0.5, 50, 2), drawn(0.5, 50, 3)], 1)
    terms = terms_of(escm2(doubly_robust), logits_BL, labels_BT)
    moved = [
        (torch.autograd.grad(term.sum, logits_BL, retain_graph=True)[0] != 0).any(0).tolist() for term in terms[2:]
    ]
    # by hand: a conversion's loss must not be made small by calling clicks likely, nor what is imputed be bent to it
    assert moved == ([[False, True, False], [False, False, True]] if doubly_robust else [[False, True]])
    clicked_B = labels_BT[:, 0] == 1
    (slope_BL,) = torch.autograd.grad(terms[2].sum, logits_BL)
    assert (slope_BL[~clicked_B, 1] != 0).all() == doubly_robust  # only what is imputed speaks of un-clicked rows


def test_a_batch_without_a_click_has_no_loss_over_propensities() -> None:
    logits_BL, labels_BT = normal(20, 2).requires_grad_(), torch.zeros(20, 2).double()
    losses_T = losses_of(escm2(False), logits_BL, labels_BT)
    (slope_BL,) = torch.autograd.grad(losses_T[1], logits_BL)
    assert losses_T[1] == 0 and (slope_BL == 0).all()  # 0 / 0 counts as nothing


# AITM's calibrator, and losses on another task's head.


def test_a_later_step_likelier_than_its_earlier_one_costs_the_difference() -> None:
    graph = TaskGraph({"click": Task(), "buy": Task(transfer="click", calibrator=0.6)})
    logits_BL, labels_BT = normal(60, 2).requires_grad_(), torch.stack([drawn(0.5, 60, 1), drawn(0.2, 60, 2)], 1)
    weights_BT = normal(60, 2, seed=3).abs()
    plain = TaskGraph({"click": Task(), "buy": Task(transfer="click", calibrator=0.0)})
    p_BL, weight_B = torch.sigmoid(logits_BL), weights_BT[:, 1] / weights_BT[:, 1].sum()
    # Xi et al. 2021, eq. 11-12: alpha max(p_buy - p_click, 0), as a weighted mean; float64
    expected = 0.6 * (weight_B * (p_BL[:, 1] - p_BL[:, 0]).clamp(min=0)).sum()
    with_it, without = (losses_of(each, logits_BL, labels_BT, weights_BT) for each in (graph, plain))
    torch.testing.assert_close(with_it[1] - without[1], expected, rtol=1e-12, atol=0)
    slopes = [
        torch.autograd.grad(each, logits_BL, retain_graph=True)[0] for each in (with_it[1] - without[1], expected)
    ]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-15)
    assert with_it[0] == without[0] and len(terms_of(plain, logits_BL, labels_BT)) == 2


def test_a_second_loss_on_a_conditional_is_plain_cross_entropy_on_the_rows_of_its_space() -> None:
    graph = TaskGraph({"click": Task(), "buy": Task(given="click"), "paid": Task(head="buy@click")})
    logits_BL, labels_BT = normal(80, 2).requires_grad_(), torch.stack([drawn(0.5, 80, t) for t in range(3)], 1)
    loss = losses_of(graph, logits_BL, labels_BT)[2]
    clicked_B = labels_BT[:, 0] == 1
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(logits_BL[clicked_B, 1], labels_BT[clicked_B, 2])  # oracle: torch; float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (slope_BL,) = torch.autograd.grad(loss, logits_BL)
    assert (slope_BL[:, 0] == 0).all() and (slope_BL[~clicked_B] == 0).all()


def test_a_second_loss_on_the_whole_is_cross_entropy_of_the_product_on_every_row() -> None:
    graph = TaskGraph({"click": Task(), "buy": Task(given="click"), "paid": Task(head="buy@all")})
    logits_BL, labels_BT = normal(80, 2), torch.stack([drawn(0.5, 80, t) for t in range(3)], 1)
    product_B = torch.sigmoid(logits_BL).prod(1)
    expected = torch.nn.functional.binary_cross_entropy(product_B, labels_BT[:, 2])  # torch, plain probabilities
    torch.testing.assert_close(losses_of(graph, logits_BL, labels_BT)[2], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("on", "score"), [("click@all", 0), ("buy@all", 1), ("buy@click", 2), ("price@all", 3)])
def test_a_loss_in_lists_ranks_by_the_log_odds_of_the_prediction_that_it_names(on: str, score: int) -> None:
    tasks = {
        "click": Task(),
        "buy": Task(given="click"),
        "price": Task(SquaredError()),
        "order": Task(Softmax(), head=on),
    }
    logits_BL, groups_B = normal(60, 3), torch.arange(60) // 5
    labels_BT = torch.stack([drawn(0.6, 60, t) for t in range(4)], 1)
    labels_BT[:, 3] += labels_BT[:, 0]  # graded
    product_B = torch.sigmoid(logits_BL[:, :2]).prod(1)
    scores_B = (logits_BL[:, 0], torch.logit(product_B), logits_BL[:, 1], logits_BL[:, 2])[score]
    lists = []
    for rows in torch.arange(60).view(12, 5):
        here = rows[labels_BT[rows, 0] == 1] if on == "buy@click" else rows
        y, s = labels_BT[here, 3], scores_B[here]
        if len(here) and y.max() > y.min():
            lists.append(-(y * s.log_softmax(0)).sum() / y.sum())
    found = losses_of(TaskGraph(tasks), logits_BL, labels_BT, groups_B=groups_B)[3]
    # plain loop over the lists; log-odds of a product by logit and in log space agree to a few units
    torch.testing.assert_close(found, torch.stack(lists).mean(), rtol=1e-10, atol=0)


def test_a_list_loss_beside_cross_entropy_moves_the_same_logit() -> None:
    graph = TaskGraph({"click": Task(), "order": Task(Pairwise(), head="click@all")})
    logits_BL, groups_B = normal(40, 1).requires_grad_(), torch.arange(40) // 4
    labels_BT = drawn(0.5, 40, 1).unsqueeze(1).expand(40, 2)
    losses_T = losses_of(graph, logits_BL, labels_BT, groups_B=groups_B)
    of_rows, of_lists = (torch.autograd.grad(loss, logits_BL, retain_graph=True)[0] for loss in losses_T)
    assert (of_rows != 0).all() and of_lists.abs().max() > 0
    # a list's scores may move together for free; cross entropy pins them. Closed form, float64
    sums_G = of_lists.view(10, 4).sum(1)
    torch.testing.assert_close(sums_G, torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-15)


# Terms into losses.


def test_losses_are_the_terms_over_their_global_weights_times_their_factors() -> None:
    terms = [
        Term(0, exact(6.0), exact(2.0)),
        Term(1, exact(5.0), exact(0.0), 3.0),
        Term(1, exact(8.0), exact(4.0), 0.5),
    ]
    share_TM = shares_of_losses(terms, exact([4.0, 0.0, 16.0]))
    assert share_TM[:, [0, 2]].tolist() == [[0.25, 0.0], [0.0, 0.03125]]  # by hand: factor / weight over all workers
    assert share_TM.isfinite().all() and share_TM[0, 1] == 0


def test_rows_of_known_targets_are_counted_by_weight() -> None:
    labels_BT = exact([[1.0, 1.0], [1.0, NAN], [1.0, 0.0], [0.0, NAN], [NAN, 1.0]])
    weights_BT = exact([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0], [16.0, 160.0]])
    known_2T = known_rows(ESMM, labels_BT, weights_BT)
    assert known_2T.tolist() == [[31.0, 70.0], [15.0, 50.0]]  # by hand: every row and clicked ones; those with a target
