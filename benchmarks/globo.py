"""Does retraining every night pay, and every hour; do id statistics, does the body matter? Our models and their peers
on globo_rank, the same protocol for all.

In: the folder with day=2017-10-01/ and so on, and the peers' metrics (benchmarks.globo_peers --json). Out:
docs/results.md. Each day is scored before it is trained on; `frozen` scores all days with the model of the day before
the first; `every hour` scores each hour before it is trained on, and a day's metrics are those of its hours' rows
together. Differences are paired by seed and day.

    python -m benchmarks.globo --data PATH --peers PEERS.json [--seeds 3] [--out docs/results.md]
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Metrics = dict[str, dict[str, Any]]  # address -> metric -> value
Results = dict[str, dict[str, dict[str, Metrics]]]  # model -> seed -> day -> metrics

CONFIG = "configs/globo.yaml"
MODELS: dict[str, list[str]] = {  # overrides of the configuration
    "MMoE": [],
    "MMoE without id statistics": [],
    "shared-bottom": ["model.body={kind: shared_bottom, layers: [256, 64]}"],
}
HOURLY = ["data.period=hour", "data.time=ts_ms", "data.time_zone=America/Sao_Paulo"]
COLUMNS = {
    "click@all": ("auc", "gauc", "calibration"),
    "has_next@all": ("auc",),
    "has_next@click": ("auc",),
    "long_read@click": ("auc",),
    "dwell@click": ("mse",),
}
PAIRED = ("click@all", "has_next@all", "long_read@click")


def run(
    body: str, seed: int, data: str, first: datetime.date, through: datetime.date
) -> tuple[str, int, dict[str, Any]]:
    """One model through all days, in this process; returns its metrics by day, those of the frozen model, and its
    parameters.
    """
    import torch

    from cluster.nightly import look, open_checkpoints, train
    from cluster.predict import evaluate
    from trainer.configfile import load
    from trainer.intervals import Interval
    from trainer.learner import build_model, open_logs

    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"data.path={data}", f"checkpoints.path={folder}", f"train.seed={seed}", *MODELS[body]]
        config = load(CONFIG, overrides)
        if body.endswith("without id statistics"):
            logged = {name: feature for name, feature in config.features.items() if feature.kind != "id_stats"}
            config = dataclasses.replace(config, features=logged)
        checkpoints = open_checkpoints(config)
        plans = look(config, open_logs(config), checkpoints, None, Interval(through)).plans
        train(config, plans, use_ray=False, on_event=lambda event: None)
        days = [plan.interval for plan in plans if plan.interval.day >= first]
        updated = {str(day): checkpoints.open(day).report["metrics"] for day in days}
        last_before = Interval(first - datetime.timedelta(days=1))
        quiet = {"use_ray": False, "on_event": lambda event: None}
        frozen = {str(day): evaluate(config, day, last_before, **quiet)["metrics"] for day in days}  # type: ignore[arg-type]
        parameters = sum(p.numel() for p in build_model(config).parameters())
    seconds = time.perf_counter() - started
    print(f"{body}, seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return body, seed, {"updated": updated, "frozen": frozen, "parameters": parameters, "seconds": seconds}


def run_by_hour(seed: int, data: str, first: datetime.date, through: datetime.date) -> dict[str, Metrics]:
    """The MMoE through all hours, each scored before it is trained on, in this process; returns its metrics by day."""
    import torch

    from embeddings.exchange import LocalExchange
    from trainer.configfile import load
    from trainer.counted import Counted
    from trainer.day import defined, shares, train_day
    from trainer.intervals import Interval
    from trainer.learner import build, open_logs
    from trainer.metrics import Evaluation
    from trainer.step import score_step

    torch.set_num_threads(1)
    started = time.perf_counter()
    config = load(CONFIG, [f"data.path={data}", f"train.seed={seed}", *HOURLY])
    learner, logs = build(config, LocalExchange()), open_logs(config)
    how = config.train.batch_size, config.data.lanes
    evaluations: dict[str, Evaluation] = {}
    for interval in logs.intervals(None, Interval(through, 23)):
        plan = logs.plan(interval, None)
        if interval.day >= first:
            graph = learner.graph
            of_day = evaluations.setdefault(str(interval.day), Evaluation(graph.addresses, config.data.gauc))
            for batch in shares(learner, logs, plan, *how):
                predictions = graph.predictions(score_step(learner, batch), batch.labels_BT)
                for address, answers_B in graph.answers(batch.labels_BT).items():
                    of_day.add(address, predictions[address], answers_B, batch.groups_B)
        train_day(learner, logs, plan, *how, lambda phase, rows: None, Counted(learner))
    print(f"MMoE by hour, seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return {day: defined(evaluation.compute()) for day, evaluation in evaluations.items()}


def gather(options: argparse.Namespace) -> tuple[Results, dict[str, int]]:
    """All bodies and seeds, a few processes side by side."""
    results: Results = {}
    parameters = {}
    jobs = [
        (body, seed, options.data, options.first, options.through) for seed in range(options.seeds) for body in MODELS
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        for body, seed, found in pool.map(run, *zip(*jobs, strict=True)):
            results.setdefault(f"{body}, every night", {})[str(seed)] = found["updated"]
            results.setdefault(f"{body}, frozen", {})[str(seed)] = found["frozen"]
            parameters[body] = found["parameters"]
        hourly = partial(run_by_hour, data=options.data, first=options.first, through=options.through)
        for seed, by_day in enumerate(pool.map(hourly, range(options.seeds))):
            results.setdefault("MMoE, every hour", {})[str(seed)] = by_day
    return results, parameters


def values(seeds: dict[str, dict[str, Metrics]], address: str, metric: str) -> np.ndarray:
    """[seeds, days]; NaN where a model does not have the metric."""
    found = [[day.get(address, {}).get(metric) for day in days.values()] for days in seeds.values()]
    return np.array(found, dtype=float)


def table(results: Results) -> list[str]:
    """Means over the days, with the standard deviation over the seeds."""
    metrics = [(address, metric) for address, of in COLUMNS.items() for metric in of]
    lines = ["| model | " + " | ".join(f"{a} {m}" for a, m in metrics) + " |", "|---|" + "---|" * len(metrics)]
    for model, seeds in results.items():
        cells = []
        for address, metric in metrics:
            means = values(seeds, address, metric).mean(axis=1)
            spread = f" ± {means.std(ddof=1):.4f}" if len(means) > 1 else ""
            cells.append("-" if np.isnan(means).any() else f"{means.mean():.4f}{spread}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def paired(results: Results, base: str) -> list[str]:
    """Each model's AUC minus the base's on the same day and seed: the mean, its standard error over the seeds, and
    wins.
    """
    lines = ["| minus " + base + " | " + " | ".join(PAIRED) + " |", "|---|" + "---|" * len(PAIRED)]
    for model in [m for m in results if m != base]:
        cells = []
        for address in PAIRED:
            theirs, ours = values(results[model], address, "auc"), values(results[base], address, "auc")
            if np.isnan(theirs).any():
                cells.append("-")
                continue
            difference = theirs - ours  # one seed of a peer without chance is set against every seed of ours
            error = difference.mean(axis=1).std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.nan
            cells.append(
                f"{difference.mean():+.4f} ± {error:.4f} ({int((difference > 0).sum())} of {difference.size} higher)"
            )
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def calibrations(results: Results, base: str) -> list[str]:
    days = list(next(iter(results[base].values())))
    lines = [
        "| day | " + " | ".join(f"seed {seed}" for seed in results[base]) + " |",
        "|---|" + "---|" * len(results[base]),
    ]
    for day in days:
        cells = [f"{of[day]['click@all']['calibration']:.3f}" for of in results[base].values()]
        lines.append(f"| {day} | " + " | ".join(cells) + " |")
    return lines


def page(results: Results, parameters: dict[str, int], options: argparse.Namespace) -> str:
    base = "MMoE, every night"
    sizes = ", ".join(f"{body} {size:,}" for body, size in parameters.items())
    return "\n".join(
        [
            "# Results on real data",
            "",
            "Written by `python -m benchmarks.globo`; do not edit by hand. The ranking view of the Globo.com click log",
            "(2.4 million rows in 12 days; clicks, dwell and what follows real, candidates not clicked sampled)",
            "and `configs/globo.yaml`. Every day is scored before it is trained on; means over",
            f"{options.first} .. {options.through} and {options.seeds} seeds, ± the standard deviation over the seeds.",
            f"Dense parameters: {sizes}. `frozen` scores all days with the model of the day before the first.",
            "`every hour` scores and trains on each hour of the log's clock (America/Sao_Paulo).",
            "LightGBM sees the given columns, refitted every day on the five days before it. Id statistics: what",
            "happened to user and article until the day before, counted by the embedding store (`kind: id_stats`).",
            "",
            *table(results),
            "",
            "has_next is certain after a session's first click (the log keeps sessions of two clicks or more), which",
            "lifts has_next@click for all.",
            "",
            "## Paired differences of AUC",
            "",
            "On the same days and seeds; ± is the standard error over the seeds of the mean over days.",
            "",
            *paired(results, base),
            "",
            "## Calibration of click, by day",
            "",
            "Sum of predictions over sum of clicks, MMoE every night.",
            "",
            *calibrations(results, base),
            "",
            "## To repeat",
            "",
            "    pip install lightgbm",
            "    python -m benchmarks.globo_peers --data PATH --json peers.json",
            "    python -m benchmarks.globo --data PATH --peers peers.json --out docs/results.md",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.globo", description=__doc__.splitlines()[0] if __doc__ else "")
    date = datetime.date.fromisoformat
    parser.add_argument("--data", required=True, help="folder of globo_rank, with day=.../ inside")
    parser.add_argument("--peers", type=Path, help="what benchmarks.globo_peers --json wrote")
    parser.add_argument("--first", type=date, default=date("2017-10-08"), help="first day evaluated")
    parser.add_argument("--through", type=date, default=date("2017-10-12"), help="last day evaluated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="models trained side by side, one thread each")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--json", type=Path, help="file for all metrics")
    options = parser.parse_args()
    results, parameters = gather(options)
    if options.peers:
        results |= json.loads(options.peers.read_text())["peers"]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    options.out.write_text(page(results, parameters, options))
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
