"""Row optimizers: from the gradients of the rows of one step to the step to subtract.

Only rows that were seen come here; absent rows are never touched. Shape letters: U distinct rows, D floats a row.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowwiseAdagrad:
    """Adagrad with one accumulator a row: s += mean(g^2); step = lr * g / (sqrt(s) + eps).

    Source: Gupta, Bengio, Weston: Training highly multiclass classifiers, JMLR 2014, section 3.1; FBGEMM's
    EXACT_ROWWISE_ADAGRAD.
    """

    lr: float = 0.05
    eps: float = 1e-8
    state_name = "adagrad_sum"

    def step(self, state_U: Tensor, grad_UD: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' new state and the step to subtract from them."""
        state_U = state_U + grad_UD.square().mean(dim=1)
        return state_U, grad_UD * (self.lr / (state_U.sqrt() + self.eps)).unsqueeze(1)
