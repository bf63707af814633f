"""Everything that learns, in one place: rows, dense net, optimizer, running statistics. What a checkpoint holds is
what is here.
"""

from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from embeddings.client import ShardedEmbeddings
from embeddings.exchange import Exchange
from embeddings.optim import OPTIMIZERS, RowOptimizer
from embeddings.shard import Shard
from embeddings.tallies import Tally
from trainer.config import Config, FeatureConfig, nearest
from trainer.data import Batch, Logs, Schema
from trainer.draws import Draws
from trainer.errors import UserError
from trainer.features import Features, IdFeature, IdStatistics
from trainer.heads import Task, TaskGraph
from trainer.model import MultiTaskModel, PositionTower, make_body
from trainer.numbers import NumberStats

_PAYLOADS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Learner:
    """One worker's part of the model. The dense net, its optimizer and the statistics are the same on every worker.

    averaged: the moving average of the dense net's weights, which scores and serves. One pass over a day at a constant
    rate leaves the weights leaning towards its last hours; their average ranks better and is calibrated better. Source:
    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, 1992.

    order: the names of the features and of the tasks, which the dense net knows by their places only.
    """

    exchange: Exchange
    embeddings: ShardedEmbeddings
    features: Features
    model: MultiTaskModel
    averaged: AveragedModel
    graph: TaskGraph
    optimizer: torch.optim.Adam
    stats: NumberStats
    loss_weights_T: Tensor
    autocast: bool
    seed: int
    device: torch.device
    order: dict[str, list[str]]

    def draws(self, batch: Batch, day: int) -> Draws:
        """The chance of a batch's rows in training; day: its ordinal."""
        return Draws(batch.row_B, self.seed, day)

    def happened(self, batch: Batch) -> Tensor:
        """Which events happened on each row, 0 where it is not known: [B, L], in the order of the shard's labels."""
        events = [list(self.graph.tasks).index(label) for label in self.embeddings.shard.labels]
        return batch.labels_BT[:, events].nan_to_num(0.0)


def build(config: Config, exchange: Exchange, device: torch.device | None = None) -> Learner:
    """A new, untrained learner. Same configuration and seed: same weights, on every worker."""
    device = device or torch.device("cpu")
    features = _features(config)
    model = build_model(config).to(device)
    shard = Shard(
        config.tables,
        row_optimizer(config),
        exchange,
        tallies=_tallies(config),
        labels=[name for name, task in config.tasks.items() if task.loss == "bce"],
        seed=config.train.seed,
        device=device,
    )
    tables = {name: f.table or "" for name, f in config.features.items() if f.kind in ("id", "ids")}
    own = [name for name, feature in config.features.items() if feature.kind == "id"]
    return Learner(
        exchange=exchange,
        embeddings=ShardedEmbeddings(shard, tables, own=own, payload=_PAYLOADS[config.train.payload]),
        features=features,
        model=model,
        averaged=AveragedModel(model, multi_avg_fn=partial(_average, config.train.dense.average)),
        graph=TaskGraph(_tasks(config)),
        optimizer=torch.optim.Adam(model.parameters(), lr=config.train.dense.lr),
        stats=NumberStats(features.num_numbers, device),
        loss_weights_T=torch.tensor(
            [config.model.balance.weights.get(name, 1.0) for name in config.tasks], device=device
        ),
        autocast=config.train.precision == "bf16",
        seed=config.train.seed,
        device=device,
        order={"features": list(config.features), "tasks": list(config.tasks)},
    )


def row_optimizer(config: Config) -> RowOptimizer:
    """The row optimizer that a configuration names, with its settings."""
    settings = {name: value for name, value in asdict(config.train.rows).items() if value is not None}
    kind = settings.pop("optimizer")
    known = [field.name for field in fields(OPTIMIZERS[kind])]
    for name, value in settings.items():
        if name not in known:
            place, do = f"train.rows.{name}", f"drop it; {kind} knows {', '.join(known)}"
            raise UserError(f"not a setting of {kind}", place, got=str(value), do=do)
    optimizer: RowOptimizer = OPTIMIZERS[kind](**settings)
    return optimizer


def build_model(config: Config) -> MultiTaskModel:
    """The dense net with its first weights, drawn from the seed."""
    torch.manual_seed(config.train.seed)
    features, names = _features(config), list(config.tasks)
    body = make_body(config.model.body, features.input_dim, len(names))
    position = None
    if shallow := config.model.position:
        dims = [feature.dim for feature in features.position.values()]
        position = PositionTower(dims, shallow.layers, [names.index(task) for task in shallow.tasks], len(names))
    return MultiTaskModel(body, len(names), config.model.tower_layers, position)


def check(config: Config) -> None:
    """Refuse what only the model itself can tell: a body that cannot be built, addresses that no prediction has."""
    build_model(config)
    row_optimizer(config)
    addresses = TaskGraph(_tasks(config)).addresses
    events = [address for address, kind in addresses.items() if kind == "binary"]
    wanted = {"nightly.gate.addresses": (config.nightly.gate.addresses, events)}
    wanted["fusion.powers"] = (tuple(config.fusion.powers), list(addresses))
    for place, (names, known) in wanted.items():
        for name in names:
            if name not in known:
                raise UserError(f"no prediction has the address '{name}'", place, do=nearest(name, known))


@torch.no_grad()
def _average(keep: float, averaged: list[Tensor], current: list[Tensor], steps: Any) -> None:
    """Move the average towards the current weights; young averages move faster, so that the first weights are soon
    forgotten.
    """
    n = float(steps)
    torch._foreach_lerp_(averaged, current, 1 - min(keep, (1 + n) / (10 + n)))


def open_logs(config: Config) -> Logs:
    """The logs that a configuration names, with the columns that its features and tasks need."""
    ids = {name: f.column or name for name, f in config.features.items() if f.kind in ("id", "ids")}
    numbers = {name: f.column or name for name, f in config.features.items() if f.kind == "number"}
    schema = Schema(
        ids,
        numbers,
        {name: task.label or name for name, task in config.tasks.items()},
        max_len={name: f.max_len for name, f in config.features.items() if f.kind == "ids"},
        log1p=frozenset(name for name in numbers if config.features[name].transform == "log1p"),
        binary=frozenset(name for name, task in config.tasks.items() if task.loss == "bce"),
        above={name: -1 / task.scale for name, task in config.tasks.items() if task.transform == "log1p"},
        weight=config.data.weight,
        group=config.data.group,
        keys=config.data.keys,
    )
    return Logs(config.data.path, config.data.day_column, schema)


def _features(config: Config) -> Features:
    shallow = config.model.position
    selection = shallow.features if shallow else ()
    ids = {
        name: IdFeature(
            config.tables[feature.table or ""].dim,
            feature.pool == "mean",
            shallow.dropout if shallow and name in selection else feature.dropout,
        )
        for name, feature in config.features.items()
        if feature.kind in ("id", "ids")
    }
    return Features(
        {name: feature for name, feature in ids.items() if name not in selection},
        {name: ids[name] for name in selection},
        sum(feature.kind == "number" for feature in config.features.values()),
        [_statistics(config, feature) for feature in config.features.values() if feature.kind == "id_stats"],
    )


def _events(feature: FeatureConfig) -> list[str]:
    """Which events the statistics of a feature count, each once."""
    return list(dict.fromkeys(event for each in feature.of for event in each.split("/")))


def _tally(feature: FeatureConfig, event: str) -> Tally:
    """The name tells tallies of one event apart: click_7d, click_7d_batch."""
    by_day = feature.until == "day"
    name = f"{event}_{feature.half_life_days:g}d" + ("" if by_day else "_batch")
    return Tally(name, {event: 1.0}, feature.half_life_days, by_day)


def _tallies(config: Config) -> dict[str, list[Tally]]:
    """What each table counts for its statistics."""
    found: dict[str, dict[str, Tally]] = {}
    for feature in config.features.values():
        if feature.kind == "id_stats":
            tallies = [_tally(feature, event) for event in _events(feature)]
            found.setdefault(feature.table or "", {}).update({tally.name: tally for tally in tallies})
    return {table: list(by_name.values()) for table, by_name in found.items()}


def _statistics(config: Config, feature: FeatureConfig) -> IdStatistics:
    table = feature.table or ""
    names = [tally.name for tally in _tallies(config)[table]]
    place = {event: names.index(_tally(feature, event).name) for event in _events(feature)}
    numbers = [tuple(place[event] for event in each.split("/")) for each in feature.of]
    reader = next(n for n, f in config.features.items() if f.kind == "id" and f.table == table)
    return IdStatistics(feature.id or reader, table, numbers, feature.smoothing)


def _tasks(config: Config) -> dict[str, Task]:
    return {
        name: Task(task.loss == "bce", task.given, task.where, task.transform == "log1p", task.scale)
        for name, task in config.tasks.items()
    }
