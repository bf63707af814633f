"""An interval's model on disk: files, then the manifest. What has no manifest does not exist.

    <path>/<model>/day=2026-11-20/manifest.json                                  written last: the commit
    <path>/<model>/day=2026-11-20/ledger.json                                    what happened to it: ledger.py
    <path>/<model>/day=2026-11-20/progress.json                                  the newest snapshot of a day under way
    <path>/<model>/day=2026-11-20/<attempt>/rows/<table>/rows-0000-2047.parquet  by buckets: embeddings/snapshot.py
    <path>/<model>/day=2026-11-20/<attempt>/dense.safetensors                    dense net, optimizer, statistics
    <path>/<model>/day=2026-11-20/<attempt>/counted-0.safetensors                what a worker had counted: counted.py

A manifest names its layers, from a base (all rows) over deltas (what changed since the layer before, and who lost his
row) to its own, with the size and the SHA-256 of every file: to read a model one needs no other manifest. The snapshots
that were taken within a day are layers of the days after it, as long as no newer base stands for them.

Every attempt writes into a folder of its own, so one that was killed is never mixed with the next. Files are checked
when they are read. Nothing read here can run code: Parquet, safetensors, JSON.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from embeddings.buckets import NUM_BUCKETS
from embeddings.shard import TooManyRows
from embeddings.snapshot import Layer, Part, load
from trainer.agree import together
from trainer.counted import State, share
from trainer.dense import UNDO, DamagedTensors, from_bytes, load_dense_state
from trainer.errors import UserError
from trainer.folders import parse_day
from trainer.intervals import Interval
from trainer.learner import Learner
from trainer.storage import Storage

FORMAT = 2
ROWS, DENSE, COUNTED = "rows", "dense.safetensors", "counted-{worker}.safetensors"
MANIFEST, PROGRESS = "manifest.json", "progress.json"
_DAY, _HOUR = "day=", "hour="
Result = TypeVar("Result")
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What was committed of an interval, or a snapshot taken within it. folder: for people."""

    interval: Interval
    folder: str
    manifest: Manifest

    @property
    def report(self) -> dict[str, Any]:
        """What happened in the interval: metrics, counts, seconds."""
        report: dict[str, Any] = self.manifest["report"]
        return report

    @property
    def id(self) -> str:
        """A hash of the manifest: of everything in the checkpoint."""
        return digest(self.manifest)[:16]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """From the base to the newest delta: interval, attempt, files (name -> bytes, sha256, rows ...)."""
        layers: list[dict[str, Any]] = self.manifest["layers"]
        return layers

    @property
    def is_base(self) -> bool:
        """It needs no layer but its own."""
        return len(self.layers) == 1

    def files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every file that it needs, below the model's folder: name, bytes and sha256."""
        for layer in self.layers:
            for file, entry in layer["files"].items():
                yield f"{folder_of(layer)}/{file}", entry
        for file, entry in self.manifest["files"].items():
            yield f"{folder_of(self.manifest)}/{file}", entry


class Checkpoints:
    """The checkpoints of one model below one path, on any filesystem that pyarrow can open.

    mine: asked before a manifest is written or anything is removed; raises when the caller must not any more.
    """

    def __init__(self, path: str, model: str, mine: Callable[[], None] = lambda: None):
        self.mine = mine
        self.storage = Storage(path).within(model)
        self.path = self.storage.path

    def intervals(self) -> list[Interval]:
        """The committed intervals, in order."""
        return [interval for interval in self.begun() if self.storage.exists(f"{interval.folder}/{MANIFEST}")]

    def begun(self) -> list[Interval]:
        """The intervals that have a folder, in order, committed or not."""
        found = []
        for name in self._below("", _DAY):
            day = Interval(parse_day(name, f"{self.path}/{_DAY}{name}"))
            hours = self._below(day.folder, _HOUR)
            found += [Interval(day.day, int(hour)) for hour in hours] or [day]
        return sorted(found)

    def _below(self, folder: str, prefix: str) -> list[str]:
        """The values of a folder's partitions."""
        try:
            names = self.storage.folders(folder)
        except (OSError, pa.ArrowException) as error:
            do = "check the path, the rights to read it and the network"
            raise UserError("a folder cannot be listed", self.path, got=str(error), do=do) from None
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def open(self, interval: Interval) -> Checkpoint:
        """The manifest of a committed interval."""
        name = f"{interval.folder}/{MANIFEST}"
        if not self.storage.exists(name):
            got = ", ".join(map(str, self.intervals())) or "none"
            raise UserError(f"no checkpoint of {interval.words}", self.path, got=got, do="choose one of these")
        return Checkpoint(interval, f"{self.path}/{interval.folder}", self._read_manifest(interval, name))

    def _read_manifest(self, interval: Interval, name: str) -> Manifest:
        path = f"{self.path}/{name}"
        try:
            manifest = json.loads(self.storage.read(name))
        except (ValueError, OSError) as error:
            what = "the checkpoint's manifest cannot be read"
            raise UserError(what, path, got=str(error), do=_again(interval)) from None
        if not isinstance(manifest, dict) or manifest.pop("sha256", None) != digest(manifest):
            what, got = "the checkpoint's manifest is damaged", "a text with another SHA-256"
            raise UserError(what, path, got=got, expected="the text that was written", do=_again(interval))
        if manifest["format"] != FORMAT or manifest["num_buckets"] != NUM_BUCKETS:
            got, expected = (
                f"format {manifest['format']}, {manifest['num_buckets']} buckets",
                f"format {FORMAT}, {NUM_BUCKETS} buckets",
            )
            do = "use the version of the program that wrote it, or train under a new name"
            raise UserError("a checkpoint of another version", path, got=got, expected=expected, do=do)
        return manifest

    def latest(self, before: Interval | None = None) -> Checkpoint | None:
        """The newest committed interval, or the newest one before another."""
        found = [interval for interval in self.intervals() if before is None or interval < before]
        return self.open(found[-1]) if found else None

    def progress(self, interval: Interval) -> Checkpoint | None:
        """The newest snapshot within an interval that is not committed; None while there is none that can be read."""
        name = f"{interval.folder}/{PROGRESS}"
        if self.storage.exists(f"{interval.folder}/{MANIFEST}") or not self.storage.exists(name):
            return None
        with contextlib.suppress(UserError):
            return Checkpoint(interval, f"{self.path}/{interval.folder}", self._read_manifest(interval, name))
        return None

    def write_manifest(self, interval: Interval, file: str, manifest: Manifest) -> None:
        """Write a manifest (MANIFEST: this is the commit; PROGRESS) with its own SHA-256."""
        content = json.dumps(manifest | {"sha256": digest(manifest)}, indent=1).encode()
        self.mine()
        self.storage.write(f"{interval.folder}/{file}", content)

    def load(self, learner: Learner, checkpoint: Checkpoint) -> None:
        """Fill a fresh learner from a checkpoint of any number of workers. Collective; when a worker cannot read its
        part, all raise.
        """
        self.check(learner, checkpoint)
        self.fill(learner, checkpoint)

    def check(self, learner: Learner, checkpoint: Checkpoint) -> None:
        """Whether a learner can be filled from it: it fits, and the files that this worker needs are those that were
        written. UserError where not. Collective.
        """
        together(learner.exchange, lambda: self.stored(lambda: self._check(learner, checkpoint)))

    def _check(self, learner: Learner, checkpoint: Checkpoint) -> None:
        _check_fits(learner, checkpoint)
        needed = {f"{layer.folder}/{part.path}" for layer in self._needed(learner, checkpoint) for part in layer.parts}
        own = list(checkpoint.manifest["files"].values())
        for name, entry in checkpoint.files():
            if f"{self.storage.root}/{name}" in needed or entry in own:
                self._check_file(checkpoint, name, entry)

    def fill(self, learner: Learner, checkpoint: Checkpoint) -> None:
        """Fill a fresh learner from files that were checked. Collective."""
        shard = learner.embeddings.shard
        together(learner.exchange, lambda: self.stored(lambda: self._fill(learner, checkpoint)))
        shard.begin_day(checkpoint.interval.day.toordinal())  # whoever must go is judged as of that day
        try:
            shard.fit()
        except TooManyRows as error:
            got, expected = f"{error.rows} rows", f"at most {error.capacity_rows}, its capacity_rows"
            do = "raise capacity_rows, let it grow (grow: true), or evict (when_full: evict)"
            raise UserError(
                "a table holds more rows than it may", f"tables.{error.table}", got=got, expected=expected, do=do
            ) from None

    def _fill(self, learner: Learner, checkpoint: Checkpoint) -> None:
        load(learner.embeddings.shard, self.storage.filesystem, self._needed(learner, checkpoint))
        name = f"{folder_of(checkpoint.manifest)}/{DENSE}"
        load_dense_state(learner, from_bytes(self.storage.read(name)), f"{self.path}/{name}")

    def counted(self, learner: Learner, progress: Checkpoint) -> State:
        """What a worker goes on counting from, after any number of workers took the snapshot. Collective."""
        exchange, folder = learner.exchange, folder_of(progress.manifest)

        def read(worker: int) -> State:
            return from_bytes(self.storage.read(f"{folder}/{COUNTED.format(worker=worker)}"))

        def mine() -> State:
            return share(read, progress.manifest["num_shards"], exchange.rank, exchange.num_workers)

        return together(exchange, lambda: self.stored(mine))

    def verify(self, checkpoint: Checkpoint, *, own: bool = False) -> int:
        """Read every file that a checkpoint needs, and say how many bytes they are. The first that is missing or
        damaged is a UserError that names it. own: only what its interval wrote, not the layers below.
        """
        size = 0
        for name, entry in checkpoint.files():
            if own and not name.startswith(f"{checkpoint.interval.folder}/"):
                continue
            self.stored(lambda name=name, entry=entry: self._check_file(checkpoint, name, entry))  # type: ignore[misc]
            size += entry["bytes"]
        return size

    def _needed(self, learner: Learner, checkpoint: Checkpoint) -> list[Layer]:
        """The layers, with the files that overlap this worker's buckets."""
        layers, buckets = [], learner.embeddings.shard.buckets
        for layer in checkpoint.layers:
            parts = [_part(entry) for entry in layer["files"].values()]
            folder = f"{self.storage.root}/{folder_of(layer)}/{ROWS}"
            layers.append(Layer(folder, Layer(folder, parts).overlapping(buckets)))
        return layers

    def _check_file(self, checkpoint: Checkpoint, name: str, want: dict[str, Any]) -> None:
        """A file's bytes are those that were written."""
        path, do = f"{self.path}/{name}", _again(checkpoint.interval)
        if not self.storage.exists(name):
            raise UserError("a checkpoint file is missing", path, do=do)
        got = self.storage.fingerprint(name)
        if any(got[key] != want[key] for key in got):
            said, expected = (f"{of['bytes']} bytes, SHA-256 {of['sha256'][:12]}..." for of in (got, want))
            raise UserError("a checkpoint file is damaged", path, got=said, expected=expected, do=do)

    def stored(self, work: Callable[[], Result]) -> Result:
        """What the work returns; trouble with disk or files is raised as an error that a user can mend."""
        try:
            return work()
        except (OSError, pa.ArrowException, DamagedTensors) as error:
            do = "free space or mend the storage, then run the same command again: the day before is untouched"
            raise UserError("a checkpoint cannot be written or read", self.path, got=str(error), do=do) from None


def folder_of(layer: dict[str, Any]) -> str:
    """Where a layer, or a manifest's own files, lie below the model's folder."""
    return f"{Interval.parse(layer['interval'], 'a manifest').folder}/{layer['attempt']}"


def tables_of(learner: Learner) -> dict[str, dict[str, Any]]:
    """What the files of each table hold. Layers of one chain agree in it."""
    shard = learner.embeddings.shard
    return {
        name: {
            "dim": table.dim,
            "dtype": table.dtype,
            "columns": [*shard.pool_of(name).optimizer.states, *shard.ledger.columns(shard.number[name])],
        }
        for name, table in shard.tables.items()
    }


def digest(manifest: Manifest) -> str:
    """A manifest's SHA-256."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fingerprint_of(content: bytes) -> dict[str, Any]:
    """A file's size and SHA-256, of what is to be written."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _check_fits(learner: Learner, checkpoint: Checkpoint) -> None:
    """The configuration is one that the files of a checkpoint fit."""
    manifest = checkpoint.manifest
    for what, names in learner.order.items():
        if manifest["order"].get(what) != names:  # the dense net would take one for another
            got, expected = ", ".join(names), ", ".join(manifest["order"].get(what, []))
            raise UserError(f"the {what} changed, or their order", what, got=got, expected=expected, do=UNDO)
    for name, table in learner.embeddings.shard.tables.items():
        known = manifest["tables"].get(name)  # a table new in the configuration starts empty
        if known is not None and known["dim"] != table.dim:
            got, expected = f"dim {table.dim}", f"dim {known['dim']}"
            raise UserError("the table's width changed", f"tables.{name}", got=got, expected=expected, do=UNDO)


def _part(entry: dict[str, Any]) -> Part:
    first, end = entry["buckets"]
    return Part(entry["path"], entry["table"], entry["kind"], (first, end), entry["rows"])


def _again(interval: Interval) -> str:
    return f"restore the file from a copy, or train again from there: nightly --again {interval}"
