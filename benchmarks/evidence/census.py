"""(b) Census-Income: two pairs of tasks on 300,000 real rows, the first benchmark of the MMoE paper.

In: the folder with train.parquet and test.parquet (the set's 42 columns and label_income, label_never_married,
label_college), named by DAYBREAK_CENSUS. 199,523 rows to train on; of the 99,762 others one half decides when to stop,
the other half is the test. Columns of up to 100 values are embedded, amounts are log1p and standardised. The learning
rate was settled on the half that decides (`python -m benchmarks.evidence.census` prints the grid).

Source: Ma et al.: Modeling task relationships in multi-task learning with multi-gate mixture-of-experts, KDD 2018,
section 6.2, tables 1 and 2.
"""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.evidence.fit import Rows, batches, fit, logits
from benchmarks.evidence.part import (
    Found,
    Part,
    Report,
    Row,
    Sample,
    Trial,
    by_seed,
    judged,
    paired,
    sample,
    surely_above,
    table,
)
from trainer.bodies import BODIES, Body
from trainer.draws import Draws
from trainer.features import Inputs
from trainer.heads import Task, TaskGraph
from trainer.metrics import auc
from trainer.model import MultiTaskModel, Outputs
from trainer.towers import Towers

AMOUNTS = ["age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "weeks_worked"]
MOST_VALUES, DIM, BATCH, EPOCHS, PATIENCE = 100, 4, 2048, 6, 2
TOWER = 32  # of 8 ReLU units, as the paper's synthetic model has, all may die within a pass: a constant score


class Group(NamedTuple):
    """A pair of tasks, and the columns that would give their labels away."""

    tasks: tuple[str, str]
    without: tuple[str, ...]


GROUPS = {
    "income": Group(("income", "never_married"), ("marital_stat", "income_50k")),
    "college": Group(("college", "never_married"), ("education", "marital_stat", "income_50k")),
}
RATE, RATES = 0.008, (0.004, 0.008)  # on income's half that decides, the higher one was the better for every model
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("shared_bottom", {"layers": (64, 32)}),
    "shared_bottom": ("shared_bottom", {"layers": (128, 32)}),
    "soft_sharing": ("soft_sharing", {"layers": (64, 32)}),
    "omoe": ("omoe", {"num_experts": 4, "expert_layers": (32, 32)}),
    "mmoe": ("mmoe", {"num_experts": 4, "expert_layers": (32, 32)}),
    "ple": ("ple", {"own_experts": 1, "shared_experts": 2, "expert_layers": (32, 32)}),
}
PAPER = {  # mean AUC of 400 runs, main task and the other one
    "single": {"income": (0.9337, 0.9922), "college": (0.8792, None)},
    "shared_bottom": {"income": (0.9295, 0.9921), "college": (0.8813, None)},
    "soft_sharing": {"income": (0.9359, 0.9918), "college": (0.8823, None)},
    "omoe": {"income": (0.9319, 0.9923), "college": (0.8813, None)},
    "mmoe": {"income": (0.9359, 0.9927), "college": (0.8826, None)},
}


def folder() -> Path:
    return Path(os.environ.get("DAYBREAK_CENSUS", "data/census_income"))


def lacks() -> str:
    there = (folder() / "train.parquet").exists() and (folder() / "test.parquet").exists()
    return "" if there else "DAYBREAK_CENSUS does not name the folder with Census-Income's train.parquet, test.parquet"


class Census(NamedTuple):
    """x: the amounts, then a code for each embedded column, all float32; sizes: of these columns, how many codes."""

    train: Rows
    valid: Rows
    test: Rows
    sizes: tuple[int, ...]


@cache
def read(group: str) -> Census:
    import pandas

    tasks, without = GROUPS[group]
    train, test = (pandas.read_parquet(folder() / f"{part}.parquet") for part in ("train", "test"))
    both = pandas.concat([train, test], ignore_index=True)
    labels_BT = torch.tensor(both[[f"label_{task}" for task in tasks]].to_numpy(np.float32))
    both = both.drop(columns=[*without, "instance_weight", *(c for c in both if c.startswith("label_"))])
    amounts = np.log1p(both[AMOUNTS].to_numpy(np.float64))
    amounts = (amounts - amounts[: len(train)].mean(0)) / amounts[: len(train)].std(0)
    columns = [column for column in both if both[column].nunique() <= MOST_VALUES]
    codes = np.stack([pandas.factorize(both[column], sort=True)[0] for column in columns], axis=1)
    rows = Rows(torch.tensor(np.hstack([amounts, codes]).astype(np.float32)), labels_BT)
    other = len(train) + torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    halves = other[: len(test) // 2], other[len(test) // 2 :]
    valid, rest = map(rows.take, halves)
    return Census(rows.take(slice(0, len(train))), valid, rest, tuple((1 + codes.max(0)).tolist()))


class Embedded(MultiTaskModel):
    """Our model behind embeddings of the columns."""

    def __init__(self, body: Body, towers: Towers, sizes: tuple[int, ...]):
        super().__init__(body, towers)
        self.rows = nn.Embedding(sum(sizes), DIM)
        self.register_buffer("first_F", torch.tensor([0, *sizes[:-1]]).cumsum(0))
        nn.init.normal_(self.rows.weight, std=0.1)

    def forward(self, inputs: Inputs, draws: Draws | None) -> Outputs:
        numbers_BK, codes_BF = inputs.x_BI[:, : len(AMOUNTS)], inputs.x_BI[:, len(AMOUNTS) :]
        pulled_BI = self.rows(codes_BF.long() + self.get_buffer("first_F")).flatten(1)
        return super().forward(replace(inputs, x_BI=torch.cat([numbers_BK, pulled_BI], dim=1)), draws)


def trials(short: bool, seeds: int | None) -> list[Trial]:
    models, groups = (("shared_bottom", "mmoe"), ("income",)) if short else (("lightgbm", *MODELS), tuple(GROUPS))
    num, epochs = (seeds or 1, 1) if short else (seeds or 5, EPOCHS)
    return [
        {"model": model, "group": group, "epochs": epochs, "seed": seed}
        for seed in range(num)
        for group in groups
        for model in models
    ]


def measure(model: str, group: str, epochs: int, seed: int) -> dict[str, float]:
    """Test AUC of both tasks, main and other; of the main one on the half that decides."""
    census = read(group)
    valid_BT, test_BT = scores(model, census, epochs, seed)
    return {
        "main": area(test_BT, census.test, 0),
        "other": area(test_BT, census.test, 1),
        "valid": area(valid_BT, census.valid, 0),
    }


def scores(model: str, census: Census, epochs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of the half that decides and of the test's, both tasks side by side: [B, T]."""
    if model == "lightgbm":
        return trees(census, seed)
    if model == "single":
        parts = [neural(model, one_task(census, task), 1, epochs, seed) for task in range(2)]
        valid_BT, test_BT = (torch.cat(halves, dim=1) for halves in zip(*parts, strict=True))
        return valid_BT, test_BT
    return neural(model, census, 2, epochs, seed)


def area(scores_BT: Tensor, rows: Rows, task: int) -> float:
    return auc(scores_BT[:, task].numpy(), rows.labels_BT[:, task].numpy())


def one_task(census: Census, task: int) -> Census:
    train, valid, test = (replace(part, labels_BT=part.labels_BT[:, [task]]) for part in census[:3])
    return Census(train, valid, test, census.sizes)


def neural(
    name: str, census: Census, num_tasks: int, epochs: int, seed: int, rate: float = RATE
) -> tuple[Tensor, Tensor]:
    """Scores [B, T] of both halves, from the weights that were best for the main task on the one that decides."""
    torch.manual_seed(seed)
    kind, settings = MODELS[name]
    graph = TaskGraph({f"task {t}": Task() for t in range(num_tasks)})
    body = BODIES[kind](len(AMOUNTS) + DIM * len(census.sizes), num_tasks, **settings)
    model = Embedded(body, Towers(graph.heads, body.output_dim, (TOWER,)), census.sizes)
    steps = len(census.train) // BATCH
    fit(
        model,
        graph,
        batches(census.train, BATCH, steps * epochs, seed),
        rate=rate,
        seed=seed,
        check=lambda: -area(logits(model, census.valid), census.valid, 0),
        every=steps // 2,
        patience=2 * PATIENCE,
    )
    return logits(model, census.valid), logits(model, census.test)


def trees(census: Census, seed: int) -> tuple[Tensor, Tensor]:
    """Boosted trees, for each task its own, stopped by the half that decides."""
    import lightgbm

    parts: list[list[np.ndarray]] = [[], []]
    parameters = {"objective": "binary", "metric": "auc", "learning_rate": 0.1, "num_threads": 1, "verbose": -1}
    drawn = {"seed": seed, "bagging_fraction": 0.8, "bagging_freq": 1, "feature_fraction": 0.8}
    codes = list(range(len(AMOUNTS), census.train.x_BI.shape[1]))
    for task in range(2):
        train, valid = (
            lightgbm.Dataset(rows.x_BI.numpy(), rows.labels_BT[:, task].numpy().copy(), categorical_feature=codes)
            for rows in census[:2]
        )
        stop = lightgbm.early_stopping(50, verbose=False)
        booster = lightgbm.train(parameters | drawn, train, 1000, valid_sets=[valid], callbacks=[stop])
        for half, rows in zip(parts, census[1:3], strict=True):
            half.append(np.asarray(booster.predict(rows.x_BI.numpy(), raw_score=True)))
    valid_BT, test_BT = (torch.tensor(np.stack(half, axis=1)) for half in parts)
    return valid_BT, test_BT


def report(results: Found) -> Report:
    rows = [
        Row(
            f"MMoE reaches a mean AUC of {PAPER['mmoe'][group][0]:.4f} (main task: {group})",
            f"Ma et al. 2018, table {number}",
            aucs(results, "mmoe", group).show(),
            level(results, group),
        )
        for number, group in enumerate(GROUPS, start=1)
    ]
    rows += [
        Row(
            f"MMoE beats {title}",
            source,
            "AUC MMoE - other: "
            + ", ".join(f"{group} {ahead(results, name, group).against_zero()}" for group in GROUPS),
            judged(*(surely_above(ahead(results, name, group)) for group in GROUPS)),
        )
        for name, (title, source) in CLAIMS.items()
    ]
    rows.append(
        Row(
            "PLE beats MMoE",
            "Tang et al. 2020, on other data",
            "AUC PLE - MMoE: " + ", ".join(f"{group} {progress(results, group).against_zero()}" for group in GROUPS),
            judged(*(surely_above(progress(results, group)) for group in GROUPS)),
        )
    )
    return Report(rows, "\n\n".join([TEXT, *(_means(results, group) for group in GROUPS)]))


CLAIMS = {  # what MMoE is said to beat
    "shared_bottom": ("a shared bottom", "Ma et al. 2018, tables 1 and 2"),
    "omoe": ("OMoE", "the same"),
    "soft_sharing": ("soft sharing (L2)", "the same (a tie in one of the two)"),
    "single": ("a network for each task", "the same"),
}
WITHIN = 0.003  # of the paper's mean: what other embeddings and other halves may cost
TEXT = f"""Main task and the other one: AUC on the half of the test rows that decided nothing, mean over seeds. All
models have embeddings of {DIM} floats, batches of {BATCH}, at most {EPOCHS} passes, and stop by the main task's AUC on
the other half; their learning rate was settled there too, on the income tasks. A difference counts where its 95 %
interval is on one side of 0. The paper's numbers are means of 400 runs; its embeddings, halves and search are not ours,
so differences say more than levels: its gap between MMoE and the shared bottom is 0.0064 on income."""


def aucs(results: Found, model: str, group: str, value: str = "main") -> Sample:
    return sample(by_seed(results, value, model=model, group=group))


def ahead(results: Found, other: str, group: str) -> Sample:
    """By how much MMoE is better in the main task, seed by seed."""
    mine, others = (by_seed(results, "main", model=model, group=group) for model in ("mmoe", other))
    return paired(mine, others)


def progress(results: Found, group: str) -> Sample:
    return Sample(-ahead(results, "ple", group).values)


def level(results: Found, group: str) -> str:
    """The verdict on MMoE's mean beside the paper's."""
    mine = aucs(results, "mmoe", group)
    if not len(mine):
        return judged()
    more = mine.mean - PAPER["mmoe"][group][0]
    if more < -WITHIN:
        return "not reproduced"
    return "reproduced" if more <= WITHIN else f"reproduced: ours is {more:.4f} higher"


def _means(results: Found, group: str) -> str:
    lines = []
    for model in (*MODELS, "lightgbm"):
        main, other = aucs(results, model, group), aucs(results, model, group, "other")
        theirs = [f"{mean:.4f}" if mean else "" for mean in PAPER.get(model, {}).get(group, (None, None))]
        ours = [f"{main.show()} ({len(main)})", other.show()] if len(main) else ["", ""]
        lines.append([model, *ours, *theirs])
    main_task, other_task = GROUPS[group].tasks
    header = [f"AUC (runs): {group}", main_task, other_task, f"paper: {main_task}", f"paper: {other_task}"]
    return table(header, lines)


PART = Part("Census-Income: MMoE beside the others on real data", trials, measure, report, lacks)


def tune() -> None:
    """The grid over learning rates: AUC of the main task on the half that decides, after four passes, with a seed
    that is used nowhere else.
    """
    for group in GROUPS:
        for name in MODELS:
            num_tasks = 1 if name == "single" else 2
            census = one_task(read(group), 0) if name == "single" else read(group)
            for rate in RATES:
                valid_BT, _ = neural(name, census, num_tasks, 4, 1000, rate)
                print(f"{group} {name} {rate}: {area(valid_BT, census.valid, 0):.4f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tune()
