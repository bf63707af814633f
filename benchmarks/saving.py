"""What does a snapshot within a day cost the training? Its instant, beside a step; and the steps while it is written.

A model with many rows, of which a day touches some, takes snapshots again and again while it trains. Exit code 1 when
the instant takes longer than a median step.

    python -m benchmarks.saving [--rows 2_000_000] [--json]
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

from cluster.simulate import simulate
from embeddings.exchange import LocalExchange
from trainer.checkpoint import Checkpoints
from trainer.configfile import load
from trainer.counted import Counted
from trainer.day import train_day
from trainer.errors import UserError
from trainer.learner import Learner, build, open_logs
from trainer.saving import Saving

CONFIG = """
name: model
data: {path: LOGS, group: request_id}
features:
  user_id: {kind: id, table: user}
  item_id: {kind: id, table: item}
  history: {kind: ids, table: item, pool: mean, max_len: 20}
  price: {kind: number, transform: log1p}
tables:
  user: {dim: 16, capacity_rows: 100000}
  item: {dim: 16, capacity_rows: 100000}
tasks:
  click: {}
  cart: {given: click}
model:
  body: {kind: mmoe, num_experts: 4, expert_layers: [128, 64]}
  tower_layers: [32]
train: {workers: 1, batch_size: 2048}
"""


def fill(learner: Learner, rows: int) -> None:
    """Rows of ids that no batch has, as from the days before."""
    shard, random = learner.embeddings.shard, np.random.default_rng(0)
    seen = int(shard.periods.past(np.array([739_000]))[0])
    for first in range(0, rows, 1 << 18):
        keys = np.unique(random.integers(-(2**63), 2**63 - 1, min(1 << 18, rows - first)))
        columns = len(shard.ledger.columns(0))
        weight = random.normal(size=(keys.size, 16)).astype(np.float32)
        known: dict[str, Any] = {"count": 1, "seen": seen, "tally": np.ones((keys.size, columns), np.float32)}
        shard.put("user", keys, known | {"weight": weight})


def measure(rows: int, folder: str) -> dict[str, float]:
    """Seconds of a step without and during writing, and of a snapshot's instant: of a base and of a delta."""
    simulate(
        f"{folder}/simulated",
        days=1,
        start=datetime.date(2026, 11, 1),
        users=50_000,
        items=20_000,
        rows_per_day=400_000,
        seed=1,
    )
    with open(f"{folder}/model.yaml", "w") as file:
        file.write(CONFIG.replace("LOGS", f"{folder}/simulated/logs"))
    config = load(f"{folder}/model.yaml", [])
    learner, logs = build(config, LocalExchange()), open_logs(config)
    fill(learner, rows)
    saving = Saving(Checkpoints(folder, "checkpoints"), learner, every_s=0, fresh=False)
    plan = logs.plan(logs.intervals()[0])
    saving.begin(plan.interval)
    taken, alone, beside = list[float](), list[float](), list[float]()
    ended = time.perf_counter()

    def after_step(counted: Counted) -> None:
        nonlocal ended
        step_s, written = time.perf_counter() - ended, saving.is_writing
        start = time.perf_counter()
        if counted.steps % 24 == 12:
            saving.after_step(counted)
        if saving.is_writing and not written:
            taken.append(time.perf_counter() - start)
        elif counted.steps > 4:
            (beside if written else alone).append(step_s)
        ended = time.perf_counter()

    train_day(
        learner, logs, plan, config.train.batch_size, config.data.lanes, lambda *_: None, Counted(learner), after_step
    )
    start = time.perf_counter()
    saving.commit({})
    return {
        "rows": rows,
        "step_s": statistics.median(alone),
        "step_while_writing_s": statistics.median(beside),
        "base_instant_s": taken[0],
        "delta_instant_s": statistics.median(taken[1:]),
        "commit_s": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="saving-") as folder:
        found = measure(arguments.rows, folder)
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:24} {value:,.4f}" if name.endswith("_s") else f"{name:24} {value:,}")
    if max(found["delta_instant_s"], found["base_instant_s"]) > found["step_s"]:
        sys.exit("the instant of a snapshot takes longer than a step")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
