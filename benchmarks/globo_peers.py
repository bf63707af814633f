"""What a model has to beat on globo_rank: popularity in the previous hour, and LightGBM on the given columns.

In: the folder that holds `day=2017-10-01/` and so on. Out: a table, and with --json all metrics by peer, seed and day.
Each day is scored before it is trained on. `lightgbm` is fitted anew for each day, on the WINDOW_DAYS days before it;
`lightgbm_frozen` scores all days with the trees fitted for the first one. The clicks and what follows them are real,
the candidates that were not clicked are sampled. PARAMETERS were settled on 2017-10-06 and
10-07, which are not evaluated, after a first look at the learning rate on 10-08 and 10-12.

    python -m benchmarks.globo_peers --data PATH [--seeds 3] [--json OUT.json]
"""

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.dataset

from trainer.errors import UserError
from trainer.metrics import auc, calibration, gauc, logloss, mse

Rows = dict[str, np.ndarray]  # column -> its values, null as NaN
Metrics = dict[str, dict[str, float]]  # address -> metric -> value
Results = dict[str, dict[str, dict[str, Metrics]]]  # peer -> seed -> day -> metrics

WINDOW_DAYS = 5
NUM_ROUNDS = 100
CATEGORICAL = ["environment", "device_group", "os", "country", "region", "referrer_type"]
FEATURES = ["user_clicks_before", "article_age_h", "article_clicks_prev_hour", "pos_in_session", *CATEGORICAL]
PARAMETERS = {
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "feature_fraction": 0.8,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}
GAUC_WEIGHTING = "impressions"


@dataclass(frozen=True)
class Task:
    """One label on one space: all rows, or the clicked ones; rows without the label are left out."""

    label: str
    space: str
    objective: str = "binary"

    @property
    def address(self) -> str:
        return f"{self.label}@{self.space}"

    def select(self, rows: Rows) -> Rows:
        """Return the rows on which the task is defined."""
        defined = ~np.isnan(rows[self.label])
        if self.space == "click":
            defined &= rows["click"] == 1
        return {column: values[defined] for column, values in rows.items()}


CLICK, HAS_NEXT = Task("click", "all"), Task("has_next", "all")
TASKS = [CLICK, HAS_NEXT, Task("has_next", "click"), Task("long_read", "click"), Task("dwell", "click", "regression")]
COLUMNS = [*FEATURES, "request_id", "click", "has_next", "long_read", "dwell_ms"]

TABLE = {
    "click@all": ["auc", "gauc"],
    "has_next@all": ["auc", "gauc"],
    "has_next@click": ["auc", "auc_pos_gt_0"],
    "long_read@click": ["auc"],
    "dwell@click": ["mse"],
}


def read_day(data: Path, day: datetime.date) -> Rows:
    """Read the columns used of one day, and `dwell`: log1p of the dwell seconds."""
    folder = data / f"day={day}"
    if not folder.is_dir():
        needed = f"a folder for every day evaluated and for the {WINDOW_DAYS} days before the first"
        raise UserError("the day is missing", str(folder), "no such folder", needed, "check --data, --first, --through")
    dataset = pyarrow.dataset.dataset(folder, format="parquet", exclude_invalid_files=True)
    table = dataset.to_table(columns=COLUMNS)
    rows = {column: table[column].to_numpy() for column in COLUMNS}
    return rows | {"dwell": np.log1p(rows["dwell_ms"] / 1000)}


def import_lightgbm() -> ModuleType:
    """Import the one dependency that only this benchmark has."""
    try:
        import lightgbm
    except ImportError as error:
        raise UserError("lightgbm cannot be imported", got=str(error), do="pip install lightgbm") from error
    return lightgbm


def fit(window: Rows, seeds: int, num_threads: int) -> list[dict[str, Any]]:
    """Fit every task on the rows of `window`; returns for each seed the booster of each address."""
    lightgbm = import_lightgbm()
    models: list[dict[str, Any]] = [{} for _ in range(seeds)]
    for task in TASKS:
        rows = task.select(window)
        parameters = PARAMETERS | {"objective": task.objective, "num_threads": num_threads}
        dataset = lightgbm.Dataset(
            matrix(rows), rows[task.label], feature_name=FEATURES, categorical_feature=CATEGORICAL, params=parameters
        )
        for seed in range(seeds):  # the binned rows are shared: only the samples drawn from them differ
            drawn = {"bagging_seed": seed, "feature_fraction_seed": seed}
            models[seed][task.address] = lightgbm.train(parameters | drawn, dataset, NUM_ROUNDS)
    return models


def matrix(rows: Rows) -> np.ndarray:
    """Return the features (B, K) as LightGBM takes them."""
    return np.column_stack([rows[column].astype(np.float32) for column in FEATURES])


def evaluate_trees(models: dict[str, Any], day: Rows) -> Metrics:
    """Score a day with the boosters of one seed."""
    metrics: Metrics = {}
    for task in TASKS:
        rows = task.select(day)
        predictions = models[task.address].predict(matrix(rows))
        labels = rows[task.label]
        if task.objective == "regression":
            metrics[task.address] = {"mse": mse(predictions, labels)}
        else:
            metrics[task.address] = ranking(task, predictions, rows) | {"logloss": logloss(predictions, labels)}
        metrics[task.address] |= {"calibration": calibration(predictions, labels), "rows": len(labels)}
    return metrics


def evaluate_popularity(day: Rows) -> Metrics:
    """Score a day by the article's clicks in the previous hour: an order, not a probability."""
    scores = day["article_clicks_prev_hour"]
    return {task.address: ranking(task, scores, day) | {"rows": len(scores)} for task in (CLICK, HAS_NEXT)}


def ranking(task: Task, scores: np.ndarray, rows: Rows) -> dict[str, float]:
    """Return the metrics that depend on the order of the scores alone."""
    labels = rows[task.label]
    metrics = {"auc": auc(scores, labels)}
    if task.space == "all":
        metrics["gauc"], _, _ = gauc(scores, labels, rows["request_id"], GAUC_WEIGHTING)
    elif task.label == "has_next":  # sessions have two clicks or more: a first click always has a next one
        later = rows["pos_in_session"] > 0
        metrics["auc_pos_gt_0"] = auc(scores[later], labels[later])
    return metrics


def run(data: Path, first: datetime.date, through: datetime.date, seeds: int, num_threads: int) -> Results:
    """Score every day from `first` to `through` with every peer."""
    days = [first + datetime.timedelta(n) for n in range(-WINDOW_DAYS, (through - first).days + 1)]
    rows = [read_day(data, day) for day in days]
    results: Results = {"popularity": {"0": {}}, "lightgbm": {}, "lightgbm_frozen": {}}
    frozen: list[dict[str, Any]] = []
    for n in range(WINDOW_DAYS, len(days)):
        started, day = time.perf_counter(), str(days[n])
        window = {column: np.concatenate([r[column] for r in rows[n - WINDOW_DAYS : n]]) for column in rows[n]}
        refitted = fit(window, seeds, num_threads)
        frozen = frozen or refitted
        results["popularity"]["0"][day] = evaluate_popularity(rows[n])
        for peer, models in (("lightgbm", refitted), ("lightgbm_frozen", frozen)):
            for seed in range(seeds):
                results[peer].setdefault(str(seed), {})[day] = evaluate_trees(models[seed], rows[n])
        print(f"{day}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return results


def format_table(results: Results) -> str:
    """Lay out the mean over days of each peer, with the standard deviation over seeds of that mean."""
    lines = [f"{'mean over days +- sd over seeds':32}" + "".join(f"{peer:>18}" for peer in results)]
    for address, metrics in TABLE.items():
        for metric in metrics:
            cells = [summarize(seeds, address, metric) for seeds in results.values()]
            lines.append(f"{address + ' ' + metric:32}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def summarize(seeds: dict[str, dict[str, Metrics]], address: str, metric: str) -> str:
    values = [[day.get(address, {}).get(metric, math.nan) for day in days.values()] for days in seeds.values()]
    means = np.mean(values, axis=1)
    if np.isnan(means).any():
        return "-"
    return f"{means.mean():.4f}" + (f" +- {means.std(ddof=1):.4f}" if len(means) > 1 else "")


def describe(first: datetime.date, through: datetime.date) -> dict[str, Any]:
    """Return all that a reader of the numbers has to know of how they came about."""
    return {
        "order": "each day is scored before it is trained on",
        "days": [str(first), str(through)],
        "window_days": WINDOW_DAYS,
        "frozen_at": str(first - datetime.timedelta(1)),
        "gauc": f"by request_id, weighted by {GAUC_WEIGHTING}",
        "dwell": "log1p of seconds",
        "lightgbm": PARAMETERS | {"num_rounds": NUM_ROUNDS, "features": FEATURES},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.globo_peers", description="Popularity and LightGBM on globo_rank.")
    date = datetime.date.fromisoformat
    parser.add_argument("--data", type=Path, required=True, help="folder of globo_rank, with day=.../ inside")
    parser.add_argument("--first", type=date, default=date("2017-10-08"), help="first day evaluated")
    parser.add_argument("--through", type=date, default=date("2017-10-12"), help="last day evaluated")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the samples that LightGBM draws")
    parser.add_argument("--num-threads", type=int, default=2, help="threads of LightGBM")
    parser.add_argument("--json", type=Path, help="file for all metrics")
    options = parser.parse_args(arguments)
    if options.through < options.first or options.seeds < 1:
        parser.error("--through must not be before --first, and --seeds must be 1 or more")
    if options.json and not options.json.parent.is_dir():  # found out now, not after minutes of fitting
        parser.error(f"--json: there is no folder {options.json.parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    started = time.perf_counter()
    try:
        results = run(options.data, options.first, options.through, options.seeds, options.num_threads)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    print(f"{format_table(results)}\n{seconds:.0f} s; candidates that were not clicked are sampled")
    if options.json:
        protocol = describe(options.first, options.through) | {"seconds": round(seconds, 1)}
        options.json.write_text(json.dumps({"protocol": protocol, "peers": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
