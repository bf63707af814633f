"""How a body's gates and experts are: what each gate gives to each expert, and units that never answer.

Experts that a warm-started mixture stops using never come back by themselves, and no metric of ranking tells why. So
every day's report has, by level: the mean share of each expert in each gate, the gates' entropy over that of equal
shares of all that the gate may mix, the least share that any expert has over all gates (polarisation: 0 where an expert
is used by nobody), and the share of the experts' units that were 0 on every row.

Shape letters: B rows, G gates, E experts, H their width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embeddings.exchange import Exchange
from trainer.bodies import Shared

_ROWS = "rows"


class GateHealth:
    """Sums over the rows of a day; they add up over workers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}  # they add up over workers
        self.choices: dict[str, Sequence[int]] = {}  # of each level: of how many experts each gate mixes

    def load(self, sums: Mapping[str, Tensor], choices: Mapping[str, Sequence[int]]) -> None:
        """Go on from what was counted of the day before it was interrupted."""
        self.sums, self.choices = dict(sums), dict(choices)

    @torch.no_grad()
    def add(self, shared: Shared) -> None:
        """Count a batch's rows."""
        self._add(_ROWS, torch.tensor(shared.h_TBH.shape[1]))
        self.choices.update(shared.choices)
        for name, gate_BGE in shared.gates.items():
            entropy_G = torch.special.entr(gate_BGE).sum(-1).sum(0)
            self._add(f"{name}/gates", torch.cat([gate_BGE.sum(0), entropy_G.unsqueeze(1)], dim=1))
        for name, units_EBH in shared.units.items():
            self._add(f"{name}/units", units_EBH.abs().sum(1))  # 0 where a unit never answered

    def _add(self, name: str, sum: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + sum.double()

    def report(self, exchange: Exchange, heads: Sequence[str]) -> dict[str, Any]:
        """By level: mean by gate and expert, entropy by gate (1: equal shares), least, dead_units. heads: the names of
        those for whom gates mix. Collective.
        """
        sums = {name: exchange.all_reduce(sum.cpu().clone()) for name, sum in sorted(self.sums.items())}
        rows = float(sums.pop(_ROWS, 0))
        found: dict[str, Any] = {}
        for name, sum in sums.items():
            level, _, what = name.partition("/")
            entry = found.setdefault(level, {})
            if what == "units":
                entry["dead_units"] = round((sum == 0).double().mean().item(), 4)
                continue
            mean_GE, entropy_G = sum[:, :-1] / max(rows, 1), sum[:, -1] / max(rows, 1)
            choices = self.choices.get(level, [mean_GE.shape[1]] * mean_GE.shape[0])
            most_G = torch.tensor(choices).clamp(min=2).double().log()
            names = _gates(heads, len(mean_GE))
            entry["mean"] = {
                name: {f"expert {e}": round(share, 4) for e, share in enumerate(shares, start=1)}
                for name, shares in zip(names, mean_GE.tolist(), strict=True)
            }
            entropies = (round(value, 4) for value in (entropy_G / most_G).tolist())
            entry["entropy"] = dict(zip(names, entropies, strict=True))
            entry["least"] = round(mean_GE.mean(0).min().item(), 4)
        return found


def _gates(heads: Sequence[str], number: int) -> list[str]:
    """What a level's gates mix for: all heads, each of them, or each and what they share."""
    if number == 1 != len(heads):
        return ["all"]
    assert number - len(heads) in (0, 1), f"{number} gates for {len(heads)} heads"
    return [*heads, "shared"][:number]
