"""A day's model on disk: shard files, then the manifest. What has no manifest does not exist.

    <path>/<model>/day=2026-11-20/manifest.json                                  written last: the commit
    <path>/<model>/day=2026-11-20/decision.json                                  promoted or held, and why
    <path>/<model>/day=2026-11-20/<attempt>/rows/<table>/rows-0000-2047.parquet  by buckets: embeddings/snapshot.py
    <path>/<model>/day=2026-11-20/<attempt>/dense.safetensors                    dense net, optimizer, statistics

Every attempt writes into a folder of its own, so one that was killed is never mixed with the next. Every file's size
and SHA-256 stand in the manifest and are checked when it is read. Nothing read here can run code: Parquet, safetensors,
JSON.
"""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from embeddings.buckets import NUM_BUCKETS
from embeddings.exchange import Exchange
from embeddings.shard import TooManyRows
from embeddings.snapshot import Layer, Part, Snapshot, load
from trainer.agree import gather_json, together
from trainer.errors import UserError
from trainer.folders import parse_day
from trainer.intervals import Interval
from trainer.learner import Learner
from trainer.storage import fingerprint, list_folder, open_filesystem, without_credentials

FORMAT = 1
Result = TypeVar("Result")
_ROWS = "rows"
_DAY, _HOUR = "day=", "hour="
_UNDO = "undo the change of the configuration, or train under a new name"


@dataclass(frozen=True)
class Checkpoint:
    """A committed interval. report: what happened on it (metrics, counts, seconds)."""

    interval: Interval
    folder: str
    manifest: dict[str, Any]

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = self.manifest["report"]
        return report

    @property
    def id(self) -> str:
        """A hash of the manifest: of everything in the checkpoint."""
        return _digest(self.manifest)[:16]


class Checkpoints:
    """The checkpoints of one model below one path, on any filesystem that pyarrow can open."""

    def __init__(self, path: str, model: str):
        self._filesystem, root = open_filesystem(path)
        self.path, self._root = f"{without_credentials(path).rstrip('/')}/{model}", f"{root}/{model}"

    def intervals(self) -> list[Interval]:
        """The committed intervals, in order."""
        days = [parse_day(name, f"{self.path}/{_DAY}{name}") for name in self._below(self._root, _DAY)]
        found = [Interval(day) for day in days]
        found += [Interval(i.day, int(hour)) for i in found for hour in self._below(self._folder(i), _HOUR)]
        return sorted(i for i in found if self._exists(f"{self._folder(i)}/manifest.json"))

    def _below(self, folder: str, prefix: str) -> list[str]:
        """The values of a folder's partitions."""
        names = sorted(info.base_name for info in list_folder(self._filesystem, folder))
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def open(self, interval: Interval) -> Checkpoint:
        """The manifest of a committed interval."""
        path = f"{self._folder(interval)}/manifest.json"
        if not self._exists(path):
            got = ", ".join(map(str, self.intervals())) or "none"
            raise UserError(f"no checkpoint of {interval.words}", self.path, got=got, do="choose one of these")
        try:
            manifest = json.loads(self._read(path))
        except (ValueError, OSError) as error:
            raise UserError(
                "the checkpoint's manifest cannot be read", path, got=str(error), do=_retrain(interval)
            ) from None
        if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
            got, expected = "a text with another SHA-256", "the text that was written"
            raise UserError(
                "the checkpoint's manifest is damaged", path, got=got, expected=expected, do=_retrain(interval)
            )
        if manifest["format"] != FORMAT or manifest["num_buckets"] != NUM_BUCKETS:
            got, expected = (
                f"format {manifest['format']}, {manifest['num_buckets']} buckets",
                f"format {FORMAT}, {NUM_BUCKETS} buckets",
            )
            do = "use the version of the program that wrote it, or train under a new name"
            raise UserError("a checkpoint of another version", path, got=got, expected=expected, do=do)
        return Checkpoint(interval, self._folder(interval), manifest)

    def latest(self, before: Interval | None = None) -> Checkpoint | None:
        """The newest committed interval, or the newest one before another."""
        found = [interval for interval in self.intervals() if before is None or interval < before]
        return self.open(found[-1]) if found else None

    def decision(self, interval: Interval) -> dict[str, Any] | None:
        """What was decided about a committed interval, or None while nothing is."""
        path = f"{self._folder(interval)}/decision.json"
        try:
            return json.loads(self._read(path)) if self._exists(path) else None
        except (ValueError, OSError) as error:
            do = "restore the file from a copy, or remove it: the next nightly decides anew"
            raise UserError("the day's decision cannot be read", path, got=str(error), do=do) from None

    def decide(self, interval: Interval, decision: dict[str, Any]) -> None:
        """Write down what was decided about a committed interval."""
        content = json.dumps(decision, indent=1).encode()
        self._stored(lambda: self._write_whole(f"{self._folder(interval)}/decision.json", content))

    def save(self, learner: Learner, interval: Interval, report: dict[str, Any]) -> None:
        """Write an interval and commit it. Collective; when a worker fails to write its part, all raise and nothing is
        committed.
        """
        exchange = learner.exchange
        attempt = self._attempt(learner)
        folder = f"{self._folder(interval)}/{attempt}"
        try:
            files = together(exchange, lambda: self._stored(lambda: self._write_parts(learner, folder)))
        except UserError:
            self._give_up(exchange, folder)
            raise
        all_files = gather_json(exchange, files)
        manifest = {
            "format": FORMAT,
            "num_buckets": NUM_BUCKETS,
            "num_shards": exchange.num_workers,
            "attempt": attempt,
            "order": learner.order,
            "tables": {name: {"dim": table.dim} for name, table in learner.embeddings.shard.tables.items()},
            "files": {path: entry for part in all_files for path, entry in part.items()},
            "report": report,
        }
        together(exchange, lambda: exchange.rank or self._stored(lambda: self._commit(interval, manifest)))

    def load(self, learner: Learner, checkpoint: Checkpoint) -> None:
        """Fill a fresh learner from a checkpoint of any number of workers. Collective."""
        together(learner.exchange, lambda: self._stored(lambda: self._read_parts(learner, checkpoint)))
        learner.embeddings.shard.begin_day(
            checkpoint.interval.day.toordinal()
        )  # whoever must go is judged as of that day
        try:
            learner.embeddings.shard.fit()
        except TooManyRows as error:
            got, expected = f"{error.rows} rows", f"at most {error.capacity_rows}, its capacity_rows"
            do = "raise capacity_rows, let it grow (grow: true), or evict (when_full: evict)"
            raise UserError(
                "a table holds more rows than it may", f"tables.{error.table}", got=got, expected=expected, do=do
            ) from None

    def _folder(self, interval: Interval) -> str:
        return f"{self._root}/{interval.folder}"

    def _exists(self, path: str) -> bool:
        return bool(self._filesystem.get_file_info(path).type == pyarrow.fs.FileType.File)

    def _attempt(self, learner: Learner) -> str:
        """One name that all workers agree on: worker 0's random number, summed with everybody's zero."""
        mine = uuid.uuid4().int >> 80 if learner.exchange.rank == 0 else 0
        return f"{int(learner.exchange.all_reduce(torch.tensor([mine])).item()):012x}"

    def _write_parts(self, learner: Learner, folder: str) -> dict[str, dict[str, Any]]:
        parts = Snapshot(learner.embeddings.shard, base=True).write(self._filesystem, f"{folder}/{_ROWS}")
        files = {
            f"{_ROWS}/{p.path}": fingerprint(self._filesystem, f"{folder}/{_ROWS}/{p.path}") | asdict(p) for p in parts
        }
        if learner.exchange.rank == 0:
            self._filesystem.create_dir(folder, recursive=True)
            path = f"{folder}/dense.safetensors"
            self._write(path, safetensors.torch.save(_dense_state(learner)))
            files["dense.safetensors"] = fingerprint(self._filesystem, path)
        return files

    def _commit(self, interval: Interval, manifest: dict[str, Any]) -> None:
        manifest = manifest | {"sha256": _digest(manifest)}
        self._write_whole(f"{self._folder(interval)}/manifest.json", json.dumps(manifest, indent=1).encode())
        for info in self._filesystem.get_file_info(pyarrow.fs.FileSelector(self._folder(interval))):
            if info.type == pyarrow.fs.FileType.Directory and info.base_name != manifest["attempt"]:
                self._filesystem.delete_dir(info.path)  # what killed attempts left behind

    def _give_up(self, exchange: Exchange, folder: str) -> None:
        """Free the space of an attempt that failed, so that the next one has it."""
        if exchange.rank == 0 and self._filesystem.get_file_info(folder).type == pyarrow.fs.FileType.Directory:
            with contextlib.suppress(OSError):
                self._filesystem.delete_dir(folder)

    def _read_parts(self, learner: Learner, checkpoint: Checkpoint) -> None:
        shard, manifest = learner.embeddings.shard, checkpoint.manifest
        for what, names in learner.order.items():
            if manifest["order"].get(what) != names:  # the dense net would take one for another
                got, expected = ", ".join(names), ", ".join(manifest["order"].get(what, []))
                raise UserError(f"the {what} changed, or their order", what, got=got, expected=expected, do=_UNDO)
        for name, table in shard.tables.items():
            known = manifest["tables"].get(name)
            if known is None:
                continue  # a table new in the configuration starts empty
            if known["dim"] != table.dim:
                got, expected = f"dim {table.dim}", f"dim {known['dim']}"
                raise UserError("the table's width changed", f"tables.{name}", got=got, expected=expected, do=_UNDO)
        saved = Layer("", [_part(entry) for file, entry in manifest["files"].items() if file.startswith(_ROWS)])
        needed = Layer(f"{checkpoint.folder}/{manifest['attempt']}/{_ROWS}", saved.overlapping(shard.buckets))
        for part in needed.parts:
            self._verified(checkpoint, f"{_ROWS}/{part.path}")
        load(shard, self._filesystem, [needed])
        path = self._verified(checkpoint, "dense.safetensors")
        _load_dense_state(learner, safetensors.torch.load(self._read(path)), path)

    def _verified(self, checkpoint: Checkpoint, file: str) -> str:
        """The path of a file whose bytes are those that were written."""
        path = f"{checkpoint.folder}/{checkpoint.manifest['attempt']}/{file}"
        want = checkpoint.manifest["files"][file]
        if not self._exists(path):
            raise UserError("a checkpoint file is missing", path, do=_retrain(checkpoint.interval))
        got = fingerprint(self._filesystem, path)
        if any(got[key] != want[key] for key in got):
            raise UserError(
                "a checkpoint file is damaged",
                path,
                got=f"{got['bytes']} bytes, SHA-256 {got['sha256'][:12]}...",
                expected=f"{want['bytes']} bytes, SHA-256 {want['sha256'][:12]}...",
                do=_retrain(checkpoint.interval),
            )
        return path

    def _read(self, path: str) -> bytes:
        with self._filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    def _write(self, path: str, content: bytes) -> None:
        with self._filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _write_whole(self, path: str, content: bytes) -> None:
        """All of the content or none of it: under another name first, then moved into place."""
        self._write(f"{path}.tmp", content)
        self._filesystem.move(f"{path}.tmp", path)

    def _stored(self, work: Callable[[], Result]) -> Result:
        """What the work returns; trouble with disk or files is raised as an error that a user can mend."""
        try:
            return work()
        except (OSError, pa.ArrowException, safetensors.SafetensorError) as error:
            do = "free space or mend the storage, then run the same command again: the day before is untouched"
            raise UserError("a checkpoint cannot be written or read", self.path, got=str(error), do=do) from None


def _part(entry: dict[str, Any]) -> Part:
    first, end = entry["buckets"]
    return Part(entry["path"], entry["table"], entry["kind"], (first, end), entry["rows"])


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _retrain(interval: Interval) -> str:
    return f"restore the file from a copy, or remove the folder {interval.folder} and run again: it is trained anew"


def _dense_state(learner: Learner) -> dict[str, Tensor]:
    """All that is dense, its optimizer and the statistics as named tensors."""
    state = {
        f"{part}/{name}": v for part, module in _modules(learner).items() for name, v in module.state_dict().items()
    }
    for name, parameter in learner.named_parameters().items():
        for key, value in learner.optimizer.state[parameter].items():
            state[f"optimizer/{name}/{key}"] = value
    state |= {f"numbers/{name}": value for name, value in learner.stats.state().items()}
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _modules(learner: Learner) -> dict[str, torch.nn.Module]:
    return {
        "model": learner.model,
        "averaged": learner.averaged,
        "auxiliary": learner.auxiliary,
        "balance": learner.balance,
        "losses": torch.nn.ModuleList(task.loss for task in learner.graph.tasks.values()),
    }


def _load_dense_state(learner: Learner, state: dict[str, Tensor], where: str) -> None:
    modules = _modules(learner)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*modules, "optimizer", "numbers")}
    for name, value in state.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    for part, module in modules.items():
        mine = {f"{part}/{name}": tuple(value.shape) for name, value in module.state_dict().items()}
        theirs = {f"{part}/{name}": tuple(value.shape) for name, value in parts[part].items()}
        if differing := [name for name in mine | theirs if mine.get(name) != theirs.get(name)]:
            got, expected = (f"{differing[0]} {_shape(shapes.get(differing[0]))}" for shapes in (mine, theirs))
            what = "the dense net of the configuration is not the one that was trained"
            raise UserError(what, where, got=got, expected=expected, do=_UNDO)
        module.load_state_dict(parts[part])
    for name, parameter in learner.named_parameters().items():
        of_parameter = {k.rpartition("/")[2]: v for k, v in parts["optimizer"].items() if k.rpartition("/")[0] == name}
        learner.optimizer.state[parameter] = {
            k: v.to(v.device if k == "step" else learner.device) for k, v in of_parameter.items()
        }
    learner.stats.load({name: value.to(learner.device) for name, value in parts["numbers"].items()})


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
