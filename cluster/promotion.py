"""What a person says about which model serves: promote, rollback, and to throw models away and train them anew.

    promote    an interval whose model the gate held, or that was rolled back from, serves from now on
    rollback   an earlier promoted one serves from now on
    drop       the models of an interval and of all after it go; the next night trains them again

champion.json moves in one write. MLflow's alias follows; when MLflow cannot be asked, the next night sets it. Whoever
calls these holds the lock.
"""

from dataclasses import dataclass

from cluster.morning import set_alias
from trainer.checkpoint import Checkpoints
from trainer.config import Config
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.ledger import Champion, Ledger
from trainer.retention import remove
from trainer.tracking import Tracking


@dataclass(frozen=True)
class Moved:
    """What serves now, and what served until then. alias: None, or why MLflow's alias did not follow yet."""

    champion: Champion
    before: Champion | None
    alias: str | None


def promote(config: Config, checkpoints: Checkpoints, ledger: Ledger, interval: Interval, force: bool) -> Moved:
    """Let the model of an interval serve, although the gate held it (force)."""
    checkpoint, decision = checkpoints.open(interval), ledger.decision(interval)
    if decision is None:
        do = "run nightly, which judges it; then promote it"
        raise UserError(f"nothing is decided yet of {interval.words}", checkpoints.path, do=do)
    if decision["state"] == "held" and not force:
        raise UserError(f"{interval.words} was held", checkpoints.path, got=decision["reason"], do="add --force")
    checkpoints.verify(checkpoint)
    reason = "a person promoted it"
    if decision["state"] == "held":
        reason += f" by force; it was held: {decision['reason']}"
    moved = _move(config, checkpoints, ledger, interval, "force", reason)
    kept = {key: decision[key] for key in ("run_id", "version") if key in decision}
    ledger.record(interval, "promoted", reason, **kept)
    return moved


def rollback(config: Config, checkpoints: Checkpoints, ledger: Ledger, interval: Interval) -> Moved:
    """Let the model of an interval serve that was promoted before."""
    checkpoint, decision = checkpoints.open(interval), ledger.decision(interval)
    if decision is None or decision["state"] != "promoted":
        got = f"held: {decision['reason']}" if decision else "nothing is decided yet"
        served = [str(i) for i in checkpoints.intervals() if ledger.is_promoted(i)]
        expected, do = ", ".join(served) or "none was", f"choose one, or: daybreak promote --force --day {interval}"
        raise UserError(f"{interval.words} was not promoted", checkpoints.path, got=got, expected=expected, do=do)
    checkpoints.verify(checkpoint)
    return _move(config, checkpoints, ledger, interval, "rollback", "a person rolled back to it")


def drop(config: Config, checkpoints: Checkpoints, ledger: Ledger, first: Interval, reason: str) -> list[Interval]:
    """Throw away the models of an interval and of all that come after it; returns which they were. If one of them
    serves, the newest promoted one before them serves from now on, or none.

    From the newest to the oldest, so that a kill leaves a chain of days without a gap; the next night goes on from it.
    """
    committed = checkpoints.intervals()
    wanted, kept = [i for i in committed if i >= first], [i for i in committed if i < first]
    _check_droppable(checkpoints, ledger, first, kept)
    serving = ledger.champion()
    if serving and serving.interval >= first:
        promoted = [i for i in kept if ledger.is_promoted(i)]
        if promoted:
            _move(config, checkpoints, ledger, promoted[-1], "again", f"{serving.interval} is trained anew")
        else:
            ledger.no_champion()
    elif serving and serving.passed and serving.passed >= first:  # what is trained anew comes after it was moved
        ledger.move_champion(serving.interval, serving.by, serving.reason, passed=kept[-1] if kept else None)
    for interval in reversed([i for i in checkpoints.begun() if i >= first]):
        ledger.record(interval, "dropped", reason)
    checkpoints.stored(lambda: remove(checkpoints, first))
    return wanted


def _check_droppable(checkpoints: Checkpoints, ledger: Ledger, first: Interval, kept: list[Interval]) -> None:
    """Only what was trained is trained again, and only from the model that it was trained from."""
    if not ledger.entries(first) and first not in checkpoints.intervals():
        got = ", ".join(map(str, checkpoints.intervals())) or "none"
        raise UserError(f"{first.words} was never trained", checkpoints.path, got=got, do="choose one of these")
    before = max((i for i in ledger.intervals() if i < first and ledger.was_written(i)), default=None)
    if before and before not in kept:
        what, do = f"the model that {first.words} was trained from is not kept any more", "choose a later one"
        raise UserError(what, checkpoints.path, got=", ".join(map(str, kept)) or "none", expected=str(before), do=do)


def _move(config: Config, checkpoints: Checkpoints, ledger: Ledger, interval: Interval, by: str, reason: str) -> Moved:
    before = ledger.champion()
    if before and before.interval == interval:
        by, reason = before.by, before.reason  # it serves already, and stays
    newest = checkpoints.intervals()[-1]
    ledger.move_champion(interval, by, reason, passed=None if by == "again" else newest)
    champion = ledger.champion()
    assert champion is not None, "it was moved"
    try:
        set_alias(Tracking(config.tracking.mlflow, config.name), ledger, champion)
    except UserError as error:
        return Moved(champion, before, str(error))
    return Moved(champion, before, None)
