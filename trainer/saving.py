"""How an interval gets onto the disk: snapshots while it is being trained, and the commit at its end.

    begin       the learner goes on from the interval's newest snapshot, or from the newest commit before it
    after_step  now and then all take hold of the same instant, between the same two steps; a thread writes it
    commit      what has changed since, or all of it, then the manifest

Training never waits for a snapshot: workers agree on it through files (writing.py), and one that is due while another
is being written waits its turn. One that fails is no error: what it held comes into the next, and the manifest counts
it. What a snapshot costs is its instant: copies of the dense net and marks on the rows.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from embeddings.buckets import NUM_BUCKETS
from embeddings.snapshot import Snapshot
from trainer.agree import gather_json, together, told
from trainer.checkpoint import COUNTED, DENSE, FORMAT, MANIFEST, Checkpoint, Checkpoints, Manifest, folder_of, tables_of
from trainer.counted import Counted, State
from trainer.dense import dense_state
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.learner import Learner
from trainer.retention import clean
from trainer.writing import Entries, Writing, free, with_layer, write_files

_LOOK_EVERY_S = 1.0  # so often the workers agree on whether a snapshot is due
_MOST_STEPS = 10_000  # between two looks, whatever the clock says


@dataclass
class UnderWay:
    """Where an interval is gone on with. scored: what its score phase found (on worker 0; elsewhere empty), None before
    it. counted: what its training had counted, None at its beginning.
    """

    scored: dict[str, Any] | None = None
    counted: State | None = None


class Saving:
    """Keeps one learner on the disk, interval after interval. begin, after_step and commit are collective.

    base_every: every so many intervals all rows are written, in between only what changed. every_s: seconds between
    snapshots within an interval; None: there are none. retries: how often a commit that fails is tried again, after
    pauses of pause_s, twice as long each time. patience_s: how long worker 0 waits for the others' parts of a snapshot.
    fresh: the learner knows nothing, and the first begin fills it.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        learner: Learner,
        *,
        base_every: int = 7,
        every_s: float | None = None,
        retries: int = 3,
        pause_s: float = 1.0,
        patience_s: float = 600.0,
        fresh: bool = True,
    ):
        self._checkpoints, self.learner, self._exchange = checkpoints, learner, learner.exchange
        self._base_every, self._every_s = base_every, every_s
        self._retries, self._pause_s, self._patience_s = retries, pause_s, patience_s
        self._newest: Checkpoint | None = None  # the newest commit that the learner builds on
        self._layers: list[dict[str, Any]] = []  # from a base to the newest snapshot; whole on worker 0
        self._own: list[str] = []  # the newest snapshot's files besides rows
        self._lost: list[str] = []  # folders of snapshots that failed
        self._writing: Writing | None = None
        self._fresh = fresh

    @property
    def newest(self) -> Interval | None:
        """The newest committed interval that the learner builds on; None: it began with nothing."""
        return self._newest.interval if self._newest else None

    @property
    def _below(self) -> str | None:
        """The commit that the interval builds on; a snapshot of it builds on the same one."""
        return self._newest.id if self._newest else None

    @property
    def is_writing(self) -> bool:
        """A snapshot is being written."""
        return self._writing is not None and self._writing.is_alive()

    def begin(self, interval: Interval, about: Any = None) -> UnderWay:
        """Begin an interval, or go on with it. The first call fills a fresh learner. about: what a snapshot is of
        (data, settings), as JSON holds it; one that is of something else is not gone on with. Collective.
        """
        self._interval, self._about = interval, json.loads(json.dumps(about))
        self._under_way, self._snapshots = UnderWay(), {"written": 0, "failed": 0}
        self._own = []
        if self._fresh:
            self._fresh = False
            self._fill()
        self._tidy()
        self._since = self._looked = time.monotonic()
        self._look_at = self._looked_at = 0
        return self._under_way

    def _fill(self) -> None:
        """Load the interval's own snapshot, or else the newest commit before it."""
        checkpoints, learner = self._checkpoints, self.learner
        self._newest = together(self._exchange, lambda: checkpoints.latest(before=self._interval))
        progress = together(self._exchange, lambda: checkpoints.stored(lambda: checkpoints.progress(self._interval)))
        if progress is not None and (progress.manifest["about"], progress.manifest["below"]) != (
            self._about,
            self._below,
        ):
            progress = None
        attempt = told(self._exchange, progress and progress.manifest["attempt"])
        everybody_has_it = self._all(progress is not None and progress.manifest["attempt"] == attempt)
        if everybody_has_it and progress is not None and self._is_whole(progress):
            checkpoints.fill(learner, progress)
            self._layers, self._own = progress.layers, _own_files(progress.manifest)
            self._under_way.scored = progress.manifest["scored"] if self._exchange.rank == 0 else {}
            self._under_way.counted = checkpoints.counted(learner, progress)
        elif self._newest:
            checkpoints.load(learner, self._newest)
            self._layers = self._newest.layers

    def _all(self, mine: bool) -> bool:
        """Whether it holds on every worker. Collective."""
        return not int(self._exchange.all_reduce(torch.tensor([int(not mine)])))

    def _is_whole(self, progress: Checkpoint) -> bool:
        """A snapshot that cannot be read is no error: the interval begins anew. Collective."""
        try:
            self._checkpoints.check(self.learner, progress)
        except UserError:
            return False
        return True

    def _tidy(self) -> None:
        """Worker 0 removes what killed attempts left behind. What cannot be removed now is found the next time."""
        if self._exchange.rank == 0:
            with contextlib.suppress(UserError):
                for interval in (self._interval, *([self._newest.interval] if self._newest else [])):
                    self._checkpoints.stored(lambda interval=interval: clean(self._checkpoints, interval))  # type: ignore[misc]

    def after_step(self, counted: Counted) -> None:
        """Between two steps: take a snapshot when worker 0's clock says that one is due and the one before is written.
        Collective; nearly always it costs a comparison.
        """
        if self._every_s is None or counted.steps < self._look_at:
            return
        steps, attempt = self._look(counted.steps)
        self._look_at = counted.steps + steps
        if attempt:
            self._take(f"{attempt:012x}", counted)

    def _look(self, steps: int) -> tuple[int, int]:
        """After how many steps to look again, and the number of the snapshot that is to be taken now, or 0.
        Collective.
        """
        writing, rank, now = self._writing, self._exchange.rank, time.monotonic()
        busy = self.is_writing
        failed = writing is not None and not busy and writing.error is not None
        next_look = number = 0
        if rank == 0 and self._every_s is not None:
            step_s = (now - self._looked) / max(steps - self._looked_at, 1)
            next_look = int(min(min(_LOOK_EVERY_S, self._every_s) / max(step_s, 1e-9), _MOST_STEPS))
            number = _number() if now - self._since >= self._every_s else 0
            self._looked, self._looked_at = now, steps
        mine = torch.tensor([busy, failed, next_look, number], dtype=torch.int64)
        num_busy, num_failed, next_look, number = self._exchange.all_reduce(mine).tolist()
        if num_busy:
            if num_failed and writing is not None:
                writing.give_up()
            return max(next_look, 1), 0
        self._settle(good=not num_failed)
        return max(next_look, 1), number

    def _settle(self, *, good: bool) -> None:
        """The last snapshot exists, or is given up: then what it held comes into the next."""
        if self._writing is None:
            return
        if good:
            self._layers, self._own = self._writing.manifest["layers"], _own_files(self._writing.manifest)
        else:
            self._writing.snapshot.undo()
            self._lost.append(folder_of(self._writing.manifest))
        self._snapshots["written" if good else "failed"] += 1
        self._writing = None

    def _take(self, attempt: str, counted: Counted) -> None:
        """Take hold of this instant, and let a thread write it."""
        rank, self._since = self._exchange.rank, time.monotonic()
        states = {COUNTED.format(worker=rank): counted.state()}
        if rank == 0:
            states[DENSE] = dense_state(self.learner)
        about = {"about": self._about, "below": self._below, "scored": self._under_way.scored, "steps": counted.steps}
        self._writing = Writing(
            self._checkpoints,
            self._interval,
            Snapshot(self.learner.embeddings.shard, base=not self._layers),
            states,
            self._manifest(attempt) | about,
            rank=rank,
            patience_s=self._patience_s,
            superseded=self._own,
            lost=self._lost if rank == 0 else [],
        )
        self._lost = []
        self._writing.start()

    def commit(self, report: dict[str, Any], **more: Any) -> Checkpoint:
        """Write what changed since the last snapshot, or everything when a base is due, and commit the interval. more:
        further entries of the manifest. When the storage refuses, also after retries, it is a UserError on all workers,
        and nothing is committed. Collective.
        """
        self._end_writing()
        together(self._exchange, self._checkpoints.mine)  # else what is written now would lie about for nobody
        if self._exchange.rank == 0:
            free(self._checkpoints.storage, self._lost)
        self._lost = []
        base = told(self._exchange, self._base_is_due())
        attempt, mine = self._retried(lambda: self._write(base))
        parts = gather_json(self._exchange, mine)
        manifest = self._manifest(attempt) | {"report": report, "snapshots": self._snapshots} | more
        together(
            self._exchange, lambda: self._exchange.rank or self._retried(lambda: self._publish(manifest, base, parts))
        )
        checkpoint = together(self._exchange, lambda: self._checkpoints.open(self._interval))
        self._newest, self._layers = checkpoint, checkpoint.layers
        self._tidy()
        return checkpoint

    def _end_writing(self) -> None:
        """Wait until the last snapshot is written or given up. Collective."""
        writing, rank = self._writing, self._exchange.rank
        if writing is None:
            return
        if rank:
            writing.join()
        if not self._all(rank == 0 or writing.error is None):
            writing.give_up()
        writing.join()
        self._settle(good=self._all(writing.error is None))

    def _base_is_due(self) -> bool:
        """The layers of one chain have the same columns, and are of base_every intervals at most."""
        if self._newest is None or self._newest.manifest["tables"] != tables_of(self.learner):
            return True
        return len({layer["interval"] for layer in self._newest.layers}) >= self._base_every

    def _write(self, base: bool) -> tuple[str, tuple[Entries, Entries]]:
        """An attempt's name and this worker's files. When one worker fails, all raise, and it is as if nothing had been
        tried. Collective.
        """
        exchange, checkpoints = self._exchange, self._checkpoints
        attempt = f"{told(exchange, _number()):012x}"
        folder = checkpoints.storage.within(f"{self._interval.folder}/{attempt}")
        states = {DENSE: dense_state(self.learner)} if exchange.rank == 0 else {}
        snapshot = Snapshot(self.learner.embeddings.shard, base=base)
        try:
            return attempt, together(
                exchange, lambda: checkpoints.stored(lambda: write_files(folder, snapshot, states))
            )
        except UserError:
            snapshot.undo()
            if exchange.rank == 0:
                with contextlib.suppress(UserError):
                    checkpoints.stored(folder.delete_folder)  # the next try needs the space
            raise

    def _publish(self, manifest: Manifest, base: bool, parts: list[tuple[Entries, Entries]]) -> None:
        """The commit: from here on the interval is trained. Where it is not known whether this went through, the files
        must stay: the manifest may be there.
        """
        manifest = with_layer(manifest | ({"layers": []} if base else {}), parts)
        self._checkpoints.stored(lambda: self._checkpoints.write_manifest(self._interval, MANIFEST, manifest))

    def _retried(self, work: Callable[[], Any]) -> Any:
        """What the work returns, tried again when the storage refuses: for a while."""
        for retry in range(self._retries):
            try:
                return work()
            except UserError:
                time.sleep(self._pause_s * 2**retry)
        return work()

    def _manifest(self, attempt: str) -> Manifest:
        """What commits and snapshots have alike; the layers are those below the new one."""
        return {
            "format": FORMAT,
            "interval": self._interval.name,
            "attempt": attempt,
            "num_buckets": NUM_BUCKETS,
            "num_shards": self._exchange.num_workers,
            "order": self.learner.order,
            "tables": tables_of(self.learner),
            "layers": self._layers,
        }


def _number() -> int:
    """Of an attempt: its folder's name."""
    return uuid.uuid4().int >> 80


def _own_files(manifest: Manifest) -> list[str]:
    return [f"{folder_of(manifest)}/{name}" for name in manifest["files"]]
