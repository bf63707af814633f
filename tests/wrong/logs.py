"""Wrong readings of logs as they are: hours, deliveries, malformed rows."""

# mypy: disable-error-code="method-assign,assignment"

import dataclasses
from typing import Any

from wrong.mutant import Mutant, in_file

# What is replaced is imported inside: nothing of ours may be imported before a mutant is applied.

HOURS, PLAN, DUE = "trainer/test_hours.py", "trainer/test_plan.py", "trainer/test_due.py"
QUARANTINE = "trainer/test_quarantine.py"


def hours_of_the_first_offset() -> None:
    """A day's hours are counted from its midnight: after the clock was set they are off by one."""
    from trainer import hours

    changes = hours._changes

    def counted(day: Any, zone: str) -> Any:
        starts, _ = changes(day, zone)
        return starts[0] + 3600 * hours.np.arange(25), hours.np.array([-1, *range(24), -1])

    hours._changes = counted


def shown_times_are_moved() -> None:
    """A timestamp without a zone is taken for UTC, and moved to the clock's zone."""
    from trainer import hours

    hours_of = hours.hours_of

    def moved(times: Any, day: Any, zone: str) -> Any:
        shown = hours.pa.types.is_timestamp(times.type) and times.type.tz is None
        return hours_of(times.cast(hours.pa.timestamp(times.type.unit, "UTC")) if shown else times, day, zone)

    hours.hours_of = moved


def an_hour_left_out_is_missing() -> None:
    """The hour that the clock leaves out is asked for."""
    from trainer import plan

    plan.left_out = lambda day, zone: []


def hours_are_shuffled_alike() -> None:
    """What is random about an hour is drawn from its day."""
    from trainer.intervals import Interval

    Interval.number = property(lambda self: self.day.toordinal())


def places_count_bad_rows() -> None:
    """A row's place is that in the file: what is random about it depends on rows that were set aside."""
    from trainer import quarantine

    without = quarantine._without

    def unnumbered(logs: Any, plan: Any, found: Any) -> Any:
        first_row = {(group.path, group.index): group.first_row for group in plan.row_groups}
        left = without(logs, plan, found)
        groups = [dataclasses.replace(g, first_row=first_row[g.path, g.index]) for g in left.row_groups]
        return dataclasses.replace(left, row_groups=tuple(groups))

    quarantine._without = unnumbered


def each_worker_leaves_out_what_it_found() -> None:
    """Workers do not tell each other which rows are bad."""
    from trainer import quarantine

    heard: list[Any] = []

    def gather_json(exchange: Any, value: Any) -> Any:
        heard[:] = [value]
        return [value]

    quarantine.gather_json = gather_json
    quarantine.told = lambda exchange, value: value


def a_row_counts_for_each_fault() -> None:
    """A row with two faults is counted twice."""
    from trainer.columns import Refused, np

    def add(self: Any, column: str, reason: str, bad_B: Any) -> None:
        if bad_B.any():
            self.reasons.append((column, reason, np.flatnonzero(bad_B).tolist()))
            self.bad_B |= bad_B

    Refused.add = add


def what_cannot_be_reached_is_bad() -> None:
    """A file that the storage does not give is set aside as one that means nothing."""
    from trainer.errors import UserError
    from trainer.files import Files

    def tried(self: Any, path: str, work: Any) -> Any:
        try:
            return work()
        except UserError as error:
            return error

    Files.tried = tried


def known_by_name_and_size() -> None:
    """A file of the same name and size is the same file."""
    from trainer import late

    differences = late.differences
    late.differences = lambda before, now: differences(*([{**f, "footer": ""} for f in of] for of in (before, now)))


def ripe_a_day_early() -> None:
    """A day is trained when its last label may still be on its way."""
    from trainer import due

    wait = due.due
    due.due = lambda *a, label_delay_days=0, **o: wait(*a, label_delay_days=max(label_delay_days - 1, 0), **o)


MUTANTS = [
    Mutant(
        hours_of_the_first_offset,
        in_file(HOURS, "test_an_hour_that_is_shown_twice_is_one_and_one_that_is_left_out_is_none"),
    ),
    Mutant(shown_times_are_moved, in_file(HOURS, "test_a_timestamp_without_a_zone_is_what_the_clock_showed[us]")),
    Mutant(
        an_hour_left_out_is_missing,
        in_file(PLAN, "test_an_hour_without_a_folder_is_missing_unless_the_clock_leaves_it_out"),
    ),
    Mutant(hours_are_shuffled_alike, in_file(PLAN, "test_hours_of_one_day_are_shuffled_in_orders_of_their_own")),
    Mutant(
        places_count_bad_rows,
        in_file(QUARANTINE, "test_what_is_left_is_read_as_a_day_without_bad_rows_by_any_number_of_workers[1-options1]"),
    ),
    Mutant(each_worker_leaves_out_what_it_found, in_file(QUARANTINE, "test_any_number_of_workers_finds_the_same[2]")),
    Mutant(a_row_counts_for_each_fault, in_file(QUARANTINE, "test_each_bad_row_is_told_once_with_its_first_reason")),
    Mutant(what_cannot_be_reached_is_bad, in_file(QUARANTINE, "test_a_file_that_cannot_be_reached_is_no_bad_file")),
    Mutant(known_by_name_and_size, in_file(DUE, "test_a_file_of_the_same_size_with_other_values_is_another")),
    Mutant(ripe_a_day_early, in_file(DUE, "test_a_day_is_due_when_its_labels_are_complete[2]")),
]
