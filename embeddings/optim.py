"""Row optimizers: from the summed gradients of one step's distinct rows to what to subtract from them.

Only rows that were seen come here: absent rows are never touched, so nothing may depend on how many steps a row was
away. A row's state starts at zero and stands beside its weights, also in the checkpoint, in columns matched by name:
a name means one shape in every optimizer.

Shape letters: U distinct rows, D floats a row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softshrink


class RowOptimizer(Protocol):
    """How rows learn from their gradients. states: each state's name, True when it has one number an element [U, D],
    False when one a row [U]. reads_weight: step needs the rows' weights.
    """

    states: ClassVar[dict[str, bool]]
    reads_weight: ClassVar[bool]

    def step(
        self, grad_UD: Tensor, state: Mapping[str, Tensor], weight_UD: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What to subtract from the rows, [U, D], and their new states; the arguments keep their values."""
        ...


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent: step = lr * g."""

    lr: float = 0.05
    states: ClassVar[dict[str, bool]] = {}
    reads_weight: ClassVar[bool] = False

    def step(
        self, grad_UD: Tensor, state: Mapping[str, Tensor], weight_UD: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.lr * grad_UD, {}


@dataclass(frozen=True)
class Adagrad:
    """Adagrad with one accumulator an element: s += g^2; step = lr * g / (sqrt(s) + eps).

    Source: Duchi, Hazan, Singer: Adaptive subgradient methods, JMLR 2011, the diagonal version; FBGEMM's EXACT_ADAGRAD.
    """

    lr: float = 0.05
    eps: float = 1e-8
    states: ClassVar[dict[str, bool]] = {"adagrad_sums": True}
    reads_weight: ClassVar[bool] = False

    def step(
        self, grad_UD: Tensor, state: Mapping[str, Tensor], weight_UD: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sums_UD = torch.addcmul(state["adagrad_sums"], grad_UD, grad_UD)
        return (self.lr * grad_UD).div_(sums_UD.sqrt().add_(self.eps)), {"adagrad_sums": sums_UD}


@dataclass(frozen=True)
class RowwiseAdagrad:
    """Adagrad with one accumulator a row: s += mean(g^2); step = lr * g / (sqrt(s) + eps).

    Source: Gupta, Bengio, Weston: Training highly multiclass classifiers, JMLR 2014, section 3.1; FBGEMM's
    EXACT_ROWWISE_ADAGRAD.
    """

    lr: float = 0.05
    eps: float = 1e-8
    states: ClassVar[dict[str, bool]] = {"adagrad_sum": False}
    reads_weight: ClassVar[bool] = False

    def step(
        self, grad_UD: Tensor, state: Mapping[str, Tensor], weight_UD: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sum_U = state["adagrad_sum"] + grad_UD.square().mean(dim=1)
        return grad_UD * (self.lr / (sum_U.sqrt() + self.eps)).unsqueeze(1), {"adagrad_sum": sum_U}


@dataclass(frozen=True)
class Adam:
    """Adam whose moments move, and whose bias is corrected, by each row's own count of updates n:
    m += (1 - beta1) (g - m); v += (1 - beta2) (g^2 - v);
    step = lr * m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps).

    A row first seen on day 30 makes a first step of size lr, as on day 1, and absent rows need no bookkeeping. Lazy
    Adam corrects by the global step: late rows' empty moments then pass for averages of many steps, and their first
    step is (1 - beta1) / sqrt(1 - beta2) = 3.2 times lr.
    Source: Kingma, Ba: Adam, ICLR 2015, Algorithm 1; FBGEMM's ADAM, which counts global steps.
    """

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    states: ClassVar[dict[str, bool]] = {"adam_m": True, "adam_v": True, "adam_steps": False}
    reads_weight: ClassVar[bool] = False

    def step(
        self, grad_UD: Tensor, state: Mapping[str, Tensor], weight_UD: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps_U = state["adam_steps"] + 1
        m_UD = state["adam_m"].lerp(grad_UD, 1 - self.beta1)
        v_UD = state["adam_v"].lerp(grad_UD.square(), 1 - self.beta2)
        root_UD = (v_UD / _bias_correction(self.beta2, steps_U).unsqueeze(1)).sqrt_().add_(self.eps)
        step_UD = (m_UD * (self.lr / _bias_correction(self.beta1, steps_U)).unsqueeze(1)).div_(root_UD)
        return step_UD, {"adam_m": m_UD, "adam_v": v_UD, "adam_steps": steps_U}


@dataclass(frozen=True)
class RowwiseAdam:
    """Adam whose second moment is one number a row, v += (1 - beta2) (mean(g^2) - v): nearly half the state.

    Source: FBGEMM's PARTIAL_ROWWISE_ADAM, which counts global steps; each row counts its own here, as in Adam above.
    """

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    states: ClassVar[dict[str, bool]] = {"adam_m": True, "adam_row_v": False, "adam_steps": False}
    reads_weight: ClassVar[bool] = False

    def step(
        self, grad_UD: Tensor, state: Mapping[str, Tensor], weight_UD: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps_U = state["adam_steps"] + 1
        m_UD = state["adam_m"].lerp(grad_UD, 1 - self.beta1)
        v_U = state["adam_row_v"].lerp(grad_UD.square().mean(dim=1), 1 - self.beta2)
        root_U = (v_U / _bias_correction(self.beta2, steps_U)).sqrt() + self.eps
        step_UD = m_UD * (self.lr / _bias_correction(self.beta1, steps_U) / root_U).unsqueeze(1)
        return step_UD, {"adam_m": m_UD, "adam_row_v": v_U, "adam_steps": steps_U}


@dataclass(frozen=True)
class Ftrl:
    """FTRL-Proximal: the weight that minimises, over all gradients g_s and weights w_s of the past,
    sum(g_s) w + sum(sigma_s (w - w_s)^2) / 2 + l1 |w| + l2 w^2 / 2, where the sigma_s add up to 1 / rate, and
    rate = lr / (beta + sqrt(n)), n += g^2. In closed form, z += g - sigma w_s and then
    w = -sign(z) max(|z| - l1, 0) / (1 / rate + l2): exactly zero while |z| <= l1.

    Without l1 and l2 it is Adagrad with eps = beta. A weight may start anywhere: 1 / rate counts as zero before the
    first gradient, so the first sigma is all of 1 / rate and pulls to the first weight; only l1 and l2 pull to zero.
    (Algorithm 1 leaves beta out of the first sigma, the same where weights start at zero; elsewhere a beta larger
    than the gradients would wipe out the first weights, and with them what was learnt under another optimizer.)
    Elements without a gradient so far keep their weight.
    Source: McMahan et al.: Ad click prediction: a view from the trenches, KDD 2013, section 3 and Algorithm 1 (lr is
    alpha there, l1 and l2 the lambdas).
    """

    lr: float = 0.1
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    states: ClassVar[dict[str, bool]] = {"ftrl_z": True, "ftrl_n": True}
    reads_weight: ClassVar[bool] = True

    def step(
        self, grad_UD: Tensor, state: Mapping[str, Tensor], weight_UD: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert weight_UD is not None, "FTRL's step depends on the weights"
        n_UD = torch.addcmul(state["ftrl_n"], grad_UD, grad_UD)
        pull_UD = self._inverse_rate(n_UD)
        sigma_UD = pull_UD - self._inverse_rate(state["ftrl_n"])
        z_UD = torch.addcmul(state["ftrl_z"], sigma_UD, weight_UD, value=-1).add_(grad_UD)
        step_UD = softshrink(z_UD, self.l1).div_(pull_UD.add_(self.l2)).add_(weight_UD)  # old weight - new weight
        return torch.where(n_UD == 0, 0.0, step_UD), {"ftrl_z": z_UD, "ftrl_n": n_UD}

    def _inverse_rate(self, n_UD: Tensor) -> Tensor:
        """1 / rate, zero where n is."""
        return n_UD.sqrt().add_(n_UD.sign(), alpha=self.beta).div_(self.lr)


OPTIMIZERS: dict[str, type] = {
    "sgd": Sgd,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowwiseAdagrad,
    "adam": Adam,
    "rowwise_adam": RowwiseAdam,
    "ftrl": Ftrl,
}


def _bias_correction(beta: float, steps_U: Tensor) -> Tensor:
    """1 - beta^steps, through expm1: float32 would lose five digits of 1 - 0.999^1."""
    return -torch.expm1(steps_U * (math.log(beta) if beta else -math.inf))
