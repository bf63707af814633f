"""What a wrong version is, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """apply: replaces an attribute of a module; its name is the mutant's, its docstring says what is wrong. tests:
    file::test under tests/, each of which must fail. seen_in: who shipped it, where that is known. crash: the exception
    that the mistake itself ends with, where it does.
    """

    apply: Callable[[], None]
    tests: tuple[str, ...]
    seen_in: str = ""
    crash: str = "AssertionError"

    @property
    def name(self) -> str:
        return self.apply.__name__

    @property
    def wrong(self) -> str:
        return " ".join((self.apply.__doc__ or "").split())


def in_file(file: str, *tests: str) -> tuple[str, ...]:
    """The addresses of some tests of one file."""
    return tuple(f"{file}::{test}" for test in tests)
