"""Rows of one layout: added, grown, read, updated and freed, against plain dicts and the optimizer's own step."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from embeddings.buckets import keys_of
from embeddings.dedupe import Bytes, Int64s
from embeddings.idmap import FREE
from embeddings.kernels import FbgemmRows, TorchRows, to_float16
from embeddings.optim import Adam, Ftrl, RowOptimizer, RowwiseAdagrad, Sgd
from embeddings.pool import Layout, MakeKernel, RowPool

DIM, TABLES = 4, [3, 7]
CPU = torch.device("cpu")


@pytest.fixture(params=[FbgemmRows, TorchRows])
def kernel(request: pytest.FixtureRequest) -> MakeKernel:
    made: MakeKernel = request.param
    return made


def pool_of(kernel: MakeKernel = TorchRows, optimizer: RowOptimizer | None = None, dtype: str = "float32") -> RowPool:
    """An empty pool for tables 3 and 7, of a capacity of 2."""
    return RowPool(Layout(DIM, dtype, 1), TABLES, 2, optimizer or RowwiseAdagrad(lr=0.5), CPU, kernel)


def pairs(keys: list[int] | range, table: int = 3) -> tuple[Int64s, Bytes]:
    return keys_of(np.array(keys, np.int64)), np.full(len(keys), table, np.uint8)


def weights(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def test_the_first_rows_are_the_tables_default_rows_zeros_that_nobody_has(kernel: MakeKernel) -> None:
    pool = pool_of(kernel)
    assert pool.default_rows(np.array([7, 3, 7], np.uint8)).tolist() == [1, 0, 1]
    rows = pool.add(*pairs(range(5)), weights(5))
    assert rows.tolist() == [2, 3, 4, 5, 6] and pool.ids.num_rows == 5
    assert not pool.lookup(np.array([0, 1])).any() and (pool.ids.table_R[:2] == FREE).all()


def test_added_rows_hold_their_weights_or_zeros_and_fresh_states(kernel: MakeKernel) -> None:
    pool = pool_of(kernel, Adam())
    first, second = pool.add(*pairs([0, -1]), weights(2)), pool.add(*pairs([-1, 2**63 - 1], table=7), None)
    assert first.dtype == np.int64 and len({*first.tolist(), *second.tolist()}) == 4
    assert torch.equal(pool.lookup(first), weights(2)) and not pool.lookup(second).any()
    for name, state in pool.states(np.concatenate([first, second])).items():
        assert state.shape == ((4, DIM) if Adam.states[name] else (4,)) and not state.any()


def test_adding_or_updating_no_rows_changes_nothing(kernel: MakeKernel) -> None:
    pool = pool_of(kernel)
    assert pool.add(*pairs([]), weights(0)).tolist() == [] and pool.ids.capacity_rows == 2 + 2
    rows = pool.add(*pairs([1]), weights(1))
    pool.update(rows[:0], weights(0))
    assert torch.equal(pool.lookup(rows), weights(1)) and pool.lookup(rows[:0]).shape == (0, DIM)


def test_growing_keeps_every_weight_and_state(kernel: MakeKernel) -> None:
    pool = pool_of(kernel, Adam())
    rows = pool.add(*pairs([1, 2]), weights(2))
    pool.update(rows, weights(2, seed=1))
    before, states = pool.lookup(rows), pool.states(rows)
    more = pool.add(*pairs(range(10, 500)), None)
    assert pool.ids.capacity_rows >= 494 and torch.equal(pool.lookup(rows), before)
    assert all(torch.equal(pool.states(rows)[name], state) for name, state in states.items())
    assert not pool.lookup(more).any() and not any(state.any() for state in pool.states(more).values())


def test_a_freed_rows_next_owner_finds_zeros(kernel: MakeKernel) -> None:
    pool = pool_of(kernel, Adam())
    rows = pool.add(*pairs(range(6)), weights(6))
    pool.update(rows, weights(6, seed=1))
    kept = pool.lookup(rows[[0, 5]])
    pool.remove(rows[1:5])
    again = pool.add(*pairs(range(20, 24), table=7), None)
    assert sorted(again.tolist()) == rows[1:5].tolist()
    assert not pool.lookup(again).any() and not any(state.any() for state in pool.states(again).values())
    assert torch.equal(pool.lookup(rows[[0, 5]]), kept) and (pool.ids.find(*pairs(range(1, 5))) < 0).all()


def test_memory_is_the_map_the_weights_and_the_states() -> None:
    for dtype, size in (("float32", 4), ("float16", 2)):
        pool = pool_of(optimizer=Adam(), dtype=dtype)  # its states: two numbers an element, and a count of updates
        assert list(Adam.states.values()) == [True, True, False]
        assert pool.memory_bytes == pool.ids.memory_bytes + 4 * (DIM * size + 2 * DIM * 4 + 4)


@dataclass
class Row:
    weight: torch.Tensor
    states: dict[str, torch.Tensor]


@pytest.mark.parametrize("optimizer", [Sgd(0.5), RowwiseAdagrad(0.5), Adam(0.1), Ftrl(0.1, l1=0.1)], ids=repr)
def test_random_adds_updates_and_removals_equal_a_dict_of_rows(kernel: MakeKernel, optimizer: RowOptimizer) -> None:
    draw, twin, pool = random.Random(0), dict[int, Row](), pool_of(kernel, optimizer)
    for step in range(40):
        keys, table_U = pairs(range(10 * step, 10 * step + draw.choice([0, 1, 5])), draw.choice(TABLES))
        for place, row in enumerate(pool.add(keys, table_U, weights(keys.size, seed=step)).tolist()):
            assert row not in twin
            zeros = {name: torch.zeros(DIM) if each else torch.tensor(0.0) for name, each in optimizer.states.items()}
            twin[row] = Row(weights(keys.size, seed=step)[place], zeros)
        touched = draw.sample(sorted(twin), k=draw.randrange(len(twin) + 1))
        grad = weights(len(touched), seed=1_000 + step)
        pool.update(np.array(touched, np.int64), grad)
        for row, g in zip(touched, grad, strict=True):
            states = {name: value.unsqueeze(0) for name, value in twin[row].states.items()}
            move, states = optimizer.step(g.view(1, -1), states, twin[row].weight.view(1, -1))
            twin[row] = Row(twin[row].weight - move[0], {name: value[0] for name, value in states.items()})
        gone = draw.sample(sorted(twin), k=len(twin) // 5)
        pool.remove(np.array(gone, np.int64))
        for row in gone:
            del twin[row]
    rows = np.array(sorted(twin))
    # the same float32 arithmetic a row at a time; a batch may add a row's four squares in another order
    expected = torch.stack([twin[row].weight for row in rows.tolist()])
    torch.testing.assert_close(pool.lookup(rows), expected, rtol=1e-5, atol=1e-6)
    for name, state in pool.states(rows).items():
        expected = torch.stack([twin[row].states[name] for row in rows.tolist()])
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)


def test_an_update_leaves_every_other_row_and_its_states_bit_for_bit(kernel: MakeKernel) -> None:
    pool = pool_of(kernel, Adam())
    rows = pool.add(*pairs(range(9)), weights(9))
    pool.update(rows, weights(9, seed=2))
    before, states = pool.lookup(rows), pool.states(rows)
    pool.update(rows[[6, 2]], weights(2, seed=3))
    others = [0, 1, 3, 4, 5, 7, 8]
    assert torch.equal(pool.lookup(rows)[others], before[others])
    assert all(torch.equal(pool.states(rows)[name][others], state[others]) for name, state in states.items())
    assert not pool.lookup(np.array([0, 1])).any()


def test_what_is_looked_up_is_a_copy(kernel: MakeKernel) -> None:
    pool = pool_of(kernel)
    rows = pool.add(*pairs(range(2)), weights(2))
    pool.lookup(rows).zero_()
    for state in pool.states(rows).values():
        state.fill_(9)
    known = pool.known(rows)
    for column in ("key", "table", "count", "seen", "tally", "weight", "adagrad_sum"):
        known[column][:] = 1
    assert torch.equal(pool.lookup(rows), weights(2)) and not pool.states(rows)["adagrad_sum"].any()
    assert np.array_equal(pool.ids.find(*pairs(range(2))), rows) and not pool.ids.count_R.any()


def test_known_holds_all_columns_of_the_rows_asked_for_in_their_order(kernel: MakeKernel) -> None:
    pool = pool_of(kernel, RowwiseAdagrad(0.5))
    rows = pool.add(*pairs(range(5), table=7), weights(5))
    pool.ids.count_R[rows], pool.ids.seen_R[rows], pool.ids.tally_RC[rows, 0] = range(5), range(5, 10), range(10, 15)
    pool.write(rows, weights(5), {"adagrad_sum": torch.arange(5.0)})
    asked = rows[[3, 0]]
    known = pool.known(asked)
    assert list(known) == ["row", "key", "table", "count", "seen", "tally", "weight", "adagrad_sum"]
    assert np.array_equal(known["row"], asked) and np.array_equal(known["key"], pairs([3, 0])[0])
    assert known["table"].tolist() == [7, 7] and known["count"].tolist() == [3, 0] and known["seen"].tolist() == [8, 5]
    assert known["tally"].tolist() == [[13], [10]] and known["adagrad_sum"].tolist() == [3, 0]
    assert np.array_equal(known["weight"], weights(5)[[3, 0]].numpy())


def test_write_sets_the_weights_and_only_the_states_that_are_given(kernel: MakeKernel) -> None:
    pool = pool_of(kernel, Adam())
    rows = pool.add(*pairs(range(3)), weights(3))
    pool.update(rows, weights(3, seed=1))
    name, *others = Adam.states
    before = pool.states(rows)
    pool.write(rows[[2, 0]], weights(2, seed=4), {name: torch.ones(2, DIM)})
    after = pool.states(rows)
    assert torch.equal(pool.lookup(rows[[2, 0]]), weights(2, seed=4)) and (after[name][[0, 2]] == 1).all()
    assert all(torch.equal(after[other], before[other]) for other in others)
    assert torch.equal(after[name][1], before[name][1])


# float16


def test_float16_rows_are_read_as_float32_of_what_they_hold(kernel: MakeKernel) -> None:
    pool = pool_of(kernel, dtype="float16")
    rows = pool.add(*pairs(range(3)), weights(3))
    found = pool.lookup(rows)
    assert found.dtype == torch.float32 and torch.equal(found, weights(3).half().float())
    assert pool.known(rows)["weight"].dtype == np.float32


def trained_float16(keys: list[int], batches: list[list[int]], kernel: MakeKernel) -> dict[int, list[float]]:
    """Rows of some keys after each was updated twice, in these batches, by small gradients of their own."""
    pool = pool_of(kernel, Sgd(lr=1.0), dtype="float16")
    pool.add(*pairs(keys), torch.ones(len(keys), DIM))
    for batch in batches:
        rows = pool.ids.find(*pairs(batch))
        pool.ids.count_R[rows] += 1
        pool.update(rows, torch.tensor(batch).unsqueeze(1).expand(-1, DIM) * 1e-5)
    return {key: pool.lookup(pool.ids.find(*pairs([key])))[0].tolist() for key in keys}


def test_float16_rounding_depends_on_who_has_the_row_and_how_often_he_was_seen_alone(kernel: MakeKernel) -> None:
    keys = list(range(1, 41))
    expected = trained_float16(keys, [keys, keys], TorchRows)
    shuffled = trained_float16(keys[::-1], [keys[:7], keys[20:], keys[7:20], keys[::-1]], kernel)
    assert shuffled == expected  # bits


def test_float16_rounding_draws_anew_for_each_key_each_sighting_and_each_column() -> None:
    pool, count = pool_of(optimizer=Sgd(lr=1.0), dtype="float16"), 2_000
    rows = pool.add(*pairs(range(count)), None)
    draws = []
    for _ in range(4):
        pool.write(rows, torch.ones(count, DIM), {})
        pool.update(rows, torch.full((count, DIM), 2.0**-12))  # half of the way from 1 to the float16 below
        draws.append(pool.lookup(rows) < 1)
        pool.ids.count_R[rows] += 1
    ups = torch.stack(draws, dim=-1).view(count, -1).double()  # [2,000, columns and sightings]
    # 32,000 fair coins: their mean has sigma 0.0028; correlations of 2,000 pairs have sigma 0.022; five sigmas
    assert abs(ups.mean() - 0.5) < 5 * 0.0028
    assert (torch.corrcoef(ups.T) - torch.eye(16)).abs().max() < 5 * 0.0224
    assert abs(torch.corrcoef(torch.stack([ups[1:, 0], ups[:-1, 0]]))[0, 1]) < 5 * 0.0224  # neighbouring keys


def test_a_float16_row_moves_as_its_kernel_rounds_with_chances_in_0_to_1(kernel: MakeKernel) -> None:
    pool = pool_of(kernel, Sgd(lr=1.0), dtype="float16")
    rows = pool.add(*pairs(range(1_000)), torch.ones(1_000, DIM))
    pool.update(rows, torch.full((1_000, DIM), 2.0**-12))
    values = pool.lookup(rows).unique().tolist()
    assert values == [1 - 2.0**-11, 1.0]  # the two neighbours of 1 - 2^-12
    still = torch.full((1_000, DIM), 0.5).half().float()
    pool.write(rows, still, {})
    pool.update(rows, torch.zeros(1_000, DIM))
    assert torch.equal(pool.lookup(rows), still) and torch.equal(to_float16(still, still), still.half())
