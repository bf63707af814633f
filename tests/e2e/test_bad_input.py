"""Bad input, through the command line: exit code 2, words instead of a traceback, and the day before as it was.

One model, trained through the first of three tiny simulated days, is made once; each case gets a copy, spoils one thing
and asks for more. The texts are checked by their words, in order: what is wrong and where, what was got and expected,
and what to do.
"""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Ended, Run
from small_disk import fill, small_disk

from cluster.cli import main
from cluster.simulate import simulate
from embeddings.exchange import LocalExchange
from trainer.checkpoint import Checkpoints
from trainer.configfile import load
from trainer.intervals import Interval
from trainer.learner import build

ROOT = Path(__file__).parents[2]
CONFIG = """
name: tiny
data: {path: logs, group: request_id, weight: weight, lanes: 24}
features:
  user_id: {kind: id, table: user}
  item_id: {kind: id, table: item}
  history: {kind: ids, table: item, max_len: 10}
  price: {kind: number, transform: log1p}
  item_age_h: {kind: number}
tables: {user: {dim: 4, capacity_rows: 128}, item: {dim: 4, capacity_rows: 128}}
tasks: {click: {}, cart: {given: click}}
model: {body: {kind: shared_bottom, layers: [8]}, tower_layers: [4]}
train: {workers: 1, batch_size: 256}
tracking: {mlflow: "sqlite:///mlflow.db"}
checkpoints: {path: checkpoints}
"""
NEW = ("--set", "name=another")
WATCH_OF_SKIPPED = "{label: watch_s, loss: mse, where: skip}"  # it is known of clicks alone
FIRST = datetime.date(2026, 11, 1)
DAY, SECOND = "2026-11-02", "logs/day=2026-11-02"
TRAIN = ("train", "model.yaml", "--day", DAY, "--no-ray")
NIGHTLY = ("nightly", "model.yaml", "--no-ray")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three days of logs and a model that is trained through the first and promoted."""
    folder = tmp_path_factory.mktemp("good")
    simulate(str(folder), days=3, start=FIRST, users=60, items=40, rows_per_day=800, seed=0)
    shutil.rmtree(folder / "truth")
    (folder / "model.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["daybreak", *NIGHTLY, "--through", str(FIRST)])
        main()
    assert ended.value.code == 0
    return folder


@pytest.fixture
def case(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be spoilt, and the current folder."""
    shutil.copytree(good, tmp_path / "case", ignore=shutil.ignore_patterns("mlartifacts"))
    monkeypatch.chdir(tmp_path / "case")
    return tmp_path / "case"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_only_the_ledgers_tell(folder: Path, before: dict[str, bytes]) -> None:
    """Nothing else is there than before; where something was begun, a ledger tells that it failed, or did not begin."""
    now = contents(folder)
    new = {path: now.pop(path) for path in now.keys() - before.keys()}
    assert now == before
    assert all(Path(path).name == "ledger.json" for path in new)
    assert all(json.loads(content)["entries"][-1]["state"] in ("planned", "failed") for content in new.values())


def assert_refused(ended: Ended, says: Sequence[str]) -> None:
    assert ended.code == 2, ended
    assert re.search(".*?".join(map(re.escape, ["daybreak: ", *says])), ended.err, re.DOTALL), ended.err
    assert "Traceback" not in ended.out + ended.err


def assert_loads(checkpoints: Path) -> None:
    """The first day is the only one, and every bit of it is good."""
    config = load("model.yaml")
    store = Checkpoints(str(checkpoints), config.name)
    assert store.intervals() == [Interval(FIRST)]
    learner = build(config, LocalExchange())
    store.load(learner, store.open(Interval(FIRST)))
    assert learner.embeddings.shard.export("item")["key"].size > 16


# How a case is spoilt.

Spoil = Callable[[Path], object]


def column(name: str, new: Callable[[pa.Array], pa.Array] | None) -> Spoil:
    """Rewrite one column of the second day's first file, or drop it."""

    def spoil(case: Path) -> None:
        path = case / SECOND / "part-0.parquet"
        table = pq.read_table(path, partitioning=None)
        at, values = table.schema.get_field_index(name), table[name].combine_chunks()
        pq.write_table(table.set_column(at, name, new(values)) if new else table.drop_columns([name]), path)

    return spoil


def row_7(value: float, kind: pa.DataType | None = None) -> Callable[[pa.Array], pa.Array]:
    return lambda values: pa.array([*values[:7].to_pylist(), value, *values[8:].to_pylist()], kind or values.type)


def content(name: str, new: Callable[[bytearray], bytes | bytearray]) -> Spoil:
    """Rewrite the one file that a pattern finds."""

    def spoil(case: Path) -> None:
        [path] = case.glob(name)
        path.write_bytes(new(bytearray(path.read_bytes())))

    return spoil


def replaced(old: bytes, new: bytes) -> Callable[[bytearray], bytearray]:
    return lambda text: text.replace(old, new)


def half(whole: bytearray) -> bytearray:
    return whole[: len(whole) // 2]


def garbled(whole: bytearray) -> bytearray:
    """The footer stays good: only who reads the pages can see it."""
    return whole[:100] + bytearray(byte ^ 0x5A for byte in whole[100 : len(whole) // 2]) + whole[len(whole) // 2 :]


def flipped(whole: bytearray) -> bytearray:
    whole[len(whole) // 3] ^= 4
    return whole


def emptied(case: Path) -> None:
    for path in (case / SECOND).iterdir():
        path.unlink()


def nothing(case: Path) -> None:
    pass


PART = f"{SECOND}/part-0.parquet"
ROW = "part-0.parquet, row group 0, column '{}', row 7: "
REEXPORT = "-> re-export the day, or correct the configuration"
RESTORE = "-> restore the file from a copy, or train again from there: nightly --again 2026-11-01"
DAMAGED = ("a checkpoint file is damaged", "got", "SHA-256", "expected", "SHA-256", RESTORE)

CASES: dict[str, tuple[Spoil, tuple[str, ...], tuple[str, ...]]] = {
    "unknown key": (
        content("model.yaml", replaced(b"batch_size", b"batch_sise")),
        TRAIN,
        ("model.yaml: train.batch_sise: unknown key 'batch_sise'", "-> did you mean 'batch_size'?"),
    ),
    "key twice": (
        content("model.yaml", replaced(b"tasks:", b"name: again\ntasks:")),
        TRAIN,
        ("model.yaml, line ", "not valid YAML", "got key 'name' appears twice"),
    ),
    "no such configuration": (
        nothing,
        ("train", "modle.yaml", "--day", DAY),
        ("modle.yaml: cannot read the configuration", "got No such file", "-> name a YAML file that exists"),
    ),
    "no such column": (
        column("click", None),
        TRAIN,
        (PART, "column 'click' of task 'click' is missing", "got columns impression_id, request_id", REEXPORT),
    ),
    "type of a number": (
        column("price", lambda values: pa.array([str(value) for value in values])),
        TRAIN,
        (
            PART,
            "column 'price' of feature 'price' has the wrong type",
            "got string",
            "expected an integer, a float",
            REEXPORT,
        ),
    ),
    "type of a list": (
        column("history", lambda values: pa.array(range(len(values)))),
        TRAIN,
        (PART, "column 'history' of feature 'history' has the wrong type", "got int64", "expected a list of", REEXPORT),
    ),
    "task without rows": (
        nothing,
        (*TRAIN, *NEW, "--set", "tasks.skip={label: not click}", "--set", f"tasks.never={WATCH_OF_SKIPPED}"),
        (
            "tasks.never: a task has no row to learn from",
            "got none in the 800 rows of day 2026-11-02",
            "expected labels, and rows where skip happened",
            "-> correct the label, or drop the task",
        ),
    ),
    "label 2": (
        column("click", row_7(2)),
        TRAIN,
        (ROW.format("click"), "not the label of a task with loss: bce", "got 2.0", "expected 0, 1 or null", REEXPORT),
    ),
    "label a half": (
        column("click", row_7(0.5, pa.float64())),
        TRAIN,
        (ROW.format("click"), "not the label of a task with loss: bce", "got 0.5", "expected 0, 1 or null", REEXPORT),
    ),
    "NaN": (
        column("item_age_h", row_7(float("nan"))),
        TRAIN,
        (ROW.format("item_age_h"), "not a finite number", "got nan", "expected finite numbers", "null", REEXPORT),
    ),
    "infinity": (
        column("item_age_h", row_7(float("inf"))),
        TRAIN,
        (ROW.format("item_age_h"), "not a finite number", "got inf", "expected finite numbers", REEXPORT),
    ),
    "log of a negative": (
        column("price", row_7(-3.0)),
        TRAIN,
        (ROW.format("price"), "log1p is not defined here", "got -3.0", "expected numbers above -1", REEXPORT),
    ),
    "negative weight": (
        column("weight", row_7(-1.0)),
        TRAIN,
        (ROW.format("weight"), "not a sample weight", "got -1.0", "expected numbers from 0 up", REEXPORT),
    ),
    "file cut short": (
        content(PART, half),
        TRAIN,
        (PART, "not a readable Parquet file", "got ", "-> deliver the file again, or remove it"),
    ),
    "file of no bytes": (
        content(PART, lambda whole: b""),
        TRAIN,
        (PART, "not a readable Parquet file", "got Parquet file size is 0 bytes", "-> deliver the file again"),
    ),
    "damaged pages": (
        content(PART, garbled),
        TRAIN,
        (PART, "row group 0: a row group cannot be read", "got ", "-> deliver the file again, or remove it"),
    ),
    "empty day": (
        emptied,
        NIGHTLY,
        (f"{SECOND}: day {DAY} is empty", "got no Parquet files", "expected at least one row", "-> deliver the day"),
    ),
    "missing day": (
        lambda case: shutil.rmtree(case / SECOND),
        NIGHTLY,
        (f"day {DAY} is missing", "got days 2026-11-01 .. 2026-11-03", "-> deliver it, narrow --from and --through"),
    ),
    "folder of no day": (
        lambda case: (case / "logs" / "day=2026-11-31").mkdir(),
        NIGHTLY,
        ("day=2026-11-31: not a day", "got 2026-11-31", "expected YYYY-MM-DD", "-> rename or remove the folder"),
    ),
    "no days": (
        lambda case: shutil.rmtree(case / "logs"),
        NIGHTLY,
        ("logs: no days found", "got no folders", "expected folders such as day=2026-11-20", "-> correct data.path"),
    ),
    "day of the past": (
        nothing,
        ("train", "model.yaml", "--day", "2026-10-31", "--no-ray"),
        (
            "day 2026-10-31 lies before the newest checkpoint",
            "got trained through 2026-11-01",
            "-> days are trained in order",
        ),
    ),
    "day of no calendar": (
        nothing,
        ("train", "model.yaml", "--day", "tomorrow", "--no-ray"),
        ("--day: not a day", "got 'tomorrow'", "expected YYYY-MM-DD", "-> give a day of the calendar"),
    ),
    "no workers": (
        nothing,
        (*TRAIN, "--set", "train.workers=0"),
        (
            "model.yaml: train.workers: out of bounds",
            "got 0",
            "expected 1 .. 24",
            "-> correct it in the file or with --set",
        ),
    ),
    "a setting of another row optimizer": (
        nothing,
        (*NIGHTLY, "--set", "train.rows={optimizer: sgd, beta1: 0.9}"),
        ("train.rows.beta1: not a setting of sgd", "got 0.9", "-> drop it; sgd knows lr"),
    ),
    "value of no event": (
        nothing,
        (*TRAIN, "--set", "tables.item.value.clik=1"),
        ("model.yaml: tables.item.value: no event is called 'clik'", "-> did you mean 'click'?"),
    ),
    "a table too small for its rows": (
        nothing,
        (*TRAIN, "--set", "tables.item={dim: 4, capacity_rows: 16, grow: false, when_full: reject}"),
        (
            "tables.item: a table holds more rows than it may",
            "got ",
            " rows",
            "expected at most 16, its capacity_rows",
            "-> raise capacity_rows, let it grow (grow: true), or evict (when_full: evict)",
        ),
    ),
    "another body": (
        nothing,
        (*TRAIN, "--set", "model.body={kind: mmoe}"),
        (
            "dense.safetensors: the dense net",
            "not the one that was trained",
            "got model/body.",
            "expected model/body.",
            "-> undo the change",
        ),
    ),
    "flipped bit in rows": (
        content("checkpoints/**/rows/item/*", flipped),
        NIGHTLY,
        ("rows/item/rows-0000-4095.parquet", *DAMAGED),
    ),
    "flipped bit in the dense net": (
        content("checkpoints/**/dense.safetensors", flipped),
        NIGHTLY,
        ("dense.safetensors", *DAMAGED),
    ),
    "flipped bit in the manifest": (
        content("checkpoints/**/manifest.json", flipped),
        NIGHTLY,
        ("day=2026-11-01/manifest.json: the checkpoint's manifest", "got ", RESTORE),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_in_words_and_the_day_before_is_untouched(daybreak: Run, case: Path, name: str) -> None:
    spoil, command, says = CASES[name]
    spoil(case)
    before = contents(case / "checkpoints")
    assert_refused(daybreak(*command), says)
    assert_only_the_ledgers_tell(case / "checkpoints", before)
    if not name.startswith("flipped"):
        (case / "model.yaml").write_text(CONFIG)
        assert_loads(case / "checkpoints")


def test_the_same_commands_go_through_when_nothing_is_wrong(daybreak: Run, case: Path) -> None:
    assert daybreak(*TRAIN).code == 0
    ended = daybreak(*NIGHTLY)
    assert ended.code == 0 and "Traceback" not in ended.err
    config = load("model.yaml")
    days = Checkpoints(config.checkpoints.path, config.name).intervals()
    assert days == [Interval(FIRST + datetime.timedelta(days=i)) for i in range(3)]


def test_bad_input_that_is_mended_leaves_no_trace(daybreak: Run, case: Path, good: Path) -> None:
    content(PART, garbled)(case)
    assert daybreak(*TRAIN).code == 2
    shutil.copy(good / PART, case / PART)
    assert daybreak(*TRAIN).code == 0
    assert {path.name for path in (case / "checkpoints" / "tiny" / f"day={DAY}").iterdir() if path.is_file()} == {
        "ledger.json",
        "manifest.json",
    }


def test_a_disk_that_is_full_at_the_checkpoint_is_told_and_the_day_before_is_untouched(
    daybreak: Run, case: Path
) -> None:
    with small_disk(case / "disk", size_kib=256) as disk:
        shutil.copytree("checkpoints/tiny", disk / "tiny")
        filler = fill(disk, leave_kib=24)  # lock, ledger and rows find place, the dense net does not
        before = contents(disk / "tiny")
        on_disk = (*TRAIN, "--set", f"checkpoints.path={disk}")
        says = (
            f"{disk}/tiny: a checkpoint cannot be written",
            "got ",
            "No space left on device",
            "-> free space",
            "untouched",
        )
        assert_refused(daybreak(*on_disk), says)
        assert_only_the_ledgers_tell(disk / "tiny", before)
        assert_loads(disk)
        filler.unlink()
        assert daybreak(*on_disk).code == 0


def test_a_process_of_its_own_ends_with_the_same_words_and_code(case: Path) -> None:
    column("click", row_7(2))(case)
    command = [sys.executable, "-m", "cluster.cli", *TRAIN]
    ended = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr), CASES["label 2"][2])
    assert ended.stdout == "" and ended.stderr.startswith("daybreak: ")
    assert_loads(case / "checkpoints")
