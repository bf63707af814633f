"""Proof tests of trainer/draws.py: uniform, independent, a property of the row alone.

All seeds are fixed: a bound holds or it does not.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.draws import Draws

NUM_ROWS = 100_000


def drawn(
    stream: str = "position", *, day: int = 738_000, seed: int = 0, columns: int = 1, first: int = 0
) -> np.ndarray:
    return Draws(torch.arange(first, first + NUM_ROWS), seed, day).uniform(stream, columns).numpy()


@pytest.mark.parametrize(("day", "seed", "first"), [(738_000, 0, 0), (738_001, 0, 0), (738_000, 1, 0), (1, -7, 10**12)])
def test_draws_are_uniform_over_consecutive_rows(day: int, seed: int, first: int) -> None:
    values = drawn(day=day, seed=seed, first=first, columns=3)
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    for column in values.T:
        ranks = np.arange(1, NUM_ROWS + 1) / NUM_ROWS
        # Kolmogorov-Smirnov against the uniform law: 1.95 / sqrt(n) is the bound of one in a thousand
        assert np.abs(np.sort(column) - ranks).max() < 1.95 / np.sqrt(NUM_ROWS)


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Draws that must have nothing to do with each other."""
    base, columns = drawn()[:, 0], drawn("gates", columns=16)
    return {
        "streams": (base, drawn("item_id")[:, 0]),
        "streams of one letter's difference": (drawn("f1")[:, 0], drawn("f2")[:, 0]),
        "columns": (columns[:, 0], columns[:, 1]),
        "distant columns": (columns[:, 0], columns[:, 15]),
        "days": (base, drawn(day=738_001)[:, 0]),
        "seeds": (base, drawn(seed=1)[:, 0]),
        "neighbouring rows": (base[:-1], base[1:]),
        "rows ten apart": (base[:-10], base[10:]),
    }


@pytest.mark.parametrize("what", pairs())
def test_streams_columns_days_seeds_and_rows_are_independent(what: str) -> None:
    a, b = pairs()[what]
    cells, _, _ = np.histogram2d(a, b, bins=10, range=[[0, 1], [0, 1]])
    expected = len(a) / 100
    # Pearson's chi-square of a 10 x 10 table, 99 degrees of freedom: 149 is the bound of one in a thousand
    assert ((cells - expected) ** 2 / expected).sum() < 149
    assert abs(np.corrcoef(a, b)[0, 1]) < 3.3 / np.sqrt(len(a))  # the same for a correlation


def test_a_row_draws_the_same_in_any_batch() -> None:
    row_B = torch.arange(1_000, dtype=torch.int64)
    shuffled = torch.randperm(1_000, generator=torch.Generator().manual_seed(0))
    everything = Draws(row_B, 3, 9).uniform("gates", 12)
    parts = [Draws(rows, 3, 9).uniform("gates", 12) for rows in shuffled.split([1, 0, 499, 500])]
    assert torch.equal(torch.cat(parts), everything[shuffled])  # the same bits


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    draws = Draws(torch.arange(100), 0, 1)
    first = draws.uniform("item_id")
    draws.uniform("gates", 8)
    assert torch.equal(draws.uniform("item_id"), first)  # no state: the order in which modules draw is free
    assert torch.equal(draws.uniform("gates", 8)[:, :3], draws.uniform("gates", 3))


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_keep_drops_the_named_share_of_rows(dropout: float) -> None:
    keep_B: Tensor = Draws(torch.arange(NUM_ROWS), 0, 2).keep("position", dropout)
    assert keep_B.dtype == torch.float32 and set(keep_B.tolist()) == {0.0, 1.0}
    # binomial law: four standard deviations
    assert 1 - keep_B.mean().item() == pytest.approx(dropout, abs=4 * (dropout * (1 - dropout) / NUM_ROWS) ** 0.5)


def test_keep_at_the_ends_keeps_all_and_none() -> None:
    draws = Draws(torch.arange(NUM_ROWS), 0, 2)
    assert draws.keep("position", 0.0).all() and not draws.keep("position", 1.0).any()  # draws lie in [0, 1)


def test_normal_draws_are_standard_normal() -> None:
    values = Draws(torch.arange(NUM_ROWS), 0, 738_000).normal("gate noise", 3).double()
    for column_B in values.T:
        ranks = torch.arange(1, NUM_ROWS + 1) / NUM_ROWS
        # Kolmogorov-Smirnov against the normal law (torch.special.ndtr); the bound as above
        assert (torch.special.ndtr(column_B.sort().values) - ranks).abs().max() < 1.95 / NUM_ROWS**0.5
    assert abs(np.corrcoef(values.T)[0, 1]) < 3.3 / np.sqrt(NUM_ROWS)


def test_no_uniform_draw_makes_an_infinite_normal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = torch.tensor([[0, 1, 2, 2**23 - 1, 2**23, 2**24 - 3, 2**24 - 2, 2**24 - 1]])
    monkeypatch.setattr(Draws, "uniform", lambda self, stream, columns: steps / 2**24)  # the ends and the middle
    values = Draws(torch.arange(1), 0, 1).normal("gate noise", 8)
    # float64, in which the middle of each step is exact; float32 alone would round the last one up to 1: infinity
    torch.testing.assert_close(values.double(), torch.special.ndtri((steps.double() + 0.5) / 2**24), rtol=1e-4, atol=0)
    assert torch.equal(values[0, [0, 3]], -values[0, [7, 4]])  # symmetric
