"""Whether the columns of a file are those that are read, and what is new in them against the day before."""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import pyarrow as pa

from trainer.errors import UserError
from trainer.files import Clock, LogFile
from trainer.schema import REEXPORT, Schema, Use, id_sort, is_time

Types: TypeAlias = Mapping[str, pa.DataType]


def check_columns(schema: Schema, file: LogFile, clock: Clock | None, first: LogFile | None) -> None:
    """Every column that is read is there and of a type that it may have. first: the first file of the day, with which
    the others must agree.
    """
    uses = [*schema.uses, *([Use("data.time", clock.column, is_time)] if clock else [])]
    for who, column, fits in uses:
        if column not in file.columns.names:
            got = f"columns {', '.join(file.columns.names)}"
            raise UserError(f"column '{column}' of {who} is missing", file.path, got=got, do=REEXPORT)
        kind = file.columns.field(column).type
        if not fits(kind):
            what, expected = f"column '{column}' of {who} has the wrong type", fits.__doc__ or ""
            raise UserError(what, file.path, got=str(kind), expected=expected, do=REEXPORT)
    if first:
        _check_keys(schema, file, first)
        _check_ids(schema, types_of([first]), types_of([file]), file.path, "the day's first file")


def types_of(files: Iterable[LogFile]) -> Types:
    """The columns of files; the first that has one tells its type, unless it left it open."""
    found: dict[str, pa.DataType] = {}
    for file in files:
        for column in file.columns:
            if pa.types.is_null(found.setdefault(column.name, column.type)):
                found[column.name] = column.type
    return found


def drift(schema: Schema, before: Types, now: Types, where: str) -> list[str]:
    """What is new in the columns against the day before, in words. Ids of another sort are an error."""
    if not before:
        return []
    _check_ids(schema, before, now, where, "the interval before")
    notes = [
        f"column '{column}' is new, of type {now[column]}: nothing reads it" for column in now if column not in before
    ]
    for column in schema.columns:
        was, is_ = before.get(column), now[column]
        if was is not None and was != is_ and not pa.types.is_null(was) and not pa.types.is_null(is_):
            notes.append(f"column '{column}' is of type {is_}, and was of {was}: it is read as before")
    return notes


def _check_keys(schema: Schema, file: LogFile, first: LogFile) -> None:
    """Key columns are handed through as they are, so their types must be those of the day's first file."""
    for column in schema.keys:
        kind, expected = file.columns.field(column).type, first.columns.field(column).type
        if kind != expected:
            what = f"column '{column}' of data.keys has another type than in the day's first file"
            raise UserError(what, file.path, got=str(kind), expected=str(expected), do=REEXPORT)


def _check_ids(schema: Schema, before: Types, now: Types, where: str, than: str) -> None:
    """An integer and its text are two ids: after such a change nothing would be known of any id."""
    for column in dict.fromkeys([*schema.ids.values(), *([schema.group] if schema.group else [])]):
        was, is_ = (id_sort(types[column]) if column in types else None for types in (before, now))
        if was and is_ and was != is_:
            what = f"the ids of column '{column}' are of another sort than in {than}"
            do = f"{REEXPORT}; to go on with the new ids, train a new model: name"
            raise UserError(what, where, got=f"{is_} ({now[column]})", expected=f"{was} ({before[column]})", do=do)
