"""ShardedEmbeddings: pull the distinct rows of a batch, push their gradients back.

    pull: ids -> dedupe per table -> keys, sorted = grouped by owner -> all-to-all -> owner: rows of keys, lookup
          rows_UD, a leaf that autograd sees                         <- all-to-all <-
    push: rows_UD.grad -> the same way out -> owner: sum what several workers sent for a row, one optimizer step a row

No collective hides inside autograd: pull and push are plain calls, once a step each.

Shape letters: B rows of the batch, N ids of one feature, U distinct ids of all tables of one width, D floats a row, T
tables of that width, W workers, V keys that an owner received (from all workers, repeats included).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embeddings.buckets import hash64, shard_sizes
from embeddings.exchange import Exchange
from embeddings.jagged import Jagged
from embeddings.shard import Shard


@dataclass
class _Route:
    """How the distinct rows of one width travelled, for the way back."""

    sent_WT: Tensor  # keys this worker sent to each owner, by table
    received_WT: Tensor  # keys each worker sent here
    owned_rows: Tensor  # distinct rows here
    owned_of_V: Tensor  # for each key received, its place in owned_rows


@dataclass
class Pulled:
    """The distinct rows of a batch. rows_UD: by width, leaves that collect gradients. index_N: each feature's ids as
    places in them.
    """

    rows_UD: dict[int, Tensor]
    index_N: dict[str, Tensor]
    offsets: dict[str, Tensor]
    routes: dict[int, _Route] = field(repr=False)


class ShardedEmbeddings:
    """All tables, sharded over the workers of an exchange.

    feature_tables: the table that each id feature reads; several features may share one.
    """

    def __init__(self, shard: Shard, exchange: Exchange, feature_tables: Mapping[str, str]):
        self.shard, self.exchange, self.feature_tables = shard, exchange, dict(feature_tables)
        self._tables_of_dim = {dim: [n for n, t in shard.tables.items() if t.dim == dim] for dim in shard.pools}

    def pull(self, ids: Mapping[str, Jagged], *, insert: bool) -> Pulled:
        """Fetch the rows of a batch's ids (collective). Ids without a row get one when insert, else read zeros."""
        pulled = Pulled({}, {}, {feature: jagged.offsets for feature, jagged in ids.items()}, {})
        for dim, tables in self._tables_of_dim.items():
            keys_U = self._dedupe(tables, ids, pulled.index_N)
            rows_UD, pulled.routes[dim] = self._fetch(dim, tables, keys_U, insert)
            pulled.rows_UD[dim] = rows_UD.requires_grad_(insert)
        return pulled

    def push(self, pulled: Pulled) -> None:
        """Send the rows' gradients to their owners, which make one optimizer step a row (collective)."""
        for dim, route in pulled.routes.items():
            grad = pulled.rows_UD[dim].grad
            grad_UD = torch.zeros_like(pulled.rows_UD[dim]) if grad is None else grad
            outgoing = _by_worker(grad_UD, route.sent_WT)
            incoming_VD = self.exchange.all_to_all(outgoing, *_sizes(route.sent_WT, route.received_WT))
            incoming_VD = _by_table(incoming_VD, route.received_WT)
            owned = route.owned_rows.numel()
            summed_UD = incoming_VD.new_zeros(owned, dim).index_add_(0, route.owned_of_V, incoming_VD)
            self.shard.pools[dim].update(route.owned_rows, summed_UD)

    def _dedupe(self, tables: list[str], ids: Mapping[str, Jagged], index_N: dict[str, Tensor]) -> list[Tensor]:
        """Distinct keys of each table, sorted; index_N receives each feature's ids as places in their concatenation."""
        keys, first = [], 0
        for table in tables:
            features = [name for name in ids if self.feature_tables[name] == table]
            values = [ids[name].values_N for name in features]
            every_id = torch.cat(values) if values else torch.empty(0, dtype=torch.int64, device=self.shard.device)
            distinct, index = torch.unique(hash64(every_id), return_inverse=True)
            for name, part in zip(features, (index + first).split([v.numel() for v in values]), strict=True):
                index_N[name] = part
            self.shard.counts[table].ids += every_id.numel()
            self.shard.counts[table].distinct += distinct.numel()
            keys.append(distinct)
            first += distinct.numel()
        return keys

    def _fetch(self, dim: int, tables: list[str], keys: list[Tensor], insert: bool) -> tuple[Tensor, _Route]:
        workers = self.exchange.num_workers
        sent_WT = torch.stack([shard_sizes(k, workers) for k in keys], dim=1)
        each = [len(tables)] * workers
        received_WT = self.exchange.all_to_all(sent_WT.flatten(), each, each).view(workers, len(tables))
        sizes = _sizes(sent_WT, received_WT)
        arrived_V = self.exchange.all_to_all(_by_worker(torch.cat(keys), sent_WT), *sizes)
        owned_rows, owned_of_V = self._rows_of(
            tables, _by_table(arrived_V, received_WT), received_WT.sum(0).tolist(), insert
        )
        rows_VD = self.shard.pools[dim].lookup(owned_rows)[owned_of_V]
        rows_UD = self.exchange.all_to_all(_by_worker(rows_VD, received_WT), *reversed(sizes))
        return _by_table(rows_UD, sent_WT), _Route(sent_WT, received_WT, owned_rows, owned_of_V)

    def _rows_of(self, tables: list[str], keys_V: Tensor, sizes: list[int], insert: bool) -> tuple[Tensor, Tensor]:
        """Distinct rows of the keys received, and each key's place among them."""
        rows, places, first = [], [], 0
        for table, keys in zip(tables, keys_V.split(sizes), strict=True):
            if self.exchange.num_workers > 1:
                keys, place = torch.unique(keys, return_inverse=True)
            else:  # one worker's keys are distinct and sorted already
                place = torch.arange(keys.numel(), device=keys.device)
            rows.append(self.shard.rows_of(table, keys, insert=insert))
            places.append(place + first)
            first += keys.numel()
        return torch.cat(rows), torch.cat(places)


def _sizes(sent_WT: Tensor, received_WT: Tensor) -> tuple[list[int], list[int]]:
    return sent_WT.sum(1).tolist(), received_WT.sum(1).tolist()


def _by_worker(by_table: Tensor, sizes_WT: Tensor) -> Tensor:
    """Reorder parts that lie table by table, within each worker by worker, to worker by worker, within each table by
    table.
    """
    return _transpose(by_table, sizes_WT.T)


def _by_table(by_worker: Tensor, sizes_WT: Tensor) -> Tensor:
    return _transpose(by_worker, sizes_WT)


def _transpose(tensor: Tensor, sizes: Tensor) -> Tensor:
    """Cut tensor into sizes[i][j] parts, i major, and join them j major."""
    outer, inner = sizes.shape
    if outer == 1 or inner == 1:
        return tensor
    parts = tensor.split(sizes.flatten().tolist())
    return torch.cat([parts[i * inner + j] for j in range(inner) for i in range(outer)])
