"""The house: packages import only those on their left, files only those above them, and each giant has one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["embeddings", "trainer", "tune", "cluster"]

# Reading order is import order. A file may import those before it, in its own package, and anything of the packages on
# the left.
ORDER = {
    "embeddings": "pulse table jagged buckets dedupe idmap exchange shared_memory optim kernels pool tallies admission "
    "shard accounts client pooling freeze snapshot rowfile",
    "trainer": "errors intervals storage ledger expressions usual sanity gate config checks configfile pieces lanes "
    "schema columns hours files folders delivery drift plan data due late draws numbers features layers "
    "bodies encoders towers losses heads auxiliary model objective balance health learner counted dense step "
    "bootstrap metrics facts norms agree quarantine checkpoint writing retention saving predictions parts "
    "serving pictures tracking day watch nodes workers",
    "tune": "space search fusion",
    "cluster": "simulate lock morning promotion late status nightly predict export doctor tables cli",
}

# Who may import what is large, slow to start, or likely to change under us.
DOORS = {
    "fbgemm_gpu": {"embeddings/kernels.py"},
    "numba": {f"embeddings/{name}.py" for name in ("buckets", "dedupe", "idmap", "kernels", "tallies", "admission")},
    "ray": {"trainer/nodes.py", "trainer/workers.py"},
    "mlflow": {"trainer/tracking.py"},
    "optuna": {"tune/search.py"},
    "matplotlib": {"trainer/pictures.py"},
    "yaml": {"trainer/configfile.py"},
    "pydantic": {"trainer/configfile.py"},
    "typer": {"cluster/cli.py"},
    "safetensors": {"trainer/dense.py"},
    "pyarrow": {
        "embeddings/snapshot.py",
        "embeddings/rowfile.py",
        "trainer/storage.py",
        *(
            f"trainer/{name}.py"
            for name in ("schema", "columns", "hours", "files", "folders", "drift", "data", "quarantine")
        ),
        "trainer/predictions.py",
        "trainer/checkpoint.py",
        "cluster/simulate.py",
    },
}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are spelled in full"
            found.add(node.module or "")
    return found


def place(module: str) -> tuple[int, int] | None:
    """Where a module stands in the reading order, or None when it is not ours."""
    package, *rest = module.split(".")
    if package not in PACKAGES:
        return None
    order = ORDER[package].split()
    return (PACKAGES.index(package), order.index(rest[0]) if rest else -1)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", [p for p in files() if p.name != "__init__.py"], ids=module_of)
def test_a_file_imports_only_what_stands_before_it(path: Path) -> None:
    mine = place(module_of(path))
    assert mine is not None
    for module in imports(path):
        theirs = place(module)
        assert theirs is None or theirs < mine or module_of(path).startswith(module + "."), (
            f"{path} must not import {module}"
        )


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_each_giant_is_imported_through_its_one_door(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in FORBIDDEN, f"{name}: nothing we read may run code, and {top} can"
        assert name in DOORS.get(top, {name}), f"{name} must not import {top}: its door is {sorted(DOORS[top])}"


def test_every_file_has_its_place_in_the_reading_order() -> None:
    for package in PACKAGES:
        stems = {path.stem for path in (ROOT / package).glob("*.py")} | {
            p.name for p in (ROOT / package).iterdir() if any(p.glob("*.py"))
        }
        assert stems - {"__init__", "__pycache__"} == set(ORDER[package].split())


def test_the_packages_say_their_reading_order() -> None:
    for package in PACKAGES:
        text = " ".join((ROOT / package / "__init__.py").read_text().split())
        assert ORDER[package].replace(" ", ", ") in text
