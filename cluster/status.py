"""How a model stands: what happened to each interval and why, which one serves, who runs a night. Reads, and needs no
lock.
"""

from typing import Any

from cluster.late import come_late
from cluster.lock import FOLDER, holder, sign_of_life
from cluster.morning import day_entry, open_checkpoints, open_ledger, open_storage, where_it_stands
from trainer.config import Config
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.late import Late
from trainer.learner import open_logs


def status(config: Config) -> dict[str, Any]:
    """days: those whose model is kept. ledger: where each interval stands that anything is known of. champion: the
    interval that serves; serving: since when, and who said so. lock: who runs a night now. late: what was delivered
    again, or too late, as far as the logs can be read.
    """
    checkpoints, ledger = open_checkpoints(config), open_ledger(config)
    committed, champion = checkpoints.intervals(), ledger.champion()
    stands = {interval: ledger.state(interval) for interval in sorted({*committed, *ledger.intervals()})}
    return {
        "model": config.name,
        "champion": champion.interval.name if champion else None,
        "serving": {"since": champion.since, "by": champion.by, "reason": champion.reason} if champion else None,
        "lock": lock_holder(config),
        "days": [day_entry(checkpoints.open(i), stands[i]) | {"trained": False} for i in committed],
        "ledger": [{"day": interval.name} | where_it_stands(entry) for interval, entry in stands.items()],
        "late": [{"day": each.interval.name, "what": each.what} for each in _late(config)],
    }


def _late(config: Config) -> list[Late]:
    try:
        return come_late(open_logs(config), open_checkpoints(config), open_ledger(config))
    except UserError:
        return []  # how the model stands can be told without its logs


def lock_holder(config: Config) -> dict[str, Any] | None:
    """Who holds the model's lock, or None."""
    storage = open_storage(config).within(FOLDER)
    claim = holder(storage)
    if claim is None:
        return None
    where = {"pid": claim.process.pid, "host": claim.process.host}
    return {"verb": claim.verb, "since": claim.since, "sign_of_life": sign_of_life(storage, claim)} | where


def history(config: Config, interval: Interval) -> list[dict[str, Any]]:
    """All that happened to an interval, oldest first."""
    ledger = open_ledger(config)
    entries = ledger.entries(interval)
    if not entries:
        got = ", ".join(map(str, ledger.intervals())) or "none"
        raise UserError(f"nothing is known of {interval.words}", open_storage(config).path, got=got)
    return entries


def verify(config: Config, interval: Interval | None) -> list[dict[str, Any]]:
    """Read the files of every kept checkpoint again, or of one: which are as they were written, and what is wrong."""
    checkpoints = open_checkpoints(config)
    found = []
    for each in checkpoints.intervals() if interval is None else [interval]:
        try:
            checkpoints.verify(checkpoints.open(each))
            found.append({"day": each.name, "ok": True, "error": None})
        except UserError as error:
            found.append({"day": each.name, "ok": False, "error": str(error)})
    return found
