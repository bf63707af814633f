"""The command line, in this process: what stands on stdout, what on stderr, and how it ends.

One night over two tiny simulated days is made once, with one MLflow database. Oracles: json with nothing but JSON
allowed, the logs themselves for what predict copies, and the night's own report for what the other verbs say.
"""

import datetime
import json
import math
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Ended, Run

import cluster.doctor
from cluster import cli
from cluster.lock import Lock
from trainer.storage import Storage
from trainer.tracking import Tracking

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
GENEROUS = ("--set", "nightly.gate={addresses: [click@all], floor: null, tolerance: null, paired_tolerance: null}")
STANDS = {"state": "state", "since": "at", "reason": "reason"}
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
    ended = daybreak("nightly", "model.yaml", "--no-ray", "--set", "nightly.gate.floor=1")
    assert ended.code == 0 and ended.err == ""
    assert f"{DAYS[2]} held: auc: click@all is 0." in ended.out, "an AUC of 1 is asked for, which no model has"
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
    verbs = "doctor simulate train nightly predict export evaluate status promote rollback verify".split()
    assert all(verb in ended.out for verb in verbs)


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
        "late": [],
    }


def test_status_shows_the_days_and_which_one_serves(daybreak: Run, folder: Path) -> None:
    ended = daybreak("status", "model.yaml", "--json")
    days = ended.json["days"]
    assert [(day["day"], day["trained"]) for day in days] == [(DAYS[0], False), (DAYS[1], False)]
    promoted = [day["day"] for day in days if day["state"] == "promoted"]
    assert ended.json["champion"] == promoted[-1] and f"champion: {promoted[-1]}" in ended.err


def test_status_tells_where_each_day_stands_since_when_and_why(daybreak: Run, folder: Path) -> None:
    ledger = folder / "checkpoints" / "tiny" / f"day={DAYS[1]}" / "ledger.json"
    entries = json.loads(ledger.read_text())["entries"]
    ended = daybreak("status", "model.yaml", "--json")
    assert [of["day"] for of in ended.json["ledger"]] == DAYS[:2]
    last = entries[-1]
    assert ended.json["ledger"][1] == {k: last[of] for k, of in STANDS.items()} | {"day": DAYS[1]}
    assert last["at"] in ended.err and ended.json["lock"] is None
    (folder / "checkpoints" / "tiny" / f"day={DAYS[2]}").mkdir()
    failed = [{"state": "planned", "at": "t0", "reason": ""}, {"state": "failed", "at": "t1", "reason": "[disk] full"}]
    (folder / "checkpoints" / "tiny" / f"day={DAYS[2]}" / "ledger.json").write_text(json.dumps({"entries": failed}))
    words = daybreak("status", "model.yaml").out
    assert all(word in words for word in (DAYS[2], "failed", "[disk] full")) and "running" not in words
    one = daybreak("status", "model.yaml", "--day", DAYS[1], "--json")
    assert one.json["entries"] == entries and all(entry["state"] in one.err for entry in entries)
    none = daybreak("status", "model.yaml", "--day", "2020-01-01")
    assert none.code == 2 and "nothing is known of day 2020-01-01" in none.err


def test_who_holds_the_lock_is_told_by_status_and_to_those_who_are_refused(daybreak: Run, folder: Path) -> None:
    with Lock(Storage(str(folder / "checkpoints" / "tiny" / "lock")), "nightly"):
        ended = daybreak("status", "model.yaml", "--json")
        who = f"nightly, process {os.getpid()} on {socket.gethostname()}, since {ended.json['lock']['since']}"
        assert ended.json["lock"]["pid"] == os.getpid() and f"running: {who}; last heartbeat 0 s ago" in ended.err
        for verb in ("nightly", "train --day 2026-11-03", "rollback --to 2026-11-01", "promote --day 2026-11-01"):
            name, *options = verb.split()
            refused = daybreak(name, "model.yaml", *options, "--json")
            assert refused.code == 2 and f"another night runs\n  got {who}" in refused.json["error"]
        for verb in ("verify", f"predict --day {DAYS[2]} --out scores --no-ray"):
            name, *options = verb.split()
            assert daybreak(name, "model.yaml", *options).code == 0, "they only read"
    assert daybreak("status", "model.yaml", "--json").json["lock"] is None


def test_rollback_and_promote_say_what_serves_and_predict_and_export_follow(daybreak: Run, folder: Path) -> None:
    daybreak("nightly", "model.yaml", "--no-ray", *GENEROUS)
    before = daybreak("status", "model.yaml", "--json").json
    assert before["champion"] == DAYS[2] and before["serving"]["by"] == "gate"
    back = daybreak("rollback", "model.yaml", "--to", DAYS[0], "--json")
    assert back.code == 0 and (back.json["champion"], back.json["by"]) == (DAYS[0], "rollback")
    assert (back.json["before"], back.json["before_since"]) == (DAYS[2], before["serving"]["since"])
    assert f"{DAYS[0]} serves since {back.json['since']} by rollback" in back.err and back.json["alias"] is True
    assert Tracking("sqlite:///mlflow.db", "tiny").alias("champion").tags["day"] == DAYS[0]
    predicted = daybreak("predict", "model.yaml", "--day", DAYS[2], "--out", "scores", "--no-ray", "--json")
    assert predicted.json["trained_through"] == DAYS[0]
    sets = ("--set", "serving.item=[item_id, price]")
    assert daybreak("export", "model.yaml", "--out", "served", *sets, "--json").json["trained_through"] == DAYS[0]
    again = daybreak("rollback", "model.yaml", "--to", DAYS[0])
    assert f"{DAYS[0]} serves already, since {back.json['since']} by rollback" in again.out
    forth = daybreak("promote", "model.yaml", "--day", DAYS[1], "--force", "--json")
    assert (forth.json["champion"], forth.json["by"], forth.json["before"]) == (DAYS[1], "force", DAYS[0])
    assert f"champion: {DAYS[1]} since {forth.json['since']} by force" in daybreak("status", "model.yaml").out
    refused = daybreak("rollback", "model.yaml", "--to", "2026-10-01")
    assert refused.code == 2 and "no checkpoint of day 2026-10-01" in refused.err


def test_again_trains_anew_from_a_day_on_and_ends_with_the_same_models(daybreak: Run, folder: Path) -> None:
    daybreak("nightly", "model.yaml", "--no-ray", *GENEROUS)
    first = daybreak("status", "model.yaml", "--json").json
    ended = daybreak("nightly", "model.yaml", "--no-ray", "--again", DAYS[1], *GENEROUS, "--json")
    assert [day["trained"] for day in ended.json["days"]] == [False, True, True]
    for day, want in zip(ended.json["days"], first["days"], strict=True):
        assert {k: day[k] for k in ("metrics", "losses", "ids")} == {k: want[k] for k in ("metrics", "losses", "ids")}
    entries = daybreak("status", "model.yaml", "--day", DAYS[1], "--json").json["entries"]
    assert [e["reason"] for e in entries if e["state"] == "dropped"] == [f"nightly --again {DAYS[1]}"]
    assert daybreak("status", "model.yaml", "--json").json["champion"] == DAYS[2]
    wrong = daybreak("nightly", "model.yaml", "--no-ray", "--again", "2026-10-01", *GENEROUS)
    assert wrong.code == 2 and "day 2026-10-01 was never trained" in wrong.err


def test_verify_reads_every_file_and_names_the_one_that_is_damaged(daybreak: Run, folder: Path) -> None:
    ended = daybreak("verify", "model.yaml", "--json")
    assert ended.code == 0 and ended.json["ok"] is True and [day["day"] for day in ended.json["days"]] == DAYS[:2]
    [dense] = (folder / "checkpoints" / "tiny" / f"day={DAYS[1]}").rglob("dense.safetensors")
    content = bytearray(dense.read_bytes())
    content[len(content) // 2] ^= 1
    dense.write_bytes(content)
    ended = daybreak("verify", "model.yaml", "--json")
    assert ended.code == 2 and [day["ok"] for day in ended.json["days"]] == [True, False]
    assert f"{DAYS[0]}: every file is as it was written" in ended.err and f"{dense.name}: a checkpoint" in ended.err
    assert daybreak("verify", "model.yaml", "--day", DAYS[0]).code == 0


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
