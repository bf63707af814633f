"""key -> row against a Python dict, with the keys that hash maps like least."""

import random

import pytest
import torch

from embeddings.idmap import IdMap

CPU = torch.device("cpu")
EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63)]


def keys_of(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def map_of(rows: dict[int, int], capacity: int = 1) -> IdMap:
    ids = IdMap(capacity, CPU)
    ids.insert(keys_of(list(rows)), keys_of(list(rows.values())))
    return ids


def test_an_empty_map_knows_no_key_not_even_zero() -> None:
    ids = IdMap(0, CPU)
    assert ids.find(keys_of([*EXTREMES, 7])).tolist() == [-1] * 6
    assert ids.find(keys_of([])).tolist() == [] and ids.num_keys == 0


def test_no_key_value_is_reserved() -> None:
    ids = map_of({key: row for row, key in enumerate(EXTREMES)})
    found = ids.find(keys_of(EXTREMES))
    assert found.dtype == torch.int64 and found.tolist() == [0, 1, 2, 3, 4]
    assert ids.find(keys_of([2, -2])).tolist() == [-1, -1]


@pytest.mark.parametrize("seed", range(4))
def test_random_inserts_and_finds_equal_a_dict_while_the_map_grows(seed: int) -> None:
    draw, twin, ids = random.Random(seed), dict[int, int](), IdMap(1, CPU)
    near = 2 ** draw.choice([8, 64])  # a small range makes many keys share a slot, the full one uses all 64 bits
    for _ in range(25):
        fresh = {draw.randrange(-near // 2, near // 2) for _ in range(draw.choice([0, 1, 400]))} - twin.keys()
        rows = {key: len(twin) + place for place, key in enumerate(fresh)}
        ids.insert(keys_of(list(rows)), keys_of(list(rows.values())))
        twin.update(rows)
        asked = [*twin, *(draw.randrange(-(2**63), 2**63) for _ in range(50))]
        assert ids.find(keys_of(asked)).tolist() == [twin.get(key, -1) for key in asked]
        assert ids.num_keys == len(twin)


@pytest.mark.parametrize("low_bits", [0, 2**30 - 1])  # the last slot: probing must go round to the first
def test_keys_that_want_the_same_slot_are_all_kept(low_bits: int) -> None:
    rows = {(high << 30) + low_bits: high + 300 for high in range(-300, 300)}
    ids = map_of(rows)
    assert ids.find(keys_of(list(rows))).tolist() == list(rows.values())
    assert ids.find(keys_of([(301 << 30) + low_bits])).tolist() == [-1]


def test_a_key_added_after_a_full_run_of_slots_hides_none_of_them() -> None:
    run = {key: key for key in range(100, 200)}
    ids = map_of(run)
    ids.insert(keys_of([100 + 2**40]), keys_of([7]))  # wants slot 100, must walk to 200
    assert ids.find(keys_of([*run, 100 + 2**40])).tolist() == [*run, 7]


@pytest.mark.parametrize("capacity", [0, 1, 513, 5_000])
def test_items_are_exactly_what_was_inserted_at_any_starting_capacity(capacity: int) -> None:
    draw = random.Random(capacity)
    twin = {draw.randrange(-(2**63), 2**63): row for row in range(3_000)}
    keys, rows = map_of(twin, capacity).items()
    assert len(keys) == len(twin) and dict(zip(keys.tolist(), rows.tolist(), strict=True)) == twin


def test_inserting_no_keys_changes_nothing() -> None:
    ids = map_of({5: 0})
    ids.insert(keys_of([]), keys_of([]))
    assert (ids.num_keys, ids.find(keys_of([5, 6])).tolist()) == (1, [0, -1])
