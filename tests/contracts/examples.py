"""An example: tables, and what happens to them, drawn by hypothesis.

Numbers are chosen so that sums are exact in float32: gradients are quarters, values halve every day. So what is chosen
by comparing values (who is evicted) has one answer, whatever the order of the additions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from embeddings.buckets import unhash64
from embeddings.jagged import Jagged
from embeddings.optim import Adagrad, Adam, Ftrl, RowOptimizer, RowwiseAdagrad, RowwiseAdam, Sgd
from embeddings.table import Admission, TableConfig
from embeddings.tallies import IMPRESSIONS, SIGHTINGS, Tally

FIRST_DAY = 738_000
LABELS = ("click", "buy")
OPTIMIZERS: dict[str, RowOptimizer] = {
    "sgd": Sgd(lr=0.25),
    "adagrad": Adagrad(lr=0.25),
    "rowwise_adagrad": RowwiseAdagrad(lr=0.25),
    "adam": Adam(lr=0.25),
    "rowwise_adam": RowwiseAdam(lr=0.25),
    "ftrl": Ftrl(lr=0.5, beta=1.0, l1=0.125, l2=0.25),
}
EXTREMES = (0, -1, 2**63 - 1, -(2**63))
# Ids whose keys are the extremes, lie on both sides of the borders between shards, or are equal in their low halves.
_KEYS = [*EXTREMES, *(s * 2**52 - e for s in (-682, 683) for e in (0, 1)), *(k << 32 | 7 for k in range(-3, 3))]
_MULTIPLES = [840 * m for m in (1, -1, 2**40, -(2**40), 4096, 10**12)]
IDS = (*range(41), *EXTREMES[1:], *unhash64(torch.tensor(_KEYS)).tolist(), *_MULTIPLES)
assert len(set(IDS)) == 64

List: TypeAlias = list[int]


class Row(NamedTuple):
    """One row of a batch: the ids of each feature, and what happened."""

    ids: dict[str, List]
    labels: tuple[int, ...]


Batch: TypeAlias = list[Row]


@dataclass(frozen=True)
class Train:
    """push: gradients of a loss; zeros: nothing was differentiated, pushed all the same; none: not pushed."""

    drawn: bytes
    push: str = "push"


@dataclass(frozen=True)
class Score:
    drawn: bytes


@dataclass(frozen=True)
class Days:
    """The day ends; the next one that begins is so many days later."""

    days: int


@dataclass(frozen=True)
class Evict:
    table: int
    rows: int


@dataclass(frozen=True)
class Hold:
    """A snapshot takes hold of this instant: a base or a delta. It is written at once, or later:
    before the next, or at the end of the segment.
    """

    base: bool
    later: bool


@dataclass(frozen=True)
class Account:
    reset: bool


Workers: TypeAlias = Sequence[Sequence[int]]
Event: TypeAlias = Train | Score | Days | Evict | Hold | Account


@dataclass(frozen=True)
class Segment:
    """What a fresh set of workers does: load what was written so far, then the events. tables: as they are from here
    on. compact: the layers are first folded into one base, by so many pieces of the buckets.
    """

    workers: int
    tables: Mapping[str, TableConfig]
    events: Sequence[Event]
    compact: int = 0
    lost: bool = False


@dataclass(frozen=True)
class Example:
    optimizer: str
    tallies: Mapping[str, Sequence[Tally]]
    feature_tables: Mapping[str, str]
    own: frozenset[str]
    ids: tuple[int, ...]
    segments: list[Segment]

    def batch(self, drawn: bytes) -> Batch:
        """Rows, from bytes: a byte ends a row and says what happened on it, or is an id of one of the features."""
        features = list(self.feature_tables)
        rows = [Row({feature: [] for feature in features}, (0, 0))]
        for byte in drawn:
            kind, number = divmod(byte, 64)
            if kind == 3:
                rows[-1] = rows[-1]._replace(labels=(number % 3, number // 3 % 2))
                rows.append(Row({feature: [] for feature in features}, (0, 0)))
            else:
                feature = features[(kind + 3 * (number % 2)) % len(features)]
                rows[-1].ids[feature].append(self.ids[number % len(self.ids)])
        return rows


def coefficients(feature: int, rows: int, step: int, dim: int) -> NDArray[np.float64]:
    """What the loss multiplies a feature's vectors of a batch with: quarters between -1 and 1, [rows, dim]."""
    return ((5 * feature + 7 * np.arange(rows)[:, None] + 3 * step + 4 * np.arange(dim)) % 9 - 4) / 4


def jagged(lists: Sequence[List]) -> Jagged:
    values = [i for ids in lists for i in ids]
    return Jagged.from_lengths(
        torch.tensor(values, dtype=torch.int64), torch.tensor([len(ids) for ids in lists], dtype=torch.int64)
    )


@lru_cache
def first_weight(table: str, id_: int, dim: int, seed: int) -> Sequence[float]:
    """The law of first weights on Python's integers: for each column the top 53 bits of a hash, in -1 .. 1."""
    name = 0xCBF29CE484222325 ^ seed  # FNV-1a
    for byte in table.encode():
        name = (name ^ byte) * 0x100000001B3 % 2**64
    mixed = [key_of(key_of(id_) ^ key_of((name >> 1) + column)) for column in range(dim)]
    return [(signed(m) >> 11) / 2**52 for m in mixed]


def key_of(id_: int) -> int:
    """splitmix64, unsigned."""
    z = (id_ + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def signed(key: int) -> int:
    return (key + 2**63) % 2**64 - 2**63


def bucket_of(id_: int) -> int:
    return (signed(key_of(id_)) + 2**63) >> 52


def owner_of(id_: int, num_workers: int) -> int:
    return bucket_of(id_) * num_workers // 4096


class Dice:
    """Choices from drawn bytes: one draw for many, which takes a fraction of the time. The first option is the
    simplest; it is taken where the bytes end.
    """

    def __init__(self, drawn: bytes):
        self._drawn = iter(drawn)

    def choose(self, *options: Any) -> Any:
        return options[next(self._drawn, 0) % len(options)]


_VALUES: tuple[dict[str, float], ...] = (
    {},
    {"click": 4.0, SIGHTINGS: 0.5},
    {IMPRESSIONS: 1.0, "buy": 2.0},
    {"click": 1.0},
)
_TALLIES: tuple[tuple[Tally, ...], ...] = (
    (),
    (Tally("clicks", {"click": 1.0}, half_life_days=1.0),),
    (
        Tally("views", {IMPRESSIONS: 1.0, "buy": 4.0}, half_life_days=3.0, by_day=True),
        Tally("seen", half_life_days=2.0),
    ),
)
_WORKERS = (1, 2, 3, 2, 1, 4, 2, 8, 1, 2, 3, 5, 2, 6, 7, 2)
_KINDS = ["train"] * 8 + ["days"] * 3 + ["hold"] * 2 + ["evict", "score", "account"]


def _bounds(dice: Dice) -> dict[str, Any]:
    return {
        "capacity_rows": dice.choose(2, 4, 8, 20),
        "grow": dice.choose(True, False),
        "when_full": dice.choose("evict", "reject"),
        "ttl_days": dice.choose(None, None, 1, 2, 3),
        "budget_rows": dice.choose(None, None, 1, 4, 8),
    }


def _table(dice: Dice) -> TableConfig:
    return TableConfig(
        dim=dice.choose(4, 4, 8),
        init_scale=dice.choose(0.0, 0.5),
        dtype=dice.choose("float32", "float32", "float32", "float16"),
        min_count=dice.choose(1, 2, 3),
        admission=Admission(
            dice.choose("exact", "exact", "sketch"), cells=dice.choose(1 << 18, 1), forget_days=dice.choose(1, 2, 3)
        ),
        default_row=dice.choose("zero", "trained"),
        value=dice.choose(*_VALUES),
        value_half_life_days=1.0,
        **_bounds(dice),
    )


def _event(drawn: bytes) -> Event:
    dice, rest = Dice(drawn[:3]), drawn[2:]
    match dice.choose(*_KINDS):
        case "train":
            return Train(rest, dice.choose(*["push"] * 8, "zeros", "none"))
        case "days":
            return Days(dice.choose(1, 1, 1, 2, 3))
        case "hold":
            return Hold(*dice.choose((True, False), (False, False), (True, True), (False, True)))
        case "evict":
            return Evict(dice.choose(0, 1, 2), dice.choose(0, 1, 2, 3, 4, 5))
        case "score":
            return Score(rest)
    return Account(dice.choose(False, True))


def _example(tables: Sequence[bytes], segments: Sequence[tuple[bytes, Sequence[bytes]]], workers: Workers) -> Example:
    configs = {f"t{t}": _table(Dice(drawn)) for t, drawn in enumerate(tables)}
    features = {"own": "t0", "list": "t0"} | {f"of_{name}": name for name in list(configs)[1:]}
    dice = Dice(segments[0][0])
    if len(configs) == 3 and dice.choose(*[False] * 5, True):
        del features["of_t2"]  # a table that no feature reads
    size, first, stride = dice.choose(8, 16, 64), dice.choose(*range(64)), dice.choose(1, 5, 19)
    tallies = {name: dice.choose(*_TALLIES) for name in configs}
    found = Example(
        optimizer=dice.choose("rowwise_adagrad", "rowwise_adagrad", *OPTIMIZERS),
        tallies=tallies,
        feature_tables=features,
        own=frozenset(dice.choose(["own"], ["own", "of_t1"])) & features.keys(),
        ids=tuple(IDS[(first + stride * i) % 64] for i in range(size)),
        segments=[],
    )
    for number, (drawn, events) in enumerate(segments[: len(workers)]):
        dice = Dice(drawn[8:] if number == 0 else drawn)
        count, lost, compact = dice.choose(*workers[number]), dice.choose(*[False] * 5, True), dice.choose(0, 0, 1, 2)
        if number and dice.choose(False, True):
            configs = {name: replace(config, **_bounds(dice)) for name, config in configs.items()}
        found.segments.append(Segment(count, configs, [_event(event) for event in events], compact, lost))
    return found


def examples(workers: Workers = (_WORKERS, _WORKERS, _WORKERS), max_events: int = 6) -> st.SearchStrategy[Example]:
    """workers: how many there may be in each segment."""
    event = st.binary(min_size=6, max_size=32)
    segments = st.tuples(st.binary(min_size=20, max_size=20), st.lists(event, min_size=2, max_size=max_events))
    return st.builds(
        _example,
        st.lists(st.binary(min_size=15, max_size=15), min_size=1, max_size=3),
        st.lists(segments, min_size=1, max_size=len(workers)),
        st.just(workers),
    )
