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
from embeddings.exchange import Exchange
from trainer.agree import agreed, together
from trainer.bootstrap import differences, errors
from trainer.counted import Counted
from trainer.data import Batch, DayPlan, Logs
from trainer.errors import UserError
from trainer.facts import Facts
from trainer.heads import TaskGraph
from trainer.learner import Learner
from trainer.metrics import Evaluation
from trainer.norms import norms
from trainer.quarantine import summary
from trainer.saving import UnderWay
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
    [found], _ = _score([learner], logs, plan, batch_size, lanes, gauc, progress)
    return defined(found.compute()) if found else {}


def rate_day(
    learner: Learner,
    logs: Logs,
    plan: DayPlan,
    batch_size: int,
    lanes: int,
    gauc: str,
    progress: Progress,
    rival: tuple[str, Learner] | None = None,
) -> dict[str, Any]:
    """What the gate wants to know of a day before it is trained on: metrics, their standard errors, how the rows are.
    rival: the champion (its interval's name, and it) when that is another model: scored on the same rows, and compared.
    Only worker 0 has what is made of predictions.
    """
    learners = [learner] if rival is None else [learner, rival[1]]
    found, facts = _score(learners, logs, plan, batch_size, lanes, gauc, progress)
    report = {"metrics": {}, **facts.report(learner.exchange)}
    if found[0] is None:
        return report
    draws = [evaluation.draws(plan.interval.number) for evaluation in found if evaluation]
    metrics = [defined(evaluation.compute()) for evaluation in found if evaluation]
    report |= {"metrics": metrics[0], "errors": errors(draws[0]), "units": found[0].num_units()}
    if rival:
        report["rival"] = {
            "day": rival[0],
            "metrics": metrics[1],
            "differences": differences(metrics[0], metrics[1], draws[0], draws[1]),
        }
    return report


def _score(
    learners: Sequence[Learner],
    logs: Logs,
    plan: DayPlan,
    batch_size: int,
    lanes: int,
    gauc: str,
    progress: Progress,
) -> tuple[list[Evaluation | None], Facts]:
    """One pass over a day's rows by each model. The evaluations of all workers' rows are on worker 0, None elsewhere;
    the facts are this worker's.
    """
    exchange, graph = learners[0].exchange, learners[0].graph
    mine, facts, done = [Evaluation(graph.addresses, gauc) for _ in learners], Facts(list(logs.schema.numbers)), 0
    for learner in learners[1:]:
        learner.embeddings.shard.begin_day(plan.interval.day.toordinal())
    progress("score", 0)
    for batch in shares(learners[0], logs, plan, batch_size, lanes):
        units_B = batch.row_B if batch.users_B is None and batch.groups_B is None else batch.users_B
        for learner, evaluation in zip(learners, mine, strict=True):
            predictions = graph.predictions(score_step(learner, batch), batch.labels_BT.to(learner.device))
            for address, answers_B in graph.answers(batch.labels_BT).items():
                evaluation.add(address, predictions[address], answers_B, batch.groups_B, units_B)
        facts.add(batch)
        done += batch.num_rows
        progress("score", done * exchange.num_workers)
    return [_gathered(exchange, graph, gauc, evaluation) for evaluation in mine], facts


def _gathered(exchange: Exchange, graph: TaskGraph, gauc: str, mine: Evaluation) -> Evaluation | None:
    gathered = {name: exchange.gather(torch.from_numpy(values)) for name, values in mine.state().items()}
    if exchange.rank:
        return None
    states = [
        {name: parts[worker].numpy() for name, parts in gathered.items()} for worker in range(exchange.num_workers)
    ]
    return Evaluation.merge(graph.addresses, gauc, states)


def defined(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """The metrics, None for NaN: a report is JSON."""
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
    progress("train", plan.num_rows * counted.steps // plan.num_steps(batch_size))
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
    sizes = norms(learner)
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
        "norms": sizes,
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
    rival: tuple[str, Callable[[], Learner]] | None = None,
    under_way: UnderWay | None = None,
    after_step: AfterStep = lambda counted: None,
) -> dict[str, Any]:
    """Score (when there is a model of the day before; and the champion, when that is another), then train. Returns the
    day's report; only worker 0's has the metrics. rival: the champion's interval, and what loads it: it is held in
    memory for as long as it scores. under_way: how far an earlier try came; what is scored now is entered there.
    """
    under_way, counted = under_way or UnderWay(), Counted(learner)
    if under_way.counted is not None:
        counted.load(under_way.counted)
    if under_way.scored is None:
        learner.embeddings.shard.reset_counts()
        start = time.perf_counter()
        champion = (rival[0], rival[1]()) if rival else None
        rate = rate_day(learner, logs, plan, batch_size, lanes, gauc, progress, champion) if score else {"metrics": {}}
        del champion
        under_way.scored = {"rate": rate, "seconds": time.perf_counter() - start}
    rate, score_seconds = under_way.scored.get("rate", {"metrics": {}}), under_way.scored.get("seconds", 0.0)
    counted.start_clock()
    trained = train_day(learner, logs, plan, batch_size, lanes, progress, counted, after_step)
    train_seconds = counted.seconds
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = learner.exchange.all_reduce(torch.tensor([float(peak_bytes)], dtype=torch.float64))
    return {
        "day": plan.interval.name,
        "rows": plan.num_rows,
        "seconds": round(score_seconds + train_seconds, 3),
        "score_seconds": round(score_seconds, 3),
        "train_seconds": round(train_seconds, 3),
        "samples_per_s": round(plan.num_rows / train_seconds, 1),
        "workers": learner.exchange.num_workers,
        "memory_bytes": int(memory.item()),
        **rate,
        **trained,
        "delivery": list(plan.delivery),
        "notes": list(plan.notes),
        "quarantine": summary(plan),
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
