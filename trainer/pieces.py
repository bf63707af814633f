"""Pieces of a model that the configuration names by kind, with the piece's own settings: {kind: mmoe, num_experts: 8}.

A piece is a class in a registry, built from what every piece of its sort is given, and its settings by keyword. What a
setting may be, its annotation says; a parameter with another annotation is not for the configuration.
"""

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from trainer.errors import UserError, nearest

Share = Annotated[float, "0 .. 1"]
FeatureName = Annotated[str, "feature"]
FeatureNames = Annotated[tuple[str, ...], "features"]
EventName = Annotated[str, "event"]
ColumnText = Annotated[str, "column"]
ByTask = Annotated[float | Sequence[float], "by task"]  # a mapping in the configuration; the default is for the rest

Piece = TypeVar("Piece")


class Names(typing.NamedTuple):
    """What settings may name."""

    tasks: Sequence[str] = ()
    events: Sequence[str] = ()
    features: Sequence[str] = ()


def make(
    settings: Mapping[str, Any] | str,
    registry: Mapping[str, Callable[..., Piece]],
    place: str,
    names: Names,
    *given: Any,
) -> Piece:
    """The piece that settings name by their kind (or that is all they are), built from (*given, **settings). place:
    their dotted path.
    """
    options = {"kind": settings} if isinstance(settings, str) else dict(settings)
    kind = str(options.pop("kind", ""))
    what = place.rpartition(".")[2]
    if kind not in registry:
        raise UserError(f"no {what} is called '{kind}'", f"{place}.kind", do=nearest(kind, registry))
    where = f"{place} ({kind})"
    parameters = list(inspect.signature(registry[kind]).parameters.values())[len(given) :]
    known = {parameter.name: parameter for parameter in parameters if _is_setting(parameter.annotation)}
    for option, value in options.items():
        if option not in known:
            raise UserError(f"unknown key '{option}'", where, do=nearest(str(option), known))
        options[option] = _checked(value, known[option], names, where)
    try:
        return registry[kind](*given, **options)
    except (TypeError, RuntimeError, ValueError) as error:
        raise UserError("wrong value", where, got=f"{options}: {error}", do="correct its settings") from None


def _checked(value: Any, parameter: inspect.Parameter, names: Names, where: str) -> Any:
    """A setting as the piece takes it."""
    option, annotation = parameter.name, parameter.annotation
    fits, expected = _SETTINGS.get(annotation) or _words(annotation)
    if not fits(value):
        raise UserError("wrong value", where, got=str({option: value}), expected=expected, do="correct its settings")
    if annotation in (FeatureName, FeatureNames, EventName):
        known, what = (names.events, "event") if annotation == EventName else (names.features, "feature")
        for name in [value] if isinstance(value, str) else value:
            if name not in known:
                raise UserError(f"no {what} is called '{name}'", f"{where}: {option}", do=nearest(name, known))
    if annotation == ByTask:
        for name in value:
            if name not in names.tasks:
                raise UserError(f"no task is called '{name}'", f"{where}: {option}", do=nearest(str(name), names.tasks))
        return [float(value.get(name, parameter.default)) for name in names.tasks]
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) in (list, tuple) and all(map(fits, value))


def _is_text(value: Any) -> bool:
    return type(value) is str


_Setting = tuple[Callable[[Any], bool], str]
_SETTINGS: dict[Any, _Setting] = {
    int: (_is_count, "a whole number from 1 up"),
    bool: (lambda value: type(value) is bool, "true or false"),
    float: (_is_number, "a number from 0 up"),
    Share: (lambda value: _is_number(value) and value <= 1, "a number from 0 to 1"),
    tuple[int, ...]: (_are(_is_count), "a list of whole numbers from 1 up"),
    tuple[float, ...]: (_are(_is_number), "a list of numbers from 0 up"),
    FeatureName: (_is_text, "the name of a feature"),
    FeatureNames: (_are(_is_text), "a list of names of features"),
    ColumnText: (_is_text, "a column of the log, or an expression over columns"),
    EventName: (_is_text, "the name of a task with loss: bce"),
    ByTask: (
        lambda value: isinstance(value, Mapping) and all(map(_is_number, value.values())),
        "numbers from 0 up by task, such as {click: 1}",
    ),
}


def _words(annotation: Any) -> _Setting:
    words = typing.get_args(annotation)
    return (lambda value: value in words), " or ".join(words)


def _is_setting(annotation: Any) -> bool:
    """Whether a parameter is a setting at all."""
    return annotation in _SETTINGS or typing.get_origin(annotation) is Literal
