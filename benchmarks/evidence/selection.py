"""(c) Conversion rates learnt from clicked rows: who is right about the rows that nobody clicked?

A funnel with known chances: six standard normal numbers a row, of which the first moves both clicks and conversions.
The net is linear in them, or deep; conversions are linear in them (the net can be right) or not. Then, on ids instead
of numbers: what do the conversions gain from the clicks' rows, and what from ESMM's product?

Sources: Ma et al.: Entire space multi-task model (ESMM), SIGIR 2018; Wang et al.: ESCM2: Entire space counterfactual
multi-task model, SIGIR 2022. Shape letters: B rows, I input width, T tasks, L floats of an id's taste.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.evidence.fit import Rows, batches, fit, logits
from benchmarks.evidence.ids import IdRows, Tables, fit_ids, score_ids
from benchmarks.evidence.part import Found, Part, Report, Row, Sample, Trial, by_seed, paired, sample, table
from benchmarks.evidence.verdicts import above, judged
from trainer.bodies import Separate, SharedBottom
from trainer.heads import Propensity, Task, TaskGraph
from trainer.metrics import auc
from trainer.model import MultiTaskModel
from trainer.towers import Towers

METHODS: dict[str, dict[str, Any]] = {
    "clicked rows": {"where": "click"},
    "ESMM": {"given": "click"},
    "IPS": {"given": "click", "propensity": Propensity(product=0.0)},
    "ESCM2-IPS": {"given": "click", "propensity": Propensity()},
    "DR": {"given": "click", "propensity": Propensity(doubly_robust=True, product=0.0)},
    "ESCM2-DR": {"given": "click", "propensity": Propensity(doubly_robust=True)},
}
LAWS: dict[str, tuple[str, str, tuple[int, ...]]] = {  # the laws of conversions and of clicks, the net's hidden layers
    "linear": ("linear", "linear", ()),
    "step": ("step", "linear", ()),
    "square": ("square", "linear", ()),
    "sine": ("sine", "linear", ()),
    "step, clicks square": ("step", "square", ()),
    "step, deep net": ("step", "linear", (32, 32)),
}
MISFITS = ("step", "square", "sine")
SHARING: dict[str, dict[str, Any]] = {
    "alone": {},
    "shared rows": {"where": "click"},
    "ESMM": {"given": "click"},
}


def trials(short: bool, seeds: int | None) -> list[Trial]:
    of_space, of_rows = (("linear", "sine"), ("alike",)) if short else (tuple(LAWS), ("alike", "unlike"))
    every = ("clicked rows", "ESMM", "ESCM2-IPS", "ESCM2-DR") if short else METHODS
    return [
        {"what": what, "law": law, "method": method, "size": size, "seed": seed}
        for seed in range(seeds or (1 if short else 8))
        for what, laws, methods, size in (
            ("space", of_space, every, 40_000 if short else 100_000),
            ("rows", of_rows, SHARING, 40_000 if short else 150_000),
        )
        for law in laws
        for method in methods
    ]


def measure(what: str, law: str, method: str, size: int, seed: int) -> dict[str, float]:
    return (of_space if what == "space" else of_rows)(law, method, size, seed)


def simulate(conversions: str, clicks: str, size: int, seed: int) -> tuple[Rows, Tensor]:
    """Rows with the labels click and conversion; and p(conversion | click, x)."""
    generator = torch.Generator().manual_seed(seed)
    x_BI = torch.randn(size, 6, generator=generator)
    u_B, v_B = x_BI[:, 0], x_BI[:, 1]
    click_B = -1.5 + 1.5 * u_B if clicks == "linear" else -2.5 + u_B + 0.8 * u_B.square()
    of_u = {
        "linear": -2.2 + 0.8 * u_B,
        "step": torch.where(u_B > 0, -0.9, -2.9),
        "square": -2.8 + 0.6 * u_B.square(),
        "sine": -2.0 + 1.2 * torch.sin(2 * u_B),
    }
    chance_B2 = torch.sigmoid(torch.stack([click_B, of_u[conversions] + 0.8 * v_B], dim=1))
    happened_B2 = torch.rand(size, 2, generator=generator) < chance_B2
    labels_BT = torch.stack([happened_B2[:, 0], happened_B2.all(1)], dim=1).float()
    return Rows(x_BI, labels_BT), chance_B2[:, 1]


def of_space(law: str, method: str, size: int, seed: int) -> dict[str, float]:
    """Over 100,000 fresh rows, clicked or not. bias: mean prediction over mean truth, less 1. deciles: the mean of the
    same over the predictions' tenths, without sign and weighed by their truth. error: mean distance from the truth.
    """
    conversions, clicks, layers = LAWS[law]
    rows, _ = simulate(conversions, clicks, size, 2 * seed)
    fresh, truth_B = simulate(conversions, clicks, 100_000, 2 * seed + 1)
    graph = TaskGraph({"click": Task(), "conversion": Task(**METHODS[method])})
    torch.manual_seed(seed)
    body = SharedBottom(6, 2, layers=layers)
    model = MultiTaskModel(body, Towers(graph.heads, body.output_dim, ()))
    rate = 0.01 if layers else 0.03
    for steps, share in ((300, 1.0), (100, 0.1)):
        fit(model, graph, batches(rows, 2048, steps, seed + steps), rate=share * rate, seed=seed)
    found_B = torch.sigmoid(logits(model, fresh)[:, graph.places("conversion")[0]])
    tenths = [(found_B[part].mean(), truth_B[part].mean()) for part in found_B.argsort().chunk(10)]
    return {
        "clicked": float(rows.labels_BT[:, 0].mean()),
        "truth": float(truth_B.mean()),
        "found": float(found_B.mean()),
        "bias": float(found_B.mean() / truth_B.mean() - 1),
        "deciles": float(sum(abs(p - q) for p, q in tenths) / sum(q for _, q in tenths)),
        "error": float((found_B - truth_B).abs().mean()),
    }


def ids_with_tastes(law: str, size: int, seed: int, ids: int = 2000, width: int = 4) -> tuple[IdRows, Tensor]:
    """Users and items whose tastes' product moves clicks; the same tastes move conversions, or others of their own.
    Second: whether a row would convert if it were clicked.
    """
    generator = torch.Generator().manual_seed(seed)
    taste_2VL, own_2VL = torch.randn(2, 2, ids, width, generator=generator)
    id_2B = torch.randint(ids, (2, size), generator=generator)

    def moved(taste_2VL: Tensor) -> Tensor:
        user_BL, item_BL = (taste_VL[id_B] for taste_VL, id_B in zip(taste_2VL, id_2B, strict=True))
        return (user_BL * item_BL).sum(1) / math.sqrt(width) + 0.7 * item_BL[:, 0]

    logit_B2 = torch.stack([-1.8 + moved(taste_2VL), -1.5 + moved(taste_2VL if law == "alike" else own_2VL)], dim=1)
    happened_B2 = torch.rand(size, 2, generator=generator) < torch.sigmoid(logit_B2)
    labels_BT = torch.stack([happened_B2[:, 0], happened_B2.all(1)], dim=1).float()
    return IdRows(labels_BT, {"user": id_2B[0], "item": id_2B[1]}, {}), happened_B2[:, 1]


def of_rows(law: str, method: str, size: int, seed: int) -> dict[str, float]:
    """AUC of conversions on fresh rows: of the clicked ones, and of all had they been clicked; after the pass, of five,
    that was best on other clicked rows.
    """
    rows, would_B = ids_with_tastes(law, 9 * size // 4, seed)
    old, check, fresh = (
        rows.take(part) for part in (slice(size), slice(size, 5 * size // 4), slice(5 * size // 4, None))
    )
    graph = TaskGraph({"click": Task(), "conversion": Task(**SHARING[method])})
    if method == "alone":
        graph, old = TaskGraph({"conversion": Task()}), old.take(old.labels_BT[:, 0] == 1)
        old = old._replace(labels_BT=old.labels_BT[:, 1:])
    torch.manual_seed(seed)
    tables = Tables({"user": (2000, 8), "item": (2000, 8)}, {"user": "user", "item": "item"})
    body = Separate(16, len(graph.tasks), layers=(32, 16))
    model = MultiTaskModel(body, Towers(graph.heads, body.output_dim, ()))
    of_passes = []
    for number in range(5):
        fit_ids(tables, model, graph, old, passes=1, seed=10 * seed + number)
        scores = [score_ids(tables, model, each)[:, -1].numpy() for each in (check, fresh)]
        best, clicked = (_of_clicked(score_B, each) for score_B, each in zip(scores, (check, fresh), strict=True))
        of_passes.append((best, clicked, auc(scores[1], would_B[5 * size // 4 :].numpy())))
    _, clicked, everywhere = max(of_passes)
    return {"clicked": clicked, "everywhere": everywhere}


def _of_clicked(score_B: NDArray[np.float32], rows: IdRows) -> float:
    label_B2 = rows.labels_BT.numpy()
    return auc(score_B[label_B2[:, 0] == 1], label_B2[label_B2[:, 0] == 1, 1])


def report(results: Found) -> Report:
    space, rows = ([r for r in results if r["what"] == what] for what in ("space", "rows"))

    def of(value: str, law: str, method: str, digits: int = 3) -> str:
        return sample(by_seed(space, value, law=law, method=method)).show(digits)

    lines = [
        [law, method, *(of(value, law, method) for value in ("found", "truth", "bias", "deciles", "error"))]
        for law in LAWS
        for method in METHODS
        if by_seed(space, "bias", law=law, method=method)
    ]
    header = ("conversions", "learnt by", "mean prediction", "truth", "bias", "tenths apart", "error")
    of_rows = [
        [
            law,
            method,
            *(sample(by_seed(rows, value, law=law, method=method)).show() for value in ("clicked", "everywhere")),
        ]
        for law in ("alike", "unlike")
        for method in SHARING
        if by_seed(rows, "clicked", law=law, method=method)
    ]
    text = "\n\n".join(
        [
            TEXT.format(seeds=len({r["seed"] for r in results})),
            table(header, lines),
            "On ids, AUC of conversions, after the best of five passes:",
            table(("tastes", "learnt", "on clicked rows", "on all rows, had they been clicked"), of_rows),
        ]
    )
    return Report(
        judged([_well_specified(space), _misspecified(space), _counterfactual(space), *_shared(rows)], results), text
    )


def _well_specified(space: Found) -> Row:
    biases = {method: sample(by_seed(space, "bias", law="linear", method=method)) for method in METHODS}
    tenths = sample(by_seed(space, "deciles", law="linear", method="ESMM"))
    fine = all(abs(bias.mean) < 0.03 for bias in biases.values())
    return Row(
        "Where the net can be right, ESMM recovers p(conversion given click) over all rows (tenths within 5 %).",
        "ESMM, section 2.3",
        f"bias {_percent(biases['ESMM'])}, tenths apart {_percent(tenths)}; clicked rows alone are no worse: "
        f"{_percent(biases['clicked rows'])}",
        "reproduced; but so do clicked rows alone" if fine and tenths.mean < 0.05 else "not reproduced",
    )


def _misspecified(space: Found) -> Row:
    laws = [law for law in MISFITS if by_seed(space, "bias", law=law, method="ESMM")]
    biases = {law: [by_seed(space, "bias", law=law, method=m) for m in ("ESMM", "clicked rows")] for law in laws}
    better = [law for law, (a, b) in biases.items() if abs(sample(a).mean) < 0.8 * abs(sample(b).mean)]
    ours = "; ".join(f"{law}: {_percent(sample(a))} against {_percent(sample(b))}" for law, (a, b) in biases.items())
    deep = " against ".join(
        _percent(sample(by_seed(space, "bias", law="step, deep net", method=m))) for m in ("ESMM", "clicked rows")
    )
    return Row(
        "Learning over the entire space removes sample selection bias.",
        "ESMM, section 2.3",
        f"bias of a net that cannot be right, ESMM against clicked rows alone: {ours}; of a deep one that can: {deep}",
        "not reproduced" if not better else f"only for {', '.join(better)}",
    )


def _counterfactual(space: Found) -> Row:
    laws = [law for law in MISFITS if by_seed(space, "bias", law=law, method="ESMM")]
    biases = {m: [sample(by_seed(space, "bias", law=law, method=m)) for law in laws] for m in METHODS}
    worst = {m: max(each, key=lambda bias: abs(bias.mean)) for m, each in biases.items()}
    ours = ", ".join(f"{m} {_percent(bias)}" for m, bias in worst.items() if m not in ("clicked rows", "ESMM"))
    left = max(abs(bias.mean) for m, bias in worst.items() if m not in ("clicked rows", "ESMM"))
    return Row(
        "Inverse propensities, or doubly robust imputation, remove that bias.",
        "ESCM2, theorems 1-2",
        f"the worst law for each: {ours}; ESMM {_percent(worst['ESMM'])}",
        "reproduced"
        if left < 0.05
        else f"reproduced, but for up to {left:.0%}"
        if left < 0.5 * abs(worst["ESMM"].mean)
        else "not reproduced",
    )


def _shared(rows: Found) -> list[Row]:
    def gain(law: str, value: str, a: str, b: str) -> Sample:
        return paired(by_seed(rows, value, law=law, method=a), by_seed(rows, value, law=law, method=b))

    base = gain("alike", "clicked", "ESMM", "alone")
    sharing = gain("alike", "clicked", "shared rows", "alone")
    product = gain("alike", "everywhere", "ESMM", "shared rows")
    unlike = gain("unlike", "clicked", "ESMM", "alone")
    return [
        Row(
            "ESMM ranks conversions better than a model of clicked rows alone, since the rows learn from all clicks.",
            "ESMM, table 2: AUC .6600 to .6856",
            f"AUC {base.show()} where tastes are alike; {unlike.show()} where they are not",
            "reproduced where clicks and conversions go by the same tastes" if above(base) else "not reproduced",
        ),
        Row(
            "Of that gain the most is the product's, not the shared rows'.",
            "ESMM, table 2: .6825 without sharing",
            f"on clicked rows: shared rows without the product {sharing.show()}, the product beside that "
            f"{gain('alike', 'clicked', 'ESMM', 'shared rows').show()}; on all rows {product.show()}",
            f"not reproduced: sharing brings {sharing.mean / base.mean:.0%}"
            if sharing.mean > 0.5 * base.mean
            else "reproduced",
        ),
    ]


def _percent(of: Sample) -> str:
    return Sample(100 * of.values).show(1) + " %"


TEXT = """Linear, step, square, sine: how conversions depend on the number by which clicks go; the net is linear in its
inputs, so only the first can be learnt exactly. "clicks square": the net of clicks cannot be right either, so the
propensities are wrong. {seeds} seeds, 100,000 rows each, about a quarter clicked; judged on 100,000 fresh rows, clicked
or not, against the true chances. bias: mean prediction over mean truth, less 1. tenths apart: the same for each tenth
of the predictions, without sign. error: mean distance from the truth. IPS and DR stand for ESCM2's losses without the
loss over all rows; propensities are clipped at 0.02."""
PART = Part("selection bias", trials, measure, report)
