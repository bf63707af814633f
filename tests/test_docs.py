"""The docs say what the program does: every key, every verb, every file that they name is there."""

import dataclasses
import datetime
import re
from pathlib import Path

import duckdb
import pyarrow.fs
import pytest
import torch

from cluster.cli import app
from embeddings.client import ShardedEmbeddings
from embeddings.jagged import Jagged
from embeddings.optim import RowwiseAdagrad
from embeddings.shard import Shard
from embeddings.snapshot import Snapshot
from embeddings.table import Admission, TableConfig
from trainer import config
from trainer.bodies import BODIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = [kind for name, kind in vars(config).items() if name.endswith("Config")] + [Admission]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_key_of_the_configuration_is_explained(section: type) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    missing = [field.name for field in dataclasses.fields(section) if not re.search(rf"\b{field.name}\b", page)]
    assert not missing, f"docs/configuration.md does not mention {missing}"


def test_every_body_is_explained() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert [kind for kind in BODIES if kind not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_verb_that_a_page_shows_exists(page: Path) -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    shown = set(re.findall(r"^\s*(?:\.venv/bin/)?daybreak ([a-z]+)", page.read_text(), flags=re.MULTILINE))
    assert shown <= verbs


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    folders = "embeddings|trainer|cluster|tests|configs|docs"
    named = re.findall(rf"\b((?:{folders})/[\w/.-]+\.(?:py|md|yaml))", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_query_that_a_page_shows_finds_the_most_valuable_rows_of_a_checkpoint(tmp_path: Path) -> None:
    ids = torch.arange(40)
    shard = Shard({"article": TableConfig(dim=4)}, RowwiseAdagrad())
    shard.begin_day(datetime.date(2017, 10, 12).toordinal())
    store = ShardedEmbeddings(shard, {"article_id": "article"})
    for seen in range(1, 41):  # id n is seen 40 - n times
        few = ids[: 41 - seen]
        store.pull({"article_id": Jagged(few, torch.arange(few.numel() + 1))}, insert=True)
    folder = tmp_path / "checkpoints/globo/day=2017-10-12/0123456789ab/rows"
    Snapshot(shard, base=True).write(pyarrow.fs.LocalFileSystem(), str(folder))
    (query,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "embeddings.md").read_text(), flags=re.DOTALL)
    found = duckdb.sql(query.replace("'checkpoints", f"'{tmp_path}/checkpoints")).fetchall()
    day = datetime.date(2017, 10, 12)
    assert found == [(n, 40 - n, 40.0 - n, day, 0.0) for n in range(10)]  # new rows are zeros
