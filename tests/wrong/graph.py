"""Wrong probability graphs, losses and objectives."""

# mypy: disable-error-code="method-assign,assignment"

from typing import Any

from wrong.mutant import Mutant, in_file

# What is replaced is imported inside: nothing of ours may be imported before a mutant is applied.


def logits_multiplied() -> None:
    """p(click and buy) is the sigmoid of a product of logits, and not a product of probabilities."""
    from trainer.heads import Event

    Event.then = lambda self, conditional: Event.of(self.logit_B * conditional.logit_B)


def product_of_plain_probabilities() -> None:
    """The product is taken in float32 and then its logarithm: the surprise of a rare conversion is rounded away."""
    from trainer.heads import Event

    def then(self: Event, conditional: Event) -> Event:
        p_B = self.log_p_B.exp() * conditional.log_p_B.exp()
        return Event(p_B.log(), (1 - p_B).log())

    Event.then = then


def esmm_on_clicked_rows_only() -> None:
    """A conversion given a click is learnt from clicked rows: the sample selection that ESMM is to avoid."""
    import torch

    from trainer.heads import TaskGraph

    target = TaskGraph._target

    def clicked(self: TaskGraph, name: str, labels_BT: Any) -> Any:
        target_B = target(self, name, labels_BT)
        unclicked_B = self.happened(name, labels_BT) == 0
        return torch.where(unclicked_B, torch.nan, target_B) if self.tasks[name].given else target_B

    TaskGraph._target = clicked


def conversions_measured_on_every_impression() -> None:
    """The answers to p(buy | click) are not cut down to the clicked rows: another metric under the same name."""
    import torch

    from trainer.heads import TaskGraph

    answers = TaskGraph.answers

    def everywhere(self: TaskGraph, labels_BT: Any) -> Any:
        found, targets_BT = answers(self, labels_BT), self.targets(labels_BT)
        tasks = list(self.tasks)
        return {
            address: torch.where(of_B.isnan(), targets_BT[:, tasks.index(address.split("@")[0])], of_B)
            for address, of_B in found.items()
        }

    TaskGraph.answers = everywhere


def esm2_carts_without_a_click() -> None:
    """The label of the action after the click is not masked by the click."""
    from trainer.heads import TaskGraph

    target = TaskGraph._target

    def unmasked(self: TaskGraph, name: str, labels_BT: Any) -> Any:
        return labels_BT[:, self._column[name]] if name == "cart" else target(self, name, labels_BT)

    TaskGraph._target = unmasked


def down_sampling_not_taken_back() -> None:
    """Predictions of a log that lost most of its negatives, or of weighted positives, are used as they come."""
    from trainer.heads import Task

    Task.shift = 0.0


def down_sampling_taken_back_in_the_click_alone() -> None:
    """What is given the click is learnt as if all rows without a click were still in the log."""
    from dataclasses import replace

    from trainer.objective import Objective

    weigh = Objective._weight

    def as_if_all_were_there(self: Objective, t: int, name: str, known_B: Any) -> Any:
        graph, tasks = self._graph, self._graph.tasks
        graph.tasks = {n: replace(task, negatives_kept=1.0) if n != name else task for n, task in tasks.items()}
        try:
            return weigh(self, t, name, known_B)
        finally:
            graph.tasks = tasks

    Objective._weight = as_if_all_were_there


def propensity_learns_from_the_loss_it_weighs() -> None:
    """The gradient is not stopped at the click's probability: the click head learns to make conversions cheap."""
    from trainer.heads import Event, Nodes
    from trainer.objective import Objective

    debiased = Objective._debiased

    class Undetached:
        """A log-probability that does not let go of its graph."""

        def __init__(self, log_p_B: Any):
            self._log_p_B = log_p_B

        def detach(self) -> Any:
            return self._log_p_B

    def learning(self: Objective, *arguments: Any) -> Any:
        nodes = self._nodes
        whole = {name: Event(Undetached(e.log_p_B), e.log_not_B) for name, e in nodes.whole.items()}  # type: ignore
        self._nodes = Nodes(nodes.logits, nodes.conditional, whole)
        try:
            return list(debiased(self, *arguments))
        finally:
            self._nodes = nodes

    Objective._debiased = learning


def propensities_never_clipped() -> None:
    """One over a probability without a bound: a single unlikely click outweighs the day."""
    from dataclasses import replace

    from trainer.objective import Objective

    debiased = Objective._debiased

    def unbound(self: Objective, t: int, name: str, task: Any, *rest: Any) -> Any:
        return debiased(self, t, name, replace(task, propensity=replace(task.propensity, least=0.0)), *rest)

    Objective._debiased = unbound


def propensities_over_the_number_of_rows() -> None:
    """Rows over their propensities are divided by their number: a few unlikely clicks set the size of the loss."""
    from trainer.objective import Objective

    debiased = Objective._debiased

    def by_rows(self: Objective, t: int, name: str, task: Any, weight_B: Any, target_B: Any) -> Any:
        terms = debiased(self, t, name, task, weight_B, target_B)
        return [term._replace(weight=weight_B.sum()) for term in terms]

    Objective._debiased = by_rows


def sample_weights_ignored() -> None:
    """A configured weight of rows never reaches the loss."""
    import torch

    from trainer.objective import Objective

    start = Objective.__init__

    def unweighted(self: Objective, graph: Any, nodes: Any, labels_BT: Any, weights_BT: Any, *rest: Any) -> None:
        start(self, graph, nodes, labels_BT, torch.ones_like(weights_BT), *rest)

    Objective.__init__ = unweighted


def each_worker_divides_by_its_own_sums() -> None:
    """A masked loss is a mean over the worker's own rows: with few clicks a worker, the gradient is too small."""
    import torch

    from trainer import objective

    shares = objective.shares_of_losses
    objective.shares_of_losses = lambda terms, weight_M: shares(terms, torch.stack([term.weight for term in terms]))


def weights_that_average_one_on_each_worker() -> None:
    """loss_weight / mean(loss_weight), with the mean of the worker's own rows."""
    from trainer import objective

    term = objective._term

    def normalised(t: int, loss_B: Any, weight_B: Any, factor: float = 1.0) -> Any:
        return term(t, loss_B, weight_B / weight_B.mean().clamp(min=1e-12), factor)

    objective._term = normalised


def null_labels_count_as_negatives() -> None:
    """A conversion that is not known yet is learnt as one that did not happen."""
    from trainer.heads import TaskGraph

    targets = TaskGraph.targets
    TaskGraph.targets = lambda self, labels_BT: targets(self, labels_BT.nan_to_num(0.0))


def looking_added_to_the_logit() -> None:
    """PAL's chance that a row is looked at is added to the logit, and not multiplied into the probability."""
    from trainer.heads import Event

    Event.then = lambda self, conditional: Event.of(self.logit_B + conditional.logit_B)


def bpr_of_plain_sigmoids() -> None:
    """-log(sigmoid(d)) is infinite where d is below -104 in float32."""
    import torch

    from trainer.losses import Pairwise

    def forward(self: Pairwise, logits_BL: Any, target_B: Any) -> Any:
        above_GSS = target_B.unsqueeze(2) > target_B.unsqueeze(1)
        surprise_GSS = -torch.sigmoid(logits_BL.unsqueeze(2) - logits_BL.unsqueeze(1)).log()
        return (surprise_GSS * above_GSS).sum((1, 2)) / above_GSS.sum((1, 2)).clamp(min=1)

    Pairwise.forward = forward


def bpr_by_the_number_of_pairs() -> None:
    """Pairs are added up: an active user's long list outweighs all others."""
    from trainer.losses import Pairwise

    forward = Pairwise.forward

    def summed(self: Pairwise, logits_BL: Any, target_B: Any) -> Any:
        pairs_G = (target_B.unsqueeze(2) > target_B.unsqueeze(1)).sum((1, 2))
        return forward(self, logits_BL, target_B) * pairs_G

    Pairwise.forward = summed


def listmle_takes_padding_for_rows() -> None:
    """What stands behind a list's end counts as rows with label 0."""
    from trainer.losses import ListMle

    forward = ListMle.forward
    ListMle.forward = lambda self, logits_BL, target_B: forward(self, logits_BL, target_B.nan_to_num(0.0))


def listmle_breaks_ties_by_the_order_of_rows() -> None:
    """Rows are sorted by label: of equal ones the first is taken for the better."""
    import torch

    from trainer.losses import ListMle

    def forward(self: ListMle, logits_BL: Any, target_B: Any) -> Any:
        order_GS = target_B.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
        scores_GS = logits_BL.masked_fill(target_B.isnan(), -1e9).gather(1, order_GS)
        left_GS = scores_GS.flip(1).logcumsumexp(1).flip(1)
        there_GS = scores_GS > -1e8
        return ((left_GS - scores_GS) * there_GS).sum(1) / (there_GS.sum(1) - 1).clamp(min=1)

    ListMle.forward = forward


def cread_sums_chances_without_widths() -> None:
    """Every threshold counts as one second, however far it lies from the one below."""
    import torch

    from trainer.losses import Thresholds

    Thresholds.predict = lambda self, logits_BL, by_B=None: torch.sigmoid(logits_BL).sum(1)


def d2q_ranks_among_all_lengths() -> None:
    """A watch time's rank is among all items: long ones win, which is what D2Q is against."""
    import torch

    from trainer.losses import DurationQuantiles

    DurationQuantiles._group = lambda self, by_B: torch.zeros_like(by_B, dtype=torch.long)


HEADS, LOSSES, OBJECTIVE = (f"trainer/test_{name}.py" for name in ("heads", "losses", "objective"))
MUTANTS = [
    Mutant(
        logits_multiplied, in_file(HEADS, "test_a_chain_of_three_is_the_product_of_its_probabilities"), "Tenrec (#37)"
    ),
    Mutant(
        product_of_plain_probabilities,
        (
            *in_file(HEADS, "test_composed_surprise_neither_vanishes_nor_overflows"),
            *in_file(OBJECTIVE, "test_the_loss_of_rare_conversions_is_not_rounded_to_zero_in_float32"),
        ),
    ),
    Mutant(
        esmm_on_clicked_rows_only,
        (
            *in_file(HEADS, "test_targets_are_zero_where_the_parent_did_not_happen_and_nan_where_unknown"),
            *in_file(OBJECTIVE, "test_esmm_gradient_of_the_conversion_logit_is_the_closed_form_on_every_row"),
        ),
    ),
    Mutant(
        conversions_measured_on_every_impression,
        in_file(HEADS, "test_answers_are_nan_outside_their_space"),
        "torch-rechub, TorchEasyRec",
    ),
    Mutant(esm2_carts_without_a_click, in_file(OBJECTIVE, "test_a_cart_without_a_click_does_not_count")),
    Mutant(
        down_sampling_not_taken_back,
        in_file(OBJECTIVE, "test_a_fitted_logit_is_the_true_rate_under_weighting_and_sampling"),
    ),
    Mutant(
        down_sampling_taken_back_in_the_click_alone,
        in_file(OBJECTIVE, "test_true_rates_are_found_through_a_product_too"),
    ),
    Mutant(
        propensity_learns_from_the_loss_it_weighs,
        in_file(OBJECTIVE, "test_propensities_teach_no_click_and_each_head_learns_from_its_own_term"),
    ),
    Mutant(propensities_never_clipped, in_file(OBJECTIVE, "test_losses_with_propensities_equal_a_plain_loop")),
    Mutant(
        propensities_over_the_number_of_rows,
        in_file(OBJECTIVE, "test_rows_over_their_propensities_are_normalised_by_their_own_sum"),
    ),
    Mutant(
        sample_weights_ignored,
        in_file(OBJECTIVE, "test_an_integer_weight_is_that_many_copies_of_the_row_or_list"),
        "EasyRec's ESMM",
    ),
    Mutant(
        each_worker_divides_by_its_own_sums,
        in_file(OBJECTIVE, "test_the_parts_of_any_number_of_workers_add_up_to_the_losses_and_gradients_of_one"),
    ),
    Mutant(
        weights_that_average_one_on_each_worker,
        in_file(OBJECTIVE, "test_the_parts_of_any_number_of_workers_add_up_to_the_losses_and_gradients_of_one"),
        "TorchEasyRec",
    ),
    Mutant(null_labels_count_as_negatives, in_file(OBJECTIVE, "test_a_null_label_counts_as_if_its_row_were_not_there")),
    Mutant(
        looking_added_to_the_logit,
        in_file(HEADS, "test_a_click_is_looking_times_clicking_and_is_served_without_looking"),
    ),
    Mutant(
        bpr_of_plain_sigmoids,
        in_file(LOSSES, "test_scores_far_apart_give_finite_losses_and_gradients_in_float32"),
        "torch-rechub",
    ),
    Mutant(bpr_by_the_number_of_pairs, in_file(LOSSES, "test_bpr_equals_a_plain_loop_over_graded_pairs")),
    Mutant(listmle_takes_padding_for_rows, in_file(LOSSES, "test_padding_changes_no_loss_and_no_gradient")),
    Mutant(
        listmle_breaks_ties_by_the_order_of_rows,
        in_file(LOSSES, "test_the_order_of_a_lists_rows_changes_nothing_also_with_ties"),
    ),
    Mutant(
        cread_sums_chances_without_widths,
        in_file(LOSSES, "test_cread_predicts_the_mean_exactly_where_values_lie_on_its_thresholds"),
    ),
    Mutant(
        d2q_ranks_among_all_lengths,
        in_file(
            LOSSES,
            "test_a_quantile_is_the_rank_among_items_of_like_length",
            "test_quantiles_take_the_length_out_of_a_watch_time",
        ),
    ),
]
