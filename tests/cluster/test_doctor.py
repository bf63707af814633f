"""The doctor, on this machine and on machines that are made up by changing what it asks."""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_disk import small_disk

from cluster import doctor
from cluster.doctor import FBGEMM_OF_TORCH, Finding, examine

VERSIONS = {
    "torch": "2.13.0",
    "fbgemm-gpu-cpu": "1.8.0",
    "ray": "2.60.0",
    "mlflow": "3.17.2",
    "pyarrow": "25.0.1",
}


def found(name: str, path: Path) -> Finding:
    [finding] = [finding for finding in examine([str(path)]) if finding.name in (name, f"{name} {path}")]
    return finding


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions that the doctor finds; to be changed by the test."""
    versions = dict(VERSIONS)

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    return versions


def test_this_machine_can_run_what_its_tests_run_on(tmp_path: Path) -> None:
    findings = examine([str(tmp_path)])
    by_name = {finding.name: finding for finding in findings}
    assert by_name["python"].found == sys.version.split()[0] and by_name["python"].good
    assert by_name["torch"].found == importlib.metadata.version("torch") and by_name["torch"].good
    assert by_name["fbgemm"].good, "it was imported to run the other tests"
    assert by_name["cores"].found == str(os.cpu_count()) and by_name["cores"].good is None
    assert [finding.name for finding in findings[-1:]] == [f"path {tmp_path}"] and list(tmp_path.iterdir()) == []


def test_the_pinned_versions_fit_each_other() -> None:
    pins = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for torch, fbgemm in [("torch==", "fbgemm-gpu-cpu=="), ("torch==", "fbgemm-gpu==")]:
        torch_minor, fbgemm_minor = (
            ".".join(pins.split(name)[1].split('"')[0].split(".")[:2]) for name in (torch, fbgemm)
        )
        assert FBGEMM_OF_TORCH[torch_minor] == fbgemm_minor


@pytest.mark.parametrize(
    ("changed", "good", "do"),
    [
        ({}, True, ""),
        ({"torch": "2.13.1+cpu", "fbgemm-gpu-cpu": "1.8.2"}, True, ""),
        ({"torch": "2.11.0", "fbgemm-gpu-cpu": "1.6.0"}, True, ""),
        ({"fbgemm-gpu-cpu": "", "fbgemm-gpu": "1.8.0"}, True, ""),
        ({"torch": "2.11.0"}, False, "install fbgemm 1.6.* for torch 2.11.0"),
        ({"fbgemm-gpu-cpu": "1.80.0"}, False, "install fbgemm 1.8.* for torch 2.13.0"),
        ({"fbgemm-gpu-cpu": ""}, False, "install fbgemm 1.8.* for torch 2.13.0"),
        ({"torch": "2.12.0"}, False, "install torch 2.13 or 2.11"),
        ({"torch": ""}, False, "install torch 2.13 or 2.11"),
    ],
)
def test_fbgemm_is_good_only_with_the_torch_that_it_was_built_for(
    tmp_path: Path, installed: dict[str, str], changed: dict[str, str], good: bool, do: str
) -> None:
    for package, version in changed.items():
        installed[package] = version
        if not version:
            del installed[package]
    finding = found("fbgemm", tmp_path)
    assert finding.good is good and (good or finding.do == do)


@pytest.mark.parametrize("package", ["torch", "ray", "mlflow", "pyarrow"])
def test_a_missing_package_is_told_with_how_to_get_it(tmp_path: Path, installed: dict[str, str], package: str) -> None:
    del installed[package]
    finding = found(package, tmp_path)
    assert (finding.found, finding.good) == ("missing", False) and finding.do.startswith("pip install ")


@pytest.mark.parametrize(
    ("version", "good"), [("3.9.18", False), ("3.10.0", False), ("3.11.0", True), ("3.14.0rc1", True)]
)
def test_python_is_compared_by_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, good: bool
) -> None:
    monkeypatch.setattr(platform, "python_version_tuple", lambda: tuple(version.split(".")))
    assert found("python", tmp_path).good is good


@pytest.mark.parametrize(("gib", "good"), [(3.9, False), (4.0, True), (64.0, True)])
def test_memory_below_what_two_workers_need_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: float, good: bool
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(gib * 2**18)}.__getitem__)
    finding = found("memory", tmp_path)
    assert finding.found == f"{gib:.1f} GiB" and finding.good is good and "4 GiB" in finding.do


def test_little_shared_memory_is_told_because_ray_keeps_its_objects_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**28))
    finding = found("shared memory", tmp_path)
    assert (finding.found, finding.good) == ("0.2 GiB free", False) and "/dev/shm" in finding.do


def test_a_folder_that_is_not_there_yet_is_judged_by_its_parent_and_not_made(tmp_path: Path) -> None:
    finding = found("path", tmp_path / "new" / "deeper")
    assert finding.good and finding.found.startswith("writable, ") and list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_to_is_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = found("path", tmp_path / "file" / "folder")
    assert (finding.found, finding.good) == ("Not a directory", False)
    assert finding.do == "make it writable or choose another path"


def test_a_disk_with_little_space_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_kib=64) as disk:
        finding = found("path", disk)
        assert (finding.found, finding.good, finding.do) == ("writable, 0.0 GiB free", False, "free some space")
