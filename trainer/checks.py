"""What types do not say of a configuration: every name that is used is defined, settings go together, the tasks have no
circle, no label is a feature, numbers are within bounds. Each is a UserError with the dotted path.
"""

import dataclasses
import re
import zoneinfo
from collections.abc import Iterable, Mapping

from embeddings.idmap import MAX_TABLES
from embeddings.table import TableConfig
from embeddings.tallies import IMPRESSIONS, SIGHTINGS
from trainer.config import Config, DataConfig, FeatureConfig, PositionConfig, TaskConfig
from trainer.errors import CORRECT, UserError, nearest
from trainer.expressions import parse
from trainer.usual import GateConfig

_NAME = re.compile(r"\w[\w.-]*")

# Which settings go with which kind of feature.
_OF_KIND = {
    "id": {"column", "table", "dropout"},
    "ids": {"column", "table", "pool", "max_len", "dropout"},
    "number": {"column", "transform"},
    "id_stats": {"table", "id", "of", "half_life_days", "smoothing", "until"},
}


def check_all(config: Config, where: str) -> None:
    """Check all of it. where: the file."""
    _check_names(config, where)
    _check_numbers(config, where)
    _check_hours(config.data, where)


def _check_hours(data: DataConfig, where: str) -> None:
    """The zone is one, and a column of times is there for hours."""
    try:
        zoneinfo.ZoneInfo(data.time_zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        hint, expected = nearest(data.time_zone, zoneinfo.available_timezones()), "a zone such as America/Sao_Paulo"
        do = hint if hint.startswith("did you mean") else CORRECT
        raise UserError("no such time zone", f"{where}: data.time_zone", repr(data.time_zone), expected, do) from None
    if data.time and data.period != "hour":
        got, do = f"period: {data.period}", "set data.period: hour, or drop data.time"
        raise UserError("a column of times parts days into hours", f"{where}: data.time", got=got, do=do)


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
            raise UserError("not a name", f"{where}: {place}", got=repr(name), expected=expected, do=CORRECT)
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


def _workers_bounds(config: Config) -> dict[str, tuple[float, float, float]]:
    """A lane is read by one worker."""
    least, most = config.train.workers_between
    if isinstance(config.train.workers, int):
        return {"train.workers": (most, 1, config.data.lanes)}
    return {"train.workers.max": (most, 1, config.data.lanes), "train.workers.min": (least, 1, most)}


def _of_checkpoints(config: Config) -> dict[str, tuple[float, float]]:
    """Each setting's value and the lowest that it may be."""
    lowest = {"base_every": 1, "progress_minutes": 0, "retries": 0, "keep_days": 1, "keep_bases": 0}
    return {name: (getattr(config.checkpoints, name), low) for name, low in lowest.items()}


def _gate_bounds(gate: GateConfig) -> dict[str, tuple[float, float, float]]:
    """Each setting's value, lowest and highest: factors begin with 1, shares end with it."""
    factors = ("calibration", "rows", "labels", "loss", "dense_norm", "row_norm")
    shares = ("tolerance", "floor", "paired_tolerance", "nulls", "new_ids", "dead_units")
    wide = {name: (1.0, 1e9) for name in factors} | {name: (0.0, 1.0) for name in shares} | {"values": (0.0, 1e9)}
    bounds = {
        f"nightly.gate.{name}": (value, *ends)
        for name, ends in wide.items()
        if (value := getattr(gate, name)) is not None
    }
    bounds |= {"nightly.gate.trailing": (gate.trailing, 1, 10_000), "nightly.gate.sigmas": (gate.sigmas, 0, 1e6)}
    bounds |= {
        "nightly.gate.history": (gate.history, 1, gate.trailing),
        "nightly.gate.least_rows": (gate.least_rows, 1, 1e18),
    }
    for address, (low, high) in gate.calibration_bounds.items():
        bounds[f"nightly.gate.calibration_bounds.{address}.0"] = (low, 1e-9, 1e9)
        bounds[f"nightly.gate.calibration_bounds.{address}.1"] = (high, low, 1e9)
    return bounds


def _check_numbers(config: Config, where: str) -> None:
    """Bounds that types do not say."""
    rows = {name: v for name, v in dataclasses.asdict(config.train.rows).items() if name != "optimizer"}
    propensities = {name: task.propensity for name, task in config.tasks.items() if task.propensity}
    bounds: dict[str, tuple[float, float, float]] = {
        "data.lanes": (config.data.lanes, 1, 65_536),
        "data.max_bad_rows": (config.data.max_bad_rows, 0, 0.5),
        "data.label_delay_days": (config.data.label_delay_days, 0, 3650),
        **_workers_bounds(config),
        "nightly.max_failures": (config.nightly.max_failures, 0, 10**6),
        "nightly.hang_s": (config.nightly.hang_s, 0, 10**6),
        **{f"checkpoints.{name}": (value, low, 10**6) for name, (value, low) in _of_checkpoints(config).items()},
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
        **_gate_bounds(config.nightly.gate),
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
                "out of bounds", f"{where}: {place}", got=str(value), expected=f"{low} .. {high}", do=CORRECT
            )
    for what in ("features", "tables", "tasks"):
        if not getattr(config, what):
            raise UserError(f"no {what}", f"{where}: {what}", do="name at least one")
