"""Days of impressions with a known law, for demos and tests.

In: numbers of days, users, items and rows, and a seed. Out: OUT/logs/day=YYYY-MM-DD/part-N.parquet, what a ranking
system would have logged, and OUT/truth/day=YYYY-MM-DD/part-N.parquet, the probabilities that its labels were drawn from
(the same rows in the same order, joined by impression_id). Entities are pure functions of (seed, entity, day) and a day
has its own generator, so day k is the same for any number of days; only histories look back, at clicks already drawn.

The law: an entity has for each task a main effect and a taste of DIM numbers, part its own, part that of its group
(users: a hidden segment, items: their category), all turning slowly with the days. With u, v and the constants in LAW:
    appeal = user u_0 + item v_0 + taste <u, v> / sqrt(DIM) + share (appeal of the parent task)
    logit  = intercept + appeal + price log_price + length log_length + fresh exp(-age / 48 h) + device, and, for a
             click, position
"""

import datetime
import os
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.errors import UserError
from trainer.metrics import auc

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]

NUM_SHOWN = 8  # items of a request
RANDOM_SHARE = 0.1  # requests shown in random order
RANKER_NOISE = 1.5  # the ranker that orders the others sees the logit of a click through this much noise
MAX_HISTORY = 20
USER_LIFE_DAYS, ITEM_LIFE_DAYS = (20, 60), (4, 12)  # shortest and longest
NUM_SEGMENTS, NUM_CATEGORIES = 6, 16
DEVICES, DEVICE_SHARES = ("phone", "desktop", "tablet"), (0.6, 0.3, 0.1)
HOME_DEVICE_SHARE = 0.8  # requests made on the user's usual device
NULL_PRICE_SHARE = 0.02

DIM = 8
DRIFT_DAYS = 90  # one turn of every taste: after a week it still correlates 0.88 with itself
GROUP_SHARE = 0.85  # part of the variance common to a segment or category: all that is known of an id new today
DEVICE_EFFECT = np.array([0.0, -0.25, 0.25])
BIAS_AT_END = np.array([-2.4, -1.7, -2.0])  # of the last position, by device; grows with the log of the position
POSITION_BIAS = np.outer(BIAS_AT_END, np.log(np.arange(1, NUM_SHOWN + 1)) / np.log(NUM_SHOWN))
WATCH_SIGMA = 0.6  # of log seconds

FILES_A_DAY = 2
ROW_GROUP_ROWS = 8192  # at least, and fewer than twice as many, where the file has them
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Response:
    """The constants of one task's law; `parent` is the task whose appeal it shares."""

    intercept: float
    user: float
    item: float
    taste: float
    price: float = 0.0
    fresh: float = 0.0
    length: float = 0.0
    share: float = 0.0
    parent: str = ""


LAW = {
    "click": Response(intercept=-0.9, user=0.5, item=0.6, taste=0.7, price=-0.3, fresh=0.5),
    "cart": Response(intercept=-1.6, user=0.3, item=0.6, taste=0.3, price=-0.5, share=0.3, parent="click"),
    "buy": Response(intercept=-1.2, user=0.4, item=0.5, taste=0.3, price=-0.5, share=0.3, parent="cart"),
    # Not a logit but the mean of log seconds.
    "watch": Response(intercept=3.3, user=0.2, item=0.4, taste=0.2, length=0.5, share=0.2, parent="click"),
}


@dataclass(frozen=True)
class Population:
    """The users or the items alive on one day; every array has one entry an entity."""

    index: Ints
    ids: Ints
    born: Ints  # day, negative for those older than the simulation
    group: Ints
    traffic: Floats  # share of the draws, sums to 1
    latent: Floats  # entity x task x (main effect, taste)


@dataclass(frozen=True)
class World:
    """Everything that one day's law depends on; no randomness is left but that of the requests and labels."""

    day: int
    date: datetime.date
    users: Population
    items: Population
    device: Ints  # of each user, used in most of the requests
    log_price: Floats  # of each item, standard scale
    log_length: Floats  # likewise
    published_h: Floats  # of each item, hours after midnight of the day: zero or less


@dataclass(frozen=True)
class Impressions:
    """Rows in the order of time; users, items and devices by their place in the world, positions from 0."""

    request: Ints
    ts_ms: Ints  # after midnight
    user: Ints
    item: Ints
    device: Ints
    position: Ints
    randomized: Bools


@dataclass(frozen=True)
class Clicks:
    """Clicked items in the order of time, and what came of each: 0 nothing, 1 a cart, 2 a purchase; request is -1 for
    those of days before.
    """

    user: Ints
    item_id: Ints
    outcome: Ints
    request: Ints


def simulate(
    out: str, *, days: int, start: datetime.date, users: int, items: int, rows_per_day: int, seed: int
) -> None:
    """Write `days` days of logs and their truth under `out`, replacing those days where they are there.

    A day's folders appear whole or not at all, its logs only once its truth is there. Other days are left alone.
    Logs: history holds the items that the user clicked in earlier requests, the newest last, history_outcome what came
    of each (0 nothing, 1 a cart, 2 a purchase); cart is null where there is no click, buy where there is no cart,
    watch_s where there is no click. Truth: p_click is without position bias, as at the top; p_click_shown is with it;
    p_cart is given a click, p_buy given a cart; watch_log_mean is the mean of log seconds; randomized marks requests
    shown in random order. Raises UserError where a size is too small.
    """
    _check("days", days, at_least=1)
    _check("users", users, at_least=1)
    _check("items", items, at_least=2 * NUM_SHOWN)
    _check("rows_per_day", rows_per_day, at_least=FILES_A_DAY * NUM_SHOWN)
    _check("seed", seed, at_least=0)
    past = Clicks(*np.zeros((4, 0), np.int64))
    for day in range(days):
        rng = np.random.default_rng([seed, day])
        world = _world(seed, day, start + datetime.timedelta(days=day), users, items)
        shown = _impressions(rng, world, rows_per_day)
        truth = _truth(world, shown)
        labels = _labels(rng, truth)
        history, past = _histories(past, world, shown, labels)
        logs = _logs(rng, world, shown, {**history, **labels})
        truth = {"impression_id": logs["impression_id"], **truth, "randomized": shown.randomized}
        _write_day(out, world.date, {"truth": pa.table(truth), "logs": logs})


def law_auc(out: str, day: datetime.date) -> dict[str, float]:
    """Return the AUC that the law itself reaches on a day's labels, by `task@space`.

    Clicks are scored without position bias, which is what a ranker wants to know; a model that mistakes the bias for
    taste can score a little more, as phones show more of it. NaN where a label has one class only.
    Raises UserError where the day is not there.
    """
    logs = _read_day(out, "logs", day, ["impression_id", "click", "cart", "buy"])
    truth = _read_day(out, "truth", day, ["impression_id", "p_click", "p_cart", "p_buy"])
    assert np.array_equal(logs["impression_id"], truth["impression_id"]), "logs and truth of a day hold the same rows"
    click, cart, buy = (np.nan_to_num(logs[task]) for task in ("click", "cart", "buy"))
    clicked, carted = click == 1, cart == 1
    p_cart = truth["p_click"] * truth["p_cart"]
    return {
        "click@all": auc(truth["p_click"], click),
        "cart@click": auc(truth["p_cart"][clicked], cart[clicked]),
        "cart@all": auc(p_cart, cart),
        "buy@cart": auc(truth["p_buy"][carted], buy[carted]),
        "buy@all": auc(p_cart * truth["p_buy"], buy),
    }


def _check(name: str, value: int, at_least: int) -> None:
    if value < at_least:
        raise UserError(f"cannot simulate with {name}={value}", expected=f"{name} of at least {at_least}")


# Entities: pure functions of (seed, entity, day), by hashing instead of drawing, so that no order of events can matter.


def _mix(words: Words) -> Words:
    """Finalizer of splitmix64, a bijection. Source: Steele, Lea and Flood 2014,
    https://doi.org/10.1145/2660193.2660195.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _hash(seed: int, stream: str, index: Ints) -> Words:
    """Return 64 bits for each index, another bijection for each seed and stream."""
    key = np.random.SeedSequence([seed, *stream.encode()]).generate_state(1, np.uint64)
    return _mix(_mix(index.astype(np.uint64)) ^ key)


def _uniform(seed: int, stream: str, index: Ints, width: int = 1) -> Floats:
    """Return numbers in (0, 1), index x width."""
    steps = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = _mix(_hash(seed, stream, index)[:, None] + steps)
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _wave(seed: int, stream: str, index: Ints, day: int, width: int) -> Floats:
    """Return standard normal numbers, index x width; over t days they correlate by cos(2 pi t / DRIFT_DAYS)."""
    radius, angle = np.split(_uniform(seed, stream, index, 2 * width), 2, axis=1)
    waves: Floats = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * (angle + day / DRIFT_DAYS))  # Box-Muller
    return waves


def _population(seed: int, kind: str, size: int, day: int, life_days: tuple[int, int], groups: int) -> Population:
    """Return the entities of a day, one in each of `size` slots: when its life is over, another takes its slot."""
    slot = np.arange(size)
    shortest, longest = life_days
    life = shortest + (_uniform(seed, f"{kind} life", slot)[:, 0] * (longest - shortest + 1)).astype(np.int64)
    phase = (_uniform(seed, f"{kind} phase", slot)[:, 0] * life).astype(np.int64)
    generation = (day + phase) // life
    index = generation * size + slot
    group = (_uniform(seed, f"{kind} group", index)[:, 0] * groups).astype(np.int64)
    shape = (len(LAW), 1 + DIM)
    common = _wave(seed, f"{kind} group latent", np.arange(groups), day, shape[0] * shape[1])[group]
    own = _wave(seed, f"{kind} latent", index, day, shape[0] * shape[1])
    rank = _uniform(seed, f"{kind} popularity", index)[:, 0]
    popularity = (rank + 0.005) ** -0.9  # Zipf's law, capped at sixty times the median
    return Population(
        index=index,
        ids=_hash(seed, f"{kind} id", index).view(np.int64),
        born=generation * life - phase,
        group=group,
        traffic=popularity / popularity.sum(),
        latent=(np.sqrt(GROUP_SHARE) * common + np.sqrt(1 - GROUP_SHARE) * own).reshape(size, *shape),
    )


def _world(seed: int, day: int, date: datetime.date, num_users: int, num_items: int) -> World:
    users = _population(seed, "user", num_users, day, USER_LIFE_DAYS, NUM_SEGMENTS)
    items = _population(seed, "item", num_items, day, ITEM_LIFE_DAYS, NUM_CATEGORIES)
    lead_h = 24 * _uniform(seed, "item lead", items.index)[:, 0]  # published in the day before it is first shown
    price_of_category = _wave(seed, "category price", np.arange(NUM_CATEGORIES), 0, 1)[items.group, 0]
    price = _wave(seed, "item price", items.index, 0, 1)[:, 0]
    return World(
        day=day,
        date=date,
        users=users,
        items=items,
        device=np.searchsorted(np.cumsum(DEVICE_SHARES)[:-1], _uniform(seed, "user device", users.index)[:, 0]),
        log_price=np.sqrt(0.5) * (price_of_category + price),
        log_length=_wave(seed, "item length", items.index, 0, 1)[:, 0],
        published_h=24.0 * (items.born - day) - lead_h,
    )


# One day: requests, what they show, what comes of it.


def _impressions(rng: np.random.Generator, world: World, rows: int) -> Impressions:
    """Draw the requests of a day and rank their candidates; the last request ends where the rows do."""
    requests = -(-rows // NUM_SHOWN)
    user = rng.choice(len(world.users.ids), requests, p=world.users.traffic)
    other = rng.choice(len(DEVICES), requests, p=DEVICE_SHARES)
    device = np.where(rng.random(requests) < HOME_DEVICE_SHARE, world.device[user], other)
    columns = (np.arange(requests), np.sort(rng.integers(0, DAY_MS, requests)), user, device)
    request, ts_ms, user, device = (np.repeat(column, NUM_SHOWN) for column in columns)
    position = np.tile(np.arange(NUM_SHOWN), requests)
    randomized = np.repeat(rng.random(requests) < RANDOM_SHARE, NUM_SHOWN)
    candidates = _candidates(rng, world.items.traffic, requests)
    drawn = Impressions(request, ts_ms, user, candidates.ravel(), device, position, randomized)
    seen = np.where(randomized, 0.0, _logits(world, drawn)["click"]) + RANKER_NOISE * rng.standard_normal(position.size)
    order = np.argsort(-seen.reshape(candidates.shape), axis=1)
    item = np.take_along_axis(candidates, order, axis=1).ravel()
    return Impressions(
        request[:rows], ts_ms[:rows], user[:rows], item[:rows], device[:rows], position[:rows], randomized[:rows]
    )


def _candidates(rng: np.random.Generator, traffic: Floats, requests: int) -> Ints:
    """Draw distinct items by popularity, request x NUM_SHOWN."""
    items = rng.choice(traffic.size, (requests, NUM_SHOWN), p=traffic)
    while True:
        again = np.tril(items[:, :, None] == items[:, None, :], -1).any(axis=2)  # equal to one before it
        if not again.any():
            return items
        items[again] = rng.choice(traffic.size, int(again.sum()), p=traffic)


def _age_h(world: World, shown: Impressions) -> Floats:
    return shown.ts_ms / 3_600_000 - world.published_h[shown.item]


def _logits(world: World, shown: Impressions) -> dict[str, Floats]:
    """Return the logit of each task without position bias; of watch, the mean of its log seconds."""
    log_price, fresh = world.log_price[shown.item], np.exp(-_age_h(world, shown) / 48)
    log_length = world.log_length[shown.item]
    appeals: dict[str, Floats] = {}
    logits: dict[str, Floats] = {}
    for number, (task, law) in enumerate(LAW.items()):
        u, v = world.users.latent[shown.user, number], world.items.latent[shown.item, number]
        taste = np.einsum("bd,bd->b", u[:, 1:], v[:, 1:]) / np.sqrt(DIM)
        shared = law.share * appeals[law.parent] if law.parent else 0.0
        appeals[task] = law.user * u[:, 0] + law.item * v[:, 0] + law.taste * taste + shared
        logits[task] = law.intercept + appeals[task] + law.price * log_price + law.fresh * fresh
        logits[task] += law.length * log_length
    logits["click"] += DEVICE_EFFECT[shown.device]
    return logits


def _sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))


def _truth(world: World, shown: Impressions) -> dict[str, Any]:
    """Return the probabilities that the labels are drawn from."""
    logits = _logits(world, shown)
    return {
        "p_click": _sigmoid(logits["click"]),
        "p_click_shown": _sigmoid(logits["click"] + POSITION_BIAS[shown.device, shown.position]),
        "p_cart": _sigmoid(logits["cart"]),
        "p_buy": _sigmoid(logits["buy"]),
        "watch_log_mean": logits["watch"],
    }


def _labels(rng: np.random.Generator, truth: dict[str, Any]) -> dict[str, Any]:
    """Draw the label columns, null where the label before them is not 1."""
    rows = truth["p_click"].size
    click = rng.random(rows) < truth["p_click_shown"]
    cart = click & (rng.random(rows) < truth["p_cart"])
    buy = cart & (rng.random(rows) < truth["p_buy"])
    watch_s = np.exp(truth["watch_log_mean"] + WATCH_SIGMA * rng.standard_normal(rows))
    return {
        "click": click.astype(np.int8),
        "cart": pa.array(cart.astype(np.int8), mask=~click),
        "buy": pa.array(buy.astype(np.int8), mask=~cart),
        "watch_s": pa.array(watch_s, pa.float32(), mask=~click),
    }


def _histories(
    past: Clicks, world: World, shown: Impressions, labels: dict[str, Any]
) -> tuple[dict[str, pa.ListArray], Clicks]:
    """Return the last items clicked by each row's user in earlier requests, newest last, with what came of them, and
    the next day's past.
    """
    click = labels["click"] == 1
    outcome = sum(np.nan_to_num(labels[task].to_numpy(zero_copy_only=False)) for task in ("cart", "buy"))
    user = np.concatenate([past.user, world.users.index[shown.user[click]]])
    item_id = np.concatenate([past.item_id, world.items.ids[shown.item[click]]])
    outcome = np.concatenate([past.outcome, outcome[click].astype(np.int64)])
    request = np.concatenate([past.request, shown.request[click]])
    by_user = np.argsort(user, kind="stable")
    user, item_id, outcome, request = user[by_user], item_id[by_user], outcome[by_user], request[by_user]

    requests = shown.request[-1] + 1
    key = user * (requests + 1) + request + 1  # ascending: user first, then time
    first = world.users.index[shown.user] * (requests + 1)
    end = np.searchsorted(key, first + shown.request + 1)  # before the present request
    begin = np.maximum(np.searchsorted(key, first), end - MAX_HISTORY)
    offsets = np.concatenate([[0], np.cumsum(end - begin)])
    taken = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], end - begin)
    columns = {"history": item_id, "history_outcome": outcome}
    histories = {
        name: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values[taken]) for name, values in columns.items()
    }
    keep = np.searchsorted(user, user, side="right") - np.arange(user.size) <= MAX_HISTORY
    return histories, Clicks(user[keep], item_id[keep], outcome[keep], np.full(int(keep.sum()), -1))


# Files.


def _logs(rng: np.random.Generator, world: World, shown: Impressions, drawn: dict[str, Any]) -> pa.Table:
    """Return a day as it was logged: `drawn` holds the history and the labels."""
    rows = shown.request.size
    midnight = datetime.datetime.combine(world.date, datetime.time(), datetime.UTC)
    categories = pa.array([f"cat-{number:02d}" for number in range(NUM_CATEGORIES)])
    price = np.exp(3 + 0.8 * world.log_price[shown.item])
    duration_s = np.exp(4 + 0.8 * world.log_length[shown.item])
    columns = {
        "impression_id": world.day * rows + np.arange(rows),
        "request_id": world.day * (shown.request[-1] + 1) + shown.request,
        "ts_ms": int(midnight.timestamp() * 1000) + shown.ts_ms,
        "user_id": world.users.ids[shown.user],
        "item_id": world.items.ids[shown.item],
        "category": categories.take(world.items.group[shown.item]),
        "device": pa.array(DEVICES).take(shown.device),
        "position": pa.array(shown.position + 1, pa.int8()),
        "price": pa.array(price, pa.float32(), mask=rng.random(rows) < NULL_PRICE_SHARE),
        "item_age_h": pa.array(_age_h(world, shown), pa.float32()),
        "duration_s": pa.array(duration_s, pa.float32()),
        "weight": np.ones(rows, np.float32),
    }
    return pa.table({**columns, **drawn})


def _write_day(out: str, date: datetime.date, trees: dict[str, pa.Table]) -> None:
    """Replace a day in every tree: a kill at any moment leaves it whole or absent, and absent in later trees too."""
    aside = os.path.join(out, ".writing")
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed
    for tree, table in trees.items():
        _write_parts(os.path.join(aside, tree), table)
    for tree in reversed(trees):
        if os.path.exists(_folder(out, tree, date)):
            os.rename(_folder(out, tree, date), os.path.join(aside, f"old-{tree}"))
    for tree in trees:
        os.makedirs(os.path.join(out, tree), exist_ok=True)
        os.rename(os.path.join(aside, tree), _folder(out, tree, date))
    shutil.rmtree(aside)


def _write_parts(folder: str, table: pa.Table) -> None:
    os.makedirs(folder)
    rows = -(-table.num_rows // (FILES_A_DAY * NUM_SHOWN)) * NUM_SHOWN  # a request stays in one file
    for part in range(FILES_A_DAY):
        rows_of_part = table.slice(part * rows, rows)
        groups = max(1, rows_of_part.num_rows // ROW_GROUP_ROWS)
        size = -(-rows_of_part.num_rows // (groups * NUM_SHOWN)) * NUM_SHOWN  # and in one row group
        pq.write_table(rows_of_part, os.path.join(folder, f"part-{part}.parquet"), row_group_size=size)


def _folder(out: str, tree: str, date: datetime.date) -> str:
    return os.path.join(out, tree, f"day={date.isoformat()}")


def _read_day(out: str, tree: str, date: datetime.date, columns: list[str]) -> dict[str, npt.NDArray[Any]]:
    folder = _folder(out, tree, date)
    if not os.path.isdir(folder):
        raise UserError(
            "no simulated day here", where=folder, do="write it with `daybreak simulate` or ask for another day"
        )
    table = pq.read_table(folder, columns=columns, partitioning=None)
    return {column: table[column].to_numpy() for column in columns}
