"""The one kind of error that a user can cause and mend.

Everything that is wrong with input, configuration, data, disk or checkpoint is raised as UserError: the command line
prints its text without a traceback and ends with exit code 2. Anything else that escapes is our own fault and ends with
exit code 1.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

CORRECT = "correct it in the file or with --set"


@dataclass(eq=False)
class UserError(Exception):
    """What happened, where, what was found and expected, and what to do about it. The text is the message."""

    what: str
    where: str = ""
    got: str = ""
    expected: str = ""
    do: str = ""

    def __str__(self) -> str:
        parts = [
            f"{self.where}: {self.what}" if self.where else self.what,
            f"got {self.got}" if self.got else "",
            f"expected {self.expected}" if self.expected else "",
            f"-> {self.do}" if self.do else "",
        ]
        return "\n  ".join(part for part in parts if part)


class ClusterError(Exception):
    """The cluster gave too little, or took away too much, for the job to be finished; nothing that a user wrote is
    wrong, and the same command goes on later. The text tells what happened; exit code 1, without a traceback.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: `did you mean 'x'?`, or all that is known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known)) or 'none'}"
