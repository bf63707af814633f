"""Days that were delivered again after they were trained, or only after a later one was: seen, and gone back to."""

from collections.abc import Sequence

from trainer.checkpoint import Checkpoints
from trainer.data import Logs
from trainer.intervals import Interval
from trainer.late import Late, late
from trainer.ledger import Ledger


def come_late(logs: Logs, checkpoints: Checkpoints, ledger: Ledger) -> list[Late]:
    """What came late, of the intervals whose checkpoints are kept, in order."""
    committed = checkpoints.intervals()
    delivered = {interval: checkpoints.open(interval).report.get("delivery", []) for interval in committed}
    known = {*committed, *(interval for interval in ledger.intervals() if ledger.was_written(interval))}
    return late(logs, delivered, known)


def back_to(late: Sequence[Late], checkpoints: Checkpoints, ledger: Ledger) -> Late | None:
    """The first that came late from which on the model can be trained anew: where the model is kept that it was, or
    would have been, trained from.
    """
    committed, trained = checkpoints.intervals(), [i for i in ledger.intervals() if ledger.was_written(i)]
    for each in late:
        before = max((interval for interval in trained if interval < each.interval), default=None)
        if before is None or before in committed:
            return each
    return None


def first_after(checkpoints: Checkpoints, interval: Interval) -> Interval:
    """The first committed interval from one on: what goes when that one is trained anew."""
    return min(each for each in checkpoints.intervals() if each >= interval)
