"""A night as cron starts it, in a folder of its own, with the rig of inject/ on its path; and all that it leaves."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from conftest import known
from faults.inject.diary import TRAIN, steps_of

from embeddings.exchange import LocalExchange
from trainer.checkpoint import Checkpoints
from trainer.config import Config, flatten
from trainer.configfile import load
from trainer.learner import Learner, build
from trainer.storage import Storage

ROOT = Path(__file__).parents[2]
INJECT = Path(__file__).parent / "inject"
ROOM = {"free", "bytes", "load"}  # of a table: room for rows to come; after a warm start, as much as the rows need
TIMES = {"seconds", "score_seconds", "train_seconds", "samples_per_s", "memory_bytes"}  # of a report: what time changes
CHANCE = {"checkpoint", "folder", "attempt", "run_id"}  # of a run or an entry: ids that are drawn anew

# Every impression is an id of its own in the table `row`: the count of its row is how often it was trained on.
CONFIG = """
name: small
data: {path: LOGS, group: request_id, keys: [impression_id, user_id]}
features:
  user_id: {kind: id, table: user, dropout: 0.2}
  item_id: {kind: id, table: item}
  history: {kind: ids, table: item, pool: mean, max_len: 10}
  position: {kind: id, table: position}
  impression_id: {kind: id, table: row}
  price: {kind: number, transform: log1p}
tables:
  user: {dim: 8, capacity_rows: 64, init_scale: 0.01, ttl_days: 2}
  item: {dim: 8, capacity_rows: 64, min_count: 2}
  position: {dim: 4, capacity_rows: 16}
  row: {dim: 4, capacity_rows: 1024}
tasks:
  click: {}
  cart: {given: click}
  watch: {label: watch_s, loss: mse, where: click, transform: log1p}
model:
  body: {kind: mmoe, num_experts: 3, expert_layers: [16, 8], gate_dropout: 0.1}
  tower_layers: [8]
  position: {features: [position], tasks: [click]}
train: {workers: 2, batch_size: 64, dense: {lr: 0.003}}
tracking: {mlflow: "sqlite:///ROOT/mlflow.db"}
checkpoints: {path: ROOT/checkpoints, base_every: 2, progress_minutes: 0.001, keep_days: 1, keep_bases: 1}
"""


@dataclass
class Night:
    """One folder: configuration, checkpoints, MLflow database, and faults/ for the rig. database: an empty one, for
    those who need many: MLflow takes seconds to make one.
    """

    folder: Path
    logs: Path
    text: str = CONFIG
    database: Path | None = None
    codes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("faults/fired", "faults/steps"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        text = self.text.replace("LOGS", str(self.logs)).replace("ROOT", str(self.folder))
        (self.folder / "small.yaml").write_text(text)
        if self.database:
            shutil.copy(self.database, self.folder / "mlflow.db")

    @property
    def config(self) -> Config:
        return load(str(self.folder / "small.yaml"), [])

    def start(self, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        """The command, begun. environment: what the rig is told."""
        path = os.pathsep.join([str(INJECT), str(ROOT), os.environ.get("PYTHONPATH", "")])
        told = {"PYTHONPATH": path, "DAYBREAK_FAULTS": str(self.folder / "faults"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "cluster.cli", "nightly", str(self.folder / "small.yaml"), "--json", *options]
        out, err = (open(self.folder / name, "ab") for name in ("out.txt", "err.txt"))
        with out, err:
            return subprocess.Popen(
                command, cwd=self.folder, stdout=out, stderr=err, env=os.environ | told | environment
            )

    def run(self, *options: str, times: int = 4, **environment: str) -> None:
        """The same command, again and again until it ends well; its codes are kept."""
        for _ in range(times):
            process = self.start(*options, **environment)
            try:
                self.codes.append(process.wait(timeout=600))
            finally:
                process.kill()
            if self.codes[-1] == 0:
                return
        raise AssertionError(f"the night does not end: {self.codes}\n{self.error[-4000:]}")

    @property
    def error(self) -> str:
        return (self.folder / "err.txt").read_text()

    def fired(self, point: str) -> bool:
        return (self.folder / "faults" / "fired" / point).exists()


def models(night: Night) -> Iterator[tuple[str, Learner, dict[str, Any]]]:
    """Each kept interval's name, its model as one worker reads it, and its report."""
    config = night.config
    checkpoints = Checkpoints(config.checkpoints.path, config.name)
    for interval in checkpoints.intervals():
        learner, checkpoint = build(config, LocalExchange()), checkpoints.open(interval)
        checkpoints.load(learner, checkpoint)
        yield interval.name, learner, checkpoint.report


def outcome(night: Night) -> dict[str, Any]:
    """All that a night leaves, times and random ids apart, as one flat dict of values and arrays."""
    found: dict[str, Any] = {}
    for name, learner, report in models(night):
        found |= lasting(flatten({name: {"rows": known(learner), "dense": dense(learner), "report": report}}))
    return found | flatten({"registry": registry(night), "ledger": ledger(night)})


def dense(learner: Learner) -> dict[str, Any]:
    """All that is dense: weights, their average, the optimizer's state, statistics."""
    state = {f"model/{name}": value for name, value in learner.model.state_dict().items()}
    state |= {f"averaged/{name}": value for name, value in learner.averaged.state_dict().items()}
    for name, parameter in learner.named_parameters().items():
        state |= {f"optimizer/{name}/{key}": value for key, value in learner.optimizer.state[parameter].items()}
    state |= {f"numbers/{name}": value for name, value in learner.stats.state().items()}
    return {name: torch.as_tensor(value).numpy() for name, value in state.items()}


def registry(night: Night) -> dict[str, Any]:
    """MLflow's side: the runs that are there and how they ended, the versions and what they stand for, the aliases."""
    from mlflow import MlflowClient

    client = MlflowClient(night.config.tracking.mlflow)
    experiments = client.search_experiments()
    runs = client.search_runs([e.experiment_id for e in experiments], order_by=["attributes.start_time ASC"])
    days = {run.info.run_id: run.data.tags["day"] for run in runs}
    versions = sorted(client.search_model_versions("name = 'small'"), key=lambda version: int(version.version))
    registered = client.get_registered_model("small")
    return {
        "runs": [(run.info.status, without(_ours(run.data.tags), CHANCE), lasting(run.data.metrics)) for run in runs],
        "versions": [(int(v.version), days[v.run_id], without(v.tags, CHANCE)) for v in versions],
        "aliases": {name: int(version) for name, version in registered.aliases.items()},
    }


def _ours(tags: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if not name.startswith("mlflow.")}


def ledger(night: Night) -> dict[str, Any]:
    """What the ledgers and champion.json say, by file."""
    storage = Storage(night.config.checkpoints.path)
    names = [n for n in storage.files(recursive=True) if n.endswith(("ledger.json", "champion.json"))]
    return {name.replace(".", "_"): _plain(json.loads(storage.read(name))) for name in names}


def _plain(value: Any) -> Any:
    """Without times and random ids, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in CHANCE | {"at", "since"}}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def lasting(values: dict[str, Any]) -> dict[str, Any]:
    """Without what time and room change, at the end of a name."""
    return {name: value for name, value in values.items() if re.split("[./]", name)[-1] not in TIMES | ROOM}


def without(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def differing(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """The names of what is not the same, bit for bit; NaN is NaN."""
    return [name for name in want | got if not (name in got and name in want and _same(got[name], want[name]))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True))


def times_trained(night: Night) -> np.ndarray:
    """How often each impression was trained on, by the counter model of the newest day."""
    *_, (_, learner, _) = models(night)
    return np.asarray(learner.embeddings.shard.export("row")["count"])


def rows_in_steps(night: Night) -> int:
    """On how many rows the night's processes learnt, one that was trained on again counted again."""
    diaries = (night.folder / "faults" / "steps").iterdir()
    steps = (step for path in diaries for step in steps_of(path.read_bytes()))
    return sum(len(step.rows) // 4 for step in steps if step.phase == TRAIN)


def leftovers(night: Night, within_s: float = 30.0) -> list[str]:
    """What should not be there when all is done: processes, temporary files, locks, files that no model needs."""
    deadline = time.monotonic() + within_s
    while (alive := processes(night)) and time.monotonic() < deadline:
        time.sleep(0.2)
    checkpoints = Checkpoints(night.config.checkpoints.path, "small")
    kept = [checkpoints.open(interval) for interval in checkpoints.intervals()]
    needed = {name for checkpoint in kept for name, _ in checkpoint.files()}
    needed |= {f"{checkpoint.interval.folder}/manifest.json" for checkpoint in kept} | {"champion.json"}
    folder = Path(night.config.checkpoints.path, "small")
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    left = [file for file in files if file not in needed and not file.endswith("/ledger.json")]
    return [f"process {process.pid}: {' '.join(process.cmdline())}" for process in alive] + left


def processes(night: Night) -> list[psutil.Process]:
    """Those that this night started, or that they did."""
    mine, found = str(night.folder / "faults"), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("DAYBREAK_FAULTS") == mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
