"""Everything that learns, in one place: rows, dense net, optimizer, running statistics. What a checkpoint holds is
what is here.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from embeddings.client import ShardedEmbeddings
from embeddings.exchange import Exchange
from embeddings.optim import OPTIMIZERS, RowOptimizer
from embeddings.shard import Shard
from embeddings.tallies import Tally
from trainer.auxiliary import AUXILIARIES, Auxiliary
from trainer.balance import BALANCERS, Balancer
from trainer.bodies import BODIES
from trainer.config import Config, FeatureConfig, TaskConfig
from trainer.data import Batch, Logs
from trainer.draws import Draws
from trainer.encoders import ENCODERS
from trainer.errors import UserError, nearest
from trainer.features import Features, IdFeature, IdStatistics, Inputs
from trainer.heads import Propensity, Task, TaskGraph
from trainer.health import GateHealth
from trainer.losses import LOSSES, Loss
from trainer.model import MultiTaskModel, PositionTower
from trainer.numbers import NumberStats
from trainer.objective import Term
from trainer.pieces import Names, make
from trainer.schema import Allowed, Schema
from trainer.towers import Towers

_PAYLOADS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Learner:
    """One worker's part of the model. The dense net, its optimizer and the statistics are the same on every worker.

    averaged: the moving average of the dense net's weights, which scores and serves. One pass over a day at a constant
    rate leaves the weights leaning towards its last hours; their average ranks better and is calibrated better. Source:
    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, 1992.

    auxiliary: nets that shape the rows in training only. health: what the body's gates and experts did today. order:
    the names of the features, the tasks and the auxiliary nets, which are known by their places below.
    """

    exchange: Exchange
    embeddings: ShardedEmbeddings
    features: Features
    model: MultiTaskModel
    averaged: AveragedModel
    auxiliary: torch.nn.ModuleList
    graph: TaskGraph
    balance: Balancer
    optimizer: torch.optim.Adam
    stats: NumberStats
    health: GateHealth
    autocast: bool
    seed: int
    device: torch.device
    order: dict[str, list[str]]

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Everything dense that is trained."""
        parts = {"model": self.model, "auxiliary": self.auxiliary}
        return {f"{part}/{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    @property
    def losses(self) -> list[str]:
        """Whose losses a step has: the tasks', then the auxiliary nets'."""
        return [*self.order["tasks"], *self.order["auxiliary"]]

    @property
    def in_lists(self) -> bool:
        """Whether a loss compares the rows of a group, which must then come together."""
        return any(task.loss.in_lists for task in self.graph.tasks.values())

    def auxiliary_terms(self, inputs: Inputs, batch: Batch, draws: Draws) -> list[Term]:
        """The auxiliary nets' losses on this worker's rows, numbered on after the tasks'."""
        targets_BT, tasks = self.graph.targets(batch.labels_BT), self.order["tasks"]
        terms: list[Term] = []
        for net in self.auxiliary:
            assert isinstance(net, Auxiliary)
            place = tasks.index(net.label) if net.label else 0
            loss = net(inputs, batch, targets_BT[:, place], batch.weights_BT[:, place], draws)
            terms.append(Term(len(tasks) + len(terms), loss.sum, loss.weight, net.weight))
        return terms

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
    features, graph = _features(config), build_graph(config).to(device)
    order = {"features": [*config.features], "tasks": [*config.tasks], "auxiliary": [*config.model.auxiliary]}
    model = build_model(config).to(device)
    auxiliary = _auxiliary(config, features).to(device)
    shard = Shard(
        config.tables,
        row_optimizer(config),
        exchange,
        tallies=_tallies(config),
        labels=[name for name, task in config.tasks.items() if task.is_event],
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
        auxiliary=auxiliary,
        graph=graph,
        balance=_balance(config, graph).to(device),
        optimizer=torch.optim.Adam([*model.parameters(), *auxiliary.parameters()], lr=config.train.dense.lr),
        stats=NumberStats(features.num_numbers, device),
        health=GateHealth(),
        autocast=config.train.precision == "bf16",
        seed=config.train.seed,
        device=device,
        order=order,
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
    settings, names = config.model, _names(config)
    layout, graph = _features(config).layout, build_graph(config)
    encoder = make(settings.encoder, ENCODERS, "model.encoder", names, layout) if settings.encoder else None
    input_dim, heads = layout.input_dim + (encoder.output_dim if encoder else 0), graph.heads
    body = make(settings.body, BODIES, "model.body", names, input_dim, len(heads))
    towers = Towers(heads, body.output_dim, settings.tower_layers)
    if settings.position is None:
        return MultiTaskModel(body, towers, encoder=encoder)
    dims = [feature.dim for feature in _features(config).position.values()]
    position = PositionTower(dims, settings.position.layers, len(settings.position.tasks))
    adds_to = [graph.places(task) for task in settings.position.tasks] if settings.position.form == "sum" else None
    return MultiTaskModel(body, towers, encoder=encoder, position=position, adds_to=adds_to)


def build_graph(config: Config) -> TaskGraph:
    """The tasks' graph, with their losses."""
    names, position = _names(config), config.model.position
    shown = position.tasks if position and position.form == "product" else ()
    return TaskGraph({name: _task(config, name, names) for name in config.tasks}, shown)


def _task(config: Config, name: str, names: Names) -> Task:
    task = config.tasks[name]
    loss = make(task.loss, LOSSES, f"tasks.{name}.loss", names)
    if loss.in_lists and config.data.group is None:
        do = "set data.group to the column that makes one list, such as a request"
        raise UserError("a loss in lists needs groups", f"tasks.{name}.loss", got=task.loss_kind, do=do)
    if task.head is not None:
        _check_head(config, name, loss, make(config.tasks[task.head.partition("@")[0]].loss, LOSSES, "loss", names))
    p = task.propensity
    return Task(
        loss=loss,
        given=task.given,
        where=task.where,
        via=task.via,
        head=_address(config, name),
        links=task.links,
        transfer=task.transfer,
        cascade=task.cascade,
        calibrator=task.calibrator,
        propensity=Propensity(p.kind == "dr", p.least, p.product) if p else None,
        log1p=task.transform == "log1p",
        scale=task.scale,
        positive_weight=task.positive_weight,
        negatives_kept=task.negatives_kept,
    )


def _check_head(config: Config, name: str, loss: Loss, of_head: Loss) -> None:
    """A score can be compared in lists whatever it is; else a loss wants a head of its own kind."""
    mine, its = config.tasks[name], config.tasks[(config.tasks[name].head or "").partition("@")[0]]
    if loss.kind == "regression" and (mine.transform, mine.scale) != (its.transform, its.scale):
        got, expected = (f"transform: {task.transform}, scale: {task.scale}" for task in (mine, its))
        do = f"set those of {mine.head}: one prediction has one unit"
        raise UserError("another unit than the head's", f"tasks.{name}", got, expected, do)
    if loss.kind != "ranking" and (loss.kind, loss.num_logits) != (of_head.kind, of_head.num_logits):
        got, expected = f"loss: {config.tasks[name].loss_kind}", f"a {of_head.kind} loss, or one in lists"
        do = "choose another loss, or drop head"
        raise UserError(f"a loss that does not fit {config.tasks[name].head}", f"tasks.{name}.loss", got, expected, do)


def _address(config: Config, name: str) -> str | None:
    """Which prediction a task without a head is about; a task's name alone stands for its whole space."""
    task = config.tasks[name]
    if task.head is None:
        return None
    head, _, space = task.head.partition("@")
    parent = config.tasks[head]
    known = [f"{head}@{s}" for s in (parent.given or parent.where, None if parent.where else "all") if s]
    address = f"{head}@{space}" if space else known[-1]
    if address not in known:
        raise UserError(
            f"no prediction has the address '{task.head}'", f"tasks.{name}.head", do=nearest(address, known)
        )
    return address


def _names(config: Config) -> Names:
    """What the settings of a model's pieces may name."""
    return Names(
        tuple(config.tasks), tuple(n for n, task in config.tasks.items() if task.is_event), tuple(config.features)
    )


def _auxiliary(config: Config, features: Features) -> torch.nn.ModuleList:
    """Drawn after the dense net, which is the same without them."""
    return torch.nn.ModuleList(
        make(settings, AUXILIARIES, f"model.auxiliary.{name}", _names(config), features.layout)
        for name, settings in config.model.auxiliary.items()
    )


def _balance(config: Config, graph: TaskGraph) -> Balancer:
    regression_T = [task.loss.kind == "regression" for task in graph.tasks.values()]
    settings = {"kind": "fixed"} | config.model.balance
    return make(settings, BALANCERS, "model.balance", _names(config), len(regression_T), regression_T)


def check(config: Config) -> None:
    """Refuse what only the model itself can tell: pieces that cannot be built, addresses that no prediction has."""
    build_model(config)
    _auxiliary(config, _features(config))
    row_optimizer(config)
    graph = build_graph(config)
    _balance(config, graph)
    addresses = graph.addresses
    events = [address for address, kind in addresses.items() if kind == "binary"]
    gate = config.nightly.gate
    wanted = {"nightly.gate.addresses": (gate.addresses, events)}
    wanted["nightly.gate.calibration_bounds"] = (tuple(gate.calibration_bounds), list(addresses))
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
    graph = build_graph(config)
    schema = Schema(
        ids,
        numbers,
        {name: task.label or f"`{name}`" for name, task in config.tasks.items()} | graph.by,
        {name: task.weight for name, task in config.tasks.items() if task.weight},
        max_len={name: f.max_len for name, f in config.features.items() if f.kind == "ids"},
        log1p=frozenset(name for name in numbers if config.features[name].transform == "log1p"),
        allowed={name: list(_allowed(task, graph.tasks[name].loss)) for name, task in config.tasks.items()},
        aligned=_aligned(config),
        weight=config.data.weight,
        group=config.data.group,
        user=config.data.user,
        keys=config.data.keys,
    )
    data = config.data
    return Logs(
        data.path,
        data.day_column,
        schema,
        by_hour=data.period == "hour",
        time=data.time,
        time_zone=data.time_zone,
        max_bad_rows=data.max_bad_rows,
    )


def fusion_powers(config: Config) -> dict[str, float]:
    """The powers of predictions, by address, that make the fused score."""
    return config.fusion.powers or dict.fromkeys(list(build_graph(config).addresses)[:1], 1.0)


def _allowed(task: TaskConfig, loss: Loss) -> Iterator[Allowed]:
    """What a task's labels may be."""
    who, (least, most), bound = f"loss: {task.loss_kind}", loss.labels, -1 / task.scale
    if loss.kind == "binary":
        yield Allowed(who, "0, 1", lambda values: np.isin(values, (0, 1)))
    elif (least, most) != (-math.inf, math.inf):
        expected = f"numbers from {least:g} up" if most == math.inf else f"numbers from {least:g} to {most:g}"
        yield Allowed(who, f"{expected},", lambda values: (values >= least) & (values <= most))
    if task.transform == "log1p":
        yield Allowed("transform: log1p", f"numbers above {bound:g},", lambda values: values > bound)


def _aligned(config: Config) -> tuple[tuple[str, ...], ...]:
    """The lists that the encoder reads side by side."""
    named = (config.model.encoder or {}).values()
    lists = tuple(
        n for n, f in config.features.items() if f.pool == "none" and n in [v for v in named if type(v) is str]
    )
    return (lists,) if len(lists) > 1 else ()


def _features(config: Config) -> Features:
    shallow = config.model.position
    selection = shallow.features if shallow else ()
    of_kind = {kind: {n: f for n, f in config.features.items() if f.kind == kind} for kind in ("number", "id_stats")}
    ids = {
        name: IdFeature(
            config.tables[feature.table or ""].dim,
            feature.pool == "mean",
            shallow.dropout if shallow and name in selection else feature.dropout,
        )
        for name, feature in config.features.items()
        if feature.kind in ("id", "ids")
    }
    lists = [name for name in ids if config.features[name].pool == "none"]
    return Features(
        {name: feature for name, feature in ids.items() if name not in selection and name not in lists},
        {name: ids[name] for name in selection},
        list(of_kind["number"]),
        {name: _statistics(config, feature) for name, feature in of_kind["id_stats"].items()},
        {name: (ids[name], config.features[name].max_len) for name in lists},
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
