"""One YAML a model, strict: read, overridden, checked whole before anything starts, frozen.

    load("configs/demo.yaml", ["train.workers=1"]) -> Config

A file may say `extends: other.yaml` and then only what is different. An unknown key, a wrong type, a name that nothing
defines: each is a UserError with the dotted path and the nearest known word. Below this file nobody sees a config
object: modules take plain values.
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
from trainer.expressions import parse

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
    weight: a column of sample weights. known: columns that are known when a row is scored, although labels are made
    with them (a video's length). lanes: parts in which a day is read side by side; at least as many as workers,
    the same for the life of a model.
    """

    path: str
    day_column: str = "day"
    group: str | None = None
    gauc: Literal["impressions", "positives", "equal"] = "impressions"
    keys: tuple[str, ...] = ()
    weight: str | None = None
    known: tuple[str, ...] = ()
    lanes: int = 24


@dataclass(frozen=True)
class FeatureConfig:
    """id: one id a row (or null). ids: a list of ids a row. number: a number a row (or null). id_stats: numbers from
    what happened to a row's id before.

    column: its name in the log, when it is not the feature's. pool: how a list's rows become one vector, or none: they
    go to the encoder as they are; max_len: its last so many ids count. dropout: the share of training rows on which the
    feature reads as unknown. transform: applied to a number before standardising.

    of: numbers about the ids of the feature `id` (default: the only feature of kind id that reads the table): counts
    of `impressions` or of a task's event, rates such as `buy/click`. Counts halve in half_life_days; rates are smoothed
    by the overall rate, worth `smoothing` clicks here. until: what happened before this `day`, or before this `batch`.
    """

    kind: Literal["id", "ids", "number", "id_stats"]
    column: str | None = None
    table: str | None = None
    pool: Literal["mean", "sum", "none"] = "mean"
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
class PropensityConfig:
    """ips: the rows where the parent happened, each over the parent's probability (at least `least`); dr: also what a
    second head imputes elsewhere. product: the weight of the loss over every row.
    """

    kind: Literal["ips", "dr"]
    least: float = 0.02
    product: float = 0.1


@dataclass(frozen=True)
class TaskConfig:
    """One thing to predict, or (with `head`) one more loss of a prediction.

    label: a column, or an expression over columns (`watch_s > 0.8 * duration_s`); default: the task's name. loss: its
    name, or {kind, and that loss's settings}; a regression is on transform(scale * label). weight: of each row, a
    column or an expression (`1 + share`). positive_weight: what a label 1 weighs more; negatives_kept: the share of the
    rows with label 0 that the log still has; predictions are as if neither had been done.

    given: the event on which this one hangs; learnt through the product of probabilities over every row (ESMM). via:
    the event, itself given the same, through which it goes or not (ESM2). where: the event that masks it; learnt on the
    rows where it happened. head: the address of another task's prediction that this loss is about: it has none.

    links: tasks whose towers this one's reads too (DBMTL). transfer: the task whose features it attends to (AITM), with
    its calibrator. cascade: the task to whose logit this one adds (NMTR). propensity: see there (ESCM2).
    """

    label: str | None = None
    loss: str | dict[str, Any] = "bce"
    weight: str | None = None
    positive_weight: float = 1.0
    negatives_kept: float = 1.0
    given: str | None = None
    via: str | None = None
    where: str | None = None
    head: str | None = None
    links: tuple[str, ...] = ()
    transfer: str | None = None
    calibrator: float = 0.6
    cascade: str | None = None
    propensity: PropensityConfig | None = None
    transform: Literal["none", "log1p"] = "none"
    scale: float = 1.0

    @property
    def loss_kind(self) -> str:
        return self.loss if isinstance(self.loss, str) else str(self.loss.get("kind", ""))

    @property
    def is_event(self) -> bool:
        return self.loss_kind == "bce"

    @property
    def parents(self) -> dict[str, str]:
        """The tasks that this one hangs on or reads, by the setting that names each."""
        named: dict[str, str | None] = {
            name: getattr(self, name) for name in ("given", "via", "where", "transfer", "cascade")
        }
        named |= {f"links.{i}": link for i, link in enumerate(self.links)}
        named |= {"head": self.head.partition("@")[0]} if self.head else {}
        return {setting: task for setting, task in named.items() if task is not None}


@dataclass(frozen=True)
class PositionConfig:
    """A shallow tower on selection features for the named tasks only; `missing` at serving. form: its output is added
    to their logits (sum), or is the chance that the row was looked at, by which theirs is multiplied (product: PAL).
    """

    features: tuple[str, ...]
    tasks: tuple[str, ...]
    form: Literal["sum", "product"] = "sum"
    dropout: float = 0.1
    layers: tuple[int, ...] = (16,)


@dataclass(frozen=True)
class ModelConfig:
    """body: {kind, and that body's own settings}; encoder, balance: likewise; auxiliary: likewise, by names of your
    choice. tower_layers: the hidden layers of each task's tower.
    """

    body: dict[str, Any]
    tower_layers: tuple[int, ...] = (64,)
    encoder: dict[str, Any] | None = None
    position: PositionConfig | None = None
    auxiliary: dict[str, dict[str, Any]] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=lambda: {"kind": "fixed"})


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
class ServingConfig:
    """item: the features that belong to an item; all others are the user's or the request's, for export."""

    item: tuple[str, ...] = ()


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
    serving: ServingConfig = field(default_factory=ServingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)


def load(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read and check a configuration. overrides: `dotted.path=value`, the value in YAML."""
    tree = _read(path, ())
    for override in overrides:
        _override(tree, override)
    config = _validate(tree, path)
    _check_names(config, path)
    _check_numbers(config, path)
    return _absolute(config)


def _read(path: str, readers: tuple[str, ...]) -> dict[str, Any]:
    """A file's tree, laid over that of the file which it extends. readers: the files that led here."""
    if path in readers:
        circle = " -> ".join([*readers, path])
        raise UserError("files extend each other in a circle", path, got=circle, do="drop one extends")
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
    extended = tree.pop("extends", None)
    if extended is None:
        return tree
    if not isinstance(extended, str):
        raise UserError("wrong value", f"{path}: extends", got=repr(extended), expected="the path of a file")
    return _laid_over(_read(str(Path(path).parent / extended), (*readers, path)), tree)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings are laid over each other key by key, except that one with a `kind` takes the whole place; null takes a
    key away.
    """
    laid = dict(below)
    for key, value in above.items():
        before = laid.get(key)
        if value is None:
            laid.pop(key, None)
        elif isinstance(value, dict) and isinstance(before, dict) and "kind" not in value:
            laid[key] = _laid_over(before, value)
        else:
            laid[key] = value
    return laid


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
    events = [SIGHTINGS, IMPRESSIONS, *(name for name, task in config.tasks.items() if task.is_event)]
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
    for name in config.serving.item:
        _known(name, config.features, f"{where}: serving.item", "feature")
    for name in config.tasks:
        _check_task(config, name, where)
    _check_no_circle(config.tasks, where)
    for name, table_config in config.tables.items():
        for event in table_config.value:
            _known(event, events, f"{where}: tables.{name}.value", "event")
    if position := config.model.position:
        for feature_name in position.features:
            _known(feature_name, id_features, f"{where}: model.position.features", "id feature")
        for task_name in position.tasks:
            _known(task_name, config.tasks, f"{where}: model.position.tasks", "task")
        _check_position(config, position, where)
    _check_leakage(config, where)


def _check_position(config: Config, position: PositionConfig, where: str) -> None:
    """What the position tower reads is a vector that it alone drops; what it tells belongs to a head."""
    for name in position.features:
        if config.features[name].pool == "none":
            raise UserError("a selection feature must be pooled", f"{where}: features.{name}.pool", do="set pool: mean")
        if config.features[name].dropout:
            place, do = f"{where}: features.{name}.dropout", "drop it, and set model.position.dropout"
            raise UserError("a selection feature is dropped by the position tower", place, do=do)
    for name in position.tasks:
        task, place = config.tasks[name], f"{where}: model.position.tasks"
        if task.head is not None:
            raise UserError(f"'{name}' has no head of its own", place, do=f"name {task.head.partition('@')[0]!r}")
        if position.form == "product" and not task.is_event:
            got, expected = f"loss: {task.loss_kind}", "a task with loss: bce"
            raise UserError(f"'{name}' is no event, and form: product multiplies chances", place, got, expected)


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


# Settings of a task that need another one, or that only an event or a regression has.
_NEEDS = {"via": "given", "propensity": "given"}
_OF_EVENTS = ("given", "via", "propensity", "positive_weight", "negatives_kept", "transfer", "cascade")
_OF_HEADS = ("given", "via", "links", "transfer", "cascade", "propensity")


def _check_task(config: Config, name: str, where: str) -> None:
    """What a task hangs on is there, is an event with a head, and goes together."""
    task, place, tasks = config.tasks[name], f"{where}: tasks.{name}", config.tasks
    default = TaskConfig()
    given = {setting for setting in (*_OF_EVENTS, *_OF_HEADS) if getattr(task, setting) != getattr(default, setting)}
    for setting, parent in task.parents.items():
        _known(parent, tasks, f"{place}.{setting}", "task")
        if tasks[parent].head is not None:
            do = f"name {tasks[parent].head!r}, or another task"
            raise UserError(f"'{parent}' has no head of its own", f"{place}.{setting}", do=do)
        if not tasks[parent].is_event and setting in ("given", "via", "where", "transfer", "cascade"):
            got, expected = f"loss: {tasks[parent].loss_kind}", "a task with loss: bce"
            raise UserError(
                f"'{parent}' is no event", f"{place}.{setting}", got=got, expected=expected, do="hang it on another"
            )
    for setting, needed in _NEEDS.items():
        if setting in given and not getattr(task, needed):
            raise UserError(f"{setting} goes with {needed}", f"{place}.{setting}", do=f"add {needed}: the event before")
    if task.via and tasks[task.via].given != task.given:
        got = f"{task.via} is given {tasks[task.via].given}, {name} is given {task.given}"
        do = f"set tasks.{task.via}.given to {task.given}"
        raise UserError("a task and its via must be given the same event", f"{place}.via", got=got, do=do)
    if task.negatives_kept != 1 and (task.given or task.where):
        do = "set it on the task that stands alone, or weigh rows by one over the share: weight"
        got = f"given: {task.given}, where: {task.where}"
        raise UserError("negatives_kept goes without given and where", f"{place}.negatives_kept", got=got, do=do)
    for setting, clashing in (("transfer", ("where",)), ("cascade", ("given", "where"))):
        for other in clashing if setting in given else ():
            if getattr(task, other):
                got = f"{setting}: {getattr(task, setting)}, {other}: {getattr(task, other)}"
                do = f"drop {other}: the label is 0 where {getattr(task, setting)} did not happen"
                raise UserError(f"{setting} is between events over every row", f"{place}.{setting}", got=got, do=do)
    if task.calibrator != default.calibrator and not task.transfer:
        raise UserError("calibrator goes with transfer", f"{place}.calibrator", do="add transfer: the task before")
    if task.given and task.where:
        raise UserError("given goes without where", place, got=f"where: {task.where}", do="drop one of them")
    for setting in given & set(_OF_EVENTS):
        if not task.is_event:
            raise UserError(f"{setting} goes with loss: bce", f"{place}.{setting}", got=f"loss: {task.loss_kind}")
    for setting in given & set(_OF_HEADS):
        if task.head:
            raise UserError(f"{setting} goes without head", f"{place}.{setting}", got=f"head: {task.head}")
    if task.is_event and (task.transform != "none" or task.scale != 1):
        got, do = f"transform: {task.transform}, scale: {task.scale}", "drop them, or set loss: mse"
        raise UserError("transform and scale go with a regression", place, got=got, do=do)


def _check_no_circle(tasks: Mapping[str, TaskConfig], where: str) -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            got, do = " -> ".join([*path, name]), "drop one of these relations"
            raise UserError("the tasks hang on each other in a circle", f"{where}: tasks.{name}", got=got, do=do)
        for parent in () if name in done else tasks[name].parents.values():
            visit(parent, (*path, name))
        done.add(name)

    for name in tasks:
        visit(name, ())


def _check_leakage(config: Config, where: str) -> None:
    """No feature reads a column from which a label is made: it would tell the answer."""
    for task_name, task in config.tasks.items():
        told = set(parse(task.label or f"`{task_name}`", f"{where}: tasks.{task_name}.label").columns)
        for name, feature in config.features.items():
            column = feature.column or name
            if feature.kind != "id_stats" and column in told - set(config.data.known):
                got = f"column '{column}' makes the label of task '{task_name}'"
                do = f"drop the feature, or, if it is known when a row is scored, set data.known: [{column}]"
                raise UserError("a label is used as a feature", f"{where}: features.{name}", got=got, do=do)


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
    propensities = {name: task.propensity for name, task in config.tasks.items() if task.propensity}
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
        **{f"tasks.{n}.positive_weight": (t.positive_weight, 1e-6, 1e6) for n, t in config.tasks.items()},
        **{f"tasks.{n}.negatives_kept": (t.negatives_kept, 1e-9, 1) for n, t in config.tasks.items()},
        **{f"tasks.{n}.calibrator": (t.calibrator, 0, 1e6) for n, t in config.tasks.items()},
        **{f"tasks.{n}.propensity.least": (p.least, 1e-6, 1) for n, p in propensities.items()},
        **{f"tasks.{n}.propensity.product": (p.product, 0, 1e6) for n, p in propensities.items()},
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
