"""Whether this machine can run Daybreak: versions that fit each other, cores, memory, GPUs, writable paths."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass

# FBGEMM is built against one minor version of torch; any other fails at import with an undefined symbol.
FBGEMM_OF_TORCH = {"2.13": "1.8", "2.11": "1.6"}
_FBGEMM_PACKAGES = ("fbgemm-gpu-cpu", "fbgemm-gpu")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. good: None for a plain fact."""

    name: str
    found: str
    good: bool | None = None
    do: str = ""


def examine(paths: list[str]) -> list[Finding]:
    """Everything, in the order in which one would look. paths: folders that must be writable."""
    return [*_versions(), *_machine(), *[_writable(path) for path in paths]]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    major, minor, _ = platform.python_version_tuple()
    findings = [
        Finding("python", platform.python_version(), (int(major), int(minor)) >= (3, 11), "use Python 3.11 or newer")
    ]
    torch = _version("torch")
    findings.append(
        Finding("torch", torch or "missing", torch is not None, "pip install 'daybreak[cpu]' or 'daybreak[gpu]'")
    )
    fbgemm = next((v for v in map(_version, _FBGEMM_PACKAGES) if v), None)
    fits = FBGEMM_OF_TORCH.get(".".join((torch or "").split(".")[:2]))
    good = bool(fbgemm and fits and fbgemm.startswith(f"{fits}."))
    do = f"install fbgemm {fits}.* for torch {torch}" if fits else f"install torch {' or '.join(FBGEMM_OF_TORCH)}"
    findings.append(Finding("fbgemm", fbgemm or "missing", good, do))
    for package in ("ray", "mlflow", "pyarrow"):
        version = _version(package)
        findings.append(Finding(package, version or "missing", version is not None, f"pip install {package}"))
    return findings


def _machine() -> list[Finding]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.exists("/dev/shm") else 0.0
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        Finding("cores", str(os.cpu_count())),
        Finding("memory", f"{memory:.1f} GiB", memory >= 4, "at least 4 GiB are needed for two workers"),
        Finding(
            "shared memory",
            f"{shared:.1f} GiB free",
            shared >= 0.5,
            "Ray keeps objects in /dev/shm: give it 0.5 GiB or more",
        ),
        Finding("gpus", ", ".join(gpus) or "none: the CPU kernels are used"),
    ]


def _writable(path: str) -> Finding:
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free / 2**30
            return Finding(f"path {path}", f"writable, {free:.1f} GiB free", free >= 1, "free some space")
    except OSError as error:
        return Finding(f"path {path}", str(error.strerror), False, "make it writable or choose another path")
