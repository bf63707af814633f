"""Proof tests of trainer/pieces.py: what a piece is built from, and what is said about settings that do not fit.

Oracle of the messages: what a user must read to mend the configuration (place, what was found, what is known).
"""

from collections.abc import Sequence
from typing import Any, Literal

import pytest

from trainer.bodies import BODIES, MultiGateExperts, SharedBottom
from trainer.errors import UserError
from trainer.pieces import ByTask, EventName, FeatureName, FeatureNames, Names, Share, make

NAMES = Names(tasks=["click", "like", "watch"], events=["click", "like"], features=["user_id", "history", "price"])


class Built:
    """What a piece was built from."""

    def __init__(self, given: Sequence[Any], settings: dict[str, Any]):
        self.given, self.settings = tuple(given), settings


class Everything(Built):
    """A piece with a setting of each sort."""

    def __init__(
        self,
        layout: Any,
        width: int,
        *,
        count: int = 3,
        flag: bool = False,
        scale: float = 1.0,
        share: Share = 0.5,
        layers: tuple[int, ...] = (4,),
        thresholds: tuple[float, ...] = (),
        word: Literal["exact", "paper"] = "exact",
        query: FeatureName = "",
        queries: FeatureNames = (),
        event: EventName = "",
        weights: ByTask = 0.25,
        internal: dict[str, int] | None = None,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__((settings.pop("layout"), settings.pop("width")), settings)


class Picky(Built):
    """A piece that its constructor may refuse."""

    def __init__(self, *, error: Literal["type", "value", "runtime", "assert"] = "value"):
        super().__init__((), {})
        errors = {"type": TypeError, "value": ValueError, "runtime": RuntimeError, "assert": AssertionError}
        raise errors[error](f"a {error} error")


class Needy(Built):
    """A piece with a setting that has no default."""

    def __init__(self, *, count: int):
        super().__init__((), {"count": count})


REGISTRY: dict[str, type[Built]] = {"everything": Everything, "picky": Picky, "needy": Needy}
GIVEN = ("the layout", 12)


def build(**settings: Any) -> dict[str, Any]:
    return make({"kind": "everything", **settings}, REGISTRY, "model.part", NAMES, *GIVEN).settings


def refusal(settings: Any, *given: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        make(settings, REGISTRY, "model.part", NAMES, *given)
    return caught.value


def test_a_piece_is_built_from_what_is_given_and_its_settings() -> None:
    piece = make({"kind": "everything", "count": 7}, REGISTRY, "model.part", NAMES, *GIVEN)
    assert isinstance(piece, Everything) and piece.given == GIVEN
    assert piece.settings["count"] == 7 and piece.settings["word"] == "exact"  # the rest: the constructor's defaults


def test_a_word_alone_is_a_kind() -> None:
    alone = make("everything", REGISTRY, "model.part", NAMES, *GIVEN)
    assert alone.settings == make({"kind": "everything"}, REGISTRY, "model.part", NAMES, *GIVEN).settings


def test_the_settings_that_were_handed_over_stay_as_they_were() -> None:
    settings = {"kind": "everything", "layers": [4, 2], "weights": {"like": 2}}
    make(settings, REGISTRY, "model.part", NAMES, *GIVEN)
    assert settings == {"kind": "everything", "layers": [4, 2], "weights": {"like": 2}}  # read once more next day


@pytest.mark.parametrize(
    ("settings", "kind", "hint"),
    [
        ({"kind": "everythin"}, "everythin", "did you mean 'everything'?"),
        ("piky", "piky", "did you mean 'picky'?"),
        ({"kind": "zzz"}, "zzz", "known: everything, needy, picky"),
        ({}, "", "known: everything, needy, picky"),
        ({"kind": 3}, "3", "known: everything, needy, picky"),
        ({"kind": ["everything"]}, "['everything']", "did you mean 'everything'?"),
    ],
)
def test_an_unknown_kind_is_refused_with_the_nearest_known_one(settings: Any, kind: str, hint: str) -> None:
    error = refusal(settings, *GIVEN)
    assert (error.what, error.where, error.do) == (f"no part is called '{kind}'", "model.part.kind", hint)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("cuont", "did you mean 'count'?"),
        ("layer", "did you mean 'layers'?"),
        ("width", "did you mean 'weights'?"),  # given by whoever builds the piece
        ("layout", "did you mean 'count'?"),
        ("internal", "known: "),  # of a type that is no setting
        ("self", "known: "),
        (3, "known: "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: Any, hint: str) -> None:
    error = refusal({"kind": "everything", key: 1}, *GIVEN)
    assert (error.what, error.where) == (f"unknown key '{key}'", "model.part (everything)")
    known = "count, event, flag, layers, queries, query, scale, share, thresholds, weights, word"
    assert error.do == (hint + known if hint == "known: " else hint)


GOOD: list[tuple[str, Any, Any]] = [
    ("count", 1, 1),
    ("flag", True, True),
    ("scale", 0, 0),
    ("scale", 2.5, 2.5),
    ("share", 0, 0),
    ("share", 1.0, 1.0),
    ("layers", [], ()),
    ("layers", [8, 4], (8, 4)),
    ("layers", (8,), (8,)),
    ("thresholds", [0, 1.5], (0, 1.5)),
    ("word", "paper", "paper"),
    ("query", "price", "price"),
    ("queries", ["price", "history"], ("price", "history")),
    ("event", "like", "like"),
    ("weights", {}, [0.25, 0.25, 0.25]),
    ("weights", {"like": 2}, [0.25, 2.0, 0.25]),
    ("weights", {"watch": 0, "click": 1.5, "like": 3}, [1.5, 3.0, 0.0]),
]


@pytest.mark.parametrize(("option", "value", "taken"), GOOD)
def test_a_setting_reaches_the_piece_as_its_annotation_says(option: str, value: Any, taken: Any) -> None:
    found = build(**{option: value})[option]
    assert found == taken and type(found) is type(taken)  # lists become tuples; by task: a number for every task


def test_settings_by_task_that_nobody_sets_are_the_pieces_own_default() -> None:
    assert build()["weights"] == 0.25


BAD: list[tuple[str, Any, str]] = [
    *[("count", value, "a whole number from 1 up") for value in (0, -1, 2.0, "3", True, None, [1])],
    *[("flag", value, "true or false") for value in (0, 1, "true", None)],
    *[("scale", value, "a number from 0 up") for value in (-0.1, float("nan"), float("inf"), "1", True, None, [1.0])],
    *[("share", value, "a number from 0 to 1") for value in (-0.1, 1.01, float("nan"), "0.5", False, None)],
    *[("layers", value, "a list of whole numbers from 1 up") for value in (8, [8, 0], [2.0], ["8"], "8", None, [True])],
    *[("thresholds", value, "a list of numbers from 0 up") for value in (0.5, [-1.0], ["1"], None, [float("nan")])],
    *[("word", value, "exact or paper") for value in ("exakt", "", None, 1, ["exact"])],
    *[("query", value, "the name of a feature") for value in (1, None, ["price"])],
    *[("queries", value, "a list of names of features") for value in ("price", [1], None, {"price": 1})],
    *[("event", value, "the name of a task with loss: bce") for value in (1, None, ["click"])],
    *[
        ("weights", value, "numbers from 0 up by task, such as {click: 1}")
        for value in (1.0, [1.0, 2.0, 3.0], {"click": -1}, {"click": "1"}, {"click": None}, "click", None)
    ],
]


@pytest.mark.parametrize(("option", "value", "expected"), BAD)
def test_a_value_that_does_not_fit_is_refused_with_what_would(option: str, value: Any, expected: str) -> None:
    error = refusal({"kind": "everything", option: value}, *GIVEN)
    assert (error.what, error.where, error.expected) == ("wrong value", "model.part (everything)", expected)
    assert error.got == str({option: value}) and error.do


@pytest.mark.parametrize(
    ("option", "value", "what", "hint"),
    [
        ("query", "prise", "no feature is called 'prise'", "did you mean 'price'?"),
        ("query", "", "no feature is called ''", "known: history, price, user_id"),
        ("queries", ["price", "user"], "no feature is called 'user'", "did you mean 'user_id'?"),
        ("event", "clik", "no event is called 'clik'", "did you mean 'click'?"),
        ("event", "watch", "no event is called 'watch'", "known: click, like"),  # a task, but no event
        ("weights", {"lik": 1}, "no task is called 'lik'", "did you mean 'like'?"),
        ("weights", {1: 1}, "no task is called '1'", "known: click, like, watch"),
    ],
)
def test_a_name_that_nothing_has_is_refused_with_the_nearest_one(option: str, value: Any, what: str, hint: str) -> None:
    error = refusal({"kind": "everything", option: value}, *GIVEN)
    assert (error.what, error.where, error.do) == (what, f"model.part (everything): {option}", hint)


@pytest.mark.parametrize("kind", ["type", "value", "runtime"])
def test_what_a_constructor_refuses_is_a_user_error_that_names_the_place(kind: str) -> None:
    error = refusal({"kind": "picky", "error": kind})
    assert (error.what, error.where) == ("wrong value", "model.part (picky)")
    assert f"a {kind} error" in error.got and f"'error': '{kind}'" in error.got


def test_a_setting_without_default_is_asked_for_by_name() -> None:
    error = refusal("needy")
    assert error.where == "model.part (needy)" and "'count'" in error.got
    assert make({"kind": "needy", "count": 2}, REGISTRY, "model.part", NAMES).settings == {"count": 2}


def test_an_error_of_our_own_stays_one() -> None:
    with pytest.raises(AssertionError, match="a assert error"):
        make({"kind": "picky", "error": "assert"}, REGISTRY, "model.part", NAMES)


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"kind": "sparse_moe", "num_experts": 2, "top_k": 3}, "top_k 3 is more than num_experts 2"),
        ({"kind": "mmoe", "expert_layers": []}, "an expert needs at least one layer"),
        ({"kind": "separate", "layers": []}, "an expert needs at least one layer"),
    ],
)
def test_a_body_that_cannot_be_is_refused_by_its_own_words(settings: dict[str, Any], got: str) -> None:
    with pytest.raises(UserError) as caught:
        make(settings, BODIES, "model.body", NAMES, 12, 3)
    assert caught.value.where == f"model.body ({settings['kind']})" and got in caught.value.got


def test_bodies_are_pieces() -> None:
    body = make("shared_bottom", BODIES, "model.body", NAMES, 12, 3)
    assert isinstance(body, SharedBottom) and (body.num_tasks, body.output_dim) == (3, 128)
    body = make({"kind": "mmoe", "expert_layers": [8], "gate_dropout": 0.1}, BODIES, "model.body", NAMES, 12, 3)
    assert isinstance(body, MultiGateExperts) and (body.output_dim, body.gate_dropout) == (8, 0.1)
    with pytest.raises(UserError, match="unknown key 'num_task'") as caught:
        make({"kind": "mmoe", "num_task": 4}, BODIES, "model.body", NAMES, 12, 3)
    assert "num_tasks" not in caught.value.do  # not for the configuration to say
