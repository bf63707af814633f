"""Proof tests of trainer/balance.py: closed forms, plain-loop twins on explicit gradients, scipy, and laws that hold
for every balancer.

Gradients are rows of G: [T, D], so the Gram matrix is G G' and a direction is weights @ G.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn

from trainer import balance
from trainer.balance import BALANCERS, Balancer

Floats = NDArray[np.float64]
NO_GRAM = torch.empty(0)
COUNTEREXAMPLE = np.array([(-2.0, -2.0), (-2.0, -1.0), (-1.0, 1.0)])  # where PE-LTR's two steps go wrong


def make(kind: str, num_tasks: int, **settings: Any) -> Balancer:
    return BALANCERS[kind](num_tasks, [t % 2 == 1 for t in range(num_tasks)], **settings)


def gram_of(gradients: Floats) -> Tensor:
    return torch.from_numpy(gradients @ gradients.T)


def drawn(num_tasks: int, seed: int, dims: int = 5) -> Floats:
    return np.random.default_rng(seed).normal(size=(num_tasks, dims))


def weighed(kind: str, gradients: Floats, **settings: Any) -> Floats:
    """The weights of a new balancer for tasks with these gradients, in float64."""
    balancer = make(kind, len(gradients), **settings)
    return balancer.weigh(torch.ones(len(gradients)), gram_of(gradients)).double().numpy()


def settled(balancer: Balancer, losses: list[float], gram_TT: Tensor = NO_GRAM, steps: int = 1500) -> Tensor:
    """The weights after many steps of the same losses and gradients."""
    for _ in range(steps):
        weights_T = balancer.weigh(torch.tensor(losses), gram_TT)
    return weights_T


def steps_of(num_tasks: int, num_steps: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Losses before a step, the Gram matrix, and losses after it."""
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        losses_T = torch.from_numpy(rng.uniform(0.1, 2.0, num_tasks)).float()
        after_T = losses_T * torch.from_numpy(rng.uniform(0.8, 1.1, num_tasks)).float()
        yield losses_T, gram_of(rng.normal(size=(num_tasks, 6))), after_T


def run(balancer: Balancer, steps: Iterator[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    weights = []
    for losses_T, gram_TT, after_T in steps:
        weights.append(balancer.weigh(losses_T, gram_TT).clone())
        balancer.look(after_T)
    return weights


# Fixed


def test_fixed_weights_are_those_given_in_task_order_and_one_by_default() -> None:
    given_T = make("fixed", 3, weights=[1, 0, 5]).weigh(torch.ones(3), NO_GRAM)
    assert given_T.tolist() == [1.0, 0.0, 5.0] and given_T.dtype == torch.float32
    assert make("fixed", 2).weigh(torch.ones(2), NO_GRAM).tolist() == [1.0, 1.0]


# Uncertainty


def test_uncertainty_at_rest_is_the_closed_form_for_regressions_and_events() -> None:
    losses_T = torch.tensor([0.04, 0.6, 3.0, 50.0])
    balancer = BALANCERS["uncertainty"](4, [True, False, True, False])
    weights_T = settled(balancer, losses_T.tolist())
    # minima of L / (2 sigma^2) + log sigma and of L / sigma^2 + log sigma, by hand: sigma^2 = L and 2 L
    sigma2_T = losses_T * torch.tensor([1.0, 2.0, 1.0, 2.0])
    torch.testing.assert_close(balancer.state_dict()["s_T"].exp(), sigma2_T, rtol=0.01, atol=0)
    torch.testing.assert_close(weights_T, 1 / (2 * losses_T), rtol=0.01, atol=0)


def test_uncertainty_finds_the_noise_of_two_regressions_while_they_are_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BI = torch.randn(2000, 3, generator=generator)
    noise_T = torch.tensor([10.0, 1.0])
    y_BT = x_BI @ torch.randn(3, 2, generator=generator) + noise_T * torch.randn(2000, 2, generator=generator)
    net, balancer = nn.Linear(3, 2), BALANCERS["uncertainty"](2, [True, True])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(1000):
        losses_T = (net(x_BI) - y_BT).square().mean(0)
        optimizer.zero_grad()
        (balancer.weigh(losses_T, NO_GRAM) * losses_T).sum().backward()
        optimizer.step()
    # Kendall's example; a standard deviation from 2,000 rows is known to 1.6 %
    torch.testing.assert_close((balancer.state_dict()["s_T"] / 2).exp(), noise_T, rtol=0.05, atol=0)


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_a_loss_in_another_unit_gets_a_weight_in_that_unit(factor: float) -> None:
    before_T = settled(make("uncertainty", 3), [0.5, 2.0, 1.0])
    after_T = settled(make("uncertainty", 3), [0.5, 2.0 * factor, 1.0])
    # closed form 1 / (2 L): the weighted loss, and so its gradient, does not change; 1 % as above
    torch.testing.assert_close(after_T, before_T * torch.tensor([1, 1 / factor, 1]), rtol=0.01, atol=0)


@pytest.mark.parametrize("loss", [0.02, 0.1, 0.45])
def test_a_loss_below_one_half_gains_weight_too(loss: float) -> None:
    weights_T = settled(make("uncertainty", 2), [loss, loss], steps=200)
    # sigma^2 = 2 L and L are below its first value 1: a known library clamps log sigma^2 at 0, where nothing moves
    assert (weights_T > torch.tensor([1.0, 0.5]) * 1.04).all()


def test_no_weight_of_uncertainty_exceeds_its_bound() -> None:
    weights_T = settled(make("uncertainty", 3, most=3.0), [1e-9, 1e-9, 1e9], steps=1000)
    # e^3 and, for a regression, half of it; and e^-3: |s| <= 3
    torch.testing.assert_close(weights_T, torch.tensor([20.0855, 10.0428, 0.049787]), rtol=1e-4, atol=0)


# DWA


def test_dwa_is_equation_7_over_windows_of_steps() -> None:
    balancer, window, temperature = make("dwa", 3, window=4, temperature=1.5), 4, 1.5
    losses = np.random.default_rng(0).uniform(0.1, 5, (20, 3))
    weights = [balancer.weigh(torch.from_numpy(row), NO_GRAM).numpy() for row in losses]
    means = losses.reshape(5, window, 3).mean(1)
    for step, got in enumerate(weights):
        done = step // window  # windows before this step
        ratio = np.exp(means[done - 1] / means[done - 2] / temperature) if done >= 2 else np.ones(3)
        np.testing.assert_allclose(got, 3 * ratio / ratio.sum(), rtol=1e-5)  # plain twin of eq. 7; float32


def test_dwa_averages_over_the_steps_in_which_a_task_had_rows() -> None:
    sparse, full = make("dwa", 2, window=4), make("dwa", 2, window=4)
    for step in range(12):
        loss = 1.0 / (1 + step // 4)  # the same within a window, so what is left out does not change a mean
        sparse.weigh(torch.tensor([1.0, loss if step % 4 == 1 else 0.0]), NO_GRAM)
        full.weigh(torch.tensor([1.0, loss]), NO_GRAM)
    torch.testing.assert_close(sparse.weigh(torch.ones(2), NO_GRAM), full.weigh(torch.ones(2), NO_GRAM))


# GradNorm


def toy(balancer: Balancer, num_steps: int) -> tuple[Tensor, Tensor]:
    """Chen et al., section 4: f_k = sigma_k tanh((B + eps_k) x), sigma = (1, 100), squared loss. The weights of each
    step, and the lengths of the tasks' gradients at the last shared layer: [N, 2] each.
    """
    torch.manual_seed(0)
    x_BI, common = torch.randn(256, 20), torch.randn(20, 5)
    targets = [sigma * torch.tanh(x_BI @ (common + 0.6 * torch.randn(20, 5))) for sigma in (1.0, 100.0)]
    shared, heads = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32)), [nn.Linear(32, 5) for _ in targets]
    optimizer = torch.optim.Adam(nn.ModuleList([shared, *heads]).parameters(), lr=0.003)
    weights, lengths = [], []
    for _ in range(num_steps):
        h_BH = shared(x_BI).relu()
        losses_T = torch.stack([(head(h_BH) - y_B).square().mean() for head, y_B in zip(heads, targets, strict=True)])
        rows = [torch.autograd.grad(loss, shared[2].weight, retain_graph=True)[0].flatten() for loss in losses_T]
        gradients_TD = torch.stack(rows)
        weights.append(balancer.weigh(losses_T, gradients_TD @ gradients_TD.T))
        lengths.append(gradients_TD.norm(dim=1))
        optimizer.zero_grad()
        (weights[-1] * losses_T).sum().backward()
        optimizer.step()
    return torch.stack(weights), torch.stack(lengths)


def test_gradnorm_makes_gradients_of_very_different_tasks_equally_long() -> None:
    weights_N2, lengths_N2 = toy(make("gradnorm", 2, alpha=0.0, rate=0.1), num_steps=400)
    assert lengths_N2[0, 1] > 50 * lengths_N2[0, 0]  # equal weights at first
    small, big = (weights_N2 * lengths_N2)[-50:].mean(0)
    assert 0.85 < small / big < 1.15  # alpha = 0: equal lengths; the net learns, so they move
    assert weights_N2[-1, 1] < 0.05  # nothing is claimed of the losses: equal weights reach them too


def test_gradnorm_gives_a_slower_task_a_longer_gradient_by_the_power_of_its_rate() -> None:
    gradients, alpha = np.diag([3.0, 1.0, 0.2]), 0.8
    balancer = make("gradnorm", 3, alpha=alpha)
    settled(balancer, [1.0, 2.0, 4.0], gram_of(gradients), steps=10)
    weights_T = settled(balancer, [0.25, 1.0, 4.0], gram_of(gradients), steps=1000)
    length = weights_T.numpy() * np.diag(gradients)
    rate = np.array([0.25, 0.5, 1.0]) ** alpha  # of the losses to their first values
    np.testing.assert_allclose(length / length.sum(), rate / rate.sum(), rtol=1e-3)  # fixed point, by hand
    assert weights_T.sum().item() == pytest.approx(3, rel=1e-5)


def test_gradnorm_weighs_equally_until_first_losses_are_known() -> None:
    balancer, gram_TT = make("gradnorm", 2, first=5), gram_of(np.diag([1.0, 9.0]))
    weights = [balancer.weigh(torch.tensor([4.0 - step, 1.0]), gram_TT).tolist() for step in range(3)]
    weights += [balancer.weigh(torch.tensor([2.0, 1.0]), gram_TT).tolist() for _ in range(3)]
    assert weights[:5] == [[1.0, 1.0]] * 5 and weights[5] != [1.0, 1.0]
    assert balancer.state_dict()["first_T"].tolist() == pytest.approx([13 / 5, 1.0])  # (4 + 3 + 2 + 2 + 2) / 5


# MGDA and PE-LTR


def residual(gram: Floats, weights: Floats, bounds: Floats) -> float:
    """How far weights are from the conditions that are necessary and sufficient for the shortest combination: equal
    slopes where a weight is above its bound, none smaller elsewhere.
    """
    slopes, free = gram @ weights, weights > bounds + 1e-9
    highest = slopes[free].max() if free.any() else slopes.min()
    outside = max(abs(weights.sum() - 1), (bounds - weights).max())
    return max(outside, (highest - slopes.min()) / gram.diagonal().max())


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4])
def test_no_convex_combination_on_a_grid_is_shorter_than_mgdas(num_tasks: int) -> None:
    parts = np.array([p for p in itertools.product(range(21), repeat=num_tasks) if sum(p) == 20]) / 20
    for seed in range(20):
        gradients = drawn(num_tasks, seed, dims=3)
        length = np.linalg.norm(weighed("mgda", gradients, normalise=False) @ gradients)
        # brute force; the weights are float32
        assert length <= np.linalg.norm(parts @ gradients, axis=1).min() + 1e-6


def test_mgda_is_what_scipy_finds() -> None:
    for seed in range(20):
        gram = gram_of(drawn(4, seed)).numpy()
        found = minimize(
            lambda w, gram=gram: w @ gram @ w,
            np.full(4, 0.25),
            jac=lambda w, gram=gram: 2 * gram @ w,
            bounds=[(0, 1)] * 4,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        np.testing.assert_allclose(balance.shortest(gram), found.x, atol=1e-5)  # SLSQP stops at about 1e-7


def test_mgdas_direction_lowers_every_loss_and_does_not_depend_on_units() -> None:
    for seed in range(20):
        gradients = drawn(4, seed, dims=12)
        direction = weighed("mgda", gradients) @ gradients
        assert (gradients @ direction > 0).all()  # four in twelve dimensions: never stationary
        other = np.array([1.0, 100.0, 0.01, 7.0])[:, None] * gradients
        again = weighed("mgda", other) @ other
        unit = direction / np.linalg.norm(direction)
        np.testing.assert_allclose(again / np.linalg.norm(again), unit, atol=1e-5)  # float32 weights


@pytest.mark.parametrize("solver", ["exact", "paper"])
def test_pe_ltr_of_two_tasks_is_the_clip_formula(solver: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        g1, g2 = gradients = rng.normal(size=(2, 5)) * [[1.0], [rng.uniform(0.1, 10)]]
        bounds = rng.uniform(0, 0.5, 2)
        w1 = np.clip((g2 - g1) @ g2 / ((g1 - g2) @ (g1 - g2)), bounds[0], 1 - bounds[1])  # closed form for two
        got = weighed("pe_ltr", gradients, at_least=list(bounds), solver=solver)
        np.testing.assert_allclose(got, [w1, 1 - w1], atol=1e-6)  # float32


def test_pe_ltr_exact_is_right_where_the_papers_two_steps_are_not() -> None:
    paper = weighed("pe_ltr", COUNTEREXAMPLE, solver="paper")
    exact = weighed("pe_ltr", COUNTEREXAMPLE)
    np.testing.assert_allclose(paper, [1, 0, 0], atol=1e-6)  # both by hand
    np.testing.assert_allclose(exact, [0.2, 0, 0.8], atol=1e-6)
    assert np.square(paper @ COUNTEREXAMPLE).sum() == pytest.approx(8, rel=1e-6)
    assert np.square(exact @ COUNTEREXAMPLE).sum() == pytest.approx(1.6, rel=1e-6)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 6])
def test_pe_ltr_exact_meets_the_conditions_of_the_optimum(num_tasks: int) -> None:
    rng = np.random.default_rng(num_tasks)
    for seed in range(60):
        gram = gram_of(drawn(num_tasks, seed, dims=1 + seed % 7)).numpy()
        bounds = rng.dirichlet(np.ones(num_tasks)) * rng.choice([0.0, 0.3, 0.9, 1.0])
        assert residual(gram, balance.pareto_weights(gram, bounds), bounds) <= 1e-8  # Karush, Kuhn and Tucker


def test_pe_ltr_exact_never_raises_a_loss_where_the_papers_solver_does() -> None:
    raised = dict.fromkeys(["exact", "paper"], 0)
    for seed in range(400):
        gradients = drawn(4, seed, dims=6)
        gram = gradients @ gradients.T
        for solver, solve in (("exact", balance.pareto_weights), ("paper", balance.pareto_weights_of_the_paper)):
            direction = solve(gram, np.zeros(4)) @ gradients
            raised[solver] += bool((gradients @ direction < -1e-9).any())
    # 11.9 % of Gaussian gradients of four tasks in six dimensions, by another code; its error is 1.6 %
    assert raised["exact"] == 0 and 30 <= raised["paper"] <= 65


@pytest.mark.parametrize("solver", ["exact", "paper"])
def test_pe_ltr_has_finite_weights_for_singular_gradients(solver: str) -> None:
    g = np.array([1.0, 2.0, 3.0])
    solve = {"exact": balance.pareto_weights, "paper": balance.pareto_weights_of_the_paper}[solver]
    for rows in ([g, g, g], [g, -g, g], [0 * g, 0 * g, 0 * g], [g, 1e-12 * g, 0 * g], [1e-15 * g, 1e15 * g, -g]):
        for bounds in (np.zeros(3), np.array([0.2, 0.3, 0.1]), np.array([0.5, 0.25, 0.25])):
            weights = solve(gram_of(np.stack(rows)).numpy(), bounds)
            assert np.isfinite(weights).all() and weights.sum() == pytest.approx(1)
            assert (weights >= bounds - 1e-9).all()


def test_equal_gradients_are_weighed_equally() -> None:
    # of all weights that are as short, the even ones: else one task's own tower would learn nothing
    np.testing.assert_allclose(weighed("mgda", np.ones((3, 4))), np.full(3, 1 / 3), atol=1e-3)


@pytest.mark.parametrize(("start", "end"), [(5.0, lambda c1, c2: 2 * (1 - c1)), (-3.0, lambda c1, c2: 2 * c2)])
def test_the_bounds_of_pe_ltr_choose_the_point_of_schaffers_front(start: float, end: Any) -> None:
    points = []
    for c1 in np.linspace(0.05, 0.9, 9):
        x, bounds = start, [c1, 0.95 - c1]
        balancer = make("pe_ltr", 2, at_least=bounds)
        for _ in range(300):
            slopes = np.array([[2 * x], [2 * (x - 2)]])  # of x^2 and (x - 2)^2, whose front is [0, 2]
            x -= 0.1 * (balancer.weigh(torch.ones(2), gram_of(slopes)).double().numpy() @ slopes)[0]
        # where the bound that holds it back says 0: c1 x + (1 - c1) (x - 2), or with 1 - c2 and c2
        assert x == pytest.approx(end(*bounds), abs=1e-4)
        points.append(x)
    assert (np.diff(points) < 0).all() and max(points) > 1.75 and min(points) < 0.25


def test_pe_ltr_shares_out_the_bounds_among_tasks_with_rows() -> None:
    gradients = np.array([[1.0, 0.0], [0.0, 0.0], [5.0, 1.0]])
    got = weighed("pe_ltr", gradients, at_least=[0.1, 0.5, 0.3])
    expected = weighed("pe_ltr", gradients[[0, 2]], at_least=[0.1, 0.3])
    np.testing.assert_allclose(got, [expected[0], 0, expected[1]], rtol=1e-6)  # as if the task did not exist


# PCGrad


def surgery(gradients: Floats, rng: np.random.Generator) -> Floats:
    """Yu et al., Algorithm 1, on the gradients themselves."""
    total = np.zeros(gradients.shape[1])
    for i in range(len(gradients)):
        g_i = gradients[i].copy()
        for j in rng.permutation(len(gradients)):
            if j != i and g_i @ gradients[j] < 0:
                g_i -= (g_i @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        total += g_i
    return total


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5])
def test_pcgrad_is_surgery_on_the_gradients_in_the_same_order(num_tasks: int) -> None:
    balancer = make("pcgrad", num_tasks)
    for step in range(30):
        gradients = drawn(num_tasks, seed=step)
        direction = balancer.weigh(torch.ones(num_tasks), gram_of(gradients)).double().numpy() @ gradients
        np.testing.assert_allclose(direction, surgery(gradients, np.random.default_rng(step)), atol=1e-5)  # float32


def test_pcgrad_of_two_tasks_is_the_closed_form() -> None:
    for seed in range(40):
        g1, g2 = gradients = drawn(2, seed)
        along = min(g1 @ g2, 0.0)
        expected = g1 + g2 - along * (g1 / (g1 @ g1) + g2 / (g2 @ g2))  # each without its part along the other
        np.testing.assert_allclose(weighed("pcgrad", gradients) @ gradients, expected, atol=1e-5)  # float32


def test_pcgrad_draws_another_order_every_step() -> None:
    balancer, gram_TT = make("pcgrad", 3), gram_of(COUNTEREXAMPLE - [[2.0, 0], [-3.0, 0], [0, 0]])
    seen = {tuple(balancer.weigh(torch.ones(3), gram_TT).numpy().round(4)) for _ in range(30)}
    assert len(seen) > 1  # the order matters for these gradients, and is not always the same


# CAGrad


@pytest.mark.parametrize("c", [0.2, 0.5, 0.9])
def test_cagrad_is_what_scipy_finds_on_the_gradients(c: float) -> None:
    compared = 0
    for seed in range(25):
        gradients = drawn(3, seed) + 0.3
        mean = gradients.mean(0)
        radius = c * np.linalg.norm(mean)

        def dual(w: Floats, gradients: Floats = gradients, mean: Floats = mean, radius: float = radius) -> float:
            return float(w @ gradients @ mean + radius * np.linalg.norm(w @ gradients))

        simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
        options = {"ftol": 1e-14, "maxiter": 500}
        found = minimize(dual, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, constraints=simplex, options=options)
        g_w = found.x @ gradients
        if np.linalg.norm(g_w) < 0.02 * np.linalg.norm(mean):
            continue  # the paper divides by it
        compared += 1
        expected = mean + radius / np.linalg.norm(g_w) * g_w  # Algorithm 1
        got = weighed("cagrad", gradients, c=c) @ gradients / 3
        np.testing.assert_allclose(got, expected, atol=2e-3 * np.linalg.norm(mean))  # SLSQP: 1e-7 in value
    assert compared >= 20


def test_cagrad_with_no_radius_is_the_sum_of_the_gradients() -> None:
    np.testing.assert_array_equal(weighed("cagrad", drawn(4, 0), c=0), np.ones(4))


@pytest.mark.parametrize("c", [0.01, 0.4, 0.9])
def test_cagrad_stays_in_its_ball_and_never_serves_the_worst_task_worse_than_the_mean(c: float) -> None:
    better = 0
    for seed in range(100):
        gradients = drawn(2 + seed % 5, seed, dims=1 + seed % 8)
        mean, direction = gradients.mean(0), weighed("cagrad", gradients, c=c) @ gradients / len(gradients)
        length = np.linalg.norm(mean)
        assert np.linalg.norm(direction - mean) <= c * length * (1 + 1e-4) + 1e-6  # the constraint
        gain = (gradients @ direction).min() - (gradients @ mean).min()
        assert gain >= -1e-5 * length  # the mean is in the ball too; float32 weights
        better += gain > 1e-3 * c * length
    assert better > 90


# FAMO


def test_famo_is_the_authors_formula_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    x_BI, y_BT, net = torch.randn(64, 6), torch.randn(64, 3) * torch.tensor([1.0, 5.0, 0.2]), nn.Linear(6, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    balancer = make("famo", 3, rate=0.5, decay=0.01)
    logit_T = torch.zeros(3, requires_grad=True)
    outer = torch.optim.SGD([logit_T], lr=0.5, weight_decay=0.01)  # the algorithm's step; their code takes Adam's
    for _ in range(8):
        losses_T = (net(x_BI) - y_BT).square().mean(0)
        weights_T = balancer.weigh(losses_T, NO_GRAM)
        z_T = logit_T.softmax(0).detach()
        of_theirs = torch.autograd.grad(
            (losses_T.log() * z_T / (z_T / losses_T).sum().detach()).sum(), losses_T, retain_graph=True
        )
        torch.testing.assert_close(weights_T, 3 * of_theirs[0], rtol=1e-4, atol=0)  # theirs add up to 1; float32
        optimizer.zero_grad()
        (weights_T * losses_T).sum().backward()
        optimizer.step()
        after_T = (net(x_BI) - y_BT).square().mean(0).detach()
        balancer.look(after_T)
        fell_T = losses_T.detach().log() - after_T.log()
        logit_T.grad = torch.autograd.grad(logit_T.softmax(0), logit_T, grad_outputs=fell_T)[0]
        outer.step()
    torch.testing.assert_close(balancer.state_dict()["logit_T"], logit_T.detach(), rtol=1e-4, atol=1e-6)


def test_famo_turns_to_the_task_that_falls_most_slowly() -> None:
    balancer, losses_T = make("famo", 3), torch.tensor([1.0, 1.0, 1.0])
    for _ in range(50):
        balancer.weigh(losses_T, NO_GRAM)
        balancer.look(torch.tensor([0.9, 0.99, 0.5]))
    weights_T = balancer.weigh(losses_T, NO_GRAM)
    assert weights_T[1] > weights_T[0] > weights_T[2]  # the paper's aim: equal relative speed
    assert weights_T.sum().item() == pytest.approx(3)


# What holds for every balancer


@pytest.mark.parametrize("kind", BALANCERS)
def test_weights_are_finite_at_every_scale_and_for_degenerate_gradients(kind: str) -> None:
    g = np.array([1.0, 2.0, -1.0])
    for lengths in ([1, 1, 1], [1, -1, 1], [1, 0, 0], [0, 0, 0], [1e20, 1, 1e-20], [-1e20, 1, 1e-20], [1e-20] * 3):
        for losses in ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1e20, 1.0, 1e-20], [0.0, 1e-20, 1e-20]):
            balancer, gram_TT = make(kind, 3), gram_of(np.outer(lengths, g))
            for step in range(25):
                weights_T = balancer.weigh(torch.tensor(losses), gram_TT)
                balancer.look(torch.tensor(losses) * (step % 3))
                assert weights_T.isfinite().all() and weights_T.dtype == torch.float32 and weights_T.shape == (3,)
                assert (weights_T >= 0).all()
            assert all(buffer.isfinite().all() for buffer in balancer.state_dict().values())


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_single_task_keeps_its_direction(kind: str) -> None:
    weights = run(make(kind, 1), steps_of(1, 30))
    # nothing to balance: one, but for what Uncertainty and CAGrad make of a task alone (1 + c)
    expected = {"cagrad": 1.4}.get(kind, 1.0)
    assert all(w > 0 for w in weights)
    assert kind == "uncertainty" or all(w.item() == pytest.approx(expected, rel=1e-4) for w in weights)


@pytest.mark.parametrize("kind", BALANCERS)
def test_weights_are_positive_where_the_method_promises_it(kind: str) -> None:
    weights_NT = torch.stack(run(make(kind, 4), steps_of(4, 250)))
    if kind in ("fixed", "uncertainty", "dwa", "gradnorm", "cagrad", "famo"):
        assert (weights_NT > 0).all()
    assert (weights_NT >= 0).all()  # MGDA and PE-LTR leave tasks out; PCGrad only adds of others what conflicts
    sums = {"fixed": 4, "dwa": 4, "gradnorm": 4, "famo": 4, "mgda": 1, "pe_ltr": 1}
    assert kind not in sums or torch.allclose(weights_NT.sum(1), torch.tensor(float(sums[kind])), rtol=1e-4)


@pytest.mark.parametrize("kind", BALANCERS)
def test_weights_follow_from_losses_and_gram_alone(kind: str) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = run(make(kind, 3), steps_of(3, 220))
    torch.manual_seed(2)
    np.random.seed(2)
    # what differs between workers, their random states, has no say: bitwise
    assert all(torch.equal(a, b) for a, b in zip(first, run(make(kind, 3), steps_of(3, 220)), strict=True))


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_state_that_was_saved_goes_on_with_the_same_weights(kind: str) -> None:
    steps = list(steps_of(3, 260))
    whole, broken, resumed = make(kind, 3), make(kind, 3), make(kind, 3)
    expected = run(whole, iter(steps))[-110:]
    run(broken, iter(steps[:-110]))
    resumed.load_state_dict(broken.state_dict())
    # the undisturbed run, bitwise: nothing that matters lives outside the buffers
    assert all(torch.equal(a, b) for a, b in zip(run(resumed, iter(steps[-110:])), expected, strict=True))


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_saved_state_does_not_change_when_training_goes_on(kind: str) -> None:
    balancer = make(kind, 3)
    run(balancer, steps_of(3, 20))
    saved = balancer.state_dict()
    kept = {name: value.clone() for name, value in saved.items()}
    run(balancer, steps_of(3, 100, seed=1))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)  # state is replaced, never written into


@pytest.mark.parametrize("kind", BALANCERS)
def test_no_gradient_goes_through_weights_or_state(kind: str) -> None:
    balancer, theta = make(kind, 3), torch.ones(3, requires_grad=True)
    for _ in range(15):
        weights_T = balancer.weigh(theta.square(), torch.outer(theta, theta))
        balancer.look(theta.square() / 2)
        assert not weights_T.requires_grad
    assert not any(buffer.requires_grad for buffer in balancer.buffers()) and not list(balancer.parameters())


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_task_that_never_has_rows_does_not_matter(kind: str) -> None:
    steps = list(steps_of(3, 230))
    pad = nn.ConstantPad1d((0, 1), 0.0)
    padded = [
        (pad(losses_T), nn.ConstantPad2d((0, 1, 0, 1), 0.0)(gram_TT), pad(after_T))
        for losses_T, gram_TT, after_T in steps
    ]
    alone, beside, new = run(make(kind, 3), iter(steps)), make(kind, 4), make(kind, 4)
    for expected, got in zip(alone, run(beside, iter(padded)), strict=True):
        torch.testing.assert_close(got[:3], expected, rtol=1e-4, atol=1e-6)  # float32, over 230 steps
    first, last = new.state_dict(), beside.state_dict()
    assert all(first[name][3] == last[name][3] for name in first if first[name].dim() == 1)


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_batch_without_rows_of_a_task_leaves_what_was_learnt_of_it(kind: str) -> None:
    balancer = make(kind, 3)
    run(balancer, steps_of(3, 50))
    before = balancer.state_dict()
    for losses_T, gram_TT, after_T in steps_of(3, 5, seed=1):
        here_T = torch.tensor([1.0, 0.0, 1.0])
        weights_T = balancer.weigh(losses_T * here_T, gram_TT * torch.outer(here_T, here_T))
        balancer.look(after_T * here_T)
        assert weights_T.isfinite().all()
    after = balancer.state_dict()
    assert all(before[name][1] == after[name][1] for name in before if before[name].dim() == 1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("pe_ltr", {"solver": "exakt"}),
        ("pe_ltr", {"at_least": [0.6, 0.6]}),
        ("pe_ltr", {"at_least": [-0.1, 0.5]}),
        ("cagrad", {"c": -0.1}),
        ("dwa", {"window": 0}),
        ("dwa", {"temperature": 0.0}),
        ("gradnorm", {"first": 0}),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make(kind, 2, **settings)
