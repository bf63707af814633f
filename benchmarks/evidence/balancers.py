"""(h) Balancers against fixed weights: does any do better than the fixed weights that one would have tuned?

Two tasks that want different things of a body too narrow for both. Fixed weights of many ratios draw the front of what
can be had; each balancer, with its defaults, is one point; PE-LTR's bounds are swept as well. Everything is judged on
rows that no training saw; the tuned ratio is chosen on others.

Sources: Xin et al.: Do current multi-task optimization methods in deep learning even help?, NeurIPS 2022; Kurin et al.:
In defense of the unitary scalarization for deep multi-task learning, NeurIPS 2022; the balancers' own, in
trainer/balance.py. Shape letters: B rows, I input width, T tasks, W waves, P points.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.evidence.ablations import LEAST_SEEDS, surely_above
from benchmarks.evidence.fit import Rows, batches, fit, logits
from benchmarks.evidence.part import Found, Part, Report, Row, Sample, Trial, table
from trainer.balance import BALANCERS, Balancer
from trainer.bodies import SharedBottom
from trainer.heads import Task, TaskGraph
from trainer.losses import SquaredError
from trainer.metrics import mse, normalized_entropy
from trainer.model import MultiTaskModel
from trainer.towers import Towers

Points = NDArray[np.float64]  # [P, T], the tasks' losses: small is good
DIM, WIDTH, WAVES = 20, 6, 3


class Problem(NamedTuple):
    """events: whether the tasks are events, whose log-odds the base is added to, or regressions, whose labels are as
    much larger as the scale says. middle: log10 of about the best ratio, the second weight over the first.
    """

    events: bool = False
    bases: tuple[float, float] = (0.0, 0.0)
    scales: tuple[float, float] = (1.0, 1.0)
    middle: float = 0.0

    @property
    def ratios(self) -> list[float]:
        """Those around the middle, and equal weights."""
        return sorted({0.0, *(self.middle + step for step in (-1.5, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5))})


PROBLEMS = {
    "regressions": Problem(),
    "one ten times as large": Problem(scales=(1.0, 10.0), middle=-2.0),
    "a rare event": Problem(events=True, bases=(-0.5, -5.0), middle=0.75),
}
BOUNDS = (0.0, 0.25, 0.5, 0.75, 1.0)  # the first task's share of what PE-LTR's bounds take
BOUND = 0.98  # of all weight
MARGIN = 0.02  # of the best constant's loss: what is surely less than this apart is equally good
ADAPTIVE = [name for name in BALANCERS if name != "fixed"]
SHORT = [("fixed", ratio) for ratio in (-3.0, -2.0, -1.0, 0.0)] + [("gradnorm", 0.0), ("famo", 0.0)]


def trials(short: bool, seeds: int | None) -> list[Trial]:
    others = [(name, 0.0) for name in ADAPTIVE] + [("bounds", bound) for bound in BOUNDS]
    return [
        {"problem": problem, "method": method, "setting": setting, "steps": 500 if short else 700, "seed": seed}
        for seed in range(seeds or (1 if short else 7))
        for problem in (["one ten times as large"] if short else PROBLEMS)
        for method, setting in (SHORT if short else [("fixed", ratio) for ratio in PROBLEMS[problem].ratios] + others)
    ]


def measure(problem: str, method: str, setting: float, steps: int, seed: int) -> dict[str, float]:
    """Each task's loss on fresh rows, over that of the best constant; and on rows to tune by."""
    made, generator = PROBLEMS[problem], torch.Generator().manual_seed(1_000_003 * (seed + 1))
    rows, tuning, fresh = (simulate(made, size, generator, seed) for size in (512 * steps, 20_000, 40_000))
    graph = TaskGraph({name: Task() if made.events else Task(SquaredError()) for name in ("one", "two")})
    torch.manual_seed(seed)
    model = MultiTaskModel(SharedBottom(DIM, 2, layers=(WIDTH,)), Towers(graph.heads, WIDTH, (8,)))
    balance = balancer(method, setting, made.events)
    for part, share in ((4 * steps // 5, 1.0), (steps - 4 * steps // 5, 0.1)):
        fit(model, graph, batches(rows, 512, part, seed + part), rate=share * 0.02, seed=seed, balance=balance)
    names = ("one", "two", "one, tuning", "two, tuning")
    return dict(zip(names, losses(model, made, fresh) + losses(model, made, tuning), strict=True))


def balancer(method: str, setting: float, events: bool) -> Balancer:
    settings: dict[str, Any] = {}
    if method == "fixed":
        settings["weights"] = (1.0, 10.0**setting)
    if method == "bounds":
        settings |= {"at_least": (BOUND * setting, BOUND * (1 - setting)), "normalise": True}
    return BALANCERS["pe_ltr" if method == "bounds" else method](2, [not events] * 2, **settings)


def simulate(problem: Problem, size: int, generator: torch.Generator, seed: int) -> Rows:
    """Each task goes by waves along three directions and the product of two of them; the second's directions lean away
    from the first's, cosine -1/2.
    """
    draw = torch.Generator().manual_seed(seed)
    both_IW = torch.linalg.qr(torch.randn(DIM, 2 * WAVES, generator=draw))[0]
    one_IW, other_IW = both_IW.split(WAVES, dim=1)
    x_BI = torch.randn(size, DIM, generator=generator)
    along_2BW = x_BI @ torch.stack([one_IW, -0.5 * one_IW + math.sqrt(0.75) * other_IW])
    latent_BT = (torch.sin(1.5 * along_2BW).sum(2) + along_2BW[..., :2].prod(2)).T
    if problem.events:
        odds_BT = 2 * latent_BT + torch.tensor(problem.bases)
        return Rows(x_BI, (torch.rand(size, 2, generator=generator) < torch.sigmoid(odds_BT)).float())
    noise_BT = 0.3 * torch.randn(size, 2, generator=generator)
    return Rows(x_BI, (latent_BT + noise_BT) * torch.tensor(problem.scales))


def losses(model: MultiTaskModel, problem: Problem, rows: Rows) -> list[float]:
    found_BT, labels_BT = logits(model, rows), rows.labels_BT.numpy()
    if problem.events:
        return [normalized_entropy(torch.sigmoid(found_BT[:, t]).numpy(), labels_BT[:, t]) for t in range(2)]
    return [mse(found_BT[:, t].numpy(), labels_BT[:, t]) / float(labels_BT[:, t].var()) for t in range(2)]


def front(points: Points) -> Points:
    """Those that no other point is better than in one task and no worse in the other, and the straight lines between
    neighbours.
    """
    kept: list[Points] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    lines = [np.linspace(a, b, 50) for a, b in zip(kept, kept[1:], strict=False)]
    return np.concatenate([*lines, kept[-1:]])


def behind(point: Points, of_front: Points) -> float:
    """By how much both tasks could be better at once; below 0: how far the point lies beyond the front."""
    return float((point - of_front).min(1).max())


def hypervolume(points: Points) -> float:
    """The area that the points are better than, up to (1, 1): the losses of constants."""
    area, height = 0.0, 1.0
    for one, two in sorted(map(tuple, points)):
        if one < 1 and two < height:
            area, height = area + (1 - one) * (height - two), two
    return area


class Seen(NamedTuple):
    """One problem's results of one seed, by method and setting."""

    fresh: dict[tuple[str, float], Points]
    tuning: dict[tuple[str, float], Points]

    @staticmethod
    def of(results: Found) -> "Seen":
        keys = [(r["method"], r["setting"]) for r in results]
        fresh = [np.array([r["one"], r["two"]]) for r in results]
        tuning = [np.array([r["one, tuning"], r["two, tuning"]]) for r in results]
        return Seen(dict(zip(keys, fresh, strict=True)), dict(zip(keys, tuning, strict=True)))

    def points(self, method: str) -> Points:
        return np.array([point for (name, _), point in self.fresh.items() if name == method])

    @property
    def tuned(self) -> Points:
        """Fixed weights of the ratio that has the lowest mean loss on the rows to tune by."""
        fixed = {key: point for key, point in self.tuning.items() if key[0] == "fixed"}
        return self.fresh[min(fixed, key=lambda key: fixed[key].mean())]

    @property
    def equal(self) -> Points:
        return self.fresh["fixed", 0.0]

    @property
    def fixed_behind(self) -> float:
        """How far the fixed weights themselves lie behind the front that the others of them draw: what chance does."""
        fixed = self.points("fixed")
        left = [behind(each, front(np.delete(fixed, i, 0))) for i, each in enumerate(fixed) if _inner(each, fixed)]
        return float(np.mean(left)) if left else 0.0


def _inner(point: Points, points: Points) -> bool:
    """Whether it is not an end of the front, behind which nothing lies."""
    return bool((point > points.min(0)).all())


def seen(results: Found, problem: str) -> list[Seen]:
    """By seed, of those seeds that are complete enough to compare."""
    here = [r for r in results if r["problem"] == problem]
    by = [[r for r in here if r["seed"] == seed] for seed in sorted({r["seed"] for r in here})]
    most = max(map(len, by), default=0)
    return [Seen.of(each) for each in by if len(each) == most]


def over(values: Sequence[float]) -> Sample:
    return Sample(np.array(values, dtype=float))


class Place(NamedTuple):
    """Where a balancer stands in one problem, over seeds: mean loss less that of tuned and of equal fixed weights; how
    far it lies behind the front of fixed weights.
    """

    tuned: Sample
    equal: Sample
    behind: Sample


def place_of(here: Sequence[Seen], method: str) -> Place:
    at = [each.fresh[method, 0.0] for each in here]
    return Place(
        over([point.mean() - each.tuned.mean() for point, each in zip(at, here, strict=True)]),
        over([point.mean() - each.equal.mean() for point, each in zip(at, here, strict=True)]),
        over([behind(point, front(each.points("fixed"))) for point, each in zip(at, here, strict=True)]),
    )


def report(results: Found) -> Report:
    by_problem = {problem: here for problem in PROBLEMS if (here := seen(results, problem))}
    methods = [name for name in ADAPTIVE if any(r["method"] == name for r in results)]
    places = {problem: {name: place_of(here, name) for name in methods} for problem, here in by_problem.items()}
    rows = [_beaten(places), _against_equal(places), *(_own_claim(places, *claim) for claim in OWN_CLAIMS)]
    if any(r["method"] == "bounds" for r in results):
        rows.append(_traced(by_problem))
    text = TEXT.format(seeds=len({r["seed"] for r in results}))
    tables = [f"{problem}:\n\n{_table(here, places[problem])}" for problem, here in by_problem.items()]
    return Report(rows, "\n\n".join([text, *tables]))


def _table(here: Sequence[Seen], places: dict[str, Place]) -> str:
    def line(name: str, points: Sequence[Points], place: Sequence[Sample]) -> list[str]:
        losses = [over([point[t] for point in points]) for t in range(2)]
        return [name, *(each.show(3) for each in (*losses, *place))]

    chance = over([each.fixed_behind for each in here])
    lines = [["fixed, tuned", *(over([each.tuned[t] for each in here]).show(3) for t in range(2)), "", "", ""]]
    lines.append(["fixed, equal", *(over([each.equal[t] for each in here]).show(3) for t in range(2)), "", "", ""])
    lines.append(["fixed, any, against the others", "", "", "", "", chance.show(3)])
    lines += [line(name, [each.fresh[name, 0.0] for each in here], place) for name, place in places.items()]
    return table(("", "loss one", "loss two", "mean less tuned", "mean less equal", "behind the front"), lines)


def _named(places: dict[str, dict[str, Place]], which: str, sign: int) -> dict[str, list[str]]:
    """By problem, the balancers whose difference has a sign beyond chance, of so many that are looked at."""
    chance = 0.025 / sum(map(len, places.values()))
    return {
        problem: [
            name for name, place in of.items() if surely_above(Sample(sign * getattr(place, which).values), chance)
        ]
        for problem, of in places.items()
    }


def _beaten(places: dict[str, dict[str, Place]]) -> Row:
    better = {problem: names for problem, names in _named(places, "tuned", -1).items() if names}
    best = {problem: min(of, key=lambda name: of[name].tuned.mean) for problem, of in places.items()}
    ours = "; ".join(f"{p}: best is {name}, {places[p][name].tuned.show()}" for p, name in best.items())
    near = [surely_above(Sample(place.tuned.values + MARGIN)) for of in places.values() for place in of.values()]
    verdict = "reproduced" if all(near) else f"partly: none surely does; {sum(near)} of {len(near)} surely do not"
    verdict = "not reproduced: " + _list(better) if better else verdict
    return Row(
        "No balancer does better than tuned fixed weights.",
        "Xin et al.; Kurin et al.",
        f"mean loss less that of tuned weights, {ours}",
        _if_enough(places, verdict),
    )


def _against_equal(places: dict[str, dict[str, Place]]) -> Row:
    better, worse = (_named(places, "equal", sign) for sign in (-1, 1))
    return Row(
        "Where losses differ in scale or rarity, balancers save tuning: they do better than equal weights.",
        "GradNorm; uncertainty; FAMO; CAGrad",
        f"better: {_list(better)}. Worse: {_list(worse)}",
        _if_enough(places, "partly: see who, where" if any(better.values()) else "open: none beyond chance"),
    )


def _own_claim(places: dict[str, dict[str, Place]], name: str, text: str, source: str) -> Row:
    here = {problem: of[name] for problem, of in places.items() if name in of}
    worse = [problem for problem, place in here.items() if surely_above(place.tuned)]
    better = [problem for problem, place in here.items() if surely_above(Sample(-place.tuned.values))]
    as_good = [problem for problem, place in here.items() if surely_above(Sample(MARGIN - place.tuned.values))]
    verdict = f"partly: {', '.join(as_good)}" if as_good else "not reproduced" if worse else "open: within chance"
    verdict = "reproduced" if len(as_good) == len(here) else verdict
    verdict += f"; worse: {', '.join(worse)}" * any(worse) + f"; better: {', '.join(better)}" * any(better)
    ours = "; ".join(f"{problem}: {place.tuned.show()}" for problem, place in here.items())
    return Row(text, source, f"mean loss less that of tuned weights, {ours}", _if_enough(places, verdict))


def _traced(by_problem: dict[str, list[Seen]]) -> Row:
    shown, verdict = [], []
    for problem, here in by_problem.items():
        fixed, swept = (over([hypervolume(each.points(name)) for each in here]) for name in ("fixed", "bounds"))
        share = over(list(swept.values / fixed.values))
        lost = over([_span(each.points("bounds")) / _span(each.points("fixed")) for each in here])
        far = over(
            [float(np.mean([behind(p, front(each.points("fixed"))) for p in each.points("bounds")])) for each in here]
        )
        shown.append(f"{problem}: hypervolume {share.show(3)} of it, length {lost.show(2)}, {far.show(3)} behind")
        verdict.append(share.mean > 0.95 and lost.mean > 0.7)
    text = "reproduced" if all(verdict) else "partly" if any(verdict) else "not reproduced"
    claim = "A sweep of PE-LTR's bounds traces the front that fixed weights draw."
    seeds = min(map(len, by_problem.values()))
    return Row(claim, "PE-LTR", "; ".join(shown), text if seeds >= LEAST_SEEDS else "open: too few seeds")


def _span(points: Points) -> float:
    """The front's extent in the first task's loss."""
    of_front = front(points)
    return float(np.ptp(of_front[:, 0]))


def _list(names: dict[str, list[str]]) -> str:
    return "; ".join(f"{problem}: {', '.join(each) or 'none'}" for problem, each in names.items())


def _if_enough(places: dict[str, dict[str, Place]], verdict: str) -> str:
    seeds = min((len(place.tuned) for of in places.values() for place in of.values()), default=0)
    return verdict if seeds >= LEAST_SEEDS else "open: too few seeds"


OWN_CLAIMS = (
    ("gradnorm", "GradNorm does as well as the best fixed weights of a grid.", "GradNorm, abstract"),
    ("uncertainty", "Uncertainty weights do as well as the best fixed weights of a grid.", "Kendall et al."),
)
TEXT = """{seeds} seeds; a loss of 1 is that of the best constant. Twenty normal numbers, six hidden units for both
tasks, towers of eight, 700 steps of 512 rows, each row seen once, Adam. Each task goes by waves along three
directions; those of the second lean away from those of the first (cosine -1/2). In the second problem the second label
is ten times as large, its loss a hundred times; in the third both are events, the second a rare one. Nine or ten fixed
ratios of the weights; "tuned" is the one with the lowest mean loss on 20,000 other rows. Behind the front: by how much
both tasks could be better at once on the front that fixed weights draw; negative is beyond it. That front is the best
of several noisy points, so even fixed weights lie behind the front of the other ones ("any")."""
PART = Part("balancers", trials, measure, report)
