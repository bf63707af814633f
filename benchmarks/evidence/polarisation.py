"""(f) Gates that give nearly everything to a few experts, and gate dropout against it.

Two events of 32 inputs. Experts and gates read a hidden ReLU layer, as in the paper: on inputs around zero a gate that
is linear and has no bias cannot prefer an expert on average, on inputs that are never negative it can. Polarisation is
measured as the day's report has it (trainer/health.py), on rows that were not trained on.

Source: Zhao et al.: Recommending what video to watch next, RecSys 2019, section 5.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.evidence.fit import Rows, fit_side_by_side, losses_of
from benchmarks.evidence.part import Found, Part, Report, Row, Trial, judged, paired, sample, surely_above, table
from embeddings.exchange import LocalExchange
from trainer.bodies import Body, MultiGateExperts
from trainer.draws import Draws
from trainer.features import Inputs
from trainer.heads import Task, TaskGraph
from trainer.health import GateHealth
from trainer.model import MultiTaskModel, Outputs
from trainer.towers import Towers

DIM, HIDDEN, EXPERTS, UNUSED, SIDE_BY_SIDE = 32, 64, 8, 0.01, 10
RATES, DROPOUTS = (0.001, 0.01, 0.03), (0.0, 0.1)
GRAPH = TaskGraph({"one": Task(), "two": Task()})


class Events:
    """Two events whose logits are mixtures of the same 16 bent projections."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
        self.project_DW = torch.randn(DIM, 16, generator=self._generator) / DIM**0.5
        self.mix_WT = torch.randn(16, 2, generator=self._generator)

    def rows(self, num: int) -> Rows:
        x_BD = torch.randn(num, DIM, generator=self._generator)
        chance_BT = torch.sigmoid(torch.tanh(2 * x_BD @ self.project_DW) @ self.mix_WT - 1)
        return Rows(x_BD, torch.bernoulli(chance_BT, generator=self._generator))


class Deep(MultiTaskModel):
    """Our model behind a hidden layer."""

    def __init__(self, body: Body, towers: Towers):
        super().__init__(body, towers)
        self.hidden = nn.Linear(DIM, HIDDEN)

    def forward(self, inputs: Inputs, draws: Draws | None) -> Outputs:
        return super().forward(replace(inputs, x_BI=torch.relu(self.hidden(inputs.x_BI))), draws)


def trials(short: bool, seeds: int | None) -> list[Trial]:
    """Seeds go in tens, which train side by side; first: of the ten."""
    num, rates, steps = (10, (0.03,), 300) if short else (20, RATES, 1000)
    return [
        {"dropout": dropout, "rate": rate, "steps": steps, "first": first}
        for first in range(0, seeds or num, SIDE_BY_SIDE)
        for rate in rates
        for dropout in DROPOUTS
    ]


def measure(dropout: float, rate: float, steps: int, first: int) -> dict[str, list[Any]]:
    """For each of ten seeds: the mean log loss, and the mean share of each expert in each gate."""
    seeds = range(first, first + SIDE_BY_SIDE)
    models, data = [model(dropout, seed) for seed in seeds], [Events(seed) for seed in seeds]
    fit_side_by_side(models, GRAPH, ([each.rows(128) for each in data] for _ in range(steps)), rate=rate)
    fresh = [each.rows(10_000) for each in data]
    return {
        "loss": [log_loss(*pair) for pair in zip(models, fresh, strict=True)],
        "shares": [shares(*pair) for pair in zip(models, fresh, strict=True)],
    }


def model(dropout: float, seed: int) -> MultiTaskModel:
    torch.manual_seed(seed)
    body = MultiGateExperts(HIDDEN, 2, num_experts=EXPERTS, expert_layers=(16,), gate_dropout=dropout)
    return Deep(body, Towers(GRAPH.heads, body.output_dim, (16,)))


@torch.no_grad()
def log_loss(model: MultiTaskModel, rows: Rows) -> float:
    return float(losses_of(model, GRAPH, rows, None)[0].mean())


@torch.no_grad()
def shares(model: MultiTaskModel, rows: Rows) -> list[list[float]]:
    """The mean share of each expert [E] in each gate, as at serving."""
    health = GateHealth()
    health.add(model(Inputs(rows.x_BI, {}, ()), None).shared)
    mean = health.report(LocalExchange(), list(GRAPH.tasks))["level 1"]["mean"]
    return [list(of_gate.values()) for of_gate in mean.values()]


class Runs(NamedTuple):
    """By seed. unused: to how many experts the gates give next to nothing."""

    unused: dict[int, float]
    loss: dict[int, float]

    @property
    def polarised(self) -> int:
        """In how many runs most experts are not used."""
        return sum(unused > EXPERTS / 2 for unused in self.unused.values())

    def show(self) -> str:
        return f"{self.polarised} of {len(self.unused)}"


def runs(results: Found, dropout: float, rate: float) -> Runs:
    found = Runs({}, {})
    for result in results:
        if (result["dropout"], result["rate"]) == (dropout, rate):
            for place, (share_GE, loss) in enumerate(zip(result["shares"], result["loss"], strict=True)):
                found.unused[result["first"] + place] = float((np.mean(share_GE, axis=0) < UNUSED).sum())
                found.loss[result["first"] + place] = loss
    return found


def report(results: Found) -> Report:
    by_rate = {rate: [runs(results, dropout, rate) for dropout in DROPOUTS] for rate in RATES}
    both = {rate: pair for rate, pair in by_rate.items() if all(found.unused for found in pair)}
    happened = [pair for pair in both.values() if pair[0].polarised]
    saved = {rate: paired(without.unused, with_it.unused) for rate, (without, with_it) in both.items()}
    source = "Zhao et al. 2019, section 5.2"
    rows = [
        Row(
            "gates polarise in some trainings (one in five)",
            source,
            "most experts unused in " + _at({rate: without.show() for rate, (without, _) in both.items()}),
            judged(*(without.polarised > 0 for without, _ in both.values())),
        ),
        Row(
            "a gate dropout of 0.1 removes it",
            source,
            "with it in " + _at({rate: with_it.show() for rate, (_, with_it) in both.items()}),
            _removed(happened),
        ),
        Row(
            "gate dropout keeps more experts in use",
            "implied",
            "unused experts, without - with: " + _at({rate: found.against_zero(2) for rate, found in saved.items()}),
            judged(*(surely_above(found) for found in saved.values())),
        ),
    ]
    return Report(rows, TEXT + "\n\n" + _counts(both))


def _removed(happened: Sequence[Sequence[Runs]]) -> str:
    """Verdict, from the pairs without and with, where it happened without."""
    if not happened:
        return "open: it did not happen"
    if all(with_it.polarised == 0 for _, with_it in happened):
        return "reproduced"
    fewer = any(with_it.polarised < without.polarised for without, with_it in happened)
    return "partly: rarer, not removed" if fewer else "not reproduced"


def _at(shown: Mapping[float, str]) -> str:
    return ", ".join(f"{text} at rate {rate:g}" for rate, text in shown.items())


TEXT = f"""MMoE with {EXPERTS} experts of 16 behind a hidden ReLU layer of {HIDDEN}, two events, Adam, batches of 128
fresh rows; ± over seeds. An expert is unused when the gates give it, on average over 10,000 other rows, less than
{UNUSED:g} (an equal share is {1 / EXPERTS:g}); a run is polarised when that holds for most of the experts. What the
paper saw came from training at its scale; here it is the learning rate that brings it about.

The setting was searched for, on few seeds, before it was run. On part (a)'s first data, without the hidden layer, no
expert went unused at any rate from 0.001 to 0.1, since a gate without bias has no favourite on inputs around zero; with
the layer there, most runs had unused experts at every rate, gate dropout or not."""


def _counts(both: Mapping[float, Sequence[Runs]]) -> str:
    lines = []
    for rate, pair in both.items():
        for dropout, found in zip(DROPOUTS, pair, strict=True):
            unused, loss = sample(found.unused), sample(found.loss)
            lines.append([f"{rate:g}", f"{dropout:g}", found.show(), unused.show(2), loss.show()])
    return table(["rate", "gate dropout", "polarised runs", f"unused of {EXPERTS} experts", "log loss"], lines)


PART = Part("Gate polarisation and gate dropout (YouTube's MMoE)", trials, measure, report)
