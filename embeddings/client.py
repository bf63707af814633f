"""ShardedEmbeddings: pull the distinct rows of a batch, push their gradients back.

    pull: ids -> keys, deduped, grouped by owner -> all-to-all -> owner: deduped again, a row each, lookup
          rows_UD, a leaf that autograd sees     <- all-to-all <-
    push: rows_UD.grad -> the same way out -> owner: sum what several workers sent for a row, one optimizer step a row

No collective hides inside autograd: pull and push are plain calls, once a step each. Ids, keys and who has which row
live on the host; rows on the device.

Shape letters: B rows of the batch, N ids of one pool's features, U distinct pairs (table, key) of a worker's batch, V
pairs that an owner received, O distinct ones of these, D numbers a row, S statistics, E kinds of events, L labels.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from embeddings.buckets import keys_of
from embeddings.dedupe import Bytes, Distinct, Int64s, distinct, sums_by_pair
from embeddings.jagged import Jagged
from embeddings.pool import RowPool
from embeddings.shard import Shard
from embeddings.tallies import IMPRESSIONS, SIGHTINGS, add_happened, add_rows

_TABLE_SHIFT = 48  # a pair and its sightings travel as two numbers: the key, and the table above the count


@dataclass
class _Route:
    """How the rows of one pool travelled, for the way back."""

    sent_W: list[int]  # pairs this worker sent to each owner
    received_W: list[int]  # pairs each worker sent here
    rows_O: Int64s  # of the distinct pairs here, -1 where there is none
    table_O: Bytes
    owned_of_V: Int64s | None  # for each pair received, its place in rows_O; None when they are the same


@dataclass
class Block:
    """The rows of the features whose tables share a pool. rows_UD: a leaf that collects gradients. ids: all features'
    lists, one feature after the other, as places in the rows. statistics_US: what happened to each before this batch.
    """

    features: list[str]
    rows_UD: Tensor
    statistics_US: Tensor
    ids: Jagged
    pool: RowPool = field(repr=False)
    route: _Route = field(repr=False)


class ShardedEmbeddings:
    """All tables, sharded over the workers.

    feature_tables: the table that each id feature reads; several features may share one. own: the features that name
    a row's own ids, on which what happens on the row is counted; the others (a history) only mention ids. payload: the
    type in which rows and gradients travel.
    """

    def __init__(
        self,
        shard: Shard,
        feature_tables: Mapping[str, str],
        *,
        own: Collection[str] = (),
        payload: torch.dtype = torch.float32,
    ):
        self.shard, self.exchange, self._own, self._payload = shard, shard.exchange, frozenset(own), payload
        self.table_of = dict(feature_tables)
        by_number = sorted(feature_tables, key=lambda feature: shard.number[feature_tables[feature]])
        self._features = [
            [(f, shard.number[feature_tables[f]]) for f in by_number if shard.number[feature_tables[f]] in pool.tables]
            for pool in shard.pools
        ]
        self._trained_defaults = [
            np.array([t for t in pool.tables if shard.tables[shard.names[t]].default_row == "trained"], np.uint8)
            for pool in shard.pools
        ]

    def pull(self, ids: Mapping[str, Jagged], *, insert: bool, labels_BL: Tensor | None = None) -> list[Block]:
        """Fetch the rows of a batch's ids (collective).

        insert: training: ids that are due get a row, and what happened is counted. labels_BL: what happened on each
        row, whole numbers in the order of the shard's labels. An id without a row reads its table's default row.
        """
        return [
            self._pull(pool, features, ids, insert, labels_BL)
            for pool, features in zip(self.shard.pools, self._features, strict=True)
            if features
        ]

    def _pull(
        self,
        pool: RowPool,
        features: list[tuple[str, int]],
        ids: Mapping[str, Jagged],
        insert: bool,
        labels_BL: Tensor | None,
    ) -> Block:
        every = Jagged.cat([ids[name] for name, _ in features])
        numbers, lengths = np.array([t for _, t in features], np.uint8), [ids[n].values_N.numel() for n, _ in features]
        batch = distinct(keys_of(every.values_N.cpu().numpy()), np.repeat(numbers, lengths), self.exchange.num_workers)
        if insert:
            np.add.at(self.shard.counts["ids"], numbers, lengths)
            self.shard.count("distinct", batch.table_U)
        event_UE = self._events(batch, [name for name, _ in features], ids, labels_BL)
        rows_UD, statistics_US, route = self._fetch(pool, batch, event_UE, insert)
        index = Jagged(torch.from_numpy(batch.index_N), every.offsets).to(self.shard.device)
        return Block([name for name, _ in features], rows_UD.requires_grad_(insert), statistics_US, index, pool, route)

    def _events(
        self, batch: Distinct, features: list[str], ids: Mapping[str, Jagged], labels_BL: Tensor | None
    ) -> Int64s:
        """What happened to each pair in this worker's batch, in the order of the ledger's events: [U, E]."""
        events = self.shard.ledger.events
        event_UE = np.zeros((batch.key_U.size, len(events)), np.int64)
        event_UE[:, events.index(SIGHTINGS)] = batch.count_U
        if len(events) == 1 or labels_BL is None:
            return event_UE
        happened_BE = np.zeros((labels_BL.shape[0], len(events)), np.int64)
        for e, event in enumerate(events):
            if event == IMPRESSIONS:
                happened_BE[:, e] = 1
            elif event != SIGHTINGS:
                happened_BE[:, e] = labels_BL[:, self.shard.labels.index(event)].cpu().numpy()
        first = 0
        for name in features:
            end = first + ids[name].values_N.numel()
            if name in self._own:
                add_happened(event_UE, batch.index_N[first:end], ids[name].offsets.cpu().numpy(), happened_BE)
            first = end
        return event_UE

    def _fetch(self, pool: RowPool, batch: Distinct, event_UE: Int64s, insert: bool) -> tuple[Tensor, Tensor, _Route]:
        shard, workers = self.shard, self.exchange.num_workers
        key_O, table_O, event_OE, owned_of_V = batch.key_U, batch.table_U, event_UE, None
        sent_W = received_W = batch.sizes_W.tolist()
        if workers > 1:
            received_W = self.exchange.all_to_all(torch.tensor(sent_W), [1] * workers, [1] * workers).tolist()
            message = torch.from_numpy(np.column_stack([batch.key_U, event_UE]))
            message[:, 1] |= torch.from_numpy(batch.table_U.astype(np.int64) << _TABLE_SHIFT)
            arrived = self.exchange.all_to_all(message, sent_W, received_W).numpy()
            event_VE = arrived[:, 1:].copy()
            event_VE[:, 0] &= (1 << _TABLE_SHIFT) - 1
            owned = distinct(arrived[:, 0].copy(), (arrived[:, 1] >> _TABLE_SHIFT).astype(np.uint8))
            key_O, table_O = owned.key_U, owned.table_U
            event_OE = np.zeros((key_O.size, event_VE.shape[1]), np.int64)
            add_rows(event_OE, owned.index_N, event_VE)
            owned_of_V = owned.index_N
        if insert:
            rows_O, statistics_OS = shard.meet(pool, key_O, table_O, event_OE)
        else:
            rows_O, statistics_OS = shard.find(pool, key_O, table_O)
        route = _Route(sent_W, received_W, rows_O, table_O, owned_of_V)
        rows_UD = self._read(pool, route)
        if statistics_OS.shape[1] == 0:
            return rows_UD, rows_UD.new_zeros(batch.key_U.size, 0), route
        statistics_VS = statistics_OS if owned_of_V is None else statistics_OS[owned_of_V]
        told_VS = torch.from_numpy(statistics_VS).to(shard.device)
        return rows_UD, self.exchange.all_to_all(told_VS, received_W, sent_W), route

    def _read(self, pool: RowPool, route: _Route) -> Tensor:
        """The rows on their way back to who asked for them: [U, D]."""
        rows_O = np.where(route.rows_O < 0, pool.default_rows(route.table_O), route.rows_O)
        rows_V = rows_O if route.owned_of_V is None else rows_O[route.owned_of_V]
        return self.exchange.all_to_all(pool.lookup(rows_V).to(self._payload), route.received_W, route.sent_W).float()

    def again(self, blocks: list[Block]) -> list[Block]:
        """The newest blocks with their rows as they are after the push (collective). Nothing is counted twice."""
        return [replace(block, rows_UD=self._read(block.pool, block.route)) for block in blocks]

    def push(self, blocks: list[Block]) -> None:
        """Send the rows' gradients to their owners, which make one optimizer step a row (collective)."""
        for block in blocks:
            route, pool = block.route, block.pool
            trained = self._trained_defaults[self.shard.pools.index(pool)]
            grad_UD = torch.zeros_like(block.rows_UD) if block.rows_UD.grad is None else block.rows_UD.grad
            grad_VD = self.exchange.all_to_all(grad_UD.to(self._payload), route.sent_W, route.received_W).float()
            summed_OD = self._summed(grad_VD, route)
            if trained.size:
                self._train_defaults(pool, trained, route, summed_OD)
            has_row = route.rows_O >= 0
            if has_row.all():
                pool.update(route.rows_O, summed_OD)
            else:
                pool.update(route.rows_O[has_row], summed_OD[torch.from_numpy(has_row)])

    def _summed(self, grad_VD: Tensor, route: _Route) -> Tensor:
        """What several workers sent for one row, summed: [O, D]."""
        if route.owned_of_V is None:
            return grad_VD
        one_each = Jagged(torch.from_numpy(route.owned_of_V), torch.arange(route.owned_of_V.size + 1))
        return sums_by_pair(one_each.to(grad_VD.device), grad_VD, route.rows_O.size)

    def _train_defaults(self, pool: RowPool, trained: Bytes, route: _Route, summed_OD: Tensor) -> None:
        """One step of the default rows that are trained, from the gradients of all ids without a row (collective):
        every worker keeps the same copy.
        """
        first_rows, device = pool.default_rows(trained), summed_OD.device
        lacking = torch.from_numpy(np.flatnonzero(route.rows_O < 0)).to(device)
        defaults = torch.from_numpy(pool.default_rows(route.table_O)).to(device)[lacking]
        total = summed_OD.new_zeros(len(pool.tables), pool.dim + 1)
        total[:, :-1].index_add_(0, defaults, summed_OD[lacking])
        total[:, -1].index_add_(0, defaults, summed_OD.new_ones(lacking.numel()))
        total = self.exchange.all_reduce(total)
        rows = first_rows[total[first_rows, -1].cpu().numpy() > 0]
        pool.update(rows, total[rows, :-1])
        pool.ids.count_R[rows] += 1
