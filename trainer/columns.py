"""The columns of one row group on their way to tensors, every value checked.

A value that means nothing is an error that names its file, row group, column and row; or, where somebody counts them,
its row is put down with the reason and the value reads as unknown.

Shape letters: B rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.buckets import hash64
from embeddings.jagged import Jagged
from trainer.errors import UserError
from trainer.expressions import Expression, Values
from trainer.schema import REEXPORT, Schema

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass
class Refused:
    """The rows of a row group that hold a value which means nothing, each with the first reason that was found.

    reasons: (column, reason, rows). bad_B: all of them.
    """

    bad_B: NDArray[np.bool_]
    reasons: list[tuple[str, str, list[int]]] = field(default_factory=list)

    def add(self, column: str, reason: str, bad_B: NDArray[np.bool_]) -> None:
        if (new_B := bad_B & ~self.bad_B).any():
            self.reasons.append((column, reason, np.flatnonzero(new_B).tolist()))
            self.bad_B |= bad_B


@dataclass(frozen=True)
class _Spot:
    """Where values stand in the logs: "column 'x'"; name: x."""

    text: str
    name: str

    @staticmethod
    def column(name: str) -> "_Spot":
        return _Spot(f"column '{name}'", name)


class Columns:
    """The columns of some rows. where: their place, for errors; rows_B: where each stands in that place, when not in
    this order. refused: who counts bad rows; None: the first one is an error.
    """

    def __init__(
        self,
        schema: Schema,
        table: pa.Table,
        where: str,
        rows_B: NDArray[np.int64] | None = None,
        refused: Refused | None = None,
    ):
        self._schema, self._where, self._num_rows = schema, where, table.num_rows
        self._rows_B, self._refused = rows_B, refused
        names = table.column_names
        self._array = {name: _typed(table[name].combine_chunks(), name in schema.lists) for name in names}
        self._read: dict[str, Values] = {}

    def check(self) -> None:
        """Look at every value that may mean nothing."""
        self._check_lists()
        self.numbers()
        self.labels()
        self.weights()
        if self._schema.group:
            self._check_group(self._schema.group)

    def ids(self) -> dict[str, Jagged]:
        self._check_lists()
        schema = self._schema
        return {name: _ids(self._array[column], schema.max_len.get(name)) for name, column in schema.ids.items()}

    def numbers(self) -> Tensor:
        schema = self._schema
        return self._side_by_side([self._number(c, name in schema.log1p) for name, c in schema.numbers.items()])

    def labels(self) -> Tensor:
        labels = []
        for task, expression in self._schema.label_of.items():
            values, spot = self._values(expression)
            for who, expected, holds in self._schema.allowed.get(task, ()):
                bad = ~(holds(values) | np.isnan(values))
                values = self._refuse(bad, values, spot, f"not the label of a task with {who}", f"{expected} or null")
            labels.append(values)
        return self._side_by_side(labels)

    def weights(self) -> Tensor:
        schema, row_weights = self._schema, np.ones(self._num_rows)
        if schema.weight:
            row_weights = self._weight(self._floats(schema.weight), _Spot.column(schema.weight))
        weights = dict.fromkeys(schema.labels, row_weights)
        for task, expression in schema.weight_of.items():
            values, spot = self._values(expression)
            unknown = np.isnan(values) & np.isnan(self._values(schema.label_of[task])[0])
            values = np.where(unknown, 1.0, values)  # what happened is not known, so neither is what it weighs
            weights[task] = self._finite(self._weight(values, spot) * row_weights, np.True_, spot)
        return self._side_by_side(list(weights.values()))

    def groups(self) -> Tensor | None:
        if not (column := self._schema.group):
            return None
        self._check_group(column)
        return _hash_ids(self._array[column])

    def users(self, first_row: int) -> Tensor | None:
        """A row that names nobody is somebody of its own."""
        if self._schema.user is None:
            return None
        array = self._array[self._schema.user]
        known = torch.from_numpy(array.is_valid().to_numpy(zero_copy_only=False).copy())
        users = ~hash64(torch.arange(first_row, first_row + len(array)))
        users[known] = _hash_ids(array.drop_null())
        return users

    def _check_group(self, column: str) -> None:
        if count := self._array[column].null_count:
            null, expected = self._array[column].is_null().to_numpy(zero_copy_only=False), "a group for every row"
            self._refuse_rows(null, _Spot.column(column), "not a group", f"null in {count} rows", expected)

    def _check_lists(self) -> None:
        for features in self._schema.aligned:
            self._check_aligned([self._schema.ids[name] for name in features])

    def _check_aligned(self, columns: Sequence[str]) -> None:
        lengths = {column: _lengths(self._array[column]) for column in columns}
        for column in columns:
            null = self._array[column].flatten().is_null().to_numpy(zero_copy_only=False)
            if null.any():
                bad = np.zeros(self._num_rows, bool)
                bad[np.arange(self._num_rows).repeat(lengths[column])[null]] = True
                what, expected = "a list that is read beside another has gaps", "an id in every place"
                self._refuse_rows(bad, _Spot.column(column), what, f"{null.sum()} null ids", expected)
        for a, b in pairwise(columns):
            differ = lengths[a] != lengths[b]
            if differ.any():
                row, what = int(differ.argmax()), "lists that are read side by side differ in length"
                got = f"{lengths[a][row]} and {lengths[b][row]}, the first of {differ.sum()} such rows"
                spot = _Spot(f"columns '{a}' and '{b}'", f"{a}, {b}")
                self._refuse_rows(differ, spot, what, got, "equally many ids")

    def _floats(self, column: str) -> Values:
        """float64 with NaN for null; a NaN, an infinity or what float32 would make one means nothing."""
        if column not in self._read:
            array = self._array[column]
            values = np.array(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
            known = array.is_valid().to_numpy(zero_copy_only=False)
            self._read[column] = self._finite(values, known, _Spot.column(column))
        return self._read[column]

    def _number(self, column: str, log1p: bool) -> Values:
        values = self._floats(column)
        if not log1p:
            return values
        bad, what = values <= -1, "log1p is not defined here"
        return np.log1p(self._refuse(bad, values, _Spot.column(column), what, "numbers above -1"))

    def _weight(self, values: Values, spot: _Spot) -> Values:
        return self._refuse(~(values >= 0), values, spot, "not a sample weight", "numbers from 0 up, none of them null")

    def _values(self, expression: Expression) -> tuple[Values, _Spot]:
        """An expression on every row, NaN only where one of its columns is null; and where it stands."""
        if expression.column:
            return self._floats(expression.column), _Spot.column(expression.column)
        spot = _Spot(f"expression '{expression.text}'", expression.text)
        columns = {column: self._floats(column) for column in expression.columns}
        values = np.broadcast_to(expression.evaluate(columns), self._num_rows)
        null = np.any([np.isnan(values) for values in columns.values()], axis=0)
        return self._finite(values, ~null, spot), spot

    def _finite(self, values: Values, known: NDArray[np.bool_] | np.bool_, spot: _Spot) -> Values:
        """The values, refused where they are beyond float32, or NaN though known."""
        bad = ~(np.abs(values) <= _FLOAT32_MAX) & (known | ~np.isnan(values))
        what, expected = "not a finite number", "finite numbers (of float32's range), or null where there is none"
        return self._refuse(bad, values, spot, what, expected)

    def _refuse(self, bad: NDArray[np.bool_], values: Values, spot: _Spot, what: str, expected: str) -> Values:
        """The values; refused where they are bad, and unknown there when somebody counts them."""
        if not bad.any():
            return values
        got = f"{values[bad.argmax()]}" + (f", the first of {int(bad.sum())} such rows" if bad.sum() > 1 else "")
        self._refuse_rows(bad, spot, what, got, expected)
        return np.where(bad, np.nan, values)

    def _refuse_rows(self, bad: NDArray[np.bool_], spot: _Spot, what: str, got: str, expected: str) -> None:
        if self._refused is not None:
            return self._refused.add(spot.name, what, bad)
        row = int(bad.argmax()) if self._rows_B is None else int(self._rows_B[bad.argmax()])
        raise UserError(what, f"{self._where}, {spot.text}, row {row}", got=got, expected=expected, do=REEXPORT)

    def _side_by_side(self, columns: list[Values]) -> Tensor:
        """float32 [B, number of columns]."""
        if not columns:
            return torch.empty(self._num_rows, 0)
        return torch.stack([torch.from_numpy(values.astype(np.float32)) for values in columns], 1)


def _typed(array: pa.Array, is_list: bool) -> pa.Array:
    """A file in which a column has no value at all may have left its type open: then it is a column of nulls."""
    if not pa.types.is_null(array.type):
        return array
    return array.cast(pa.list_(pa.int64()) if is_list else pa.int64())


def _ids(array: pa.Array, max_len: int | None) -> Jagged:
    """max_len None: one id a row, none where null. Else lists of which the last max_len ids count; null ids within
    them are left out.
    """
    if max_len is None:
        present = torch.from_numpy(array.is_valid().to_numpy(zero_copy_only=False).astype(np.int64))
        return Jagged.from_lengths(_hash_ids(array.drop_null()), present)
    lengths, values = torch.from_numpy(_lengths(array)), array.flatten()
    everything = Jagged.from_lengths(torch.arange(len(values)), lengths)
    from_end = everything.offsets[1:].repeat_interleave(lengths) - everything.values_N
    kept = (from_end <= max_len) & torch.from_numpy(values.is_valid().to_numpy(zero_copy_only=False).copy())
    kept_before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
    return Jagged(_hash_ids(values.filter(pa.array(kept.numpy()))), kept_before[everything.offsets])


def _lengths(lists: pa.Array) -> np.ndarray:
    """0 where null."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _hash_ids(array: pa.Array) -> Tensor:
    """Ids as int64: integers keep their 64 bits; a string becomes the first 8 bytes (little-endian) of the
    BLAKE2b-64 hash of its UTF-8.
    """
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_integer(array.type):
        values = np.array(array.to_numpy(zero_copy_only=False))
        return torch.from_numpy(values.view(np.int64) if values.dtype == np.uint64 else values.astype(np.int64))
    encoded = array.dictionary_encode()
    digests = b"".join(
        hashlib.blake2b(text.encode(), digest_size=8).digest() for text in encoded.dictionary.to_pylist()
    )
    hashed = np.frombuffer(digests, dtype="<i8").astype(np.int64)
    return torch.from_numpy(hashed[encoded.indices.to_numpy(zero_copy_only=False)])
