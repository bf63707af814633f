"""Balancers: what the tasks' losses are multiplied by, from step to step.

A balancer turns what is known of a step into one weight a task: the losses, and for some the Gram matrix of the tasks'
gradients at the dense net's input, <g_j, g_k>. Both are summed over all workers first, so every worker finds the same
weights. Then one backward pass of the weighted sum trains everything, rows included, exactly once: MGDA, PCGrad and
CAGrad too, whose directions are sums of the tasks' gradients with weights that the Gram matrix tells.

A task without a row in the batch has a loss of exactly 0 and no gradient: the others are weighed as if it did not
exist, and what was learnt of it stays as it was. Each is built from (num_tasks, regression_T, **its settings) and
raises ValueError for settings that make no sense. To add one: a class here, a line in BALANCERS, a test.

Shape letters: T tasks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.pieces import ByTask

Floats = NDArray[np.float64]
_LEAST = 1e-8  # of a loss whose logarithm is taken: FAMO's epsilon
_MOST = 1e30  # of a weight: a float32, with room for the loss it multiplies


class Balancer(nn.Module):
    """needs_gram: whether weigh wants the Gram matrix. looks_again: whether look wants the losses of the same batch
    after the step. What it learns are buffers: part of the checkpoint, the same on every worker.
    """

    needs_gram = False
    looks_again = False

    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        """The step's weights: float32 [T], finite, no gradient hangs on to them. losses_T: over all workers. gram_TT:
        empty unless it is needed.
        """
        raise NotImplementedError

    def look(self, losses_T: Tensor) -> None:
        """Learn from the losses of the same batch after the step."""


class Fixed(Balancer):
    """The same weights all the time."""

    weights_T: Tensor

    def __init__(self, num_tasks: int, regression_T: Sequence[bool], *, weights: ByTask = 1.0):
        super().__init__()
        weights_T = torch.as_tensor(weights, dtype=torch.float32).expand(num_tasks)
        self.register_buffer("weights_T", weights_T.clone(), persistent=False)

    @torch.no_grad()
    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        return self.weights_T


class Uncertainty(Balancer):
    """Each task's noise s = log sigma^2 is learnt: a regression counts L e^-s / 2 + s / 2, an event L e^-s + s / 2.

    At rest a weight is 1 / (2 L): losses are brought to the same size, and a rare event with a tiny log loss weighs
    much. most: bound of |s|.
    Source: Kendall, Gal, Cipolla: Multi-task learning using uncertainty to weigh losses, CVPR 2018, eq. 7 and 10.
    """

    half_T: Tensor
    s_T: Tensor

    def __init__(self, num_tasks: int, regression_T: Sequence[bool], *, rate: float = 0.02, most: float = 8.0):
        super().__init__()
        self._rate, self._most = rate, most
        self.register_buffer("half_T", torch.tensor([0.5 if r else 1.0 for r in regression_T]), persistent=False)
        self.register_buffer("s_T", torch.zeros(num_tasks))

    @torch.no_grad()
    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        weights_T = self.half_T * torch.exp(-self.s_T)
        slope_T = (0.5 - weights_T * losses_T.float()).clamp(-1, 1)  # far off, the exponential would overshoot
        slope_T = torch.where(losses_T > 0, slope_T, 0.0)
        self.s_T = (self.s_T - self._rate * slope_T).clamp(-self._most, self._most)
        return weights_T


class DynamicWeightAverage(Balancer):
    """A task whose loss falls more slowly than the others' gets more weight: T softmax(r / temperature), r the mean
    loss of the last `window` steps over that of the window before. One pass a day has no epochs: windows stand for
    them. A task without a row in one of the two keeps its weight.

    Source: Liu, Johns, Davison: End-to-end multi-task learning with attention, CVPR 2019, eq. 7.
    """

    sum_T: Tensor
    seen_T: Tensor
    before_T: Tensor
    weights_T: Tensor
    steps: Tensor

    def __init__(self, num_tasks: int, regression_T: Sequence[bool], *, temperature: float = 2.0, window: int = 100):
        super().__init__()
        _demand(temperature > 0 and window >= 1, f"temperature and window above 0, not {temperature} and {window}")
        self._temperature, self._window = temperature, window
        self.register_buffer("sum_T", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("seen_T", torch.zeros(num_tasks, dtype=torch.float64))  # steps that had a row
        self.register_buffer("before_T", torch.zeros(num_tasks, dtype=torch.float64))  # 0: there was no window yet
        self.register_buffer("weights_T", torch.ones(num_tasks))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        weights_T = self.weights_T
        self.sum_T = self.sum_T + losses_T
        self.seen_T = self.seen_T + (losses_T > 0)
        self.steps = self.steps + 1
        if int(self.steps) % self._window == 0:
            self._close_window()
        return weights_T

    def _close_window(self) -> None:
        mean_T = self.sum_T / self.seen_T.clamp(min=1)
        known_T = (mean_T > 0) & (self.before_T > 0)
        ratio_K = mean_T[known_T] / self.before_T[known_T]
        share_K = torch.softmax(ratio_K / self._temperature, 0) * self.weights_T[known_T].sum()
        self.weights_T = self.weights_T.masked_scatter(known_T, share_K.float())
        self.before_T = torch.where(mean_T > 0, mean_T, self.before_T)
        self.sum_T, self.seen_T = torch.zeros_like(self.sum_T), torch.zeros_like(self.seen_T)


class GradNorm(Balancer):
    """Weights under which the tasks' gradients become equally long, longer for a task that trains more slowly:
    w_k |g_k| -> mean(w |g|) r_k^alpha, r_k the loss over its first value, relative to the other tasks'.

    The paper takes gradient steps on w of the L1 distance to that aim; here the steps are on log w, as long as the
    distance in log up to 1, so that weights stay positive whatever their size. first: a task's steps whose mean loss
    is its first value. Source: Chen et al.: GradNorm, ICML 2018, Algorithm 1.
    """

    needs_gram = True
    first_T: Tensor
    weights_T: Tensor
    seen_T: Tensor

    def __init__(
        self,
        num_tasks: int,
        regression_T: Sequence[bool],
        *,
        alpha: float = 1.5,
        rate: float = 0.025,
        first: int = 10,
    ):
        super().__init__()
        _demand(first >= 1, f"first from 1 up, not {first}")
        self._alpha, self._rate, self._first = alpha, rate, first
        self.register_buffer("first_T", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("weights_T", torch.ones(num_tasks))
        self.register_buffer("seen_T", torch.zeros(num_tasks, dtype=torch.int64))  # steps that had a row

    @torch.no_grad()
    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        weights_T, length_T = self.weights_T, gram_TT.diagonal().double().clamp(min=0).sqrt()
        here_T = losses_T > 0
        early_T = here_T & (self.seen_T < self._first)
        self.first_T = self.first_T + torch.where(early_T, losses_T.double() / self._first, 0.0)
        self.seen_T = self.seen_T + here_T
        known_T = here_T & (length_T > 0) & (self.seen_T >= self._first)
        if known_T.any():
            self._step(known_T, losses_T[known_T].double() / self.first_T[known_T], length_T[known_T])
        return weights_T

    def _step(self, known_T: Tensor, slowness_K: Tensor, length_K: Tensor) -> None:
        """Of the K tasks that are known; their weights keep their sum."""
        weights_K = self.weights_T[known_T].double()
        length_K = weights_K * length_K
        aim_K = length_K.mean() * (slowness_K / slowness_K.mean()).clamp(min=1e-6) ** self._alpha
        log_K = weights_K.log() - self._rate * (length_K / aim_K).log().clamp(-1, 1)
        weights_K = (torch.softmax(log_K, 0) * weights_K.sum()).clamp(min=1 / _MOST)
        self.weights_T = self.weights_T.masked_scatter(known_T, weights_K.float())


class Mgda(Balancer):
    """The shortest convex combination of the tasks' gradients: a direction in which no loss rises, until none can be
    lowered without another. normalise: the gradients are brought to the same length first, else the task with the
    smallest wins.

    Source: Désidéri: Multiple-gradient descent algorithm, 2012; Sener, Koltun: Multi-task learning as multi-objective
    optimization, NeurIPS 2018, section 3.3 (gradients at the shared representation).
    """

    needs_gram = True

    def __init__(self, num_tasks: int, regression_T: Sequence[bool], *, normalise: bool = True):
        super().__init__()
        self._normalise = normalise

    @torch.no_grad()
    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        return _among_those_that_pull(gram_TT, lambda gram, tasks: _scaled(shortest, gram, self._normalise))


class ParetoEfficient(Balancer):
    """PE-LTR: the shortest combination of the tasks' gradients whose weights add up to 1 and are each at least its
    bound. at_least: bounds by task, which choose the point of the front. solver: exact; or paper, which relaxes the
    bounds and projects: the same for two tasks, worse for more (for four random gradients in six dimensions, one
    direction in eight raises a loss). normalise: the gradients are brought to the same length first; the
    bounds are on what these are multiplied by.

    Source: Lin et al.: A Pareto-efficient algorithm for multiple objective optimization in e-commerce recommendation,
    RecSys 2019, Algorithms 1 and 2. (Problem 4 there must read sum = 1 - sum of bounds.)
    """

    needs_gram = True

    def __init__(
        self,
        num_tasks: int,
        regression_T: Sequence[bool],
        *,
        at_least: ByTask = 0.0,
        solver: Literal["exact", "paper"] = "exact",
        normalise: bool = False,
    ):
        super().__init__()
        bound_T = np.broadcast_to(np.array(at_least, dtype=np.float64), num_tasks)
        solvers = {"exact": pareto_weights, "paper": pareto_weights_of_the_paper}
        _demand(
            bool((bound_T >= 0).all()) and bound_T.sum() < 1 + 1e-9, f"bounds from 0 up to 1 in sum, not {at_least}"
        )
        _demand(solver in solvers, f"solver exact or paper, not {solver}")
        self._bound_T, self._solve = bound_T, solvers[solver]
        self._normalise = normalise

    @torch.no_grad()
    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        def solve(gram: Floats, tasks: NDArray[np.int64]) -> Floats:
            return _scaled(lambda gram: self._solve(gram, self._bound_T[tasks]), gram, self._normalise)

        return _among_those_that_pull(gram_TT, solve)


class PcGrad(Balancer):
    """Each task's gradient loses its part against every other that it conflicts with, in random order; their sum.

    Source: Yu et al.: Gradient surgery for multi-task learning, NeurIPS 2020, Algorithm 1.
    """

    needs_gram = True
    steps: Tensor

    def __init__(self, num_tasks: int, regression_T: Sequence[bool]):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        order = np.random.default_rng(int(self.steps))  # the same on every worker
        self.steps = self.steps + 1
        return _among_those_that_pull(gram_TT, lambda gram, tasks: without_conflicts(gram, order))


class CaGrad(Balancer):
    """The direction within a ball around the mean gradient that lowers the loss that falls least as much as it can.
    c: the ball's radius over the mean gradient's length; 0 is the mean.

    Source: Liu et al.: Conflict-averse gradient descent for multi-task learning, NeurIPS 2021, Algorithm 1.
    """

    needs_gram = True

    def __init__(self, num_tasks: int, regression_T: Sequence[bool], *, c: float = 0.4):
        super().__init__()
        _demand(c >= 0, f"c from 0 up, not {c}")
        self._c = c

    @torch.no_grad()
    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        return _among_those_that_pull(gram_TT, lambda gram, tasks: len(gram) * conflict_averse(gram, self._c))


class Famo(Balancer):
    """Weights under which all losses fall at the same relative speed, learnt from the losses before and after a step:
    no gradients of single tasks, one more forward pass.

    Source: Liu et al.: FAMO: Fast adaptive multitask optimization, NeurIPS 2023, Algorithm 1, whose weights add up to
    1, here to the number of tasks.
    """

    looks_again = True
    logit_T: Tensor
    before_T: Tensor

    def __init__(self, num_tasks: int, regression_T: Sequence[bool], *, rate: float = 0.025, decay: float = 0.001):
        super().__init__()
        self._rate, self._decay = rate, decay
        self.register_buffer("logit_T", torch.zeros(num_tasks))
        self.register_buffer("before_T", torch.zeros(num_tasks, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def weigh(self, losses_T: Tensor, gram_TT: Tensor) -> Tensor:
        self.before_T = losses_T.double()
        share_T = self._share() / self.before_T.clamp(min=_LEAST)
        return ((losses_T > 0).sum() * share_T / share_T.sum().clamp(min=1e-300)).float()

    @torch.no_grad()
    def look(self, losses_T: Tensor) -> None:
        fell_T = self.before_T.clamp(min=_LEAST).log() - losses_T.double().clamp(min=_LEAST).log()
        share_T = self._share()
        slope_T = share_T * (fell_T - (share_T * fell_T).sum())  # of the softmax
        moved_T = self.logit_T - self._rate * (slope_T + self._decay * self.logit_T)
        self.logit_T = torch.where(self.before_T > 0, moved_T, self.logit_T).float()

    def _share(self) -> Tensor:
        """The softmax over the tasks that have rows, 0 for the others."""
        share_T = torch.softmax(self.logit_T.double(), 0) * (self.before_T > 0)
        return share_T / share_T.sum().clamp(min=1e-300)


BALANCERS: dict[str, type[Balancer]] = {
    "fixed": Fixed,
    "uncertainty": Uncertainty,
    "dwa": DynamicWeightAverage,
    "gradnorm": GradNorm,
    "mgda": Mgda,
    "pe_ltr": ParetoEfficient,
    "pcgrad": PcGrad,
    "cagrad": CaGrad,
    "famo": Famo,
}


def gram(sum_M: Tensor, shared: Sequence[Tensor]) -> Tensor:
    """The products of the gradients of some sums at what all of them read: float64 [M, M], over this worker's rows."""
    gradients = []
    for sum in sum_M:
        parts = torch.autograd.grad(sum, shared, retain_graph=True, allow_unused=True)
        known = [torch.zeros_like(at) if part is None else part for part, at in zip(parts, shared, strict=True)]
        gradients.append(torch.cat([part.flatten() for part in known]).double())
    gradient_MN = torch.stack(gradients)
    return gradient_MN @ gradient_MN.T


def _demand(condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"expected {expected}")


def _among_those_that_pull(gram_TT: Tensor, solve: Callable[[Floats, NDArray[np.int64]], Floats]) -> Tensor:
    """Weights of the tasks that have a gradient in this batch, 0 for the others: else a task without a row in it would
    be the shortest combination all by itself, and nothing would be learnt. solve: from their Gram matrix and numbers.
    """
    gram = gram_TT.detach().double().cpu().numpy()
    weights, tasks = np.zeros(len(gram)), np.flatnonzero(gram.diagonal() > 0)
    if tasks.size:
        gram = gram[np.ix_(tasks, tasks)]
        most = np.sqrt(np.outer(gram.diagonal(), gram.diagonal()))  # Cauchy-Schwarz, which rounding can break
        weights[tasks] = solve(gram.clip(-most, most), tasks)
    return torch.from_numpy(weights.clip(-_MOST, _MOST)).to(gram_TT.device, torch.float32)


def _scaled(solve: Callable[[Floats], Floats], gram: Floats, normalise: bool) -> Floats:
    """Convex weights of the gradients; solved for the gradients over their lengths if these are to be normalised."""
    length = np.sqrt(gram.diagonal()) if normalise else np.ones(len(gram))
    weights = solve(gram / np.outer(length, length)) / length
    shares: Floats = weights / weights.sum()
    return shares


def shortest(gram: Floats) -> Floats:
    """Convex weights of the shortest combination of points, from the points' products: [T]. Equal points weigh equally.

    Source: Wolfe: Finding the nearest point in a polytope, Mathematical Programming 11, 1976.
    """
    gram = _unit(gram) + 1e-11 * np.eye(len(gram))  # so that there is only one
    weights = np.eye(len(gram))[gram.diagonal().argmin()]
    for _ in range(10 * len(gram)):  # a few are enough; rounding could make it go round in circles
        slopes = gram @ weights
        nearest = slopes.argmin()
        if weights[nearest] > 0 or weights @ slopes - slopes[nearest] <= 1e-13:
            break
        corral = weights > 0
        corral[nearest] = True
        weights = _within(gram, weights, corral)
    return weights


def _within(gram: Floats, weights: Floats, corral: NDArray[np.bool_]) -> Floats:
    """Walk from the weights to the shortest affine combination of the corral; who would get a negative weight on the
    way leaves it.
    """
    while True:
        aim = np.zeros(len(gram))
        aim[corral] = _affine(gram[np.ix_(corral, corral)], np.zeros(corral.sum()), 1.0)
        leaving = corral & (aim <= 1e-14)
        if not leaving.any():
            return aim
        fall = weights[leaving] - aim[leaving]
        step = (weights[leaving][fall > 0] / fall[fall > 0]).min(initial=1.0)
        weights = weights + step * (aim - weights)
        corral &= ~(leaving & (weights <= 1e-14))
        weights = np.where(corral, weights, 0.0)
        weights /= weights.sum()


def _affine(gram: Floats, slopes: Floats, total: float) -> Floats:
    """The x that adds up to total and minimises x gram x / 2 - slopes x; if several do, the least of them."""
    size = len(gram)
    system = np.ones((size + 1, size + 1))
    system[:size, :size], system[size, size] = gram, 0.0
    solution: Floats = np.linalg.lstsq(system, np.append(slopes, total), rcond=1e-13)[0]
    return solution[:size]


def _unit(gram: Floats) -> Floats:
    """With the longest point of length 1: no solution depends on the scale, but its rounding does."""
    most = gram.diagonal().max()
    return gram / most if most > 0 else np.zeros_like(gram)


def pareto_weights(gram: Floats, at_least_T: Floats) -> Floats:
    """The weights, adding up to 1 and each at least its bound, of the shortest combination: [T]."""
    free = max(1 - at_least_T.sum(), 0.0)
    corners = free * np.eye(len(gram)) + at_least_T  # all that is free to one task
    return at_least_T + free * shortest(corners @ gram @ corners.T)


def pareto_weights_of_the_paper(gram: Floats, at_least_T: Floats) -> Floats:
    """The same by PE-LTR's Algorithm 2: solved without the bounds, then projected onto them."""
    gram, free = _unit(gram), max(1 - at_least_T.sum(), 0.0)
    return at_least_T + _on_simplex(_affine(gram, -gram @ at_least_T, free), free)


def _on_simplex(point: Floats, total: float) -> Floats:
    """The nearest point whose numbers are not negative and add up to total."""
    falling = np.sort(point)[::-1]
    excess = (falling.cumsum() - total) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[np.flatnonzero(falling >= excess)[-1]], 0.0)


def without_conflicts(gram: Floats, order: np.random.Generator) -> Floats:
    """PCGrad's direction, as weights of the tasks' gradients: [T]."""
    parts = np.eye(len(gram))
    for i, part in enumerate(parts):
        for j in order.permutation(len(gram)):
            along = part @ gram[j]
            if j != i and along < 0:
                part[j] -= along / gram[j, j]
    total: Floats = parts.sum(0)
    return total


def conflict_averse(gram: Floats, c: float, rounds: int = 50) -> Floats:
    """CAGrad's direction, as weights of the tasks' gradients: [T].

    Convex weights w minimise <g_w, g_0> + c |g_0| |g_w|; the direction is g_0 + c |g_0| / |g_w| g_w. Since |g_w| is the
    minimum over t of |g_w|^2 / 2 t + t / 2, w is a nearest point for a t and t is |g_w|, in turns. From a t that is too
    long, each turn's g_0 + c |g_0| / t g_w lies in the ball and is at least as good as g_0 for the task worst off. t
    ends at a hundredth of |g_0|: where the gradients cancel, weights would grow without bound.
    """
    gram, size = _unit(gram), len(gram)
    mean = np.full(size, 1 / size)
    radius, least = c * _length(gram, mean), 0.01 * _length(gram, mean)
    if radius == 0:
        return mean
    t = 1.0
    for _ in range(rounds):
        corners = np.eye(size) + t / radius * mean
        weights = shortest(corners @ gram @ corners.T)
        length = max(_length(gram, weights), least)
        if length >= t * (1 - 1e-6):
            break
        t = length
    return mean + radius / t * weights


def _length(gram: Floats, weights: Floats) -> float:
    return math.sqrt(max(float(weights @ gram @ weights), 0.0))
