"""Parts (g) and (h) of the evidence in their short form: what is claimed loudest shows with one seed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evidence import ablations, balancers
from benchmarks.evidence.balancers import behind, front, hypervolume
from benchmarks.evidence.part import Found, Part, by_seed, found, measured


def short(part: Part, folder: Path) -> Found:
    torch.set_num_threads(1)
    trials = part.trials(True, None)
    for trial in trials:
        measured(part, folder, trial)
    return found(folder, trials)


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return short(ablations.PART, tmp_path_factory.mktemp("g"))


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return short(balancers.PART, tmp_path_factory.mktemp("h"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "better", "worse", "least"), [("DeepMCP", "correlation", "plain", 0.01), ("DUPN", "DUPN", "mean", 0.05)]
)
def test_a_technique_beats_its_ablation_where_its_assumption_holds(
    ablated: Found, what: str, better: str, worse: str, least: float
) -> None:
    gain = by_seed(ablated, "auc", what=what, method=better)[0] - by_seed(ablated, "auc", what=what, method=worse)[0]
    assert gain > least, "oracle: the simulated log; least: about a quarter of what more rows and seeds showed"


@pytest.mark.slow
def test_a_short_report_says_that_one_seed_proves_nothing(ablated: Found, balanced: Found) -> None:
    for part, results in ((ablations.PART, ablated), (balancers.PART, balanced)):
        rows = part.report(results).rows
        assert rows and all(row.verdict.startswith("open") for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradnorm", "famo"])
def test_a_balancer_beats_equal_weights_where_one_loss_is_a_hundred_times_the_other(
    balanced: Found, method: str
) -> None:
    def mean(name: str) -> float:
        return sum(by_seed(balanced, task, method=name, setting=0.0)[0] for task in ("one", "two")) / 2

    assert mean(method) < mean("fixed") - 0.05  # a third of what longer runs showed


def test_the_hypervolume_of_three_steps_is_the_sum_of_their_boxes() -> None:
    gains = np.array([(3, 1), (2, 2), (1, 3), (1, 1)]) / 4  # by hand: 6 unit squares of 16, the last point adds none
    assert hypervolume(1 - gains) == pytest.approx(6 / 16)
    assert hypervolume(np.array([(2.0, 0.1)])) == 0  # worse than a constant


def test_a_point_is_as_far_behind_the_front_as_both_tasks_could_be_better() -> None:
    of_front = front(np.array([(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]))  # the straight line between the first two
    tolerance = 0.02  # the line is drawn in steps of 1/49
    assert behind(np.array([0.5, 0.5]), of_front) == pytest.approx(0, abs=tolerance)
    assert behind(np.array([1.0, 1.0]), of_front) == pytest.approx(0.5, abs=tolerance)
    assert behind(np.array([0.3, 0.3]), of_front) == pytest.approx(-0.2, abs=tolerance)
