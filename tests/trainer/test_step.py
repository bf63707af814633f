"""Proof tests of trainer/step.py: one step by hand, uneven workers, scoring without a trace, position bias."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import many
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from embeddings.buckets import hash64
from embeddings.exchange import Exchange, LocalExchange
from embeddings.jagged import Jagged
from embeddings.table import TableConfig
from trainer.balance import BALANCERS
from trainer.config import (
    Config,
    DataConfig,
    DenseConfig,
    FeatureConfig,
    ModelConfig,
    PositionConfig,
    RowsConfig,
    TaskConfig,
    TrainConfig,
)
from trainer.data import Batch
from trainer.features import Inputs
from trainer.learner import Learner, build
from trainer.step import score_step, train_step

DAY = 738_000
SOON: dict[str, dict[str, Any]] = {"dwa": {"window": 1}, "gradnorm": {"first": 1}}  # settings under which they weigh
MMOE = {"kind": "mmoe", "num_experts": 3, "expert_layers": [16, 8], "gate_dropout": 0.2}
BOTTOM = {"kind": "shared_bottom", "layers": [16, 8]}
TASKS = {
    "click": TaskConfig(),
    "cart": TaskConfig(given="click"),
    "watch": TaskConfig(loss="mse", where="click", transform="log1p"),
    "like": TaskConfig(where="click"),
}
FEATURES = {
    "user": FeatureConfig("id", table="user", dropout=0.2),
    "item": FeatureConfig("id", table="item"),
    "history": FeatureConfig("ids", table="item"),
    "position": FeatureConfig("id", table="position"),
    "price": FeatureConfig("number"),
    "age": FeatureConfig("number"),
}
TABLES = {name: TableConfig(dim, 256, 0.5) for name, dim in {"user": 8, "item": 8, "position": 4}.items()}


def weighed(**weights: float) -> dict[str, Any]:
    return {"kind": "fixed", "weights": weights}


def config(body: dict[str, Any], precision: Any = "fp32") -> Config:
    """Four tasks of every kind, lists, numbers, a position tower; every kind of dropout that the body knows."""
    position = PositionConfig(("position",), ("click",), dropout=0.3)
    model = ModelConfig(body, (8,), position=position, balance=weighed(watch=0.1, like=2.0))
    return Config("step", DataConfig("-"), FEATURES, TABLES, TASKS, model, TrainConfig(precision=precision, seed=4))


def balanced(settings: Config, balance: dict[str, Any]) -> Config:
    return replace(settings, model=replace(settings.model, balance=balance))


def float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def logged(num_rows: int = 120, seed: int = 0) -> Batch:
    """Random rows; nulls among ids, numbers and labels; the first third without a click."""
    rng = np.random.default_rng(seed)
    ids = {}
    for name in ("user", "item", "history", "position"):
        sizes = rng.integers(0, 5, num_rows) if name == "history" else (rng.random(num_rows) < 0.9).astype(int)
        lengths = torch.from_numpy(sizes)
        ids[name] = Jagged.from_lengths(torch.from_numpy(rng.integers(0, 30, int(lengths.sum()))), lengths)
    numbers = rng.normal(2, 3, (num_rows, 2))
    labels = rng.integers(0, 2, (num_rows, 4)).astype(float)
    for values in (numbers, labels):
        values[rng.random(values.shape) < 0.1] = np.nan
    labels[: num_rows // 3, 0] = 0
    row_B = torch.from_numpy(rng.permutation(10_000)[:num_rows])
    return Batch(
        ids, float32(numbers), float32(labels), float32(rng.random(num_rows)).unsqueeze(1).expand(-1, 4), row_B
    )


def local(settings: Config) -> Learner:
    return build(settings, LocalExchange())


def gradients(learner: Learner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])


def parameters(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


def exported(learner: Learner) -> dict[str, dict[str, np.ndarray]]:
    """By table all that is known of its rows, sorted by key; not where they lie."""
    tables = {table: learner.embeddings.shard.export(table) for table in TABLES}
    return {table: {name: c for name, c in of.items() if name != "row"} for table, of in tables.items()}


def unknown(learner: Learner) -> int:
    """How many ids without a row were scored."""
    return int(learner.embeddings.shard.counts["unknown"].sum())


def traces(learner: Learner) -> list[Any]:
    """Everything that a day leaves behind."""
    modules = (learner.model, learner.averaged, learner.optimizer)
    counts = {name: of_tables for name, of_tables in learner.embeddings.shard.counts.items() if name != "unknown"}
    return [*(module.state_dict() for module in modules), learner.stats.state(), exported(learner), counts]


# Any number of workers


def share(batch: Batch, rank: int, num_workers: int, step: int) -> Batch:
    """Of two workers: first one without a row, then one without a click, then the other without a row."""
    first_of_second = (0, batch.num_rows // 3, batch.num_rows)[step] if num_workers == 2 else batch.num_rows
    return batch.select(torch.arange(batch.num_rows).tensor_split([first_of_second])[rank])


def steps(exchange: Exchange, settings: Sequence[Config]) -> list[dict[str, Any]]:
    """Three steps of each configuration: what every worker must agree on, and its own part of the rows."""
    found = []
    for each in settings:
        learner, losses, grads, scores = build(each, exchange), [], [], []
        for step in range(3):
            batch = share(logged(seed=step), exchange.rank, exchange.num_workers, step)
            losses.append(train_step(learner, batch, DAY)[0].tolist())
            grads.append(gradients(learner).tolist())
            scores.append(score_step(learner, batch).tolist())
        rows = {table: {name: c.tolist() for name, c in of.items()} for table, of in exported(learner).items()}
        numbers = torch.stack(list(learner.stats.state().values())).tolist()
        dense = parameters(learner).tolist()
        found.append(
            {"losses": losses, "gradients": grads, "dense": dense, "numbers": numbers, "rows": rows, "scores": scores}
        )
    return found


def assert_close(got: Any, want: Any, relative: float = 1e-6) -> None:
    """Each number within `relative` of the largest of its array: float32 sums in another order."""
    got, want = np.array(got), np.array(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=relative * np.abs(want).max())


@pytest.mark.slow
def test_two_uneven_workers_give_the_losses_gradients_rows_and_scores_of_one() -> None:
    settings = [config(MMOE), config(BOTTOM)]
    for workers, want in zip(
        zip(*many.run(2, steps, settings), strict=True), steps(LocalExchange(), settings), strict=True
    ):
        first, second = workers
        # oracle: one process on the whole batch. Adam and Adagrad divide by the gradient's size: ten times the rounding
        assert_close(first["gradients"][0], want["gradients"][0], 1e-6)
        assert first["gradients"] == second["gradients"] and first["dense"] == second["dense"]  # one model, bit for bit
        assert first["losses"] == second["losses"]  # of the whole batch, on every worker
        assert_close(first["losses"], want["losses"], 1e-5)
        assert_close(first["gradients"], want["gradients"], 1e-5)
        assert_close(first["dense"], want["dense"], 1e-5)
        assert_close(second["numbers"], want["numbers"], 1e-12)  # float64
        for table, columns in want["rows"].items():
            one, other = (worker["rows"][table] for worker in workers)  # ranges of keys: one after the other, in order
            for name, column in columns.items():
                if name in ("weight", "adagrad_sum"):
                    assert_close(one[name] + other[name], column, 1e-5)
                else:  # keys, sightings, values, days: the same numbers
                    assert one[name] + other[name] == column, name
        for one, other, alone in zip(first["scores"], second["scores"], want["scores"], strict=True):
            assert_close(one + other, alone, 1e-5)


# One step by hand


def test_a_step_is_adam_on_the_net_and_one_adagrad_step_on_each_row_seen() -> None:
    features, tables = {"item": FeatureConfig("id", table="item")}, {"item": TableConfig(4, 64, 0.5)}
    model = ModelConfig({"kind": "shared_bottom", "layers": [6]}, ())
    learner = local(Config("hand", DataConfig("-"), features, tables, {"click": TaskConfig()}, model))
    items_B, labels_B1 = torch.tensor([7, 3, 7, 9, 7]), torch.tensor([[1.0], [0.0], [0.0], [1.0], [1.0]])
    ids = {"item": Jagged(items_B, torch.arange(6))}
    learner.embeddings.pull(ids, insert=True)  # so that the rows are there to be read
    before = {name: torch.from_numpy(column) for name, column in learner.embeddings.shard.export("item").items()}
    net, twin_UD = copy.deepcopy(learner.model), before["weight"].clone().requires_grad_()
    adam = torch.optim.Adam(net.parameters(), lr=0.001)
    x_BI = twin_UD[torch.searchsorted(before["key"], hash64(items_B))]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(net(Inputs(x_BI, {}, []), None).logits_BL, labels_B1)
    loss.backward()
    adam.step()

    batch = Batch(ids, torch.empty(5, 0), labels_B1, torch.ones(5, 1), torch.arange(5))
    assert train_step(learner, batch, DAY)[0].item() == pytest.approx(loss.item(), rel=1e-6)  # torch's loss; float32
    torch.testing.assert_close(parameters(learner), torch.cat([p.detach().flatten() for p in net.parameters()]))
    after = {name: torch.from_numpy(column) for name, column in learner.embeddings.shard.export("item").items()}
    grad_UD = twin_UD.grad
    assert grad_UD is not None
    # Gupta et al. 2014: the gradients of an id that is there three times are summed first, and the row makes one step
    expected_U = grad_UD.square().mean(1)
    torch.testing.assert_close(after["adagrad_sum"], expected_U)
    step_UD = 0.05 * grad_UD / (expected_U.sqrt().unsqueeze(1) + 1e-8)
    torch.testing.assert_close(after["weight"], before["weight"] - step_UD)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("balance", BALANCERS)
def test_under_every_balancer_a_row_makes_one_step_of_the_weighed_gradient(balance: str, optimizer: Any) -> None:
    tasks = {"click": TaskConfig(), "like": TaskConfig(), "watch": TaskConfig(loss="mse")}
    model = ModelConfig({"kind": "shared_bottom", "layers": [6]}, (), balance={"kind": balance} | SOON.get(balance, {}))
    features, tables = {"item": FeatureConfig("id", table="item")}, {"item": TableConfig(4, 64, 0.5)}
    train = TrainConfig(rows=RowsConfig(optimizer, lr=0.1))
    learner = local(Config("once", DataConfig("-"), features, tables, tasks, model, train))
    rng, sum_U = np.random.default_rng(5), torch.zeros(8)
    for _ in range(4):
        items_B = torch.tensor([*range(8), *rng.integers(0, 8, 24)])
        labels_BT = float32(np.c_[rng.integers(0, 2, (32, 2)), rng.normal(3, 2, 32)])
        ids = {"item": Jagged(items_B, torch.arange(33))}
        learner.embeddings.pull(ids, insert=True)  # so that the rows are there to be read
        before = {name: torch.from_numpy(column) for name, column in learner.embeddings.shard.export("item").items()}
        twin_UD, net = before["weight"].clone().requires_grad_(), copy.deepcopy(learner.model)
        x_BI = twin_UD[torch.searchsorted(before["key"], hash64(items_B))]
        logits_BT = net(Inputs(x_BI, {}, []), None).logits_BL
        events = torch.nn.functional.binary_cross_entropy_with_logits(logits_BT, labels_BT, reduction="none")
        losses_T = torch.cat([events[:, :2], (logits_BT - labels_BT).square()[:, 2:]], dim=1).mean(0)

        _, weights_T = train_step(learner, Batch(ids, torch.empty(32, 0), labels_BT, torch.ones(32, 3), items_B), DAY)
        (weights_T @ losses_T).backward()
        after = learner.embeddings.shard.export("item")
        grad_UD = twin_UD.grad
        assert grad_UD is not None
        # oracle: autograd of the weighed sum, and the optimizer's formula once; a task's gradient that went its own way
        # to the rows would show in SGD's step, a second step in Adagrad's sum of squares
        sum_U = sum_U + grad_UD.square().mean(1)
        divisor_U1 = torch.ones(8, 1) if optimizer == "sgd" else sum_U.sqrt().unsqueeze(1) + 1e-8
        assert_close(after["weight"], (before["weight"] - 0.1 * grad_UD / divisor_U1).detach(), 1e-5)
        if optimizer == "rowwise_adagrad":
            assert_close(after["adagrad_sum"], sum_U, 1e-5)
    assert balance == "fixed" or not torch.equal(weights_T, torch.ones(3)), "it weighs"


def test_a_sample_weight_of_two_is_the_row_twice_and_of_zero_is_no_row() -> None:
    batch = logged()
    batch.numbers_BK = torch.zeros_like(batch.numbers_BK)  # running statistics count rows, not weights
    copies_B = torch.arange(120) % 3
    rows = torch.arange(120).repeat_interleave(copies_B)
    copied = batch.select(rows)
    batch.weights_BT = copies_B.float().unsqueeze(1).expand(-1, 4)
    copied.weights_BT = torch.ones(rows.numel(), 4)
    weighted, repeated = local(config(MMOE)), local(config(MMOE))
    losses = [train_step(learner, part, DAY)[0].numpy() for learner, part in ((weighted, batch), (repeated, copied))]
    # oracle: the rows copied, with their draws; float32 sums in another order
    assert_close(losses[0], losses[1])
    assert_close(gradients(weighted), gradients(repeated))
    for table, rows_of in exported(repeated).items():
        mine = exported(weighted)[table]
        seen = np.isin(mine["key"], rows_of["key"])  # a row of weight zero is pulled, and then not moved
        assert_close(mine["adagrad_sum"][seen], rows_of["adagrad_sum"])
        assert (mine["adagrad_sum"][~seen] == 0).all()


def test_a_batch_in_another_order_gives_the_same_step() -> None:
    batch, order = logged(), torch.randperm(120, generator=torch.Generator().manual_seed(0))
    straight, shuffled = local(config(MMOE)), local(config(MMOE))
    losses = [train_step(straight, batch, DAY)[0], train_step(shuffled, batch.select(order), DAY)[0]]
    # what is random belongs to the row, not to its place in the batch; float32 sums in another order
    assert_close(losses[1], losses[0])
    assert_close(gradients(shuffled), gradients(straight))


def test_chance_changes_with_the_day_and_not_with_the_call() -> None:
    found = []
    for day in (DAY, DAY, DAY + 1):
        learner = local(config(MMOE))
        train_step(learner, logged(), day)
        found.append(gradients(learner))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])  # other rows are dropped


def test_ids_positions_and_gates_are_dropped_in_training() -> None:
    full, user = config(MMOE), FeatureConfig("id", table="user")
    shallow = PositionConfig(("position",), ("click",), dropout=0)
    without = {
        "ids": replace(full, features=FEATURES | {"user": user}),
        "position": replace(full, model=replace(full.model, position=shallow)),
        "gates": replace(full, model=replace(full.model, body=MMOE | {"gate_dropout": 0.0})),
    }
    losses_T, _ = train_step(local(full), logged(), DAY)
    for what, settings in without.items():  # the same first weights: what differs is what was dropped
        assert not torch.equal(train_step(local(settings), logged(), DAY)[0], losses_T), what


@pytest.mark.parametrize("body", [MMOE, BOTTOM])
def test_a_batch_without_labels_changes_no_weight(body: dict[str, Any]) -> None:
    learner, batch = local(config(body)), logged()
    batch.labels_BT = torch.full_like(batch.labels_BT, torch.nan)
    before = parameters(learner)
    assert train_step(learner, batch, DAY)[0].tolist() == [0.0] * 4  # nothing to learn from, and no NaN
    assert torch.equal(parameters(learner), before)
    assert all((of_table["adagrad_sum"] == 0).all() for of_table in exported(learner).values())


def test_loss_weights_scale_each_tasks_gradient() -> None:
    batch, alone = logged(), []
    for weights in ([1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0], [1.0, 1.0, 0.1, 2.0]):
        learner = local(balanced(config(MMOE), weighed(**dict(zip(TASKS, weights, strict=True)))))
        train_step(learner, batch, DAY)
        alone.append(gradients(learner))
    default = local(config(MMOE))  # the last row is what the configuration says
    train_step(default, batch, DAY)
    assert torch.equal(gradients(default), alone[4])
    assert_close(alone[0] + alone[1] + 0.1 * alone[2] + 2 * alone[3], alone[4], 3e-6)  # linearity; float32


def test_bfloat16_stays_near_float32_and_keeps_losses_and_weights_in_float32() -> None:
    exact, rounded = local(config(MMOE)), local(config(MMOE, "bf16"))
    losses = [train_step(learner, logged(), DAY)[0] for learner in (exact, rounded)]
    assert losses[1].dtype == parameters(rounded).dtype == score_step(rounded, logged()).dtype == torch.float32
    # bfloat16 keeps 8 bits: 0.4 % a product, five layers deep
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert torch.cosine_similarity(gradients(rounded), gradients(exact), dim=0) > 0.999


# Scoring


@pytest.mark.parametrize("average", [0.0, 0.25, 1.0])
def test_what_scores_is_the_moving_average_of_the_weights(average: float) -> None:
    settings, rows = config(MMOE), logged(seed=9)
    learner = local(replace(settings, train=replace(settings.train, dense=DenseConfig(average=average))))
    train_step(learner, logged(), DAY)
    expected = parameters(learner)  # the first step starts the average
    for step in range(1, 5):
        train_step(learner, logged(seed=step), DAY)
        keep = min(average, (1 + step) / (10 + step))  # a young average forgets faster
        expected = keep * expected + (1 - keep) * parameters(learner)
    averaged = torch.cat([p.flatten() for p in learner.averaged.module.parameters()])
    torch.testing.assert_close(averaged, expected)  # plain loop; float32
    features, blocks = learner.features, learner.embeddings.pull(rows.ids, insert=False)
    inputs = features.inputs(blocks, learner.stats.standardise(features.numbers(rows, blocks, {})), rows, None)
    assert torch.equal(score_step(learner, rows), learner.averaged.module(inputs, None).logits_BL)


def test_scoring_leaves_no_trace() -> None:
    learner = local(config(MMOE))
    train_step(learner, logged(), DAY)
    before, known = copy.deepcopy(traces(learner)), unknown(learner)
    fresh = logged(seed=9)
    fresh.ids["user"] = Jagged(fresh.ids["user"].values_N + 1_000, fresh.ids["user"].offsets)  # ids never seen
    first, second = score_step(learner, fresh), score_step(learner, fresh)
    after = traces(learner)
    torch.testing.assert_close(after, before, rtol=0, atol=0)  # the same bits
    assert torch.equal(first, second) and not first.requires_grad
    assert unknown(learner) > known


def test_nothing_that_happens_on_a_row_changes_its_score() -> None:
    then = FeatureConfig("id_stats", table="item", of=("click", "cart/click"), until="batch")
    learner = local(replace(config(MMOE), features=FEATURES | {"then": then}))
    learner.embeddings.shard.begin_day(DAY)
    train_step(learner, logged(), DAY)
    batch = logged(seed=1)
    other = replace(batch, labels_BT=1 - batch.labels_BT, weights_BT=2 * batch.weights_BT)
    unknown = replace(batch, labels_BT=torch.full_like(batch.labels_BT, torch.nan))
    scores = [score_step(learner, each) for each in (batch, other, unknown)]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])  # the same bits: no label is read


def test_an_unknown_id_scores_as_no_id() -> None:
    learner = local(config(MMOE))
    train_step(learner, logged(), DAY)
    unknown, none = logged(seed=9), logged(seed=9)
    lengths_B = unknown.ids["item"].lengths_B
    unknown.ids["item"] = Jagged(unknown.ids["item"].values_N + 1_000, unknown.ids["item"].offsets)
    none.ids["item"] = Jagged.from_lengths(torch.empty(0, dtype=torch.int64), torch.zeros_like(lengths_B))
    assert torch.equal(score_step(learner, unknown), score_step(learner, none))  # both read zeros


def test_scores_do_not_depend_on_the_position_column() -> None:
    learner, batch = local(config(MMOE)), logged(seed=1)
    for _ in range(3):
        train_step(learner, batch, DAY)
    scores_BT, position = score_step(learner, batch), batch.ids["position"]
    for values_N in (position.values_N.flip(0), torch.zeros_like(position.values_N), position.values_N + 1_000):
        batch.ids["position"] = Jagged(values_N, position.offsets)
        assert torch.equal(score_step(learner, batch), scores_BT)  # the same bits
    batch.ids["position"] = Jagged.from_lengths(position.values_N[:0], torch.zeros(120, dtype=torch.int64))
    assert torch.equal(score_step(learner, batch), scores_BT)


def test_training_on_other_tasks_moves_neither_the_position_tower_nor_its_table() -> None:
    without = weighed(click=0, cart=0)  # the tower belongs to click
    learner, batch = local(balanced(config(MMOE), without)), logged()
    train_step(learner, batch, DAY)
    for name, parameter in learner.model.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all() == name.startswith("position."), name
    # Adagrad's sum of squared gradients: exactly 0
    assert (exported(learner)["position"]["adagrad_sum"] == 0).all()


# Statistics of ids


def counted(batches: Sequence[Batch], item: int) -> np.ndarray:
    """An item's impressions, clicks and carts in some batches, by a plain loop over their rows."""
    found = np.zeros(3)
    for batch in batches:
        ids, offsets = batch.ids["item"].values_N.tolist(), batch.ids["item"].offsets.tolist()
        for b in range(batch.num_rows):
            if item in ids[offsets[b] : offsets[b + 1]]:
                found += [1, *np.nan_to_num(batch.labels_BT[b, :2].numpy())]
    return found


@pytest.mark.parametrize("until", ["day", "batch"])
def test_statistics_of_an_id_are_what_happened_before_this_day_or_batch_and_never_in_it(until: Any) -> None:
    then = FeatureConfig(
        "id_stats", table="item", of=("impressions", "click", "cart/click"), half_life_days=2, smoothing=5, until=until
    )
    learner = local(replace(config(MMOE), features=FEATURES | {"then": then}))
    shard, yesterday, today = learner.embeddings.shard, [logged(seed=1), logged(seed=2)], [logged(seed=3)]
    for day, batches in ((DAY, yesterday), (DAY + 1, today)):
        shard.begin_day(day)
        for batch in batches:
            train_step(learner, batch, day)
    batch, left = logged(seed=4), 0.5**0.5  # of yesterday, at a half-life of two days
    numbers_BK = learner.features.numbers(batch, learner.embeddings.pull(batch.ids, insert=False), shard.overall_S)
    overall = left * sum(counted(yesterday, item) for item in range(30))
    expected = []
    for ids in batch.ids["item"].values_N.split(batch.ids["item"].lengths_B.tolist()):
        n = np.zeros(3)
        if ids.numel():
            n = left * counted(yesterday, int(ids)) + (counted(today, int(ids)) if until == "batch" else 0)
        expected.append([*np.log1p(n[:2]), (n[2] + 5 * overall[2] / overall[1]) / (n[1] + 5)])
    # plain loops in float64; tallies are kept in float32
    np.testing.assert_allclose(numbers_BK[:, 2:], np.array(expected), rtol=1e-5, atol=1e-6)


# Position bias, Zhao et al. 2019, section 4.3


def biased_clicks(num_requests: int, seed: int) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Requests of ten items, ranked by a noisy guess of the interest u(x), one request in ten shuffled.

    click ~ sigmoid(u(x) + b(position)). Returns the rows, u of each, b of each position.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_requests, 10, 4))
    interest, bias = x @ np.array([1.0, -0.7, 0.5, 0.3]) - 0.5, np.linspace(0, -2, 10)
    guess = interest + rng.normal(size=interest.shape)
    guess = np.where(rng.random((num_requests, 1)) < 0.1, rng.random(guess.shape), guess)
    position = (-guess).argsort(1).argsort(1)
    clicks = rng.random(guess.shape) < 1 / (1 + np.exp(-interest - bias[position]))
    ids = {"position": Jagged(torch.from_numpy(position.flatten()), torch.arange(position.size + 1))}
    columns = float32(x.reshape(-1, 4)), float32(clicks.reshape(-1, 1))
    return Batch(ids, *columns, torch.ones(position.size, 1), torch.arange(position.size)), interest.flatten(), bias


def trained_on_clicks(rows: Batch) -> Learner:
    """Three passes with a main net that is linear in the four numbers."""
    features = {name: FeatureConfig("number") for name in "abcd"} | {"position": FeatureConfig("id", table="position")}
    position = PositionConfig(("position",), ("click",), dropout=0.1, layers=(16,))
    model = ModelConfig({"kind": "shared_bottom", "layers": []}, (), position=position)
    tables, train = {"position": TableConfig(4, 16, 0.1)}, TrainConfig(dense=DenseConfig(lr=0.02))
    learner = local(Config("clicks", DataConfig("-"), features, tables, {"click": TaskConfig()}, model, train))
    for part in 3 * torch.arange(rows.num_rows).split(1_000):
        train_step(learner, rows.select(part), DAY)
    return learner


def test_the_position_tower_takes_the_bias_and_leaves_the_interest_to_the_main_net() -> None:
    rows, interest, bias = biased_clicks(16_000, seed=0)
    learner = trained_on_clicks(rows)
    [block] = learner.embeddings.pull({"position": Jagged(torch.arange(10), torch.arange(11))}, insert=False)
    shown = [(block.rows_UD[block.ids.values_N], torch.ones(10))]
    learnt = learner.averaged.module.get_submodule("position")(shown)[:, 0].detach().numpy()
    # the simulated law. Even the optimum (a logistic regression on one-hot positions, one in ten dropped) has slope .98
    # and inflation 1.03: where the position is dropped, interest stands in for it; a constant rate adds some hundredths
    assert np.polyfit(bias, learnt, 1)[0] == pytest.approx(1, abs=0.1)
    assert score_step(learner, rows)[:, 0].numpy().std() / interest.std() == pytest.approx(1, abs=0.1)
    x_BK, clicks_B = rows.numbers_BK.numpy(), rows.labels_BT[:, 0].numpy()
    blind_B = LogisticRegression(C=1e6).fit(x_BK, clicks_B).decision_function(x_BK)
    # what the tower prevents: interest swallows the bias of the better places
    assert blind_B.std() / interest.std() > 1.2
