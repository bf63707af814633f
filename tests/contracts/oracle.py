"""A store in plain Python: dicts of ids, rows in float64, one worker. What the real one must do on any number of them.

Written from the docstrings of embeddings, not from its code: no key, no bucket and no shard but where an order or a
collision is promised by them.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from contracts.examples import (
    FIRST_DAY,
    LABELS,
    OPTIMIZERS,
    Batch,
    Example,
    Row,
    bucket_of,
    coefficients,
    first_weight,
    key_of,
    owner_of,
    signed,
)
from numpy.typing import NDArray

from embeddings.shard import COUNTS
from embeddings.table import TableConfig
from embeddings.tallies import IMPRESSIONS, SIGHTINGS, Tally

Floats = NDArray[np.float64]
Events = dict[str, int]  # how often what happened to an id in a batch


@dataclass
class Known:
    """What is known of a row. sums: of each tally, as of day; today: what that day itself adds to a statistic. slack:
    how far rounding to float16 may have led its weights astray.
    """

    weight: Floats
    state: dict[str, Floats]
    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    today: dict[str, float] = field(default_factory=dict)
    day: int = 0
    slack: float = 0.0


@dataclass
class Table:
    """rows and waiting (sightings, last day) by id; cells of a sketch by what shares one; default: what others read."""

    name: str
    config: TableConfig
    tallies: list[Tally]
    default: Known
    rows: dict[int, Known] = field(default_factory=dict)
    waiting: dict[int, tuple[int, int]] = field(default_factory=dict)
    cells: dict[int, int] = field(default_factory=dict)

    @property
    def sketched(self) -> bool:
        return self.config.min_count > 1 and self.config.admission.kind == "sketch"

    def cell(self, id_: int) -> int:
        """One byte a bucket and hash: all ids of a bucket share it; with many bytes none of these few ids do."""
        return bucket_of(id_) if self.config.admission.cells == 1 else id_

    def sum_of(self, known: Known, tally: Tally, day: int, *, as_day_began: bool = False) -> float:
        """A tally as of a day."""
        age = day - known.day
        total = known.sums.get(tally.name, 0.0)
        if age or not (tally.by_day or as_day_began):
            total += known.today.get(tally.name, 0.0)
        return float(total * 0.5 ** (age / tally.half_life_days))

    def least(self, how_many: int, day: int, sparing: Iterable[int] = ()) -> list[int]:
        """The least valuable ids, those of equal value by their keys."""
        spared = set(sparing)
        by_value = [(self.sum_of(k, self.tallies[0], day), key_of(i), i) for i, k in self.rows.items()]
        return [i for _, _, i in sorted(by_value) if i not in spared][:how_many]


@dataclass
class Step:
    """What a batch reads: by feature one vector a row, and the statistics, summed over the row's ids."""

    vectors: dict[str, Floats]
    slack: dict[str, Floats]
    statistics: dict[str, Floats]


class Oracle:
    """One worker's dicts. A snapshot is a copy of them."""

    def __init__(self, example: Example):
        self.example, self.optimizer, self.day, self.step = example, example.optimizer, FIRST_DAY, 0
        self.tables: dict[str, Table] = {}
        for name, config in example.segments[0].tables.items():
            value = Tally("value", config.value or {SIGHTINGS: 1.0}, config.value_half_life_days)
            self.tables[name] = Table(
                name, config, [value, *example.tallies[name]], self._known(np.zeros(config.dim), config)
            )
        self.saved: dict[str, Table] | None = None
        self.saved_day = FIRST_DAY
        self.reset_counts()

    def reset_counts(self) -> None:
        self.counts = {name: dict.fromkeys(COUNTS, 0) for name in self.tables}

    def _known(self, weight: Floats, config: TableConfig) -> Known:
        each = OPTIMIZERS[self.optimizer].states
        slack = 2.0**-11 * float(np.abs(weight).max()) if config.dtype == "float16" else 0.0
        return Known(weight, {n: np.zeros(config.dim if wide else 1) for n, wide in each.items()}, slack=slack)

    def train(self, batch: Batch, push: str, num_workers: int) -> Step:
        """Pull and push."""
        for name, table in self.tables.items():
            self._count_ids(name, batch, num_workers)
            self._admit(table, self._happened(name, batch))
        step = self._read(batch)
        for name, table in self.tables.items():
            self._enter(table, self._happened(name, batch))
        if push != "none":
            for name, table in self.tables.items():
                self._push(table, self._gradients(name, batch, push))
        self.step += 1
        return step

    def score(self, batch: Batch) -> Step:
        for name, table in self.tables.items():
            self.counts[name]["unknown"] += len(self._happened(name, batch).keys() - table.rows.keys())
        return self._read(batch)

    def _features(self, table: str) -> list[str]:
        return [feature for feature, of in self.example.feature_tables.items() if of == table]

    def _count_ids(self, table: str, batch: Batch, num_workers: int) -> None:
        """A worker takes every num_workers-th row, and asks for each distinct id once."""
        for worker in range(num_workers):
            ids = [i for row in batch[worker::num_workers] for f in self._features(table) for i in row.ids[f]]
            self.counts[table]["ids"] += len(ids)
            self.counts[table]["distinct"] += len(set(ids))

    def _happened(self, table: str, batch: Batch) -> dict[int, Events]:
        found: dict[int, Events] = {}
        for row in batch:
            for feature in self._features(table):
                for i in row.ids[feature]:
                    events = found.setdefault(i, dict.fromkeys((SIGHTINGS, IMPRESSIONS, *LABELS), 0))
                    events[SIGHTINGS] += 1
                    if feature in self.example.own:
                        self._add_row(events, row)
        return found

    def _add_row(self, events: Events, row: Row) -> None:
        events[IMPRESSIONS] += 1
        for label, happened in zip(LABELS, row.labels, strict=True):
            events[label] += happened

    def _admit(self, table: Table, happened: Mapping[int, Events]) -> None:
        counts, config = self.counts[table.name], table.config
        missing = [i for i in happened if i not in table.rows]
        counts["hit"] += len(happened) - len(missing)
        totals = self._sightings(table, {i: happened[i][SIGHTINGS] for i in missing})
        due = sorted((i for i in missing if totals[i] >= config.min_count), key=lambda i: signed(key_of(i)))
        if not config.grow:
            lacking = len(table.rows) + len(due) - config.capacity_rows
            if lacking > 0 and config.when_full == "evict":
                self._evict(table, table.least(lacking, self.day, sparing=happened))
            room = max(0, config.capacity_rows - len(table.rows))
            counts["rejected"] += len(due[room:])
            due = due[:room]
        for i in due:
            weight = np.array(first_weight(table.name, i, config.dim, 0)) * config.init_scale
            table.rows[i] = self._known(weight, config)
            table.rows[i].count = totals[i] - happened[i][SIGHTINGS]
            table.waiting.pop(i, None)
        counts["new"] += len(due)
        counts["admitted"] += len(due) if config.min_count > 1 else 0

    def _sightings(self, table: Table, seen: Mapping[int, int]) -> dict[int, int]:
        """All so far, of ids without a row."""
        if table.sketched:
            totals = {i: min(255, table.cells.get(table.cell(i), 0) + n) for i, n in seen.items()}
            for i, total in totals.items():
                table.cells[table.cell(i)] = max(table.cells.get(table.cell(i), 0), total)
            return totals
        if table.config.min_count == 1:
            return dict(seen)
        table.waiting |= {i: (table.waiting.get(i, (0, 0))[0] + n, self.day) for i, n in seen.items()}
        return {i: table.waiting[i][0] for i in seen}

    def _read(self, batch: Batch) -> Step:
        step = Step({}, {}, {})
        for feature, name in self.example.feature_tables.items():
            table = self.tables[name]
            known = [[table.rows.get(i, table.default) for i in row.ids[feature]] for row in batch]
            none = np.zeros(table.config.dim)
            step.vectors[feature] = np.array([sum((k.weight for k in row), start=none) for row in known])
            step.slack[feature] = np.array([sum(k.slack for k in row) for row in known])
            sums = [[self._statistic(table, row, tally) for tally in table.tallies[1:]] for row in known]
            step.statistics[feature] = np.array(sums).reshape(len(batch), len(table.tallies) - 1)
        return step

    def _statistic(self, table: Table, known: Iterable[Known], tally: Tally) -> float:
        """Over all ids of a row; those that read the default row add nothing."""
        return sum(table.sum_of(k, tally, self.day) for k in known if k is not table.default)

    def _enter(self, table: Table, happened: Mapping[int, Events]) -> None:
        for i, events in happened.items():
            if i in table.rows:
                known = table.rows[i]
                known.count += events[SIGHTINGS]
                for tally in table.tallies:
                    self._tally(table, known, tally, sum(n * events[event] for event, n in tally.weights.items()))
                known.day = self.day

    def _tally(self, table: Table, known: Known, tally: Tally, more: float) -> None:
        if tally is table.tallies[0]:  # the value
            known.sums[tally.name] = table.sum_of(known, tally, self.day) + more
        elif known.day == self.day:
            known.today[tally.name] = known.today.get(tally.name, 0.0) + more
        else:
            known.sums[tally.name], known.today[tally.name] = table.sum_of(known, tally, self.day), more

    def _gradients(self, table: str, batch: Batch, push: str) -> dict[int, Floats]:
        """Of each id the sum over all places where it stands."""
        dim = self.tables[table].config.dim
        found: dict[int, Floats] = {}
        for f, (feature, of) in enumerate(self.example.feature_tables.items()):
            factors = coefficients(f, len(batch), self.step, dim) * (push == "push")
            for row, factor in zip(batch if of == table else [], factors, strict=False):
                for i in row.ids[feature]:
                    found[i] = found.get(i, 0.0) + factor
        return found

    def _push(self, table: Table, gradients: Mapping[int, Floats]) -> None:
        lacking = [gradient for i, gradient in gradients.items() if i not in table.rows]
        if lacking and table.config.default_row == "trained":
            self._update(table.default, np.sum(lacking, axis=0), table.config)
            table.default.count += 1
        for i, gradient in gradients.items():
            if i in table.rows:
                self._update(table.rows[i], gradient, table.config)

    def _update(self, known: Known, gradient: Floats, config: TableConfig) -> None:
        before = known.weight
        known.weight, known.state = stepped(self.optimizer, gradient, known.weight, known.state)
        if config.dtype == "float16":
            largest = max(np.abs(before).max(), np.abs(known.weight).max()) + known.slack
            known.slack += 2.0**-10 * largest + 2.0**-24

    def _evict(self, table: Table, ids: Iterable[int]) -> None:
        for i in list(ids):
            del table.rows[i]
            self.counts[table.name]["evicted"] += 1

    def evict_least(self, table: str, how_many: int) -> int:
        found = self.tables[table].least(how_many, self.day)
        self._evict(self.tables[table], found)
        return len(found)

    def end_day(self) -> None:
        for table in self.tables.values():
            config = table.config
            if config.ttl_days is not None:
                self._evict(table, [i for i, k in table.rows.items() if self.day - k.day >= config.ttl_days])
            if config.budget_rows is not None:
                self._evict(table, table.least(max(0, len(table.rows) - config.budget_rows), self.day))
            forgotten = [i for i, (_, day) in table.waiting.items() if self.day - day >= config.admission.forget_days]
            for i in forgotten:
                del table.waiting[i]

    def begin_day(self, day: int) -> None:
        for table in self.tables.values():
            every = table.config.admission.forget_days
            for _ in range(day // every - self.day // every):
                table.cells = {cell: count // 2 for cell, count in table.cells.items()}
        self.day = day

    def overall(self) -> dict[str, list[float]]:
        """By table its statistics over all ids, as the day began."""
        return {
            name: [
                sum(table.sum_of(k, tally, self.day, as_day_began=True) for k in table.rows.values())
                for tally in table.tallies[1:]
            ]
            for name, table in self.tables.items()
            if table.tallies[1:]
        }

    def load(self, tables: Mapping[str, TableConfig]) -> tuple[str, int, int] | None:
        """As of the last snapshot, but with these bounds. Returns the table that is too full, its rows and capacity."""
        for table in self.tables.values():
            table.rows, table.waiting, table.cells = {}, {}, {}
            table.default = self._known(np.zeros(table.config.dim), table.config)
        if self.saved:
            self.tables, self.day = copy.deepcopy(self.saved), self.saved_day
        self.reset_counts()
        for name, table in self.tables.items():
            table.config = config = tables[name]
            if not config.grow and len(table.rows) > config.capacity_rows:
                if config.when_full == "reject":
                    return name, len(table.rows), config.capacity_rows
                self._evict(table, table.least(len(table.rows) - config.capacity_rows, self.day))
        return None

    def account(self, table: str, num_workers: int) -> dict[str, float]:
        """What account() says of a table; what it says of memory is left out."""
        rows, counts = self.tables[table].rows, self.counts[table]
        of_worker = [sum(owner_of(i, num_workers) == w for i in rows) for w in range(num_workers)]
        most = sorted((known.count for known in rows.values()), reverse=True)
        return {
            **counts,
            "repeats": counts["ids"] - counts["distinct"],
            "waiting": len(self.tables[table].waiting),
            "rows": len(rows),
            "imbalance": round(max(of_worker) * num_workers / max(sum(of_worker), 1e-9), 4),
            "top_share": round(sum(most[: math.ceil(len(rows) / 100)]) / max(sum(most), 1), 4),
        }


def stepped(optimizer: str, g: Floats, w: Floats, state: Mapping[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
    """One optimizer step, from the papers' formulas: the new weights and states."""
    o: Any = OPTIMIZERS[optimizer]
    if optimizer == "sgd":
        return w - o.lr * g, {}
    if optimizer in ("adagrad", "rowwise_adagrad"):
        ((name, s),) = state.items()
        s = s + (g**2 if optimizer == "adagrad" else np.mean(g**2))
        return w - o.lr * g / (np.sqrt(s) + o.eps), {name: s}
    if optimizer == "ftrl":
        z, n = state["ftrl_z"], state["ftrl_n"] + g**2
        rate, before = (np.where(m > 0, (o.beta + np.sqrt(m)) / o.lr, 0) for m in (n, state["ftrl_n"]))
        z = z + g - (rate - before) * w
        solved = -np.sign(z) * np.maximum(np.abs(z) - o.l1, 0) / (rate + o.l2)
        return np.where(n > 0, solved, w), {"ftrl_z": z, "ftrl_n": n}
    names = list(state)
    m, v, t = (state[name] for name in names)
    t = t + 1
    m = o.beta1 * m + (1 - o.beta1) * g
    v = o.beta2 * v + (1 - o.beta2) * (g**2 if optimizer == "adam" else np.mean(g**2))
    step = o.lr * m / (1 - o.beta1**t) / (np.sqrt(v / (1 - o.beta2**t)) + o.eps)
    return w - step, dict(zip(names, (m, v, t), strict=True))
