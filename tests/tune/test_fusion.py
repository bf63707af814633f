"""The search over powers of predictions. Oracle: simulated logs whose true value is a known product of powers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from trainer.metrics import xauc
from tune.fusion import search_powers
from tune.search import Search
from tune.space import Simplex

ADDRESSES = ["click@all", "like@all", "buy@all", "watch@all"]
SEEDS, TRIALS, ITEMS = range(20), 60, 20


@dataclass
class World:
    """Requests of twenty items: predictions that have a common part, true values, and what users made of them."""

    logs: dict[str, Tensor]
    truth: np.ndarray
    quality: Callable[[Tensor], float]


def simulate(seed: int) -> World:
    """Log value = powers (uniform on the simplex) of log predictions; users' answers are noisy; quality is XAUC.

    Few rows or much noise would leave powers in doubt that no search can remove: the best ones on 20,000 rows with a
    noise of 0.3 have a tau of .988 to .994.
    """
    draw = np.random.default_rng(seed)
    rows, groups = 20_000, np.repeat(np.arange(1000), ITEMS)
    log_RK = 0.8 * draw.normal(size=(rows, 1)) + draw.normal(size=(rows, 4)) * [1.0, 0.7, 1.3, 0.9] - 2
    log_value_R = log_RK @ draw.dirichlet(np.ones(4))
    answer_R = np.exp(log_value_R + 0.1 * draw.normal(size=rows))
    logs = {address: torch.from_numpy(log_R) for address, log_R in zip(ADDRESSES, log_RK.T, strict=True)}
    return World(logs, log_value_R, lambda score_R: xauc(score_R.numpy(), answer_R, groups))


def found(world: World, sampler: str, seed: int) -> tuple[float, float]:
    """The quality of the best powers, and Kendall's tau of their order with the true one."""
    search = Search("powers", {"powers": Simplex(ADDRESSES)}, sampler=sampler, seed=seed)
    powers = search_powers(search, world.logs, world.quality, TRIALS)
    assert len(search.trials) == TRIALS
    score_R = sum(power * world.logs[address].numpy() for address, power in powers.items())
    return search.best.result, float(stats.kendalltau(score_R, world.truth).statistic)


@pytest.mark.slow
def test_the_true_order_is_recovered_in_sixty_trials_and_random_search_is_beaten() -> None:
    """Twenty worlds: tau above .99 in each; quality and tau paired with random search, p < .01."""
    worlds = [simulate(seed) for seed in SEEDS]
    bayesian = np.array([found(world, "gp", seed) for seed, world in zip(SEEDS, worlds, strict=True)])
    by_chance = np.array([found(world, "random", seed) for seed, world in zip(SEEDS, worlds, strict=True)])
    print(f"tau: {bayesian[:, 1].min():.4f} at least, by chance {by_chance[:, 1].max():.4f} at most")
    assert bayesian[:, 1].min() > 0.99
    for better, worse in zip(bayesian.T, by_chance.T, strict=True):
        assert stats.wilcoxon(better, worse, alternative="greater").pvalue < 0.01


def test_a_search_over_powers_that_has_its_trials_is_not_gone_on_with(tmp_path_factory: pytest.TempPathFactory) -> None:
    world, storage = simulate(0), f"sqlite:///{tmp_path_factory.mktemp('search')}/search.db"
    first = Search("powers", {"powers": Simplex(ADDRESSES)}, storage=storage)
    powers = search_powers(first, world.logs, world.quality, 3)
    again = Search("powers", {"powers": Simplex(ADDRESSES)}, storage=storage)
    assert search_powers(again, world.logs, pytest.fail, 3) == powers
    assert again.trials == first.trials
