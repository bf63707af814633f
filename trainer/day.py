"""A day: scored with yesterday's model, then trained on, then reported.

Every function is collective: all workers call it with the same plan.
"""

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from embeddings.accounts import account
from trainer.agree import agreed, together
from trainer.counted import Counted
from trainer.data import Batch, DayPlan, Logs
from trainer.errors import UserError
from trainer.heads import TaskGraph
from trainer.learner import Learner
from trainer.metrics import Evaluation
from trainer.step import score_step, train_step

Progress: TypeAlias = Callable[
    [str, int], None
]  # what is being done ("score", "train"), and on how many of the day's rows it was done
AfterStep: TypeAlias = Callable[[Counted], None]


def shares(
    learner: Learner,
    logs: Logs,
    plan: DayPlan,
    batch_size: int,
    lanes: int,
    seed: int | None = None,
    start_step: int = 0,
) -> Iterator[Batch]:
    """This worker's share of each of a day's global batches, from a step on; bad data that one worker meets is raised
    on all. From here on it is that day: what is known of an id ages to it.
    """
    exchange = learner.exchange
    learner.embeddings.shard.begin_day(plan.interval.day.toordinal())
    mine = {"rank": exchange.rank, "num_workers": exchange.num_workers, "start_step": start_step}
    whole_groups = seed is not None and learner.in_lists
    return agreed(
        exchange, logs.read(plan, batch_size=batch_size, lanes=lanes, seed=seed, whole_groups=whole_groups, **mine)
    )


def score_day(
    learner: Learner, logs: Logs, plan: DayPlan, batch_size: int, lanes: int, gauc: str, progress: Progress
) -> dict[str, Any]:
    """The metrics of a day's rows by the model as it stands, over all workers: by address, None where undefined.
    Only worker 0 has them.
    """
    exchange, graph = learner.exchange, learner.graph
    mine = Evaluation(graph.addresses, gauc)
    done = 0
    for batch in shares(learner, logs, plan, batch_size, lanes):
        predictions = graph.predictions(score_step(learner, batch), batch.labels_BT.to(learner.device))
        for address, answers_B in graph.answers(batch.labels_BT).items():
            mine.add(address, predictions[address], answers_B, batch.groups_B)
        done += batch.num_rows
        progress("score", done * exchange.num_workers)
    gathered = {name: exchange.gather(torch.from_numpy(values)) for name, values in mine.state().items()}
    if exchange.rank:
        return {}
    states = [
        {name: parts[worker].numpy() for name, parts in gathered.items()} for worker in range(exchange.num_workers)
    ]
    metrics = Evaluation.merge(graph.addresses, gauc, states).compute()
    return {
        address: {name: None if value != value else value for name, value in of.items()}
        for address, of in metrics.items()
    }


def train_day(
    learner: Learner,
    logs: Logs,
    plan: DayPlan,
    batch_size: int,
    lanes: int,
    progress: Progress,
    counted: Counted,
    after_step: AfterStep = lambda counted: None,
) -> dict[str, Any]:
    """One pass over a day's rows, or over those that are left where `counted` is of an earlier try, then evictions.
    Returns what was counted, over all workers: losses, their weights, gates, nulls, ids, steps; of lists, where a loss
    wants them, how many a row group's end cuts in two. after_step: called between any two steps.
    """
    exchange, shard, schema = learner.exchange, learner.embeddings.shard, logs.schema
    batches = shares(learner, logs, plan, batch_size, lanes, learner.seed, counted.steps)
    counted.restore_statistics()
    for batch in batches:
        counted.add_alike("losses", torch.stack(train_step(learner, batch, plan.interval.number)).double())
        if counted.first_day:
            counted.add("answered", answered_rows(learner.graph, batch.labels_BT))
        empty = [(ids.lengths_B == 0).sum() for ids in batch.ids.values()]
        counted.add("nulls", torch.stack([*empty, *batch.numbers_BK.isnan().sum(0), *batch.labels_BT.isnan().sum(0)]))
        counted.steps += 1
        progress("train", plan.num_rows * counted.steps // plan.num_steps(batch_size))
        after_step(counted)
    mean_2N = counted.alike["losses"] / counted.steps
    losses, weights = (dict(zip(learner.losses, each.tolist(), strict=True)) for each in mean_2N)
    if counted.first_day:
        check_answered(learner, plan, exchange.all_reduce(counted.own["answered"].clone()).tolist())
    check_finite(learner, losses)
    shard.end_day()
    columns = [*schema.ids, *schema.numbers, *schema.labels]
    nulls = dict(zip(columns, exchange.all_reduce(counted.own["nulls"].clone()).tolist(), strict=True))
    cut = together(exchange, lambda: 0 if exchange.rank else logs.cut_groups(plan)) if learner.in_lists else 0
    return {
        "steps": counted.steps,
        "cut_lists": cut,
        "losses": losses,
        "weights": weights,
        "gates": learner.health.report(exchange, learner.graph.with_head),
        "nulls": {c: n for c, n in nulls.items() if n},
        "ids": account(shard),
    }


def run_day(
    learner: Learner,
    logs: Logs,
    plan: DayPlan,
    *,
    batch_size: int,
    lanes: int,
    gauc: str,
    score: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Score (when there is a model of the day before), then train. Returns the day's report; only worker 0's has the
    metrics.
    """
    learner.embeddings.shard.reset_counts()
    start = time.perf_counter()
    metrics = score_day(learner, logs, plan, batch_size, lanes, gauc, progress) if score else {}
    trained_from = time.perf_counter()
    trained = train_day(learner, logs, plan, batch_size, lanes, progress, Counted(learner))
    end = time.perf_counter()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = learner.exchange.all_reduce(torch.tensor([float(peak_bytes)], dtype=torch.float64))
    return {
        "day": plan.interval.name,
        "rows": plan.num_rows,
        "seconds": round(end - start, 3),
        "score_seconds": round(trained_from - start, 3),
        "train_seconds": round(end - trained_from, 3),
        "samples_per_s": round(plan.num_rows / (end - trained_from), 1),
        "workers": learner.exchange.num_workers,
        "memory_bytes": int(memory.item()),
        "metrics": metrics,
        **trained,
    }


def answered_rows(graph: TaskGraph, labels_BT: Tensor) -> Tensor:
    """On how many rows each task's event could happen, and it is known whether it did: [T]."""
    possible_BT = torch.stack([graph.happened(name, labels_BT) == 1 for name in graph.tasks], dim=1)
    return (possible_BT & ~graph.targets(labels_BT).isnan()).sum(0)


def check_answered(learner: Learner, plan: DayPlan, rows_T: Sequence[int]) -> None:
    """A task that has no row on its first day is a mistake in the configuration."""
    for (name, task), rows in zip(learner.graph.tasks.items(), rows_T, strict=True):
        if rows == 0:
            hangs = f", and rows where {task.given or task.where} happened" if task.given or task.where else ""
            expected, do = f"labels{hangs}", "correct the label, or drop the task; the day before is untouched"
            got = f"none in the {plan.num_rows} rows of {plan.interval.words}"
            raise UserError("a task has no row to learn from", f"tasks.{name}", got=got, expected=expected, do=do)


def check_finite(learner: Learner, losses: Mapping[str, float]) -> None:
    """A day that ran away is never committed."""
    bad = [name for name, loss in losses.items() if not loss == loss or abs(loss) == float("inf")]
    bad += [name for name, value in learner.named_parameters().items() if not value.isfinite().all()]
    if bad:
        do = "lower train.dense.lr or train.rows.lr; the day before is untouched"
        raise UserError(
            "training diverged: NaN or infinity", bad[0], got=f"losses {dict(losses)}", expected="finite numbers", do=do
        )
