"""What happened to each interval, and which model serves: small files beside the checkpoints, each written whole.

    <path>/<model>/day=2026-11-20/ledger.json   entries {state, at, reason, ...}, appended; the decision is the last one
    <path>/<model>/champion.json                the interval whose model serves, since when, and who said so

    planned -> scored -> training -> written -> verified -> gated -> promoted | held
        any of them -> failed (the night ended with an error) or dropped (its model was thrown away): begins again

There is one writer, the owner of the night's lock, who is asked before each write whether he still is. To enter a state
twice is to enter it once, so a night that was killed and run again leaves the ledger of a night that was not.
"""

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.storage import Storage

WAY = ("planned", "scored", "training", "written", "verified", "gated")
ENDS = ("promoted", "held")
RESTARTS = ("failed", "dropped")

Entry: TypeAlias = dict[str, Any]  # state, at, reason, and what else is to be known of it (run_id, version ...)
_LEDGER, _CHAMPION = "ledger.json", "champion.json"
_NAMED = ("interval", "before", "passed")  # intervals, in the file by their names


@dataclass(frozen=True)
class Champion:
    """Whose model serves. by: gate, force, rollback or again, who moved it at `since`. before: what served until then.

    passed: the newest interval there was when a person moved it. Should the gate come to that one or those before it
    only afterwards, it does not make them champion behind his back.
    """

    interval: Interval
    since: str
    by: str
    reason: str
    before: Interval | None = None
    passed: Interval | None = None


class Ledger:
    """The ledger of one model's intervals and its champion.

    storage: the model's folder. mine: raises when the caller is no longer the one who may write.
    """

    def __init__(self, storage: Storage, mine: Callable[[], None] = lambda: None):
        self._storage, self._mine = storage, mine

    def intervals(self) -> list[Interval]:
        """Those of which anything is known, in order."""
        found = []
        for day in self._folders("", "day="):
            for folder in (day, *(f"{day}/{hour}" for hour in self._folders(day, "hour="))):
                if self._storage.exists(f"{folder}/{_LEDGER}"):
                    name = folder.removeprefix("day=").replace("/hour=", "T")
                    found.append(Interval.parse(name, f"{self._storage.path}/{folder}"))
        return sorted(found)

    def entries(self, interval: Interval) -> list[Entry]:
        """All that happened to an interval, oldest first; nothing when nothing did."""
        do = "restore the file from a copy, or remove it: the next night writes it anew from what it finds"
        found = self._read(f"{interval.folder}/{_LEDGER}", do)
        return found["entries"] if found else []

    def current(self, interval: Interval) -> list[Entry]:
        """What happened since it last began: after the last failure, or after its model was dropped."""
        return _since(RESTARTS, self.entries(interval))

    def state(self, interval: Interval) -> Entry | None:
        """Where it stands: its last entry."""
        entries = self.entries(interval)
        return entries[-1] if entries else None

    def decision(self, interval: Interval) -> Entry | None:
        """Promoted or held, or None while neither is said."""
        last = self.state(interval)
        return last if last and last["state"] in ENDS else None

    def is_promoted(self, interval: Interval) -> bool:
        """By the gate or by force; it need not serve any more."""
        return (self.decision(interval) or {}).get("state") == "promoted"

    def was_written(self, interval: Interval) -> bool:
        """Was it entered that its model is there, since that was last dropped?"""
        return any(entry["state"] == "written" for entry in _since(("dropped",), self.entries(interval)))

    def version(self, interval: Interval) -> int | None:
        """The number of its model in the registry; None while nothing is decided."""
        found = [entry["version"] for entry in _since(("dropped",), self.entries(interval)) if "version" in entry]
        return found[-1] if found else None

    def record(self, interval: Interval, state: str, reason: str, **facts: Any) -> None:
        """Enter that the interval reached a state. Nothing happens when it is there since the interval last began, or
        when one that comes after it is.
        """
        entries = self.entries(interval)
        current = _since(RESTARTS, entries)
        if state in RESTARTS:
            if not current:
                return  # nothing was begun that could fail
        elif state in ENDS:
            if any(entry["state"] == state for entry in current):
                return
        elif any(entry["state"] in WAY[WAY.index(state) :] + ENDS for entry in current):
            return
        entry = {"state": state, "at": now(), "reason": reason} | facts
        self._write(f"{interval.folder}/{_LEDGER}", {"interval": interval.name, "entries": [*entries, entry]})

    def champion(self) -> Champion | None:
        """Whose model serves, or None while none does."""
        do = "restore the file from a copy, or name one that serves: daybreak rollback --to D"
        found = self._read(_CHAMPION, do)
        if not found:
            return None
        where = f"{self._storage.path}/{_CHAMPION}"
        return Champion(**found | {f: Interval.parse(found[f], where) if found[f] else None for f in _NAMED})

    def move_champion(self, interval: Interval, by: str, reason: str, passed: Interval | None = None) -> None:
        """From now on the model of this interval serves. One write of one file: readers see the old one or the new one.
        Nothing happens when it serves already by the same word.
        """
        old = self.champion()
        if old and (old.interval, old.by, old.passed) == (interval, by, passed):
            return
        if old and (old.interval, old.by) == (interval, by):
            new = replace(old, passed=passed)
        else:
            new = Champion(interval, now(), by, reason, old.interval if old else None, passed)
        named = {field: getattr(new, field) for field in _NAMED}
        self._write(_CHAMPION, vars(new) | {field: i.name if i else None for field, i in named.items()})

    def no_champion(self) -> None:
        """No model serves any more: that of the only one was dropped."""
        self._mine()
        self._storage.delete(_CHAMPION)

    def _folders(self, name: str, prefix: str) -> list[str]:
        return [folder for folder in self._storage.folders(name) if folder.startswith(prefix)]

    def _read(self, name: str, do: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self._storage.read(name))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            raise UserError("the file cannot be read", f"{self._storage.path}/{name}", got=str(error), do=do) from None
        return dict(found)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        try:
            self._mine()
            self._storage.write(name, json.dumps(content, indent=1).encode())
        except OSError as error:
            do = "free space or mend the storage, then run the same command again"
            raise UserError(
                "the file cannot be written", f"{self._storage.path}/{name}", got=str(error), do=do
            ) from None


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _since(states: tuple[str, ...], entries: list[Entry]) -> list[Entry]:
    """The entries after the last one of these states."""
    found = [i for i, entry in enumerate(entries) if entry["state"] in states]
    return entries[found[-1] + 1 :] if found else entries
