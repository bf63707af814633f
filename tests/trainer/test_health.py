"""Proof tests of trainer/health.py: plain loops over rows, workers that add up, experts and units that are gone.

Shape letters as in trainer/health.py.
"""

import math
from typing import Any

import pytest
import threads
import torch
from torch import Tensor

from embeddings.exchange import Exchange, LocalExchange
from trainer.bodies import BODIES, Body, MultiGateExperts, ProgressiveExtraction, Shared, SparseExperts
from trainer.draws import Draws
from trainer.health import GateHealth

INPUT, TASKS, ROWS = 12, 3, 60
HEADS = ["click", "buy", "like"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def shared_of(gates: dict[str, Tensor], units: dict[str, Tensor]) -> Shared:
    return Shared(torch.zeros(TASKS, len(next(iter(gates.values()))), 4), gates, units)


def report(*batches: Shared) -> dict[str, Any]:
    health = GateHealth()
    for shared in batches:
        health.add(shared)
    return told(
        health, LocalExchange(), min(gate_BGE.shape[1] for gate_BGE in shared.gates.values()) if shared.gates else 1
    )


def told(health: GateHealth, exchange: Exchange, num_heads: int = 2) -> dict[str, Any]:
    """A report with lists in place of names."""
    found = health.report(exchange, HEADS[:num_heads])
    for entry in found.values():
        entry["mean"] = [list(shares.values()) for shares in entry["mean"].values()]
        entry["entropy"] = list(entry["entropy"].values())
    return found


@pytest.mark.parametrize(
    ("num_heads", "num_gates", "names"),
    [(3, 3, ["click", "buy", "like"]), (3, 1, ["all"]), (3, 4, ["click", "buy", "like", "shared"]), (1, 1, ["click"])],
)
def test_gates_and_experts_are_told_by_name(num_heads: int, num_gates: int, names: list[str]) -> None:
    health = GateHealth()
    health.add(random_batch(num_gates=num_gates))
    entry = health.report(LocalExchange(), HEADS[:num_heads])["level 1"]
    assert list(entry["mean"]) == list(entry["entropy"]) == names
    assert all(list(shares) == [f"expert {e}" for e in (1, 2, 3, 4)] for shares in entry["mean"].values())


def run(body: Body, x_BI: Tensor, draws: Draws | None = None) -> Shared:
    shared: Shared = body(body.entry(x_BI), draws)
    return shared


def random_batch(num_rows: int = ROWS, num_gates: int = 2, num_experts: int = 4) -> Shared:
    gates = {f"level {n}": torch.randn(num_rows, num_gates, num_experts).softmax(-1) for n in (1, 2)}
    units = {f"level {n}": torch.randn(num_experts, num_rows, 5).relu() for n in (1, 2)}
    units["level 2"][1, :, 3] = units["level 2"][2, :, 0] = 0
    return shared_of(gates, units)


def test_every_number_is_that_of_a_plain_loop_over_rows() -> None:
    shared = random_batch()
    found = report(shared)
    assert list(found) == ["level 1", "level 2"]
    for level, entry in found.items():
        gate_BGE, unit_EBH = shared.gates[level].tolist(), shared.units[level].tolist()
        for g in range(2):
            entropy = 0.0
            for row in gate_BGE:
                entropy -= sum(share * math.log(share) for share in row[g])
            # rounded to four digits; float32 sums of 60 shares
            assert entry["entropy"][g] == pytest.approx(entropy / ROWS / math.log(4), abs=6e-5)
            for e in range(4):
                assert entry["mean"][g][e] == pytest.approx(sum(row[g][e] for row in gate_BGE) / ROWS, abs=6e-5)
        used = [sum(row[g][e] for row in gate_BGE for g in range(2)) / (2 * ROWS) for e in range(4)]
        assert entry["least"] == pytest.approx(min(used), abs=6e-5)
        dead = [all(row[h] == 0 for row in unit_EBH[e]) for e in range(4) for h in range(5)]
        assert entry["dead_units"] == round(sum(dead) / 20, 4) == {"level 1": 0.0, "level 2": 0.1}[level]


def test_the_batches_of_a_day_add_up() -> None:
    whole = random_batch()
    parts = [
        shared_of(
            {level: gate_BGE[a:b] for level, gate_BGE in whole.gates.items()},
            {level: unit_EBH[:, a:b] for level, unit_EBH in whole.units.items()},
        )
        for a, b in ((0, 1), (1, 1), (1, 40), (40, ROWS))  # one without rows
    ]
    assert report(*parts) == report(whole)  # to four digits


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_report_what_one_worker_would(num_workers: int) -> None:
    whole = random_batch()

    def work(exchange: Exchange) -> list[dict[str, Any]]:
        mine = torch.arange(ROWS)[exchange.rank :: num_workers]
        health = GateHealth()
        health.add(
            shared_of(
                {level: gate_BGE[mine] for level, gate_BGE in whole.gates.items()},
                {level: unit_EBH[:, mine] for level, unit_EBH in whole.units.items()},
            )
        )
        return [told(health, exchange), told(health, exchange)]

    for first, again in threads.run(num_workers, work):
        assert first == report(whole)  # oracle: all rows on one worker; on every worker the same
        assert again == first  # to report changes nothing


def test_a_new_day_starts_from_nothing() -> None:
    health, first, second = GateHealth(), random_batch(), random_batch(num_gates=1)
    health.add(first)
    health.reset()
    assert told(health, LocalExchange()) == {}
    health.add(second)
    assert told(health, LocalExchange(), 1) == report(second)


def test_equal_shares_have_entropy_1_and_a_single_choice_0() -> None:
    gate_BGE = torch.zeros(ROWS, 2, 4)
    gate_BGE[:, 0], gate_BGE[:, 1] = 0.25, torch.eye(4)[torch.arange(ROWS) % 4]
    [entry] = report(shared_of({"level 1": gate_BGE}, {})).values()
    # closed form: log(4) / log(4), and rows that each take one expert although the experts are equally used
    assert entry == {"mean": [[0.25] * 4] * 2, "entropy": [1.0, 0.0], "least": 0.25}


def test_a_gate_that_may_mix_some_experts_only_is_measured_against_these() -> None:
    body = ProgressiveExtraction(INPUT, TASKS, num_levels=2, own_experts=2, expert_layers=(6,))
    body.entry.weight.data[:, -(TASKS + 1) * 7 :] = 0  # all gates give equal shares
    torch.nn.init.zeros_(body.gates[0])
    found = report(run(body, torch.randn(ROWS, INPUT)))
    assert found["level 1"]["entropy"] == [1.0] * 4 and found["level 2"]["entropy"] == [1.0] * 3  # the definition
    assert found["level 2"]["mean"][0] == [0.3333, 0.3333, 0, 0, 0, 0, 0.3333]
    # an own expert has a third of one gate of three; the shared one a third of each
    assert found["level 2"]["least"] == pytest.approx(1 / 9, abs=6e-5)


def test_an_expert_that_collapsed_shows_in_the_least_share() -> None:
    body, x_BI = MultiGateExperts(INPUT, TASKS, num_experts=4, expert_layers=(6,)), torch.rand(ROWS, INPUT) + 0.1
    healthy = report(run(body, x_BI))["level 1"]
    gates = body.entry.weight.data[:, -TASKS * 4 :].unflatten(1, (TASKS, 4))
    gates[:, 0, 2] = -50.0  # one gate alone gives it up: it is still used
    assert 0.1 < report(run(body, x_BI))["level 1"]["least"] < healthy["least"]
    gates[:, :, 2] = -50.0
    collapsed = report(run(body, x_BI))["level 1"]
    assert healthy["least"] > 0.15 and collapsed["least"] == 0.0  # by construction; P11 of polarisation
    assert all(mean[2] == 0 for mean in collapsed["mean"])
    # closed form: no more than equal shares of the three that are left
    assert max(collapsed["entropy"]) <= round(math.log(3) / math.log(4), 4) < min(healthy["entropy"])


def test_a_unit_that_never_answers_is_dead_and_one_that_answers_once_is_not() -> None:
    body, x_BI = MultiGateExperts(INPUT, TASKS, num_experts=4, expert_layers=(5,)), torch.rand(ROWS, INPUT)
    body.entry.bias.data[:] = 100.0
    assert report(run(body, x_BI))["level 1"]["dead_units"] == 0.0
    body.entry.bias.data[:3] = -1_000.0  # a ReLU below 0 on every row
    assert report(run(body, x_BI))["level 1"]["dead_units"] == 3 / 20  # by construction
    once_BI = torch.zeros(1, INPUT)
    once_BI[0, 0] = 1.0
    body.entry.weight.data[0, 0] = 2_000.0
    x_BI[:, 0] = 0
    assert report(run(body, x_BI), run(body, once_BI))["level 1"]["dead_units"] == 2 / 20


def test_sparse_gates_report_what_their_experts_get() -> None:
    body, x_BI = SparseExperts(INPUT, TASKS, num_experts=4, top_k=1, expert_layers=(6,)), torch.randn(ROWS, INPUT)
    [entry] = report(run(body, x_BI)).values()
    assert entry == {"mean": [[1.0, 0.0, 0.0, 0.0]] * TASKS, "entropy": [0.0] * TASKS, "least": 0.0}  # ties: the first


@pytest.mark.parametrize("kind", ["shared_bottom", "separate", "soft_sharing"])
def test_a_body_without_gates_has_nothing_to_report(kind: str) -> None:
    body = BODIES[kind](INPUT, TASKS)
    assert report(run(body, torch.randn(ROWS, INPUT), Draws(torch.arange(ROWS), 0, 1))) == {}


@pytest.mark.parametrize("kind", ["mmoe", "omoe", "stacked_moe", "ple", "sparse_moe"])
def test_health_is_measured_in_bfloat16_too_and_holds_no_graph(kind: str) -> None:
    body, health = BODIES[kind](INPUT, TASKS), GateHealth()
    with torch.autocast("cpu", torch.bfloat16):
        health.add(run(body, torch.randn(ROWS, INPUT), Draws(torch.arange(ROWS), 0, 1)))
    for entry in told(health, LocalExchange(), TASKS).values():
        for mean in entry["mean"]:
            assert sum(mean) == pytest.approx(1, abs=6e-4)  # shares; each rounded to four digits
        assert all(0 <= entropy <= 1 for entropy in entry["entropy"])
    assert not any(sum.requires_grad for sum in health.sums.values())
