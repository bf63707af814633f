"""(e) Position bias: what a shallow tower on the position learns from clicks on ranked lists, and what is served then.

Lists of ten whose clicks are known chances of an item's utility and of the place (by device) at which it is shown; a
ranker has put them in order, but for a share of the lists that are shuffled. The tower's curve is compared with the
true one, the order of what is served (position missing) with the order of the utilities.

Sources: Zhao et al.: Recommending what video to watch next, RecSys 2019, section 4.3; Guo et al.: PAL, RecSys 2019, eq.
2. Shape letters: N lists, S = 10 places, B = N * S rows, I input width, P places by devices.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from benchmarks.evidence.fit import Rows, batches, fit, logits
from benchmarks.evidence.ids import IdRows, Tables
from benchmarks.evidence.part import Found, Part, Report, Row, Sample, Trial, by_seed, paired, sample, table
from benchmarks.evidence.verdicts import above, below, judged
from trainer.bodies import SharedBottom
from trainer.draws import Draws
from trainer.features import Inputs
from trainer.heads import Task, TaskGraph
from trainer.model import MultiTaskModel, Outputs, PositionTower
from trainer.towers import Towers

PLACES, DEVICES, WIDTH = 10, 2, 8


class Method(NamedTuple):
    """form: what is made of the position. dropout: share of training rows on which it is missing."""

    form: str
    dropout: float = 0.0


METHODS = {
    "no position": Method("none"),
    "plain feature": Method("feature", 0.1),
    "tower": Method("tower", 0.1),
    "tower, never missing": Method("tower"),
    "PAL": Method("product"),
}
ADDED = ("no position", "plain feature", "tower", "tower, never missing")
LAWS = {  # the methods for each
    "added": ADDED,
    "added, ranker errs": ADDED,
    "added, ranker knows more": ADDED,
    "examined": ("no position", "tower", "PAL"),
}
RANDOM = (0.0, 0.1)


class Net(MultiTaskModel):
    """Our model on one task, behind tables if x_BI holds ids. The position: a tower's, a plain feature's, or unused."""

    def __init__(self, form: str, dims: tuple[int, ...], width: int, layers: tuple[int, ...], tables: Tables | None):
        body = SharedBottom(width + (sum(dims) if form == "feature" else 0), 1, layers=layers)
        position = PositionTower(dims, (16,), 1) if form in ("tower", "product") else None
        towers = Towers(TaskGraph({"click": Task()}).heads, body.output_dim, ())
        super().__init__(body, towers, position=position, adds_to=[[0]] if form == "tower" else None)
        self.form, self.tables = form, tables

    @property
    def graph(self) -> TaskGraph:
        return TaskGraph({"click": Task()}, shown=["click"] if self.form == "product" else [])

    def forward(self, inputs: Inputs, draws: Draws | None) -> Outputs:
        x_BI = inputs.x_BI
        if self.tables is not None:
            names = ("document", "query")
            x_BI = self.tables(IdRows(x_BI, dict(zip(names, x_BI.long().unbind(1), strict=True)), {})).x_BI
        if self.form == "feature":
            x_BI = torch.cat([x_BI, *(vector_BD for vector_BD, _ in inputs.selection)], dim=1)
        return super().forward(replace(inputs, x_BI=x_BI), draws)

    def train_on(self, rows: Rows, dropout: float, seed: int, rate: float = 0.01) -> None:
        """800 steps, the last quarter at a tenth of the rate."""
        generator = torch.Generator().manual_seed(seed)
        for steps, share in ((600, 1.0), (200, 0.1)):
            stream = _at_times_missing(batches(rows, 2048, steps, seed + steps), dropout, generator)
            fit(self, self.graph, stream, rate=share * rate, seed=seed)

    @torch.no_grad()
    def curve(self, selection: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What a tower gives to selection features, as log-odds or, as a factor's, as log-probabilities: [P]."""
        if self.position is None:
            return torch.full(selection[0][1].shape, math.nan)
        curve_P: Tensor = self.position(selection)[:, 0]
        return logsigmoid(curve_P) if self.form == "product" else curve_P


def _at_times_missing(stream: Iterable[Rows], dropout: float, generator: torch.Generator) -> Iterator[Rows]:
    for rows in stream:
        there_B2 = (torch.rand(len(rows), len(rows.selection), generator=generator) >= dropout).float()
        pairs = zip(rows.selection, there_B2.unbind(1), strict=True)
        yield replace(
            rows, selection=[(vector_BD * there_B.unsqueeze(1), there_B) for (vector_BD, _), there_B in pairs]
        )


def served(rows: Rows) -> Rows:
    """The position is missing."""
    missing = [(torch.zeros_like(vector_BD), torch.zeros_like(there_B)) for vector_BD, there_B in rows.selection]
    return replace(rows, selection=missing)


def features(*code_and_size: tuple[Tensor, int]) -> list[tuple[Tensor, Tensor]]:
    """Codes from 0 as selection features."""
    return [(one_hot(code_B, size).float(), torch.ones(len(code_B))) for code_B, size in code_and_size]


class Lists(NamedTuple):
    rows: Rows
    utility_NS: Tensor


def bias(place_B: Tensor, device_B: Tensor) -> Tensor:
    """The true curve, steeper on the second device."""
    return -(0.7 + 0.4 * device_B) * torch.log1p(place_B.float())


def simulate(law: str, random: float, num: int, seed: int) -> Lists:
    """The ranker goes by what moves clicks; or as much by what does not; or also by what the net does not see."""
    generator = torch.Generator().manual_seed(seed)
    x_NSI = torch.randn(num, PLACES, WIDTH, generator=generator)
    utility_NS = 0.8 * x_NSI[..., 0] + 0.5 * x_NSI[..., 1] + 0.5 * torch.sin(2 * x_NSI[..., 2])
    unseen_NS = torch.randn(num, PLACES, generator=generator) if law == "added, ranker knows more" else 0.0
    appeal_NS = utility_NS + unseen_NS
    shuffled_N1 = torch.rand(num, 1, generator=generator) < random
    ranker_NS = appeal_NS + (x_NSI[..., 3] if law == "added, ranker errs" else 0.0)
    by_NS = torch.where(shuffled_N1, torch.rand(num, PLACES, generator=generator), ranker_NS)
    place_NS = by_NS.argsort(dim=1, descending=True).argsort(dim=1)
    device_NS = torch.randint(DEVICES, (num, 1), generator=generator).expand(-1, PLACES)
    bias_NS = bias(place_NS, device_NS)
    if law == "examined":
        chance_NS = bias_NS.exp() * torch.sigmoid(appeal_NS)
    else:
        chance_NS = torch.sigmoid(appeal_NS - 0.5 + bias_NS)
    click_B1 = (torch.rand(num, PLACES, generator=generator) < chance_NS).float().view(-1, 1)
    selection = features((place_NS.flatten(), PLACES), (device_NS.flatten(), DEVICES))
    return Lists(Rows(x_NSI.flatten(0, 1), click_B1, selection), utility_NS)


def trials(short: bool, seeds: int | None) -> list[Trial]:
    cases = [(law, random, method) for law, methods in LAWS.items() for random in RANDOM for method in methods]
    if short:
        cases = [("added", 0.1, "tower"), ("added", 0.1, "tower, never missing"), ("examined", 0.1, "PAL")]
    return [
        {"law": law, "random": random, "method": method, "lists": 8_000 if short else 16_000, "seed": seed}
        for seed in range(seeds or (1 if short else 6))
        for law, random, method in cases
    ]


def _fits(law: str, method: str) -> bool:
    """Whether the method has a curve in the law's unit."""
    return METHODS[method].form == ("product" if law == "examined" else "tower")


def measure(law: str, random: float, method: str, lists: int, seed: int) -> dict[str, float]:
    """slope, r: of the learnt curve on the true one, over places and devices; NaN unless the form is the law's.
    inflation: the slope of the served log-odds on the utility. order: pairs of a list that are served in the order of
    their utilities, of 10,000 fresh lists; top: the mean utility of the first that is served.
    """
    form, dropout = METHODS[method]
    old, fresh = simulate(law, random, lists, 2 * seed), simulate(law, 1.0, 10_000, 2 * seed + 1)
    torch.manual_seed(seed)
    net = Net(form, (PLACES, DEVICES), WIDTH, (32, 16), None)
    net.train_on(old.rows, dropout, seed)
    place_P, device_P = (
        each_P.flatten() for each_P in torch.meshgrid(torch.arange(PLACES), torch.arange(DEVICES), indexing="ij")
    )
    found_P = net.curve(features((place_P, PLACES), (device_P, DEVICES)))
    slope, r = slope_of(found_P, bias(place_P, device_P)) if _fits(law, method) else (math.nan, math.nan)
    score_NS = logits(net, served(fresh.rows)).view(-1, PLACES)
    first_N1 = score_NS.argmax(1, keepdim=True)
    return {
        "slope": slope,
        "r": r,
        "inflation": slope_of(score_NS.flatten(), fresh.utility_NS.flatten())[0],
        "order": _in_order(score_NS, fresh.utility_NS),
        "top": float(fresh.utility_NS.gather(1, first_N1).mean()),
    }


def slope_of(found_P: Tensor, true_P: Tensor) -> tuple[float, float]:
    """Least squares with an intercept; and the correlation."""
    (var_found, both), (_, var_true) = torch.cov(torch.stack([found_P, true_P])).tolist()
    return both / var_true, both / math.sqrt(var_found * var_true)


def _in_order(score_NS: Tensor, true_NS: Tensor) -> float:
    agree_NSS = (score_NS.unsqueeze(2) > score_NS.unsqueeze(1)) & (true_NS.unsqueeze(2) > true_NS.unsqueeze(1))
    return float(agree_NSS.sum() / (len(true_NS) * PLACES * (PLACES - 1) / 2))


def report(results: Found) -> Report:
    of = _Measured(results)
    lines = [
        [law, f"{random:.0%}", method, *(of.show(value, law, random, method) for value in VALUES)]
        for law, methods in LAWS.items()
        for random in RANDOM
        for method in methods
        if of(VALUES[2], law, random, method)
    ]
    header = ("the place's effect", "shuffled", "method", "slope", "r", "inflation", "in order", "first's utility")
    text = TEXT.format(seeds=len({r["seed"] for r in results})) + "\n\n" + table(header, lines)
    return Report(judged([_recovers(of), _missing(of), _confounded(of), *_served(of), _product(of)], results), text)


VALUES = ("slope", "r", "inflation", "order", "top")


class _Measured:
    """By seed, what was measured of some trials."""

    def __init__(self, results: Found):
        self._results = results

    def __call__(self, value: str, law: str, random: float, method: str) -> dict[int, float]:
        return by_seed(self._results, value, law=law, random=random, method=method)

    def show(self, value: str, law: str, random: float, method: str) -> str:
        found = sample(self(value, law, random, method))
        return "" if math.isnan(found.mean) else found.show(3)


def _recovers(of: _Measured) -> Row:
    shuffled, ranked = (sample(of("slope", "added", share, "tower, never missing")) for share in (0.1, 0.0))
    return Row(
        "Added to the logit, a shallow tower learns the position bias: slope 1 ± .1 on the true one where a tenth of "
        "the lists is shuffled.",
        "YouTube, section 4.3",
        f"slope {shuffled.show(3)}; with no list shuffled {ranked.show(3)}",
        "reproduced" if abs(shuffled.mean - 1) < 0.1 else "not reproduced",
    )


def _missing(of: _Measured) -> Row:
    shuffled, ranked = (sample(of("slope", "added", share, "tower")) for share in (0.1, 0.0))
    inflation = sample(of("inflation", "added", 0.1, "tower"))
    fine = abs(shuffled.mean - 1) < 0.1
    return Row(
        "So it does when the position is missing on 10 % of the training rows, so that serving can do without.",
        "YouTube, section 4.3",
        f"slope {shuffled.show(3)}, none shuffled {ranked.show(3)}: rows without a position put its effect down to the "
        f"item (log-odds served {inflation.show(3)} of the true ones)",
        "reproduced, with a smaller slope" if fine else "partly: the curve's form, not its height",
    )


def _confounded(of: _Measured) -> Row:
    shuffled, ranked = (
        sample(of("slope", "added, ranker knows more", share, "tower, never missing")) for share in (0.1, 0.0)
    )
    return Row(
        "The same where the ranker knows more of an item than the net does.",
        "ours",
        f"slope {shuffled.show(3)}, none shuffled {ranked.show(3)}: what the ranker knows is put down to the place",
        "reproduced" if abs(shuffled.mean - 1) < 0.1 else "not reproduced: a tenth shuffled is too little for that",
    )


def _served(of: _Measured) -> list[Row]:
    def gain(law: str, other: str) -> Sample:
        return paired(of("order", law, 0.0, "tower"), of("order", law, 0.0, other))

    laws = [law for law in LAWS if of("order", law, 0.0, "plain feature")]
    rows = []
    for other, claim in (
        ("plain feature", "Served without a position, the tower ranks better than the position as a plain feature."),
        ("no position", "Served without a position, the tower ranks better than a net that never saw one."),
    ):
        gains = {law: gain(law, other) for law in laws}
        better, worse = ([law for law, each in gains.items() if test(each)] for test in (above, below))
        rows.append(
            Row(
                claim,
                "YouTube, table 2: engagement +.24 % with the tower, -.07 % as a feature",
                "pairs in the order of their utilities, none shuffled: "
                + "; ".join(f"{law} {Sample(100 * each.values).show(1)} points" for law, each in gains.items()),
                "reproduced" if laws and len(better) == len(laws) else _mixed(better, worse),
            )
        )
    return rows


def _mixed(better: list[str], worse: list[str]) -> str:
    found = "partly: better where " + " / ".join(better) if better else "not reproduced"
    return found + ("; worse where " + " / ".join(worse) if worse else "")


def _product(of: _Measured) -> Row:
    shuffled, ranked = (sample(of("slope", "examined", share, "PAL")) for share in (0.1, 0.0))
    order = paired(of("order", "examined", 0.0, "PAL"), of("order", "examined", 0.0, "tower"))
    return Row(
        "Where a place is a chance to be looked at, the product form (PAL) learns that chance.",
        "PAL, eq. 2",
        f"slope of its logarithm {shuffled.show(3)}, none shuffled {ranked.show(3)}; pairs in order, against the tower "
        f"{Sample(100 * order.values).show(1)} points",
        "reproduced" if abs(shuffled.mean - 1) < 0.1 else "not reproduced",
    )


TEXT = """Lists of ten items, 16,000 of them, {seeds} seeds. The item's utility is a function of eight normal numbers
that the net (32, 16) can learn; the ranker orders by it, or errs (it goes as much by a number that moves nobody), or
knows more (by a normal number that moves clicks too, and that the net is not given). The place's effect is added to the
log-odds of a click, or is a chance to be looked at that multiplies. slope and r: the learnt curve on the true one, over
ten places and two devices. inflation: slope of the served log-odds on the utility, position missing. in order: pairs of
fresh shuffled lists that are served in the order of their utilities; first's utility: of what is served first, in the
mean. The plain feature and the tower miss the position on a tenth of the training rows."""
PART = Part("position bias, simulated", trials, measure, report)
