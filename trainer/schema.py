"""Which columns of the logs are read, as what, and of which type they may be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.expressions import Expression, Values, parse
from trainer.storage import first_line

REEXPORT = "re-export the day, or correct the configuration"


class Allowed(NamedTuple):
    """What labels may be: holds(values) -> bool, for values that are known. who: who asks for it."""

    who: str
    expected: str
    holds: Callable[[Values], NDArray[np.bool_]]


class Use(NamedTuple):
    """Who reads a column, and of which types it may be."""

    who: str
    column: str
    fits: Callable[[pa.DataType], bool]


@dataclass(frozen=True)
class Schema:
    """Which columns are read, and as what.

    ids, numbers: feature -> column. max_len: feature -> how many of a list's last ids count. log1p: numbers that are
    transformed so. labels: task -> expression, most often a column. weights: task -> expression, for tasks that weigh
    rows in their own way. allowed: task -> what its label may be, checked in this order. weight, group: columns, or
    None. user: likewise; may be null. keys: columns handed through. aligned: features whose lists are read side by
    side, so that they are equally long on every row and of one max_len.
    """

    ids: Mapping[str, str]
    numbers: Mapping[str, str]
    labels: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    max_len: Mapping[str, int] = field(default_factory=dict)
    log1p: frozenset[str] = frozenset()
    allowed: Mapping[str, Sequence[Allowed]] = field(default_factory=dict)
    weight: str | None = None
    group: str | None = None
    user: str | None = None
    keys: tuple[str, ...] = ()
    aligned: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        assert self.weights.keys() <= self.labels.keys(), "only a task has weights"
        for features in self.aligned:
            assert len({self.max_len[name] for name in features}) == 1, "lists side by side need one max_len"

    @cached_property
    def label_of(self) -> dict[str, Expression]:
        """Each task's label."""
        return {task: parse(text, f"the label of task '{task}'") for task, text in self.labels.items()}

    @cached_property
    def weight_of(self) -> dict[str, Expression]:
        """The weights of the tasks that have their own."""
        return {task: parse(text, f"the weight of task '{task}'") for task, text in self.weights.items()}

    @property
    def columns(self) -> list[str]:
        wanted = [*self.ids.values(), *self.numbers.values(), *self.keys]
        for expression in (*self.label_of.values(), *self.weight_of.values()):
            wanted += expression.columns
        return list(dict.fromkeys([*wanted, *(c for c in (self.weight, self.group, self.user) if c)]))

    @property
    def lists(self) -> set[str]:
        """The columns that hold lists."""
        return {self.ids[name] for name in self.max_len}

    @property
    def uses(self) -> list[Use]:
        """Who reads which column, in the order in which a missing one is told."""
        ids = [Use(f"feature '{n}'", c, is_id_list if n in self.max_len else is_id) for n, c in self.ids.items()]
        numbers = [Use(f"feature '{n}'", c, is_number) for n, c in self.numbers.items()]
        labels = [Use(f"task '{n}'", c, is_number) for n, e in self.label_of.items() for c in e.columns]
        weights = [Use(f"the weight of task '{n}'", c, is_number) for n, e in self.weight_of.items() for c in e.columns]
        weight = [Use("data.weight", self.weight, is_number)] if self.weight else []
        group = [Use("data.group", self.group, is_id)] if self.group else []
        user = [Use("data.user", self.user, is_id)] if self.user else []
        keys = [Use("data.keys", c, _is_any) for c in self.keys]
        return [*ids, *numbers, *labels, *weights, *weight, *group, *user, *keys]


def as_table(schema: Schema, columns: Mapping[str, Sequence[Any]], where: str) -> pa.Table:
    """Values by column, as a request brings them, as the table that a log would hold; columns that nothing reads are
    left out. where: its place, for errors.
    """
    ids = set(schema.ids.values())
    arrays = {}
    for column in schema.columns:
        if column not in columns:
            got, do = ", ".join(columns) or "none", "send every column that the model reads, null where it is not known"
            raise UserError(f"column '{column}' is missing", where, got=f"columns {got}", do=do)
        kind = None if column in ids else pa.float64()
        try:
            array = pa.array(columns[column], kind)
        except (pa.ArrowException, OverflowError) as error:
            do = "send ids as integers or strings, lists as lists of them, numbers as numbers"
            raise UserError(f"column '{column}' cannot be read", where, got=first_line(error), do=do) from None
        fits = is_id_list if column in schema.lists else is_id if column in ids else is_number
        if not fits(array.type):
            got, expected = str(array.type), fits.__doc__ or ""
            raise UserError(f"column '{column}' has the wrong type", where, got, expected, "send such values")
        arrays[column] = array
    if len({len(array) for array in arrays.values()}) > 1:
        got = ", ".join(f"{len(array)} in '{column}'" for column, array in arrays.items())
        raise UserError("columns of different lengths", where, got, "one value a row in each", "send whole rows")
    return pa.table(arrays)


def is_id(kind: pa.DataType) -> bool:
    """an integer or a string"""
    return pa.types.is_null(kind) or (not _is_list(kind) and id_sort(kind) is not None)


def is_id_list(kind: pa.DataType) -> bool:
    """a list of integers or strings"""
    return pa.types.is_null(kind) or (_is_list(kind) and is_id(kind.value_type))


def is_number(kind: pa.DataType) -> bool:
    """an integer, a float or a boolean"""
    known = (pa.types.is_null, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(is_(kind) for is_ in known)


def is_time(kind: pa.DataType) -> bool:
    """a timestamp, or an integer of milliseconds since 1970"""
    return pa.types.is_timestamp(kind) or pa.types.is_integer(kind)


def id_sort(kind: pa.DataType) -> str | None:
    """What ids of a type, or lists of them, are: "integers" or "strings". A column that goes from one to the other
    holds other ids throughout.
    """
    if _is_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return "integers"
    return "strings" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_any(kind: pa.DataType) -> bool:
    """anything"""
    return True
