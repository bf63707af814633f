"""Proof tests of trainer/auxiliary.py: plain loops over rows and pairs, the negatives' law, any split of lanes."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from conftest import known
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as surprise
from torch.nn.functional import softplus

from embeddings.exchange import LocalExchange
from embeddings.jagged import Jagged
from trainer.auxiliary import Correlation, Loss, Matching, TanhTower, window_pairs
from trainer.config import Config
from trainer.data import Batch
from trainer.draws import Draws
from trainer.features import Inputs, Layout
from trainer.learner import Learner, build, open_logs
from trainer.step import train_step

NUM_IDS, WIDTH, LONGEST = 12, 4, 6
LAYOUT = Layout({"user": range(3), "age": [3, 7], "item": range(4, 7)}, {"trail": WIDTH})
Place = tuple[int, int]  # the row in its day, and the place in its list


def assert_close(got: Tensor, want: Tensor) -> None:
    """Float32 sums of a few hundred numbers below 2, in another order."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def correlation(**settings: Any) -> Correlation:
    return Correlation(LAYOUT, **({"sequence": "trail", "layers": (8, 3)} | settings))


def matching(**settings: Any) -> Matching:
    return Matching(
        LAYOUT, **({"user": ("user", "age"), "item": ("item",), "label": "click", "layers": (8, 3)} | settings)
    )


def logged(lists: Sequence[Sequence[int]], lanes: Sequence[int]) -> Batch:
    """Rows in the order of their lanes' slices, as a worker reads them."""
    lengths = torch.tensor([len(ids) for ids in lists], dtype=torch.int64)
    ids = {"trail": Jagged.from_lengths(torch.tensor([i for ids in lists for i in ids], dtype=torch.int64), lengths)}
    num, ones = len(lists), torch.ones(len(lists), 1)
    lane_B = torch.tensor(lanes, dtype=torch.int64)
    return Batch(ids, torch.empty(num, 0), ones, ones, 1_000 * lane_B + torch.arange(num), lane_B=lane_B)


def random_log(num_rows: int, num_lanes: int, seed: int = 0) -> Batch:
    """Rows of 0 to LONGEST ids, low ones more often."""
    rng = np.random.default_rng(seed)
    lists = [(NUM_IDS * rng.random(rng.integers(0, LONGEST + 1)) ** 2).astype(int).tolist() for _ in range(num_rows)]
    return logged(lists, sorted(rng.integers(0, num_lanes, num_rows).tolist()))


def lists_of(batch: Batch) -> list[list[int]]:
    ids = batch.ids["trail"]
    return [part.tolist() for part in ids.values_N.split(ids.lengths_B.tolist())]


def inputs_of(batch: Batch, table_VD: Tensor) -> Inputs:
    """Each id's row of a table, zeros behind the end of a list."""
    there_BL = torch.arange(LONGEST) < batch.ids["trail"].lengths_B.unsqueeze(1)
    rows_BLD = torch.zeros(*there_BL.shape, table_VD.shape[1])
    rows_BLD[there_BL] = table_VD[batch.ids["trail"].values_N]
    return Inputs(torch.zeros(batch.num_rows, LAYOUT.input_dim), {"trail": (rows_BLD, there_BL)}, [])


def loss_of(net: Correlation, batch: Batch, table_VD: Tensor, day: int = 1) -> Loss:
    draws = Draws(batch.row_B, 0, day)
    return net(inputs_of(batch, table_VD), batch, torch.zeros(batch.num_rows), torch.ones(batch.num_rows), draws)


# The towers


def plain_tower(tower: TanhTower, x_BI: Tensor) -> Tensor:
    for weight, bias in tower.hidden.weights:
        x_BI = torch.relu(x_BI @ weight[0] + bias[0, 0])
    return torch.tanh(x_BI @ tower.last.weight.T + tower.last.bias)


@pytest.mark.parametrize("layers", [(3,), (8, 3), (8, 6, 3)])
def test_a_tower_is_relu_layers_and_tanh_last(layers: tuple[int, ...]) -> None:
    tower, x_BI = TanhTower(WIDTH, layers), torch.randn(200, WIDTH)
    assert_close(tower(x_BI), plain_tower(tower, x_BI))  # torch.matmul
    assert tower(x_BI).shape == (200, 3)


def test_an_inner_product_of_two_towers_can_be_below_zero() -> None:
    user_BD, item_BD = (TanhTower(WIDTH, (8, 3))(torch.randn(200, WIDTH)) for _ in range(2))
    for vector_BD in (user_BD, item_BD):
        assert vector_BD.min() < 0 < vector_BD.max() and vector_BD.abs().max() <= 1
    logit_B = (user_BD * item_BD).sum(1)
    assert logit_B.min() < 0 < logit_B.max()  # of two ReLU outputs it never is


def test_a_tower_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        TanhTower(WIDTH, ())


# Matching


def user_and_item(num_rows: int) -> Inputs:
    return Inputs(torch.randn(num_rows, LAYOUT.input_dim, requires_grad=True), {}, [])


def matched(net: Matching, inputs: Inputs, label_B: Tensor, weight_B: Tensor | None = None) -> Loss:
    draws, weight_B = (
        Draws(torch.arange(label_B.numel()), 0, 1),
        torch.ones_like(label_B) if weight_B is None else weight_B,
    )
    return net(inputs, logged([[]] * label_B.numel(), [0] * label_B.numel()), label_B, weight_B, draws)


def test_a_row_that_weighs_two_matches_as_if_it_stood_twice() -> None:
    net, inputs, label_B = matching(), user_and_item(30), (torch.rand(30) < 0.4).float()
    twice = torch.cat([torch.arange(30), torch.arange(10)])
    weighed = matched(net, inputs, label_B, 1.0 + (torch.arange(30) < 10))
    doubled = matched(net, Inputs(inputs.x_BI[twice], {}, ()), label_B[twice])
    torch.testing.assert_close(weighed.sum, doubled.sum)
    assert weighed.weight == doubled.weight == 40


def test_matching_is_the_log_loss_of_an_inner_product_over_the_known_labels() -> None:
    net, inputs, label_B = matching(), user_and_item(40), (torch.rand(40) < 0.4).float()
    label_B[::7] = torch.nan
    losses = []
    for x_I, label in zip(inputs.x_BI, label_B, strict=True):
        user, item = plain_tower(net.user, x_I[[0, 1, 2, 3, 7]]), plain_tower(net.item, x_I[4:7])
        if not label.isnan():
            losses.append(surprise(user @ item, label))  # torch's, row by row
    loss = matched(net, inputs, label_B)
    assert_close(loss.sum, torch.stack(losses).sum())
    assert loss.weight == len(losses) == 34


def test_a_row_whose_label_is_null_learns_nothing() -> None:
    net, inputs, label_B = matching(), user_and_item(20), torch.zeros(20)
    label_B[5:] = torch.nan
    matched(net, inputs, label_B).sum.backward()
    assert inputs.x_BI.grad is not None
    assert (inputs.x_BI.grad[5:] == 0).all() and (inputs.x_BI.grad[:5] != 0).all()  # exactly; no NaN came through
    nothing = matched(net, inputs, torch.full((20,), torch.nan))
    assert nothing.sum == 0 and nothing.weight == 0


def test_matching_reads_the_named_features_alone() -> None:
    net = matching(user=("user",), item=("item",))
    inputs, label_B = user_and_item(20), torch.ones(20)
    matched(net, inputs, label_B).sum.backward()
    assert inputs.x_BI.grad is not None and (inputs.x_BI.grad[:, [3, 7]] == 0).all()  # the age


@pytest.mark.parametrize("missing", ["user", "item"])
def test_matching_without_a_user_or_an_item_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match="at least one feature"):
        matching(**{missing: ()})


def test_matching_without_an_event_is_refused() -> None:
    """It would learn that nobody takes anything."""
    with pytest.raises(ValueError, match="label must name the event"):
        matching(label="")


def test_matching_learns_who_takes_what() -> None:
    """Users and items of two kinds, who take their own kind nine times in ten: entropy .33, chance log 2."""
    net, layout = matching(user=("user",), item=("item",), layers=(8, 4)), LAYOUT.columns
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)

    def rows(num_rows: int) -> tuple[Inputs, Tensor]:
        kind_2B = torch.rand(2, num_rows) < 0.5
        x_BI = 0.3 * torch.randn(num_rows, LAYOUT.input_dim)
        for name, kind_B in zip(("user", "item"), kind_2B, strict=True):
            x_BI[:, layout[name][0]] += torch.where(kind_B, 1.0, -1.0)
        chance_B = torch.where(kind_2B[0] == kind_2B[1], 0.9, 0.1)
        return Inputs(x_BI, {}, []), (torch.rand(num_rows) < chance_B).float()

    for _ in range(150):
        loss = matched(net, *rows(128))
        optimizer.zero_grad()
        (loss.sum / loss.weight).backward()
        optimizer.step()
    loss = matched(net, *rows(2_000))
    assert 0.3 < loss.sum / loss.weight < 0.45  # on fresh rows


# Correlation: which pairs


def pairs_of(lists: Iterable[Sequence[Any]], window: int) -> list[tuple[Any, Any]]:
    """What each id is paired with, by the code under test."""
    rows = [(row, value) for row, values in enumerate(lists) for value in values]
    row_P = torch.tensor([row for row, _ in rows], dtype=torch.int64)
    found = window_pairs(row_P, window)
    return [(rows[a][1], rows[b][1]) for first, second in found for a, b in zip(first, second, strict=True)]


def test_the_window_pairs_of_a_list_are_its_neighbours_in_both_directions() -> None:
    expected = {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("c", "d"), ("d", "c")}
    found = pairs_of(["abcd"], 1)
    assert set(found) == expected and len(found) == 6


def test_rows_that_stand_side_by_side_never_mix() -> None:
    found = pairs_of(["ab", "", "c", "de"], 3)
    assert sorted(found) == [("a", "b"), ("b", "a"), ("d", "e"), ("e", "d")]


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_window_pairs_are_those_of_a_plain_loop(window: int) -> None:
    rng = np.random.default_rng(window)
    lists = [[(row, place) for place in range(rng.integers(0, 7))] for row in range(40)]
    near = range(-window, window + 1)
    expected = [(a, b) for ids in lists for a in ids for b in ids if a != b and b[1] - a[1] in near]
    found = pairs_of(lists, window)
    assert sorted(found) == sorted(expected)  # each once


def test_without_ids_there_are_no_pairs() -> None:
    assert pairs_of([], 2) == [] and pairs_of(["", "a", ""], 2) == []


# Correlation: which negatives


def places_of(batch: Batch) -> list[Place]:
    """The place of every id."""
    return [(row, i) for row, ids in zip(batch.row_B.tolist(), lists_of(batch), strict=True) for i in range(len(ids))]


def negatives_of(net: Correlation, batch: Batch, num: int = 4, day: int = 1) -> dict[Place, list[Place]]:
    """From which places the negatives of each are drawn."""
    there_BL = inputs_of(batch, torch.zeros(NUM_IDS, WIDTH)).lists["trail"][1]
    row_P = there_BL.nonzero()[:, 0]
    drawn_BLQ = Draws(batch.row_B, 0, day).uniform("negatives", LONGEST * num).view(batch.num_rows, LONGEST, num)
    assert batch.lane_B is not None
    other_PQ = net.others(batch.row_B[row_P], batch.lane_B[row_P], drawn_BLQ[there_BL])
    places = places_of(batch)
    return {place: [places[p] for p in others] for place, others in zip(places, other_PQ.tolist(), strict=True)}


def p_value(observed: Tensor, expected: Tensor) -> float:
    """Pearson's chi-squared test."""
    statistic = ((observed - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2), statistic / 2))


def test_negatives_follow_the_frequencies_of_their_lanes_slice() -> None:
    """Each place of the lane equally often, so each id as often as it stands there: the unigram law."""
    batch = random_log(12, num_lanes=2)
    ids = {
        (row, i): id for row, of in zip(batch.row_B.tolist(), lists_of(batch), strict=True) for i, id in enumerate(of)
    }
    counts = {lane: torch.zeros(NUM_IDS) for lane in (0, 1)}
    for day in range(60):
        for (row, _), others in negatives_of(correlation(), batch, 8, day).items():
            for other in others:
                counts[row // 1_000][ids[other]] += 1
    for lane, observed in counts.items():
        stands = torch.zeros(NUM_IDS)
        for (row, _), id in ids.items():
            stands[id] += row // 1_000 == lane
        there = stands > 0
        assert (observed[~there] == 0).all()
        assert p_value(observed[there], observed.sum() * stands[there] / stands.sum()) > 1e-3


def test_negatives_do_not_depend_on_the_id_for_which_they_are_drawn() -> None:
    """Independence, beside the law of one: a contingency table of targets and negatives."""
    batch, counts = logged([[0, 1, 2, 3]], [0]), torch.zeros(4, 4)
    for day in range(400):
        for (_, target), others in negatives_of(correlation(), batch, 8, day).items():
            for _, other in others:
                counts[target, other] += 1
    assert p_value(counts.flatten(), torch.full((16,), float(counts.sum() / 16))) > 1e-3


def test_other_lanes_are_never_drawn_from() -> None:
    drawn = negatives_of(correlation(), random_log(40, num_lanes=5), num=8)
    assert drawn and all(row // 1_000 == other // 1_000 for (row, _), of in drawn.items() for other, _ in of)


def test_no_negative_that_counts_stands_in_the_window() -> None:
    net, batch = correlation(window=2), random_log(60, num_lanes=3)
    places, lists = places_of(batch), lists_of(batch)
    row_P = torch.repeat_interleave(torch.arange(60), batch.ids["trail"].lengths_B)
    other_PQ = torch.randint(len(places), (len(places), 16))
    near_PQ = net.near(row_P, batch.ids["trail"].values_N, other_PQ)
    flat = [id for ids in lists for id in ids]
    for p, (row, (_, place)) in enumerate(zip(row_P.tolist(), places, strict=True)):
        window = lists[row][max(place - 2, 0) : place + 3]  # with the id itself
        assert near_PQ[p].tolist() == [flat[other] in window for other in other_PQ[p].tolist()]  # a plain loop


def test_where_all_ids_are_in_the_window_only_near_ones_count() -> None:
    net, table_VD = correlation(window=1), torch.randn(NUM_IDS, WIDTH)
    loss = loss_of(net, logged([[5, 6]] * 8, [0] * 8), table_VD)
    a, b = plain_tower(net.tower, table_VD[[5, 6]])
    assert_close(loss.sum, 16 * softplus(-(a @ b)))
    assert loss.weight == 16


# Correlation: the loss


def looped(net: Correlation, batch: Batch, table_VD: Tensor, window: int, num: int) -> tuple[Tensor, int]:
    """Pair by pair, negative by negative: the sum, and the number of pairs."""
    row_B, lists = batch.row_B.tolist(), lists_of(batch)
    vector_VD, losses, pairs = plain_tower(net.tower, table_VD), [torch.zeros(())], 0
    ids = {(row, i): id for row, of in zip(row_B, lists, strict=True) for i, id in enumerate(of)}
    for (row, place), others in negatives_of(net, batch, num).items():
        around = {i: ids[row, i] for i in range(place - window, place + window + 1) if (row, i) in ids}
        target_D = vector_VD[around[place]]
        for context in (id for i, id in around.items() if i != place):
            losses.append(softplus(-(target_D @ vector_VD[context])))
            negatives = [ids[other] for other in others if ids[other] not in around.values()]
            losses += [softplus(target_D @ vector_VD[negative]) for negative in negatives]
            pairs += 1
    return torch.stack(losses).sum(), pairs


@pytest.mark.parametrize(("window", "num"), [(1, 1), (2, 4), (9, 2)])
def test_correlation_is_the_loss_of_a_plain_loop_over_pairs_and_negatives(window: int, num: int) -> None:
    net, batch = correlation(window=window, negatives=num), random_log(20, num_lanes=3)
    table_VD = torch.randn(NUM_IDS, WIDTH, requires_grad=True)
    loss, (expected, pairs) = loss_of(net, batch, table_VD), looped(net, batch, table_VD, window, num)
    assert_close(loss.sum, expected)
    assert loss.weight == pairs > 0
    wanted = [table_VD, *net.parameters()]
    gradients = [torch.autograd.grad(total, wanted) for total in (loss.sum, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # autograd through the loop


def split_by_lane(batch: Batch, workers: Callable[[int], int]) -> list[Batch]:
    assert batch.lane_B is not None
    worker_B = torch.tensor([workers(lane) for lane in batch.lane_B.tolist()])
    return [batch.select((worker_B == worker).nonzero()[:, 0]) for worker in range(int(worker_B.max()) + 2)]


SPLITS: dict[str, Callable[[int], int]] = {
    "two halves": lambda lane: lane // 3,
    "a lane each": lambda lane: lane,
    "uneven": lambda lane: min(lane, 1),
}


@pytest.mark.parametrize("split", SPLITS)
def test_any_split_of_lanes_over_workers_gives_the_same_negatives_losses_and_gradients(split: str) -> None:
    """Law 1: the parts' sums add up. One of the workers has no row at all."""
    net, batch = correlation(), random_log(50, num_lanes=6)
    table_VD = torch.randn(NUM_IDS, WIDTH, requires_grad=True)
    parts = split_by_lane(batch, SPLITS[split])
    assert parts[-1].num_rows == 0
    drawn: dict[Place, list[Place]] = {}
    for part in parts:
        drawn |= negatives_of(net, part)
    assert drawn == negatives_of(net, batch)
    whole, losses = loss_of(net, batch, table_VD), [loss_of(net, part, table_VD) for part in parts]
    assert_close(torch.stack([loss.sum for loss in losses]).sum(), whole.sum)
    assert sum(loss.weight for loss in losses) == whole.weight
    (together,) = torch.autograd.grad(whole.sum, table_VD)
    (added,) = torch.autograd.grad(torch.stack([loss.sum for loss in losses]).sum(), table_VD)
    torch.testing.assert_close(added, together, rtol=1e-4, atol=1e-4)


def test_the_order_in_which_rows_stand_in_the_batch_changes_nothing() -> None:
    net, batch, table_VD = correlation(), random_log(50, num_lanes=6), torch.randn(NUM_IDS, WIDTH)
    shuffled = batch.select(torch.randperm(50))
    assert negatives_of(net, shuffled) == negatives_of(net, batch)
    assert_close(loss_of(net, shuffled, table_VD).sum, loss_of(net, batch, table_VD).sum)


def test_one_tower_serves_the_target_its_context_and_the_negatives() -> None:
    """So an id is never far from itself: beside itself it costs log(1 + exp(-|v|^2)), log 2 at most."""
    net, table_VD = correlation(), torch.randn(NUM_IDS, WIDTH)
    for id in range(NUM_IDS):
        loss = loss_of(net, logged([[id, id]], [0]), table_VD).sum
        assert_close(loss, 2 * softplus(-plain_tower(net.tower, table_VD[id]).square().sum()))
        assert loss < 2 * math.log(2)


def test_lists_of_one_id_or_none_have_a_loss_of_zero_over_nothing() -> None:
    net, table_VD = correlation(), torch.randn(NUM_IDS, WIDTH, requires_grad=True)
    for batch in (logged([[3], [], [5]], [0, 0, 1]), logged([[], []], [0, 1]), logged([], [])):
        loss = loss_of(net, batch, table_VD)
        assert loss.sum == 0 and loss.weight == 0
        gradients = torch.autograd.grad(loss.sum, [table_VD, *net.parameters()], allow_unused=True)
        assert all(gradient is None or (gradient == 0).all() for gradient in gradients)


def test_a_list_that_was_dropped_is_neither_paired_nor_drawn() -> None:
    net, batch, table_VD = correlation(), random_log(30, num_lanes=3), torch.randn(NUM_IDS, WIDTH)
    kept_B = torch.arange(30) % 3 > 0
    inputs = inputs_of(batch, table_VD)
    rows_BLD, there_BL = inputs.lists["trail"]
    dropped = Inputs(inputs.x_BI, {"trail": (rows_BLD, there_BL & kept_B.unsqueeze(1))}, [])
    loss = net(dropped, batch, torch.zeros(30), torch.ones(30), Draws(batch.row_B, 0, 1))
    expected = loss_of(net, batch.select(kept_B.nonzero()[:, 0]), table_VD)  # as if the rows were not there
    assert_close(loss.sum, expected.sum)
    assert loss.weight == expected.weight


def test_correlation_learns_which_ids_belong_together() -> None:
    """Two sorts of ids, each list of one sort. Chance: what vectors of zeros would cost."""
    net, table_VD = correlation(layers=(8, 4)), (0.1 * torch.randn(NUM_IDS, WIDTH)).requires_grad_()
    optimizer, rng = torch.optim.Adam([*net.parameters(), table_VD], lr=0.02), np.random.default_rng(0)

    def rows(num_rows: int) -> Batch:
        sorts = rng.integers(0, 2, num_rows)
        lists = [(6 * sort + rng.choice(6, 4, replace=False)).tolist() for sort in sorts]
        return logged(lists, [0] * num_rows)

    for step in range(100):
        loss = loss_of(net, rows(64), table_VD, step)
        optimizer.zero_grad()
        (loss.sum / loss.weight).backward()
        optimizer.step()
    fresh = rows(500)
    learnt = loss_of(net, fresh, table_VD)
    vector_VD = net.tower(table_VD)
    nn.init.zeros_(net.tower.last.weight)
    nn.init.zeros_(net.tower.last.bias)
    assert learnt.sum < 0.8 * loss_of(net, fresh, table_VD).sum  # measured: 0.66
    near_VV = vector_VD @ vector_VD.T
    assert near_VV[:6, :6].min() > near_VV[:6, 6:].max()  # and the ids are told apart


# Precision


def test_under_bf16_autocast_losses_are_summed_in_float32() -> None:
    """With vectors as they come, nothing but the towers is rounded to bf16."""
    net, batch, table_VD = correlation(layers=(8, 3)), random_log(50, num_lanes=3), torch.randn(NUM_IDS, WIDTH)
    net.tower = nn.Identity()  # type: ignore[assignment]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_of(net, batch, table_VD)
    assert rounded.sum.dtype == torch.float32
    assert_close(rounded.sum, loss_of(net, batch, table_VD).sum)


def test_under_bf16_autocast_both_are_near_float32_and_learn() -> None:
    near, match, inputs, label_B = correlation(), matching(), user_and_item(64), (torch.rand(64) < 0.4).float()
    batch, table_VD = random_log(50, num_lanes=3), torch.randn(NUM_IDS, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_of(near, batch, table_VD), matched(match, inputs, label_B)]
    for loss, whole in zip(losses, [loss_of(near, batch, table_VD), matched(match, inputs, label_B)], strict=True):
        # bf16 has 8 bits: three layers, logits below 3
        torch.testing.assert_close(loss.sum, whole.sum, rtol=0.01, atol=0.0)
        assert loss.sum.dtype == loss.weight.dtype == torch.float32
        loss.sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*near.parameters(), *match.parameters()])


# In a learner


def first_batches(config: Config, num: int) -> list[Batch]:
    logs = open_logs(config)
    plan = logs.plan(logs.intervals()[0])
    return list(islice(logs.read(plan, batch_size=256, lanes=config.data.lanes, seed=3), num))


def trained(config: Config) -> Learner:
    learner = build(config, LocalExchange(), torch.device("cpu"))
    for batch in first_batches(config, 4):
        train_step(learner, batch, 1)
    return learner


def with_auxiliary(weight: float) -> str:
    match = f"{{kind: matching, user: [user_id], item: [item_id], label: click, layers: [8, 4], weight: {weight}}}"
    near = f"{{kind: correlation, sequence: history, layers: [8, 4], weight: {weight}}}"
    return f"model.auxiliary={{match: {match}, near: {near}}}"


def assert_same(one: Any, other: Any) -> None:
    """The same bits of every row and of the whole net."""
    assert one.keys() == other.keys()
    for name, columns in one.items():
        assert all(np.array_equal(columns[what], other[name][what]) for what in columns), name


def test_auxiliary_nets_of_weight_zero_leave_the_model_as_it_is_without_them(small_config: Callable[..., Any]) -> None:
    """DeepMCP with alpha = beta = 0 is the plain net, bit for bit; with others it is not."""
    plain, silent, heard = (
        trained(small_config("features.history.pool=none", *auxiliary))
        for auxiliary in ([], [with_auxiliary(0.0)], [with_auxiliary(0.5)])
    )
    state = plain.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in silent.model.state_dict().items())
    assert_same(known(silent), known(plain))
    assert heard.model.state_dict().keys() == state.keys()  # what scores has no part of them
    before, after = (known(learner)["item rows"]["weight"] for learner in (plain, heard))
    assert not np.allclose(before, after, rtol=0, atol=1e-4)  # they shape the rows


def test_losses_of_auxiliary_nets_fall_in_training(small_config: Callable[..., Any]) -> None:
    config = small_config("features.history.pool=none", with_auxiliary(1.0), "train.dense.lr=0.01")
    learner = build(config, LocalExchange(), torch.device("cpu"))
    [batch] = first_batches(config, 1)
    assert learner.losses[-2:] == ["match", "near"]
    losses = torch.stack([train_step(learner, batch, 1)[0][-2:] for _ in range(12)])
    assert (losses[-1] < losses[0]).all() and losses[0, 0] == pytest.approx(math.log(2), abs=0.1)
