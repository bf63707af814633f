"""Proof tests of trainer/features.py: a plain loop over rows and ids, and what is dropped when."""

from collections.abc import Mapping, Sequence

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
from trainer.features import Features, IdFeature, IdStatistics
from trainer.numbers import NumberStats

TABLES = {"user": TableConfig(4, 64, 1.0), "item": TableConfig(4, 64, 1.0), "position": TableConfig(8, 16, 1.0)}
READS = {"user": "user", "history": "item", "sum_history": "item", "position": "position"}


def embeddings(reads: Mapping[str, str] = READS) -> ShardedEmbeddings:
    return ShardedEmbeddings(Shard(TABLES, RowwiseAdagrad()), reads)


def logged(num_rows: int, seed: int = 0, first_row: int = 0) -> Batch:
    """Random lists of 0 to 4 ids a feature, three numbers, of which one in five is null."""
    rng = np.random.default_rng(seed)
    ids = {}
    for name in READS:
        lengths = torch.from_numpy(rng.integers(0, 5 if "history" in name else 2, num_rows))
        ids[name] = Jagged.from_lengths(torch.from_numpy(rng.integers(0, 20, int(lengths.sum()))), lengths)
    numbers = rng.normal(3, 2, (num_rows, 3)).astype(np.float32)
    numbers[rng.random((num_rows, 3)) < 0.2] = np.nan
    row_B = torch.arange(first_row, first_row + num_rows)
    return Batch(ids, torch.from_numpy(numbers), torch.zeros(num_rows, 1), torch.ones(num_rows), row_B)


def features(user_dropout: float = 0.0, history_dropout: float = 0.0, position_dropout: float = 0.1) -> Features:
    main = {
        "user": IdFeature(4, dropout=user_dropout),
        "history": IdFeature(4, dropout=history_dropout),
        "sum_history": IdFeature(4, mean=False),
    }
    return Features(main, {"position": IdFeature(8, dropout=position_dropout)}, 3)


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


def main_input(
    inputs: Features, batch: Batch, blocks: Sequence[Block], stats: NumberStats, draws: Draws | None = None
) -> Tensor:
    """The body's input as a step makes it."""
    numbers_B2K = stats.standardise(inputs.numbers(batch, blocks, {}))
    return inputs.main(inputs.vectors(blocks, batch, draws), numbers_B2K)


def selection(
    inputs: Features, batch: Batch, blocks: Sequence[Block], draws: Draws | None
) -> list[tuple[Tensor, Tensor]]:
    return inputs.selection(inputs.vectors(blocks, batch, draws), batch, draws)


def stats_of(batch: Batch) -> NumberStats:
    stats = NumberStats(3)
    stats.update(stats.measure(batch.numbers_BK))
    return stats


def test_the_main_input_is_pooled_ids_then_numbers_then_null_flags() -> None:
    batch, inputs = logged(50), features()
    blocks, stats = embeddings().pull(batch.ids, insert=True), stats_of(batch)
    x_BI = main_input(inputs, batch, blocks, stats)
    parts = [looped(blocks, "user"), looped(blocks, "history"), looped(blocks, "sum_history", mean=False)]
    # plain loop; float32 sums of at most four vectors
    torch.testing.assert_close(x_BI[:, :12], torch.cat(parts, dim=1))
    assert torch.equal(x_BI[:, 12:], stats.standardise(batch.numbers_BK))
    assert x_BI.shape[1] == inputs.input_dim == 3 * 4 + 2 * 3 and x_BI.dtype == torch.float32


def test_the_gradient_of_a_pooled_list_reaches_each_of_its_ids() -> None:
    batch = logged(50)
    blocks = embeddings().pull(batch.ids, insert=True)
    generator = torch.Generator().manual_seed(0)
    upstream_BI = torch.randn(50, 18, generator=generator)
    main_input(features(), batch, blocks, stats_of(batch)).backward(upstream_BI)
    rows_UD = block_of(blocks, "user").rows_UD  # users and items have one width, so their rows come together
    gradient_UD, rows_UD.grad = rows_UD.grad, None
    parts = [looped(blocks, "user"), looped(blocks, "history"), looped(blocks, "sum_history", mean=False)]
    torch.cat(parts, dim=1).backward(upstream_BI[:, :12])
    # autograd through the plain loop; float32 sums in another order
    torch.testing.assert_close(gradient_UD, rows_UD.grad, rtol=1e-5, atol=1e-5)


def test_a_dropped_id_feature_reads_as_unknown_and_nothing_else_changes() -> None:
    batch, inputs = logged(4_000), features(user_dropout=0.3)
    blocks, stats, draws = embeddings().pull(batch.ids, insert=True), stats_of(batch), Draws(batch.row_B, 0, 1)
    scored_BI, trained_BI = (main_input(inputs, batch, blocks, stats, d) for d in (None, draws))
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
    batch, inputs = logged(300), features(0.3, 0.3, 0.3)
    store, stats = embeddings(), stats_of(batch)
    store.pull(batch.ids, insert=True)

    def seen(part: Batch) -> Tensor:
        blocks, draws = store.pull(part.ids, insert=False), Draws(part.row_B, 0, 1)
        (vector_BD, present_B), *_ = selection(inputs, part, blocks, draws)
        return torch.cat([main_input(inputs, part, blocks, stats, draws), vector_BD, present_B.unsqueeze(1)], dim=1)

    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    parts = torch.cat([seen(batch.select(rows)) for rows in order.split([1, 0, 99, 200])])
    torch.testing.assert_close(parts, seen(batch)[order])  # oracle: one batch; float32 sums of four vectors


def test_position_is_dropped_on_one_training_row_in_ten_and_absent_from_scoring() -> None:
    num_rows = 60_000
    one_each = Jagged.from_lengths(torch.arange(num_rows) % 10, torch.ones(num_rows, dtype=torch.int64))
    batch = Batch(
        {"position": one_each},
        torch.empty(num_rows, 0),
        torch.zeros(num_rows, 1),
        torch.ones(num_rows),
        torch.arange(num_rows),
    )
    blocks = embeddings({"position": "position"}).pull(batch.ids, insert=True)
    inputs = features(position_dropout=0.1)
    for day in range(3):
        ((_, present_B),) = selection(inputs, batch, blocks, Draws(batch.row_B, 0, day))
        assert 1 - present_B.mean().item() == pytest.approx(0.1, abs=0.005)  # binomial: four standard deviations
    ((vector_BD, present_B),) = selection(inputs, batch, blocks, None)
    assert (present_B == 0).all() and (vector_BD == 0).all()  # at serving nobody knows the position


def test_a_selection_feature_is_its_vector_where_present_and_zeros_where_not() -> None:
    batch, inputs = logged(500), features(position_dropout=0.4)
    blocks, draws = embeddings().pull(batch.ids, insert=True), Draws(batch.row_B, 0, 1)
    ((vector_BD, present_B),) = selection(inputs, batch, blocks, draws)
    expected_B = (batch.ids["position"].lengths_B > 0) * draws.keep("position", 0.4)
    assert torch.equal(present_B, expected_B)  # a null position is missing too
    torch.testing.assert_close(vector_BD, looped(blocks, "position") * present_B.unsqueeze(1))  # plain loop


def test_the_main_input_holds_no_selection_feature() -> None:
    batch, store = logged(100), embeddings()
    stats, position = stats_of(batch), batch.ids["position"]
    moved: Mapping[str, Jagged] = batch.ids | {"position": Jagged(position.values_N + 5, position.offsets)}
    inputs: Sequence[Tensor] = [
        main_input(features(), batch, store.pull(ids, insert=True), stats) for ids in (batch.ids, moved)
    ]
    assert torch.equal(*inputs)  # the same bits, wherever the row was shown


def test_without_ids_or_without_numbers_the_input_is_the_other() -> None:
    batch = logged(20)
    stats, only_numbers = stats_of(batch), Features({}, {}, 3)
    blocks = embeddings({}).pull(batch.ids, insert=True)
    assert torch.equal(main_input(only_numbers, batch, blocks, stats), stats.standardise(batch.numbers_BK))
    assert selection(only_numbers, batch, blocks, None) == [] and only_numbers.input_dim == 6
    batch.numbers_BK = torch.empty(20, 0)
    only_ids = Features({"user": IdFeature(4)}, {}, 0)
    blocks = embeddings({"user": "user"}).pull(batch.ids, insert=True)
    torch.testing.assert_close(main_input(only_ids, batch, blocks, NumberStats(0)), looped(blocks, "user"))


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
    statistics = [IdStatistics("user", "user", [(0,)], 1.0)]
    inputs = Features({"user": IdFeature(4)}, {}, 3, statistics)
    numbers_BK = inputs.numbers(batch, blocks, {"user": np.ones(1, np.float32)})
    users = [ids.tolist() for ids in batch.ids["user"].values_N.split(batch.ids["user"].lengths_B.tolist())]
    counted = torch.tensor([users.count(user) if user else 0 for user in users])  # each of its rows was clicked
    torch.testing.assert_close(numbers_BK[:, :3], batch.numbers_BK, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(numbers_BK[:, 3], torch.log1p(counted))
    x_BI = inputs.main(inputs.vectors(blocks, batch, None), stats.standardise(numbers_BK))
    assert x_BI.shape[1] == inputs.input_dim == 4 + 4 + 3
    assert torch.equal(x_BI[:, 4:], stats.standardise(numbers_BK)[:, :7])  # four numbers, the flags of three
