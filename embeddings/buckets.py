"""id -> key -> bucket -> shard: the one place that says who owns an id.

A key is the id after hash64, a bijection on 64 bits: nothing collides and the id can be had back. A bucket is the top
bits of the key, and a shard owns a contiguous range of buckets. NUM_BUCKETS is fixed for the life of a model; the
number of shards may change from night to night.

Source: the finaliser is splitmix64's (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

NUM_BUCKETS = 4096
_BUCKET_SHIFT = 64 - (NUM_BUCKETS - 1).bit_length()


def _signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_M1, _M2 = (_signed(m) for m in _MULTIPLIERS)
_UNSIGNED_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_UNSIGNED_M1, _UNSIGNED_M2 = (np.uint64(m) for m in _MULTIPLIERS)
_M1_INVERSE, _M2_INVERSE = (_signed(pow(m, -1, 2**64)) for m in _MULTIPLIERS)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    return x ^ ((x >> bits) & (2 ** (64 - bits) - 1))


def hash64(x: Tensor) -> Tensor:
    """Mix int64 values: a bijection whose every output bit depends on every input bit."""
    x = x + _GAMMA
    x = _xor_shift(x, 30) * _M1
    x = _xor_shift(x, 27) * _M2
    return _xor_shift(x, 31)


def unhash64(x: Tensor) -> Tensor:
    """The inverse of hash64. A xor-shift by s is undone by xor-shifts by s and 2s (3s is past 64 bits)."""
    x = _xor_shift(_xor_shift(x, 31), 62) * _M2_INVERSE
    x = _xor_shift(_xor_shift(x, 27), 54) * _M1_INVERSE
    return _xor_shift(_xor_shift(x, 30), 60) - _GAMMA


@njit(nogil=True, cache=True)
def keys_of(id_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """hash64 of ids on the host, many times faster."""
    key_N = np.empty_like(id_N)
    for n in range(id_N.size):
        x = np.uint64(id_N[n]) + _UNSIGNED_GAMMA
        x = (x ^ (x >> np.uint64(30))) * _UNSIGNED_M1
        x = (x ^ (x >> np.uint64(27))) * _UNSIGNED_M2
        key_N[n] = np.int64(x ^ (x >> np.uint64(31)))
    return key_N


@njit(nogil=True, cache=True)
def bucket_of(key):  # type: ignore[no-untyped-def]
    """The bucket of a key, or of each of an array of keys, in 0 .. NUM_BUCKETS - 1."""
    return (key >> _BUCKET_SHIFT) + NUM_BUCKETS // 2


@njit(nogil=True, cache=True)
def owner_of(key, num_shards):  # type: ignore[no-untyped-def]
    """The shard of a key, or of each of an array of keys: the one whose range of buckets it is in."""
    return bucket_of(key) * num_shards // NUM_BUCKETS


def buckets_of(shard: int, num_shards: int) -> range:
    """The buckets that a shard owns: equal ranges to within one bucket."""
    first, end = (-(-s * NUM_BUCKETS // num_shards) for s in (shard, shard + 1))
    return range(first, end)
