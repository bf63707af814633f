"""Expressions over columns: what they mean row by row, what is unknown, and what is refused.

Oracle: plain Python over the rows in a loop. Arithmetic is float64 in both, so they agree exactly but for exp and
log1p, which numpy and the C library round each in its own way (1e-15).
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.expressions import parse

Twin: TypeAlias = Callable[..., float]

NAN = float("nan")
A_B = [(a, b) for a in (0.0, 1.0, NAN) for b in (0.0, 1.0, NAN)]


def columns(seed: int = 0, rows: int = 400) -> dict[str, np.ndarray]:
    """Numbers of either sign with halves and ties, flags, and a fifth of nulls."""
    rng = np.random.default_rng(seed)
    found = {name: rng.integers(-8, 9, rows) / 2 for name in ("a", "b", "c")}
    found |= {name: rng.integers(0, 2, rows).astype(float) for name in ("click", "skip")}
    for values in found.values():
        values[rng.random(rows) < 0.2] = np.nan
    return found


def row_by_row(twin: Twin, of: Mapping[str, np.ndarray]) -> list[float]:
    """The twin on each row; unknown where any of its columns is null."""
    names = twin.__code__.co_varnames[: twin.__code__.co_argcount]
    rows = zip(*(of[name].tolist() for name in names), strict=True)
    return [NAN if any(math.isnan(value) for value in row) else float(twin(*row)) for row in rows]


# In a twin stands what Python itself makes of the same words, for rows on which everything is known.
TWINS: dict[str, Twin] = {
    "a": lambda a: a,
    "a + b - c": lambda a, b, c: a + b - c,
    "-a * b": lambda a, b: -a * b,
    "a / 3 % 0.7": lambda a: a / 3 % 0.7,
    "a % -3": lambda a: a % -3,
    "1 + skip + 3 * (a > 1.5)": lambda skip, a: 1 + skip + 3 * (a > 1.5),
    "a > 0.8 * b": lambda a, b: a > 0.8 * b,
    "a == b": lambda a, b: a == b,
    "a != b": lambda a, b: a != b,
    "a <= b": lambda a, b: a <= b,
    "a >= b": lambda a, b: a >= b,
    "not a": lambda a: not a,
    "not a < b": lambda a, b: not a < b,
    "-(a < b)": lambda a, b: -(a < b),
    "abs(a) - abs(-2.5)": lambda a: abs(a) - 2.5,
    "min(a, 1)": lambda a: min(a, 1),
    "max(a, b, -1e0)": lambda a, b: max(a, b, -1.0),
    "log1p(abs(a))": lambda a: math.log1p(abs(a)),
    "exp(-a)": lambda a: math.exp(-a),
    "a\n  + b": lambda a, b: a + b,
}


@pytest.mark.parametrize("text", TWINS)
def test_an_expression_is_on_every_row_what_python_makes_of_it_and_unknown_where_a_column_is_null(text: str) -> None:
    of = columns()
    found = parse(text, "here").evaluate(of)
    assert found.dtype == np.float64 and found.shape == of["a"].shape
    rounded = "exp" in text or "log1p" in text
    np.testing.assert_allclose(found, row_by_row(TWINS[text], of), rtol=1e-15 if rounded else 0, atol=0)


def kleene(word: str, a: float, b: float) -> float:
    """Every way in which the unknown ones may come out; unknown where these disagree."""
    of_a, of_b = ([0.0, 1.0] if math.isnan(value) else [value] for value in (a, b))
    outcomes = {float(x and y) if word == "and" else float(x or y) for x in of_a for y in of_b}
    return outcomes.pop() if len(outcomes) == 1 else NAN


@pytest.mark.parametrize("word", ["and", "or"])
def test_and_and_or_know_what_does_not_depend_on_the_unknown(word: str) -> None:
    a, b = np.array(A_B).T
    found = parse(f"a {word} b", "here").evaluate({"a": a, "b": b})
    np.testing.assert_array_equal(found, [kleene(word, *pair) for pair in A_B])
    three = parse(f"a {word} 7 * a {word} b", "here").evaluate({"a": a, "b": b})
    np.testing.assert_array_equal(three, found)  # 7 a is true where a is


def test_coalesce_is_the_first_that_is_known() -> None:
    a, b = np.array(A_B).T
    found = parse("coalesce(a, b, 7)", "here").evaluate({"a": a, "b": b})
    expected = [next((value for value in pair if not math.isnan(value)), 7.0) for pair in A_B]
    np.testing.assert_array_equal(found, expected)


def test_the_kleene_tables_as_they_are_printed() -> None:
    a, b = np.array(A_B).T
    tables = {"a and b": [0, 0, 0, 0, 1, NAN, 0, NAN, NAN], "a or b": [0, 1, NAN, 1, 1, 1, NAN, 1, NAN]}
    for text, expected in tables.items():
        np.testing.assert_array_equal(parse(text, "here").evaluate({"a": a, "b": b}), expected)
    np.testing.assert_array_equal(parse("not a", "here").evaluate({"a": a}), [1, 1, 1, 0, 0, 0, NAN, NAN, NAN])


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("0 < a <= b < 3", "0 < a and a <= b and b < 3"),
        ("click and not skip", "not (skip or not click)"),
        ("a > 1 or b > 1 and c > 1", "(a > 1) or ((b > 1) and (c > 1))"),
        ("`a` + `b`", "a + b"),
    ],
)
def test_two_ways_to_say_one_thing_agree_on_every_row_also_where_something_is_null(text: str, same: str) -> None:
    of = columns(1)
    np.testing.assert_array_equal(parse(text, "here").evaluate(of), parse(same, "here").evaluate(of))


def test_a_chain_is_false_where_one_link_is_false_though_another_is_unknown() -> None:
    found = parse("0 < a < b", "here").evaluate({"a": np.array([-1.0, 1.0]), "b": np.array([NAN, NAN])})
    np.testing.assert_array_equal(found, [0, NAN])


def test_columns_stand_in_order_of_first_use_each_once() -> None:
    assert parse("c + min(b, c) * (a < b < d)", "here").columns == ("c", "b", "a", "d")
    assert parse("1.5", "here").columns == ()
    assert parse("min + max(min, exp)", "here").columns == ("min", "exp")  # a function only where it is called


@pytest.mark.parametrize("name", ["watch-time", "is", "ø/μ µs", "a#b", "2nd", "a b", "__"])
def test_a_column_of_any_name_stands_in_backticks(name: str) -> None:
    expression = parse(f"1 + `{name}` * (`{name}` > _) ", "here")
    assert expression.columns == (name, "_")
    found = expression.evaluate({name: np.array([2.0, 3.0]), "_": np.array([2.0, 2.0])})
    np.testing.assert_array_equal(found, [1, 4])


def test_a_name_keeps_its_letters() -> None:
    assert parse("µs", "here").columns == ("µs",)  # Python reads the micro sign as a Greek mu


def test_only_a_column_alone_is_a_column() -> None:
    texts = ["watch_s", " `watch-time` ", "(a)", "-a", "a + 0", "1"]
    assert [parse(text, "here").column for text in texts] == ["watch_s", "watch-time", "a", None, None, None]


def test_an_expression_without_columns_is_the_same_on_every_row() -> None:
    np.testing.assert_array_equal(parse("2 * 3", "here").evaluate({"a": np.zeros(3)}), [6, 6, 6])
    assert parse("2", "here").evaluate({}).shape == ()


def test_what_arithmetic_does_not_define_is_nan_or_infinite_and_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    of = {"a": np.array([1.0, 0.0, -2.0])}
    np.testing.assert_array_equal(parse("a / 0", "here").evaluate(of), [math.inf, NAN, -math.inf])
    np.testing.assert_array_equal(parse("log1p(a - 1)", "here").evaluate(of), [0, -math.inf, NAN])
    np.testing.assert_array_equal(parse("exp(1000 * a)", "here").evaluate(of), [math.inf, 1, 0])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("watch_s ** 2 + 1", "watch_s ** 2"),
        ("1 + (a & b)", "a & b"),
        ("a // b", "a // b"),
        ("~a", "~a"),
        ("+a", "+a"),
        ("a if b else c", "a if b else c"),
        ("a in (1, 2)", "a in (1, 2)"),
        ("a is b", "a is b"),
        ("1 + True", "True"),
        ("a == None", "None"),
        ("a == 'yes'", "'yes'"),
        ("2j", "2j"),
        ("1e999 + a", "1e999"),
        ("a < " + "9" * 400, "9" * 400),
        ("log(a)", "log"),
        ("`min`(a, b)", "`min`"),
        ("a.mean()", "a.mean()"),
        ("__import__('os').system('true')", "__import__('os').system('true')"),
        ("(lambda: 1)()", "(lambda: 1)()"),
        ("a[0]", "a[0]"),
        ("[a for a in b]", "[a for a in b]"),
        ("(a := 1)", "a := 1"),
        ("min(*a, b)", "*a"),
        ("min(a, b, key=c)", "min(a, b, key=c)"),
        ("`watch-time` * (`µ s` ^ 2)", "`µ s` ^ 2"),
    ],
)
def test_what_is_not_known_is_named_with_its_place_and_what_is_known(text: str, piece: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(text, "demo.yaml: tasks.click.label")
    assert str(raised.value).startswith("demo.yaml: tasks.click.label: an expression does not know this\n")
    assert raised.value.got in (
        f"'{piece}' in '{text}'",
        f"'{piece.removeprefix('min(').removesuffix(')')}' in '{text}'",
    )
    assert "log1p()" in raised.value.expected and raised.value.do


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "invalid syntax"),
        ("a +", "invalid syntax"),
        ("(a", "never closed"),
        ("2nd > 1", "invalid"),
        ("a; b", "invalid syntax"),
        ("a = 1", "invalid syntax"),
        ("`a", "invalid syntax"),
        ("a`b`", "invalid syntax"),
        ("``", "invalid syntax"),
        ("click#1", "'#' is not known"),
        ("a\0b", "null byte|nested"),
        ("(" * 300 + "a" + ")" * 300, "nested"),
    ],
)
def test_what_is_no_expression_is_told_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"(?s)^here: not an expression.*{reason}.*expected numbers.*in backticks"):
        parse(text, "here")


@pytest.mark.parametrize("text", ["-" * 200 + "a", "+".join("a" * 400), "not " * 5000 + "a", "-" * 100_000 + "a"])
def test_an_expression_without_end_is_refused_before_the_stack_is_full(text: str) -> None:
    with pytest.raises(UserError, match="too long|nested too deeply"):
        parse(text, "here")
    assert parse("-" * 100 + "a", "here").evaluate({"a": np.ones(1)}) == 1


@pytest.mark.parametrize(
    ("text", "got", "expected"),
    [("min(a)", "1 in 'min(a)'", "two or more"), ("exp(a, b)", "2 in 'exp(a, b)'", "one"), ("max()", "0 in", "two")],
)
def test_a_function_with_a_wrong_number_of_arguments_is_told(text: str, got: str, expected: str) -> None:
    with pytest.raises(UserError, match="(?s)^here: .*wrong number of arguments") as raised:
        parse(f"1 + {text}", "here")
    assert got in raised.value.got and expected in raised.value.expected
