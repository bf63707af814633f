"""What a search may choose, name by name. A piece of a space asks for its coordinates one by one and makes a value of
them; all coordinates are such that equal steps mean about equally much anywhere, which is what a search takes them for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Coordinate = Callable[[str, float, float], float]  # its name, least and greatest value -> the one to try


class Piece(Protocol):
    """What a name may be."""

    def choose(self, name: str, coordinate: Coordinate) -> Any:
        """The value that the coordinates stand for."""
        ...


Space = Mapping[str, Piece]


@dataclass(frozen=True)
class Range:
    """A number from low to high."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"a range from {self.low} to {self.high} is empty")

    def choose(self, name: str, coordinate: Coordinate) -> float:
        return coordinate(name, self.low, self.high)


@dataclass(frozen=True)
class Simplex:
    """A weight for each of K members, none negative, that sum to one: only their ratios matter to an order, so that a
    search over K free weights would waste a dimension.

    K - 1 coordinates break a stick: the first member takes its part, the second its part of what is left, and so on.
    All in the middle, they make equal weights. From there to each end a part goes smoothly, its slope bounded; uniform
    weights would want Beta(1, k) parts, whose slope at the ends is infinite, where a search finds nothing.
    """

    members: Sequence[str]

    def __post_init__(self) -> None:
        if len(set(self.members)) != len(self.members) or not self.members:
            raise ValueError(f"weights of {list(self.members)}: expected one name or more, each once")

    def choose(self, name: str, coordinate: Coordinate) -> dict[str, float]:
        weights, left = {}, 1.0
        for number, member in enumerate(self.members[:-1]):
            at = coordinate(f"{name}.{member}", 0.0, 1.0)
            part = at / (at + (1 - at) * (len(self.members) - 1 - number))
            weights[member], left = left * part, left * (1 - part)
        return weights | {self.members[-1]: left}
