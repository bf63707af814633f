"""The script that tries wrong versions of our techniques: it tells the refused from the survivors, and from crashes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import all_mutants

ROOT = Path(__file__).parent.parent
MUTANTS = """
import sys
from mutants import main
from wrong.mutant import Mutant

def promotes_everybody():
    "Nobody is ever held."
    from trainer import gate
    gate.judge = lambda *_: gate.Decision("promoted", "why not")

def harmless():
    "Nothing is wrong."
    from trainer import gate
    judge = gate.judge
    gate.judge = lambda *arguments: judge(*arguments)

def crashes():
    "It never gets to an answer."
    from trainer import gate
    del gate.Decision

TEST = "trainer/test_gate.py::test_an_auc_may_fall_by_the_tolerance_and_not_by_more"
MUTANTS = [Mutant(each, (TEST,)) for each in (promotes_everybody, harmless, crashes)]
MUTANTS.append(Mutant(lambda: None, ("trainer/test_gate.py::test_that_nobody_wrote",)))
sys.exit(main(MUTANTS, heavy=(), arguments=sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("only", "code", "told"),
    [
        ("promotes_everybody", 0, "1 of 1 wrong versions are refused"),
        ("harmless", 1, "SURVIVES: passes in trainer/test_gate.py"),
        ("crashes", 1, "SURVIVES: crashes: "),
        ("lambda", 1, "test_that_nobody_wrote: did not run"),
    ],
)
def test_a_wrong_version_is_refused_by_an_assertion_that_fails_and_by_nothing_else(
    only: str, code: int, told: str
) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", MUTANTS, "--only", only]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert ended.returncode == code and told in ended.stdout, ended.stdout + ended.stderr


def test_every_wrong_version_says_what_is_wrong_and_names_tests_that_exist() -> None:
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for mutant in all_mutants():
        assert mutant.wrong.endswith(".") and mutant.tests, mutant.name
        for test in mutant.tests:
            file, _, function = test.partition("[")[0].partition("::")
            assert f"\ndef {function}(" in texts[ROOT / "tests" / file], f"{mutant.name}: {test} is not there"
