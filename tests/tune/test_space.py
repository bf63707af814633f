"""What a search may choose from. Oracle of the simplex: its coordinates in closed form, and its corners."""

import numpy as np
import pytest

from tune.space import Range, Simplex


@pytest.mark.parametrize("members", [1, 2, 3, 6])
def test_any_weights_have_their_coordinates_and_equal_weights_have_the_middle(members: int) -> None:
    """Of weights w_1 ... w_K, member i takes the part w_i / (w_i + ... + w_K), and its odds are K - i times less than
    the coordinate's.
    """
    names, draw = [f"w{k}" for k in range(members)], np.random.default_rng(members)
    for weight_K in [np.full(members, 1 / members), *draw.dirichlet(np.ones(members), size=50)]:
        wanted = dict(zip(names, weight_K, strict=True))

        def coordinate(name: str, low: float, high: float, weight_K: np.ndarray = weight_K) -> float:
            number = names.index(name.removeprefix("powers."))
            part = weight_K[number] / weight_K[number:].sum()
            odds = part / (1 - part) * (members - 1 - number)
            at = odds / (1 + odds)
            assert (low, high) == (0, 1) and (at == pytest.approx(0.5) or weight_K[0] != 1 / members)
            return at

        assert Simplex(names).choose("powers", coordinate) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("ends, corner", [("11", "a"), ("10", "a"), ("01", "b"), ("00", "c")])
def test_the_ends_of_the_coordinates_are_the_corners_of_the_simplex(ends: str, corner: str) -> None:
    at = dict(zip(["powers.a", "powers.b"], ends, strict=True))
    found = Simplex(["a", "b", "c"]).choose("powers", lambda name, low, high: high if at[name] == "1" else low)
    assert found == {member: float(member == corner) for member in "abc"}


@pytest.mark.parametrize("low, high", [(1, 1), (2, 1), (0, float("nan"))])
def test_an_empty_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="is empty"):
        Range(low, high)


@pytest.mark.parametrize("members", [[], ["a", "a"]])
def test_weights_of_nobody_or_of_one_name_twice_are_refused(members: list[str]) -> None:
    with pytest.raises(ValueError, match="each once"):
        Simplex(members)
