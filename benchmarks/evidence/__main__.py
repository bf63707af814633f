"""Do the claims of the literature hold for our pieces? Writes docs/evidence.md.

Each trial's result is kept under .evidence/, so an interrupted run goes on where it stopped, and --seeds 20 after
--seeds 10 trains ten more. The page is made from what is there; --report makes it and measures nothing.

    python -m benchmarks.evidence [--part a b] [--seeds N] [--short] [--jobs N] [--report]
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from benchmarks.evidence import (  # noqa: E402
    ablations,
    balancers,
    census,
    funnel,
    polarisation,
    position,
    selection,
    serps,
    synthetic,
)
from benchmarks.evidence.part import Found, Part, Trial, found, measured, place, table  # noqa: E402

PARTS: dict[str, Part] = {
    "a": synthetic.PART,
    "b": census.PART,
    "c": selection.PART,
    "d": funnel.PART,
    "e": position.PART,
    "e2": serps.PART,
    "f": polarisation.PART,
    "g": ablations.PART,
    "h": balancers.PART,
}
Job = tuple[Part, Path, Trial]
INTRODUCTION = """# Evidence

Written by `make evidence`; do not edit by hand. What the literature claims of the techniques that Daybreak offers, and
what our own pieces (bodies, towers, heads, losses, balancers) do when the experiment is repeated with them. Where a
claim does not come back, the table says so. ± is a 95 % interval of the mean over seeds; t is the mean difference of
runs with the same seed over its standard error.
"""


def missing(part: Part, folder: Path, trials: Sequence[Trial]) -> list[Job]:
    """What of a part can be measured here and was not yet."""
    return [] if part.lacks() else [(part, folder, trial) for trial in trials if not place(folder, trial).exists()]


def measure(jobs: Sequence[Job], num_processes: int) -> None:
    """Measure all that is missing, so many at once, with one thread each."""
    for number, (job, seconds) in enumerate(done(jobs, num_processes), start=1):
        _, folder, trial = job
        print(f"{number}/{len(jobs)} {folder.name} {trial}: {seconds:.0f} s", file=sys.stderr, flush=True)


def done(jobs: Sequence[Job], num_processes: int) -> Iterator[tuple[Job, float]]:
    """Each job, once it is done, with the seconds that it took."""
    if num_processes == 1 or len(jobs) < 2:
        yield from ((job, measured(*job)) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
    with ProcessPoolExecutor(num_processes, spawn, torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(measured, *job): job for job in jobs}
        try:
            yield from ((running[future], future.result()) for future in as_completed(running))
        finally:
            pool.shutdown(cancel_futures=True)


def page(results: Mapping[str, Found]) -> str:
    """docs/evidence.md, from what was found of each part."""
    lines, sections = [], []
    for name, part in PARTS.items():
        here = results.get(name, [])
        if not here:
            lines.append([name, part.title, "", "", f"open: not run{', ' * bool(part.lacks())}{part.lacks()}"])
            continue
        report = part.report(here)
        lines += [[name, *row] for row in report.rows]
        seconds = sum(result["seconds"] for result in here)
        took = f"{len(here)} trials, {seconds / 60:.0f} minutes of a core."
        sections.append(f"## ({name}) {part.title}\n\n{report.text.strip()}\n\n{took}\n")
    summary = table(["", "claim", "source", "ours", "verdict"], lines)
    return "\n".join([INTRODUCTION, summary + "\n", *sections])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.evidence", description="Claims of the literature, measured again.")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    parser.add_argument("--seeds", type=int, help="instead of as many as each part thinks right")
    parser.add_argument("--short", action="store_true", help="few seeds and steps: minutes; no page unless --out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (as many as cores)")
    parser.add_argument("--report", action="store_true", help="measure nothing: the page from what is there")
    parser.add_argument("--results", type=Path, default=Path(".evidence"), help="folder of the trials' results")
    parser.add_argument("--out", type=Path, help="the page (docs/evidence.md)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    folder = options.results / ("short" if options.short else "full")
    trials = {name: part.trials(options.short, options.seeds) for name, part in PARTS.items()}
    if not options.report:
        measure(
            [job for name in options.part for job in missing(PARTS[name], folder / name, trials[name])], options.jobs
        )
    results = {name: found(folder / name, trials[name]) for name in PARTS}
    out = options.out or (None if options.short else Path("docs/evidence.md"))
    if out is None:
        print(page(results))
    else:
        out.write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
