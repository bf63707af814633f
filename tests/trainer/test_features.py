"""Proof tests of trainer/features.py: a plain loop over rows and ids, what is dropped when, what is named where."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from embeddings.client import Block, ShardedEmbeddings
from embeddings.jagged import Jagged
from embeddings.optim import RowwiseAdagrad
from embeddings.shard import Shard
from embeddings.table import TableConfig
from embeddings.tallies import Tally
from trainer.data import Batch
from trainer.draws import Draws
from trainer.features import Features, IdFeature, IdStatistics, Inputs
from trainer.numbers import NumberStats

TABLES = {"user": TableConfig(4, 64, 1.0), "item": TableConfig(4, 64, 1.0), "position": TableConfig(8, 16, 1.0)}
READS = {"user": "user", "history": "item", "sum_history": "item", "trail": "item", "position": "position"}
NUMBERS = ["age", "price", "hour"]
LISTS = ("history", "sum_history", "trail")
LONGEST = 3  # of a trail; logged lists have up to 4 ids


def embeddings(reads: Mapping[str, str] = READS) -> ShardedEmbeddings:
    return ShardedEmbeddings(Shard(TABLES, RowwiseAdagrad()), reads)


def logged(num_rows: int, seed: int = 0, first_row: int = 0) -> Batch:
    """Random lists of 0 to 4 ids a feature, three numbers, of which one in five is null."""
    rng = np.random.default_rng(seed)
    ids = {}
    for name in READS:
        lengths = torch.from_numpy(rng.integers(0, 5 if name in LISTS else 2, num_rows))
        ids[name] = Jagged.from_lengths(torch.from_numpy(rng.integers(0, 20, int(lengths.sum()))), lengths)
    numbers = rng.normal(3, 2, (num_rows, 3)).astype(np.float32)
    numbers[rng.random((num_rows, 3)) < 0.2] = np.nan
    row_B = torch.arange(first_row, first_row + num_rows)
    return Batch(ids, torch.from_numpy(numbers), torch.zeros(num_rows, 1), torch.ones(num_rows, 1), row_B)


def features(
    user_dropout: float = 0.0, history_dropout: float = 0.0, position_dropout: float = 0.1, trail_dropout: float = 0.0
) -> Features:
    main = {
        "user": IdFeature(4, dropout=user_dropout),
        "history": IdFeature(4, dropout=history_dropout),
        "sum_history": IdFeature(4, mean=False),
    }
    lists = {"trail": (IdFeature(4, dropout=trail_dropout), LONGEST)}
    return Features(main, {"position": IdFeature(8, dropout=position_dropout)}, NUMBERS, lists=lists)


def block_of(blocks: Sequence[Block], name: str) -> Block:
    return next(block for block in blocks if name in block.features)


def looped(blocks: Sequence[Block], name: str, mean: bool = True) -> Tensor:
    """The pooled vectors by a plain loop over rows and their ids."""
    block = block_of(blocks, name)
    num_rows = block.ids.num_rows // len(block.features)
    first = block.features.index(name) * num_rows  # the features' lists stand one feature after the other
    rows, offsets = [], block.ids.offsets[first : first + num_rows + 1].tolist()
    for start, end in zip(offsets, offsets[1:], strict=False):
        vectors = [block.rows_UD[i] for i in block.ids.values_N[start:end]]
        total = torch.stack(vectors).sum(0) if vectors else torch.zeros(block.rows_UD.shape[1])
        rows.append(total / max(len(vectors), 1) if mean else total)
    return torch.stack(rows)


def made(
    parts: Features, batch: Batch, blocks: Sequence[Block], stats: NumberStats, draws: Draws | None = None
) -> Inputs:
    """The dense net's inputs as a step makes them."""
    return parts.inputs(blocks, stats.standardise(parts.numbers(batch, blocks, {})), batch, draws)


def scored(batch: Batch, store: ShardedEmbeddings | None = None) -> list[Block]:
    """The rows of a batch whose ids are all known, as they are pulled for scoring."""
    store = store or embeddings()
    store.pull(batch.ids, insert=True)
    return store.pull(batch.ids, insert=False)


def stats_of(batch: Batch) -> NumberStats:
    stats = NumberStats(3)
    stats.update(stats.measure(batch.numbers_BK))
    return stats


def test_the_main_input_is_pooled_ids_then_numbers_then_null_flags() -> None:
    batch, parts = logged(50), features()
    blocks, stats = scored(batch), stats_of(batch)
    x_BI = made(parts, batch, blocks, stats).x_BI
    pooled = [looped(blocks, "user"), looped(blocks, "history"), looped(blocks, "sum_history", mean=False)]
    # plain loop; float32 sums of at most four vectors
    torch.testing.assert_close(x_BI[:, :12], torch.cat(pooled, dim=1))
    assert torch.equal(x_BI[:, 12:], stats.standardise(batch.numbers_BK))
    assert x_BI.shape[1] == parts.layout.input_dim == 3 * 4 + 2 * 3 and x_BI.dtype == torch.float32


def test_the_gradient_of_a_pooled_list_reaches_each_of_its_ids() -> None:
    batch, draws = logged(50), Draws(torch.arange(50), 0, 1)
    blocks = embeddings().pull(batch.ids, insert=True)
    generator = torch.Generator().manual_seed(0)
    upstream_BI = torch.randn(50, 18, generator=generator)
    made(features(), batch, blocks, stats_of(batch), draws).x_BI.backward(upstream_BI)
    rows_UD = block_of(blocks, "user").rows_UD  # users and items have one width, so their rows come together
    gradient_UD, rows_UD.grad = rows_UD.grad, None
    pooled = [looped(blocks, "user"), looped(blocks, "history"), looped(blocks, "sum_history", mean=False)]
    torch.cat(pooled, dim=1).backward(upstream_BI[:, :12])
    # autograd through the plain loop; float32 sums in another order
    torch.testing.assert_close(gradient_UD, rows_UD.grad, rtol=1e-5, atol=1e-5)


def test_the_main_input_asks_for_a_gradient_in_training_alone() -> None:
    """Tasks' gradients are compared there, even when no feature has an id."""
    batch, stats = logged(5), stats_of(logged(5))
    for parts, reads in ((features(), READS), (Features({}, {}, NUMBERS), {})):
        store = embeddings(reads)
        trained = made(parts, batch, store.pull(batch.ids, insert=True), stats, Draws(batch.row_B, 0, 1))
        assert trained.x_BI.requires_grad and all(shared.requires_grad for shared in trained.shared)
        with torch.no_grad():
            asked = made(parts, batch, store.pull(batch.ids, insert=False), stats)
        assert not any(shared.requires_grad for shared in asked.shared)


def test_gradients_of_tasks_meet_in_the_main_input_and_the_lists() -> None:
    batch = logged(20)
    inputs = made(features(), batch, scored(batch), stats_of(batch))
    x_BI, rows_BLD = inputs.shared
    assert x_BI is inputs.x_BI and rows_BLD is inputs.lists["trail"][0]


def test_a_dropped_id_feature_reads_as_unknown_and_nothing_else_changes() -> None:
    batch, parts = logged(4_000), features(user_dropout=0.3)
    blocks, stats, draws = scored(batch), stats_of(batch), Draws(batch.row_B, 0, 1)
    scored_BI, trained_BI = (made(parts, batch, blocks, stats, d).x_BI for d in (None, draws))
    keep_B1 = draws.keep("user", 0.3).unsqueeze(1)
    assert torch.equal(trained_BI[:, :4], scored_BI[:, :4] * keep_B1)  # zeros, and no rescaling: as an unknown id reads
    assert torch.equal(trained_BI[:, 4:], scored_BI[:, 4:])
    # binomial law, four standard deviations
    assert 1 - keep_B1.mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 4_000) ** 0.5)


def test_features_are_dropped_independently_of_each_other() -> None:
    draws = Draws(torch.arange(50_000), 0, 1)
    both = ((1 - draws.keep("user", 0.3)) * (1 - draws.keep("history", 0.3))).mean().item()
    assert both == pytest.approx(0.09, abs=4 * (0.09 * 0.91 / 50_000) ** 0.5)  # product law, four standard deviations


def test_dropout_is_the_same_however_the_rows_are_batched() -> None:
    batch, parts = logged(300), features(0.3, 0.3, 0.3, 0.3)
    store, stats = embeddings(), stats_of(batch)
    store.pull(batch.ids, insert=True)

    def seen(part: Batch) -> Tensor:
        inputs = made(parts, part, store.pull(part.ids, insert=False), stats, Draws(part.row_B, 0, 1))
        (vector_BD, present_B), (rows_BLD, there_BL) = inputs.selection[0], inputs.lists["trail"]
        return torch.cat([inputs.x_BI, vector_BD, present_B.unsqueeze(1), rows_BLD.flatten(1), there_BL], dim=1)

    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    several = torch.cat([seen(batch.select(rows)) for rows in order.split([1, 0, 99, 200])])
    torch.testing.assert_close(several, seen(batch)[order])  # oracle: one batch; float32 sums of four vectors


# Lists that come unpooled


def test_an_unpooled_list_is_its_last_rows_in_order_with_zeros_behind_the_end() -> None:
    batch, parts = logged(60), features()
    blocks = scored(batch)
    rows_BLD, there_BL = made(parts, batch, blocks, stats_of(batch)).lists["trail"]
    block = block_of(blocks, "trail")
    first = block.features.index("trail") * 60
    for b in range(60):  # a plain loop over the places of the ids in the pulled rows
        places = block.ids.values_N[block.ids.offsets[first + b] : block.ids.offsets[first + b + 1]][-LONGEST:]
        expected_LD = torch.cat([block.rows_UD[places], torch.zeros(LONGEST - len(places), 4)])
        assert torch.equal(rows_BLD[b], expected_LD)
        assert there_BL[b].tolist() == [place < len(places) for place in range(LONGEST)]


def test_a_dropped_list_has_no_ids_and_no_rows_and_the_others_are_whole() -> None:
    """Both: what reads beside it (an action's list) knows it by its rows alone."""
    batch, parts = logged(4_000), features(trail_dropout=0.3)
    blocks, stats, draws = scored(batch), stats_of(batch), Draws(batch.row_B, 0, 1)
    scored_inputs, trained = (made(parts, batch, blocks, stats, d) for d in (None, draws))
    (all_BLD, all_BL), (rows_BLD, there_BL) = (inputs.lists["trail"] for inputs in (scored_inputs, trained))
    keep_B = draws.keep("trail", 0.3)
    assert torch.equal(there_BL, all_BL & (keep_B > 0).unsqueeze(1))
    assert torch.equal(rows_BLD, all_BLD * keep_B.view(-1, 1, 1))
    assert torch.equal(trained.x_BI, scored_inputs.x_BI)  # nothing of a list is in the main input
    # binomial law, four standard deviations
    assert 1 - keep_B.mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 4_000) ** 0.5)


def test_the_gradient_of_an_unpooled_list_reaches_the_rows_of_its_ids() -> None:
    batch, draws = logged(50), Draws(torch.arange(50), 0, 1)
    blocks = embeddings().pull(batch.ids, insert=True)
    rows_BLD, there_BL = made(features(trail_dropout=0.3), batch, blocks, stats_of(batch), draws).lists["trail"]
    rows_BLD.sum().backward()
    block = block_of(blocks, "trail")
    trails = block.ids.select(torch.arange(50) + 50 * block.features.index("trail"))
    expected_U = torch.zeros(block.rows_UD.shape[0])
    for places, there_L in zip(trails.values_N.split(trails.lengths_B.tolist()), there_BL, strict=True):
        for place in places[-LONGEST:] if there_L.any() else ():
            expected_U[place] += 1  # once for each time that it stands in a list that is kept
    assert block.rows_UD.grad is not None and torch.equal(block.rows_UD.grad, expected_U.unsqueeze(1).expand(-1, 4))


# The layout


def test_the_layout_names_the_columns_where_each_feature_stands() -> None:
    batch, stats = logged(200), NumberStats(5)
    happened = {"seen": IdStatistics("user", "user", [(0,), (1, 0)], 1.0)}
    main = {"user": IdFeature(4), "history": IdFeature(4)}
    parts = Features(main, {"position": IdFeature(8)}, NUMBERS, happened, {"trail": (IdFeature(4), LONGEST)})
    blocks = scored(batch, embeddings({name: READS[name] for name in (*main, "position", "trail")}))
    seen_BK = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    standard_B2K = stats.standardise(torch.cat([batch.numbers_BK, seen_BK], dim=1))
    x_BI, layout = parts.inputs(blocks, standard_B2K, batch, None).x_BI, parts.layout
    assert layout.input_dim == x_BI.shape[1] == 2 * 4 + 3 + 2 + 3 and layout.lists == {"trail": 4}
    assert list(layout.columns) == ["user", "history", *NUMBERS, "seen"]
    expected = {name: looped(blocks, name) for name in main}
    expected |= {name: standard_B2K[:, [k, 5 + k]] for k, name in enumerate(NUMBERS)}  # and its null flag
    expected["seen"] = standard_B2K[:, 3:5]  # what happened is never null
    for name, columns in layout.columns.items():
        torch.testing.assert_close(x_BI[:, list(columns)], expected[name])
    together = sorted(column for columns in layout.columns.values() for column in columns)
    assert together == list(range(layout.input_dim))  # each column is somebody's, and nobody else's


def test_columns_of_several_features_stand_in_the_order_in_which_they_are_named() -> None:
    layout = features().layout
    assert layout.columns_of(["price", "user"]) == [*layout.columns["price"], *layout.columns["user"]]
    assert layout.columns_of([]) == [] and layout.list_dim("trail") == 4


def test_a_feature_that_is_not_there_is_refused_with_those_that_are() -> None:
    layout = features().layout
    for name in ("position", "trail"):  # one is the position tower's, one the encoder's
        with pytest.raises(ValueError, match=f"'{name}' is no feature of the main input, which has user, history"):
            layout.columns_of(["user", name])
    with pytest.raises(ValueError, match="'history' is no list with pool: none; such lists: trail"):
        layout.list_dim("history")
    with pytest.raises(ValueError, match="such lists: none"):
        Features({}, {}, NUMBERS).layout.list_dim("history")


# Selection features


def test_position_is_dropped_on_one_training_row_in_ten_and_absent_from_scoring() -> None:
    num_rows = 60_000
    one_each = Jagged.from_lengths(torch.arange(num_rows) % 10, torch.ones(num_rows, dtype=torch.int64))
    nothing, ones, row_B = torch.empty(num_rows, 0), torch.ones(num_rows, 1), torch.arange(num_rows)
    batch = Batch({"position": one_each}, nothing, ones, ones, row_B)
    blocks = scored(batch, embeddings({"position": "position"}))
    parts = Features({}, {"position": IdFeature(8, dropout=0.1)}, [])
    for day in range(3):
        ((_, present_B),) = parts.inputs(blocks, nothing, batch, Draws(row_B, 0, day)).selection
        assert 1 - present_B.mean().item() == pytest.approx(0.1, abs=0.005)  # binomial: four standard deviations
    ((vector_BD, present_B),) = parts.inputs(blocks, nothing, batch, None).selection
    assert (present_B == 0).all() and (vector_BD == 0).all()  # at serving nobody knows the position


def test_a_selection_feature_is_its_vector_where_present_and_zeros_where_not() -> None:
    batch, parts = logged(500), features(position_dropout=0.4)
    blocks, draws = scored(batch), Draws(batch.row_B, 0, 1)
    ((vector_BD, present_B),) = made(parts, batch, blocks, stats_of(batch), draws).selection
    expected_B = (batch.ids["position"].lengths_B > 0) * draws.keep("position", 0.4)
    assert torch.equal(present_B, expected_B)  # a null position is missing too
    torch.testing.assert_close(vector_BD, looped(blocks, "position") * present_B.unsqueeze(1))  # plain loop


def test_scores_do_not_depend_on_where_the_row_was_shown() -> None:
    batch, store = logged(100), embeddings()
    stats, position = stats_of(batch), batch.ids["position"]
    moved = replace(batch, ids=batch.ids | {"position": Jagged(position.values_N + 5, position.offsets)})
    here, there = (made(features(), b, scored(b, store), stats) for b in (batch, moved))
    assert torch.equal(here.x_BI, there.x_BI)  # the same bits
    for one, other in zip(here.selection[0], there.selection[0], strict=True):
        assert torch.equal(one, other)
    draws = Draws(batch.row_B, 0, 1)
    here, there = (made(features(), b, scored(b, store), stats, draws) for b in (batch, moved))
    assert torch.equal(here.x_BI, there.x_BI)  # in training too it is no part of the main input
    assert not torch.equal(here.selection[0][0], there.selection[0][0])


def test_without_ids_or_without_numbers_the_input_is_the_other() -> None:
    batch = logged(20)
    stats, only_numbers = stats_of(batch), Features({}, {}, NUMBERS)
    inputs = made(only_numbers, batch, scored(batch, embeddings({})), stats)
    assert torch.equal(inputs.x_BI, stats.standardise(batch.numbers_BK))
    assert inputs.selection == [] and inputs.lists == {} and only_numbers.layout.input_dim == 6
    batch.numbers_BK = torch.empty(20, 0)
    blocks = scored(batch, embeddings({"user": "user"}))
    only_ids = made(Features({"user": IdFeature(4)}, {}, []), batch, blocks, NumberStats(0))
    torch.testing.assert_close(only_ids.x_BI, looped(blocks, "user"))


@pytest.mark.parametrize("num_rows", [0, 1])
def test_no_row_or_one_row_has_inputs_of_as_many_rows(num_rows: int) -> None:
    batch, parts = logged(num_rows), features(0.3, 0.3, 0.3, 0.3)
    store = embeddings()
    for insert, draws in ((True, Draws(batch.row_B, 0, 1)), (False, None)):
        inputs = made(parts, batch, store.pull(batch.ids, insert=insert), stats_of(logged(5)), draws)
        rows_BLD, there_BL = inputs.lists["trail"]
        assert inputs.x_BI.shape == (num_rows, 18) and inputs.selection[0][0].shape == (num_rows, 8)
        assert rows_BLD.shape == (num_rows, LONGEST, 4) and there_BL.shape == (num_rows, LONGEST)


# Statistics of ids


def test_statistics_of_ids_are_logs_of_counts_and_rates_smoothed_by_the_overall_rate() -> None:
    """Closed forms, at the edges: an id that nobody saw, one that is always clicked, and a table without a click."""
    found = IdStatistics("item", "item", [(0,), (1, 0)], smoothing=20.0)
    impressions_and_clicks = torch.tensor([[0.0, 0.0], [100.0, 100.0], [3.0, 1.0]])
    numbers = found.numbers(impressions_and_clicks, torch.tensor([1000.0, 100.0]))
    expected = [[0, 0.1], [np.log(101), 102 / 120], [np.log(4), 3 / 23]]  # 20 impressions at the overall rate of 0.1
    torch.testing.assert_close(numbers, torch.tensor(expected, dtype=torch.float32))
    nothing_yet = found.numbers(impressions_and_clicks, torch.zeros(2))
    torch.testing.assert_close(nothing_yet[:, 1], torch.tensor([0, 100 / 120, 1 / 23]))


def test_numbers_are_the_logs_then_the_statistics_and_only_the_logs_have_null_flags() -> None:
    batch = logged(40)
    shard = Shard(TABLES, RowwiseAdagrad(), labels=["click"], tallies={"user": [Tally("click", {"click": 1.0})]})
    store = ShardedEmbeddings(shard, {"user": "user"}, own=["user"])
    store.pull(batch.ids, insert=True, labels_BL=torch.ones(40, 1))
    blocks, stats = store.pull(batch.ids, insert=False), NumberStats(4)
    statistics = IdStatistics("user", "user", [(0,)], 1.0)
    parts = Features({"user": IdFeature(4)}, {}, NUMBERS, {"seen": statistics})
    numbers_BK = parts.numbers(batch, blocks, {"user": np.ones(1, np.float32)})
    users = [ids.tolist() for ids in batch.ids["user"].values_N.split(batch.ids["user"].lengths_B.tolist())]
    counted = torch.tensor([users.count(user) if user else 0 for user in users])  # each of its rows was clicked
    torch.testing.assert_close(numbers_BK[:, :3], batch.numbers_BK, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(numbers_BK[:, 3], torch.log1p(counted))
    x_BI = parts.inputs(blocks, stats.standardise(numbers_BK), batch, None).x_BI
    assert x_BI.shape[1] == parts.layout.input_dim == 4 + 4 + 3
    assert torch.equal(x_BI[:, 4:], stats.standardise(numbers_BK)[:, :7])  # four numbers, the flags of three
