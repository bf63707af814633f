"""What may be said of a claim: nothing from too few seeds, nor where not all that it needs was measured."""

from collections.abc import Iterable

from benchmarks.evidence.part import Found, Row, Sample

FEWEST_SEEDS = 3


def judged(rows: Iterable[Row], results: Found) -> list[Row]:
    """The rows, with an open verdict where there is too little for one."""
    seeds = len({result["seed"] for result in results})
    few = f"open: {seeds} seed{'s' * (seeds > 1)} only" if seeds < FEWEST_SEEDS else ""
    return [row._replace(verdict="open: not all measured" if "nan" in row.ours else few or row.verdict) for row in rows]


def above(difference: Sample) -> bool:
    """Whether the 95 % interval of the mean lies above 0."""
    from scipy.stats import t

    return len(difference) > 1 and difference.t > t.ppf(0.975, len(difference) - 1)


def below(difference: Sample) -> bool:
    return above(Sample(-difference.values))
