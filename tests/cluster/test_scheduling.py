"""What cron, systemd and KubeRay are given: parsed, checked field by field, and run as far as it can be here.

Oracles: systemd-analyze; the fields of KubeRay's CRDs 1.6.2 and 1.7.0 and of Kubernetes' pods, as far as we use them.
"""

import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCHEDULING, KUBERAY = ROOT / "cluster" / "scheduling", ROOT / "cluster" / "kuberay"
FILES = [*SCHEDULING.iterdir(), *KUBERAY.iterdir()]

# What a field holds: a type, a dict of fields, a list of such, or {"*": ...} for names of our own. "!" is required.
QUANTITIES = {"cpu": str, "memory": str}
CONTAINER = {
    "name!": str,
    "image": str,
    "env": [{"name!": str, "value": str}],
    "envFrom": [{"secretRef": {"name": str}}],
    "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
    "volumeMounts": [{"name!": str, "mountPath!": str}],
}
TEMPLATE = {"spec": {"containers!": [CONTAINER], "volumes": [{"name!": str, "configMap": {"name": str}}]}}
WORKERS = {
    "groupName!": str,
    "replicas": int,
    "minReplicas!": int,
    "maxReplicas!": int,
    "rayStartParams": {"*": str},
    "template!": TEMPLATE,
}
RAYJOB = {
    "entrypoint": str,
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": {
        "rayVersion": str,
        "headGroupSpec!": {"rayStartParams": {"*": str}, "template!": TEMPLATE},
        "workerGroupSpecs": [WORKERS],
    },
}
KINDS = {"RayJob": RAYJOB, "RayCronJob": {"schedule!": str, "jobTemplate!": RAYJOB, "suspend": bool}}


def strange(value: Any, fields: Any, where: str = "") -> list[str]:
    """What of a manifest is unknown, missing or of another type."""
    if isinstance(fields, type):
        return [] if type(value) is fields else [f"{where}: {value!r} is no {fields.__name__}"]
    if isinstance(fields, list):
        return [error for n, item in enumerate(value) for error in strange(item, fields[0], f"{where}[{n}]")]
    known = {name.rstrip("!"): inner for name, inner in fields.items()}
    found = [f"{where}.{name[:-1]}: missing" for name in fields if name.endswith("!") and name[:-1] not in value]
    for name, item in value.items():
        inner = known.get(name, known.get("*"))
        found += strange(item, inner, f"{where}.{name}") if inner else [f"{where}.{name}: unknown"]
    return found


def manifest(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((KUBERAY / name).read_text())
    return read


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_a_manifest_has_only_fields_that_kuberay_knows(name: str) -> None:
    read = manifest(name)
    assert read.keys() == {"apiVersion", "kind", "metadata", "spec"} and read["apiVersion"] == "ray.io/v1"
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", read["metadata"]["name"])
    assert len(read["metadata"]["name"]) <= 36, "KubeRay adds a time to it, and more for its cluster"
    assert strange(read["spec"], KINDS[read["kind"]]) == []


def test_a_misspelt_field_a_missing_one_and_a_wrong_type_are_seen() -> None:
    job = manifest("rayjob.yaml")["spec"]
    job["backoffLimit"], job["entryPoint"] = "2", "x"
    del job["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    assert len(strange(job, RAYJOB)) == 3


def test_every_night_is_the_one_night_by_the_clock() -> None:
    spec = manifest("raycronjob.yaml")["spec"]
    assert spec["jobTemplate"] == manifest("rayjob.yaml")["spec"]
    assert_schedule(spec["schedule"].split())


def test_the_manifests_fit_each_other_and_the_pinned_ray() -> None:
    job = manifest("rayjob.yaml")["spec"]
    cluster = job["rayClusterSpec"]
    version = re.search(r'"ray\[train\]==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert version and cluster["rayVersion"] == version[1]
    assert f"FROM rayproject/ray:{version[1]}-py311" in (KUBERAY / "Dockerfile").read_text()
    [workers] = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    [head], [worker] = (group["template"]["spec"]["containers"] for group in (cluster["headGroupSpec"], workers))
    assert head["image"] == worker["image"] and head["envFrom"] == worker["envFrom"]
    assert job["entrypoint"].split()[-1].startswith(head["volumeMounts"][0]["mountPath"])
    for container in (head, worker):
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_that_starts_ray_lets_it_phone_home(path: Path) -> None:
    starts = path.suffix != ".timer"
    off = re.search(r"RAY_USAGE_STATS_ENABLED(=| ?: ?|, value: |\": ?)\"?0\b", path.read_text())
    assert bool(off) == starts


def assert_schedule(fields: list[str]) -> None:
    """Minute, hour, day of the month, month, day of the week: numbers in their bounds, ranges, or a star."""
    bounds = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)]
    assert len(fields) == len(bounds)
    for field, (low, high) in zip(fields, bounds, strict=True):
        for part in field.split(","):
            numbers = [] if part == "*" else [int(number) for number in part.split("-")]
            assert all(low <= number <= high for number in numbers) and numbers == sorted(numbers), field


def cron_entry(path: Path) -> tuple[list[str], str, str]:
    """When, who and what; of a file in /etc/cron.d."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    settings, [entry] = (
        [line for line in lines if re.match(r"\w+=", line)],
        [line for line in lines if line[0] in "*0123456789"],
    )
    assert len(settings) + 1 == len(lines)
    *when, who, what = entry.split(maxsplit=6)
    return when, who, what


def test_the_line_of_cron_says_when_who_and_what() -> None:
    path = SCHEDULING / "daybreak.cron"
    when, who, what = cron_entry(path)
    assert_schedule(when)
    assert who == "daybreak" and "%" not in what, "cron makes a new line of a percent sign"
    assert path.read_text().endswith("\n"), "cron ignores a last line without an end"


@pytest.fixture
def by_cron(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the line's command as cron does, with a night that says its arguments and ends with a code."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    night = tmp_path / ".venv" / "bin" / "daybreak"

    def run(does: str) -> subprocess.CompletedProcess[str]:
        night.write_text(f'#!/bin/sh\necho night "$@"\n{does}\n')
        night.chmod(0o755)
        _, _, what = cron_entry(SCHEDULING / "daybreak.cron")
        command = ["/bin/sh", "-c", what.replace("/opt/daybreak", str(tmp_path))]
        return subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=30)

    return run


@pytest.mark.skipif(not shutil.which("flock"), reason="needs util-linux")
def test_cron_mails_a_night_that_fails_and_no_other(by_cron: Callable[..., Any], tmp_path: Path) -> None:
    good, log = by_cron("exit 0"), tmp_path / "nightly.log"
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "")
    bad = by_cron("echo why >&2; exit 2")
    assert bad.stdout == log.read_text() == "night nightly my.yaml\n" * 2 + "why\n"
    with (tmp_path / "nightly.flock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        at_once = by_cron("echo started too")
    assert (at_once.returncode, at_once.stdout) == (0, "") and "started too" not in log.read_text()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_service_and_the_timer(tmp_path: Path) -> None:
    for name in ("daybreak.service", "daybreak.timer"):
        text = (SCHEDULING / name).read_text().replace("/opt/daybreak/.venv/bin/daybreak", sys.executable)
        (tmp_path / name).write_text(text)
    units = [str(tmp_path / name) for name in ("daybreak.service", "daybreak.timer")]
    verified = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    [calendar] = re.findall(r"^OnCalendar=(.*)$", (tmp_path / "daybreak.timer").read_text(), flags=re.MULTILINE)
    assert subprocess.run(["systemd-analyze", "calendar", calendar], capture_output=True).returncode == 0


def test_the_service_does_not_repeat_what_a_person_must_mend_and_the_timer_makes_up_for_what_was_missed() -> None:
    service, timer = ((SCHEDULING / f"daybreak.{kind}").read_text().splitlines() for kind in ("service", "timer"))
    assert {"Type=oneshot", "Restart=on-failure", "RestartPreventExitStatus=2"} <= set(service)
    assert "Persistent=true" in timer


def test_the_ray_job_hands_its_arguments_to_the_night(tmp_path: Path) -> None:
    script = SCHEDULING / "ray_job.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    ray.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    told = subprocess.run([script, "my.yaml", "--set", "a=b c"], env={"PATH": path}, capture_output=True, text=True)
    said = told.stdout.splitlines()
    assert told.returncode == 0, told.stderr
    assert said[:2] == ["job", "submit"] and said[said.index("--") + 1 :] == [
        *("python", "-m", "cluster.cli", "nightly"),
        *("my.yaml", "--set", "a=b c"),
    ]
    environment = yaml.safe_load(said[said.index("--runtime-env-json") + 1])
    assert environment["env_vars"] == {"RAY_USAGE_STATS_ENABLED": "0"}
