"""Wrong steps, inputs and metrics."""

# mypy: disable-error-code="method-assign,assignment"

from typing import Any

from wrong.mutant import Mutant, in_file

# What is replaced is imported inside: nothing of ours may be imported before a mutant is applied.


def rows_updated_once_a_task() -> None:
    """Each task's own backward pass updates the rows: a fused optimizer makes as many steps as there are tasks."""
    from embeddings.client import ShardedEmbeddings

    push = ShardedEmbeddings.push

    def in_thirds(self: ShardedEmbeddings, blocks: Any) -> None:
        for block in blocks:
            block.rows_UD.grad = block.rows_UD.grad / 3
        for _ in range(3):
            push(self, blocks)

    ShardedEmbeddings.push = in_thirds


def rows_updated_without_the_weights() -> None:
    """The tasks' gradients reach the rows as they are: the balancer weighs the dense net alone."""
    from trainer import step

    balanced = step.balanced

    def unweighed(learner: Any, inputs: Any, outputs: Any, terms: Any) -> Any:
        loss, losses_N, weights_N = balanced(learner, inputs, outputs, terms)
        scale = float(weights_N.mean())
        inputs.x_BI.register_hook(lambda gradient: gradient / scale)
        return loss, losses_N, weights_N

    step.balanced = unweighed


def gram_of_each_worker() -> None:
    """Gradients are compared on a worker's own rows: the workers' weights differ, and so do their models."""
    from trainer import step

    summed = step.summed

    def alone(exchange: Any, *parts: Any) -> Any:
        found = summed(exchange, *parts)
        if len(parts) == 4:  # sums, weights, Gram matrix, moments
            found[2] = parts[2]
        return found

    step.summed = alone


def balance_of_each_worker() -> None:
    """A sparse mixture's experts are balanced over a worker's own rows."""
    from trainer import step

    summed = step.summed

    def alone(exchange: Any, *parts: Any) -> Any:
        found = summed(exchange, *parts)
        if len(parts) == 4:
            found[3] = parts[3]
        return found

    step.summed = alone


def gradients_averaged() -> None:
    """Dense gradients are divided by the number of workers, as wrappers for data parallelism do."""
    from trainer import step

    reduce = step.all_reduce_gradients

    def averaged(learner: Any) -> None:
        reduce(learner)
        for parameter in learner.named_parameters().values():
            parameter.grad /= learner.exchange.num_workers

    step.all_reduce_gradients = averaged


def ids_inserted_while_scoring() -> None:
    """An id that was never trained on gets a row because it was scored."""
    from embeddings.client import ShardedEmbeddings

    pull = ShardedEmbeddings.pull

    def inserting(self: ShardedEmbeddings, ids: Any, *, insert: bool, **settings: Any) -> Any:
        return pull(self, ids, insert=True, **settings)

    ShardedEmbeddings.pull = inserting


def statistics_that_know_the_batch() -> None:
    """What happens on a row is counted before its id's statistics are read: the label is among the features."""
    from embeddings.client import ShardedEmbeddings

    pull = ShardedEmbeddings.pull

    def counted_first(self: ShardedEmbeddings, ids: Any, *, insert: bool, labels_BL: Any = None) -> Any:
        blocks = pull(self, ids, insert=insert, labels_BL=labels_BL)
        return pull(self, ids, insert=False) if insert else blocks

    ShardedEmbeddings.pull = counted_first


def gate_health_never_reset() -> None:
    """A day's report goes on from that of the day before."""
    from trainer.health import GateHealth

    reset = GateHealth.reset
    GateHealth.reset = lambda self: None if vars(self) else reset(self)


def optimizer_state_starts_anew() -> None:
    """A warm start restores the weights and forgets Adam's moments."""
    from trainer import checkpoint

    load = checkpoint.load_dense_state

    def without_moments(learner: Any, state: Any, where: str) -> None:
        load(learner, state, where)
        learner.optimizer.state.clear()

    checkpoint.load_dense_state = without_moments


def trained_before_scored() -> None:
    """A day is scored by a model that has learnt it: the metric is that of the training data."""
    from trainer import day

    run = day.run_day

    def backwards(learner: Any, logs: Any, plan: Any, *, score: bool, gauc: str, **settings: Any) -> Any:
        report = run(learner, logs, plan, score=False, gauc=gauc, **settings)
        metrics = day.score_day(learner, logs, plan, gauc=gauc, **settings) if score else {}
        return report | {"metrics": metrics}

    day.run_day = backwards


def lists_cut_by_batches() -> None:
    """A loss in lists is trained on what a batch happens to hold of each list."""
    from trainer.learner import Learner

    Learner.in_lists = property(lambda self: False)


def labels_among_the_features() -> None:
    """Nobody looks whether a feature reads the column that makes a label."""
    from trainer import checks

    checks._check_leakage = lambda config, where: None


def auc_with_ties_in_the_order_of_rows() -> None:
    """Equal scores are ranked as they come: a constant predictor has an AUC of 0 or 1."""
    import numpy as np

    from trainer import metrics

    def by_row_number(scores: Any, labels: Any) -> float:
        order = np.argsort(scores, kind="stable")
        ranks, positives = np.empty(len(scores)), labels.sum()
        ranks[order] = np.arange(1, len(scores) + 1)
        below = ranks[labels == 1].sum() - positives * (positives + 1) / 2
        return float(below / (positives * (len(labels) - positives)))

    metrics.auc = by_row_number


def auc_of_two_hundred_bins() -> None:
    """Scores are counted in 200 equal bins: on a sparse task nearly all fall into the first."""
    import numpy as np

    from trainer import metrics

    auc = metrics.auc
    metrics.auc = lambda scores, labels: auc(np.floor(np.clip(scores, 0, 1) * 200) / 200, labels)


def gauc_of_another_weighting() -> None:
    """Groups weigh the same, whatever the configuration says."""
    import numpy as np

    from trainer import metrics

    metrics._group_weights = lambda weighting, positives, negatives: np.ones_like(positives)


def xauc_counts_equal_labels_as_wrong() -> None:
    """Pairs with one label stay in the denominator."""
    import numpy as np

    from trainer import metrics

    xauc = metrics.xauc

    def of_all_pairs(predictions: Any, labels: Any, groups: Any = None) -> float:
        value = xauc(predictions, labels, groups)
        _, counts = np.unique(labels, return_counts=True)
        pairs = len(labels) * (len(labels) - 1) / 2
        return value * (1 - (counts * (counts - 1) / 2).sum() / pairs)

    metrics.xauc = of_all_pairs


def calibration_upside_down() -> None:
    """Labels over predictions, under the name of predictions over labels."""
    from trainer import metrics

    calibration = metrics.calibration
    metrics.calibration = lambda predictions, labels: 1 / calibration(predictions, labels)


def rows_outside_the_space_are_zeros() -> None:
    """A row whose label is masked is measured as one where nothing happened."""
    import torch

    from trainer.metrics import Evaluation

    add = Evaluation.add

    def unmasked(self: Evaluation, address: str, predictions: Any, labels: Any, groups: Any = None) -> None:
        add(self, address, predictions, torch.as_tensor(labels).nan_to_num(0.0), groups)

    Evaluation.add = unmasked


def a_score_of_plain_products() -> None:
    """Powers are taken in float32 one by one: a factor that underflows takes the score with it."""
    import torch

    from trainer import predictions

    told = predictions.told

    def multiplied(graph: Any, logits_BL: Any, labels_BT: Any, powers: Any) -> Any:
        found, score_B = told(graph, logits_BL, labels_BT, powers), torch.ones_like(logits_BL[:, 0])
        for address, power in powers.items():
            ranks = graph.addresses[address] == "ranking"
            score_B = score_B * ((power * found[address]).exp() if ranks else found[address] ** power)
        return found | {"score": score_B}

    predictions.told = multiplied


STEP, DAY, METRICS = (f"trainer/test_{name}.py" for name in ("step", "day", "metrics"))
EVERY_BALANCER = "test_under_every_balancer_a_row_makes_one_step_of_the_weighed_gradient"
WORKERS = "trainer/test_combinations.py::test_the_number_of_workers_changes_no_loss_weight_gradient_or_score"
MUTANTS = [
    Mutant(rows_updated_once_a_task, in_file(STEP, EVERY_BALANCER), "TorchRec's fused optimizers (#2729)"),
    Mutant(rows_updated_without_the_weights, in_file(STEP, EVERY_BALANCER)),
    Mutant(gram_of_each_worker, (f"{WORKERS}[shared_bottom-ESMM-mgda]",), "TorchEasyRec's Pareto loss"),
    Mutant(balance_of_each_worker, (f"{WORKERS}[sparse_moe-ESMM-fixed]",)),
    Mutant(gradients_averaged, (f"{WORKERS}[shared_bottom-ESMM-fixed]",)),
    Mutant(ids_inserted_while_scoring, in_file(STEP, "test_scoring_leaves_no_trace")),
    Mutant(
        statistics_that_know_the_batch,
        in_file(
            "trainer/test_statistics.py",
            "test_statistics_are_the_decayed_counts_and_smoothed_rates_of_what_happened_before",
        ),
    ),
    Mutant(
        gate_health_never_reset,
        in_file("trainer/test_health.py", "test_a_new_day_starts_from_nothing"),
        "TorchEasyRec's metrics (#646)",
    ),
    Mutant(
        optimizer_state_starts_anew,
        in_file("trainer/test_checkpoint.py", "test_everything_that_learns_comes_back_bit_by_bit_and_learns_on_alike"),
    ),
    Mutant(
        trained_before_scored,
        in_file(DAY, "test_a_day_is_scored_by_the_model_that_has_not_seen_it"),
    ),
    Mutant(
        lists_cut_by_batches,
        in_file(DAY, "test_under_a_loss_in_lists_every_request_is_in_one_share_of_one_batch"),
    ),
    Mutant(
        labels_among_the_features,
        in_file("trainer/test_config.py", "test_a_name_that_nothing_defines_is_told_with_the_nearest_one"),
    ),
    Mutant(
        auc_with_ties_in_the_order_of_rows,
        in_file(
            METRICS,
            "test_auc_is_the_share_of_ordered_pairs_with_ties_as_one_half",
            "test_a_constant_predictor_scores_one_half",
        ),
        "TorchEasyRec's SQL (ROW_NUMBER)",
    ),
    Mutant(
        auc_of_two_hundred_bins,
        in_file(METRICS, "test_auc_is_the_share_of_ordered_pairs_with_ties_as_one_half"),
        "Keras, TorchEasyRec",
    ),
    Mutant(
        gauc_of_another_weighting,
        in_file(METRICS, "test_the_three_gauc_weightings_are_three_different_numbers"),
    ),
    Mutant(
        xauc_counts_equal_labels_as_wrong,
        in_file(METRICS, "test_xauc_is_the_share_of_ordered_pairs_with_ties_as_one_half"),
        "TorchEasyRec",
    ),
    Mutant(
        calibration_upside_down,
        in_file(METRICS, "test_calibration_is_the_ratio_of_sums_and_ignores_the_order"),
    ),
    Mutant(rows_outside_the_space_are_zeros, in_file(METRICS, "test_rows_with_a_masked_label_change_nothing")),
    Mutant(
        a_score_of_plain_products,
        in_file(
            "trainer/test_predictions.py",
            "test_a_factor_that_float32_does_not_hold_is_no_reason_to_lose_the_product",
        ),
    ),
]
