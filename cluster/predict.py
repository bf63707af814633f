"""A day's scores without training: written as Parquet, one file a worker, or measured against the day's labels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cluster.morning import must_have_champion, open_checkpoints, open_ledger
from cluster.nightly import run, teller
from trainer.agree import together
from trainer.checkpoint import Checkpoint
from trainer.config import Config, absolute
from trainer.data import DayPlan
from trainer.day import score_day, shares
from trainer.intervals import Interval
from trainer.learner import build, check, fusion_powers, open_logs
from trainer.predictions import PredictionFile, told
from trainer.quarantine import sift
from trainer.step import score_step
from trainer.workers import Event, Worker


def predict(
    config: Config, interval: Interval, out: str, *, use_ray: bool = True, on_event: Callable[[Event], None]
) -> dict[str, Any]:
    """Score a day into out/. The model is the champion, when it was trained before the day; else the newest promoted
    one from before it; else the champion.
    """
    check(config)
    checkpoint = must_have_champion(open_checkpoints(config), open_ledger(config), before=interval)
    plan = open_logs(config).plan(interval)
    job = partial(_write, config=config, plan=plan, checkpoint=checkpoint, out=absolute(out))
    rows = run(job, config, use_ray, on_event)
    through = checkpoint.interval.name
    return {"model": config.name, "day": interval.name, "trained_through": through, "rows": rows, "out": out}


def evaluate(
    config: Config,
    interval: Interval,
    model_of: Interval,
    *,
    use_ray: bool = True,
    on_event: Callable[[Event], None],
) -> dict[str, Any]:
    """The metrics of a day by the model that was trained through model_of."""
    checkpoint = open_checkpoints(config).open(model_of)
    job = partial(_measure, config=config, plan=open_logs(config).plan(interval), checkpoint=checkpoint)
    metrics = run(job, config, use_ray, on_event)
    return {"model": config.name, "day": interval.name, "trained_through": model_of.name, "metrics": metrics}


def _measure(worker: Worker, *, config: Config, plan: DayPlan, checkpoint: Checkpoint) -> dict[str, Any]:
    """What each worker does for evaluate; worker 0 returns the metrics."""
    learner = build(config, worker.exchange, worker.device)
    open_checkpoints(config).load(learner, checkpoint)
    tell, logs = teller(worker, plan), open_logs(config)
    plan = sift(worker.exchange, logs, plan)
    return score_day(learner, logs, plan, config.train.batch_size, config.data.lanes, config.data.gauc, tell)


def _write(worker: Worker, *, config: Config, plan: DayPlan, checkpoint: Checkpoint, out: str) -> int:
    """What each worker does for predict; returns the rows that all of them wrote."""
    exchange, logs = worker.exchange, open_logs(config)
    plan = sift(exchange, logs, plan)
    learner = build(config, exchange, worker.device)
    graph, powers = learner.graph, fusion_powers(config)
    open_checkpoints(config).load(learner, checkpoint)
    with PredictionFile(out, exchange.rank, exchange.num_workers) as file:
        together(exchange, file.clear)
        for batch in shares(learner, logs, plan, config.train.batch_size, config.data.lanes):
            columns = told(graph, score_step(learner, batch), batch.labels_BT.to(learner.device), powers)
            together(exchange, partial(file.write, batch.keys, columns))
        together(exchange, file.close)
    return int(exchange.all_reduce(torch.tensor([file.num_rows])).item())
