"""Wrong versions of our techniques, most of them shipped by somebody, and whether our tests see them.

`python tests/mutants.py` runs the tests that ought to refuse each wrong version: first as the code is, where all must
pass, then with one attribute of one module replaced, where every one of them must break its promise: an assertion that
fails; a crash proves nothing. Every run is a process of its own, forked before anything of ours is imported. Exit code
1 when a wrong version survives. The wrong versions are in tests/wrong/, a file a group.
"""

import argparse
import contextlib
import importlib
import os
import select
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Generator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
from wrong.mutant import Mutant

ROOT = Path(__file__).parent.parent
GROUPS = ("graph", "balance", "bodies", "towers", "step", "nights", "logs", "saving")
HEAVY = (  # what takes seconds to import, and is not ours
    "torch",
    "fbgemm_gpu",
    "numba",
    "pyarrow.dataset",
    "pydantic",
    "sklearn.linear_model",
    "sklearn.metrics",
    "scipy.optimize",
)
PATIENCE_S, EACH_S = 120.0, 10.0  # for all tests, and for each: a wrong version that makes them run longer hangs
BROKEN_PROMISES = ("AssertionError", "Failed")  # assert; pytest.raises and pytest.fail


class Failure(NamedTuple):
    """Of one test. kind: the exception's name; empty where it is no test that failed (a file cannot be imported)."""

    test: str
    kind: str
    message: str


class Ended(NamedTuple):
    """passed: the addresses of tests that passed. error: why the run is worth nothing."""

    passed: list[str]
    failures: list[Failure]
    error: str = ""


class Recorder:
    """The pytest plugin: applies a wrong version before anything of ours is imported, and keeps what fails."""

    def __init__(self, mutant: Mutant | None):
        self._mutant, self.passed, self.failures = mutant, list[str](), list[Failure]()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        if self._mutant:
            self._mutant.apply()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and call.excinfo:
            text = str(call.excinfo.value).strip().splitlines() or [""]
            self.failures.append(Failure(_test(report.nodeid), call.excinfo.typename, text[0]))
            if self._mutant and not remaining(self._mutant, self.failures):
                item.session.shouldstop = "refused"
        elif report.when == "call" and report.passed:
            self.passed.append(_test(report.nodeid))
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.append(Failure(_test(report.nodeid), "", report.longreprtext.splitlines()[-1]))


def _test(nodeid: str) -> str:
    """A test's address below tests/."""
    return nodeid.removeprefix("tests/")


def names(test: str, address: str) -> bool:
    """Whether a test, as it is named for a mutant, is the one with an address, or has it among its parameters."""
    return address == test or address.startswith(f"{test}[")


def remaining(mutant: Mutant, failures: Sequence[Failure]) -> list[str]:
    """The tests of a mutant that have not refused it."""
    broken = {failure.test for failure in failures if failure.kind in (mutant.crash, *BROKEN_PROMISES)}
    return [test for test in mutant.tests if not any(names(test, address) for address in broken)]


def run_tests(tests: Sequence[str], mutant: Mutant | None = None) -> Ended:
    """Run some tests in a process of their own, with a mutant applied before they are imported."""
    theirs, ours = Pipe(duplex=False)
    process = os.fork()
    if process == 0:
        _child(ours, tests, mutant)
    ours.close()
    patience_s = PATIENCE_S + EACH_S * len(tests)
    if not select.select([theirs], [], [], patience_s)[0]:
        os.kill(process, signal.SIGKILL)
        ended = Ended([], [], f"no end within {patience_s:g} s")
    else:
        with contextlib.suppress(EOFError):
            ended = Ended([], [], "the process died")
            passed, failures, error = theirs.recv()
            ended = Ended(passed, [Failure(*failure) for failure in failures], error)
    os.waitpid(process, 0)
    return ended


def _child(ours: Connection, tests: Sequence[str], mutant: Mutant | None) -> None:
    """Never returns. What pytest prints goes nowhere."""
    recorder, error = Recorder(mutant), ""
    with open(os.devnull, "w") as nowhere, tempfile.TemporaryDirectory() as folder:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        options = ["-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/tests", "--rootdir", str(ROOT)]
        os.chdir(ROOT)
        try:
            pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)], plugins=[recorder])
        except BaseException:  # noqa: BLE001 - told to the parent
            error = traceback.format_exc().splitlines()[-1]
    ours.send((recorder.passed, [tuple(failure) for failure in recorder.failures], error))
    ours.close()
    os._exit(0)


def verdict(mutant: Mutant, ended: Ended) -> str:
    """Why a mutant is not refused by all of its tests; empty when it is."""
    for test in remaining(mutant, ended.failures):
        crash = next((f for f in ended.failures if names(test, f.test) or not f.kind), None)
        what = f"crashes: {crash.kind} {crash.message}" if crash else "passes"
        return f"{ended.error or what} in {test}"
    return ""


def all_mutants() -> list[Mutant]:
    """Those of every group, in the order of the groups."""
    found: list[Mutant] = [mutant for group in GROUPS for mutant in importlib.import_module(f"wrong.{group}").MUTANTS]
    assert len({mutant.name for mutant in found}) == len(found), "two mutants of one name"
    return found


def main(mutants: Sequence[Mutant], heavy: Sequence[str] = HEAVY, arguments: Sequence[str] | None = None) -> int:
    """The command line. heavy: modules that are imported once, for all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", help="only the wrong versions whose name contains this")
    parser.add_argument("--list", action="store_true", help="tell what is wrong in each, and run nothing")
    options = parser.parse_args(arguments)
    mutants = [mutant for mutant in mutants if not options.only or options.only in mutant.name]
    if not mutants:
        parser.error(f"no wrong version is called {options.only}")
    if options.list:
        for mutant in mutants:
            print("\n".join([mutant.name, _described(mutant), *(f"    <- {test}" for test in mutant.tests)]))
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for module in heavy:
        importlib.import_module(module)
    return int(not _as_it_is(mutants) or not _refused(mutants))


def _described(mutant: Mutant) -> str:
    """What is wrong, and who shipped it."""
    seen = f" Seen in: {mutant.seen_in}." if mutant.seen_in else ""
    return textwrap.fill(mutant.wrong + seen, 120, initial_indent="    ", subsequent_indent="    ")


def _as_it_is(mutants: Sequence[Mutant]) -> bool:
    """Whether every test that is named passes where nothing is wrong: else a failure would say nothing."""
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    start, ended = time.perf_counter(), run_tests(tests)
    missing = [test for test in tests if not any(names(test, address) for address in ended.passed)]
    bad = [f"{f.test}: {f.kind} {f.message}" for f in ended.failures]
    for line in [*bad, *(f"{test}: did not run" for test in missing if not bad), *([ended.error] * bool(ended.error))]:
        print(f"as it is: {line}")
    if not (missing or bad):
        print(f"as it is: {len(tests)} tests pass in {time.perf_counter() - start:.0f} s", flush=True)
    return not (missing or bad)


def _refused(mutants: Sequence[Mutant]) -> bool:
    """Whether every mutant is refused; prints a line for each, and what is wrong in it below."""
    survivors, start = 0, time.perf_counter()
    for mutant in mutants:
        begin = time.perf_counter()
        why = verdict(mutant, run_tests(mutant.tests, mutant))
        survivors += bool(why)
        by = f"SURVIVES: {why}" if why else "refused by " + ", ".join(test.split("::")[1] for test in mutant.tests)
        print(f"{time.perf_counter() - begin:5.1f} s  {mutant.name}: {by}\n{_described(mutant)}", flush=True)
    refused, seconds = len(mutants) - survivors, time.perf_counter() - start
    print(f"{refused} of {len(mutants)} wrong versions are refused, in {seconds:.0f} s")
    return survivors == 0


if __name__ == "__main__":
    sys.exit(main(all_mutants()))
