"""Pull and push against a dict of float64 rows, with one, two and three workers that share every batch unevenly.

Each worker runs all steps once and returns what it saw; the tests put the workers' parts together and compare them with
the oracle, which knows nothing of workers. Two tables are 8 wide and one is 4; one feature has no part in the loss.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import many
import numpy as np
import pytest
import torch

from embeddings.buckets import bucket_of, first_bucket, hash64, unhash64
from embeddings.client import Pulled, ShardedEmbeddings
from embeddings.exchange import Exchange, LocalExchange
from embeddings.jagged import Jagged
from embeddings.kernels import FbgemmRows, RowKernel, TorchRows
from embeddings.optim import RowwiseAdagrad
from embeddings.shard import IdCounts, Shard
from embeddings.table import TableConfig

TABLES = {
    "user": TableConfig(dim=4, capacity_rows=4, init_scale=0.2),
    "item": TableConfig(dim=8, capacity_rows=4, init_scale=0.2),
    "ad": TableConfig(dim=8, capacity_rows=4),
}
FEATURES = {"user_id": "user", "item_id": "item", "history": "item", "ad_id": "ad", "ads_seen": "ad"}
WITHOUT_LOSS = "ads_seen"
NUM_STEPS, NUM_ROWS, LR = 20, 24, 0.1
EXTREMES = [0, -1, 2**63 - 1, -(2**63)]
KNOWN = np.array([*EXTREMES, *range(1, 30), *(7**20 * k for k in range(-3, 4))], np.int64)  # ids of every step
UNKNOWN = 10**9
Array = np.ndarray[Any, Any]


@dataclass
class Step:
    """One global batch: for each feature its lists of ids, and what the loss wants each id's row to be."""

    ids: dict[str, Jagged]
    targets: dict[str, Array]


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
    return Step(ids, targets)


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
    return Step(ids, targets)


# What the workers run


@dataclass
class Seen:
    """What one worker saw."""

    reads: list[dict[str, Array]]  # before each step, the row of each id of each feature
    rows: dict[str, tuple[Array, Array, Array]]  # at the end, of its shard: ids, weights, state
    counts: dict[str, IdCounts]
    scored: dict[str, Array]
    counts_of_scoring: dict[str, IdCounts]
    num_rows_after_scoring: dict[str, int]
    after_no_gradient: dict[str, tuple[Array, Array, Array]]


def work(exchange: Exchange, kernel: type[FbgemmRows] | type[RowKernel] = FbgemmRows) -> Seen:
    shard = Shard(TABLES, RowwiseAdagrad(LR), num_shards=exchange.num_workers, seed=1, kernel=kernel)
    embeddings = ShardedEmbeddings(shard, exchange, FEATURES)
    reads = [train(embeddings, part_of(s, exchange.rank, exchange.num_workers)) for s in range(NUM_STEPS)]
    rows, counts = exported(shard), shard.counts
    shard.reset_counts()
    pulled = embeddings.pull(scoring_ids(exchange.rank), insert=False)
    assert not any(leaf.requires_grad for leaf in pulled.rows_UD.values())
    scored = {feature: row_of_each_id(pulled, feature).numpy() for feature in FEATURES}
    counts_of_scoring, num_rows = shard.counts, {name: shard.maps[name].num_keys for name in TABLES}
    embeddings.push(embeddings.pull(part_of(3, exchange.rank, exchange.num_workers).ids, insert=True))
    return Seen(reads, rows, counts, scored, counts_of_scoring, num_rows, exported(shard))


def train(embeddings: ShardedEmbeddings, part: Step) -> dict[str, Array]:
    """One step of sum (row - target)^2 / 2 over the ids of the features with a loss; returns the rows read."""
    pulled = embeddings.pull(part.ids, insert=True)
    read = {feature: row_of_each_id(pulled, feature) for feature in FEATURES}
    errors = [(read[f] - torch.tensor(part.targets[f])).square().sum() / 2 for f in FEATURES if f != WITHOUT_LOSS]
    torch.stack(errors).sum().backward()
    embeddings.push(pulled)
    return {feature: rows.detach().numpy() for feature, rows in read.items()}


def row_of_each_id(pulled: Pulled, feature: str) -> torch.Tensor:
    return pulled.rows_UD[TABLES[FEATURES[feature]].dim][pulled.index_N[feature]]


def scoring_ids(rank: int) -> dict[str, Jagged]:
    """Two known ids, one that every worker asks for and nobody knows, and a worker's own unknown one, twice."""
    values = torch.tensor([-1, UNKNOWN, UNKNOWN + 1 + rank, 2**63 - 1, UNKNOWN + 1 + rank])
    return {feature: Jagged.from_lengths(values, torch.tensor([2, 0, 3])) for feature in FEATURES}


def exported(shard: Shard) -> dict[str, tuple[Array, Array, Array]]:
    tables = {name: shard.export(name) for name in TABLES}
    return {name: (unhash64(k).numpy(), weight.numpy(), state.numpy()) for name, (k, weight, state) in tables.items()}


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
        self.weight: dict[tuple[str, int], Array] = {}
        self.state: dict[tuple[str, int], float] = {}

    def train(self, step: Step) -> dict[str, Array]:
        read, grads = {}, defaultdict[tuple[str, int], Any](float)
        for feature, table in FEATURES.items():
            keys = [(table, i) for i in step.ids[feature].values_N.tolist()]
            rows = [self.weight.setdefault(key, first_weights(table)[key[1]]) for key in keys]
            read[feature] = np.array(rows).reshape(len(keys), TABLES[table].dim)
            for key, row, target in zip(keys, rows, step.targets[feature], strict=True):
                grads[key] = grads[key] + (row - target) * (feature != WITHOUT_LOSS)
        for key, grad in grads.items():
            self.state[key] = self.state.get(key, 0.0) + (grad**2).mean()
            self.weight[key] = self.weight[key] - LR * grad / (self.state[key] ** 0.5 + 1e-8)
        return read


@functools.cache
def first_weights(table: str) -> dict[int, Array]:
    """The new row of every id: their law is a promise of test_shard.py."""
    shard = Shard({table: TABLES[table]}, RowwiseAdagrad(), seed=1)
    shard.rows_of(table, hash64(torch.tensor(KNOWN)), insert=True)
    keys, weight, _ = shard.export(table)
    return dict(zip(unhash64(keys).tolist(), weight.double().numpy(), strict=True))


@functools.cache
def truth() -> tuple[list[dict[str, Array]], Oracle]:
    oracle = Oracle()
    return [oracle.train(step) for step in steps()], oracle


def joined(seen: list[Seen], table: str) -> dict[int, tuple[Array, float]]:
    """Weights and state of each id of a table, over all shards."""
    triples = [zip(*worker.rows[table], strict=True) for worker in seen]
    return {int(i): (weight, float(state)) for triple in triples for i, weight, state in triple}


def total(counts: Sequence[Mapping[str, IdCounts]], table: str, name: str) -> int:
    return sum(getattr(of_worker[table], name) for of_worker in counts)


# The promises


def test_the_batches_hold_what_is_hard() -> None:
    """Empty workers, an empty batch, repeats, extremes: or the tests below would promise too little."""
    assert shares(0, 3) == [(0, 0), (0, 0), (0, NUM_ROWS)] and shares(1, 2) == [(0, NUM_ROWS), (NUM_ROWS, NUM_ROWS)]
    assert steps()[2].ids["user_id"].num_rows == 0
    parts = [part_of(5, rank, 3).ids["history"].values_N.tolist() for rank in range(3)]
    assert any(len(set(part)) < len(part) for part in parts) and set(parts[0]) & (set(parts[1]) | set(parts[2]))
    assert all(set(EXTREMES) <= {i for t, i in truth()[1].weight if t == table} for table in TABLES)


def test_every_pull_reads_the_oracles_rows(seen: list[Seen]) -> None:
    for step, expected in enumerate(truth()[0]):
        for feature in FEATURES:
            read = np.concatenate([worker.reads[step][feature] for worker in seen])
            # float32 against float64 over 20 steps of a few 0.1: errors of some 1e-7 each
            np.testing.assert_allclose(read, expected[feature], rtol=0, atol=1e-5)


def test_pushes_leave_the_oracles_rows_and_state(seen: list[Seen]) -> None:
    oracle = truth()[1]
    for table in TABLES:
        found = joined(seen, table)
        assert sorted(found) == sorted(i for t, i in oracle.weight if t == table)
        for one_id, (weight, state) in found.items():
            # float32 against float64: as above; the state is a sum of positive numbers, so its error is relative
            np.testing.assert_allclose(weight, oracle.weight[table, one_id], rtol=0, atol=1e-5)
            assert state == pytest.approx(oracle.state[table, one_id], rel=1e-5)


def test_every_id_has_one_row_on_the_shard_that_owns_its_bucket(seen: list[Seen]) -> None:
    for rank, worker in enumerate(seen):
        for ids, _, _ in worker.rows.values():
            buckets = bucket_of(hash64(torch.tensor(ids)))
            assert ((buckets >= first_bucket(rank, len(seen))) & (buckets < first_bucket(rank + 1, len(seen)))).all()
            assert len(set(ids.tolist())) == len(ids)


def test_new_rows_have_the_same_bits_for_any_number_of_workers(seen: list[Seen]) -> None:
    for feature, table in FEATURES.items():  # at step 0 every id is new
        ids = steps()[0].ids[feature].values_N.tolist()
        read = np.concatenate([worker.reads[0][feature] for worker in seen])
        expected = np.array([first_weights(table)[i] for i in ids])
        assert np.array_equal(read, expected) and (expected.any() == (TABLES[table].init_scale > 0))


def test_counts_tell_every_id_asked_for_and_every_new_row(seen: list[Seen]) -> None:
    for table in TABLES:
        asked = [step.ids[f].values_N.numel() for step in steps() for f, t in FEATURES.items() if t == table]
        counts = [worker.counts for worker in seen]
        assert total(counts, table, "ids") == sum(asked) and total(counts, table, "unknown") == 0
        assert total(counts, table, "new") == len([1 for t, _ in truth()[1].weight if t == table])


def test_distinct_ids_are_counted_after_each_workers_dedupe(seen: list[Seen]) -> None:
    for table in TABLES:
        features = [f for f, t in FEATURES.items() if t == table]
        for rank, worker in enumerate(seen):
            parts = [part_of(s, rank, len(seen)).ids for s in range(NUM_STEPS)]
            distinct = [{i for f in features for i in part[f].values_N.tolist()} for part in parts]
            assert worker.counts[table].distinct == sum(len(ids) for ids in distinct)  # Python sets


def test_scoring_reads_known_rows_and_zeros_for_unknown_ids(seen: list[Seen]) -> None:
    for feature, table in FEATURES.items():
        rows, zeros = joined(seen, table), np.zeros(TABLES[table].dim)
        expected = np.stack([rows[-1][0], zeros, zeros, rows[2**63 - 1][0], zeros])
        assert all(np.array_equal(worker.scored[feature], expected) for worker in seen)


def test_scoring_inserts_nothing_and_counts_each_unknown_id_once(seen: list[Seen]) -> None:
    counts = [worker.counts_of_scoring for worker in seen]
    for table in TABLES:
        assert [worker.num_rows_after_scoring[table] for worker in seen] == [
            len(worker.rows[table][0]) for worker in seen
        ]
        assert total(counts, table, "new") == 0
        assert total(counts, table, "unknown") == 1 + len(seen)  # the one all ask for, and one of each worker


def test_a_push_without_gradients_changes_no_bit(seen: list[Seen]) -> None:
    for worker in seen:
        for table in TABLES:
            before, after = worker.rows[table], worker.after_no_gradient[table]
            assert all(np.array_equal(b, a) for b, a in zip(before, after, strict=True))


def test_plain_torch_rows_train_like_fbgemm_rows() -> None:
    twin = work(LocalExchange(), TorchRows)
    for table in TABLES:
        for found, expected in zip(twin.rows[table], alone().rows[table], strict=True):
            assert np.array_equal(found, expected)  # one subtraction a row and step: the same bits
