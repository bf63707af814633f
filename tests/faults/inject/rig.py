"""Wraps real functions of a night as their modules are imported: kills at a named point, storage that is slow or
refuses, and a diary of the rows of every training step.

    DAYBREAK_FAULTS     the folder of one night's faults: flags of points that fired, the diary, the storage's weather
    DAYBREAK_KILL_AT    the name of a point (kill_points.py): its process is killed with SIGKILL there, once a folder
    DAYBREAK_SLOW_STEP  seconds that every training step takes longer

Plain Python only: this is imported before anything else, by every Python that the night starts.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from diary import record
from kill_points import POINTS, Point

_STORAGE = ("read", "write", "exists", "folders", "files", "delete", "delete_folder", "fingerprint")
_STORAGE += ("open_output", "open_input")

Function = Callable[..., Any]
Around = Callable[[Function, dict[str, Any], Callable[[], Any]], Any]


def arm() -> None:
    """From now on, every module that a fault touches is wrapped when it is imported."""
    folder = os.environ["DAYBREAK_FAULTS"]
    wraps: dict[str, list[tuple[str, Around]]] = {}
    for phase, name in enumerate(("score_step", "train_step")):
        wraps.setdefault("trainer.step", []).append((name, _Diary(folder, phase)))
    weather = _Weather(folder)
    for name in _STORAGE:
        wraps.setdefault("trainer.storage", []).append((f"Storage.{name}", weather))
    wraps.setdefault("embeddings.snapshot", []).append(("Snapshot.write", weather))
    if name := os.environ.get("DAYBREAK_KILL_AT"):
        point = POINTS[name]
        wraps.setdefault(point.module, []).append((point.function, _Kill(folder, name, point)))
    for module in [name for name in wraps if name in sys.modules]:
        _wrap_all(sys.modules[module], wraps.pop(module))
    sys.meta_path.insert(0, _Finder(wraps))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules to be wrapped as the others would, and wraps them once they have run."""

    def __init__(self, wraps: dict[str, list[tuple[str, Around]]]):
        self._wraps = wraps

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        wanted = self._wraps.pop(name, None)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if wanted else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_wrap(module: ModuleType) -> None:
            run(module)
            _wrap_all(module, wanted or [])

        spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap_all(module: ModuleType, wanted: list[tuple[str, Around]]) -> None:
    for path, around in wanted:
        *owners, name = path.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, _wrapped(getattr(owner, name), around))


def _wrapped(function: Function, around: Around) -> Function:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        named = dict(signature.bind(*args, **kwargs).arguments)
        return around(function, named, lambda: function(*args, **kwargs))

    return wrapper


class _Kill:
    """Kills this process before or after the n-th call for which the point's condition holds."""

    def __init__(self, folder: str, name: str, point: Point):
        self._flag, self._point, self._calls = os.path.join(folder, "fired", name), point, 0
        self._lock = threading.Lock()

    def __call__(self, function: Function, named: dict[str, Any], call: Callable[[], Any]) -> Any:
        with self._lock:
            hit = self._point.rank in (None, _rank()) and self._point.holds(named)
            self._calls += hit
            hit = hit and self._calls == self._point.nth
        if hit and self._point.when == "before":
            self._fire()
        result = call()
        if hit and self._point.when == "after":
            self._fire()
        return result

    def _fire(self) -> None:
        try:
            os.close(os.open(self._flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return  # it has been killed here before
        os.kill(os.getpid(), signal.SIGKILL)


class _Weather:
    """Storage as the file storage.json tells it to be: {"slow_s": seconds a call} or {"refuse": true}."""

    def __init__(self, folder: str):
        self._path = os.path.join(folder, "storage.json")

    def __call__(self, function: Function, named: dict[str, Any], call: Callable[[], Any]) -> Any:
        try:
            with open(self._path) as file:
                weather = json.load(file)
        except FileNotFoundError:
            return call()
        time.sleep(weather.get("slow_s", 0.0))
        if weather.get("refuse"):
            raise OSError(f"the storage refuses {function.__qualname__} (a fault of the rig)")
        return call()


class _Diary:
    """Writes down which rows each step of this process learnt from; one file a process, appended as a whole."""

    def __init__(self, folder: str, phase: int):
        self._folder, self._phase = os.path.join(folder, "steps"), phase
        self._slow_s = float(os.environ.get("DAYBREAK_SLOW_STEP", "0")) if phase else 0.0

    def __call__(self, function: Function, named: dict[str, Any], call: Callable[[], Any]) -> Any:
        result = call()
        time.sleep(self._slow_s)
        day, rows = (
            (int(named["day"]), named["batch"].row_B.numpy().astype("int32").tobytes()) if self._phase else (0, b"")
        )
        with open(os.path.join(self._folder, f"{os.getpid()}.steps"), "ab", buffering=0) as file:
            file.write(record(time.time(), self._phase, day, rows))
        return result


def _rank() -> int:
    """Of this worker, 0 where there is no process group."""
    distributed = sys.modules.get("torch.distributed")
    return int(distributed.get_rank()) if distributed and distributed.is_initialized() else 0
