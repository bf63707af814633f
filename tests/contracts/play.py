"""An example played on the real store, by one worker or by many, and what was seen of it held against the oracle.

check() plays an example through: each segment on fresh workers, which load what was written before them. What all
workers saw must be what the oracle did.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import threads
import torch
from contracts.examples import (
    LABELS,
    OPTIMIZERS,
    Account,
    Batch,
    Days,
    Evict,
    Example,
    Hold,
    Score,
    Train,
    coefficients,
    jagged,
    key_of,
    owner_of,
    signed,
)
from contracts.oracle import Known, Oracle, Step, Table
from numpy.typing import NDArray

from embeddings.accounts import account
from embeddings.buckets import NUM_BUCKETS, keys_of, unhash64
from embeddings.client import Block, ShardedEmbeddings
from embeddings.exchange import Exchange, LocalExchange
from embeddings.pool import MakeKernel
from embeddings.pooling import Pooling, pool, statistics
from embeddings.shard import Shard, TooManyRows
from embeddings.snapshot import Layer, Part, Snapshot, compact, load

LOCAL = pyarrow.fs.LocalFileSystem()
# Sums are exact in float32, roots and quotients to half a unit in the last place (6e-8), in a few dozen steps.
_CLOSE = 1e-5
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # many small files are written and removed
Array = NDArray[Any]


@dataclass
class Written:
    """A snapshot on disk: one worker's parts of it. instant: before which event of the segment it was taken."""

    base: bool
    instant: int
    folder: str
    parts: list[Part]


@dataclass
class Seen:
    """What one worker saw: as it began, of each event, and at the end. too_full: what Shard.fit refused."""

    overall: dict[str, Array] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    too_full: tuple[str, int, int] | None = None


class Worker:
    """One worker's store, and the snapshot that it holds."""

    def __init__(self, exchange: Exchange, example: Example, number: int, folder: str, kernel: MakeKernel, device: str):
        self.example, self.exchange, self.segment = example, exchange, example.segments[number]
        self.shard = Shard(
            self.segment.tables,
            OPTIMIZERS[example.optimizer],
            exchange,
            labels=LABELS,
            tallies=example.tallies,
            device=torch.device(device),
            kernel=kernel,
        )
        self.store = ShardedEmbeddings(self.shard, example.feature_tables, own=example.own)
        self.seen, self.folder = Seen(), f"{folder}/{number}"
        self._held: tuple[Snapshot, bool, int] | None = None

    def play(self, layers: Sequence[Layer], day: int, step: int) -> Seen:
        self.step = step
        load(self.shard, LOCAL, [Layer(layer.folder, layer.overlapping(self.shard.buckets)) for layer in layers])
        if len(layers) % 2:  # before or after, either way
            self.shard.begin_day(day)
        try:
            self.shard.fit()
        except TooManyRows as error:
            self.seen.too_full = (error.table, error.rows, error.capacity_rows)
            return self.seen
        self.shard.begin_day(day)
        self.seen.overall = dict(self.shard.overall_S)
        for instant, event in enumerate(self.segment.events):
            self.seen.events.append(self.do(event, instant))
        if not self.segment.lost:
            self.write()
        self.seen.tables = {name: self.everything(name) for name in self.shard.names}
        return self.seen

    def do(self, event: Any, instant: int) -> Any:
        match event:
            case Train(drawn, push):
                return self.train(self.example.batch(drawn), push)
            case Score(drawn):
                blocks = self.store.pull(self.ids(self.example.batch(drawn)), insert=False)
                return self.read(blocks, [self.vectors(block) for block in blocks])
            case Days(days):
                self.shard.end_day()
                self.shard.begin_day(self.shard.periods.today + days)
                return dict(self.shard.overall_S)
            case Evict(table, rows):
                return self.shard.evict_least(self.shard.names[table % len(self.shard.names)], rows)
            case Hold(base, later):
                self.write()
                self._held = (Snapshot(self.shard, base=base), base, instant)
                if not later:
                    self.write()
            case Account(reset):
                found = account(self.shard)
                if reset:
                    self.shard.reset_counts()
                return found

    def write(self) -> None:
        if self._held:
            snapshot, base, instant = self._held
            folder = f"{self.folder}-{instant}"
            self.seen.written.append(Written(base, instant, folder, snapshot.write(LOCAL, folder)))
            self._held = None

    def mine(self, batch: Any) -> Any:
        """This worker's rows."""
        return batch[self.exchange.rank :: self.exchange.num_workers]

    def ids(self, batch: Batch) -> dict[str, Any]:
        mine = self.mine(batch)
        return {feature: jagged([row.ids[feature] for row in mine]) for feature in self.example.feature_tables}

    def train(self, batch: Batch, push: str) -> Any:
        labels_BL = torch.tensor([row.labels for row in self.mine(batch)], dtype=torch.int64).view(-1, len(LABELS))
        blocks = self.store.pull(self.ids(batch), insert=True, labels_BL=labels_BL)
        vectors = [self.vectors(block) for block in blocks]
        if push == "push":
            torch.stack([self.loss(*pair, len(batch)) for pair in zip(blocks, vectors, strict=True)]).sum().backward()
        if push != "none":
            self.store.push(blocks)
        self.step += 1
        return self.read(blocks, vectors)

    def loss(self, block: Block, vectors_FBD: torch.Tensor, batch: int) -> torch.Tensor:
        """Linear in the vectors: the gradients are the coefficients."""
        features, dim = list(self.example.feature_tables), block.rows_UD.shape[1]
        factors = np.stack([self.mine(coefficients(features.index(f), batch, self.step, dim)) for f in block.features])
        return (torch.from_numpy(factors).to(vectors_FBD) * vectors_FBD).sum()

    def vectors(self, block: Block) -> torch.Tensor:
        return pool(block, {feature: Pooling(mean=False) for feature in block.features})

    def read(self, blocks: Sequence[Block], vectors: Sequence[torch.Tensor]) -> dict[str, tuple[Array, Array]]:
        """By feature a vector and the sums of the statistics, each for each of this worker's rows."""
        found = {}
        for block, vectors_FBD in zip(blocks, vectors, strict=True):
            for feature, vectors_BD in zip(block.features, vectors_FBD.detach().cpu().numpy(), strict=True):
                found[feature] = vectors_BD, self.statistics(block, feature)
        return found

    def statistics(self, block: Block, feature: str) -> Array:
        none = np.zeros((block.ids.num_rows // len(block.features), 0))
        return statistics(block, feature).cpu().numpy() if block.statistics_US.shape[1] else none

    def everything(self, table: str) -> dict[str, Any]:
        """All that this worker knows of a table."""
        shard, t = self.shard, self.shard.number[table]
        columns, pool = shard.export(table), shard.pool_of(table)
        found: dict[str, Any] = {
            "rows": columns | {"id": ids_of(columns["key"])},
            "tallies": shard.ledger.columns(t),
            "waiting": waiting_in(shard, table),
            "default": pool.known(pool.default_rows(np.array([t], np.uint8))),
        }
        if table in shard.sketches:
            ids = [i for i in self.example.ids if owner_of(i, self.exchange.num_workers) == self.exchange.rank]
            keys = keys_of(np.array(ids, np.int64))
            found["sketch"] = dict(zip(ids, shard.sketches[table].add(keys, np.zeros_like(keys)), strict=True))
        return found


def ids_of(keys: Array) -> Array:
    ids: Array = unhash64(torch.from_numpy(keys)).numpy()
    return ids


def waiting_in(shard: Shard, table: str) -> dict[int, tuple[int, int]]:
    """Sightings and last day of each id that waits for its row."""
    waiting = shard.waiting.ids
    rows = waiting.rows(shard.number[table])
    days = np.array(shard.periods.days)[waiting.seen_R[rows]].tolist()
    counts = zip(waiting.count_R[rows].tolist(), days, strict=True)
    return dict(zip(ids_of(waiting.key_R[rows]).tolist(), counts, strict=True))


Task = tuple[Example, int, str, list[Layer], int, int]
Play = Callable[..., list[Seen]]  # what the workers of a segment saw; called with a Task's parts


def play_segment(exchange: Exchange, kernel: MakeKernel, device: str, *args: Any) -> Seen:
    """What each worker does: play segment `number` of an example."""
    example, number, folder, *rest = args
    return Worker(exchange, example, number, folder, kernel, device).play(*rest)


def on_threads(kernel: MakeKernel, device: str = "cpu") -> Play:
    """As many threads as the segment has workers."""

    def play(example: Example, number: int, *args: Any) -> list[Seen]:
        workers = example.segments[number].workers
        return threads.run(workers, play_segment, kernel, device, example, number, *args)

    return play


def alone(kernel: MakeKernel, device: str = "cpu") -> Play:
    """One worker, without any other."""
    return lambda *task: [play_segment(LocalExchange(), kernel, device, *task)]


class Chain:
    """The example's oracle, and the layers that were written, from segment to segment."""

    def __init__(self, example: Example, folder: str):
        self.example, self.folder, self.number = example, folder, 0
        self.oracle, self.layers = Oracle(example), list[Layer]()
        self.too_full: tuple[str, int, int] | None = None

    def begin(self) -> Task:
        """What the workers of the next segment are told."""
        segment, oracle = self.example.segments[self.number], self.oracle
        if segment.compact and self.layers:
            self.layers = [self._folded(segment.compact)]
        self.too_full = oracle.load(segment.tables)
        return self.example, self.number, self.folder, self.layers, oracle.day, oracle.step

    def _folded(self, pieces: int) -> Layer:
        folder = f"{self.folder}/{self.number}-folded"
        cuts = [NUM_BUCKETS * p // pieces for p in range(pieces + 1)]
        parts = [compact(LOCAL, self.layers, folder, range(cuts[p], cuts[p + 1])) for p in range(pieces)]
        return Layer(folder, [part for piece in parts for part in piece])

    def end(self, seen: Sequence[Seen]) -> bool:
        """Hold what the workers saw against the oracle. False when the example ends here."""
        segment, oracle, example = self.example.segments[self.number], self.oracle, self.example
        assert [worker.too_full for worker in seen] == [self.too_full] * len(seen)
        if self.too_full:
            return False
        check_overall(oracle, [worker.overall for worker in seen])
        saved: dict[int, tuple[Any, int]] = {}
        for instant, event in enumerate(segment.events):
            self._event(event, [worker.events[instant] for worker in seen])
            if isinstance(event, Hold):
                saved[instant] = copy.deepcopy(oracle.tables), oracle.day
        for parts in zip(*(worker.written for worker in seen), strict=True):
            whole = Layer(parts[0].folder, [part for written in parts for part in written.parts])
            self.layers = [whole] if parts[0].base or not self.layers else [*self.layers, whole]
            oracle.saved, oracle.saved_day = saved[parts[0].instant]
        for name, table in oracle.tables.items():
            check_table(table, [worker.tables[name] for worker in seen])
        self.number += 1
        return self.number < len(example.segments)

    def _event(self, event: Any, found: Sequence[Any]) -> None:
        oracle, example, workers = self.oracle, self.example, len(found)
        match event:
            case Train(drawn, push):
                batch = example.batch(drawn)
                check_read(example, batch, oracle.train(batch, push, workers), found)
            case Score(drawn):
                batch = example.batch(drawn)
                check_read(example, batch, oracle.score(batch), found)
            case Days(days):
                oracle.end_day()
                oracle.begin_day(oracle.day + days)
                check_overall(oracle, found)
            case Evict(table, rows):
                name = list(oracle.tables)[table % len(oracle.tables)]
                assert found == [oracle.evict_least(name, rows)] * workers
            case Account(reset):
                for name in oracle.tables:
                    expected = oracle.account(name, workers)
                    for mine in found:
                        assert {what: mine[name][what] for what in expected} == expected
                if reset:
                    oracle.reset_counts()


def check(example: Example, play: Play) -> None:
    """Play an example through, and hold it against the oracle."""
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        chain = Chain(example, folder)
        while chain.end(play(*chain.begin())):
            pass


def check_read(example: Example, batch: Batch, expected: Step, found: Sequence[Any]) -> None:
    """What a batch read: each worker saw its rows, and features of tables."""
    for worker, mine in enumerate(found):
        assert mine.keys() == example.feature_tables.keys()
        for feature, (vectors_BD, statistics_BS) in mine.items():
            rows = slice(worker, None, len(found))
            slack = expected.slack[feature][rows, None] if len(batch[rows]) else 0.0
            assert_near(vectors_BD, expected.vectors[feature][rows].reshape(vectors_BD.shape), slack)
            assert_near(statistics_BS, widened(expected.statistics[feature][rows], statistics_BS.shape[1]))


def check_overall(oracle: Oracle, found: Sequence[Mapping[str, Array]]) -> None:
    """The statistics over all ids, on every worker."""
    for mine in found:
        assert mine.keys() == oracle.overall().keys()
        for name, expected in oracle.overall().items():
            assert_near(mine[name], widened([expected], mine[name].size)[0])


def widened(statistics_BS: Any, width: int) -> Array:
    """With zeros for what only other tables of the pool have."""
    found = np.asarray(statistics_BS, np.float64)
    return np.pad(found, ((0, 0), (0, width - found.shape[1])))


def assert_near(found: Array, expected: Array, slack: Any = 0.0) -> None:
    assert (np.abs(found - expected) <= _CLOSE * (1 + np.abs(expected)) + slack).all(), f"{found} is not {expected}"


def check_table(table: Table, found: Sequence[Mapping[str, Any]]) -> None:
    """All that is known of a table, over all workers: each id with its owner, and once."""
    for worker, mine in enumerate(found):
        ids = [*mine["rows"]["id"].tolist(), *mine["waiting"]]
        assert all(owner_of(i, len(found)) == worker for i in ids)
        assert mine["rows"]["key"].tolist() == sorted(signed(key_of(i)) for i in mine["rows"]["id"].tolist())
        for name in ("weight", "count", *table.default.state):  # every worker keeps the same copy, to the bit
            assert mine["default"][name].tobytes() == found[0]["default"][name].tobytes()
    check_known(table, [table.default], found[0]["default"], (), default=True)
    assert {i: n for mine in found for i, n in mine["waiting"].items()} == table.waiting
    assert sorted(i for mine in found for i in mine["rows"]["id"].tolist()) == sorted(table.rows)
    for mine in found:
        check_known(table, [table.rows[i] for i in mine["rows"]["id"].tolist()], mine["rows"], mine["tallies"])
    if table.sketched:
        cells = {i: table.cells.get(table.cell(i), 0) for mine in found for i in mine["sketch"]}
        assert {i: n for mine in found for i, n in mine["sketch"].items()} == cells


def check_known(
    table: Table, known: Sequence[Known], columns: Mapping[str, Array], tallies: Sequence[str], default: bool = False
) -> None:
    """What is known of some rows, column by column."""
    if not known:
        return
    slack = np.array([[k.slack] for k in known])
    assert columns["count"].tolist() == [k.count for k in known]
    assert_near(columns["weight"], np.array([k.weight for k in known]), slack)
    for name in known[0].state:
        state = np.array([k.state[name] for k in known])
        assert_near(columns[name].reshape(state.shape), state, 50 * slack)  # FTRL's moves with weight times rate
    if not default:
        assert columns["last_seen_day"].tolist() == [k.day for k in known]
        sums = [k.sums | {f"{name}_today": more for name, more in k.today.items()} for k in known]
        assert_near(columns["tally"], np.array([[of.get(name, 0.0) for name in tallies] for of in sums]))
