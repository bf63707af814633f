"""What only the pieces themselves can tell of a configuration: which labels a loss can learn, which heads it fits."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.config import Config
from trainer.configfile import load
from trainer.errors import UserError
from trainer.learner import build_graph, open_logs

CONFIG = """
name: tiny
data: {{path: {logs}, group: request}}
features: {{item: {{kind: id, table: item}}}}
tables: {{item: {{dim: 4}}}}
tasks: {{click: {{}}, time: {task}}}
model: {{body: {{kind: shared_bottom, layers: [8]}}}}
"""


def config(folder: Path, task: str) -> Config:
    (folder / "model.yaml").write_text(CONFIG.format(logs=folder, task=task))
    return load(str(folder / "model.yaml"))


@pytest.mark.parametrize(
    ("task", "bad", "expected"),
    [
        ("{loss: bce}", 2.0, "task with loss: bce.*expected 0, 1 or null"),
        ("{loss: weighted_logistic}", -1.0, "loss: weighted_logistic.*got -1.0.*expected numbers from 0 up, or null"),
        ("{loss: {kind: cread, thresholds: [1, 2]}}", -1.0, "loss: cread.*numbers from 0 up, or null"),
        ("{loss: {kind: d2q, by: '2 * time'}}", -1.0, "loss: d2q.*numbers from 0 up, or null"),
        ("{loss: softmax}", -1.0, "loss: softmax.*numbers from 0 up, or null"),
        ("{loss: approx_ndcg}", 31.0, "loss: approx_ndcg.*got 31.0.*expected numbers from 0 to 30, or null"),
        ("{loss: mse, transform: log1p, scale: 0.5}", -2.0, "transform: log1p.*got -2.0.*numbers above -2, or null"),
    ],
)
def test_a_label_that_a_loss_cannot_learn_stops_with_its_row(
    tmp_path: Path, task: str, bad: float, expected: str
) -> None:
    day = tmp_path / "day=2026-11-01"
    day.mkdir()
    time = [0.0, 1.0, None, bad]
    table = pa.table({"item": [1, 2, 3, 4], "request": [0, 0, 1, 1], "click": [0, 1, 1, 0], "time": time})
    pq.write_table(table, day / "part.parquet")
    logs = open_logs(config(tmp_path, task))
    with pytest.raises(UserError) as refused:
        logs.decode(logs.plan(logs.intervals()[0]).row_groups[0])
    text = str(refused.value).replace("\n", " ")
    assert "row 3" in text
    assert re.search(expected, text), text


@pytest.mark.parametrize(
    ("loss", "head", "words"),
    [
        (
            "mse",
            "click@all",
            "a loss that does not fit click@all.*got loss: mse.*expected a binary loss, or one in lists",
        ),
        ("bce", "time@all", "a loss that does not fit time@all.*got loss: bce.*expected a regression loss"),
        ("{kind: cread, thresholds: [1, 2]}", "time@all", "got loss: cread"),
        ("huber, scale: 2", "time@all", "another unit than the head's.*got transform: none, scale: 2.0.*scale: 1.0"),
    ],
)
def test_a_second_loss_of_another_kind_than_its_head_is_refused(
    tmp_path: Path, loss: str, head: str, words: str
) -> None:
    text = CONFIG.format(logs=tmp_path, task="{loss: mse}").replace(
        "tasks: {", f"tasks: {{again: {{label: time, loss: {loss}, head: {head}}}, "
    )
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(UserError, match=f"(?s){words}"):
        build_graph(load(str(tmp_path / "model.yaml")))
