"""What several tests share: small simulated logs, a configuration over them, the command line in this process."""

import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
    from trainer.config import load

    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.replace("LOGS", str(simulated / "logs")).replace("ROOT", str(tmp_path)))
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
