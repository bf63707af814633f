"""Law 1: the number of workers never changes the answer. Law 7: day by day equals one continuous run."""

import datetime
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import many
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.nightly import work
from cluster.simulate import simulate
from embeddings.buckets import unhash64
from embeddings.exchange import Exchange, LocalExchange
from trainer.agree import gather_json
from trainer.checkpoint import Checkpoints
from trainer.config import Config
from trainer.day import score_day
from trainer.learner import Learner, build, open_logs
from trainer.step import train_step
from trainer.workers import Worker

MODELS = {
    "shared bottom": "model.body={kind: shared_bottom, layers: [16, 8]}",
    "MMoE": "model.body={kind: mmoe, num_experts: 3, expert_layers: [16, 8], gate_dropout: 0.1}",
    "ESMM on OMoE": "model.body={kind: omoe, num_experts: 2, expert_layers: [16, 8]}",
}
FIRST_DAY = datetime.date(2026, 11, 1)
CPU = torch.device("cpu")


def all_rows(learner: Learner) -> dict[str, dict[int, list[float]]]:
    """On worker 0: table -> id -> weights and optimizer state, from every shard."""
    found: dict[str, dict[int, list[float]]] = {}
    for table in learner.embeddings.shard.tables:
        keys, weight, state = learner.embeddings.shard.export(table)
        mine = [unhash64(keys).tolist(), torch.cat([weight, state.unsqueeze(1)], dim=1).tolist()]
        parts = gather_json(learner.exchange, mine)
        found[table] = {id_: row for ids, rows in parts for id_, row in zip(ids, rows, strict=True)}
    return found


def train_steps(exchange: Exchange, config: Config, steps: int) -> dict[str, Any]:
    """Train on the first day's first steps (over and over), then score the second day."""
    learner, logs = build(config, exchange, CPU), open_logs(config)
    plans = [logs.plan(day) for day in logs.days()]
    share = {"batch_size": config.train.batch_size, "lanes": config.data.lanes, "rank": exchange.rank}
    batches = list(islice(logs.read(plans[0], **share, num_workers=exchange.num_workers, seed=3), steps))
    losses = [exchange.all_reduce(train_step(learner, batches[s % len(batches)], 1)).tolist() for s in range(steps)]
    metrics = score_day(
        learner, logs, plans[1], config.train.batch_size, config.data.lanes, "impressions", lambda *_: None
    )
    dense = {name: value.flatten().tolist() for name, value in learner.model.state_dict().items()}
    return {"losses": losses, "metrics": metrics, "dense": dense, "rows": all_rows(learner)}


def train_models(exchange: Exchange, configs: list[Config], steps: int) -> list[dict[str, Any]]:
    return [train_steps(exchange, config, steps) for config in configs]


def assert_close(got: Any, want: Any, rel: float, path: str = "") -> None:
    """Every number within rel of the largest of its vector: float32 sums in another order differ in their last bits."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), f"{path}: other keys"
        for key in want:
            assert_close(got[key], want[key], rel, f"{path}/{key}")
    elif isinstance(want, list) and want and isinstance(want[0], list):
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_close(g, w, rel, f"{path}[{i}]")
    else:
        g, w = np.atleast_1d(np.array(got, dtype=float)), np.atleast_1d(np.array(want, dtype=float))
        scale = np.nanmax(np.abs(w), initial=1e-3)
        assert np.array_equal(np.isnan(g), np.isnan(w)), f"{path}: NaN in other places"
        worst = np.nanmax(np.abs(g - w), initial=0.0) / scale
        assert worst <= rel, f"{path}: differs by {worst:.2e} of {scale:.3g}"


@pytest.fixture
def one_row_group(tmp_path: Path) -> Path:
    """Two days with a single row group each: fewer than there are workers. Large enough that one swapped pair moves
    an AUC by less than 1e-6.
    """
    simulate(str(tmp_path / "large"), days=2, start=FIRST_DAY, users=300, items=200, rows_per_day=16_000, seed=2)
    for day in sorted((tmp_path / "large" / "logs").iterdir()):
        table = pa.concat_tables([pq.ParquetFile(path).read() for path in sorted(day.glob("*.parquet"))])
        (tmp_path / "logs" / day.name).mkdir(parents=True)
        pq.write_table(table, tmp_path / "logs" / day.name / "part-0.parquet")
    return tmp_path / "logs"


@pytest.mark.slow
def test_one_two_and_three_workers_give_the_same_losses_metrics_rows_and_dense_weights(
    small_config, one_row_group
) -> None:
    """50 steps on the same global batches, for each body and the ESMM graph, with every kind of dropout on, read
    from one row group a day.
    """
    configs = [small_config(override, f"data.path={one_row_group}") for override in MODELS.values()]
    alone = train_models(LocalExchange(), configs, 50)
    for workers in (2, 3):
        together = many.run(workers, train_models, configs, 50)[0]
        for name, got, want in zip(MODELS, together, alone, strict=True):
            assert_close(got, want, 1e-5, f"{name}, {workers} workers")


def run_days(exchange: Exchange, config: Config, groups: list[list[int]]) -> None:
    """Train the days of each group in a learner of its own, warm-started from the checkpoint of the group before."""
    logs = open_logs(config)
    plans = [logs.plan(day) for day in logs.days()]
    for group in groups:
        work(Worker(exchange, CPU, lambda event: None), config=config, plans=[plans[i] for i in group])


def contents(config: Config) -> dict[str, Any]:
    """Everything that the last checkpoint holds: metrics, rows by id, dense tensors by their bits."""
    checkpoints = Checkpoints(config.checkpoints.path, config.name)
    latest = checkpoints.latest()
    assert latest is not None
    learner = build(config, LocalExchange(), CPU)
    checkpoints.load(learner, latest)
    dense = {name: value.numpy().tobytes() for name, value in learner.model.state_dict().items()}
    moments = {
        f"{name}/{key}": value.numpy().tobytes()
        for name, parameter in learner.model.named_parameters()
        for key, value in learner.optimizer.state[parameter].items()
    }
    numbers = {name: value.numpy().tobytes() for name, value in learner.stats.state().items()}
    metrics = repr(latest.report["metrics"])
    return {"dense": dense, "moments": moments, "numbers": numbers, "rows": all_rows(learner), "metrics": metrics}


@pytest.mark.slow
def test_three_days_in_one_process_equal_three_warm_starts_bit_for_bit(small_config, tmp_path) -> None:
    continuous = small_config(f"checkpoints.path={tmp_path}/continuous")
    by_day = small_config(f"checkpoints.path={tmp_path}/by-day")
    run_days(LocalExchange(), continuous, [[0, 1, 2]])
    run_days(LocalExchange(), by_day, [[0], [1], [2]])
    assert contents(continuous) == contents(by_day)


@pytest.mark.slow
def test_three_days_on_two_workers_equal_three_warm_starts_on_two_workers_bit_for_bit(small_config, tmp_path) -> None:
    continuous = small_config(f"checkpoints.path={tmp_path}/continuous")
    by_day = small_config(f"checkpoints.path={tmp_path}/by-day")
    many.run(2, run_days, continuous, [[0, 1, 2]])
    many.run(2, run_days, by_day, [[0], [1], [2]])
    assert contents(continuous) == contents(by_day)


@pytest.mark.slow
def test_checkpoint_of_two_workers_continues_with_one_and_with_three(small_config, tmp_path) -> None:
    """Oracle: the third day on two workers. The answers differ only by the order of float32 sums."""
    config = small_config()
    many.run(2, run_days, config, [[0, 1]])
    results = {}
    for workers in (1, 2, 3):
        path = tmp_path / f"continued-{workers}"
        shutil.copytree(tmp_path / "checkpoints", path)
        continued = small_config(f"checkpoints.path={path}")
        many.run(workers, run_days, continued, [[2]])
        latest = Checkpoints(str(path), "small").latest()
        assert latest is not None and str(latest.day) == "2026-11-03"
        results[workers] = latest.report
    for workers in (1, 3):
        for address, want in results[2]["metrics"].items():
            got = results[workers]["metrics"][address]
            for name, value in want.items():
                assert math.isclose(got[name], value, rel_tol=1e-4), f"{workers} workers: {address} {name}"
        assert results[workers]["ids"]["user"]["rows"] == results[2]["ids"]["user"]["rows"]
