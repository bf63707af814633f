"""What every kernel, exchange and store must do: any sequence of events leaves what plain dicts in float64 hold.

Events: pull and push, days that end, evictions, full tables, growth, bases, deltas, loads on another number of workers.
With --long twenty times as many examples.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from contracts.examples import Example, Workers, examples
from contracts.play import Chain, Play, Seen, alone, check, on_threads, play_segment
from hypothesis import HealthCheck, Phase, given, seed, settings

from embeddings.exchange import Exchange
from embeddings.kernels import FbgemmRows, TorchRows
from embeddings.pool import MakeKernel

ALONE: Workers = ((1,), (1,), (1,))
slow = pytest.mark.slow
gpu = pytest.mark.gpu
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="FBGEMM's CUDA kernel needs a CUDA device")


def for_all(hold: Callable[[Example], Any], number: int, salt: int, **drawn: Any) -> None:
    """The same examples in every run; salt: others in every test."""

    @seed(salt)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(examples(**drawn))
    def holds(example: Example) -> None:
        hold(example)

    holds()


@pytest.mark.parametrize(
    ("play", "number"),
    [
        pytest.param(on_threads(TorchRows), 60, id="torch-few"),
        pytest.param(on_threads(TorchRows), 340, id="torch", marks=slow),
        pytest.param(on_threads(FbgemmRows), 160, id="fbgemm_cpu", marks=slow),
        pytest.param(on_threads(FbgemmRows, "cuda"), 200, id="fbgemm_cuda", marks=[slow, gpu, no_cuda]),
    ],
)
def test_any_number_of_workers_leave_what_plain_dicts_hold(play: Play, number: int, times: int) -> None:
    for_all(lambda example: check(example, play), number * times, salt=number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("play", "number"),
    [
        pytest.param(alone(TorchRows), 800, id="torch"),
        pytest.param(alone(FbgemmRows), 600, id="fbgemm_cpu"),
        pytest.param(alone(FbgemmRows, "cuda"), 400, id="fbgemm_cuda", marks=[gpu, no_cuda]),
    ],
)
def test_a_worker_without_others_leaves_what_plain_dicts_hold(play: Play, number: int, times: int) -> None:
    for_all(lambda example: check(example, play), number * times, salt=number, workers=ALONE, max_events=10)


def play_all(exchange: Exchange, kernel: MakeKernel, tasks: list[Any]) -> list[Seen]:
    return [play_segment(exchange, kernel, "cpu", *task) for task in tasks]


@pytest.mark.slow
def test_gloo_processes_leave_what_plain_dicts_hold(times: int, tmp_path: Path) -> None:
    chains: list[Chain] = []
    for_all(lambda e: chains.append(Chain(e, str(tmp_path / str(len(chains))))), 40 * times, 5, workers=((2,), (3,)))
    for workers in (2, 3):  # all first segments on two workers, then all second ones on three
        seen = many.run(workers, play_all, FbgemmRows, [chain.begin() for chain in chains])
        chains = [chain for chain, of in zip(chains, zip(*seen, strict=True), strict=True) if chain.end(of)]
