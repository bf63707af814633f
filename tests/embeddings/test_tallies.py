"""Tallies against their closed form, and what happened against plain loops.

A tally of events e_i with weights w_i, d_i days ago, is sum w_i e_i 2^(-d_i / half_life).
"""

import random
from collections import defaultdict

import numpy as np
import pytest

from embeddings.dedupe import Int64s
from embeddings.idmap import IdMap
from embeddings.tallies import IMPRESSIONS, SIGHTINGS, Ledger, Periods, Tally, add_happened, add_rows

VALUE = Tally("value", {SIGHTINGS: 1.0}, half_life_days=30.0)
SHOWN = Tally("shown", {IMPRESSIONS: 1.0}, half_life_days=7.0)
WORTH = Tally("worth", {"click": 1.0, "buy": 20.0}, half_life_days=0.5)
EVENTS = [SIGHTINGS, IMPRESSIONS, "click", "buy"]


def map_of(num_rows: int, table: int = 0, num_tallies: int = 5) -> tuple[IdMap, Int64s]:
    ids = IdMap(num_rows, num_tallies)
    return ids, ids.insert(np.arange(num_rows), np.full(num_rows, table, np.uint8))


def begin(ledger: Ledger, periods: Periods, day: int) -> None:
    periods.begin(day)
    ledger.begin(periods)


def test_by_default_a_tally_counts_sightings_with_a_half_life_of_30_days() -> None:
    assert Tally("value") == VALUE


@pytest.mark.parametrize("half_life", [0.5, 7.0, 30.0])
def test_a_tally_halves_every_half_life(half_life: float) -> None:
    ledger, periods, (ids, rows) = Ledger([[Tally("x", {"e": 2.0}, half_life)]], ["e"]), Periods(), map_of(1, 0, 1)
    begin(ledger, periods, 1_000)
    ledger.add(ids, rows, np.array([[40]]), periods.now)
    for later in (0, 1, 2, 7, 30, 31, 365):
        begin(ledger, periods, 1_000 + later)
        # one float32 rounding of a float64 product
        assert ledger.read(ids, rows)[0, 0] == pytest.approx(80 * 2 ** (-later / half_life), rel=6e-8, abs=1e-38)


def test_reading_changes_nothing_and_row_minus_one_reads_zeros() -> None:
    ledger, periods, (ids, rows) = Ledger([[VALUE, SHOWN, WORTH]], EVENTS), Periods(), map_of(2)
    begin(ledger, periods, 5)
    ledger.add(ids, rows, np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), periods.now)
    begin(ledger, periods, 6)
    known = ids.known_R.tobytes()
    read = ledger.read(ids, np.array([1, -1, 0, -1]))
    assert read.dtype == np.float32 and not read[[1, 3]].any() and read[[0, 2]].all()
    assert ids.known_R.tobytes() == known


def by_closed_form(tally: Tally, happened: list[tuple[int, list[int]]], today: int, as_today_began: bool) -> float:
    total = 0.0
    for day, events in happened:
        if not (as_today_began and day == today):
            worth = sum(tally.weights.get(event, 0.0) * e for event, e in zip(EVENTS, events, strict=True))
            total += worth * 2 ** ((day - today) / tally.half_life_days)
    return total


def test_random_days_of_events_equal_the_closed_form() -> None:
    """Three tables of different tallies in one map; each row is sometimes absent; several batches a day."""
    by_day = Tally("b", {IMPRESSIONS: 1.0, "buy": 5.0}, 3.0, by_day=True)
    tallies = [[VALUE, by_day, WORTH], [SHOWN, Tally("x", {"buy": 0.25, "click": 3.0}, 12.0)], [by_day]]
    ledger, periods, ids, draw = Ledger(tallies, EVENTS), Periods(), IdMap(210, 5), random.Random(0)
    rows = ids.insert(np.arange(210), np.array([0, 1, 2] * 70, np.uint8))
    happened: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for day in (100, 101, 103, 110, 150):
        begin(ledger, periods, day)
        for _ in range(3):
            batch = rows[draw.sample(range(210), 140)]
            events = np.array([[draw.randrange(4) for _ in EVENTS] for _ in batch])
            ledger.add(ids, batch, events, periods.now)
            for row, of_row in zip(batch.tolist(), events.tolist(), strict=True):
                happened[row].append((day, of_row))
        for began in (False, True):
            read = ledger.read(ids, rows, as_today_began=began)
            assert read.shape == (210, 3)
            for row, of_row in zip(rows.tolist(), read.tolist(), strict=True):
                of_table = tallies[ids.table_R[row]]
                # the first of a table is its value, which is always that of now
                parts = [s > 0 and (tally.by_day or began) for s, tally in enumerate(of_table)]
                expected = [by_closed_form(t, happened[row], day, p) for t, p in zip(of_table, parts, strict=True)]
                # at most 15 roundings to float32 of 6e-8 of numbers below the sum; zeros for what a table has not
                assert of_row == pytest.approx(expected + [0.0] * (3 - len(of_table)), rel=15 * 6e-8, abs=1e-37)
                assert ids.count_R[row] == sum(of[0] for _, of in happened[row])


def test_a_statistic_by_day_is_read_from_the_next_day_on() -> None:
    statistics = [Tally("x", {"e": 1.0}, 1.0, by_day=True), Tally("y", {"e": 1.0}, 1.0)]
    ledger, periods, (ids, rows) = Ledger([[VALUE, *statistics]], [SIGHTINGS, "e"]), Periods(), map_of(1, 0, 5)
    assert ledger.columns(0) == ["value", "x", "y", "x_today", "y_today"]
    read, began = [], []
    for day, count in ((10, 8), (10, 8), (11, 4), (13, 0), (13, 1), (14, 0)):
        if day != periods.today:
            begin(ledger, periods, day)
        read.append(ledger.read(ids, rows)[0, 1:].tolist())
        began.append(ledger.read(ids, rows, as_today_began=True)[0, 1:].tolist())
        ledger.add(ids, rows, np.array([[0, count]]), periods.now)
    # by hand: 16 / 2, (8 + 4) / 4, the same, (3 + 1) / 2
    assert [x for x, _ in read] == [0, 0, 8, 3, 3, 2] and [y for _, y in read] == [0, 8, 8, 3, 3, 2]
    assert began == [[x, x] for x in (0, 0, 8, 3, 3, 2)]


@pytest.mark.filterwarnings("error")
def test_what_was_counted_on_days_to_come_is_read_as_it_is() -> None:
    ledger, periods, (ids, rows) = Ledger([[VALUE]], [SIGHTINGS]), Periods(), map_of(2, 0, 1)
    ids.tally_RC[rows], ids.seen_R[rows] = 8, periods.past(np.array([738_000, 738_060]))
    for day, expected in ((0, [8, 8]), (738_030, [4, 8]), (738_060, [2, 8])):
        begin(ledger, periods, day)
        assert ledger.read(ids, rows)[:, 0].tolist() == expected


def test_columns_name_the_tallies_of_a_table_then_what_is_of_today() -> None:
    first, second = Tally("a", {"e": 1.0}, by_day=True), Tally("b", {"e": 1.0})
    ledger = Ledger([[VALUE], [VALUE, first, second], []], [*EVENTS, "e"])
    assert [ledger.columns(t) for t in range(3)] == [["value"], ["value", "a", "b", "a_today", "b_today"], []]


def test_adding_enters_count_and_period_of_its_rows_alone() -> None:
    ledger, periods, (ids, rows) = Ledger([[VALUE, SHOWN, WORTH]], EVENTS), Periods(), map_of(4)
    begin(ledger, periods, 9)
    ledger.add(ids, np.array([2, -1, 0]), np.array([[3, 1, 0, 1], [100, 100, 100, 100], [2, 0, 0, 0]]), periods.now)
    assert ids.count_R[rows].tolist() == [2, 0, 3, 0] and ids.seen_R[rows].tolist() == [periods.now, 0, periods.now, 0]
    assert ledger.read(ids, rows).tolist() == [[2, 0, 0], [0, 0, 0], [3, 1, 20], [0, 0, 0]]
    assert not ids.tally_RC[rows[[1, 3]]].any()


def test_the_order_of_the_rows_of_a_batch_changes_no_bit() -> None:
    rng, order, found = np.random.default_rng(0), np.random.default_rng(1).permutation(200), []
    events = rng.integers(0, 100, (2, 200, 4))
    for places in (np.arange(200), order):
        ledger, periods, (ids, rows) = Ledger([[VALUE, SHOWN, WORTH]], EVENTS), Periods(), map_of(200)
        for day in (3, 8):
            begin(ledger, periods, day)
            ledger.add(ids, rows[places], events[day // 8][places], periods.now)
        found.append((ids.tally_RC.tobytes(), ids.count_R.tobytes(), ids.seen_R.tobytes()))
    assert found[0] == found[1]


def test_sightings_past_int32_stay_at_its_largest_number() -> None:
    ledger, periods, (ids, rows) = Ledger([[VALUE]], [SIGHTINGS]), Periods(), map_of(2, 0, 1)
    ids.count_R[rows] = [2**31 - 3, 7]
    ledger.add(ids, rows, np.array([[5], [5]]), periods.now)
    assert ids.count_R[rows].tolist() == [2**31 - 1, 12]


def test_what_is_entered_marks_its_rows_as_changed_and_no_others() -> None:
    ledger, periods, (ids, rows) = Ledger([[VALUE]], [SIGHTINGS]), Periods(), map_of(40, 0, 1)
    ledger.add(ids, np.array([3, -1, 39, 8]), np.ones((4, 1), np.int64), periods.now)
    assert ids.changed_rows().tolist() == [3, 8, 39] and rows.size == 40


# What happened


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_what_happened_is_added_to_the_pairs_of_a_rows_ids_however_the_batch_is_cut(num_workers: int) -> None:
    rng = np.random.default_rng(0)
    lengths, num_pairs = rng.integers(0, 4, 60), 15
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    index_N, happened_BE = rng.integers(0, num_pairs, offsets[-1]), rng.integers(0, 3, (60, 4))
    expected = np.zeros((num_pairs, 4), np.int64)
    for b in range(60):  # plain loop; an id that a list holds twice counts twice
        for n in range(offsets[b], offsets[b + 1]):
            expected[index_N[n]] += happened_BE[b]
    total = np.zeros((num_pairs, 4), np.int64)
    for rows in np.array_split(np.arange(60), num_workers):
        first, end = offsets[rows[0]], offsets[rows[-1] + 1]
        own, index_M = np.unique(index_N[first:end], return_inverse=True)  # each worker's own distinct pairs
        events = np.zeros((own.size, 4), np.int64)
        add_happened(events, index_M, offsets[rows[0] : rows[-1] + 2] - first, happened_BE[rows])
        add_rows(total, own, events)
    assert np.array_equal(total, expected)


def test_add_rows_equals_numpys_unbuffered_addition() -> None:
    rng = np.random.default_rng(2)
    for num_rows in (0, 1, 100):
        total, index_V, event_VE = rng.integers(0, 9, (7, 3)), rng.integers(0, 7, num_rows), np.ones((num_rows, 3), int)
        expected = total.copy()
        np.add.at(expected, index_V, event_VE)
        add_rows(total, index_V, event_VE)
        assert np.array_equal(total, expected)


# Periods


def test_periods_know_today_and_the_age_of_each() -> None:
    periods = Periods()
    assert (periods.now, periods.today) == (0, 0)
    for day in (700, 701, 705):
        periods.begin(day)
    assert (periods.now, periods.today) == (3, 705) and periods.ages().tolist() == [705, 5, 4, 0]


def test_days_of_rows_from_a_snapshot_get_periods_of_their_age() -> None:
    periods = Periods()
    of_rows = [periods.past(np.array(days)) for days in ([703, 701, 703, 700], [701], [])]
    periods.begin(710)
    days = np.array(periods.days)
    assert [days[rows].tolist() for rows in of_rows] == [[703, 701, 703, 700], [701], []]
    assert periods.today == 710 and periods.ages()[of_rows[0]].tolist() == [7, 9, 7, 10]


def test_today_stays_today_while_days_of_a_snapshot_are_entered() -> None:
    periods = Periods()
    periods.begin(800)
    periods.past(np.array([790, 795]))
    assert periods.today == 800 and periods.ages()[-1] == 0


def test_any_number_of_pieces_of_a_snapshot_uses_up_no_more_periods_than_it_has_days() -> None:
    periods = Periods()
    for _ in range(1_000):  # pieces of a large table, each with rows of the last hundred days
        periods.past(np.arange(600, 700))
    assert periods.now < 300


def test_more_periods_than_a_row_can_tell_apart_are_refused() -> None:
    periods = Periods()
    with pytest.raises(AssertionError, match="periods"):
        for day in range(2**15):
            periods.begin(day)
    assert periods.now <= np.iinfo(np.int16).max  # what a row stores
