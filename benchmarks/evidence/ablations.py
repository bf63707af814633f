"""(g) Four techniques, each against itself without the piece that it is named after, on logs where what it assumes
holds, and on logs where it does not.

DeepMCP's auxiliary nets: items that stand together in behaviour are alike. DUPN's encoder: the order of the behaviours,
what was done, and what is asked for matter. NMTR's cascade: who buys has carted, who carts has viewed. DBMTL's links:
one target follows from what moves another. Sources: with each experiment. Shape letters: B rows, T tasks, V ids, L
places of a list, D floats of an id's taste.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.evidence.fit import Rows, batches, fit, logits
from benchmarks.evidence.ids import IdRows, Tables, fit_ids, score_ids
from benchmarks.evidence.part import Found, Part, Report, Row, Sample, Trial, by_seed, paired, sample, table
from trainer.auxiliary import Auxiliary, Correlation, Matching
from trainer.bodies import Separate, SharedBottom
from trainer.encoders import PropertyGatedAttention
from trainer.heads import Task, TaskGraph
from trainer.metrics import auc
from trainer.model import MultiTaskModel
from trainer.towers import Towers

METHODS: dict[
    str, dict[str, tuple[str, ...]]
] = {  # by technique and law, what is compared; the last law breaks what the technique assumes
    "DeepMCP": {
        "by taste": ("plain", "matching", "correlation", "both"),
        "by taste, many labels": ("plain", "matching", "correlation", "both"),
        "by chance": ("plain", "matching", "correlation", "both"),
    },
    "DUPN": {
        "last": ("mean", "DUPN"),
        "property": ("mean", "without properties", "DUPN"),
        "query": ("mean", "without query", "DUPN"),
        "mean": ("mean", "without properties", "without query", "DUPN"),
    },
    "NMTR": {law: ("buys alone", "side by side", "cascade") for law in ("nested", "unlike")},
    "DBMTL": {law: ("unlinked", "unlinked, deeper", "linked") for law in ("follows", "apart")},
}
SHORT = [
    *(("DeepMCP", "by taste", method, 8_000) for method in ("plain", "correlation")),
    *(("DUPN", "property", method, 10_000) for method in ("mean", "DUPN")),
    *(("NMTR", "nested", method, 50_000) for method in ("side by side", "cascade")),
    *(("DBMTL", "follows", method, 10_000) for method in ("unlinked", "linked")),
]
SIZES = {"DeepMCP": 16_000, "DUPN": 24_000, "NMTR": 100_000, "DBMTL": 20_000}


def trials(short: bool, seeds: int | None) -> list[Trial]:
    full = [
        (what, law, method, SIZES[what])
        for what, laws in METHODS.items()
        for law, methods in laws.items()
        for method in methods
    ]
    names = ("what", "law", "method", "size", "seed")
    return [
        dict(zip(names, (*trial, seed), strict=True))
        for seed in range(seeds or (1 if short else 7))
        for trial in (SHORT if short else full)
    ]


def measure(what: str, law: str, method: str, size: int, seed: int) -> dict[str, float]:
    return EXPERIMENTS[what](law, method, size, seed)


def split(size: int) -> tuple[slice, slice, slice]:
    """Of `size` rows to learn from, half as many to choose the pass by, and as many to be judged on."""
    return slice(size), slice(size, 3 * size // 2), slice(3 * size // 2, 5 * size // 2)


Judge = Callable[[Tensor, IdRows], float]


def after_best_pass(
    tables: Tables, model: MultiTaskModel, graph: TaskGraph, rows: IdRows, size: int, judge: Judge, **settings: Any
) -> tuple[Tensor, IdRows]:
    """Scores [B, L] of the rows to be judged on, after the pass that the judge likes best on the rows to choose by; and
    those rows.
    """
    learnt, check, fresh = (rows.take(part) for part in split(size))
    passes, seed, best = settings.pop("passes"), settings.pop("seed"), (-math.inf, torch.empty(0))
    for number in range(passes):
        fit_ids(tables, model, graph, learnt, passes=1, seed=100 * seed + number, **settings)
        found = judge(score_ids(tables, model, check), check)
        if found > best[0]:
            best = found, score_ids(tables, model, fresh)
    return best[1], fresh


def last_auc(score_BL: Tensor, rows: IdRows) -> float:
    """AUC of the last task."""
    return auc(score_BL[:, -1].numpy(), rows.labels_BT[:, -1].numpy())


def tossed(logit_B: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(logit_B.shape, generator=generator) < torch.sigmoid(logit_B)).float()


# DeepMCP. Source: Ouyang et al.: Representation learning-assisted click-through rate prediction, IJCAI 2019.


def with_neighbours(law: str, size: int, seed: int, users: int = 10, width: int = 2, longest: int = 6) -> IdRows:
    """Clicks by the product of tastes, five to an item or fifty; beside each row six items that its user went for, or
    that any user did.
    """
    generator = torch.Generator().manual_seed(seed)
    items, total = size // (50 if law == "by taste, many labels" else 5), 5 * size // 2
    user_VD, item_VD = (torch.randn(count, width, generator=generator) for count in (users, items))
    user_B, item_B = (torch.randint(count, (total,), generator=generator) for count in (users, items))
    shares_VV = torch.softmax(1.5 * user_VD @ item_VD.T, dim=1)
    rows_of_user = torch.multinomial(shares_VV, 4 * longest * total // users, replacement=True, generator=generator)
    place_BL = torch.randint(rows_of_user.shape[1], (total, longest), generator=generator)
    list_BL = rows_of_user[user_B.unsqueeze(1), place_BL]
    if law == "by chance":
        list_BL = list_BL.flatten()[torch.randperm(list_BL.numel(), generator=generator)].view_as(list_BL)
    logit_B = -1 + 1.5 * (user_VD[user_B] * item_VD[item_B]).sum(1) + 0.5 * item_VD[item_B, 0]
    return IdRows(tossed(logit_B, generator).unsqueeze(1), {"user": user_B, "item": item_B}, {"behaviour": list_BL})


def of_neighbours(law: str, method: str, size: int, seed: int) -> dict[str, float]:
    rows, graph = with_neighbours(law, size, seed), TaskGraph({"click": Task()})
    torch.manual_seed(seed)
    shapes = {"user": (10, 8), "item": (int(rows.ids["item"].max()) + 1, 8)}
    tables = Tables(shapes, {"user": "user", "item": "item", "behaviour": "item"})
    layout = tables.layout(list(rows.ids), list(rows.lists))
    model = of_body(graph, SharedBottom(layout.input_dim, 1, layers=(32, 16)))
    auxiliary: list[Auxiliary] = []
    if method in ("matching", "both"):
        auxiliary.append(Matching(layout, user=("user",), item=("item",), label="click", layers=(32, 16)))
    if method in ("correlation", "both"):
        auxiliary.append(Correlation(layout, sequence="behaviour", layers=(32, 16)))
    score_BL, fresh = after_best_pass(
        tables, model, graph, rows, size, last_auc, passes=10, seed=seed, batch_size=256, rate=0.01, auxiliary=auxiliary
    )
    return {"auc": last_auc(score_BL, fresh)}


def of_body(graph: TaskGraph, body: Any, **more: Any) -> MultiTaskModel:
    return MultiTaskModel(body, Towers(graph.heads, body.output_dim, ()), **more)


# DUPN. Source: Ni et al.: Perceive your users in depth, KDD 2018.


def with_behaviour(law: str, size: int, seed: int, items: int = 100, properties: int = 4, longest: int = 6) -> IdRows:
    """Lists of items and of what was done with each; beside them what is asked for. Each item speaks for or against a
    click: the last two, those with one property, those of the kind that is asked for, or all of them alike.
    """
    generator, total = torch.Generator().manual_seed(seed), 5 * size // 2
    speaks_V = torch.randn(items, generator=generator)
    item_BL = torch.randint(items, (total, longest), generator=generator)
    property_BL = torch.randint(properties, (total, longest), generator=generator)
    query_B = torch.randint(2, (total,), generator=generator)
    counts_BL = {
        "last": (torch.arange(longest) >= longest - 2).expand(total, -1),
        "property": property_BL == 0,
        "query": item_BL % 2 == query_B.unsqueeze(1),
        "mean": torch.ones(total, longest, dtype=torch.bool),
    }[law]
    said_B = (speaks_V[item_BL] * counts_BL).sum(1) / counts_BL.sum(1).clamp(min=1).sqrt()
    lists = {"items": item_BL, "done": property_BL}
    return IdRows(tossed(1.5 * said_B - 0.5, generator).unsqueeze(1), {"query": query_B}, lists)


def of_behaviour(law: str, method: str, size: int, seed: int) -> dict[str, float]:
    rows, graph = with_behaviour(law, size, seed), TaskGraph({"click": Task()})
    torch.manual_seed(seed)
    of = {"items": "item", "query": "query", "done": "property"}
    pooled = tuple(rows.lists) if method == "mean" else ()
    tables = Tables({"item": (100, 8), "query": (4, 4), "property": (4, 4)}, of, pooled)
    layout, encoder = tables.layout(list(rows.ids), list(rows.lists)), None
    if method != "mean":
        encoder = PropertyGatedAttention(
            layout,
            items="items",
            properties="" if method == "without properties" else "done",
            query=() if method == "without query" else ("query",),
            hidden=16,
            attention_layers=(16,),
        )
    body = SharedBottom(layout.input_dim + (encoder.output_dim if encoder else 0), 1, layers=(32, 16))
    model = of_body(graph, body, encoder=encoder)
    score_BL, fresh = after_best_pass(
        tables, model, graph, rows, size, last_auc, passes=8, seed=seed, batch_size=512, rate=0.01
    )
    return {"auc": last_auc(score_BL, fresh)}


# NMTR. Source: Gao et al.: Neural multi-task recommendation from multi-behavior data, ICDE 2019.


def with_funnel(law: str, size: int, seed: int, users: int = 2000, items: int = 50, width: int = 3) -> IdRows:
    """Views, carts and purchases. Nested: whoever buys has carted, whoever carts has viewed, and each step's log-odds
    add a little to those of the step before. Unlike: each has tastes of its own, and happens without the others.
    """
    generator, total = torch.Generator().manual_seed(seed), 5 * size // 2
    user_TVD, item_TVD = (torch.randn(3, count, width, generator=generator) for count in (users, items))
    user_B, item_B = (torch.randint(count, (total,), generator=generator) for count in (users, items))
    match_TB = 0.8 * (user_TVD[:, user_B] * item_TVD[:, item_B]).sum(2) + 0.5 * item_TVD[:, item_B, 0]
    base_T1 = torch.tensor([[-1.0], [-3.5], [-6.0]])
    if law == "nested":
        logit_TB = base_T1 + (match_TB * torch.tensor([[1.0], [0.4], [0.4]])).cumsum(0)
        chance_TB = torch.sigmoid(logit_TB)
        even_B = torch.rand(total, generator=generator)
        labels_TB = (even_B < chance_TB.cummin(0).values).float()
    else:
        labels_TB = tossed(base_T1 + match_TB, generator)
    return IdRows(labels_TB.T.contiguous(), {"user": user_B, "item": item_B}, {})


def of_funnel(law: str, method: str, size: int, seed: int) -> dict[str, float]:
    rows = with_funnel(law, size, seed)
    cascade = method == "cascade"
    tasks = {"view": Task(), "cart": Task(cascade="view" if cascade else None)}
    tasks |= {"buy": Task(cascade="cart" if cascade else None)}
    if method == "buys alone":
        rows, tasks = rows._replace(labels_BT=rows.labels_BT[:, 2:]), {"buy": Task()}
    graph = TaskGraph(tasks)
    torch.manual_seed(seed)
    tables = Tables({"user": (2000, 8), "item": (50, 8)}, {"user": "user", "item": "item"})
    model = of_body(graph, Separate(16, len(tasks), layers=(32, 16)))
    score_BL, fresh = after_best_pass(
        tables, model, graph, rows, size, last_auc, passes=8, seed=seed, batch_size=1024, rate=0.01
    )
    bought_V = torch.bincount(rows.ids["user"][:size], rows.labels_BT[:size, -1], minlength=2000)
    few_B = bought_V[fresh.ids["user"]] <= 3
    return {"auc": last_auc(score_BL, fresh), "few": last_auc(score_BL[few_B], fresh.take(few_B))}


# DBMTL. Source: Wang et al.: Deep Bayesian multi-target learning for recommender systems, 2019.


def with_targets(law: str, size: int, generator: torch.Generator, seed: int, known: float) -> Rows:
    """Two events from twenty normal numbers. The first goes by a sum of waves and a product; the second by the same and
    one slope more, or by waves of its own. known: the share of the rows that tell of the second.
    """
    w_2IW = torch.linalg.qr(torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(seed)))[0]
    x_BI = torch.randn(size, 20, generator=generator)
    along_2BW = x_BI @ w_2IW
    latent_2B = torch.sin(1.5 * along_2BW).sum(2) + along_2BW[..., :2].prod(2)
    second_B = latent_2B[0] if law == "follows" else latent_2B[1]
    labels_B2 = tossed(torch.stack([1.2 * latent_2B[0] - 0.5, 1.2 * second_B + 0.5 * x_BI[:, 0] - 1.0], 1), generator)
    labels_B2[torch.rand(size, generator=generator) >= known, 1] = torch.nan
    return Rows(x_BI, labels_B2)


def of_links(law: str, method: str, size: int, seed: int) -> dict[str, float]:
    """AUC of the second target: with a net for each tower, and with one for both."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
    rows, held, fresh = (
        with_targets(law, n, generator, seed, known) for n, known in ((size, 0.1), (size // 8, 1.0), (50_000, 1.0))
    )
    graph = TaskGraph({"first": Task(), "second": Task(links=("first",) if method == "linked" else ())})
    found = {}
    for name, body_of in {"apart": Separate, "shared": SharedBottom}.items():
        torch.manual_seed(seed)
        body = body_of(20, 2, layers=(32,))
        model = MultiTaskModel(body, Towers(graph.heads, 32, (16, 16) if method == "unlinked, deeper" else (16,)))
        check = partial(missed, model, held)
        fit(model, graph, batches(rows, 256, 1200, seed), rate=0.005, check=check, every=50, patience=6)
        found[name] = auc(logits(model, fresh)[:, 1].numpy(), fresh.labels_BT[:, 1].numpy())
    return found


def missed(model: MultiTaskModel, rows: Rows) -> float:
    """Log loss of the second target."""
    return float(torch.nn.functional.binary_cross_entropy_with_logits(logits(model, rows)[:, 1], rows.labels_BT[:, 1]))


EXPERIMENTS: dict[str, Callable[[str, str, int, int], dict[str, float]]] = {
    "DeepMCP": of_neighbours,
    "DUPN": of_behaviour,
    "NMTR": of_funnel,
    "DBMTL": of_links,
}


LEAST_SEEDS = 5  # for a verdict
TOO_LITTLE = 0.01  # a gain in AUC that is surely below this is none


def surely_above(found: Sample, chance: float = 0.025) -> bool:
    """Whether a mean above 0 would come about by chance less often than that, were the true one 0 (Student's t)."""
    from scipy.stats import t

    return bool(t.sf(found.t, len(found) - 1) < chance)


class Claim(NamedTuple):
    """That a method has a higher value than another under some laws, and no lower one under the others."""

    what: str
    value: str
    method: str
    other: str
    gains: Sequence[str]
    harmless: Sequence[str]
    text: str
    source: str

    def gain(self, results: Found, law: str) -> Sample:
        here = partial(by_seed, results, self.value, what=self.what, law=law)
        return paired(here(method=self.method), here(method=self.other))

    def row(self, results: Found) -> Row:
        gains, others = ({law: self.gain(results, law) for law in laws} for laws in (self.gains, self.harmless))
        shown = "; ".join(f"{law}: {gain.show()}" for law, gain in (gains | others).items() if len(gain))
        if min(map(len, gains.values())) < LEAST_SEEDS:
            return Row(self.text, self.source, f"AUC {shown}" if shown else "", "open: too few seeds")
        found = [law for law, gain in gains.items() if surely_above(gain)]
        none = [law for law, gain in gains.items() if surely_above(Sample(TOO_LITTLE - gain.values))]
        harmed = [law for law, gain in others.items() if surely_above(Sample(-gain.values))]
        verdict = "partly: " + ", ".join(found) if found else "open: within chance"
        verdict = "reproduced" if len(found) == len(gains) else "not reproduced" if len(none) == len(gains) else verdict
        return Row(self.text, self.source, f"AUC {shown}", verdict + f"; harm where {', '.join(harmed)}" * any(harmed))


CLAIMS = [
    Claim(
        *("DeepMCP", "auc", "correlation", "plain", ("by taste",), ("by taste, many labels", "by chance")),
        "Items that stand together in behaviour teach each other: clicks with few labels an item are ranked better.",
        "DeepMCP, section 3.4",
    ),
    Claim(
        *("DeepMCP", "auc", "matching", "plain", ("by taste", "by taste, many labels"), ("by chance",)),
        "A matching net beside the prediction net ranks clicks better.",
        "DeepMCP, section 3.3",
    ),
    Claim(
        *("DeepMCP", "auc", "both", "correlation", ("by taste", "by taste, many labels"), ("by chance",)),
        "Both together are better than correlation alone.",
        "DeepMCP",
    ),
    Claim(
        *("DUPN", "auc", "DUPN", "mean", ("last", "property", "query"), ("mean",)),
        "A gated LSTM with attention says more of a user than the mean of what he did.",
        "DUPN",
    ),
    Claim(
        *("DUPN", "auc", "DUPN", "without properties", ("property",), ("mean",)),
        "What was done with an item belongs into gates and attention.",
        "DUPN: AUC of its ranking task .7331 to .7501",
    ),
    Claim(
        *("DUPN", "auc", "DUPN", "without query", ("query",), ("mean",)),
        "The attention should see what is asked for.",
        "DUPN, section 4.4",
    ),
    Claim(
        *("NMTR", "auc", "cascade", "side by side", ("nested",), ("unlike",)),
        "A score that adds to that of the behaviour before ranks the rarest behaviour better.",
        "NMTR",
    ),
    Claim(
        *("NMTR", "few", "cascade", "buys alone", ("nested",), ("unlike",)),
        "Users who bought little gain from what else they did.",
        "NMTR",
    ),
    Claim(
        *("DBMTL", "apart", "linked", "unlinked", ("follows",), ("apart",)),
        "A link to a target from which another follows ranks that one better, and does no harm elsewhere; nets apart.",
        "DBMTL",
    ),
    Claim(
        *("DBMTL", "shared", "linked", "unlinked", ("follows",), ("apart",)),
        "The same where one net serves both targets.",
        "DBMTL",
    ),
    Claim(
        *("DBMTL", "apart", "linked", "unlinked, deeper", ("follows",), ("apart",)),
        "It is the link, not the layer that comes with it; nets apart.",
        "ours",
    ),
]


def report(results: Found) -> Report:
    rows = [claim.row(results) for claim in CLAIMS]
    lines = [
        [what, law, value, "; ".join(shown)]
        for what, laws in METHODS.items()
        for law, methods in laws.items()
        for value in dict.fromkeys(claim.value for claim in CLAIMS if claim.what == what)
        if (shown := _shown(results, value, methods, what=what, law=law))
    ]
    text = TEXT.format(seeds=len({r["seed"] for r in results}))
    return Report(rows, "\n\n".join([text, table(("technique", "log", "AUC of", "by method"), lines)]))


def _shown(results: Found, value: str, methods: Sequence[str], **trial: str) -> list[str]:
    found = {method: by_seed(results, value, method=method, **trial) for method in methods}
    return [f"{method} {sample(each).show(3)}" for method, each in found.items() if each]


TEXT = """{seeds} seeds; differences are between runs with the same seed. All logs are simulated, all AUCs on rows that
no training saw; training ends where other rows say so. DeepMCP: clicks by the product of tastes of ten groups of users
and of items with five labels each (or fifty); beside each row six items drawn by the user's taste, or by chance. DUPN:
six items, each with one of four properties; a click goes by the last two, by those with one property, by those of the
one of two kinds that is asked for, or by all. NMTR: 2,000 users, 50 kinds of items, purchases on about one row in a
hundred; nested: each step's log-odds add to the one before; unlike: each behaviour has tastes of its own. "few": users
with three purchases at most. DBMTL: the second target is known on one row in ten; it follows what moves the first, or
has nothing to do with it; "apart" and "shared" are the net below the towers."""
PART = Part("ablations", trials, measure, report)
