"""Pull and push against dicts of float64 rows, with one, two and three workers that share every batch unevenly.

Each worker runs everything once and returns what it saw; the tests put the workers' parts together and compare them
with the oracle, which knows nothing of workers. Two tables share a pool, one feature has no part in the loss, and one
table has no feature.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import many
import numpy as np
import pytest
import threads
import torch

from embeddings.buckets import keys_of, owner_of, unhash64
from embeddings.client import Block, ShardedEmbeddings
from embeddings.exchange import Exchange, LocalExchange
from embeddings.jagged import Jagged
from embeddings.kernels import FbgemmRows, TorchRows
from embeddings.optim import Adam, RowwiseAdagrad, Sgd
from embeddings.pool import MakeKernel
from embeddings.shard import COUNTS, Shard
from embeddings.table import Admission, TableConfig
from embeddings.tallies import IMPRESSIONS, Tally

TABLES = {
    "user": TableConfig(dim=4, capacity_rows=4, init_scale=0.2),
    "item": TableConfig(dim=8, capacity_rows=4, init_scale=0.2),
    "nobody": TableConfig(dim=16, capacity_rows=4, default_row="trained"),
    "ad": TableConfig(dim=8, capacity_rows=4, min_count=3, default_row="trained"),
    "shop": TableConfig(dim=8, min_count=2, admission=Admission("sketch"), init_scale=0.2),
}
TALLIES = {  # half-lives of which powers of two come: exact in float32
    "item": [
        Tally("shown", {IMPRESSIONS: 1.0}, 1.0),
        Tally("worth", {"click": 2.0, "buy": 8.0, IMPRESSIONS: 1.0}, 0.5, by_day=True),
    ]
}
LABELS = ["view", "click", "buy"]
FEATURES = {"user_id": "user", "ad_id": "ad", "item_id": "item", "history": "item", "ads_seen": "ad", "shop_id": "shop"}
OWN = ["item_id", "user_id"]
WITHOUT_LOSS = "ads_seen"
NUM_STEPS, STEPS_A_DAY, NUM_ROWS, LR = 15, 5, 24, 0.1
EXTREMES = [0, -1, 2**63 - 1, -(2**63)]
KNOWN = np.array([*EXTREMES, *range(1, 30), *(7**20 * k for k in range(-3, 4))], np.int64)  # ids of every step
UNKNOWN = 10**9
Array = np.ndarray[Any, Any]
Columns = dict[str, Array]


@dataclass
class Step:
    """One global batch: for each feature its lists of ids, what the loss wants each id's row to be, what happened."""

    ids: dict[str, Jagged]
    targets: dict[str, Array]
    labels_BL: torch.Tensor


@functools.cache
def steps() -> list[Step]:
    """Lists of 0 to 3 ids, most of them seen before and many twice in a batch. Step 2 has no rows at all."""
    return [make_step(np.random.default_rng(s), 0 if s == 2 else NUM_ROWS) for s in range(NUM_STEPS)]


def make_step(rng: np.random.Generator, num_rows: int) -> Step:
    ids, targets = {}, {}
    for feature, table in FEATURES.items():
        lengths = torch.tensor(rng.integers(0, 4, num_rows), dtype=torch.int64)
        count = int(lengths.sum())
        ids[feature] = Jagged.from_lengths(torch.tensor(rng.choice(KNOWN, count)), lengths)
        targets[feature] = rng.normal(size=(count, TABLES[table].dim)).astype(np.float32)
    return Step(ids, targets, torch.tensor(rng.integers(0, 3, (num_rows, len(LABELS))).astype(np.float32)))


def shares(step: int, num_workers: int) -> list[tuple[int, int]]:
    """Each worker's rows. Step 0: the last worker has all; step 1: the first; then uneven cuts."""
    rows = steps()[step].ids["user_id"].num_rows
    cuts = (
        np.sort(np.random.default_rng(100 + step).integers(0, rows + 1, num_workers - 1)) if step > 1 else np.array([])
    )
    cuts = np.full(num_workers - 1, [0, rows][step]) if step < 2 else cuts
    edges = [0, *cuts.tolist(), rows]
    return list(zip(edges, edges[1:], strict=False))


@functools.cache
def part_of(step: int, rank: int, num_workers: int) -> Step:
    whole, (start, end) = steps()[step], shares(step, num_workers)[rank]
    ids = {feature: jagged.select(torch.arange(start, end)) for feature, jagged in whole.ids.items()}
    targets = {f: whole.targets[f][jagged.offsets[start] : jagged.offsets[end]] for f, jagged in whole.ids.items()}
    return Step(ids, targets, whole.labels_BL[start:end])


# What the workers run


@dataclass
class Seen:
    """What one worker saw."""

    reads: list[dict[str, Array]]  # before each step, the row of each id of each feature
    told: list[dict[str, Array]]  # and the statistics
    rows: dict[str, Columns]  # at the end, of its shard
    defaults: dict[str, Array]
    counts: dict[str, Array]
    pools: list[list[str]]  # the features of each block
    scored: dict[str, Array] = field(default_factory=dict)
    counts_of_scoring: dict[str, Array] = field(default_factory=dict)
    after_scoring: dict[str, Columns] = field(default_factory=dict)
    after_no_gradient: dict[str, Columns] = field(default_factory=dict)
    rounded: tuple[Array, dict[str, Columns]] | None = None
    life: "Life | None" = None


def work(exchange: Exchange, kernel: MakeKernel = FbgemmRows) -> Seen:
    shard = Shard(TABLES, RowwiseAdagrad(LR), exchange, labels=LABELS, tallies=TALLIES, seed=1, kernel=kernel)
    embeddings = ShardedEmbeddings(shard, FEATURES, own=OWN)
    reads, told, pools = [], [], []
    for s in range(NUM_STEPS):
        shard.begin_day(1_000 + s // STEPS_A_DAY)
        blocks = train(embeddings, part_of(s, exchange.rank, exchange.num_workers))
        reads.append({f: of_each_id(blocks, f).detach().numpy() for f in FEATURES})
        told.append({f: of_each_id(blocks, f, "statistics_US").numpy() for f in FEATURES})
        pools = [block.features for block in blocks]
    seen = Seen(reads, told, exported(shard), defaults_of(shard), shard.counts, pools)
    shard.reset_counts()
    scoring = embeddings.pull(scoring_ids(exchange.rank), insert=False)
    assert not any(block.rows_UD.requires_grad for block in scoring)
    seen.scored = {feature: of_each_id(scoring, feature).numpy() for feature in FEATURES}
    seen.counts_of_scoring = {name: of.copy() for name, of in shard.counts.items()}
    seen.after_scoring = exported(shard)
    embeddings.push(embeddings.pull(part_of(3, exchange.rank, exchange.num_workers).ids, insert=True))
    seen.after_no_gradient = exported(shard)
    seen.rounded, seen.life = travel_rounded(exchange), live(exchange, kernel)
    return seen


def train(embeddings: ShardedEmbeddings, part: Step) -> list[Block]:
    """One step of sum (row - target)^2 / 2 over the ids of the features with a loss; returns what was pulled."""
    blocks = embeddings.pull(part.ids, insert=True, labels_BL=part.labels_BL)
    read = {feature: of_each_id(blocks, feature) for feature in FEATURES if feature != WITHOUT_LOSS}
    errors = [(rows - torch.tensor(part.targets[f])).square().sum() / 2 for f, rows in read.items()]
    torch.stack(errors).sum().backward()
    embeddings.push(blocks)
    return blocks


def of_each_id(blocks: list[Block], feature: str, what: str = "rows_UD") -> torch.Tensor:
    block = next(block for block in blocks if feature in block.features)
    num_rows = block.ids.num_rows // len(block.features)
    first = block.features.index(feature) * num_rows
    places = block.ids.values_N[block.ids.offsets[first] : block.ids.offsets[first + num_rows]]
    found: torch.Tensor = getattr(block, what)[places]
    return found


def scoring_ids(rank: int) -> dict[str, Jagged]:
    """Two known ids, one that every worker asks for and nobody knows, and a worker's own unknown one, twice."""
    values = torch.tensor([-1, UNKNOWN, UNKNOWN + 1 + rank, 2**63 - 1, UNKNOWN + 1 + rank])
    return {feature: Jagged.from_lengths(values, torch.tensor([2, 0, 3])) for feature in FEATURES}


def exported(shard: Shard) -> dict[str, Columns]:
    tables = {name: shard.export(name) for name in shard.names}
    for columns in tables.values():
        del columns["row"], columns["seen"]  # where a row is, and a period's number, are a shard's own affair
        columns["id"] = unhash64(torch.from_numpy(columns["key"])).numpy()
    return tables


def defaults_of(shard: Shard) -> dict[str, Array]:
    rows = {n: shard.pool_of(n).default_rows(np.array([shard.number[n]], np.uint8)) for n in shard.names}
    return {name: shard.pool_of(name).lookup(row)[0].numpy() for name, row in rows.items()}


def travel_rounded(exchange: Exchange) -> tuple[Array, dict[str, Columns]]:
    """One step with a payload of 16 bits: id 0 is everybody's, the others are one worker's. Returns the rows read."""
    table = {"x": TableConfig(dim=4, init_scale=0.2)}
    embeddings = ShardedEmbeddings(Shard(table, Sgd(1.0), exchange), {"f": "x"}, payload=torch.bfloat16)
    ids = torch.tensor([0, 1 + exchange.rank])
    (block,) = embeddings.pull({"f": Jagged.from_lengths(ids, torch.tensor([2]))}, insert=True)
    read = of_each_id([block], "f").detach().numpy()
    block.rows_UD.grad = torch.zeros_like(block.rows_UD)
    block.rows_UD.grad[block.ids.values_N] = gradients_of_rounded(exchange.rank)
    embeddings.push([block])
    return read, exported(embeddings.shard)


def gradients_of_rounded(rank: int) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(rank))


# A life of admissions and evictions, with gradients whose sums are exact in any order


LIFE = {
    "full": TableConfig(dim=4, capacity_rows=25, grow=False, value={"click": 1.0}, value_half_life_days=1.0),
    "shut": TableConfig(dim=4, capacity_rows=25, grow=False, when_full="reject", init_scale=0.1),
    "kept": TableConfig(dim=4, budget_rows=15, ttl_days=2, init_scale=0.1),
    "half": TableConfig(dim=4, dtype="float16", init_scale=0.1),
    "slow": TableConfig(dim=4, min_count=4, admission=Admission(forget_days=2), default_row="trained"),
    "crowd": TableConfig(dim=4, min_count=3, admission=Admission("sketch", cells=1, forget_days=1)),
}


@dataclass
class Life:
    rows: dict[str, Columns]
    counts: dict[str, Array]
    evicted: dict[str, list[int]]
    waiting: list[tuple[int, ...]]  # table, key, count, day
    cells: Array
    overall: Array
    defaults: dict[str, Array]


def live(exchange: Exchange, kernel: MakeKernel) -> Life:
    tallies = {"half": [Tally("clicks", {"click": 1.0}, 3.0, by_day=True)]}
    shard = Shard(LIFE, RowwiseAdagrad(LR), exchange, labels=["click"], tallies=tallies, seed=2, kernel=kernel)
    embeddings = ShardedEmbeddings(shard, {name: name for name in LIFE}, own=list(LIFE))
    for step in range(12):
        rng = np.random.default_rng(step)
        ids, clicks = {name: rng.zipf(1.3, 60) % 80 for name in LIFE}, torch.tensor(rng.integers(0, 2, (60, 1)))
        mine = np.array_split(rng.permutation(60), exchange.num_workers)[exchange.rank]
        if step % 3 == 0:
            shard.begin_day(2_000 + step // 3)
        own = {name: Jagged(torch.tensor(of[mine]), torch.arange(mine.size + 1)) for name, of in ids.items()}
        blocks = embeddings.pull(own, insert=True, labels_BL=clicks[mine].float())
        for block in blocks:
            every = torch.cat([own[feature].values_N for feature in block.features])
            each = ((every.unsqueeze(1) * 7 + torch.arange(4) + step) % 5 - 2) / 64.0
            block.rows_UD.grad = torch.zeros_like(block.rows_UD).index_add_(0, block.ids.values_N, each)
        embeddings.push(blocks)
        if step % 3 == 2:
            shard.end_day()
    waiting = shard.waiting.ids
    rows = np.concatenate([waiting.rows(t) for t in range(len(LIFE))])
    days = np.array(shard.periods.days)[waiting.seen_R[rows]]
    who = zip(
        *(c.tolist() for c in (waiting.table_R[rows], waiting.key_R[rows], waiting.count_R[rows], days)), strict=True
    )
    evicted = {name: np.concatenate([np.zeros(0, np.int64), *of]).tolist() for name, of in shard.evicted.items()}
    shard.begin_day(2_004)
    overall, cells = shard.overall_S["half"], shard.sketches["crowd"].cells
    return Life(exported(shard), shard.counts, evicted, list(who), cells, overall, defaults_of(shard))


@pytest.fixture(scope="module", params=[1, 2, 3])
def seen(request: pytest.FixtureRequest) -> list[Seen]:
    """What each worker saw, in worker order."""
    return [alone()] if request.param == 1 else many.run(request.param, work)


@functools.cache
def alone() -> Seen:
    return work(LocalExchange())


# The oracle


class Oracle:
    """Rows and Adagrad sums of (table, id) in dicts of float64, a step at a time, over the global batch."""

    def __init__(self) -> None:
        self.weight: dict[tuple[str, Any], Array] = {
            (name, None): np.zeros(table.dim) for name, table in TABLES.items()
        }
        self.state: dict[tuple[str, Any], float] = {}
        self.sightings, self.met = Counter[tuple[str, int]](), Counter[tuple[str, str]]()
        self.happened: dict[int, list[tuple[int, dict[str, float]]]] = defaultdict(list)

    def train(self, step: Step) -> dict[str, Array]:
        read, grads = {}, defaultdict[tuple[str, Any], Any](float)
        self._sight(step)
        for feature, table in FEATURES.items():
            owners = [self._row(table, i) for i in step.ids[feature].values_N.tolist()]
            read[feature] = np.array([self.weight[owner] for owner in owners]).reshape(len(owners), TABLES[table].dim)
            for owner, row, target in zip(owners, read[feature], step.targets[feature], strict=True):
                grads[owner] = grads[owner] + (row - target) * (feature != WITHOUT_LOSS)
        for owner, grad in grads.items():
            if owner[1] is not None or TABLES[owner[0]].default_row == "trained":
                self.state[owner] = self.state.get(owner, 0.0) + (grad**2).mean()
                self.weight[owner] = self.weight[owner] - LR * grad / (self.state[owner] ** 0.5 + 1e-8)
        return read

    def _sight(self, step: Step) -> None:
        """Who was seen so often that he gets a row."""
        before = set(self.weight)
        pairs = [(table, i) for f, table in FEATURES.items() for i in step.ids[f].values_N.tolist()]
        self.sightings.update(pairs)
        for table, i in set(pairs):
            due = self.sightings[table, i] >= TABLES[table].min_count
            self.met[table, "hit" if (table, i) in before else "new" if due else "waited"] += 1
            if due:
                self.weight.setdefault((table, i), first_weights(table)[i])

    def _row(self, table: str, one_id: int) -> tuple[str, Any]:
        """Whose row an id reads: its own, or the default."""
        return (table, one_id if (table, one_id) in self.weight else None)

    def statistics(self, step: Step, day: int) -> dict[str, Array]:
        """Before the batch; then what happened on the rows of item_id is entered."""
        told = {}
        for feature in ("item_id", "history"):
            read = [
                [self._tally(tally, i, day) for tally in TALLIES["item"]] for i in step.ids[feature].values_N.tolist()
            ]
            told[feature] = np.array(read, np.float64).reshape(len(read), 2)
        own = step.ids["item_id"]
        for i, row in zip(
            own.values_N.tolist(), torch.arange(own.num_rows).repeat_interleave(own.lengths_B), strict=True
        ):
            events = dict(zip(LABELS, step.labels_BL[row].tolist(), strict=True)) | {IMPRESSIONS: 1.0}
            self.happened[i].append((day, events))
        return told

    def _tally(self, tally: Tally, one_id: int, today: int) -> float:
        worth = [(d, sum(w * of[e] for e, w in tally.weights.items())) for d, of in self.happened[one_id]]
        return sum(w * 2 ** ((d - today) / tally.half_life_days) for d, w in worth if not (tally.by_day and d == today))


@functools.cache
def first_weights(table: str) -> dict[int, Array]:
    """The new row of every id: their law is a promise of test_shard.py."""
    shard = Shard({table: TableConfig(dim=TABLES[table].dim, init_scale=TABLES[table].init_scale)}, Sgd(), seed=1)
    shard.meet(shard.pools[0], keys_of(KNOWN), np.zeros(KNOWN.size, np.uint8), np.ones((KNOWN.size, 1), np.int64))
    columns = exported(shard)[table]
    return dict(zip(columns["id"].tolist(), columns["weight"].astype(np.float64), strict=True))


@functools.cache
def truth() -> tuple[list[dict[str, Array]], list[dict[str, Array]], Oracle]:
    oracle, read, told = Oracle(), [], []
    for s, step in enumerate(steps()):
        told.append(oracle.statistics(step, s // STEPS_A_DAY))
        read.append(oracle.train(step))
    return read, told, oracle


def joined(parts: Sequence[dict[str, Columns]], table: str) -> dict[int, Columns]:
    """What is known of each id of a table, over all shards."""
    found = {}
    for columns in (part[table] for part in parts):
        for place, one_id in enumerate(columns["id"].tolist()):
            assert one_id not in found
            found[one_id] = {name: column[place] for name, column in columns.items()}
    return found


def total(counts: Sequence[dict[str, Array]], table: str, name: str, tables: Sequence[str] = tuple(TABLES)) -> int:
    return sum(int(of_worker[name][list(tables).index(table)]) for of_worker in counts)


# The promises


def test_the_batches_hold_what_is_hard() -> None:
    """Empty workers, an empty batch, repeats, extremes: or the tests below would promise too little."""
    assert shares(0, 3) == [(0, 0), (0, 0), (0, NUM_ROWS)] and shares(1, 2) == [(0, NUM_ROWS), (NUM_ROWS, NUM_ROWS)]
    assert steps()[2].ids["user_id"].num_rows == 0
    parts = [part_of(5, rank, 3).ids["history"].values_N.tolist() for rank in range(3)]
    assert any(len(set(part)) < len(part) for part in parts) and set(parts[0]) & (set(parts[1]) | set(parts[2]))
    oracle = truth()[2]
    assert all({*EXTREMES} <= {i for t, i in oracle.weight if t == table} for table in ("user", "item"))
    assert oracle.met["ad", "waited"] and oracle.met["shop", "waited"] and truth()[1][-1]["history"].all(axis=1).any()


def test_features_of_tables_of_one_layout_come_in_one_block(seen: list[Seen]) -> None:
    expected = [["user_id"], ["item_id", "history"], ["ad_id", "ads_seen", "shop_id"]]
    assert all(worker.pools == expected for worker in seen)  # by the number of their table, then as named


def test_every_pull_reads_the_oracles_rows(seen: list[Seen]) -> None:
    for step, expected in enumerate(truth()[0]):
        for feature in FEATURES:
            read = np.concatenate([worker.reads[step][feature] for worker in seen])
            # float32 against float64 over 15 steps of a few 0.1: errors of some 1e-7 each
            np.testing.assert_allclose(read, expected[feature], rtol=0, atol=1e-5)


def test_every_pull_tells_what_happened_before_the_batch(seen: list[Seen]) -> None:
    for step, expected in enumerate(truth()[1]):
        for feature, table in FEATURES.items():
            told = np.concatenate([worker.told[step][feature] for worker in seen])
            assert told.dtype == np.float32
            if table == "item":
                assert np.array_equal(told, expected[feature])  # powers of two: exact
            else:
                assert told.shape[1] == 0


def test_pushes_leave_the_oracles_rows_and_state(seen: list[Seen]) -> None:
    oracle = truth()[2]
    for table in TABLES:
        found = joined([worker.rows for worker in seen], table)
        assert set(found) == {i for t, i in oracle.weight if t == table and i is not None}
        for one_id, known in found.items():
            # float32 against float64: as above; the state is a sum of positive numbers, so its error is relative
            np.testing.assert_allclose(known["weight"], oracle.weight[table, one_id], rtol=0, atol=1e-5)
            assert known["adagrad_sum"] == pytest.approx(oracle.state[table, one_id], rel=1e-5)
            assert known["count"] == oracle.sightings[table, one_id]


def test_ids_without_a_row_train_one_row_together_of_which_every_worker_has_the_same_copy(seen: list[Seen]) -> None:
    for table in TABLES:
        copies = np.stack([worker.defaults[table] for worker in seen])
        assert len({copy.tobytes() for copy in copies}) == 1
        np.testing.assert_allclose(copies[0], truth()[2].weight[table, None], rtol=0, atol=1e-5)
        assert copies.any() == (table == "ad")


def test_a_default_row_stays_as_it_is_on_steps_where_nobody_reads_it() -> None:
    shard = Shard({"x": TableConfig(dim=4, min_count=2, default_row="trained")}, Adam(0.1), kernel=TorchRows)
    embeddings, moved = ShardedEmbeddings(shard, {"f": "x"}), []
    for ids in ([1], [1], [1, 2], [1, 2], [1]):  # Adam moves by its momentum alone whatever it is given
        (block,) = embeddings.pull({"f": Jagged.from_lengths(torch.tensor(ids), torch.tensor([len(ids)]))}, insert=True)
        block.rows_UD.grad = torch.ones_like(block.rows_UD)
        before = defaults_of(shard)["x"]
        embeddings.push([block])
        moved.append(not np.array_equal(defaults_of(shard)["x"], before))
    assert moved == [True, False, True, False, False]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_what_is_read_again_after_a_push_are_the_rows_of_another_pull_and_nothing_is_counted(num_workers: int) -> None:
    def look(exchange: Exchange) -> list[tuple[Array, Array, Array]]:
        shard = Shard(TABLES, RowwiseAdagrad(LR), exchange, tallies=TALLIES, labels=LABELS, kernel=TorchRows)
        embeddings, looks = ShardedEmbeddings(shard, FEATURES, own=OWN), []
        shard.begin_day(1)
        for step in range(3):  # an ad gets its row on the third sighting, the others read a default that learns
            ids = {name: Jagged(torch.tensor([1, 2 + exchange.rank, 3]), torch.tensor([0, 2, 3])) for name in FEATURES}
            blocks = embeddings.pull(ids, insert=True, labels_BL=torch.ones(2, len(LABELS)))
            for block in blocks:
                block.rows_UD.grad = torch.full_like(block.rows_UD, 1.0 + step)
            embeddings.push(blocks)
            counts = {name: of.copy() for name, of in shard.counts.items()}
            again = embeddings.again(blocks)
            assert all(np.array_equal(of, counts[name]) for name, of in shard.counts.items())
            pairs = zip(blocks, again, embeddings.pull(ids, insert=False), strict=True)
            looks += [
                (old.rows_UD.detach().numpy(), new.rows_UD.numpy(), want.rows_UD.numpy()) for old, new, want in pairs
            ]
        return looks

    for looks in threads.run(num_workers, look):
        for old, new, want in looks:
            assert np.array_equal(new, want) and not np.array_equal(new, old)


def test_every_id_has_one_row_on_the_shard_that_owns_its_bucket(seen: list[Seen]) -> None:
    for rank, worker in enumerate(seen):
        for columns in worker.rows.values():
            assert (owner_of(columns["key"], len(seen)) == rank).all()
            assert len(set(columns["key"].tolist())) == columns["key"].size


def test_new_rows_have_the_same_bits_for_any_number_of_workers(seen: list[Seen]) -> None:
    for feature in ("user_id", "item_id", "history"):  # at step 0 every id is new
        ids = steps()[0].ids[feature].values_N.tolist()
        read = np.concatenate([worker.reads[0][feature] for worker in seen])
        expected = np.array([first_weights(FEATURES[feature])[i] for i in ids])
        assert np.array_equal(read, expected) and expected.any()


def test_counts_tell_every_id_asked_for_and_what_became_of_every_distinct_one(seen: list[Seen]) -> None:
    met, counts = truth()[2].met, [worker.counts for worker in seen]
    for table in TABLES:
        asked = [step.ids[f].values_N.numel() for step in steps() for f, t in FEATURES.items() if t == table]
        assert total(counts, table, "ids") == sum(asked)
        assert total(counts, table, "hit") == met[table, "hit"] and total(counts, table, "new") == met[table, "new"]
        assert total(counts, table, "admitted") == (met[table, "new"] if TABLES[table].min_count > 1 else 0)
        assert all(total(counts, table, name) == 0 for name in ("unknown", "rejected", "evicted"))


def test_distinct_ids_are_counted_after_each_workers_dedupe(seen: list[Seen]) -> None:
    for t, table in enumerate(TABLES):
        features = [f for f, of in FEATURES.items() if of == table]
        for rank, worker in enumerate(seen):
            parts = [part_of(s, rank, len(seen)).ids for s in range(NUM_STEPS)]
            distinct = [{i for f in features for i in part[f].values_N.tolist()} for part in parts]
            assert worker.counts["distinct"][t] == sum(len(ids) for ids in distinct)  # Python sets


def test_scoring_reads_known_rows_and_default_rows_for_unknown_ids(seen: list[Seen]) -> None:
    for feature, table in FEATURES.items():
        rows, default = joined([worker.rows for worker in seen], table), seen[0].defaults[table]
        own = [rows[i]["weight"] if i in rows else default for i in (-1, 2**63 - 1)]
        expected = np.stack([own[0], default, default, own[1], default])
        assert all(np.array_equal(worker.scored[feature], expected) for worker in seen)


def test_scoring_changes_nothing_and_counts_each_unknown_id_once(seen: list[Seen]) -> None:
    counts = [worker.counts_of_scoring for worker in seen]
    for table in TABLES:
        for worker in seen:
            before, after = worker.rows[table], worker.after_scoring[table]
            assert all(np.array_equal(before[name], after[name]) for name in before)
        known = joined([worker.rows for worker in seen], table)
        unknown = sum(i not in known for i in (-1, 2**63 - 1)) + 1 + len(seen)  # one of all, and one of each worker
        assert total(counts, table, "unknown") == (unknown if table in FEATURES.values() else 0)
        assert all(total(counts, table, name) == 0 for name in COUNTS if name != "unknown")


def test_a_push_without_gradients_changes_no_weight_or_state_that_was_there(seen: list[Seen]) -> None:
    for table in TABLES:
        before = joined([worker.after_scoring for worker in seen], table)
        after = joined([worker.after_no_gradient for worker in seen], table)
        for one_id, known in before.items():
            assert np.array_equal(known["weight"], after[one_id]["weight"])
            assert known["adagrad_sum"] == after[one_id]["adagrad_sum"]


def test_rows_and_gradients_travel_in_the_payloads_type_and_are_summed_in_float32(seen: list[Seen]) -> None:
    def rounded(x: Any) -> torch.Tensor:
        return torch.as_tensor(x).bfloat16().float()

    reads, rows = [worker.rounded[0] for worker in seen if worker.rounded], [w.rounded[1] for w in seen if w.rounded]
    shard = Shard({"x": TableConfig(dim=4, init_scale=0.2)}, Sgd())
    ids = np.arange(len(seen) + 1)
    shard.meet(shard.pools[0], keys_of(ids), np.zeros(ids.size, np.uint8), np.ones((ids.size, 1), np.int64))
    first = {i: known["weight"] for i, known in joined([exported(shard)], "x").items()}
    grads = [rounded(gradients_of_rounded(rank)) for rank in range(len(seen))]
    assert all(np.array_equal(r, rounded(np.stack([first[0], first[1 + rank]]))) for rank, r in enumerate(reads))
    for one_id, known in joined(rows, "x").items():
        step = sum(g[0] for g in grads) if one_id == 0 else grads[one_id - 1][1]
        # three float32 additions of numbers of order 1
        np.testing.assert_allclose(known["weight"], first[one_id] - np.asarray(step), rtol=0, atol=5e-7)


def test_admissions_evictions_and_what_was_learnt_are_the_same_bits_on_any_number_of_workers(seen: list[Seen]) -> None:
    lives, one = [worker.life for worker in seen if worker.life], alone().life
    assert one is not None and len(lives) == len(seen)
    for table in LIFE:
        found, expected = joined([life.rows for life in lives], table), joined([one.rows], table)
        assert set(found) == set(expected)
        for one_id, known in expected.items():
            assert all(np.array_equal(found[one_id][name], value) for name, value in known.items()), (table, one_id)
        assert sorted(key for life in lives for key in life.evicted[table]) == sorted(one.evicted[table])
        for name in ("ids", "hit", "new", "admitted", "rejected", "evicted"):
            assert total([life.counts for life in lives], table, name, list(LIFE)) == total(
                [one.counts], table, name, list(LIFE)
            )
        assert all(np.array_equal(life.defaults[table], one.defaults[table]) for life in lives)
    assert sorted(who for life in lives for who in life.waiting) == sorted(one.waiting)
    assert np.array_equal(np.concatenate([life.cells for life in lives]), one.cells)
    assert all(np.array_equal(life.overall, one.overall) for life in lives) and one.overall.all()


def test_the_life_that_is_compared_is_full_of_events() -> None:
    life = alone().life
    assert life is not None
    counted = {name: {table: int(of[t]) for t, table in enumerate(LIFE)} for name, of in life.counts.items()}
    assert counted["evicted"]["full"] > 50 and counted["rejected"]["shut"] > 50 and counted["evicted"]["kept"] > 50
    assert 10 < counted["admitted"]["slow"] and 10 < counted["admitted"]["crowd"] and len(life.waiting) > 5
    assert life.defaults["slow"].any() and life.cells.any()
    assert {len(life.rows[table]["key"]) for table in ("full", "shut", "kept")} == {25, 15}


def test_plain_torch_rows_train_like_fbgemm_rows() -> None:
    twin = work(LocalExchange(), TorchRows)
    for table in TABLES:
        for name, column in alone().rows[table].items():
            assert np.allclose(twin.rows[table][name], column, rtol=1e-5, atol=1e-6), name
