"""Wrong balancers."""

from typing import Any

from wrong.mutant import Mutant, in_file

# What is replaced is imported inside: nothing of ours may be imported before a mutant is applied.
# mypy: disable-error-code="method-assign,assignment"


def uncertainty_clamped() -> None:
    """log sigma^2 is never below 0: a loss below one half keeps its weight for ever."""
    from trainer.balance import Uncertainty

    weigh = Uncertainty.weigh

    def clamped(self: Uncertainty, losses_T: Any, gram_TT: Any) -> Any:
        weights_T = weigh(self, losses_T, gram_TT)
        self.s_T = self.s_T.clamp(min=0)
        return weights_T

    Uncertainty.weigh = clamped


def uncertainty_all_regressions() -> None:
    """Every task is weighed as if it had squared error."""
    from trainer.balance import Uncertainty

    start = Uncertainty.__init__

    def regressions(self: Uncertainty, num_tasks: int, regression_T: Any, **settings: Any) -> None:
        start(self, num_tasks, [True] * num_tasks, **settings)

    Uncertainty.__init__ = regressions


def weights_keep_their_graph() -> None:
    """The backward pass goes through the weights, and memory grows from step to step."""
    from trainer.balance import Uncertainty

    Uncertainty.weigh = Uncertainty.weigh.__wrapped__  # type: ignore[attr-defined]


def dwa_by_epoch() -> None:
    """Weights change from the second epoch on, and a day has only one."""
    from trainer.balance import DynamicWeightAverage

    DynamicWeightAverage._close_window = lambda self: None


def gradnorm_without_rates() -> None:
    """How fast a task trains is left out of the aim."""
    import torch

    from trainer.balance import GradNorm

    step = GradNorm._step

    def rateless(self: GradNorm, known_T: Any, slowness_K: Any, length_K: Any) -> None:
        step(self, known_T, torch.ones_like(slowness_K), length_K)

    GradNorm._step = rateless


def gradnorm_of_squares() -> None:
    """The Gram matrix's diagonal is taken for the gradients' lengths: it is their squares."""
    from trainer.balance import GradNorm

    weigh = GradNorm.weigh
    GradNorm.weigh = lambda self, losses_T, gram_TT: weigh(self, losses_T, gram_TT.square())


def mgda_applied_to_raw_gradients() -> None:
    """Weights are solved for gradients of length 1, and put on the raw ones."""
    import numpy as np

    from trainer import balance

    def raw(solve: Any, gram: Any, normalise: bool) -> Any:
        length = np.sqrt(gram.diagonal()) if normalise else np.ones(len(gram))
        return solve(gram / np.outer(length, length))

    balance._scaled = raw


def a_task_without_rows_is_the_shortest() -> None:
    """A gradient of zero is a convex combination too: it takes all the weight, and nothing is learnt."""
    import numpy as np
    import torch

    from trainer import balance

    def all_of_them(gram_TT: Any, solve: Any) -> Any:
        gram = gram_TT.double().numpy()
        return torch.from_numpy(solve(gram, np.arange(len(gram)))).float()

    balance._among_those_that_pull = all_of_them


def pe_ltr_two_steps_taken_for_exact() -> None:
    """The paper's relaxation and projection, which for three tasks and more is not the shortest direction."""
    from trainer import balance

    balance.pareto_weights = balance.pareto_weights_of_the_paper


def pe_ltr_misprinted_sum() -> None:
    """What is added to the bounds adds up to 1 and not to what they leave, as Problem 4 is printed."""
    from trainer import balance

    project = balance._on_simplex
    balance._on_simplex = lambda point, total: project(point, 1.0)


def pe_ltr_by_inverse() -> None:
    """inv(M'M) M'z: 1e16 times rounding where gradients are collinear."""
    import numpy as np

    from trainer import balance

    def inverse(gram: Any, slopes: Any, total: float) -> Any:
        system = np.ones((len(gram) + 1, len(gram) + 1))
        system[:-1, :-1], system[-1, -1] = gram, 0.0
        return (np.linalg.inv(system.T @ system) @ system.T @ np.append(slopes, total))[:-1]

    balance._affine = inverse


def pcgrad_in_task_order() -> None:
    """The other tasks are never shuffled."""
    import numpy as np

    from trainer import balance

    class InOrder:
        def permutation(self, n: int) -> Any:
            return np.arange(n)

    surgery = balance.without_conflicts
    balance.without_conflicts = lambda gram, order: surgery(gram, InOrder())  # type: ignore[arg-type]


def pcgrad_against_projected_others() -> None:
    """Conflicts are looked for with gradients that were projected before."""
    import numpy as np

    from trainer import balance

    def projected(gram: Any, order: Any) -> Any:
        parts = np.eye(len(gram))
        for i in range(len(gram)):
            for j in order.permutation(len(gram)):
                along = parts[i] @ gram @ parts[j]
                if j != i and along < 0:
                    parts[i] -= along / (parts[j] @ gram @ parts[j]) * parts[j]
        return parts.sum(0)

    balance.without_conflicts = projected


def pcgrad_order_by_worker() -> None:
    """Each worker shuffles for itself, and their weights drift apart."""
    import numpy as np

    from trainer import balance

    surgery = balance.without_conflicts
    balance.without_conflicts = lambda gram, order: surgery(gram, np.random.default_rng())


def cagrad_ball_without_the_mean() -> None:
    """The ball's radius is c, and not c times the mean gradient's length."""
    import numpy as np

    from trainer import balance

    averse = balance.conflict_averse

    def by_c(gram: Any, c: float) -> Any:
        mean = np.full(len(gram), 1 / len(gram))
        return averse(gram, c / np.sqrt(mean @ gram @ mean))

    balance.conflict_averse = by_c


def famo_looks_backwards() -> None:
    """Losses before and after the step are swapped: the fastest task gains."""
    from trainer.balance import Famo

    look = Famo.look

    def swapped(self: Famo, losses_T: Any) -> None:
        before_T = self.before_T
        self.before_T = losses_T.double()
        look(self, before_T)

    Famo.look = swapped


def famo_weighs_tasks_without_rows() -> None:
    """1 / 1e-8: a task without a row takes all the weight."""
    import torch

    from trainer.balance import Famo

    Famo._share = lambda self: torch.softmax(self.logit_T.double(), 0)


def state_outside_the_checkpoint() -> None:
    """A counter that is no buffer: a resumed run draws other orders."""
    from trainer.balance import PcGrad

    start = PcGrad.__init__

    def forgetful(self: PcGrad, *arguments: Any, **settings: Any) -> None:
        start(self, *arguments, **settings)
        del self._buffers["steps"]
        self.steps = 0

    PcGrad.__init__ = forgetful


FILE = "trainer/test_balance.py"
MUTANTS = [
    Mutant(uncertainty_clamped, in_file(FILE, "test_a_loss_below_one_half_gains_weight_too"), "torch-rechub"),
    Mutant(
        uncertainty_all_regressions,
        in_file(FILE, "test_uncertainty_at_rest_is_the_closed_form_for_regressions_and_events"),
        "LibMTL",
    ),
    Mutant(weights_keep_their_graph, in_file(FILE, "test_no_gradient_goes_through_weights_or_state")),
    Mutant(dwa_by_epoch, in_file(FILE, "test_dwa_is_equation_7_over_windows_of_steps"), "LibMTL"),
    Mutant(
        gradnorm_without_rates,
        in_file(FILE, "test_gradnorm_gives_a_slower_task_a_longer_gradient_by_the_power_of_its_rate"),
        "torch-rechub",
    ),
    Mutant(gradnorm_of_squares, in_file(FILE, "test_gradnorm_makes_gradients_of_very_different_tasks_equally_long")),
    Mutant(
        mgda_applied_to_raw_gradients,
        in_file(FILE, "test_mgdas_direction_lowers_every_loss_and_does_not_depend_on_units"),
        "LibMTL",
    ),
    Mutant(a_task_without_rows_is_the_shortest, in_file(FILE, "test_a_task_that_never_has_rows_does_not_matter")),
    Mutant(
        pe_ltr_two_steps_taken_for_exact,
        in_file(
            FILE,
            "test_pe_ltr_exact_is_right_where_the_papers_two_steps_are_not",
            "test_pe_ltr_exact_never_raises_a_loss_where_the_papers_solver_does",
        ),
        "the paper",
    ),
    Mutant(
        pe_ltr_misprinted_sum, in_file(FILE, "test_pe_ltr_of_two_tasks_is_the_clip_formula"), "the paper's Problem 4"
    ),
    Mutant(
        pe_ltr_by_inverse,
        in_file(FILE, "test_pe_ltr_has_finite_weights_for_singular_gradients"),
        "every public copy of PE-LTR",
        crash="LinAlgError",
    ),
    Mutant(pcgrad_in_task_order, in_file(FILE, "test_pcgrad_draws_another_order_every_step")),
    Mutant(pcgrad_against_projected_others, in_file(FILE, "test_pcgrad_of_two_tasks_is_the_closed_form")),
    Mutant(pcgrad_order_by_worker, in_file(FILE, "test_weights_follow_from_losses_and_gram_alone")),
    Mutant(cagrad_ball_without_the_mean, in_file(FILE, "test_cagrad_is_what_scipy_finds_on_the_gradients")),
    Mutant(famo_looks_backwards, in_file(FILE, "test_famo_turns_to_the_task_that_falls_most_slowly")),
    Mutant(famo_weighs_tasks_without_rows, in_file(FILE, "test_a_task_that_never_has_rows_does_not_matter")),
    Mutant(state_outside_the_checkpoint, in_file(FILE, "test_a_state_that_was_saved_goes_on_with_the_same_weights")),
]
