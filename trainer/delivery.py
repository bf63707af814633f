"""What was delivered of an interval, so that it is seen when it is delivered again after it was trained.

A file is known by its name, its size, its rows and a hash of its Parquet footer, which holds the sizes, counts and
extremes of every column: the rows themselves are not read. A change that leaves all of these as they were is not seen.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from trainer.files import LogFile

Delivery: TypeAlias = Sequence[Mapping[str, Any]]  # by file, in order: {"file", "bytes", "rows", "footer"}


def entry(file: LogFile, num_rows: int) -> dict[str, Any]:
    """What a manifest says of a file. num_rows: those that the interval has."""
    return {"file": file.name, "bytes": file.bytes, "rows": num_rows, "footer": file.footer}


def unread(name: str, size: int) -> dict[str, Any]:
    """What a manifest says of a file that is set aside."""
    return {"file": name, "bytes": size, "rows": 0, "footer": ""}


def differences(before: Delivery, now: Delivery) -> list[str]:
    """What is not as it was, in words; nothing when all is."""
    old, new = ({each["file"]: each for each in delivery} for delivery in (before, now))
    found = [f"{name} is gone" for name in old if name not in new]
    found += [f"{name} is new" for name in new if name not in old]
    changed = [name for name in new if name in old and dict(old[name]) != dict(new[name])]
    return sorted(found + [f"{name} is another" for name in changed])
