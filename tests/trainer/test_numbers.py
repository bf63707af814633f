"""Proof tests of trainer/numbers.py: numpy over all rows at once is the oracle, whatever the batches."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from trainer.numbers import NumberStats


def logged(num_rows: int, seed: int = 0) -> torch.Tensor:
    """Four columns: ordinary, shifted and wide, constant, never there. One value in five of the first two is null."""
    rng = np.random.default_rng(seed)
    columns = np.stack([rng.normal(size=num_rows), rng.lognormal(6, 2, num_rows), np.full(num_rows, 3.7)], axis=1)
    columns[:, :2][rng.random((num_rows, 2)) < 0.2] = np.nan
    return torch.from_numpy(np.column_stack([columns, np.full(num_rows, np.nan)]).astype(np.float32))


def measured(batches: Sequence[torch.Tensor]) -> NumberStats:
    stats = NumberStats(batches[0].shape[1])
    for batch in batches:
        stats.update(stats.measure(batch))
    return stats


def assert_equals_numpy(stats: NumberStats, numbers: torch.Tensor) -> None:
    values = numbers[:, :3].double().numpy()
    # numpy over all rows in float64; sums in another order
    np.testing.assert_array_equal(stats.count_K[:3].numpy(), (~np.isnan(values)).sum(0))
    np.testing.assert_allclose(stats.mean_K[:3].numpy(), np.nanmean(values, 0), rtol=1e-10)
    np.testing.assert_allclose((stats.m2_K / stats.count_K)[:3].numpy(), np.nanvar(values, 0), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "sizes", [[5_000], [1, 4_999], [1] * 20 + [0, 30, 4_950], [2_500, 2_500], [0, 4_000, 999, 0, 1]]
)
def test_any_sequence_of_batches_gives_the_mean_and_variance_of_all_rows(sizes: list[int]) -> None:
    numbers_BK = logged(5_000)
    assert_equals_numpy(measured(numbers_BK.split(sizes)), numbers_BK)


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_sums_of_workers_add_up_to_those_of_the_global_batch(num_workers: int) -> None:
    numbers_BK = logged(3_000, seed=1)
    stats = NumberStats(4)
    for batch in numbers_BK.split(1_000):
        cuts = np.sort(np.random.default_rng(num_workers).integers(0, 1_000, num_workers - 2))
        shares = torch.tensor_split(batch, [0, *cuts.tolist()])  # the first worker has no row
        assert len(shares) == num_workers
        stats.update(torch.stack([stats.measure(share) for share in shares]).sum(0))
    assert_equals_numpy(stats, numbers_BK)


def test_later_days_far_from_the_first_keep_the_variance_exact() -> None:
    rng = np.random.default_rng(2)
    days = [
        torch.from_numpy(rng.normal(mean, 1, (1_000, 1)).astype(np.float32)) for mean in (0, 100, 2_000, 2_000, -500)
    ]
    values = torch.cat(days).double().numpy()
    stats = measured([batch for day in days for batch in day.split(100)])
    # numpy; the merge subtracts squares of batch means no larger than the variance of all days
    np.testing.assert_allclose((stats.m2_K / stats.count_K).numpy(), values.var(0), rtol=1e-10)


def test_a_large_offset_costs_the_variance_no_more_than_float64_must_lose() -> None:
    offset = 1e5
    numbers_BK = torch.from_numpy(np.random.default_rng(3).normal(offset, 1, (2_000, 1)).astype(np.float32))
    stats = measured(numbers_BK.split(500))
    # the first batch is summed around 0: squares of 1e10 in float64 cost a variance of 1 2.2e-6; here ten times that
    np.testing.assert_allclose((stats.m2_K / stats.count_K).numpy(), numbers_BK.double().numpy().var(0), rtol=2.2e-5)


def test_standardised_numbers_have_mean_zero_and_variance_one() -> None:
    numbers_BK = logged(5_000, seed=4)
    x_BI = measured(numbers_BK.split(700)).standardise(numbers_BK)
    assert x_BI.shape == (5_000, 8) and x_BI.dtype == torch.float32
    for k in (0, 1):
        values_N = x_BI[~numbers_BK[:, k].isnan(), k].double()
        # definition; values rounded to float32
        assert values_N.mean().item() == pytest.approx(0, abs=1e-6)
        assert values_N.var(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_nulls_become_zero_with_a_flag_and_a_constant_column_becomes_zero() -> None:
    numbers_BK = logged(1_000, seed=5)
    x_BI = measured([numbers_BK]).standardise(numbers_BK)
    null_BK = numbers_BK.isnan()
    assert torch.equal(x_BI[:, 4:], null_BK.float())  # by definition
    assert (x_BI[:, :4][null_BK] == 0).all()
    assert x_BI[:, 2].abs().max() < 1e-6  # 3.7 minus the mean of 3.7s, divided by 1 and not by rounding noise
    assert (x_BI[:, 3] == 0).all()


def test_a_constant_that_moves_after_many_days_is_only_shifted() -> None:
    stats = measured([torch.full((1_000, 1), 0.1)] * 5)
    # no spread was seen yet: the deviation is taken as 1, not as rounding noise
    assert stats.standardise(torch.tensor([[0.6]]))[0, 0].item() == pytest.approx(0.5, rel=1e-6)


def test_before_the_first_row_numbers_pass_unchanged() -> None:
    x_BI = NumberStats(2).standardise(torch.tensor([[1.5, torch.nan]]))
    assert x_BI.tolist() == [[1.5, 0.0, 0.0, 1.0]]  # mean 0 and deviation 1 by definition


def test_without_numeric_features_every_call_returns_nothing() -> None:
    stats, nothing_BK = NumberStats(0), torch.empty(7, 0)
    stats.update(stats.measure(nothing_BK))
    assert stats.standardise(nothing_BK).shape == (7, 0)


def test_loaded_statistics_go_on_as_if_never_saved() -> None:
    first, second = logged(2_000, seed=6).split(1_000)
    continuous, saved, loaded = measured([first, second]), measured([first]), NumberStats(4)
    loaded.load({name: value.clone() for name, value in saved.state().items()})
    loaded.update(loaded.measure(second))
    for name, value in continuous.state().items():
        assert torch.equal(loaded.state()[name], value)  # the same operations, so the same bits
