"""Law 1 for every body with every graph under every balancer: one, two and three workers give one answer.

The rows are as uneven as they come: one worker has no row, another no click, labels are missing here and there, and
lists lie whole on one worker. Chance (dropout of ids, positions, gates and behaviours, noisy gates, negatives) is on.
"""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import threads
import torch

from embeddings.exchange import Exchange, LocalExchange
from embeddings.jagged import Jagged
from embeddings.table import TableConfig
from trainer.balance import BALANCERS
from trainer.bodies import BODIES
from trainer.config import (
    Config,
    DataConfig,
    FeatureConfig,
    ModelConfig,
    PositionConfig,
    PropensityConfig,
    TaskConfig,
    TrainConfig,
)
from trainer.data import Batch
from trainer.learner import build
from trainer.step import score_step, train_step

DAY = 738_000
ROWS, GROUP = 96, 4  # rows of a batch, and of a list in it
TABLES = {name: TableConfig(dim, 256, 0.5) for name, dim in {"user": 8, "item": 8, "position": 4, "done": 4}.items()}
FEATURES = {
    "user": FeatureConfig("id", table="user", dropout=0.2),
    "item": FeatureConfig("id", table="item"),
    "history": FeatureConfig("ids", table="item", pool="none", max_len=5),
    "done": FeatureConfig("ids", table="done", pool="none", max_len=5),
    "position": FeatureConfig("id", table="position"),
    "price": FeatureConfig("number"),
}
SETTINGS: dict[str, dict[str, Any]] = {  # of a body, small; with what it leaves to chance
    "separate": {"layers": [8, 4]},
    "soft_sharing": {"layers": [8, 4], "strength": 0.1},
    "shared_bottom": {"layers": [8, 4]},
    "omoe": {"num_experts": 3, "expert_layers": [8, 4], "gate_dropout": 0.2},
    "mmoe": {"num_experts": 3, "expert_layers": [8, 4], "gate_dropout": 0.2, "activation": "swish", "normalise": True},
    "sparse_moe": {"num_experts": 4, "top_k": 2, "expert_layers": [8, 4]},
    "stacked_moe": {"num_experts": 2, "expert_layers": [6], "gate_dropout": 0.2},
    "ple": {"num_levels": 2, "expert_layers": [6], "gate_dropout": 0.2},
}
WATCH = {"watch": TaskConfig(loss={"kind": "huber"}, where="click", transform="log1p")}
GRAPHS: dict[str, dict[str, TaskConfig]] = {
    "independent": {"click": TaskConfig(), "cart": TaskConfig(where="click"), **WATCH},
    "ESMM": {"click": TaskConfig(positive_weight=2.0), "cart": TaskConfig(given="click"), **WATCH},
    "ESM2": {
        "click": TaskConfig(negatives_kept=0.5),
        "cart": TaskConfig(given="click"),
        "buy": TaskConfig(given="click", via="cart"),
    },
    "DBMTL": {"click": TaskConfig(), "cart": TaskConfig(given="click", links=("click",)), **WATCH},
    "AITM": {"click": TaskConfig(), "cart": TaskConfig(transfer="click"), "buy": TaskConfig(transfer="cart")},
    "NMTR": {"click": TaskConfig(), "cart": TaskConfig(cascade="click"), "buy": TaskConfig(cascade="cart")},
    "ESCM2-IPS": {"click": TaskConfig(), "cart": TaskConfig(given="click", propensity=PropensityConfig("ips"))},
    "ESCM2-DR": {"click": TaskConfig(), "cart": TaskConfig(given="click", propensity=PropensityConfig("dr"))},
    "lists": {
        "click": TaskConfig(),
        "order": TaskConfig(label="cart", loss="bpr", head="click"),
        "grade": TaskConfig(label="buy", loss={"kind": "approx_ndcg"}),
    },
    "watch time": {
        "click": TaskConfig(),
        "by_rank": TaskConfig(loss={"kind": "d2q", "by": "price", "lengths": [1.0, 3.0], "bins": 32}),
        "by_steps": TaskConfig(loss={"kind": "cread", "thresholds": [0.5, 1.0, 2.0]}, where="click"),
    },
}
BALANCE: dict[str, dict[str, Any]] = {
    "fixed": {"weights": {"click": 2.0}},
    "dwa": {"window": 1},
    "gradnorm": {"first": 1},
}
AUXILIARY = {
    "match": {"kind": "matching", "user": ["user"], "item": ["item"], "label": "click", "layers": [6, 4]},
    "near": {"kind": "correlation", "sequence": "history", "layers": [6, 4]},
}


def config(body: str, graph: str, balance: str, **model: Any) -> Config:
    position = PositionConfig(("position",), ("click",), dropout=0.3, layers=(4,))
    settings = ModelConfig(
        {"kind": body} | SETTINGS[body],
        (4,),
        position=position,
        balance={"kind": balance} | BALANCE.get(balance, {}),
    )
    data, train = DataConfig("-", group="request"), TrainConfig(seed=4)
    return Config("all", data, FEATURES, TABLES, GRAPHS[graph], replace(settings, **model), train)


def logged(tasks: int, extra: int, seed: int) -> Batch:
    """Random rows in lists of four; the first third without a click; nulls among ids, numbers and labels."""
    rng = np.random.default_rng(seed)
    lengths = {name: torch.from_numpy((rng.random(ROWS) < 0.9).astype(int)) for name in ("user", "item", "position")}
    lengths |= dict.fromkeys(("history", "done"), torch.from_numpy(rng.integers(0, 6, ROWS)))
    ids = {
        name: Jagged.from_lengths(torch.from_numpy(rng.integers(0, 30, int(of.sum()))), of)
        for name, of in lengths.items()
    }
    numbers = rng.gamma(2, 1, (ROWS, 1)).astype(np.float32)
    labels = rng.integers(0, 2, (ROWS, tasks)).astype(np.float32)
    for values in (numbers, labels):
        values[rng.random(values.shape) < 0.1] = np.nan
    labels[: ROWS // 3, 0] = 0
    labels = np.concatenate([labels, numbers[:, [0] * extra]], axis=1)
    weights = rng.random((ROWS, 1)).astype(np.float32).repeat(tasks + extra, 1)
    group = torch.arange(ROWS) // GROUP
    columns = [torch.from_numpy(values) for values in (numbers, labels, weights)]
    return Batch(ids, *columns, torch.from_numpy(rng.permutation(10_000)[:ROWS]), group, lane_B=group // 2)


def share(batch: Batch, rank: int, num_workers: int, step: int) -> Batch:
    """Whole lanes of eight rows: first one worker has no row, then one has no click."""
    cuts = {1: [], 2: [[0], [32]][step], 3: [[0, 40], [32, 48]][step]}[num_workers]
    return batch.select(torch.arange(ROWS).tensor_split(cuts)[rank])


def steps(exchange: Exchange, settings: Config) -> dict[str, Any]:
    """Two steps: losses and weights, dense gradients, and scores of this worker's rows."""
    torch.manual_seed(0)
    learner = build(settings, exchange)
    found: dict[str, Any] = {"losses": [], "weights": [], "gradients": [], "scores": []}
    for step in range(2):
        whole = logged(len(settings.tasks), len(learner.graph.by), seed=step)
        batch = share(whole, exchange.rank, exchange.num_workers, step)
        losses, weights = train_step(learner, batch, DAY)
        gradients = [p.grad.flatten() for p in learner.named_parameters().values() if p.grad is not None]
        found["losses"].append(losses.numpy())
        found["weights"].append(weights.numpy())
        found["gradients"].append(torch.cat(gradients).numpy())
        found["scores"].append(score_step(learner, batch).numpy())
    found["ranking"] = [np.array([learner.graph.tasks[name].loss.in_lists for name in learner.graph.with_head])]
    return found


def assert_one_answer(settings: Config) -> None:
    want = steps(LocalExchange(), settings)
    assert all(np.isfinite(np.concatenate([each.ravel() for each in parts])).all() for parts in want.values())
    for num_workers in (2, 3):
        found = threads.run(num_workers, functools.partial(steps, settings=settings))
        for worker in found:
            for what in ("losses", "weights", "gradients"):
                # the first step: one worker's float32 sums in another order
                close(worker[what][0], want[what][0], 1e-5, f"{num_workers} workers: {what}")
            close(worker["losses"][1], want["losses"][1], 1e-5, f"{num_workers} workers: losses after a step")
        for step in range(2):
            scores = np.concatenate([worker["scores"][step] for worker in found])
            ranking = want["ranking"][0]
            for each in (scores, want["scores"][step]) if ranking.any() else ():
                each[:, ranking] -= each[:, ranking].mean(0)  # it has no zero: where it lies is rounding
            close(scores, want["scores"][step], 1e-5, f"{num_workers} workers: scores")


def close(got: np.ndarray, want: np.ndarray, relative: float, what: str) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=relative * max(np.abs(want).max(), 1e-3), err_msg=what)


@pytest.mark.slow
@pytest.mark.parametrize("balance", BALANCERS)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("body", BODIES)
def test_the_number_of_workers_changes_no_loss_weight_gradient_or_score(body: str, graph: str, balance: str) -> None:
    assert_one_answer(config(body, graph, balance))


def test_every_body_has_settings_here() -> None:
    assert SETTINGS.keys() == BODIES.keys()
