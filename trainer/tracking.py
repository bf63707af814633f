"""The MLflow experiment and registered model of one model: the only file that imports mlflow.

In: one finished day (parameters, metrics, tags, files). Out: one finished run a day, one model version a run, and the
aliases (champion ...) that say which version serves. Every call may be repeated after a crash: what is there already is
found, not written again. For the driver only. Importing mlflow takes 2-4 s and a new sqlite database 5 s, so both wait
until a Tracking is made.
"""

import http.client
import math
import os
import re
import sqlite3
import ssl
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import RegisteredModel

# Read by mlflow when it is imported: no usage statistics, no INFO lines, no progress bars, no links on stdout.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
PARAM_LENGTH = 6000
REACH_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ModelVersion:
    """One version of the registered model and the run that it came from."""

    version: int
    run_id: str
    tags: dict[str, str]


class Tracking:
    """The runs and versions of one model in an MLflow database (`sqlite:///FILE`) or on a server
    (`http://HOST:PORT`).
    """

    def __init__(self, uri: str, model: str) -> None:
        """Open the database or reach the server, and make the experiment when it is missing.

        A relative sqlite path is relative to the current directory; artifacts go into `mlartifacts/` beside the file.
        A server keeps the artifacts itself. Every method raises UserError when MLflow cannot do what it is asked.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        self.uri, artifacts = _opened(uri)
        self.model = model
        with self._asking():
            self._client = _client(self.uri)
            self._experiment = self._experiment_id(artifacts)

    def log_day(
        self,
        day: str,
        *,
        params: dict[str, object],
        metrics: dict[str, float],
        tags: dict[str, str],
        files: dict[str, bytes],
    ) -> str:
        """Log a day as one finished run and return its id.

        `tags["checkpoint"]` identifies the checkpoint. A finished run of the same day and checkpoint is returned as it
        is; an unfinished one (its driver died) is deleted. `files` maps the name of an artifact to its content.
        """
        tags = {**tags, "day": day}
        with self._asking():
            runs = self._runs(f"tags.day = '{day}' and tags.checkpoint = '{tags['checkpoint']}'")
            finished = [run.info.run_id for run in runs if run.info.status == "FINISHED"]
            if finished:
                return str(finished[-1])
            for run in runs:
                self._client.delete_run(run.info.run_id)
            run_id = str(self._client.create_run(self._experiment, run_name=day, tags=tags).info.run_id)
            self._log_numbers(run_id, params, metrics)
            self._log_files(run_id, files)
            self._client.set_terminated(run_id, "FINISHED")  # last: a run without it counts as never written
        return run_id

    def register(self, run_id: str, *, tags: dict[str, str]) -> int:
        """The version of a run, made when there is none yet; its source is the run's artifact folder `checkpoint`."""
        with self._asking():
            found = self._client.search_model_versions(f"name = '{self.model}' and run_id = '{run_id}'")
            if found:
                return int(found[0].version)
            if self._registered_model() is None:
                self._client.create_registered_model(self.model)
            source = f"runs:/{run_id}/checkpoint"  # a local path would be refused by a server
            return int(self._client.create_model_version(self.model, source, run_id=run_id, tags=tags).version)

    def alias(self, name: str) -> ModelVersion | None:
        """The version that an alias points to, or None."""
        with self._asking():
            registered = self._registered_model()
            version = registered.aliases.get(name) if registered else None
            if version is None:
                return None
            found = self._client.get_model_version(self.model, str(version))
            return ModelVersion(int(found.version), str(found.run_id), dict(found.tags))

    def set_alias(self, name: str, version: int) -> None:
        """Point an alias to a version, in one atomic move."""
        with self._asking():
            self._client.set_registered_model_alias(self.model, name, str(version))

    def history(self, keys: Iterable[str], limit: int = 400) -> list[tuple[str, dict[str, float]]]:
        """The given metrics of the newest `limit` finished runs, by day; of two runs of a day the later counts."""
        names = {key: metric_name(key) for key in keys}
        with self._asking():
            runs = self._runs("attributes.status = 'FINISHED' and tags.day != ''", limit)
        days = {}
        for run in runs:
            logged = run.data.metrics
            days[run.data.tags["day"]] = {key: logged[name] for key, name in names.items() if name in logged}
        return sorted(days.items())

    def _experiment_id(self, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(self.model)
        if found is None:
            folder = f"{artifacts}/{self.model}" if artifacts else None
            return str(self._client.create_experiment(self.model, artifact_location=folder))
        if found.lifecycle_stage != "active":
            raise UserError(
                f"the experiment {self.model!r} was deleted",
                where=self.uri,
                got=f"experiment {found.experiment_id}, {found.lifecycle_stage}",
                expected="an active experiment",
                do=f"restore it: MLFLOW_TRACKING_URI={self.uri} mlflow experiments restore -x {found.experiment_id}",
            )
        return str(found.experiment_id)

    def _runs(self, condition: str, limit: int = 1000) -> "list[Run]":
        """The newest runs that fulfil the condition, oldest first."""
        found = self._client.search_runs(
            [self._experiment], condition, max_results=limit, order_by=["attributes.start_time DESC"]
        )
        return list(reversed(found))

    def _registered_model(self) -> "RegisteredModel | None":
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(self.model)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _log_numbers(self, run_id: str, params: dict[str, object], metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric, Param

        now_ms = int(time.time() * 1000)
        values = [Metric(metric_name(key), _finite(value), now_ms, 0) for key, value in metrics.items()]
        texts = [Param(metric_name(key), _cut(str(value), PARAM_LENGTH)) for key, value in params.items()]
        for start in range(0, len(values), METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=values[start : start + METRICS_PER_CALL])
        for start in range(0, len(texts), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=texts[start : start + PARAMS_PER_CALL])

    def _log_files(self, run_id: str, files: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._client.log_artifacts(run_id, folder)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            raise UserError(
                "MLflow did not do what it was asked",
                where=self.uri,
                got=_cut(str(error), 500),  # a proxy's answer can be a whole page
                do="mend the cause and run the same command again: what is already logged is not logged twice",
            ) from error


def metric_name(key: str) -> str:
    """The key under which MLflow takes a metric or parameter: `click@all/auc` is `click.all/auc`.

    MLflow accepts letters, digits, space and `_ - . / :`; every other character becomes a point.
    """
    return re.sub(r"[^\w/.\- :]", ".", key)


def _finite(value: float) -> float:
    """NaN stays NaN (MLflow's charts leave a gap); an infinite value would be stored as 1.8e308 and flatten them."""
    return float(value) if math.isfinite(value) else math.nan


def _cut(text: str, length: int) -> str:
    mark = f" ... (cut: {len(text)} characters)"
    return text if len(text) <= length else text[: length - len(mark)] + mark


def _client(uri: str) -> "MlflowClient":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # those between mlflow and its own dependencies
        from mlflow import MlflowClient

        return MlflowClient(uri, registry_uri=uri)


def _opened(uri: str) -> tuple[str, str | None]:
    """The absolute uri, and the folder for artifacts when it is ours to choose; UserError when there is nobody.

    MLflow itself would retry for minutes before it gives up; a mistyped address is told at once.
    """
    if uri.startswith("sqlite:///") and uri not in ("sqlite:///", "sqlite:///:memory:"):
        database = os.path.abspath(uri.removeprefix("sqlite:///"))
        _open_database(uri, database)
        return f"sqlite:///{database}", os.path.join(os.path.dirname(database), "mlartifacts")
    if uri.startswith(("http://", "https://")):
        _reach_server(uri)
        return uri.rstrip("/"), None
    raise UserError(
        "not an address of MLflow that can be used here",
        where="tracking.mlflow",
        got=repr(uri),
        expected="sqlite:///FILE or http://HOST:PORT",
        do="name a database file, or the address of an `mlflow server` that stands before another kind of database",
    )


def _open_database(uri: str, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with closing(sqlite3.connect(path, timeout=REACH_TIMEOUT_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # takes the write lock: says at once if the file is not ours to write
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            "the MLflow database cannot be opened",
            where=uri,
            got=f"{error} ({path})",
            expected="a file that can be written, or a new file in a folder that can be written",
            do="correct tracking.mlflow, or the rights of the folder",
        ) from error


def _reach_server(uri: str) -> None:
    anyone = ssl.create_default_context()  # only asks whether somebody answers: certificates are MLflow's matter
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACH_TIMEOUT_S, context=anyone).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            "the MLflow server does not answer",
            where=uri,
            got=str(getattr(error, "reason", error)),
            expected=f"an answer within {REACH_TIMEOUT_S:.0f} s",
            do="start the server or correct tracking.mlflow; sqlite:///mlflow.db needs no server",
        ) from error
