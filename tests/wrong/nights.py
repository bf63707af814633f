"""Wrong locks, ledgers and mornings."""

# mypy: disable-error-code="method-assign,assignment"

from typing import Any

from wrong.mutant import Mutant, in_file

# What is replaced is imported inside: nothing of ours may be imported before a mutant is applied.


def one_that_chooses_is_not_waited_for() -> None:
    """A claim without a ticket is passed over: its owner may choose the same ticket, or have chosen a lower one."""
    from cluster.lock import Lock

    others = Lock._others
    Lock._others = lambda self: [claim for claim in others(self) if claim.ticket is not None]


def looked_before_it_is_claimed() -> None:
    """Whether the lock is free is asked first, and the claim is written then: two find it free."""
    from cluster.lock import Lock

    write = Lock._write

    def late(self: Any, claim: Any) -> None:
        if claim.held:
            write(self, claim)
        else:
            self._claim = claim

    Lock._write = late


def the_name_is_the_order() -> None:
    """Claims are ordered by their names alone: one that comes later goes before one that was already let in."""
    from cluster import lock

    lock._order = lambda claim: (0, claim.id)
    wait = lock.Lock._wait

    def unless_lower(self: Any) -> Any:
        others = self._others
        self._others = lambda: [lock.replace(claim, held=False) for claim in others()]
        return wait(self)

    lock.Lock._wait = unless_lower


def a_number_tells_a_process() -> None:
    """Whoever has the owner's process number is the owner."""
    from cluster import lock

    lock.Process.is_gone = lambda self: not lock._started(self.pid)


def containers_share_their_numbers() -> None:
    """Process numbers of another container are looked for in this one."""
    from cluster import lock

    lock.Process.is_gone = lambda self: lock._started(self.pid) != self.started


def an_old_beat_is_no_beat() -> None:
    """A beat that is older than a minute by our clock is a dead owner's, although he may have another clock."""
    from cluster import lock

    def by_our_clock(storage: Any, claim: Any, beat_every_s: float, dead_after_s: float) -> bool:
        return not claim.process.is_gone() and lock.time.time() - lock.last_beat(storage, claim) < dead_after_s

    lock.is_alive = by_our_clock


def only_another_owner_is_looked_for() -> None:
    """A night that was taken over goes on when the other one is over, as nobody holds the lock then."""
    from cluster import lock

    def nobody_else(self: Any) -> None:
        if any(claim.held and claim.id != self.id for claim in lock.read_claims(self.storage)):
            raise lock.UserError("another night took over")

    lock.Fence.mine = nobody_else


def every_entry_is_entered() -> None:
    """A state is entered as often as it is said."""
    from trainer.ledger import Ledger

    def record(self: Any, interval: Any, state: str, reason: str, **facts: Any) -> None:
        entry = {"state": state, "at": "", "reason": reason} | facts
        entries = [*self.entries(interval), entry]
        self._write(f"{interval.folder}/ledger.json", {"interval": interval.name, "entries": entries})

    Ledger.record = record


def the_ledger_does_not_ask() -> None:
    """Whoever lost the lock goes on to write."""
    from trainer.ledger import Ledger

    write = Ledger._write

    def unasked(self: Any, name: str, content: Any) -> None:
        self._mine = lambda: None
        write(self, name, content)

    Ledger._write = unasked


def what_was_not_told_is_not_entered() -> None:
    """The ledger knows only what the workers told while their driver was alive."""
    from cluster.morning import Morning

    Morning.written = lambda self, interval, earlier=None: None


def the_gate_is_asked_again() -> None:
    """What the gate said before a kill is forgotten: with other settings it says something else."""
    from cluster.morning import Morning

    entered = Morning._entered

    def without_gate(self: Any, interval: Any, state: str) -> Any:
        found = entered(self, interval, state)
        if state == "gated" and found and not self.__dict__.pop("_just_judged", False):
            return {}
        return found

    judge = Morning._judge

    def judged(self: Any, *arguments: Any) -> Any:
        decision = judge(self, *arguments)
        self._just_judged = True
        return decision

    Morning._judge = judged
    Morning._entered = without_gate


def a_rollback_is_forgotten() -> None:
    """What was not decided yet when a person rolled back is promoted over it the next night."""
    from cluster import morning

    morning.Morning._overruled = lambda self, interval, gated: morning.Decision(gated["decision"], gated["reason"])


def the_oldest_is_dropped_first() -> None:
    """Models are thrown away from the oldest to the newest: a kill leaves a gap in the chain."""
    from cluster import promotion

    promotion.reversed = iter  # type: ignore[attr-defined]


LOCK = "cluster/test_lock.py"
LEDGER = "trainer/test_ledger.py"
MORNING = "cluster/test_morning.py"
MUTANTS = [
    Mutant(
        one_that_chooses_is_not_waited_for,
        in_file(LOCK, "test_one_that_chooses_is_waited_for"),
    ),
    Mutant(looked_before_it_is_claimed, in_file(LOCK, "test_no_order_of_steps_lets_two_in")),
    Mutant(the_name_is_the_order, in_file(LOCK, "test_no_order_of_steps_lets_two_in")),
    Mutant(a_number_tells_a_process, in_file(LOCK, "test_a_number_that_another_process_got_is_not_the_owner")),
    Mutant(containers_share_their_numbers, in_file(LOCK, "test_a_number_that_another_process_got_is_not_the_owner")),
    Mutant(an_old_beat_is_no_beat, in_file(LOCK, "test_a_beat_that_only_looks_old_is_watched")),
    Mutant(
        only_another_owner_is_looked_for,
        in_file(LOCK, "test_a_claim_that_was_taken_away_is_not_mine_although_nobody_holds_the_lock"),
    ),
    Mutant(
        every_entry_is_entered,
        in_file(
            LEDGER,
            "test_a_state_is_entered_once_since_the_interval_last_began",
            "test_a_night_killed_after_any_entry_and_run_again_leaves_the_ledger_of_an_undisturbed_one[3]",
        ),
    ),
    Mutant(the_ledger_does_not_ask, in_file(LEDGER, "test_whoever_lost_the_lock_writes_nothing")),
    Mutant(
        what_was_not_told_is_not_entered,
        in_file(
            MORNING,
            "test_a_night_killed_anywhere_goes_on_and_leaves_what_an_undisturbed_one_leaves[told]",
        ),
    ),
    Mutant(the_gate_is_asked_again, in_file(MORNING, "test_what_the_gate_said_is_not_asked_again")),
    Mutant(
        a_rollback_is_forgotten,
        in_file(MORNING, "test_a_model_that_was_not_decided_when_a_person_rolled_back_does_not_come_back_by_itself"),
    ),
    Mutant(the_oldest_is_dropped_first, in_file(MORNING, "test_again_killed_anywhere_and_said_again_ends_the_same")),
]
