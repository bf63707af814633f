"""The command line, in this process: what stands on stdout, what on stderr, and how it ends.

One night over two tiny simulated days is made once, with one MLflow database. Oracles: json with nothing but JSON
allowed, the logs themselves for what predict copies, and the night's own report for what the other verbs say.
"""

import datetime
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Ended, Run

import cluster.doctor
from cluster import cli

CONFIG = """
name: tiny
data: {path: logs, group: request_id, keys: [impression_id, category]}
features:
  user_id: {kind: id, table: user}
  item_id: {kind: id, table: item}
  price: {kind: number, transform: log1p}
tables: {user: {dim: 4, capacity_rows: 128}, item: {dim: 4, capacity_rows: 128}}
tasks:
  click: {}
  cart: {given: click}
  watch: {label: watch_s, loss: mse, where: click, transform: log1p}
model: {body: {kind: shared_bottom, layers: [8]}, tower_layers: [4]}
train: {workers: 1, batch_size: 256}
tracking: {mlflow: "sqlite:///mlflow.db"}
checkpoints: {path: checkpoints}
"""
DAYS = ["2026-11-01", "2026-11-02", "2026-11-03"]
SIMULATE = f"simulate . --days 3 --rows-per-day 800 --users 60 --items 40 --start {DAYS[0]}".split()


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of three days, and a night over the first two."""
    folder = tmp_path_factory.mktemp("night")
    (folder / "model.yaml").write_text(CONFIG)
    for command in [SIMULATE, ["nightly", "model.yaml", "--through", DAYS[1], "--no-ray"]]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["daybreak", *command])
            cli.main()
        assert ended.value.code == 0
    return folder


@pytest.fixture
def folder(night: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the night, and the current folder."""
    shutil.copytree(night, tmp_path / "copy", ignore=shutil.ignore_patterns("mlartifacts"))
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def fresh(folder: Path) -> Path:
    """The logs and the configuration alone."""
    shutil.rmtree(folder / "checkpoints")
    return folder


# JSON and words.


def test_simulate_says_where_it_wrote(daybreak: Run, tmp_path: Path) -> None:
    arguments = ("--days", "1", "--rows-per-day", "80", "--users", "9", "--items", "20", "--start", "2024-02-29")
    ended = daybreak("simulate", str(tmp_path), *arguments, "--json")
    assert ended.code == 0
    assert ended.json == {"logs": f"{tmp_path}/logs", "truth": f"{tmp_path}/truth", "days": 1, "rows": 80}
    assert len(ended.out.splitlines()) == 1 and "1 days of 80 rows" in ended.err
    assert pq.read_table(tmp_path / "logs" / "day=2024-02-29", partitioning=None).num_rows == 80


def test_nightly_ends_with_its_days_as_json_and_words_on_stderr(daybreak: Run, folder: Path) -> None:
    ended = daybreak("nightly", "model.yaml", "--no-ray", "--json")
    days = ended.json["days"]
    assert ended.code == 0 and ended.json["model"] == "tiny" and len(ended.out.splitlines()) == 1
    assert [day["day"] for day in days] == DAYS and [day["trained"] for day in days] == [False, False, True]
    assert all(day["state"] in ("promoted", "held") and day["rows"] == 800 for day in days)
    assert days[0]["metrics"] == {}, "nobody scored the first day"
    for day in days[1:]:
        assert set(day["metrics"]) == {"click@all", "cart@click", "cart@all", "watch@click"}
        assert {"auc", "gauc", "logloss", "ne", "calibration", "rows"} <= set(day["metrics"]["click@all"])
    assert set(days[2]["ids"]) == {"user", "item"} and days[2]["ids"]["item"]["rows"] > 16
    assert all(word in ended.err for word in [*DAYS, "click@all", "mlflow server"])


def test_without_json_the_words_stand_on_stdout(daybreak: Run, folder: Path) -> None:
    ended = daybreak("nightly", "model.yaml", "--no-ray", "--set", "nightly.gate.floor=2")
    assert ended.code == 0 and ended.err == ""
    assert f"{DAYS[2]} held: auc: click@all is 0." in ended.out, "an AUC of 2 is asked for, which no model has"
    assert "--backend-store-uri sqlite:///mlflow.db" in ended.out


def test_what_is_undefined_is_null_and_never_nan(daybreak: Run, fresh: Path) -> None:
    for path in (fresh / "logs" / f"day={DAYS[1]}").iterdir():
        table = pq.read_table(path, partitioning=None)
        at = table.schema.get_field_index("click")
        nobody = pa.array(np.zeros(table.num_rows, np.int8))
        pq.write_table(table.set_column(at, "click", nobody), path)
    for day in DAYS[:2]:
        ended = daybreak("train", "model.yaml", "--day", day, "--no-ray", "--json")
    metrics = ended.json["metrics"]
    assert metrics["click@all"]["auc"] is None and metrics["click@all"]["rows"] == 800
    assert metrics["cart@click"]["rows"] == 0 and metrics["watch@click"]["mse"] is None
    assert daybreak("status", "model.yaml", "--json").json["days"][1]["metrics"] == metrics
    assert DAYS[1] in daybreak("status", "model.yaml").out


def test_no_depth_hides_what_is_not_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    cli._finish(True, {"a": math.nan, "b": [math.inf, {"c": -math.inf, "d": 1.5}], "e": "nan"})
    assert Ended(0, *capsys.readouterr()).json == {"a": None, "b": [None, {"c": None, "d": 1.5}], "e": "nan"}


def test_a_line_to_be_copied_is_neither_broken_nor_read_as_markup(daybreak: Run, fresh: Path) -> None:
    place = f"{fresh}/{'long/path/' * 30}[bold]place[/bold]"
    ended = daybreak("status", "model.yaml", "--set", f"checkpoints.path={place}")
    assert f"no day is done yet in {place}/tiny\n" in ended.out


# How it ends.


def test_bad_input_ends_with_2_and_the_same_text_for_people_and_programs(daybreak: Run, folder: Path) -> None:
    ended = daybreak("train", "model.yaml", "--day", DAYS[2], "--no-ray", "--json", "--set", "train.workers=many")
    assert ended.code == 2 and ended.err == f"daybreak: {ended.json['error']}\n"
    assert "model.yaml: train.workers: wrong value\n  got 'many'" in ended.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["trian", "model.yaml"], "No such command 'trian'"),
        (["train", "model.yaml"], "Missing option '--day'"),
        (["train", "model.yaml", "--dya", DAYS[0]], "No such option: --dya"),
        (["simulate", "out", "--days", "two"], "Invalid value for '--days'"),
        (["predict", "model.yaml", "--day", DAYS[0]], "Missing option '--out'"),
    ],
)
def test_a_wrong_option_ends_with_2_and_the_way_to_the_help(daybreak: Run, arguments: list[str], text: str) -> None:
    ended = daybreak(*arguments)
    assert ended.code == 2 and text in ended.err and "--help' for help" in ended.err and ended.out == ""


@pytest.mark.parametrize("option", ["--day", "--from", "--through", "--start"])
def test_a_day_that_is_none_is_told_with_its_option(daybreak: Run, folder: Path, option: str) -> None:
    verb = {"--day": ["train", "model.yaml"], "--start": ["simulate", "out"]}.get(option, ["nightly", "model.yaml"])
    ended = daybreak(*verb, option, "2026-02-30")
    assert ended.code == 2
    assert ended.err.startswith(f"daybreak: {option}: not a day\n  got '2026-02-30'\n  expected YYYY-MM-DD")
    assert "\n  -> give a day of the calendar" in ended.err


def test_ctrl_c_ends_with_1_and_says_how_to_go_on(daybreak: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(paths: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster.doctor, "examine", interrupted)
    ended = daybreak("doctor")
    assert (ended.code, ended.err) == (1, "daybreak: stopped; run the same command again to go on\n")


def test_our_own_fault_is_not_dressed_up(daybreak: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(paths: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cluster.doctor, "examine", broken)
    with pytest.raises(ZeroDivisionError):  # Python prints the traceback and ends with 1
        daybreak("doctor")


def test_help_names_every_verb(daybreak: Run) -> None:
    ended = daybreak("--help")
    assert ended.code == 0
    assert all(verb in ended.out for verb in ("doctor", "simulate", "train", "nightly", "predict", "status"))


# Verbs.


def test_doctor_ends_with_2_when_something_is_not_good(daybreak: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    good = [f["good"] for f in daybreak("doctor", str(tmp_path), "--json").json["findings"] if f["name"] != "memory"]
    assert {True, None} == set(good)
    ended = daybreak("doctor", str(tmp_path / "file" / "x"), "--json")
    assert ended.code == 2 and ended.json["ok"] is False
    assert ended.json["findings"][-1]["found"] == "Not a directory" and "make it writable" in ended.err


def test_train_makes_one_day_and_the_second_time_says_so(daybreak: Run, fresh: Path) -> None:
    first = daybreak("train", "model.yaml", "--day", DAYS[0], "--no-ray", "--json")
    assert first.code == 0 and first.json["trained"] is True and first.json["state"] == "written"
    again = daybreak("train", "model.yaml", "--day", DAYS[0], "--no-ray", "--json")
    assert again.code == 0 and again.json == first.json | {"trained": False}
    assert f"day {DAYS[0]} is trained already" in again.err


def test_set_overrides_the_file_as_often_as_it_is_given(daybreak: Run, fresh: Path) -> None:
    sets = ("--set", "checkpoints.path=elsewhere", "--set", "name=other")
    assert daybreak("train", "model.yaml", "--day", DAYS[0], "--no-ray", *sets).code == 0
    assert (fresh / "elsewhere" / "other" / f"day={DAYS[0]}" / "manifest.json").exists()
    assert not (fresh / "checkpoints").exists()


def test_status_without_checkpoints_says_so(daybreak: Run, fresh: Path) -> None:
    ended = daybreak("status", "model.yaml")
    assert ended.code == 0 and "no day is done yet in" in ended.out and "champion: none" in ended.out
    assert daybreak("status", "model.yaml", "--json").json == {
        "model": "tiny",
        "champion": None,
        "serving": None,
        "lock": None,
        "days": [],
        "ledger": [],
    }


def test_status_shows_the_days_and_which_one_serves(daybreak: Run, folder: Path) -> None:
    ended = daybreak("status", "model.yaml", "--json")
    days = ended.json["days"]
    assert [(day["day"], day["trained"]) for day in days] == [(DAYS[0], False), (DAYS[1], False)]
    promoted = [day["day"] for day in days if day["state"] == "promoted"]
    assert ended.json["champion"] == promoted[-1] and f"champion: {promoted[-1]}" in ended.err


def test_evaluate_finds_what_the_night_found_on_the_same_day(daybreak: Run, folder: Path) -> None:
    ended = daybreak("evaluate", "model.yaml", "--day", DAYS[1], "--model-day", DAYS[0], "--no-ray", "--json")
    of_the_night = daybreak("status", "model.yaml", "--json").json["days"][1]["metrics"]
    assert ended.json["metrics"] == of_the_night  # the same rows by the same weights: to the last digit
    unknown = daybreak("evaluate", "model.yaml", "--day", DAYS[1], "--model-day", DAYS[2], "--no-ray")
    assert unknown.code == 2 and f"no checkpoint of day {DAYS[2]}" in unknown.err


def test_predict_refuses_while_nothing_is_promoted(daybreak: Run, fresh: Path) -> None:
    daybreak("train", "model.yaml", "--day", DAYS[0], "--no-ray")
    ended = daybreak("predict", "model.yaml", "--day", DAYS[1], "--out", "scores", "--no-ray")
    assert ended.code == 2 and "tiny: no model is promoted yet\n  -> run nightly first" in ended.err
    assert not (fresh / "scores").exists()


def predictions(folder: Path) -> dict[str, np.ndarray]:
    [path] = folder.iterdir()
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def test_predict_writes_the_keys_every_address_and_the_score(daybreak: Run, folder: Path) -> None:
    ended = daybreak("predict", "model.yaml", "--day", DAYS[2], "--out", "scores", "--no-ray", "--json")
    champion = daybreak("status", "model.yaml", "--json").json["champion"]
    expected = {"model": "tiny", "day": DAYS[2], "trained_through": champion, "rows": 800, "out": "scores"}
    assert ended.code == 0 and ended.json == expected
    found = predictions(folder / "scores")
    addresses = ["click@all", "cart@click", "cart@all", "watch@click"]
    assert list(found) == ["impression_id", "category", *addresses, "score"]
    logs = pq.read_table(folder / "logs" / f"day={DAYS[2]}", partitioning=None).to_pandas().set_index("impression_id")
    assert sorted(found["impression_id"]) == sorted(logs.index)
    assert (logs.loc[found["impression_id"], "category"] == found["category"]).all(), "a row keeps its keys"
    assert all(((found[a] > 0) & (found[a] < 1)).all() for a in addresses[:3])
    # float32 products and logarithms of numbers near 0.1
    np.testing.assert_allclose(found["cart@all"], found["click@all"] * found["cart@click"], rtol=1e-5)
    np.testing.assert_allclose(found["score"], found["click@all"], rtol=1e-5)  # the first address, to the power of one


def test_a_regression_is_predicted_in_the_unit_of_its_label(daybreak: Run, folder: Path) -> None:
    command = ("predict", "model.yaml", "--day", DAYS[2], "--no-ray", "--out")
    assert daybreak(*command, "seconds").code == 0
    assert daybreak(*command, "logarithms", "--set", "tasks.watch.transform=none").code == 0
    seconds, logarithms = (predictions(folder / name)["watch@click"] for name in ("seconds", "logarithms"))
    np.testing.assert_allclose(seconds, np.expm1(logarithms), rtol=1e-5)  # float32


def test_the_score_is_the_product_of_the_powers_in_the_configuration(daybreak: Run, folder: Path) -> None:
    command = ("predict", "model.yaml", "--day", DAYS[2], "--out", "scores", "--no-ray", "--set")
    assert daybreak(*command, "fusion.powers={click@all: 2, cart@click: 0.5}").code == 0
    found = predictions(folder / "scores")
    np.testing.assert_allclose(found["score"], found["click@all"] ** 2 * np.sqrt(found["cart@click"]), rtol=1e-5)
    wrong = daybreak(*command, "fusion.powers={clik@all: 1}")
    assert wrong.code == 2 and "no prediction has the address 'clik@all'\n  -> did you mean 'click@all'?" in wrong.err


def test_days_of_the_calendar_are_days() -> None:
    assert cli._day("2024-02-29", "--day") == datetime.date(2024, 2, 29)
