"""The docs say what the program does: every key, every verb, every file that they name is there."""

import dataclasses
import re
from pathlib import Path

import pytest

from cluster.cli import app
from trainer import config
from trainer.bodies import BODIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = [kind for name, kind in vars(config).items() if name.endswith("Config")]


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
