"""One YAML a model, strict: read, overridden, checked whole before anything starts, frozen.

    load("configs/demo.yaml", ["train.workers=1"]) -> Config

An unknown key, a wrong type, a name that nothing defines: each is a UserError with the dotted path and the nearest
known word. Below this file nobody sees a config object: modules take plain values.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from embeddings.idmap import MAX_TABLES
from embeddings.table import TableConfig
from embeddings.tallies import IMPRESSIONS, SIGHTINGS
from trainer.errors import UserError

_NAME = re.compile(r"\w[\w.-]*")
_CORRECT = "correct it in the file or with --set"
_IN_YAML = {  # what pydantic calls by Python's names
    **dict.fromkeys(["int_type", "int_parsing", "int_from_float"], "a whole number"),
    **dict.fromkeys(["float_type", "float_parsing"], "a number"),
    **dict.fromkeys(["dict_type", "dataclass_type"], "keys with values, such as {key: value}"),
    "tuple_type": "a list, such as [a, b]",
    "string_type": "text",
}


@dataclass(frozen=True)
class DataConfig:
    """Where the days lie: path/<day_column>=YYYY-MM-DD/*.parquet, on any filesystem that pyarrow can open.

    group: the column that makes one ranked list (for GAUC), weighted as gauc says. keys: columns that predict copies.
    weight: a column of sample weights. lanes: parts in which a day is read side by side; at least as many as workers,
    the same for the life of a model.
    """

    path: str
    day_column: str = "day"
    group: str | None = None
    gauc: Literal["impressions", "positives", "equal"] = "impressions"
    keys: tuple[str, ...] = ()
    weight: str | None = None
    lanes: int = 24


@dataclass(frozen=True)
class FeatureConfig:
    """id: one id a row (or null). ids: a list of ids a row. number: a number a row (or null). id_stats: numbers from
    what happened to a row's id before.

    column: its name in the log, when it is not the feature's. pool: how a list's rows become one vector; max_len: its
    last so many ids count. dropout: the share of training rows on which the feature reads as unknown. transform:
    applied to a number before standardising.

    of: numbers about the ids of the feature `id` (default: the only feature of kind id that reads the table): counts
    of `impressions` or of a task's event, rates such as `buy/click`. Counts halve in half_life_days; rates are smoothed
    by the overall rate, worth `smoothing` clicks here. until: what happened before this `day`, or before this `batch`.
    """

    kind: Literal["id", "ids", "number", "id_stats"]
    column: str | None = None
    table: str | None = None
    pool: Literal["mean", "sum"] = "mean"
    max_len: int = 50
    dropout: float = 0.0
    transform: Literal["none", "log1p"] = "none"
    id: str | None = None
    of: tuple[str, ...] = ()
    half_life_days: float = 7.0
    smoothing: float = 20.0
    until: Literal["day", "batch"] = "day"


# Which settings go with which kind of feature.
_OF_KIND = {
    "id": {"column", "table", "dropout"},
    "ids": {"column", "table", "pool", "max_len", "dropout"},
    "number": {"column", "transform"},
    "id_stats": {"table", "id", "of", "half_life_days", "smoothing", "until"},
}


@dataclass(frozen=True)
class TaskConfig:
    """One thing to predict.

    given: the event on which this one hangs; learnt through the product of probabilities over every row (ESMM). where:
    the event that masks it; learnt on the rows where it happened. loss mse: a regression on transform(scale * label).
    """

    label: str | None = None
    loss: Literal["bce", "mse"] = "bce"
    given: str | None = None
    where: str | None = None
    transform: Literal["none", "log1p"] = "none"
    scale: float = 1.0


@dataclass(frozen=True)
class PositionConfig:
    """A shallow tower on selection features, added to the logits of the named tasks only; `missing` at serving."""

    features: tuple[str, ...]
    tasks: tuple[str, ...]
    dropout: float = 0.1
    layers: tuple[int, ...] = (16,)


@dataclass(frozen=True)
class BalanceConfig:
    """How the tasks' losses become one: fixed weights, 1 where not named."""

    kind: Literal["fixed"] = "fixed"
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """body: {kind, and that body's own settings}. tower_layers: the hidden layers of each task's tower."""

    body: dict[str, Any]
    tower_layers: tuple[int, ...] = (64,)
    position: PositionConfig | None = None
    balance: BalanceConfig = field(default_factory=BalanceConfig)


@dataclass(frozen=True)
class RowsConfig:
    """The optimizer of the tables' rows, and its settings: those not given are the optimizer's own defaults."""

    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam", "ftrl"] = "rowwise_adagrad"
    lr: float | None = None
    eps: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    beta: float | None = None
    l1: float | None = None
    l2: float | None = None


@dataclass(frozen=True)
class DenseConfig:
    """average: what scores and serves is a moving average of the dense weights that keeps this share of itself each
    step; 0: the last.
    """

    optimizer: Literal["adam"] = "adam"
    lr: float = 0.001
    average: float = 0.999


@dataclass(frozen=True)
class TrainConfig:
    """batch_size: rows of a step over all workers together, so that the number of workers never changes the answer.
    payload: how rows and their gradients travel between workers.
    """

    workers: int = 2
    batch_size: int = 4096
    precision: Literal["fp32", "bf16"] = "fp32"
    payload: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    rows: RowsConfig = field(default_factory=RowsConfig)
    dense: DenseConfig = field(default_factory=DenseConfig)


@dataclass(frozen=True)
class GateConfig:
    """Hold a candidate whose AUC at one of the addresses is below the champion's by more than tolerance. Default:
    the first task's.
    """

    addresses: tuple[str, ...] = ()
    tolerance: float = 0.03


@dataclass(frozen=True)
class NightlyConfig:
    """missing_days: whether a gap in the days stops the night. max_failures: how often lost workers are replaced in
    one call.
    """

    gate: GateConfig = field(default_factory=GateConfig)
    missing_days: Literal["stop", "skip"] = "stop"
    max_failures: int = 3


@dataclass(frozen=True)
class FusionConfig:
    """The ranking score of predict: the product of predictions to these powers, by address (`click@all: 1.0`).
    Default: the first task.
    """

    powers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackingConfig:
    mlflow: str = "sqlite:///mlflow.db"


@dataclass(frozen=True)
class CheckpointsConfig:
    path: str = "checkpoints"


@dataclass(frozen=True)
class Config:
    """The whole file."""

    name: str
    data: DataConfig
    features: dict[str, FeatureConfig]
    tables: dict[str, TableConfig]
    tasks: dict[str, TaskConfig]
    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    nightly: NightlyConfig = field(default_factory=NightlyConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)


def load(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read and check a configuration. overrides: `dotted.path=value`, the value in YAML."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) else "a file that is not text in UTF-8"
        raise UserError(
            "cannot read the configuration", path, got=got or "", do="name a YAML file that exists"
        ) from None
    tree = _parse(text, path)
    if not isinstance(tree, dict):
        raise UserError(
            "the configuration is not a mapping",
            path,
            got=type(tree).__name__,
            expected="keys such as name, data, tasks",
        )
    for override in overrides:
        _override(tree, override)
    config = _validate(tree, path)
    _check_names(config, path)
    _check_numbers(config, path)
    return _absolute(config)


def _absolute(config: Config) -> Config:
    """Local paths from the root: workers run in folders of their own."""
    data = dataclasses.replace(config.data, path=absolute(config.data.path))
    checkpoints = dataclasses.replace(config.checkpoints, path=absolute(config.checkpoints.path))
    return dataclasses.replace(config, data=data, checkpoints=checkpoints)


def absolute(path: str) -> str:
    """A local path from the root; the URI of another filesystem as it is."""
    return path if "://" in path else str(Path(path).absolute())


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dicts, defaults filled in."""
    return dataclasses.asdict(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to dotted keys: {"train": {"workers": 2}} -> {"train.workers": 2}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: `did you mean 'x'?`, or all that is known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known)) or 'none'}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is written twice: the later one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key_node.value}' appears twice", problem_mark=key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise UserError(
            "not valid YAML", place, got=getattr(error, "problem", None) or str(error), do="mend the line"
        ) from None


def _override(tree: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise UserError("not an override", "--set", got=override, expected="dotted.path=value, such as train.workers=1")
    *parents, last = path.split(".")
    node = tree
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            got, do = f"'{key}' is {node!r}", f"end the path at '{key}', or correct it"
            raise UserError("an override goes below a plain value", f"--set {path}", got=got, do=do)
    node[last] = _parse(value, f"--set {override}")


class _Strict(pydantic.BaseModel):
    """Forbids unknown keys here and, by inheritance, in every dataclass below."""

    model_config = pydantic.ConfigDict(extra="forbid")
    config: Config


def _validate(tree: dict[str, Any], where: str) -> Config:
    try:
        return _Strict(config=tree).config  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        raise _user_error(error.errors()[0], where) from None


def _user_error(error: Any, where: str) -> UserError:
    loc = [str(part) for part in error["loc"][1:]]
    place, key = f"{where}: {'.'.join(loc)}", loc[-1]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return UserError(f"unknown key '{key}'", place, do=nearest(key, _keys_at(loc[:-1])))
    if error["type"] in ("missing", "missing_argument"):
        return UserError(f"key '{key}' is missing", place, do="add it")
    if error["type"] == "invalid_key" or key == "[key]":
        do = "put the key in quotes: YAML reads on, off, yes, no and digits as values"
        return UserError(
            "a key is not text", place.removesuffix(".[key]"), got=repr(error["input"]), expected="a word", do=do
        )
    expected = _IN_YAML.get(error["type"]) or error["msg"].removeprefix("Input should be ")
    return UserError("wrong value", place, got=repr(error["input"]), expected=expected, do=_CORRECT)


def _keys_at(path: list[str]) -> list[str]:
    """The keys that the configuration knows at a dotted path; a mapping by name (features, tasks) takes any name."""
    kind: Any = Config
    for key in path:
        if dataclasses.is_dataclass(kind):
            kind = {f.name: f.type for f in dataclasses.fields(kind)}.get(key)
        else:
            kind = getattr(kind, "__args__", (None,))[-1]
        options = [a for a in getattr(kind, "__args__", ()) if dataclasses.is_dataclass(a)]
        kind = options[0] if options and type(None) in kind.__args__ else kind
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _known(name: str, known: Iterable[str], place: str, what: str) -> None:
    known = list(known)
    if name not in known:
        raise UserError(f"no {what} is called '{name}'", place, do=nearest(name, known))


def _check_names(config: Config, where: str) -> None:
    """Every name that is used is defined somewhere, and the tasks' graph has no circle."""
    names = [("name", config.name)] + [
        (f"{what}.{n}", n) for what in ("tables", "tasks") for n in getattr(config, what)
    ]
    for place, name in names:
        if not _NAME.fullmatch(name):  # names become folders and parts of addresses
            expected = "letters, digits, _, - and points, one of the first three at the start"
            raise UserError("not a name", f"{where}: {place}", got=repr(name), expected=expected, do=_CORRECT)
    events = [SIGHTINGS, IMPRESSIONS, *(name for name, task in config.tasks.items() if task.loss == "bce")]
    _check_kinds(config, where)
    id_features = [name for name, feature in config.features.items() if feature.kind in ("id", "ids")]
    for name, feature in config.features.items():
        if feature.kind == "id_stats":
            _check_statistics(config, name, events[1:], f"{where}: features.{name}")
    for name in id_features:
        table = config.features[name].table
        if table is None:
            raise UserError(
                "an id feature names no table",
                f"{where}: features.{name}",
                do=f"add table: {nearest(name, config.tables)}",
            )
        _known(table, config.tables, f"{where}: features.{name}.table", "table")
    for name, task in config.tasks.items():
        for relation in ("given", "where"):
            parent = getattr(task, relation)
            if parent is not None:
                _known(parent, config.tasks, f"{where}: tasks.{name}.{relation}", "task")
                if config.tasks[parent].loss != "bce":
                    got, expected = f"loss: {config.tasks[parent].loss}", "a task with loss: bce"
                    do = "hang it on another task"
                    raise UserError(
                        f"'{parent}' is no event",
                        f"{where}: tasks.{name}.{relation}",
                        got=got,
                        expected=expected,
                        do=do,
                    )
        if task.given and (task.where or task.loss != "bce"):
            got, do = f"loss: {task.loss}, where: {task.where}", "drop given, or where, or make it an event"
            raise UserError("given goes with loss: bce and without where", f"{where}: tasks.{name}", got=got, do=do)
        if task.loss == "bce" and (task.transform != "none" or task.scale != 1):
            got, do = f"transform: {task.transform}, scale: {task.scale}", "drop them, or set loss: mse"
            raise UserError("transform and scale go with loss: mse", f"{where}: tasks.{name}", got=got, do=do)
    for name, table_config in config.tables.items():
        for event in table_config.value:
            _known(event, events, f"{where}: tables.{name}.value", "event")
    for name in config.tasks:
        _check_no_circle(config.tasks, name, where)
    if position := config.model.position:
        for feature_name in position.features:
            _known(feature_name, id_features, f"{where}: model.position.features", "id feature")
        for task_name in position.tasks:
            _known(task_name, config.tasks, f"{where}: model.position.tasks", "task")
    for task_name in config.model.balance.weights:
        _known(task_name, config.tasks, f"{where}: model.balance.weights", "task")


def _check_kinds(config: Config, where: str) -> None:
    """No feature has settings that its kind does not use."""
    defaults = {f.name: f.default for f in dataclasses.fields(FeatureConfig) if f.name != "kind"}
    for name, feature in config.features.items():
        for setting, default in defaults.items():
            if setting not in _OF_KIND[feature.kind] and getattr(feature, setting) != default:
                do = f"drop it; {feature.kind} knows {', '.join(sorted(_OF_KIND[feature.kind]))}"
                raise UserError(f"not a setting of kind: {feature.kind}", f"{where}: features.{name}.{setting}", do=do)


def _check_statistics(config: Config, name: str, events: list[str], place: str) -> None:
    feature = config.features[name]
    _known(feature.table or "", config.tables, f"{place}.table", "table")
    readers = [n for n, f in config.features.items() if f.kind == "id" and f.table == feature.table]
    if feature.id is None and len(readers) != 1:
        got, do = f"{len(readers)} features of kind id read table '{feature.table}'", "add id: the feature it is of"
        raise UserError("whose id the statistics are of is not clear", place, got=got, expected="one", do=do)
    if feature.id is not None:
        _known(feature.id, readers, f"{place}.id", f"feature of kind id that reads table '{feature.table}'")
    if not feature.of:
        raise UserError("nothing to count", f"{place}.of", do="add of: [impressions, click, ...]")
    for each in feature.of:
        for event in each.split("/", 1):
            _known(event, events, f"{place}.of", "event")


def _check_no_circle(tasks: Mapping[str, TaskConfig], name: str, where: str) -> None:
    path, at = [name], tasks[name].given or tasks[name].where
    while at is not None:
        if at in path:
            got, do = " -> ".join([*path, at]), "drop one task's given or where"
            raise UserError("the tasks hang on each other in a circle", f"{where}: tasks.{name}", got=got, do=do)
        path.append(at)
        at = tasks[at].given or tasks[at].where


def _table_bounds(table: TableConfig) -> dict[str, tuple[float, float, float]]:
    """Each setting's value, lowest and highest; a sketch's counters end at 255."""
    bounds: dict[str, tuple[float, float, float]] = {
        "dim": (table.dim, 1, 4096),
        "capacity_rows": (table.capacity_rows, 1, 2**31),
        "init_scale": (table.init_scale, 0, 10**6),
        "min_count": (table.min_count, 1, 255 if table.admission.kind == "sketch" else 2**31),
        "admission.cells": (table.admission.cells, 1, 2**40),
        "admission.forget_days": (table.admission.forget_days, 1, 10**6),
        "value_half_life_days": (table.value_half_life_days, 1e-6, 1e9),
        **{f"value.{event}": (weight, 0, 10**9) for event, weight in table.value.items()},
    }
    if table.ttl_days is not None:
        bounds["ttl_days"] = (table.ttl_days, 1, 10**6)
    if table.budget_rows is not None:
        bounds["budget_rows"] = (table.budget_rows, 1, 2**40)
    return bounds


def _check_numbers(config: Config, where: str) -> None:
    """Bounds that types do not say."""
    rows = {name: v for name, v in dataclasses.asdict(config.train.rows).items() if name != "optimizer"}
    bounds: dict[str, tuple[float, float, float]] = {
        "data.lanes": (config.data.lanes, 1, 65_536),
        "train.workers": (config.train.workers, 1, config.data.lanes),
        "train.batch_size": (config.train.batch_size, config.data.lanes, 2**31),
        "train.dense.average": (config.train.dense.average, 0, 1),
        **{f"tasks.{n}.scale": (t.scale, 1e-12, 1e12) for n, t in config.tasks.items()},
        **{f"features.{n}.dropout": (f.dropout, 0, 1) for n, f in config.features.items()},
        **{f"features.{n}.half_life_days": (f.half_life_days, 1e-6, 1e9) for n, f in config.features.items()},
        **{f"features.{n}.smoothing": (f.smoothing, 1e-6, 1e9) for n, f in config.features.items()},
        **{f"features.{n}.max_len": (f.max_len, 1, 2**31) for n, f in config.features.items()},
        **{f"model.tower_layers.{i}": (width, 1, 2**20) for i, width in enumerate(config.model.tower_layers)},
        **{f"model.balance.weights.{n}": (weight, 0, 10**6) for n, weight in config.model.balance.weights.items()},
        "train.seed": (config.train.seed, 0, 2**63 - 1),
        **{f"train.rows.{n}": (v, 0, 10**6) for n, v in rows.items() if v is not None},
        **({"train.rows.eps": (rows["eps"], 1e-30, 10**6)} if rows["eps"] is not None else {}),  # 0 / 0 is NaN
        **{f"train.rows.{n}": (rows[n] or 0.0, 0, 0.999999) for n in ("beta1", "beta2")},
        **{f"tables.{n}.{key}": bound for n, t in config.tables.items() for key, bound in _table_bounds(t).items()},
        "train.dense.lr": (config.train.dense.lr, 0, 10**6),
        "number of tables": (len(config.tables), 0, MAX_TABLES),
    }
    for n, table in config.tables.items():
        if table.dim % 4:
            do = f"set it to {-(-table.dim // 4) * 4}"
            raise UserError(
                "a width that the kernels cannot keep",
                f"{where}: tables.{n}.dim",
                got=str(table.dim),
                expected="a multiple of 4",
                do=do,
            )
    if position := config.model.position:
        bounds["model.position.dropout"] = (position.dropout, 0, 1)
        bounds |= {f"model.position.layers.{i}": (width, 1, 2**20) for i, width in enumerate(position.layers)}
    for place, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise UserError(
                "out of bounds", f"{where}: {place}", got=str(value), expected=f"{low} .. {high}", do=_CORRECT
            )
    for what in ("features", "tables", "tasks"):
        if not getattr(config, what):
            raise UserError(f"no {what}", f"{where}: {what}", do="name at least one")
