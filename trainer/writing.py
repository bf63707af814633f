"""One snapshot on its way to the disk, in a thread of each worker, while training goes on.

Each worker writes its files and then part-<worker>.json, which names them or says what failed. Worker 0 waits for all
parts and writes progress.json: from then on the snapshot exists. No collective: the main threads have theirs.
"""

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from embeddings.snapshot import Snapshot
from trainer.checkpoint import PROGRESS, ROWS, Checkpoints, Manifest, fingerprint_of, folder_of
from trainer.dense import State, to_bytes
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.storage import Storage

_PARTS = "part-{worker}.json"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 1.0

Entries = dict[str, dict[str, Any]]  # by file: bytes, sha256; of rows also what embeddings.snapshot.Part says


def write_files(folder: Storage, snapshot: Snapshot, states: Mapping[str, State]) -> tuple[Entries, Entries]:
    """Write a worker's rows and named tensors into an attempt's folder; returns the entries of both for a manifest."""
    parts = snapshot.write(folder.filesystem, f"{folder.root}/{ROWS}")
    rows = {f"{ROWS}/{part.path}": folder.fingerprint(f"{ROWS}/{part.path}") | asdict(part) for part in parts}
    files = {}
    for name, state in states.items():
        content = to_bytes(dict(state))
        folder.write(name, content)
        files[name] = fingerprint_of(content)
    return rows, files


def free(storage: Storage, folders: list[str]) -> None:
    """Remove what failed snapshots wrote: the next one needs the space. What cannot be removed now is a leftover."""
    for folder in folders:
        with contextlib.suppress(OSError):
            storage.delete_folder(folder)


def with_layer(manifest: Manifest, parts: list[tuple[Entries, Entries]]) -> Manifest:
    """A manifest with what all workers wrote: the newest layer, and its own files."""
    rows, files = ({name: entry for part in parts for name, entry in part[i].items()} for i in (0, 1))
    layer = {"interval": manifest["interval"], "attempt": manifest["attempt"], "files": rows}
    return manifest | {"layers": [*manifest["layers"], layer], "files": files}


class Writing(threading.Thread):
    """Writes one worker's part of a snapshot; on worker 0 all that makes it exist. error: why it does not, until it
    does. superseded: files that nobody needs once it exists. lost: folders of snapshots that failed, removed
    first.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        interval: Interval,
        snapshot: Snapshot,
        states: Mapping[str, State],
        manifest: Manifest,
        *,
        rank: int,
        patience_s: float,
        superseded: list[str],
        lost: list[str],
    ):
        super().__init__(name="snapshot", daemon=True)
        self._checkpoints, self._interval, self._states = checkpoints, interval, states
        self._rank, self._patience_s = rank, patience_s
        self._superseded, self._lost = superseded, lost
        self._folder = checkpoints.storage.within(folder_of(manifest))
        self._given_up = threading.Event()
        self.snapshot, self.manifest = snapshot, manifest
        self.error: str | None = "it was not finished"

    def give_up(self) -> None:
        """Another worker failed: wait no longer."""
        self._given_up.set()

    def run(self) -> None:
        try:
            free(self._checkpoints.storage, self._lost)
            mine = self._checkpoints.stored(self._write_part)
            if self._rank == 0:
                self._checkpoints.stored(self._finish)
            else:
                self.manifest = with_layer(self.manifest, [mine])  # what matters there: that a layer exists
            self.error = None
        except UserError as error:
            self.error = str(error)

    def _write_part(self) -> tuple[Entries, Entries]:
        """Write the files, then say so; or say what failed."""
        name = _PARTS.format(worker=self._rank)
        try:
            rows, files = self._checkpoints.stored(lambda: write_files(self._folder, self.snapshot, self._states))
        except UserError as error:
            with contextlib.suppress(OSError):
                self._folder.write(name, json.dumps({"error": str(error)}).encode())
            raise
        self._folder.write(name, json.dumps({"rows": rows, "files": files}).encode())
        return rows, files

    def _finish(self) -> None:
        """Wait for all parts; then the snapshot exists."""
        self.manifest = with_layer(self.manifest, self._parts())
        self._checkpoints.write_manifest(self._interval, PROGRESS, self.manifest)
        with contextlib.suppress(OSError):
            for name in self._superseded:
                self._checkpoints.storage.delete(name)

    def _parts(self) -> list[tuple[Entries, Entries]]:
        """What all workers wrote, as soon as all have said so."""
        wanted = [_PARTS.format(worker=worker) for worker in range(self.manifest["num_shards"])]
        deadline, wait_s = time.monotonic() + self._patience_s, _FIRST_WAIT_S
        while missing := set(wanted) - set(self._folder.files()):
            if self._given_up.is_set() or time.monotonic() > deadline:
                raise UserError("a snapshot was given up", self._folder.path, got=f"no {', '.join(sorted(missing))}")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        parts = [json.loads(self._folder.read(name)) for name in wanted]
        for part in parts:
            if "error" in part:
                raise UserError(part["error"])
        return [(part["rows"], part["files"]) for part in parts]
