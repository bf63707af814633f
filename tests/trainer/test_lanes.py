"""Lanes: every row once, runs of one list whole, and the same global batches for any number of workers.

Oracle: plain loops over the rows of made-up row groups; no file is read. Everything is an integer, compared exactly.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.intervals import Interval
from trainer.lanes import DayPlan, Edges, Lane, RowGroup, between_rows, between_runs, nearest, open_lanes

STEPS = settings(max_examples=60, deadline=None)  # each example reads a day several times
Slices = list[dict[int, list[int]]]  # for each step the rows that each lane gives, by their places in the day


@dataclass
class Day:
    """Row groups given by the lengths of the runs in them, and how they are read."""

    runs: list[list[int]]
    lanes: int
    batch_size: int
    seed: int | None

    @property
    def plan(self) -> DayPlan:
        sizes = [sum(lengths) for lengths in self.runs]
        firsts = [sum(sizes[:index]) for index in range(len(sizes))]
        groups = [RowGroup("file", i, size, first) for i, (size, first) in enumerate(zip(sizes, firsts, strict=True))]
        return DayPlan(Interval(datetime.date(2026, 11, 20)), tuple(groups))

    def lists(self) -> list[list[int]]:
        """The rows of each run, by their places in the day."""
        found, row = [], 0
        for length in (length for lengths in self.runs for length in lengths):
            found.append(list(range(row, row + length)))
            row += length
        return found

    def edges(self, group: RowGroup) -> Edges:
        # Neighbouring runs differ in their values; those two runs apart do not.
        return between_runs(np.repeat(np.arange(len(self.runs[group.index])) % 2, self.runs[group.index]))

    def open(self, rank: int = 0, workers: int = 1) -> list[Lane]:
        mine = range(rank * self.lanes // workers, (rank + 1) * self.lanes // workers)
        return list(open_lanes(self.plan, self.lanes, mine, self.seed, self.edges))

    def read(self, lanes: Sequence[Lane], start: int = 0) -> Slices:
        steps = self.plan.num_steps(self.batch_size)
        slices: Slices = []
        for step in range(start, steps):
            taken = {lane.number: lane.take(lane.num_rows * (step + 1) // steps) for lane in lanes}
            slices.append({n: [g.first_row + row for g, rows in of for row in rows] for n, of in taken.items()})
        return slices


days = st.builds(
    Day,
    runs=st.lists(st.lists(st.integers(1, 9) | st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=7),
    lanes=st.integers(1, 7),
    batch_size=st.integers(7, 60),
    seed=st.none() | st.integers(0, 2**62),
)


@STEPS
@given(days)
def test_every_row_comes_once_and_every_run_in_its_order_in_one_lanes_slice_of_one_batch(day: Day) -> None:
    slices = [rows for step in day.read(day.open()) for rows in step.values()]
    assert sorted(row for rows in slices for row in rows) == list(range(day.plan.num_rows))
    for run in day.lists():
        rows = next(rows for rows in slices if run[0] in rows)
        at = rows.index(run[0])
        assert rows[at : at + len(run)] == run


@STEPS
@given(days)
def test_each_lane_gives_each_batch_the_same_rows_for_any_number_of_workers(day: Day) -> None:
    alone = day.read(day.open())
    for workers in (2, 3, 5):
        shares = [day.read(day.open(rank, workers)) for rank in range(workers)]
        together = [{n: rows for share in step for n, rows in share.items()} for step in zip(*shares, strict=True)]
        assert together == alone


@STEPS
@given(days, st.integers(0, 10**6))
def test_lanes_that_skip_to_a_step_go_on_as_those_that_took_all(day: Day, start: int) -> None:
    steps = day.plan.num_steps(day.batch_size)
    lanes, start = day.open(), start % (steps + 1)
    for lane in lanes:
        lane.skip(lane.num_rows * start // steps)
    left = {n: sum(lane.rows_left().values()) for n, lane in enumerate(lanes)}
    resumed, whole = day.read(lanes, start), day.read(day.open())
    assert resumed == whole[start:]
    assert left == {n: sum(len(step[n]) for step in resumed) for n in range(day.lanes)}
    assert not any(lane.rows_left() for lane in lanes)


@STEPS
@given(days)
def test_slices_and_lanes_end_within_half_a_run_of_where_equal_ones_would(day: Day) -> None:
    half = max(len(run) for run in day.lists()) / 2
    lanes, steps = day.open(), day.plan.num_steps(day.batch_size)
    for number, end in enumerate(np.cumsum([lane.num_rows for lane in lanes]).tolist()):
        assert abs(end - day.plan.num_rows * (number + 1) // day.lanes) <= half
    slices = day.read(day.open())
    for lane in lanes:
        for step, end in enumerate(np.cumsum([len(each[lane.number]) for each in slices]).tolist()):
            assert abs(end - lane.num_rows * (step + 1) // steps) <= half


@STEPS
@given(days)
def test_where_any_rows_may_be_parted_lanes_and_slices_are_equal_to_a_row(day: Day) -> None:
    plan, steps = day.plan, day.plan.num_steps(day.batch_size)
    lanes = list(open_lanes(plan, day.lanes, range(day.lanes), day.seed, lambda group: between_rows(group.num_rows)))
    sizes = [plan.num_rows * (n + 1) // day.lanes - plan.num_rows * n // day.lanes for n in range(day.lanes)]
    assert [lane.num_rows for lane in lanes] == sizes
    for number, of_lane in enumerate(zip(*(step.values() for step in day.read(lanes)), strict=True)):
        ends = [sizes[number] * step // steps for step in range(steps + 1)]
        assert [len(rows) for rows in of_lane] == [b - a for a, b in pairwise(ends)]


def test_what_is_skipped_whole_is_not_looked_at() -> None:
    day = Day([[3, 4]] * 10, 1, 7, 1)
    looked: list[RowGroup] = []

    def edges_of(group: RowGroup) -> Edges:
        looked.append(group)
        return day.edges(group)

    (lane,) = open_lanes(day.plan, 1, range(1), 1, edges_of)
    lane.skip(35)
    assert not looked, "a lane without neighbours, and five whole row groups"
    lane.skip(38)
    assert len(looked) == 1


def test_a_seed_shuffles_runs_and_row_groups_and_no_seed_keeps_the_order() -> None:
    def order(seed: int | None) -> list[int]:
        day = Day([[2, 3] * 5] * 4, 1, 100, seed)
        return [row for step in day.read(day.open()) for row in step[0]]

    assert order(None) == list(range(100))
    orders = [order(seed) for seed in range(8)]
    assert len({tuple(rows) for rows in orders}) == 8
    assert len({rows[0] // 25 for rows in orders}) > 1 and len({rows[0] % 25 for rows in orders}) > 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_the_nearest_edge_is_the_nearest_and_of_two_the_later(lengths: list[int]) -> None:
    edges = np.cumsum([0, *lengths])
    for place in range(int(edges[-1]) + 1):
        assert nearest(edges, place) == min(edges.tolist(), key=lambda edge: (abs(edge - place), -edge))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_runs_of_equal_neighbours_are_not_parted_and_all_others_are(values: list[int]) -> None:
    parted = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    assert between_runs(np.array(values)).tolist() == parted
