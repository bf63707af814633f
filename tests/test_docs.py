"""The docs say what the program does: every key, every verb, every file that they name is there."""

import dataclasses
import datetime
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.fs
import pytest
import torch
import yaml

from cluster.cli import app
from embeddings.client import ShardedEmbeddings
from embeddings.jagged import Jagged
from embeddings.optim import RowwiseAdagrad
from embeddings.shard import Shard
from embeddings.snapshot import Snapshot
from embeddings.table import Admission, TableConfig
from trainer import config
from trainer.auxiliary import AUXILIARIES
from trainer.balance import BALANCERS
from trainer.bodies import BODIES
from trainer.configfile import load
from trainer.encoders import ENCODERS
from trainer.learner import check
from trainer.losses import LOSSES
from trainer.pieces import ByTask

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PIECES: dict[str, type] = {**BODIES, **ENCODERS, **AUXILIARIES, **LOSSES, **BALANCERS}
MODELS, _, WALK = (ROOT / "docs" / "models.md").read_text().partition("\n## Adding a body")
SECTIONS = [kind for name, kind in vars(config).items() if name.endswith("Config")] + [Admission]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_key_of_the_configuration_is_explained(section: type) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    missing = [field.name for field in dataclasses.fields(section) if not re.search(rf"\b{field.name}\b", page)]
    assert not missing, f"docs/configuration.md does not mention {missing}"


def sections(page: str) -> Iterator[tuple[str, str]]:
    """Headings of the second and third order, and what stands below each."""
    for part in re.split(r"^###? ", page, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        yield heading, text


def assert_shown(settings: dict[str, Any], text: str) -> None:
    """Each setting stands in backticks, where it is named first with its default, if it has one: `top_k: 2`."""
    written = reversed(re.findall(r"`(\w+): ([^`]+)`", text))
    shown = {name: yaml.safe_load(value) for name, value in written}
    for name, default in settings.items():
        if default in (None, "", (), dataclasses.MISSING):
            assert re.search(rf"`{name}\b", text), f"`{name}` is not explained"
        else:
            assert shown.get(name) == (list(default) if isinstance(default, tuple) else default), name


@pytest.mark.parametrize("kind", PIECES)
def test_every_piece_has_a_section_that_shows_its_settings_and_their_defaults(kind: str) -> None:
    [text] = [text for heading, text in sections(MODELS) if f"`{kind}`" in heading]
    parameters = inspect.signature(PIECES[kind]).parameters.values()
    settings = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert_shown({p.name: None if p.annotation == ByTask else p.default for p in settings}, text)


@pytest.mark.parametrize(
    ("heading", "section"),
    [
        ("The probability graph", config.TaskConfig),
        ("The probability graph", config.PropensityConfig),
        ("Position bias", config.PositionConfig),
    ],
)
def test_every_setting_of_a_task_and_of_positions_stands_with_its_default(heading: str, section: type) -> None:
    text = dict(sections(MODELS))[heading]
    assert_shown({field.name: field.default for field in dataclasses.fields(section)}, text)


def snippets(page: str, language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    return found


@pytest.mark.parametrize("snippet", snippets(MODELS, "yaml"), ids=lambda text: text.splitlines()[-1].strip())
def test_every_configuration_of_the_models_page_is_good_on_top_of_the_demo(snippet: str, tmp_path: Path) -> None:
    path = tmp_path / "snippet.yaml"
    path.write_text(f"extends: {ROOT / 'configs' / 'demo.yaml'}\n{snippet}")
    check(load(str(path)))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert named - set(re.findall(r"^\s*def (test_\w+)", tests, flags=re.MULTILINE)) == set()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_between_pages_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and (not anchor or anchor in anchors(target)), link


def insert(path: Path, text: str, before: str) -> None:
    """Put text before the last place where `before` stands."""
    head, mark, tail = path.read_text().rpartition(before)
    assert mark, f"{path} has no {before!r}"
    path.write_text(head + text + mark + tail)


@pytest.mark.slow
def test_the_walk_through_of_a_new_body_works_as_it_is_written(tmp_path: Path) -> None:
    for folder in ("trainer", "tests", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    body, line, variant, settings, proof = snippets(WALK, "python")
    [technique] = snippets(WALK, "yaml")
    bodies, tests = tmp_path / "trainer" / "bodies.py", tmp_path / "tests" / "trainer"
    insert(bodies, f"{body}\n\n", before="BODIES: dict")
    insert(bodies, line, before="}\n")
    insert(tests / "test_bodies.py", variant, before="}\n\n\ndef assert_close")
    insert(tests / "test_bodies.py", f"{proof}\n\n", before="def test_every_body_is_tested")
    insert(tests / "test_combinations.py", settings, before="}\nWATCH")
    (tmp_path / "configs" / "techniques" / "cross_stitch.yaml").write_text(technique)
    which = "stitch and (not test_the_number_of_workers or ESMM-fixed) or test_every_body"
    files = ["tests/trainer/test_bodies.py", "tests/trainer/test_combinations.py", "tests/e2e/test_techniques.py"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", which],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert int(re.findall(r"(\d+) passed", ended.stdout)[-1]) > 15, ended.stdout


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
