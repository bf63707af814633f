"""make chaos: days of training on a small Ray cluster while workers, nodes, drivers, disks and storage fail.

Every fault strikes at a place that the seed chose (so many rows into a day, while it is scored, in its morning), and
the command is started again whenever it ends, as cron or systemd would do. Then it is asked whether all promises hold:
every day promoted or held with a reason, every row trained on exactly once, nothing left behind. Prints a table of the
faults; exit code 1 when a promise is broken.
"""

import argparse
import contextlib
import datetime
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faults.disturb import FAULTS, MORNINGS, NEEDS_WORKERS, STARTS_WORKERS, World
from faults.nights import INJECT, ROOT, Night, ledger, leftovers, registry, times_trained
from faults.watch import Strike, Watch
from rich.console import Console
from rich.table import Table
from small_disk import small_disk

from cluster.simulate import simulate
from trainer.intervals import Interval

FIRST_DAY = datetime.date(2026, 11, 1)
TICK_S = 0.1
OF_OTHERS = ("ray", "torchinductor_root")  # caches that Ray and PyTorch keep for the next process
START_AGAIN_S = 1.0  # after the command ended

CONFIG = """
name: small
data: {path: LOGS, group: request_id, keys: [impression_id, user_id]}
features:
  user_id: {kind: id, table: user, dropout: 0.1}
  item_id: {kind: id, table: item}
  history: {kind: ids, table: item, pool: mean, max_len: 10}
  position: {kind: id, table: position}
  impression_id: {kind: id, table: row}
  price: {kind: number, transform: log1p}
tables:
  user: {dim: 16, capacity_rows: 1024, ttl_days: 5}
  item: {dim: 16, capacity_rows: 1024}
  position: {dim: 4, capacity_rows: 16}
  row: {dim: 4, capacity_rows: 1024}
tasks:
  click: {}
  cart: {given: click}
  watch: {label: watch_s, loss: mse, where: click, transform: log1p}
model:
  body: {kind: mmoe, num_experts: 4, expert_layers: [32, 16], gate_dropout: 0.1}
  tower_layers: [16]
  position: {features: [position], tasks: [click]}
train: {workers: {min: 1, max: 2}, batch_size: 128, dense: {lr: 0.003}}
nightly: {max_failures: 20, hang_s: 10}
tracking: {mlflow: "sqlite:///ROOT/mlflow.db"}
checkpoints: {path: ROOT/disk/checkpoints, progress_minutes: 0.05, base_every: 4, keep_days: 5, keep_bases: 1}
"""


def main() -> int:
    """Run, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=15)
    parser.add_argument("--rows", type=int, default=30_000, help="of a day")
    parser.add_argument("--strikes", type=int, default=28, help="how many faults there are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-min", type=float, default=60, help="a run that takes longer has failed")
    parser.add_argument("--recovery-s", type=float, default=30, help="a killed worker's place is taken within")
    options = parser.parse_args()
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="daybreak-chaos-")))
        disk = stack.enter_context(_disk(folder / "disk"))
        run = Run(folder, disk, options)
        broken = run.live() + run.broken_promises()
    if str(folder) in Path("/proc/mounts").read_text():
        broken.append("a mount is left")
    Console(width=100).print(table(run.strikes))
    print(f"{options.days} days of {options.rows:,} rows; {run.watch.rows_again:,} rows were trained on more than once")
    print(f"the command was started {run.world.starts} times; {time.monotonic() - start:.0f} s in all")
    print("\n".join(f"BROKEN: {promise}" for promise in broken) or "all promises hold")
    return 1 if broken else 0


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[Path | None]:
    """A small disk for the checkpoints, or None where none can be mounted."""
    try:
        with small_disk(folder, 256 * 1024):
            yield folder
    except pytest.skip.Exception as word:
        print(f"no disk will be full: {word}")
        yield None


def schedule(days: int, strikes: int, disk: bool, seed: int) -> list[Strike]:
    """Every fault about equally often, in a random order, spread over the days; the first day is left to begin well."""
    chance = random.Random(seed)
    names = [name for name in FAULTS if disk or name != "disk full"]
    drawn = [names[i % len(names)] for i in range(strikes)]
    chance.shuffle(drawn)
    found = []
    for number, fault in enumerate(drawn):
        phase = chance.choices(["train", "score", "morning"], [6, 1, 2 if fault in MORNINGS else 0])[0]
        found.append(Strike(fault, 1 + number * (days - 1) // strikes, phase, chance.uniform(0.1, 0.9)))
    order = ["score", "train", "morning"]
    return sorted(found, key=lambda strike: (strike.day, order.index(strike.phase), strike.share))


class Run:
    """One run of chaos: the world, the strikes, and what was seen."""

    def __init__(self, folder: Path, disk: Path | None, options: argparse.Namespace):
        self.options, self.start = options, time.monotonic()
        simulate(
            str(folder), days=options.days, start=FIRST_DAY, users=2000, items=500, rows_per_day=options.rows, seed=1
        )
        self.night = Night(folder, folder / "logs", CONFIG)
        self.strikes = schedule(options.days, options.strikes, disk is not None, options.seed)
        self.watch = Watch(self.night, FIRST_DAY, options.days, options.rows)
        (folder / "tmp").mkdir()
        os.environ |= {  # for the nodes and the workers that they start
            "PYTHONPATH": os.pathsep.join([str(INJECT), str(ROOT)]),
            "DAYBREAK_FAULTS": str(folder / "faults"),
            "TMPDIR": str(folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
        }
        self.world = World(self.night, disk, random.Random(options.seed))

    def live(self) -> list[str]:
        """Until the command ends well after the last strike. Returns what went wrong on the way."""
        waiting, struck = list(self.strikes), list[Strike]()
        lasting: list[tuple[float, Iterator[float]]] = []
        start_at = 0.0
        try:
            while time.monotonic() - self.start < self.options.limit_min * 60:
                self.watch.read(struck)
                code = self.world.driver.poll() if self.world.driver else -1
                if code == 0 and not lasting:
                    break
                if code not in (None, 0) and start_at == 0.0:
                    start_at = time.monotonic() + START_AGAIN_S
                if start_at and time.monotonic() > start_at:
                    self.world.start()
                    start_at = 0.0
                if waiting and self.comes_now(waiting[0], struck):
                    strike = waiting.pop(0)
                    self.say(strike)
                    strike.pids = set(self.watch.newest) if strike.fault in STARTS_WORKERS else set()
                    strike.struck_at = time.time()
                    struck.append(strike)
                    lasting.append((0.0, FAULTS[strike.fault](self.world)))
                lasting = [(due, fault) for due, fault in map(_go_on, lasting) if due < float("inf")]
                time.sleep(TICK_S)
            else:
                return [f"not done within {self.options.limit_min:g} minutes\n{self.night.error[-3000:]}"]
            self.watch.read(struck)
            for strike in struck:
                if strike.recovered_s is None:  # the night was over but for its end
                    strike.recovered_s = time.time() - strike.struck_at
        finally:
            self.world.end()
        return [f"{s.fault} on day {s.day} ({s.phase}) never came" for s in waiting]

    def comes_now(self, strike: Strike, struck: list[Strike]) -> bool:
        """It is at its place, the one before is recovered from, and there is something to strike."""
        if struck and struck[-1].recovered_s is None:
            return False
        if strike.fault in NEEDS_WORKERS and len(self.world.workers()) < len(self.world.nodes):
            return False
        if strike.fault == "node killed" and len(self.world.nodes) < 2:
            return False
        committed = self.committed(strike.day)
        if strike.phase == "morning":
            return committed is not None
        if strike.phase == "score":
            before = self.committed(strike.day - 1)
            return committed is not None or before is not None and self.watch.scored_at > before
        return self.watch.rows_done[strike.day] >= strike.share * self.options.rows

    def committed(self, day: int) -> float | None:
        """When a day was committed, or None."""
        folder = Interval(FIRST_DAY + datetime.timedelta(days=day)).folder
        path = Path(self.night.config.checkpoints.path, "small", folder, "manifest.json")
        return path.stat().st_mtime if path.exists() else None

    def say(self, strike: Strike) -> None:
        """One line a strike, as it comes."""
        where = f"{strike.share:.0%} of the rows" if strike.phase == "train" else strike.phase
        print(f"{time.monotonic() - self.start:6.0f} s: {strike.fault}, day {strike.day}, {where}", flush=True)

    def broken_promises(self) -> list[str]:
        """What does not hold now that all is over."""
        options, broken = self.options, []
        states = {Path(name).parts[1]: of["entries"][-1] for name, of in ledger(self.night).items() if "day=" in name}
        for day in range(options.days):
            last = states.get(Interval(FIRST_DAY + datetime.timedelta(days=day)).folder, {})
            if last.get("state") not in ("promoted", "held") or not last.get("reason"):
                broken.append(f"day {day} ended so: {last}")
        counts = times_trained(self.night)
        if counts.size != options.days * options.rows or (counts != 1).any():
            often = dict(zip(*np.unique(counts, return_counts=True), strict=True))
            broken.append(f"rows in the model, by how often they were trained on: {often}")
        runs = [run[0] for run in registry(self.night)["runs"]]
        if runs != ["FINISHED"] * options.days:
            broken.append(f"the runs in MLflow: {runs}")
        broken += [f"left behind: {what}" for what in leftovers(self.night)]
        shutil.rmtree(self.world.session)
        scratch = self.night.folder / "tmp"
        temporary = [path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file()]
        broken += [f"left behind: {path}" for path in temporary if path.parts[0] not in OF_OTHERS]
        late = [s for s in self.strikes if s.fault == "worker killed" and (s.recovered_s or 0) > options.recovery_s]
        broken += [f"a killed worker was replaced only after {s.recovered_s:.0f} s" for s in late]
        return broken


def _go_on(lasting: tuple[float, Iterator[float]]) -> tuple[float, Iterator[float]]:
    """A fault whose time has come goes on; infinite where it is over."""
    due, fault = lasting
    if time.monotonic() < due:
        return lasting
    wait = next(fault, None)
    return (float("inf") if wait is None else time.monotonic() + wait), fault


def table(strikes: list[Strike]) -> Table:
    """One line a fault."""
    found = Table("fault", "times", "recovery s, median", "max", "rows repeated")
    for name in FAULTS:
        mine = [strike for strike in strikes if strike.fault == name and strike.recovered_s is not None]
        if mine:
            seconds = [strike.recovered_s or 0.0 for strike in mine]
            found.add_row(
                name,
                str(len(mine)),
                f"{statistics.median(seconds):.1f}",
                f"{max(seconds):.1f}",
                f"{sum(strike.repeated for strike in mine):,}",
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
