"""The distinct (table, key) pairs of a batch, where each id of the batch finds its own, and sums by pair.

Plain loops, compiled, on the host, outside Python's global lock: 10^7 ids a second and core.

Shape letters: N ids of a batch in B lists, U distinct pairs, W workers, D numbers a list.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from embeddings.buckets import owner_of
from embeddings.jagged import Jagged

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Distinct:
    """key_U, table_U: the pairs, grouped by the worker that owns them, of which each owns sizes_W. index_N: for each
    id its pair. count_U: how many ids each pair has.
    """

    key_U: Int64s
    table_U: Bytes
    index_N: Int64s
    count_U: Int64s
    sizes_W: Int64s


def distinct(key_N: Int64s, table_N: Bytes, num_workers: int = 1) -> Distinct:
    """The pairs in the order of their first appearance, within each owner."""
    key_U, table_U, index_N, count_U = _distinct(key_N, table_N)
    if num_workers == 1:
        return Distinct(key_U, table_U, index_N, count_U, np.array([key_U.size]))
    return Distinct(*_by_owner(key_U, table_U, index_N, count_U, num_workers))


def transpose(bags: Jagged, num_pairs: int) -> Jagged:
    """Lists of pairs turned round: for each pair the lists that hold it."""
    turned = _transpose(bags.values_N.cpu().numpy(), bags.offsets.cpu().numpy(), num_pairs)
    return Jagged(*(torch.from_numpy(array).to(bags.offsets.device) for array in turned))


def sums_by_pair(bags: Jagged, value_BD: Tensor, num_pairs: int) -> Tensor:
    """For each pair the sum over the lists that hold it, in their order: float32 [U, D]."""
    if value_BD.device.type == "cpu":
        sum_UD = torch.zeros(num_pairs, value_BD.shape[1])
        _add_by_pair(sum_UD.numpy(), bags.values_N.numpy(), bags.offsets.numpy(), value_BD.numpy())
        return sum_UD
    return transpose(bags, num_pairs).sums(value_BD)


@njit(nogil=True, cache=True)
def _distinct(key_N, table_N):  # type: ignore[no-untyped-def]
    num_slots = 1024
    while num_slots < 2 * key_N.size:
        num_slots *= 2
    slots = np.full(num_slots, -1, np.int32)
    key_U, table_U = np.empty(key_N.size, np.int64), np.empty(key_N.size, np.uint8)
    index_N, count_U = np.empty(key_N.size, np.int64), np.zeros(key_N.size, np.int64)
    found = 0
    for n in range(key_N.size):
        key, table = key_N[n], table_N[n]
        slot = (key ^ (table << 11)) & (num_slots - 1)
        u = slots[slot]
        while u >= 0 and (key_U[u] != key or table_U[u] != table):
            slot = (slot + 1) & (num_slots - 1)
            u = slots[slot]
        if u < 0:
            slots[slot] = u = found
            key_U[u], table_U[u] = key, table
            found += 1
        index_N[n] = u
        count_U[u] += 1
    return key_U[:found], table_U[:found], index_N, count_U[:found]


@njit(nogil=True, cache=True)
def _by_owner(key_U, table_U, index_N, count_U, num_workers):  # type: ignore[no-untyped-def]
    """The same, its pairs grouped by owner, and how many each owner has."""
    sizes_W = np.zeros(num_workers, np.int64)
    for key in key_U:
        sizes_W[owner_of(key, num_workers)] += 1
    next_W, place_U = np.cumsum(sizes_W) - sizes_W, np.empty(key_U.size, np.int64)
    for u in range(key_U.size):
        owner = owner_of(key_U[u], num_workers)
        place_U[u] = next_W[owner]
        next_W[owner] += 1
    keys, tables, counts = np.empty_like(key_U), np.empty_like(table_U), np.empty_like(count_U)
    for u in range(key_U.size):
        keys[place_U[u]], tables[place_U[u]], counts[place_U[u]] = key_U[u], table_U[u], count_U[u]
    for n in range(index_N.size):
        index_N[n] = place_U[index_N[n]]
    return keys, tables, index_N, counts, sizes_W


@njit(nogil=True, cache=True)
def _transpose(index_N, offsets, num_pairs):  # type: ignore[no-untyped-def]
    pair_offsets = np.zeros(num_pairs + 1, np.int64)
    for n in range(index_N.size):
        pair_offsets[index_N[n] + 1] += 1
    pair_offsets = np.cumsum(pair_offsets)
    next_U, bags_N = pair_offsets[:-1].copy(), np.empty(index_N.size, np.int64)
    for bag in range(offsets.size - 1):
        for n in range(offsets[bag], offsets[bag + 1]):
            bags_N[next_U[index_N[n]]] = bag
            next_U[index_N[n]] += 1
    return bags_N, pair_offsets


@njit(nogil=True, cache=True)
def _add_by_pair(sum_UD, index_N, offsets, value_BD):  # type: ignore[no-untyped-def]
    for bag in range(offsets.size - 1):
        for n in range(offsets[bag], offsets[bag + 1]):
            sum_D, value_D = sum_UD[index_N[n]], value_BD[bag]
            for d in range(value_D.size):
                sum_D[d] += value_D[d]
