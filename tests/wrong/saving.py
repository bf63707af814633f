"""Wrong versions of checkpoints, of what goes on from them, and of what is removed."""

from typing import Any

from wrong.mutant import Mutant, in_file


def a_lost_snapshot_takes_its_changes_with_it() -> None:
    """Rows that a failed snapshot held do not count as changed any more: the next delta lacks them."""
    from embeddings.snapshot import Snapshot

    Snapshot.undo = lambda self: None


def the_step_under_way_is_made_again() -> None:
    """The cursor is that of the step before: its rows are trained on twice."""
    from trainer.counted import Counted

    state = Counted.state

    def late(self: Counted) -> Any:
        found = state(self)
        found["alike/made"][0] -= 1
        return found

    Counted.state = late


def counts_begin_anew_after_a_restart() -> None:
    """The day's report has only the nulls that were counted since the restart."""
    from trainer.counted import Counted

    load = Counted.load

    def forgetful(self: Counted, state: Any) -> None:
        load(self, {name: values * 0 if name == "own/of nulls" else values for name, values in state.items()})

    Counted.load = forgetful


def statistics_of_the_day_are_those_of_the_restart() -> None:
    """What all ids of a table have in common is summed up again, without the rows that left since the day began."""
    from trainer.counted import Counted

    Counted.restore_statistics = lambda self: None


def a_snapshot_is_gone_on_from_whatever_it_is_of() -> None:
    """Another batch size makes other steps: the cursor points elsewhere."""
    from trainer.saving import Saving

    begin = Saving.begin
    Saving.begin = lambda self, interval, about=None: begin(self, interval, None)


def a_snapshot_exists_when_worker_0_has_written_its_part() -> None:
    """Nobody waits for the others: what they did not write is missing, and nobody knows."""
    from trainer.writing import Writing

    def impatient(self: Writing) -> Any:
        import json

        part = json.loads(self._folder.read("part-0.json"))
        return [(part.get("rows", {}), part.get("files", {}))]

    Writing._parts = impatient


def a_chain_forgets_the_snapshots_of_its_day() -> None:
    """A commit names only the layers of commits."""
    from trainer.saving import Saving

    commit = Saving.commit

    def without(self: Saving, report: Any, **more: Any) -> Any:
        self._end_writing()
        self._layers = [layer for layer in self._layers if layer["interval"] != self._interval.name]
        return commit(self, report, **more)

    Saving.commit = without


def only_its_own_files_are_needed_by_a_manifest() -> None:
    """Layers of older days are removed with their days."""
    from trainer import retention

    def own(kept: Any) -> set[str]:
        return {name for each in kept for name, _ in each.files() if name.startswith(f"{each.interval.folder}/")}

    retention._needed = own


def files_go_before_their_manifest() -> None:
    """Killed in between, a committed day lacks a file."""
    from trainer import retention

    remove = retention.remove

    def backwards(checkpoints: Any, first: Any) -> None:
        for interval in [each for each in checkpoints.begun() if each >= first]:
            retention._keep_only(checkpoints, interval, set())
        remove(checkpoints, first)

    retention.remove = backwards


def a_manifest_is_believed() -> None:
    """Nobody looks whether a file is the one that was written."""
    from trainer.checkpoint import Checkpoints

    Checkpoints._check_file = lambda *_: None


SAVING, RETENTION, COUNTED = "trainer/test_saving.py", "trainer/test_retention.py", "trainer/test_counted.py"
LAST_BIT = "test_a_day_gone_on_with_is_the_day_that_was_not_interrupted_to_the_last_bit[1]"
MUTANTS = [
    Mutant(
        a_lost_snapshot_takes_its_changes_with_it,
        in_file(SAVING, "test_a_snapshot_that_fails_on_one_worker_is_no_error_and_the_next_holds_it_all[0]"),
    ),
    Mutant(
        the_step_under_way_is_made_again,
        in_file(SAVING, "test_each_row_is_trained_on_exactly_once_however_often_the_night_is_killed[workers0]"),
    ),
    Mutant(counts_begin_anew_after_a_restart, in_file(COUNTED, LAST_BIT)),
    Mutant(
        statistics_of_the_day_are_those_of_the_restart,
        in_file(SAVING, "test_a_night_that_is_killed_and_goes_on_is_the_undisturbed_night_to_the_last_bit[1]"),
    ),
    Mutant(
        a_snapshot_is_gone_on_from_whatever_it_is_of,
        in_file(SAVING, "test_a_snapshot_of_other_data_or_settings_is_not_gone_on_from"),
    ),
    Mutant(
        a_snapshot_exists_when_worker_0_has_written_its_part,
        in_file(SAVING, "test_a_snapshot_that_fails_on_one_worker_is_no_error_and_the_next_holds_it_all[1]"),
        crash="UserError",
    ),
    Mutant(
        a_chain_forgets_the_snapshots_of_its_day,
        in_file(SAVING, "test_a_chain_of_deltas_holds_what_full_snapshots_hold_bit_for_bit[1]"),
    ),
    Mutant(
        only_its_own_files_are_needed_by_a_manifest,
        in_file(RETENTION, "test_what_stays_of_a_pruned_day_is_its_ledger"),
        crash="UserError",
    ),
    Mutant(
        files_go_before_their_manifest,
        in_file(
            RETENTION, "test_killed_anywhere_in_removing_what_is_committed_is_whole_and_the_next_call_ends_it[remove]"
        ),
        crash="UserError",
    ),
    Mutant(
        a_manifest_is_believed,
        in_file(
            RETENTION, "test_verify_reads_every_file_down_to_the_base_and_names_the_one_that_is_damaged[dense net]"
        ),
    ),
]
