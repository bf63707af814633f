"""All settings of a model, with their defaults: one YAML a model (configfile.py reads it, checks.py checks it).

Below the code that builds things (learner.py) nobody sees a config object: modules take plain values.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from embeddings.table import TableConfig
from trainer.usual import GateConfig


@dataclass(frozen=True)
class DataConfig:
    """Where the days lie: path/<day_column>=YYYY-MM-DD/*.parquet, on any filesystem that pyarrow can open.

    group: the column that makes one ranked list (for GAUC), weighted as gauc says. user: the column that says whose row
    it is: rows of one user are alike, which tells how sure a metric is (default: the group, or each row).
    keys: columns that predict copies.
    weight: a column of sample weights. known: columns that are known when a row is scored, although labels are made
    with them (a video's length). lanes: parts in which a day is read side by side; at least as many as workers,
    the same for the life of a model.

    period: what a night trains on: a day, or an hour: <day_column>=.../hour=HH, or the rows of a day by `time`, a
    column of timestamps or milliseconds, as the clock of time_zone shows it. max_bad_rows: the share of malformed rows
    and files that is set aside; 0: the first stops the night. label_delay_days: a day is trained when so many later
    days are there, because its labels are complete only then.
    """

    path: str
    day_column: str = "day"
    group: str | None = None
    gauc: Literal["impressions", "positives", "equal"] = "impressions"
    user: str | None = None
    keys: tuple[str, ...] = ()
    weight: str | None = None
    known: tuple[str, ...] = ()
    lanes: int = 24
    period: Literal["day", "hour"] = "day"
    time: str | None = None
    time_zone: str = "UTC"
    max_bad_rows: float = 0.0
    label_delay_days: int = 0


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
class WorkersConfig:
    """As many workers as the cluster can give, within these bounds: fewer when a node is lost, more again when it is
    back.
    """

    max: int
    min: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """workers: so many, or within bounds. batch_size: rows of a step over all workers together, so that the number of
    workers never changes the answer. payload: how rows and their gradients travel between workers.
    """

    workers: int | WorkersConfig = 2
    batch_size: int = 4096
    precision: Literal["fp32", "bf16"] = "fp32"
    payload: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    rows: RowsConfig = field(default_factory=RowsConfig)
    dense: DenseConfig = field(default_factory=DenseConfig)

    @property
    def workers_between(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        if isinstance(self.workers, int):
            return self.workers, self.workers
        return self.workers.min, self.workers.max


@dataclass(frozen=True)
class NightlyConfig:
    """missing_days: whether a gap in the days stops the night. late: what to do about a day that is delivered again
    after it was trained, or only after a later one was: tell of it, or train anew from it on. max_failures: how often
    lost workers are replaced in one call. hang_s: a worker that shows no sign of life for so long is named and
    replaced; 0: it is waited for.
    """

    gate: GateConfig = field(default_factory=GateConfig)
    missing_days: Literal["stop", "skip"] = "stop"
    late: Literal["ignore", "retrain"] = "ignore"
    max_failures: int = 3
    hang_s: float = 60.0


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
    """base_every: every so many intervals all rows are written, in between only what changed. progress_minutes: between
    snapshots within an interval; 0: there are none. retries: how often a commit that fails is tried again. keep_days:
    checkpoints of older days are removed, but for the newest keep_bases bases among them and the champion.
    """

    path: str = "checkpoints"
    base_every: int = 7
    progress_minutes: float = 10.0
    retries: int = 3
    keep_days: int = 30
    keep_bases: int = 4


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
