"""The search. Oracles: the known least value of Branin's function; a search that nobody disturbed."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tune.search import SAMPLERS, Search, Trial
from tune.space import Range, Simplex

PLANE = {"x": Range(-5, 10), "y": Range(0, 15)}
BRANIN_LEAST = 0.397887


def branin(x: float, y: float) -> float:
    """Dixon and Szego, Towards Global Optimisation 2 (1978)."""
    bent = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return bent**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


def go_on(search: Search, num_trials: int) -> None:
    while len(search.trials) < num_trials:
        trial = search.ask()
        search.tell(trial.number, -branin(**trial.values))


@pytest.mark.parametrize("seed", range(3))
def test_the_least_value_of_branin_is_found_to_five_percent_in_fifty_trials(seed: int) -> None:
    search = Search("branin", PLANE, seed=seed)
    go_on(search, 50)
    assert BRANIN_LEAST - 1e-6 <= -search.best.result <= 1.05 * BRANIN_LEAST
    assert [trial.number for trial in search.trials] == list(range(50))
    assert search.best.result == max(trial.result for trial in search.trials)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_that_is_opened_again_goes_on_as_if_it_had_never_been_closed(sampler: str, tmp_path: Path) -> None:
    """Closed when a point was asked for and not told; told values and what is tried next are the same to the bit."""
    undisturbed = Search("branin", PLANE, sampler=sampler, seed=3)
    go_on(undisturbed, 16)
    storage = f"sqlite:///{tmp_path}/search.db"
    for num_trials in (2, 12, 16):
        search = Search("branin", PLANE, sampler=sampler, seed=3, storage=storage)
        go_on(search, num_trials)
        if num_trials < 16:
            search.ask()
    assert search.trials == undisturbed.trials


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_is_all_that_chance_is(sampler: str) -> None:
    same, again, other = (Search("branin", PLANE, sampler=sampler, seed=seed) for seed in (1, 1, 2))
    for search in (same, again, other):
        go_on(search, 12)
    assert same.trials == again.trials
    assert not {trial.result for trial in same.trials} & {trial.result for trial in other.trials}


KILLED = """
import sys
sys.path[:0] = sys.argv[2:]
from tests.tune.test_search import PLANE, Search, branin, go_on
search = Search("branin", PLANE, seed=5, storage=sys.argv[1])
print("open", flush=True)
go_on(search, 30)
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_search_that_is_killed_at_any_moment_loses_and_repeats_nothing(tmp_path: Path) -> None:
    root, storage = Path(__file__).parents[2], f"sqlite:///{tmp_path}/search.db"
    undisturbed = Search("branin", PLANE, seed=5)
    go_on(undisturbed, 30)
    moments, kills, finished = random.Random(0), 0, False
    while not finished:
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, storage, str(root), str(root / "tests")], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None and child.stdout.readline() == "open\n"
        time.sleep(moments.uniform(0.1, 0.6))
        finished = kills == 6 or child.poll() is not None
        if not finished:
            child.send_signal(signal.SIGKILL)
            kills += 1
        finished &= child.communicate()[0].endswith("done\n")
    assert kills >= 3, "it was over before it could be killed"
    assert Search("branin", PLANE, seed=5, storage=storage).trials == undisturbed.trials


def test_a_result_that_is_no_number_is_refused_and_may_be_told_again() -> None:
    search = Search("weights", {"w": Simplex(["a", "b"])})
    trial = search.ask()
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="trial 0 gave"):
            search.tell(trial.number, wrong)
    search.tell(trial.number, 0.5)
    assert search.trials == [Trial(0, trial.values, 0.5)] and json.dumps(search.best.values)
    with pytest.raises(ValueError):
        search.tell(trial.number, 0.6)


def test_a_search_without_a_told_trial_has_no_best() -> None:
    search = Search("branin", PLANE)
    search.ask()
    with pytest.raises(ValueError):
        search.best  # noqa: B018
