"""id -> key -> bucket -> shard: the one place that says who owns an id.

A key is the id after hash64, a bijection on 64 bits: nothing collides and the id can be had back. A bucket is the top
bits of the key, and a shard owns a contiguous range of buckets, so one sort of a batch's keys dedupes, groups by bucket
and groups by shard at once. NUM_BUCKETS is fixed for the life of a model; the number of shards may change from night to
night.

Source: the finaliser is splitmix64's (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

import torch
from torch import Tensor

NUM_BUCKETS = 4096
_BUCKET_SHIFT = 64 - (NUM_BUCKETS - 1).bit_length()


def _signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_M1, _M2 = (_signed(m) for m in _MULTIPLIERS)
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


def bucket_of(keys: Tensor) -> Tensor:
    """The bucket of each key, in 0 .. NUM_BUCKETS - 1, rising with the key."""
    return (keys >> _BUCKET_SHIFT) + NUM_BUCKETS // 2


def first_bucket(shard: int, num_shards: int) -> int:
    """Shard s owns buckets first_bucket(s) .. first_bucket(s + 1) - 1: equal ranges to within one bucket."""
    return -(-shard * NUM_BUCKETS // num_shards)


def shard_sizes(sorted_keys: Tensor, num_shards: int) -> Tensor:
    """How many of the sorted keys each shard owns: int64 [num_shards]; shard 0's keys come first."""
    starts = [(first_bucket(s, num_shards) - NUM_BUCKETS // 2) << _BUCKET_SHIFT for s in range(1, num_shards)]
    cuts = torch.searchsorted(sorted_keys, torch.tensor(starts, dtype=torch.int64, device=sorted_keys.device))
    ends = torch.cat([cuts, cuts.new_tensor([sorted_keys.numel()])])
    return torch.diff(ends, prepend=ends.new_zeros(1))
