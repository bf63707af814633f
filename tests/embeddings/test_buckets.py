"""Who owns an id: hash64 against splitmix64 in plain integers, owners against plain counting of buckets."""

import numpy as np
import torch
from torch import Tensor

from embeddings.buckets import NUM_BUCKETS, bucket_of, buckets_of, hash64, keys_of, owner_of, unhash64

EXTREMES = [0, 1, -1, 2**63 - 1, -(2**63), 2**62, -(2**62), 0x5555555555555555]
GAMMA = 0x9E3779B97F4A7C15


def random_ids(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def splitmix64(x: int) -> int:
    """The published finaliser on unsigned Python integers."""
    z = (x + GAMMA) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_hash64_of_a_counter_is_the_published_splitmix64_sequence() -> None:
    # the reference program's first numbers from seed 1234567, as published
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [(1234567 + k * GAMMA + 2**63) % 2**64 - 2**63 for k in range(5)]
    assert [key % 2**64 for key in hash64(torch.tensor(states)).tolist()] == published


def test_hash64_equals_splitmix64_in_python_integers() -> None:
    ids = torch.cat([torch.tensor(EXTREMES), random_ids(2_000, seed=0)])
    assert [key % 2**64 for key in hash64(ids).tolist()] == [splitmix64(i) for i in ids.tolist()]


def test_unhash64_and_hash64_undo_each_other() -> None:
    ids = torch.cat([torch.tensor(EXTREMES), torch.arange(-1_000, 1_000), random_ids(100_000, seed=1)])
    assert torch.equal(unhash64(hash64(ids)), ids)
    assert torch.equal(hash64(unhash64(ids)), ids)  # both ways: a bijection, no key is out of reach


def test_every_output_bit_of_hash64_depends_on_every_input_bit() -> None:
    ids, bits = random_ids(5_000, seed=2), torch.arange(64)
    flips = torch.ones(64, dtype=torch.int64) << bits
    for flip in flips:
        changed = hash64(ids) ^ hash64(ids ^ flip)
        rate = ((changed.unsqueeze(1) >> bits) & 1).double().mean(dim=0)
        # a fair coin's share over 5,000 throws has sigma 0.0071; 0.04 is 5.6 sigma, for 4,096 pairs of bits
        assert (rate - 0.5).abs().max() < 0.04


def test_keys_of_equals_hash64_and_leaves_the_ids_alone() -> None:
    ids = torch.cat([torch.tensor(EXTREMES), torch.arange(-1_000, 1_000), random_ids(100_000, seed=5)])
    given = ids.clone().numpy()
    keys = keys_of(given)
    assert keys.dtype == np.int64 and np.array_equal(keys, hash64(ids).numpy())
    assert np.array_equal(given, ids.numpy()) and keys_of(given[:0]).size == 0
    assert np.array_equal(keys_of(given[::3]), keys[::3])  # any memory layout


def test_a_bucket_is_the_top_bits_of_the_key_and_rises_with_it() -> None:
    keys = torch.cat([torch.tensor(EXTREMES), random_ids(5_000, seed=3)]).sort().values.numpy()
    buckets = bucket_of(keys)
    # plain integers: move the keys to 0 .. 2^64 - 1, then divide
    assert buckets.tolist() == [(key + 2**63) // (2**64 // NUM_BUCKETS) for key in keys.tolist()]
    assert buckets[0] == 0 and buckets[-1] == NUM_BUCKETS - 1 and (np.diff(buckets) >= 0).all()
    assert [bucket_of(key) for key in keys[:100].tolist()] == buckets[:100].tolist()  # one key like an array of them


def test_consecutive_ids_spread_evenly_over_the_buckets() -> None:
    buckets = bucket_of(keys_of(np.arange(100 * NUM_BUCKETS)))
    counts = np.bincount(buckets, minlength=NUM_BUCKETS)
    chi_square = ((counts - 100.0) ** 2 / 100).sum()
    # chi-square with 4,095 degrees of freedom: mean 4,095, sigma 90.5; five sigmas
    assert abs(chi_square - (NUM_BUCKETS - 1)) < 5 * 90.5


SHARDS = [*range(1, 65), 1_000, NUM_BUCKETS]


def test_shards_own_contiguous_ranges_equal_to_within_one_bucket() -> None:
    for num_shards in SHARDS:
        ranges = [buckets_of(shard, num_shards) for shard in range(num_shards)]
        assert [bucket for buckets in ranges for bucket in buckets] == list(range(NUM_BUCKETS))  # each once, rising
        sizes = {len(buckets) for buckets in ranges}
        assert max(sizes) - min(sizes) <= 1


def test_a_keys_owner_is_the_shard_whose_buckets_it_is_in_up_to_the_edges() -> None:
    firsts = np.arange(-NUM_BUCKETS // 2, NUM_BUCKETS // 2) * (2**64 // NUM_BUCKETS)  # each bucket's lowest key
    lasts = firsts + (2**64 // NUM_BUCKETS - 1)
    assert (firsts[0], lasts[-1]) == (-(2**63), 2**63 - 1)
    for num_shards in SHARDS:
        expected = [shard for shard in range(num_shards) for _ in buckets_of(shard, num_shards)]  # plain: by bucket
        assert owner_of(firsts, num_shards).tolist() == expected
        assert owner_of(lasts, num_shards).tolist() == expected
        assert [owner_of(key, num_shards) for key in firsts[::997].tolist()] == expected[::997]
