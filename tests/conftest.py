"""What several tests share: small simulated logs, a configuration over them, the command line in this process."""

import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

if TYPE_CHECKING:
    from trainer.learner import Learner

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="twenty times as many random examples in tests/contracts")
    parser.addoption("--faults", action="store_true", help="every point of tests/faults at which a night is killed")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> int:
    """How many times as many random examples as in a short run."""
    return 20 if request.config.getoption("--long") else 1


FIRST_DAY = datetime.date(2026, 11, 1)

CONFIG = """
name: small
data: {path: LOGS, group: request_id, keys: [impression_id, user_id]}
features:
  user_id: {kind: id, table: user, dropout: 0.2}
  item_id: {kind: id, table: item}
  history: {kind: ids, table: item, pool: mean, max_len: 10}
  position: {kind: id, table: position}
  price: {kind: number, transform: log1p}
tables:
  user: {dim: 8, capacity_rows: 64, init_scale: 0.01}
  item: {dim: 8, capacity_rows: 64}
  position: {dim: 4, capacity_rows: 16}
tasks:
  click: {}
  cart: {given: click}
  watch: {label: watch_s, loss: mse, where: click, transform: log1p}
model:
  body: {kind: mmoe, num_experts: 3, expert_layers: [16, 8], gate_dropout: 0.1}
  tower_layers: [8]
  position: {features: [position], tasks: [click]}
train: {workers: 2, batch_size: 256, dense: {lr: 0.003}}
serving: {item: [item_id, price]}
tracking: {mlflow: "sqlite:///ROOT/mlflow.db"}
checkpoints: {path: ROOT/checkpoints}
"""


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three days of 4,000 impressions; the folder holds logs/ and truth/. Not to be changed: copy it."""
    from cluster.simulate import simulate

    out = tmp_path_factory.mktemp("simulated")
    simulate(str(out), days=3, start=FIRST_DAY, users=200, items=150, rows_per_day=4000, seed=1)
    return out


@pytest.fixture
def small_config(simulated: Path, tmp_path: Path) -> Callable[..., Any]:
    """load(*overrides): the configuration over the simulated logs, checkpoints and tracking in tmp_path."""
    return configure(simulated / "logs", tmp_path)


def configure(logs: Path, folder: Path) -> Callable[..., Any]:
    """load(*overrides): the configuration over some logs, checkpoints and tracking in a folder."""
    from trainer.configfile import load

    path = folder / "small.yaml"
    path.write_text(CONFIG.replace("LOGS", str(logs)).replace("ROOT", str(folder)))
    return lambda *overrides: load(str(path), overrides)


class Ended(NamedTuple):
    code: Any
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout. NaN and Infinity, which Python would take, are no JSON."""
        value = json.loads(self.out.splitlines()[-1], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert isinstance(value, dict)
        return value


Run = Callable[..., Ended]


@pytest.fixture
def daybreak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    from cluster.cli import main

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["daybreak", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code, *capsys.readouterr())

    return run


Columns = dict[str, np.ndarray]


def known(learner: "Learner") -> dict[str, Columns]:
    """All that this worker's shard knows, sorted by key: of each table's rows, of the ids that wait for one, its sketch
    and its trained default row. Not where that lies.
    """
    shard, found = learner.embeddings.shard, {}
    for number, name in enumerate(shard.names):
        pool, waiting = shard.pool_of(name), shard.waiting.ids
        found[f"{name} rows"] = shard.export(name)
        rows = waiting.rows(number)
        rows = rows[np.argsort(waiting.key_R[rows])]
        days = np.array(shard.periods.days)[waiting.seen_R[rows]]
        found[f"{name} waiting"] = {"key": waiting.key_R[rows], "count": waiting.count_R[rows], "last_seen_day": days}
        if name in shard.sketches:
            found[f"{name} sketch"] = {"cells": shard.sketches[name].cells.copy()}
        if shard.tables[name].default_row == "trained":
            default = pool.known(pool.default_rows(np.array([number], np.uint8)))
            found[f"{name} default"] = {what: default[what] for what in ("weight", "count", *pool.optimizer.states)}
    return {
        of: {w: c for w, c in columns.items() if w not in ("row", "seen", "table")} for of, columns in found.items()
    }


def known_to_all(learner: "Learner") -> dict[str, Columns]:
    """On worker 0 what all shards know, as one: their ranges of keys lie one after the other. Collective."""
    from embeddings.buckets import owner_of
    from trainer.agree import gather_json

    exchange, mine = learner.exchange, known(learner)
    for columns in mine.values():
        owners = owner_of(columns.get("key", np.zeros(0, np.int64)), exchange.num_workers)
        assert (owners == exchange.rank).all(), "what is known of an id lies with the owner of its bucket"
    parts = gather_json(exchange, {of: {w: c.tolist() for w, c in columns.items()} for of, columns in mine.items()})
    found = {}
    for of, columns in mine.items() if parts else ():
        if of.endswith("default"):
            assert all(part[of] == parts[0][of] for part in parts), "a default row is the same on every worker"
            found[of] = columns
        else:
            found[of] = {w: np.array(sum((part[of][w] for part in parts), []), c.dtype) for w, c in columns.items()}
    return found
