"""A day's scores without training: written as Parquet, one file a worker, or measured against the day's labels."""

import datetime
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cluster.nightly import Morning, open_checkpoints, run, teller
from trainer.agree import together
from trainer.checkpoint import Checkpoint
from trainer.config import Config, absolute
from trainer.data import DayPlan
from trainer.day import score_day, shares
from trainer.learner import build, check, fusion_powers, open_logs
from trainer.predictions import PredictionFile, told
from trainer.step import score_step
from trainer.workers import Event, Worker


def predict(
    config: Config, day: datetime.date, out: str, *, use_ray: bool = True, on_event: Callable[[Event], None]
) -> dict[str, Any]:
    """Score a day into out/. The model is the newest promoted one from before the day, or the newest promoted one at
    all.
    """
    check(config)
    checkpoint = Morning(config, open_checkpoints(config)).must_have_champion(before=day)
    plan = open_logs(config).plan(day)
    job = partial(_write, config=config, plan=plan, checkpoint=checkpoint, out=absolute(out))
    rows = run(job, config, use_ray, on_event)
    return {"model": config.name, "day": str(day), "trained_through": str(checkpoint.day), "rows": rows, "out": out}


def evaluate(
    config: Config,
    day: datetime.date,
    model_day: datetime.date,
    *,
    use_ray: bool = True,
    on_event: Callable[[Event], None],
) -> dict[str, Any]:
    """The metrics of a day by the model that was trained through model_day."""
    checkpoint = open_checkpoints(config).open(model_day)
    job = partial(_measure, config=config, plan=open_logs(config).plan(day), checkpoint=checkpoint)
    metrics = run(job, config, use_ray, on_event)
    return {"model": config.name, "day": str(day), "trained_through": str(model_day), "metrics": metrics}


def _measure(worker: Worker, *, config: Config, plan: DayPlan, checkpoint: Checkpoint) -> dict[str, Any]:
    """What each worker does for evaluate; worker 0 returns the metrics."""
    learner = build(config, worker.exchange, worker.device)
    open_checkpoints(config).load(learner, checkpoint)
    tell = teller(worker, plan)
    return score_day(
        learner, open_logs(config), plan, config.train.batch_size, config.data.lanes, config.data.gauc, tell
    )


def _write(worker: Worker, *, config: Config, plan: DayPlan, checkpoint: Checkpoint, out: str) -> int:
    """What each worker does for predict; returns the rows that all of them wrote."""
    exchange, logs = worker.exchange, open_logs(config)
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
