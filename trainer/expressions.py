"""Expressions over the columns of a log: labels and sample weights that no column holds as such.

    parse("watch_s > 0.8 * duration_s", "tasks.finished.label").evaluate({"watch_s": ..., "duration_s": ...})

Numbers, columns, + - * / %, comparisons, and, or, not, and the functions below. Python's grammar reads the text, then
every piece is looked up in the tables of this file: nothing of it is ever run as Python. A column whose name is not one
word stands in backticks: `watch-time`. Null is NaN. Truth values are 0.0 and 1.0, and every number but 0 is true.
What is unknown stays unknown, also through comparisons; only `and` with something false is false and `or` with
something true is true whatever the rest (Kleene's three-valued logic), and coalesce(a, b) is the first that is known.
"""

import ast
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

Values: TypeAlias = NDArray[np.float64]

_MAX_PIECES = 300  # so that neither parsing nor evaluating runs out of stack
_QUOTED = re.compile(r"(?<!\w)`[^`]+`(?!\w)")
_KNOWN = "numbers, columns, + - * / %, < <= > >= == !=, and, or, not, log1p(), exp(), min(), max(), abs(), coalesce()"


@dataclass(frozen=True)
class _Apply:
    """A function of the values of other pieces."""

    function: Callable[..., Any]
    arguments: tuple["_Piece", ...]


_Piece: TypeAlias = _Apply | str | float  # a str is a column


@dataclass(frozen=True)
class Expression:
    """A parsed text. columns: their names in order of first use."""

    text: str
    columns: tuple[str, ...]
    _whole: _Piece

    @property
    def column(self) -> str | None:
        """The column that it is, when it is nothing else."""
        return self._whole if isinstance(self._whole, str) else None

    def evaluate(self, columns: Mapping[str, Values]) -> Values:
        """One value a row, NaN where it is not known. What arithmetic does not define (0 / 0) is NaN too."""
        shape = np.broadcast_shapes(*(values.shape for values in columns.values()))
        with np.errstate(all="ignore"):
            return np.array(np.broadcast_to(_evaluate(self._whole, columns), shape))


def parse(text: str, place: str) -> Expression:
    """Check a text and take it apart. place: where it stands, for errors."""
    return _Text(" ".join(text.splitlines()).strip(), place).parse()


def _evaluate(piece: _Piece, columns: Mapping[str, Values]) -> Any:
    if isinstance(piece, str):
        return columns[piece]
    if isinstance(piece, float):
        return np.float64(piece)
    return piece.function(*(_evaluate(argument, columns) for argument in piece.arguments))


def _truth(values: Values) -> Values:
    return np.where(np.isnan(values), np.nan, values != 0)


def _not(values: Values) -> Values:
    return 1 - _truth(values)


def _both(left: Values, right: Values) -> Values:
    """Of truth values."""
    return np.where((left == 0) | (right == 0), 0.0, left * right)


def _and(*values: Values) -> Values:
    return reduce(_both, map(_truth, values))


def _or(*values: Values) -> Values:
    return _not(_and(*map(_not, values)))


def _compare(holds: np.ufunc, left: Values, right: Values) -> Values:
    return np.where(np.isnan(left) | np.isnan(right), np.nan, holds(left, right))


def _min(*values: Values) -> Values:
    return reduce(np.minimum, values)


def _max(*values: Values) -> Values:
    return reduce(np.maximum, values)


def _coalesce(*values: Values) -> Values:
    return reduce(lambda value, otherwise: np.where(np.isnan(value), otherwise, value), values)


_ARITHMETIC: Mapping[type, Callable[..., Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Mod: np.remainder,
}
_COMPARISONS: Mapping[type, np.ufunc] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}
_LOGIC: Mapping[type, Callable[..., Any]] = {ast.And: _and, ast.Or: _or}
_UNARY: Mapping[type, Callable[..., Any]] = {ast.USub: np.negative, ast.Not: _not}
_OF_ONE: Mapping[str, Callable[..., Any]] = {"log1p": np.log1p, "exp": np.exp, "abs": np.abs}
_OF_SEVERAL: Mapping[str, Callable[..., Any]] = {"min": _min, "max": _max, "coalesce": _coalesce}


class _Text:
    """A text on its way to an expression."""

    def __init__(self, text: str, place: str):
        self._text, self._place = text, place
        self._columns: dict[str, None] = {}

    def parse(self) -> Expression:
        tree = self._tree()
        if sum(1 for _ in ast.walk(tree)) > _MAX_PIECES:
            do = "compute it when the log is written, and name its column here"
            raise UserError("an expression that is too long", self._place, got=self._text, do=do)
        whole = self._piece(tree)
        return Expression(self._text, tuple(self._columns), whole)

    def _tree(self) -> ast.expr:
        # A name in backticks becomes a name that Python knows and that takes the same bytes: places stay true.
        source = _QUOTED.sub(lambda quoted: "_" * len(quoted[0].encode()), self._text)
        if "#" in source:
            raise self._malformed("'#' is not known here")
        try:
            return ast.parse(source, mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise self._malformed(getattr(error, "msg", str(error))) from None
        except (RecursionError, MemoryError):
            raise self._malformed("nested too deeply") from None

    def _malformed(self, why: str) -> UserError:
        got = f"'{self._text}' ({why})"
        do = "correct it; a column whose name is not one word stands in backticks: `watch-time`"
        return UserError("not an expression", self._place, got=got, expected=_KNOWN, do=do)

    def _piece(self, node: ast.expr) -> _Piece:
        match node:
            case ast.Constant(value=int() | float() as number) if self._is_number(number):
                return float(number)
            case ast.Name():
                return self._column(node)
            case ast.UnaryOp(op, operand) if type(op) in _UNARY:
                return self._apply(_UNARY[type(op)], operand)
            case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
                return self._apply(_ARITHMETIC[type(op)], left, right)
            case ast.BoolOp(op, operands):
                return self._apply(_LOGIC[type(op)], *operands)
            case ast.Compare(left, operators, others) if all(type(op) in _COMPARISONS for op in operators):
                return self._comparison(operators, [left, *others])
            case ast.Call(ast.Name(name), arguments, []):
                return self._call(name, node, arguments)
        raise self._unknown(node)

    def _apply(self, function: Callable[..., Any], *operands: ast.expr) -> _Piece:
        return _Apply(function, tuple([self._piece(operand) for operand in operands]))

    def _is_number(self, number: float) -> bool:
        return not isinstance(number, bool) and abs(number) <= sys.float_info.max

    def _column(self, node: ast.Name) -> str:
        name = self._source(node).strip("`")
        self._columns[name] = None
        return name

    def _comparison(self, operators: list[ast.cmpop], operands: list[ast.expr]) -> _Piece:
        """a < b < c is a < b and b < c."""
        values = [self._piece(operand) for operand in operands]
        pairs = zip(operators, values, values[1:], strict=False)
        holds = [_Apply(partial(_compare, _COMPARISONS[type(op)]), (left, right)) for op, left, right in pairs]
        return holds[0] if len(holds) == 1 else _Apply(_and, tuple(holds))

    def _call(self, name: str, node: ast.Call, arguments: list[ast.expr]) -> _Piece:
        function = _OF_ONE.get(name) or _OF_SEVERAL.get(name)
        if function is None:
            raise self._unknown(node.func)
        if not (len(arguments) == 1 if name in _OF_ONE else len(arguments) > 1):
            what, expected = f"{name}() with a wrong number of arguments", "one" if name in _OF_ONE else "two or more"
            raise UserError(what, self._place, got=f"{len(arguments)} in '{self._source(node)}'", expected=expected)
        return self._apply(function, *arguments)

    def _source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self._text, node) or ""

    def _unknown(self, node: ast.expr) -> UserError:
        what, got = "an expression does not know this", f"'{self._source(node)}' in '{self._text}'"
        do = "correct it, or compute it when the log is written and name its column here"
        return UserError(what, self._place, got=got, expected=_KNOWN, do=do)
