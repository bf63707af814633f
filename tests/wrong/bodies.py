"""Wrong bodies."""

# mypy: disable-error-code="method-assign,assignment,misc"

from typing import Any

from wrong.mutant import Mutant, in_file

# What is replaced is imported inside: nothing of ours may be imported before a mutant is applied.


def experts_start_constant() -> None:
    """All weights of the experts start alike: they stay alike, and each expert's matrix stays of rank one."""
    import torch

    from trainer.bodies import LayeredExperts

    start = LayeredExperts.__init__

    def constant(self: LayeredExperts, *args: Any, **settings: Any) -> None:
        start(self, *args, **settings)
        with torch.no_grad():
            self.entry.weight[:, : self.entry.bias.numel()] = 0.1
            self.entry.bias.zero_()
            for parameter in self.experts.parameters():
                parameter.fill_(0.1)

    LayeredExperts.__init__ = constant


def batch_norm_in_the_gate() -> None:
    """A gate depends on the other rows of the batch, and on whether it trains or scores."""
    import torch

    from trainer.bodies import LayeredExperts

    gate = LayeredExperts._gate

    def normalised(self: LayeredExperts, number: int, logits_GBE: Any, draws: Any) -> Any:
        if draws is not None and logits_GBE.shape[1] > 1:
            wide = logits_GBE.movedim(1, 0).flatten(1)
            wide = torch.nn.functional.batch_norm(wide, None, None, training=True)
            logits_GBE = wide.unflatten(1, self.get_buffer(f"unseen_{number}").shape).movedim(0, 1)
        return gate(self, number, logits_GBE, draws)

    LayeredExperts._gate = normalised


def squeeze_of_a_single_row() -> None:
    """A squeeze meets a batch of one row, and takes the batch for the dimension to drop."""
    from trainer import bodies

    def squeezed(gate_BGE: Any, unit_EBH: Any) -> Any:
        mixed_GBH = (gate_BGE.to(unit_EBH.dtype) @ unit_EBH.transpose(0, 1)).transpose(0, 1).squeeze()
        return mixed_GBH if mixed_GBH.dim() > 2 else mixed_GBH.unsqueeze(0)

    bodies._mixed = squeezed


def a_gate_with_a_bias() -> None:
    """Gates are affine, where the paper's are linear."""
    from trainer.layers import Entry

    start = Entry.__init__

    def biased(self: Entry, input_dim: int, *stacks: Any, unbiased: int = 0) -> None:
        start(self, input_dim, *stacks)

    Entry.__init__ = biased


def thresholds_after_the_softmax() -> None:
    """The load is estimated with shares where logits belong: it adds up to 1.86 times the rows."""
    from trainer.bodies import SparseExperts

    chance = SparseExperts._chance

    def after_softmax(self: SparseExperts, clean_BGE: Any, spread_BGE: Any, kept_BGE: Any, falling_BGE: Any) -> Any:
        return chance(self, clean_BGE, spread_BGE, kept_BGE, falling_BGE.softmax(-1))

    SparseExperts._chance = after_softmax


def load_is_a_count() -> None:
    """Experts are balanced by a number of rows, which has no derivative: nothing is learnt from it."""
    from trainer.bodies import SparseExperts

    SparseExperts._chance = lambda self, clean, spread, kept_BGE, falling: kept_BGE.float()


def variance_of_a_sample() -> None:
    """The penalty has the variance of a sample, where the paper has that of the population."""
    from trainer import bodies

    bodies._variation = lambda x_GE: x_GE.var(-1) / x_GE.mean(-1).square().clamp(min=1e-10)


def noise_in_scoring() -> None:
    """Gates are noisy when rows are scored: the same row gets another score each time."""
    import torch

    from trainer.bodies import SparseExperts
    from trainer.draws import Draws

    forward = SparseExperts.forward

    def noisy(self: SparseExperts, entry_BO: Any, draws: Draws | None) -> Any:
        return forward(self, entry_BO, draws or Draws(torch.arange(len(entry_BO)), 0, 1))

    SparseExperts.forward = noisy


def every_expert_computes_every_row() -> None:
    """The sparse mixture saves nothing."""
    import torch

    from trainer.bodies import SparseExperts

    def dense(self: SparseExperts, x_BI: Any, gate_BGE: Any) -> Any:
        out_EBH = self.experts(x_BI.unsqueeze(0))
        return torch.einsum("bge,ebh->gbh", gate_BGE, out_EBH).expand(self.num_tasks, -1, -1)

    SparseExperts._mix = dense


def gate_dropout_not_renormalised() -> None:
    """A row without an expert gets less of everything."""
    import math

    from trainer.bodies import LayeredExperts

    def dropped(self: LayeredExperts, number: int, logits_GBE: Any, draws: Any) -> Any:
        unseen_GE = self.get_buffer(f"unseen_{number}")
        shares_BGE = logits_GBE.transpose(0, 1).float().masked_fill(unseen_GE, -math.inf).softmax(-1)
        if draws is None or self.gate_dropout == 0:
            return shares_BGE
        uniform = draws.uniform(f"gates of level {number + 1}", unseen_GE.numel()).view_as(shares_BGE)
        return shares_BGE * (uniform >= self.gate_dropout)

    LayeredExperts._gate = dropped


def gate_dropout_without_fallback() -> None:
    """A row that lost all of its experts is NaN."""
    import math

    from trainer.bodies import LayeredExperts

    def dropped(self: LayeredExperts, number: int, logits_GBE: Any, draws: Any) -> Any:
        unseen_GE = self.get_buffer(f"unseen_{number}")
        logits_BGE = logits_GBE.transpose(0, 1).float().masked_fill(unseen_GE, -math.inf)
        if draws is None or self.gate_dropout == 0:
            return logits_BGE.softmax(-1)
        uniform = draws.uniform(f"gates of level {number + 1}", unseen_GE.numel()).view_as(logits_BGE)
        return logits_BGE.masked_fill(uniform < self.gate_dropout, -math.inf).softmax(-1)

    LayeredExperts._gate = dropped


def ple_gates_see_all_experts() -> None:
    """A task's gate mixes the own experts of the others too: PLE is MMoE."""
    from trainer.bodies import ProgressiveExtraction

    start = ProgressiveExtraction.__init__

    def seeing_all(self: ProgressiveExtraction, *args: Any, **settings: Any) -> None:
        start(self, *args, **settings)
        for buffer in self.buffers():
            buffer.zero_()

    ProgressiveExtraction.__init__ = seeing_all


def soft_sharing_by_worker() -> None:
    """Each worker adds the penalty once more: the number of workers is a setting."""
    from trainer.bodies import SoftSharing

    SoftSharing.penalty = lambda self, moments_M: self._strength * moments_M[0]


def soft_sharing_of_neighbours() -> None:
    """Tasks are drawn to the next one only, where every pair counts."""
    from trainer import bodies

    bodies.combinations = lambda tasks, two: [(a, a + 1) for a in list(tasks)[:-1]]


FILE = "trainer/test_bodies.py"
MUTANTS = [
    Mutant(
        experts_start_constant, in_file(FILE, "test_the_weights_of_every_expert_are_of_full_rank"), "PaddleRec (#721)"
    ),
    Mutant(
        batch_norm_in_the_gate,
        in_file(
            FILE,
            "test_a_row_does_not_depend_on_the_rows_beside_it",
            "test_without_dropout_a_gate_is_the_same_in_training_and_scoring",
        ),
        "torch-rechub",
    ),
    Mutant(squeeze_of_a_single_row, in_file(FILE, "test_a_row_does_not_depend_on_the_rows_beside_it"), "DeepCTR-Torch"),
    Mutant(a_gate_with_a_bias, in_file(FILE, "test_mmoe_equals_a_plain_loop_over_tasks_and_experts")),
    Mutant(
        thresholds_after_the_softmax,
        in_file(
            FILE,
            "test_estimated_loads_sum_to_the_experts_that_are_kept",
            "test_the_estimated_load_is_the_chance_to_be_kept_under_fresh_noise",
        ),
        "davidmrau/mixture-of-experts",
    ),
    Mutant(load_is_a_count, in_file(FILE, "test_the_load_can_be_learnt_where_a_number_of_rows_cannot")),
    Mutant(variance_of_a_sample, in_file(FILE, "test_the_penalty_is_the_squared_variation_of_importance_and_load")),
    Mutant(noise_in_scoring, in_file(FILE, "test_a_scored_row_meets_no_noise")),
    Mutant(every_expert_computes_every_row, in_file(FILE, "test_an_expert_computes_only_the_rows_that_keep_it")),
    Mutant(
        gate_dropout_not_renormalised,
        in_file(FILE, "test_gate_dropout_renormalises_over_the_experts_that_are_left"),
    ),
    Mutant(gate_dropout_without_fallback, in_file(FILE, "test_a_row_that_lost_all_experts_keeps_all")),
    Mutant(
        ple_gates_see_all_experts, in_file(FILE, "test_a_task_of_ple_hears_nothing_from_the_own_experts_of_another")
    ),
    Mutant(soft_sharing_by_worker, in_file(FILE, "test_soft_sharing_pulls_each_network_to_the_others")),
    Mutant(
        soft_sharing_of_neighbours,
        in_file(FILE, "test_the_penalty_of_soft_sharing_is_the_squared_distance_of_every_pair"),
    ),
]
