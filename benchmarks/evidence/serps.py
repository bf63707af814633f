"""(e2) Position bias on real result pages: a tower's curve beside the clicks on the same documents at several places.

In: the folder with train.parquet and test.parquet (result pages of ten: serp_id, query_id, region_id, position, doc_id,
click; the sample of the Yandex relevance prediction challenge), named by DAYBREAK_YANDEX_SERP. The net knows the
document and the query; methods differ in what they make of the position.

What the same documents say needs no model: the odds of a click at one place against the next, pooled over the documents
of a query that were shown at both (Mantel and Haenszel, 1959). Each seed resamples the training pages. Shape letters: B
rows, S = 10 places.
"""

import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.evidence.fit import Rows
from benchmarks.evidence.ids import Tables
from benchmarks.evidence.part import Found, Part, Report, Row, Sample, Trial, by_seed, paired, sample, table
from benchmarks.evidence.position import METHODS, PLACES, Net, features, served, slope_of
from benchmarks.evidence.verdicts import above, judged
from trainer.features import Inputs

FEWEST = 10  # impressions in the training pages, below which a document is one of the unknown ones


def folder() -> Path:
    return Path(os.environ.get("DAYBREAK_YANDEX_SERP", "data/yandex_serp"))


def lacks() -> str:
    there = (folder() / "train.parquet").exists() and (folder() / "test.parquet").exists()
    return "" if there else "DAYBREAK_YANDEX_SERP does not name the folder with Yandex's train.parquet, test.parquet"


class Pages(NamedTuple):
    """code_B2: of a query's document (0: unknown) and of the query. place_B: from 0. page_B: ascending."""

    code_B2: NDArray[np.int64]
    place_B: NDArray[np.int64]
    click_B: NDArray[np.int64]
    page_B: NDArray[np.int64]

    def take(self, row_N: NDArray[Any]) -> "Pages":
        return Pages(*(each_B[row_N] for each_B in self))

    def rows(self) -> Rows:
        """x: the codes."""
        click_B1 = torch.tensor(self.click_B, dtype=torch.float32).unsqueeze(1)
        return Rows(torch.tensor(self.code_B2).float(), click_B1, features((torch.tensor(self.place_B), PLACES)))


@cache
def read() -> tuple[Pages, Pages]:
    """The pages to train on, and the others."""
    import pandas

    both = pandas.concat([pandas.read_parquet(folder() / f"{part}.parquet") for part in ("train", "test")], keys=(0, 1))
    old = both.index.get_level_values(0).to_numpy() == 0
    query_B = both.groupby(["query_id", "region_id"]).ngroup().to_numpy()
    document_B = both.groupby(["query_id", "region_id", "doc_id"]).ngroup().to_numpy() + 1
    seen_D = np.bincount(document_B[old], minlength=document_B.max() + 1)
    code_B2 = np.stack([np.where(seen_D[document_B] < FEWEST, 0, document_B), query_B], axis=1)
    place_B, click_B, page_B = (both[name].to_numpy(np.int64) for name in ("position", "click", "serp_id"))
    pages = Pages(code_B2, place_B - 1, click_B, page_B)
    return pages.take(old), pages.take(~old)


def trials(short: bool, seeds: int | None) -> list[Trial]:
    """The method "same documents" is no net: the curve that they give."""
    methods = ("no position", "plain feature", "tower", "tower, never missing", "PAL")
    return [
        {"method": method, "pages": 8_000 if short else 35_064, "seed": seed}
        for seed in range(seeds or (1 if short else 8))
        for method in ("same documents", *(("no position", "tower, never missing") if short else methods))
    ]


def measure(method: str, pages: int, seed: int) -> dict[str, Any]:
    """curve: from the first place to the last, less the first. loglik: mean log-likelihood of the other pages' clicks,
    in nats a row; missing: the same as served, without a position, NaN for a net that never missed it; moved: on rows
    whose document no training page has at that place.
    """
    old, fresh = read()
    old = resampled(old, pages, seed)
    if method == "same documents":
        return {"curve": same_documents(old), "rates": rates(old)}
    form, dropout = METHODS[method]
    torch.manual_seed(seed)
    sizes = {name: 1 + max(int(each.code_B2[:, k].max()) for each in read()) for k, name in enumerate(NAMES)}
    tables = Tables({name: (size, 8) for name, size in sizes.items()}, {name: name for name in NAMES})
    net = Net(form, (PLACES,), 16, (32, 16), tables)
    net.train_on(old.rows(), dropout, seed)
    rows, moved_B = fresh.rows(), torch.tensor(never_there(old, fresh))
    with_place_B = log_likelihood(net, rows)
    learnt = form == "none" or dropout > 0
    curve_S = net.curve(features((torch.arange(PLACES), PLACES)))
    return {
        "curve": (curve_S - curve_S[0]).tolist(),
        "loglik": float(with_place_B.mean()),
        "missing": float(log_likelihood(net, served(rows)).mean()) if learnt else math.nan,
        "moved": float(with_place_B[moved_B].mean()),
        "moved rows": int(moved_B.sum()),
    }


NAMES = ("document", "query")


def resampled(pages: Pages, num: int, seed: int) -> Pages:
    """So many pages, drawn with replacement."""
    first_N = np.flatnonzero(np.diff(pages.page_B, prepend=-1))
    chosen_N = np.random.default_rng(seed).choice(first_N, num)
    return pages.take((chosen_N[:, None] + np.arange(PLACES)).ravel())


@torch.no_grad()
def log_likelihood(net: Net, rows: Rows) -> Tensor:
    """Of each row's click: [B]."""
    parts = []
    for start in range(0, len(rows), 8192):
        part = rows.take(slice(start, start + 8192))
        outputs = net(Inputs(part.x_BI, {}, part.selection), None)
        event = net.graph.nodes(outputs.logits_BL, outputs.shown_BP).whole["click"]
        parts.append(torch.where(part.labels_BT[:, 0] == 1, event.log_p_B, event.log_not_B))
    return torch.cat(parts)


def never_there(old: Pages, fresh: Pages) -> NDArray[np.bool_]:
    """Rows whose document is known, but no training page has it at that place."""
    cell_B, fresh_B = (each.code_B2[:, 0] * PLACES + each.place_B for each in (old, fresh))
    known_B = np.isin(fresh.code_B2[:, 0], old.code_B2[:, 0]) & (fresh.code_B2[:, 0] > 0)
    return known_B & ~np.isin(fresh_B, cell_B)


def counts(pages: Pages) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By document and place: clicks, and rows without one. Unknown documents are none."""
    cell_B, size = pages.code_B2[:, 0] * PLACES + pages.place_B, PLACES * (1 + pages.code_B2[:, 0].max())

    def count(happened_B: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.bincount(cell_B[happened_B], minlength=size).reshape(-1, PLACES)[1:].astype(np.float64)

    return count(pages.click_B == 1), count(pages.click_B == 0)


def same_documents(pages: Pages) -> list[float]:
    """The log-odds of a click by place, less the first's: sums of pooled log-odds ratios of neighbouring places."""
    clicks, others = counts(pages)
    rows = clicks + others
    curve = [0.0]
    for a, b in zip(range(PLACES), range(1, PLACES), strict=False):
        both = np.where((rows[:, a] > 0) & (rows[:, b] > 0), rows[:, a] + rows[:, b], np.inf)
        ratio = (clicks[:, b] * others[:, a] / both).sum() / (clicks[:, a] * others[:, b] / both).sum()
        curve.append(curve[-1] + math.log(ratio))
    return curve


def rates(pages: Pages) -> list[float]:
    """The same of all rows, whichever documents they show."""
    clicks, shown = (np.bincount(pages.place_B, of, PLACES) for of in (pages.click_B, None))
    odds = np.log(clicks / (shown - clicks))
    return [float(each) for each in odds - odds[0]]


def report(results: Found) -> Report:
    curves = {method: _curves(results, "curve", method) for method in ("same documents", *METHODS)}
    curves["all rows"] = _curves(results, "rates", "same documents")
    lines = [
        [name, *(Sample(curve_NS[:, place]).show(2) for place in range(1, PLACES))]
        for name, curve_NS in curves.items()
        if curve_NS.size and not np.isnan(curve_NS).any()
    ]
    scores = [
        [method, *(_shown(by_seed(results, value, method=method)) for value in ("loglik", "missing", "moved"))]
        for method in METHODS
        if by_seed(results, "seed", method=method)
    ]
    moved = max((r["moved rows"] for r in results if "moved rows" in r), default=0)
    text = "\n\n".join(
        [
            TEXT.format(seeds=len({r["seed"] for r in results}), moved=f"{moved:,}"),
            table(("log-odds, less the first place's", *map(str, range(2, PLACES + 1))), lines),
            table(("log-likelihood of a row", "with its place", "place missing", "never there before"), scores),
        ]
    )
    return Report(judged([_alike(results), *_held_out(results)], results), text)


def _shown(values: Mapping[int, float]) -> str:
    found = sample(values)
    return "" if math.isnan(found.mean) else found.show()


def _curves(results: Found, value: str, method: str) -> NDArray[np.float64]:
    return np.array(list(by_seed(results, value, method=method).values()), dtype=float)


def _slopes(results: Found, method: str, value: str = "curve") -> Sample:
    """Of a method's curve on that of the same documents."""
    found, same = by_seed(results, value, method=method), by_seed(results, "curve", method="same documents")
    seeds = sorted(found.keys() & same.keys())
    return Sample(np.array([slope_of(torch.tensor(found[s]), torch.tensor(same[s]))[0] for s in seeds]))


def _alike(results: Found) -> Row:
    never, at_times = (_slopes(results, method) for method in ("tower, never missing", "tower"))
    raw = _slopes(results, "same documents", "rates")
    return Row(
        "The tower's curve is that of the same documents shown at several places.",
        "YouTube, section 4.3",
        f"slope {never.show(2)}, with the place missing on a tenth of the rows {at_times.show(2)}; that of all rows' "
        f"click rates {raw.show(2)}",
        "reproduced" if abs(never.mean - 1) < 0.15 else f"partly: {never.mean:.0%} of its height",
    )


def _held_out(results: Found) -> list[Row]:
    def gain(value: str, a: str, b: str) -> Sample:
        values = paired(by_seed(results, value, method=a), by_seed(results, value, method=b)).values
        return Sample(1000 * values)

    base, feature = gain("loglik", "tower", "no position"), gain("loglik", "tower", "plain feature")
    served = gain("missing", "tower", "plain feature"), gain("missing", "tower", "no position")
    moved = gain("moved", "tower", "plain feature")
    return [
        Row(
            "Clicks on other pages are explained better with the tower than without a position.",
            "YouTube, section 4.3",
            f"{base.show(2)} milli-nats a row; against the position as a plain feature {feature.show(2)}, on documents "
            f"where they never were {moved.show(2)}",
            "reproduced" if above(base) else "not reproduced",
        ),
        Row(
            "Where the position is missing, the tower loses less than the plain feature.",
            "YouTube, table 2",
            f"{served[0].show(2)} milli-nats a row; against no position {served[1].show(2)}",
            "reproduced" if above(served[0]) else "not reproduced: no difference beyond chance",
        ),
    ]


TEXT = """{seeds} seeds, each of 35,064 training pages drawn with replacement (20 queries, 995 documents); 214,130 rows
of other pages. The net (32, 16) reads a vector of the document and of the query. same documents: sums of
Mantel-Haenszel log-odds ratios of neighbouring places over the documents that were at both; all rows: of the places'
click rates. never there before: at most {moved} rows whose document no training page has at that place. ± does not hold
the choice of the test pages, whose queries are mixed otherwise than the training pages'. Without a place a tower scores
the item alone, which explains clicks at their places less well. PAL's curve is of log-probabilities."""
PART = Part("position bias on real result pages", trials, measure, report, lacks)
