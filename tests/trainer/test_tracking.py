"""Tracking on sqlite.

The oracle is the database itself, read with sqlite3 beside MLflow. One database serves all tests, because making one
takes seconds; every test has a model, and so an experiment, of its own.
"""

import contextlib
import io
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.tracking import ModelVersion, Tracking, metric_name


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "made" / "mlflow.db"


@pytest.fixture(scope="module")
def said(database: Path) -> str:
    """What is printed while the database is made."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        Tracking(f"sqlite:///{database}", "first")
    return out.getvalue() + err.getvalue()


@pytest.fixture
def tracking(database: Path, said: str, request: pytest.FixtureRequest) -> Tracking:
    return Tracking(f"sqlite:///{database}", request.node.name)


def log(
    tracking: Tracking,
    day: str = "2026-11-20",
    checkpoint: str = "c1",
    metrics: dict[str, float] | None = None,
    params: dict[str, object] | None = None,
    files: dict[str, bytes] | None = None,
) -> str:
    return tracking.log_day(
        day, params=params or {}, metrics=metrics or {}, tags={"checkpoint": checkpoint}, files=files or {}
    )


def rows(tracking: Tracking, query: str, *values: object) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(tracking.uri.removeprefix("sqlite:///"))) as connection:
        return connection.execute(query, values).fetchall()


def runs(tracking: Tracking) -> list[tuple[Any, ...]]:
    """(run id, name, status) of the runs that the experiment's page shows."""
    return rows(
        tracking,
        "SELECT run_uuid, runs.name, status FROM runs JOIN experiments USING (experiment_id)"
        " WHERE experiments.name = ? AND runs.lifecycle_stage = 'active' ORDER BY start_time",
        tracking.model,
    )


def test_a_new_database_is_made_without_a_word(said: str) -> None:
    assert said == ""


def test_a_day_logged_twice_is_one_finished_run(tracking: Tracking) -> None:
    first = log(tracking, metrics={"click@all/auc": 0.6})
    assert log(tracking, metrics={"click@all/auc": 0.6}) == first
    assert runs(tracking) == [(first, "2026-11-20", "FINISHED")]


def test_a_run_cut_short_is_replaced_by_a_whole_one(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(run_id: str, status: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracking._client, "set_terminated", die)
        log(tracking)
    [(broken, _, status)] = runs(tracking)
    whole = log(tracking)
    assert status == "RUNNING" and whole != broken
    assert runs(tracking) == [(whole, "2026-11-20", "FINISHED")]


def test_another_checkpoint_of_the_same_day_is_a_second_run(tracking: Tracking) -> None:
    first = log(tracking, checkpoint="c1", metrics={"click@all/auc": 0.6})
    second = log(tracking, checkpoint="c2", metrics={"click@all/auc": 0.7})
    assert [run for run, _, _ in runs(tracking)] == [first, second]
    assert tracking.history(["click@all/auc"]) == [("2026-11-20", {"click@all/auc": 0.7})]


def test_a_metric_comes_back_under_its_own_name_whatever_mlflow_calls_it(tracking: Tracking) -> None:
    run = log(tracking, metrics={"click@all/auc": 0.625, "samples_per_s": 41000})
    stored = rows(tracking, "SELECT key, value FROM latest_metrics WHERE run_uuid = ? ORDER BY key", run)
    assert stored == [("click.all/auc", 0.625), ("samples_per_s", 41000.0)]
    assert tracking.history(["click@all/auc", "absent"]) == [("2026-11-20", {"click@all/auc": 0.625})]
    assert metric_name("rows: a_b-c.d/e") == "rows: a_b-c.d/e"


def test_nan_and_infinity_are_stored_as_nan(tracking: Tracking) -> None:
    log(tracking, metrics={"a": math.nan, "b": math.inf, "c": 1.0})
    [(_, values)] = tracking.history(["a", "b", "c"])
    assert math.isnan(values["a"]) and math.isnan(values["b"]) and values["c"] == 1.0


def test_more_metrics_and_params_than_one_call_takes_all_arrive(tracking: Tracking) -> None:
    run = log(tracking, metrics={f"m{i}": i for i in range(1001)}, params={f"p{i}": i for i in range(101)})
    assert rows(tracking, "SELECT count(*), sum(value) FROM latest_metrics WHERE run_uuid = ?", run) == [(1001, 500500)]
    assert rows(tracking, "SELECT count(*) FROM params WHERE run_uuid = ?", run) == [(101,)]


def test_a_long_parameter_is_cut_visibly(tracking: Tracking) -> None:
    run = log(tracking, params={"short": [1, 2], "long": "x" * 7000})
    stored = dict(rows(tracking, "SELECT key, value FROM params WHERE run_uuid = ?", run))
    assert stored["short"] == "[1, 2]"
    assert len(stored["long"]) == 6000 and stored["long"].endswith("x ... (cut: 7000 characters)")


def test_artifacts_lie_beside_the_database_wherever_one_stands(
    tracking: Tracking, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = log(tracking, files={"checkpoint/manifest.json": b"{}", "days.png": b"\x89PNG"})
    folder = database.parent / "mlartifacts" / tracking.model / run / "artifacts"
    assert (folder / "checkpoint" / "manifest.json").read_bytes() == b"{}"
    assert (folder / "days.png").read_bytes() == b"\x89PNG"
    assert list(tmp_path.iterdir()) == []


def test_a_relative_uri_is_relative_to_the_current_directory(
    tracking: Tracking, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = log(tracking)
    monkeypatch.chdir(database.parent)
    relative = Tracking("sqlite:///mlflow.db", tracking.model)
    monkeypatch.chdir(tmp_path)
    assert relative.uri == tracking.uri and log(relative) == run


def test_a_run_is_registered_once(tracking: Tracking) -> None:
    first, second = log(tracking, checkpoint="c1"), log(tracking, checkpoint="c2")
    assert [tracking.register(run, tags={"day": "2026-11-20"}) for run in (first, first, second, first)] == [1, 1, 2, 1]
    sources = rows(tracking, "SELECT source FROM model_versions WHERE name = ? ORDER BY version", tracking.model)
    assert sources == [(f"runs:/{first}/checkpoint",), (f"runs:/{second}/checkpoint",)]


def test_an_alias_moves_to_the_version_it_is_set_to(tracking: Tracking) -> None:
    assert tracking.alias("champion") is None  # no registered model yet
    first, second = log(tracking, checkpoint="c1"), log(tracking, checkpoint="c2")
    old, new = (tracking.register(run, tags={"of": run}) for run in (first, second))
    assert tracking.alias("champion") is None
    tracking.set_alias("champion", old)
    assert tracking.alias("champion") == ModelVersion(old, first, {"of": first})
    tracking.set_alias("champion", new)
    assert tracking.alias("champion") == ModelVersion(new, second, {"of": second})


def test_history_is_sorted_by_day_and_keeps_the_newest_runs(tracking: Tracking) -> None:
    for auc, day in enumerate(("2026-11-19", "2026-11-21", "2026-11-20")):
        log(tracking, day=day, metrics={"auc": auc})
    assert tracking.history(["auc"]) == [(f"2026-11-{day}", {"auc": auc}) for day, auc in ((19, 0), (20, 2), (21, 1))]
    assert [day for day, _ in tracking.history(["auc"], limit=2)] == ["2026-11-20", "2026-11-21"]


def test_a_deleted_experiment_is_told_with_the_way_to_restore_it(tracking: Tracking) -> None:
    tracking._client.delete_experiment(tracking._experiment)
    with pytest.raises(UserError, match=f"mlflow experiments restore -x {tracking._experiment}"):
        Tracking(tracking.uri, tracking.model)


def test_what_mlflow_refuses_is_a_user_error_that_says_why(tracking: Tracking) -> None:
    with pytest.raises(UserError, match="(?s)did not do.*not found.*same command again"):
        tracking.set_alias("champion", 7)


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("http://127.0.0.1:9", "server does not answer.*refused"),  # the discard port: nobody listens
        ("sqlite:///{folder}", "database cannot be opened.*unable to open"),
        ("sqlite:///{folder}/text.db", "database cannot be opened.*not a database"),
        ("postgresql://host/mlflow", "not an address.*got 'postgresql.*expected sqlite:///FILE or http"),
        ("mlflow.db", "not an address.*got 'mlflow.db'"),
        ("sqlite:///:memory:", "not an address"),
    ],
)
def test_an_address_that_leads_nowhere_is_a_user_error_at_once(uri: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database\n" * 100)
    with pytest.raises(UserError, match=f"(?s){text}"):
        Tracking(uri.format(folder=tmp_path), "model")
