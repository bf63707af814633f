"""The rig kills where it says, once, and only there; and it is not felt where it has nothing to do."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.inject.diary import SCORE, TRAIN, Step, record, steps_of
from faults.inject.kill_points import POINTS

ROOT, INJECT = Path(__file__).parents[2], Path(__file__).parent / "inject"
WRITE = """
from trainer.storage import Storage
model = Storage("MODEL")
model.within("day=2026-11-01").write("manifest.json", b"first")
model.within("day=2026-11-02").write("manifest.json", b"second")
"""


def disturbed(folder: Path, program: str, **told: str) -> int:
    """Run a program with the rig on its path; its exit code."""
    (folder / "fired").mkdir(exist_ok=True)
    environment = {"PYTHONPATH": os.pathsep.join([str(INJECT), str(ROOT)]), "DAYBREAK_FAULTS": str(folder)}
    program = program.replace("MODEL", f"{folder}/model")
    return subprocess.run([sys.executable, "-c", program], env=os.environ | environment | told).returncode


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_process_is_killed_once_at_its_point(tmp_path: Path, moment: str) -> None:
    """Before the write nothing is there; between, the whole file under another name; after, the file."""
    model = tmp_path / "model"
    assert disturbed(tmp_path, WRITE, DAYBREAK_KILL_AT=f"manifest-{moment}") == -signal.SIGKILL
    assert (model / "day=2026-11-01" / "manifest.json").read_bytes() == b"first"
    left = {path.name.split(".")[-1]: path.read_bytes() for path in (model / "day=2026-11-02").glob("*")}
    assert left == {"before": {}, "between": {"tmp": b"second"}, "after": {"json": b"second"}}[moment]
    assert disturbed(tmp_path, WRITE, DAYBREAK_KILL_AT=f"manifest-{moment}") == 0, "the point has fired"
    assert (model / "day=2026-11-02" / "manifest.json").read_bytes() == b"second"


def test_storage_refuses_while_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "storage.json").write_text('{"refuse": true}')
    assert disturbed(tmp_path, WRITE) == 1
    (tmp_path / "storage.json").write_text('{"slow_s": 0.01}')
    assert disturbed(tmp_path, WRITE) == 0


def test_without_a_folder_for_faults_nothing_is_wrapped(tmp_path: Path) -> None:
    program = "import os, sys, trainer.storage; sys.exit(hasattr(trainer.storage.Storage.write, '__wrapped__'))"
    assert disturbed(tmp_path, program) == 1
    assert disturbed(tmp_path, program, DAYBREAK_FAULTS="") == 0


def test_the_wrapped_functions_are_there_under_the_names_that_the_points_use(tmp_path: Path) -> None:
    """A renamed function would make its points silent; this says so in seconds, not in a night."""
    names = sorted({(point.module, point.function) for point in POINTS.values()})
    program = f"import functools, importlib\nfor module, path in {names}:\n"
    program += "    functools.reduce(getattr, path.split('.'), importlib.import_module(module))\n"
    assert disturbed(tmp_path, program) == 0


def test_a_diary_whose_writer_was_killed_in_a_record_is_read_up_to_it() -> None:
    steps = [Step(1.5, SCORE, 0, b""), Step(2.5, TRAIN, 738_000, b"\1\2\3\4" * 3)]
    content = b"".join(record(*step) for step in steps)
    assert list(steps_of(content)) == steps
    assert list(steps_of(content[:-1])) == steps[:1]
