"""A configuration from its file: strict, overridden, checked whole before anything starts, frozen.

    load("configs/demo.yaml", ["train.workers=1"]) -> Config

A file may say `extends: other.yaml` and then only what is different. An unknown key, a wrong type, a name that nothing
defines: each is a UserError with the dotted path and the nearest known word.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any

import pydantic
import yaml

from trainer.checks import check_all
from trainer.config import Config, absolute
from trainer.errors import CORRECT, UserError, nearest

_IN_YAML = {  # what pydantic calls by Python's names
    **dict.fromkeys(["int_type", "int_parsing", "int_from_float"], "a whole number"),
    **dict.fromkeys(["float_type", "float_parsing"], "a number"),
    **dict.fromkeys(["dict_type", "dataclass_type"], "keys with values, such as {key: value}"),
    "tuple_type": "a list, such as [a, b]",
    "string_type": "text",
}


def load(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read and check a configuration. overrides: `dotted.path=value`, the value in YAML."""
    tree = _read(path, ())
    for override in overrides:
        _override(tree, override)
    config = _validate(tree, path)
    check_all(config, path)
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
        raise _user_error(_first(error.errors()), where) from None


def _first(errors: list[Any]) -> Any:
    """The first error; of a value that may have several forms, that of the form which it is nearest to."""
    of_form = [error for error in errors if _in_a_form(error["loc"])]
    return max(of_form, key=lambda error: len(error["loc"])) if errors[0] in of_form else errors[0]


def _in_a_form(loc: tuple[Any, ...]) -> bool:
    """Whether an error is about one form of train.workers (a number, bounds), which its path then names."""
    return loc[1:3] == ("train", "workers") and len(loc) > 3


def _user_error(error: Any, where: str) -> UserError:
    loc = [str(part) for part in error["loc"][1:]]
    if _in_a_form(error["loc"]):
        del loc[2]
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
    return UserError("wrong value", place, got=repr(error["input"]), expected=expected, do=CORRECT)


def _keys_at(path: list[str]) -> list[str]:
    """The keys that the configuration knows at a dotted path; a mapping by name (features, tasks) takes any name."""
    kind: Any = Config
    for key in path:
        if dataclasses.is_dataclass(kind):
            kind = {f.name: f.type for f in dataclasses.fields(kind)}.get(key)
        else:
            kind = getattr(kind, "__args__", (None,))[-1]
        options = [a for a in getattr(kind, "__args__", ()) if dataclasses.is_dataclass(a)]
        kind = options[0] if options and isinstance(kind, UnionType) else kind
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
