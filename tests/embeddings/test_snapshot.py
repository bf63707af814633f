"""Rows to files and back: any number of shards saves, any number loads, and other programs read the files as they are.

The oracle is the shard itself: all that it knows, row by row, in bytes, at the instant of the snapshot. Row groups are
small here, so that every file has many.
"""

import datetime
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import threads
import torch

from embeddings.buckets import NUM_BUCKETS, bucket_of, buckets_of, keys_of, owner_of, unhash64
from embeddings.dedupe import Int64s
from embeddings.exchange import Exchange
from embeddings.kernels import TorchRows
from embeddings.optim import Adam, RowOptimizer, RowwiseAdagrad
from embeddings.shard import Shard
from embeddings.snapshot import Layer, Part, Snapshot, compact, load, read
from embeddings.table import Admission, TableConfig
from embeddings.tallies import SIGHTINGS, Tally

ROW_GROUP = 80
CELLS = NUM_BUCKETS * 4 * 4
TABLES = {
    "item": TableConfig(dim=8, capacity_rows=4, init_scale=0.3, ttl_days=3),
    "ad": TableConfig(
        dim=8, min_count=2, default_row="trained", budget_rows=60, init_scale=0.1, admission=Admission(forget_days=2)
    ),
    "user": TableConfig(
        dim=4, dtype="float16", init_scale=0.3, min_count=3, admission=Admission("sketch", CELLS, forget_days=2)
    ),
    "never": TableConfig(dim=4),
}
TALLIES = {"item": [Tally("clicked", {"click": 1.0}, 7.0), Tally("seen", {SIGHTINGS: 0.5}, 2.0, by_day=True)]}
EXTREMES = [0, -1, 2**63 - 1, -(2**63), 2**53 + 1, -(2**53) - 1]  # the last two: no float64 holds them
FIRST_DAY, NUM_DAYS = datetime.date(2026, 11, 1), 5
LOCAL = pyarrow.fs.LocalFileSystem()
Columns = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module", autouse=True)
def small_row_groups() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embeddings.snapshot._ROW_GROUP", ROW_GROUP)
        yield


# Shards and their days


def shards_of(num_shards: int, optimizer: RowOptimizer | None = None, **changed: Any) -> list[Shard]:
    settings: dict[str, Any] = {
        "tables": TABLES,
        "labels": ["click"],
        "tallies": TALLIES,
        "kernel": TorchRows,
    } | changed

    def make(exchange: Exchange) -> Shard:
        return Shard(optimizer=optimizer or Adam(0.05), exchange=exchange, **settings)

    shards: list[Shard] = threads.run(num_shards, make)
    return shards


def together(shards: list[Shard], act: Callable[..., Any], *args: Any) -> list[Any]:
    """What every worker does with its own shard, one after the other between two exchanges."""

    def turn(exchange: Exchange) -> Any:
        shards[exchange.rank].exchange = exchange
        return act(shards[exchange.rank], *args)

    return threads.run(len(shards), turn)


def meet(shard: Shard, table: str, ids: Sequence[int], click: int = 0) -> None:
    """A shard meets its own of the ids, and updates their rows by gradients of the ids alone."""
    keys = keys_of(np.array(ids, np.int64))
    mine = keys[owner_of(keys, shard.exchange.num_workers) == shard.exchange.rank]
    events = np.zeros((mine.size, len(shard.ledger.events)), np.int64)
    events[:, 0], events[:, 1:] = 1, click
    pool = shard.pool_of(table)
    rows, _ = shard.meet(pool, mine, np.full(mine.size, shard.number[table], np.uint8), events)
    grad = torch.from_numpy(mine % 1_000).float().unsqueeze(1) * torch.linspace(-1, 1, pool.dim)
    pool.update(rows[rows >= 0], grad[torch.from_numpy(rows >= 0)])


def live(shard: Shard, day: int, num_batches: int = 3) -> None:
    """A day: new ids, ids that come back, ids that leave, ids that wait, a default row that learns."""
    draw = random.Random(day)
    shard.begin_day(FIRST_DAY.toordinal() + day)
    for _ in range(num_batches):
        meet(shard, "item", draw.sample(range(40 * day, 40 * day + 200), 80), click=draw.randrange(3))
        meet(shard, "ad", draw.sample(range(10 * day, 10 * day + 90), 40))
        meet(shard, "user", draw.sample(range(10 * day, 10 * day + 90), 40))
        train_default(shard, day + 1.0)
    meet(shard, "item", EXTREMES)
    shard.end_day()


def train_default(shard: Shard, grad: float) -> None:
    pool = shard.pool_of("ad")
    rows = pool.default_rows(np.array([shard.number["ad"]], np.uint8))
    pool.update(rows, torch.full((1, 8), grad))
    pool.ids.count_R[rows] += 1


def lived(num_shards: int, num_days: int = NUM_DAYS) -> list[Shard]:
    shards = shards_of(num_shards)
    for day in range(num_days):
        together(shards, live, day)
    return shards


def save(shards: list[Shard], folder: Path, *, base: bool) -> Layer:
    parts = [part for shard in shards for part in Snapshot(shard, base=base).write(LOCAL, str(folder))]
    return Layer(str(folder), parts)


def loaded(layers: Sequence[Layer], num_shards: int = 1, **changed: Any) -> list[Shard]:
    shards = shards_of(num_shards, **changed)
    for shard in shards:
        load(shard, LOCAL, layers)
    together(shards, Shard.fit)
    return shards


# All that is to survive, in bytes


def ids_of(keys: Int64s) -> list[int]:
    found: list[int] = unhash64(torch.from_numpy(keys)).tolist()
    return found


def bits(columns: Columns) -> list[dict[str, bytes]]:
    """Row by row. Where a row is and the number of a period are a shard's own affair."""
    arrays = {name: np.ascontiguousarray(of) for name, of in columns.items() if name not in ("row", "seen")}
    return [{name: of[place].tobytes() for name, of in arrays.items()} for place in range(len(columns["key"]))]


def waiting_of(shard: Shard, table: str) -> dict[int, tuple[int, int]]:
    ids = shard.waiting.ids
    rows = ids.rows(shard.number[table])
    days = np.array(shard.periods.days)[ids.seen_R[rows]].tolist()
    return dict(zip(ids_of(ids.key_R[rows]), zip(ids.count_R[rows].tolist(), days, strict=True), strict=True))


def default_of(shard: Shard, table: str) -> dict[str, bytes]:
    pool = shard.pool_of(table)
    known = pool.known(pool.default_rows(np.array([shard.number[table]], np.uint8)))
    return {name: known[name].tobytes() for name in ("weight", "count", *pool.optimizer.states)}


def state_of(shards: list[Shard]) -> dict[str, Any]:
    """Of each table: rows, who waits, the sketch, the default row of every worker."""
    found = {}
    for name in shards[0].names:
        rows: dict[int, dict[str, bytes]] = {}
        waiting: dict[int, tuple[int, int]] = {}
        for shard in shards:
            columns = shard.export(name)
            mine = dict(zip(ids_of(columns["key"]), bits(columns), strict=True))
            assert not rows.keys() & mine.keys()  # one owner an id
            rows |= mine
            waiting |= waiting_of(shard, name)
        cells = b"".join(shard.sketches[name].cells.tobytes() for shard in shards if name in shard.sketches)
        (default,) = {tuple(default_of(shard, name).items()) for shard in shards}
        found[name] = (rows, waiting, cells, default)
    return found


@pytest.fixture(scope="module")
def one() -> list[Shard]:
    """One shard after its days; not to be changed."""
    return lived(1)


@pytest.fixture(scope="module")
def truth(one: list[Shard]) -> dict[str, Any]:
    return state_of(one)


@pytest.fixture(scope="module", params=[1, 2, 3])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    """The same days by so many shards, saved whole."""
    return save(lived(request.param), tmp_path_factory.mktemp("base"), base=True)


# The promises


def test_the_days_hold_what_is_hard(one: list[Shard], truth: dict[str, Any]) -> None:
    """Or the tests below would promise too little."""
    assert set(EXTREMES) <= set(truth["item"][0]) and len(truth["item"][0]) > 2 * ROW_GROUP
    assert truth["ad"][1] and any(truth["user"][2]) and not truth["never"][0]
    assert all(one[0].evicted[name] for name in ("item", "ad")) and one[0].admitted["ad"]
    assert len({known["last_seen_day"] for known in truth["item"][0].values()}) == 3


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_any_number_of_shards_loads_all_that_any_number_saved(
    base: Layer, truth: dict[str, Any], num_shards: int
) -> None:
    assert state_of(loaded([base], num_shards)) == truth  # bits


def test_values_can_be_read_as_soon_as_rows_are_loaded(base: Layer) -> None:
    (shard,) = shards_of(1)
    load(shard, LOCAL, [base])  # the day has not begun: the days of the rows lie ahead, and nothing decays
    pool = shard.pool_of("item")
    rows = pool.ids.rows(shard.number["item"])
    assert rows.size and np.array_equal(shard.ledger.read(pool.ids, rows)[:, 0], pool.ids.tally_RC[rows, 0])


def test_a_chain_of_nights_each_by_another_number_of_shards_is_one_continuous_run(tmp_path: Path) -> None:
    continuous, shards = shards_of(1), shards_of(2)
    for day, num_shards in enumerate([3, 1, 2, 5, 1, 2, 3]):
        together(continuous, live, day)
        together(shards, live, day)
        shards = loaded([save(shards, tmp_path / str(day), base=True)], num_shards)
        assert state_of(shards) == state_of(continuous)  # sketches halve, values decay, float16 rounds alike


def test_base_and_deltas_are_the_full_snapshot_and_so_is_what_they_are_folded_into(tmp_path: Path) -> None:
    shards, layers = shards_of(2), list[Layer]()
    for day in range(5):
        together(shards, live, day)
        layers.append(save(shards, tmp_path / f"{day}", base=day == 0))
        expected = state_of(shards)
        assert state_of(loaded(layers, 1 + day % 3)) == expected
        whole = Layer(str(tmp_path / f"whole-{day}"), compact(LOCAL, layers, str(tmp_path / f"whole-{day}")))
        assert state_of(loaded([whole], 2)) == expected
        thirds = [compact(LOCAL, layers, str(tmp_path / f"thirds-{day}"), buckets_of(s, 3)) for s in range(3)]
        parts = [part for third in thirds for part in third]
        assert len({part.path for part in parts}) == len(parts)
        for path in whole.paths("item", "rows", range(NUM_BUCKETS)):
            assert (np.diff(keys_of(pd.read_parquet(path)["id"].to_numpy())) > 0).all()
        assert state_of(loaded([Layer(str(tmp_path / f"thirds-{day}"), parts)], 2)) == expected
        if day == 2:
            layers = [whole]  # the chain goes on from what was folded
    assert len(layers) == 3


def test_a_delta_holds_only_what_was_touched_since_the_snapshot_before(tmp_path: Path) -> None:
    shards = lived(1)
    save(shards, tmp_path / "base", base=True)
    (shard,) = shards
    shard.begin_day(shard.periods.today + 1)
    meet(shard, "item", [5, -1, 10_000])
    delta = save(shards, tmp_path / "delta", base=False)
    assert {(part.table, part.kind): part.rows for part in delta.parts if part.kind in ("rows", "evicted")} == {
        ("item", "rows"): 3
    }
    assert sorted(pd.read_parquet(delta.paths("item", "rows", range(NUM_BUCKETS))[0])["id"]) == [-1, 5, 10_000]
    again = save(shards, tmp_path / "again", base=False)
    assert {part.kind for part in again.parts} == {"sketch", "default"}  # these are whole in every layer


def kinds_of(layer: Layer, table: str) -> dict[str, list[int]]:
    found = {
        part.kind: layer.paths(table, part.kind, range(NUM_BUCKETS)) for part in layer.parts if part.table == table
    }
    return {kind: sorted(i for path in paths for i in pd.read_parquet(path)["id"]) for kind, paths in found.items()}


def test_tombstones_name_who_left_and_did_not_come_back_and_newer_layers_bring_him_back(tmp_path: Path) -> None:
    shards = shards_of(1, tables={"x": TableConfig(dim=4, min_count=2, init_scale=0.1)}, tallies={})
    (shard,), layers = shards, list[Layer]()

    def evict(*ids: int) -> None:
        rows = shard.pool_of("x").ids.find(keys_of(np.array(ids, np.int64)), np.zeros(len(ids), np.uint8))
        shard._evict(shard.pool_of("x"), rows)

    def night(*seen: int) -> dict[str, list[int]]:
        shard.begin_day(FIRST_DAY.toordinal() + len(layers))
        for one_id in seen:
            meet(shard, "x", [one_id])
        layers.append(save(shards, tmp_path / str(len(layers)), base=not layers))
        assert state_of(loaded(layers, 1, tables=shard.tables, tallies={})) == state_of(shards)
        return kinds_of(layers[-1], "x")

    assert night(1, 2, -1) == {"waiting": [-1, 1, 2]}
    assert night(1, 2, 3) == {"rows": [1, 2], "waiting": [3], "admitted": [1, 2]}
    evict(1, 2)
    assert night(2) == {"waiting": [2], "evicted": [1, 2]}
    assert night(2) == {"rows": [2], "admitted": [2]}
    evict(2)
    assert night() == {"evicted": [2]}
    assert night(2, 2) == {"rows": [2], "admitted": [2]}
    evict(2)
    assert night(2, 2) == {"rows": [2], "admitted": [2]}  # he left and came back: no tombstone of his row
    meet(shard, "x", [3])
    evict(3)
    assert night(3) == {"waiting": [3], "evicted": [3]}  # and this one waits again


# Files


def in_id_order(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("id").reset_index(drop=True)


def test_pandas_duckdb_and_polars_read_every_column_as_it_is(base: Layer, one: list[Shard]) -> None:
    exported = one[0].export("item")
    expected = {"id": np.array(ids_of(exported["key"])), "bucket": bucket_of(exported["key"]).astype(np.int16)}
    expected |= {name: exported[name] for name in ("weight", *Adam.states, "count")}
    expected |= dict(zip(["value", "clicked", "seen", "clicked_today", "seen_today"], exported["tally"].T, strict=True))
    days = [datetime.date.fromordinal(day) for day in exported["last_seen_day"].tolist()]
    expected = {name: column[np.argsort(expected["id"])] for name, column in expected.items()}
    days = [days[place] for place in np.argsort(ids_of(exported["key"]))]
    paths = base.paths("item", "rows", range(NUM_BUCKETS))
    frames = {
        "pandas": pd.concat([pd.read_parquet(path) for path in paths]),
        "duckdb": duckdb.connect().execute("select * from read_parquet(?)", [paths]).df(),
        "polars": pl.read_parquet(paths).to_pandas(),
    }
    for name, frame in frames.items():
        frame = in_id_order(frame)
        assert list(frame.columns) == [*expected, "last_seen_day"], name
        assert set(EXTREMES) <= set(frame["id"]) and frame["id"].dtype == np.int64
        for column, values in expected.items():
            found = np.stack(frame[column].to_list()) if values.ndim > 1 else frame[column].to_numpy()
            assert found.dtype == values.dtype and np.array_equal(found, values), (name, column)
        assert [pd.Timestamp(day).date() for day in frame["last_seen_day"]] == days, name


def test_other_programs_find_single_ids_and_who_waits(base: Layer, truth: dict[str, Any]) -> None:
    rows, paths = truth["item"][0], base.paths("item", "rows", range(NUM_BUCKETS))
    for one_id in EXTREMES:
        weight = np.frombuffer(rows[one_id]["weight"], np.float32).tolist()
        query = duckdb.connect().execute("select weight from read_parquet(?) where id = ?", [paths, one_id])
        assert [list(found) for (found,) in query.fetchall()] == [weight]
        assert pl.scan_parquet(paths).filter(pl.col("id") == one_id).collect()["weight"].to_list() == [weight]
    waiting = pl.read_parquet(base.paths("ad", "waiting", range(NUM_BUCKETS)))
    found = zip(waiting["count"], [day.toordinal() for day in waiting["last_seen_day"]], strict=True)
    assert dict(zip(waiting["id"], found, strict=True)) == truth["ad"][1]


def test_a_sketch_is_read_as_one_row_a_bucket(base: Layer, one: list[Shard]) -> None:
    frame = pd.concat([pd.read_parquet(path) for path in base.paths("user", "sketch", range(NUM_BUCKETS))])
    assert frame["bucket"].tolist() == list(range(NUM_BUCKETS))
    assert np.array_equal(np.stack(frame["cells"].to_list()), one[0].sketches["user"].cells.reshape(NUM_BUCKETS, -1))


def test_parts_say_what_the_files_are(base: Layer) -> None:
    num_shards = len(base.paths("item", "rows", range(NUM_BUCKETS)))
    kinds = {
        ("item", "rows"),
        ("ad", "rows"),
        ("ad", "waiting"),
        ("user", "rows"),
        ("user", "sketch"),
        ("ad", "default"),
    }
    assert {(part.table, part.kind) for part in base.parts} == kinds
    assert len({part.path for part in base.parts}) == len(base.parts)
    for part in base.parts:
        first, last = part.buckets[0], part.buckets[1] - 1
        assert range(first, last + 1) in (cuts(1) if part.kind == "default" else cuts(num_shards))
        assert part.path == f"{part.table}/{part.kind}-{first:04d}-{last:04d}.parquet"
        frame = pd.read_parquet(f"{base.folder}/{part.path}")
        assert len(frame) == part.rows > 0
        if part.kind in ("rows", "waiting"):
            assert frame["bucket"].between(first, last).all()
            assert frame["bucket"].tolist() == bucket_of(keys_of(frame["id"].to_numpy())).tolist()
    assert sorted(str(path.relative_to(base.folder)) for path in Path(base.folder).rglob("*.parquet")) == sorted(
        part.path for part in base.parts
    )


def test_rows_are_sorted_by_key_in_row_groups_that_say_their_buckets(base: Layer) -> None:
    for path in base.paths("item", "rows", range(NUM_BUCKETS)):
        file, keys = pq.ParquetFile(path), keys_of(pd.read_parquet(path)["id"].to_numpy())
        assert (np.diff(keys) > 0).all()
        place = file.schema_arrow.names.index("bucket")
        groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
        assert [group.num_rows for group in groups[:-1]] == [ROW_GROUP] * (len(groups) - 1)
        told = [(group.column(place).statistics.min, group.column(place).statistics.max) for group in groups]
        cuts = np.split(bucket_of(keys), np.cumsum([group.num_rows for group in groups])[:-1])
        assert told == [(cut.min(), cut.max()) for cut in cuts]


def test_an_empty_shard_writes_no_rows_and_nothing_is_loaded_from_nothing(tmp_path: Path) -> None:
    layer = save(shards_of(2), tmp_path, base=True)
    assert {(part.table, part.kind) for part in layer.parts} == {("user", "sketch"), ("ad", "default")}
    assert state_of(loaded([layer], 3)) == state_of(loaded([])) == state_of(shards_of(1))


def test_weights_that_are_not_finite_come_back_as_they_are(tmp_path: Path) -> None:
    shards = shards_of(1)
    meet(shards[0], "item", [7])
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0, -1e-45, 1e-38, 3.4e38, 1.0]])
    pool = shards[0].pool_of("item")
    pool.write(
        pool.ids.rows(0),
        weight,
        {name: torch.full_like(s, torch.inf) for name, s in pool.states(pool.ids.rows(0)).items()},
    )
    expected = state_of(shards)
    assert state_of(loaded([save(shards, tmp_path, base=True)])) == expected


# What is read


class Counting:
    """A file system that counts the files opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def open_input_file(self, path: str) -> Any:
        self.opened.append(path)
        return LOCAL.open_input_file(path)


@pytest.mark.parametrize(
    "buckets", [range(0), range(0, 1), range(100, 900), range(2048, 4096), range(NUM_BUCKETS)], ids=str
)
def test_only_files_and_row_groups_that_overlap_are_read(
    base: Layer, buckets: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, real = list[tuple[str, int]](), pq.ParquetFile.read_row_group

    def counted(file: Any, group: int, **options: Any) -> Any:
        groups.append((files.opened[-1], group))
        return real(file, group, **options)

    files = Counting()
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    found = [columns["id"] for columns in read(files, [base], "item", "rows", buckets)]
    expected_files, expected_groups, ids = [], [], list[int]()
    for part in base.parts:
        path = f"{base.folder}/{part.path}"
        if (part.table, part.kind) == ("item", "rows") and set(range(*part.buckets)) & set(buckets):
            expected_files.append(path)
            frame = pd.read_parquet(path)
            for group, first in enumerate(range(0, len(frame), ROW_GROUP)):
                rows = frame[first : first + ROW_GROUP]
                if rows["bucket"].min() < buckets.stop and rows["bucket"].max() >= buckets.start:
                    expected_groups.append((path, group))
                ids += rows["id"][rows["bucket"].isin(buckets)].tolist()
    assert files.opened == expected_files and groups == expected_groups
    assert sorted(i for of in found for i in of.tolist()) == sorted(ids)


def test_overlapping_parts_are_those_that_share_a_bucket() -> None:
    for num_saved in range(1, 9):
        parts = [Part(str(s), "x", "rows", (b.start, b.stop), 1) for s, b in enumerate(cuts(num_saved))]
        for buckets in (mine for num_shards in range(1, 9) for mine in cuts(num_shards)):
            expected = [part for part in parts if set(range(*part.buckets)) & set(buckets)]
            assert Layer("f", parts).overlapping(buckets) == expected
            assert Layer("f", parts).paths("x", "rows", buckets) == [f"f/{part.path}" for part in expected]
            assert (
                Layer("f", parts).paths("x", "waiting", buckets) == Layer("f", parts).paths("y", "rows", buckets) == []
            )


def cuts(num_shards: int) -> list[range]:
    return [buckets_of(shard, num_shards) for shard in range(num_shards)]


@pytest.mark.parametrize("kind", ["rows", "waiting"])
def test_reading_gives_each_id_once_with_its_key_as_the_newest_layer_leaves_it(tmp_path: Path, kind: str) -> None:
    shards, layers = shards_of(1), list[Layer]()
    for day in range(4):
        together(shards, live, day)
        layers.append(save(shards, tmp_path / str(day), base=day == 0))
    pieces = [list(read(LOCAL, layers, "ad", kind, buckets)) for buckets in cuts(3)]
    assert any(len(piece) > 1 for piece in pieces)
    keys = np.concatenate([columns["key"] for piece in pieces for columns in piece])
    ids = np.concatenate([columns["id"] for piece in pieces for columns in piece])
    assert np.array_equal(keys, keys_of(ids)) and len(set(ids.tolist())) == ids.size
    assert set(ids.tolist()) == set(state_of(shards)["ad"][kind == "waiting"])


# Under a changed configuration


def test_another_optimizer_keeps_weights_and_counts_and_starts_its_states_anew(base: Layer, one: list[Shard]) -> None:
    (shard,) = loaded([base], optimizer=RowwiseAdagrad())
    for table in TABLES:
        old, new = one[0].export(table), shard.export(table)
        for name in ("key", "weight", "count", "tally", "last_seen_day"):
            assert np.array_equal(old[name], new[name])
        assert not new["adagrad_sum"].any()


def test_layers_of_different_columns_are_folded_into_one_that_loads_as_they_do(tmp_path: Path) -> None:
    first = lived(1)
    layers = [save(first, tmp_path / "0", base=True)]
    tallies = {"item": [*TALLIES["item"], Tally("new", {"click": 1.0})]}
    second = loaded(layers, optimizer=RowwiseAdagrad(), tallies=tallies)
    together(second, live, NUM_DAYS)
    layers.append(save(second, tmp_path / "1", base=False))
    whole = Layer(str(tmp_path / "whole"), compact(LOCAL, layers, str(tmp_path / "whole")))
    changed: list[dict[str, Any]] = [{"optimizer": RowwiseAdagrad(), "tallies": tallies}, {"optimizer": Adam(0.05)}]
    for now in changed:
        assert state_of(loaded([whole], 2, **now)) == state_of(loaded(layers, **now))
    assert state_of(loaded([whole], optimizer=RowwiseAdagrad(), tallies=tallies)) == state_of(second)


def test_a_tally_that_is_new_starts_at_zero_and_the_others_go_on_under_their_names(
    base: Layer, one: list[Shard]
) -> None:
    tallies = {"item": [Tally("new", {"click": 1.0}), Tally("seen", {SIGHTINGS: 0.5}, 2.0, by_day=True)]}
    (shard,) = loaded([base], tallies=tallies)
    old, new = one[0].export("item")["tally"], shard.export("item")["tally"]
    assert one[0].ledger.columns(0) == ["value", "clicked", "seen", "clicked_today", "seen_today"]
    assert shard.ledger.columns(0) == ["value", "new", "seen", "new_today", "seen_today"]
    assert np.array_equal(new[:, [0, 2, 4]], old[:, [0, 2, 4]]) and not new[:, [1, 3]].any()


def test_a_table_that_is_new_starts_empty_and_one_that_is_gone_is_left_out(base: Layer, truth: dict[str, Any]) -> None:
    tables = {"fresh": TABLES["ad"]} | {name: TABLES[name] for name in ("ad", "item")}
    found = state_of(loaded([base], 2, tables=tables))
    assert found["fresh"][:2] == ({}, {})
    renumbered = {i: {n: v for n, v in known.items() if n != "table"} for i, known in found["ad"][0].items()}
    assert renumbered == {i: {n: v for n, v in known.items() if n != "table"} for i, known in truth["ad"][0].items()}
    assert found["ad"][1:] == truth["ad"][1:]


@pytest.mark.parametrize("cells", [CELLS // 2, 2 * CELLS])
def test_a_sketch_of_another_size_starts_anew_and_all_else_is_kept(
    base: Layer, truth: dict[str, Any], cells: int
) -> None:
    user = TableConfig(dim=4, dtype="float16", init_scale=0.3, min_count=3, admission=Admission("sketch", cells, 2))
    found = state_of(loaded([base], 2, tables=TABLES | {"user": user}))
    assert not any(found["user"][2]) and len(found["user"][2]) == cells
    assert found["user"][0] == truth["user"][0] and found["ad"] == truth["ad"]


def test_a_sketch_remembers_its_day_also_when_nobody_was_seen_on_it(tmp_path: Path) -> None:
    shards, first = shards_of(1), FIRST_DAY.toordinal() // 2 * 2
    shards[0].begin_day(first)
    for table in ("item", "user", "user"):
        meet(shards[0], table, [7])
    shards[0].begin_day(first + 2)  # two days: halved, and nobody is seen
    (again,) = loaded([save(shards, tmp_path, base=True)])
    for shard in (shards[0], again):
        shard.begin_day(first + 3)
    assert np.array_equal(again.sketches["user"].cells, shards[0].sketches["user"].cells)
    assert again.sketches["user"].cells.max() == 1


def test_a_table_given_less_room_keeps_the_most_valuable_and_its_next_delta_says_who_left(tmp_path: Path) -> None:
    shards = lived(1)
    base = save(shards, tmp_path / "base", base=True)
    small = TABLES | {"item": TableConfig(dim=8, capacity_rows=30, grow=False)}
    squeezed = loaded([base], 2, tables=small)
    value = shards[0].ledger.read(shards[0].pool_of("item").ids, shards[0].export("item")["row"])[:, 0]
    key = shards[0].export("item")["key"]
    order = sorted(zip(value.tolist(), [k % 2**64 for k in key.tolist()], key.tolist(), strict=True))
    kept = {k for _, _, k in order[-30:]}
    assert set(np.concatenate([shard.export("item")["key"] for shard in squeezed]).tolist()) == kept
    delta = save(squeezed, tmp_path / "delta", base=False)
    gone = set(key.tolist()) - kept
    assert kinds_of(delta, "item") == {"evicted": sorted(ids_of(np.array(list(gone))))}


# While training goes on


def test_a_snapshot_written_in_a_thread_is_of_its_instant_while_training_goes_on(tmp_path: Path) -> None:
    shards, quiet = lived(1), lived(1)
    (shard,) = shards
    base = save(shards, tmp_path / "base", base=True)
    together(shards, live, NUM_DAYS)
    expected, snapshot, parts = state_of(shards), Snapshot(shard, base=False), list[Part]()
    writer = threading.Thread(target=lambda: parts.extend(snapshot.write(LOCAL, str(tmp_path / "delta"))))
    writer.start()
    for day in range(NUM_DAYS + 1, NUM_DAYS + 4):  # rows change, leave, are given to others; the pool grows
        together(shards, live, day)
    writer.join()
    layers = [base, Layer(str(tmp_path / "delta"), parts)]
    assert state_of(loaded(layers)) == expected
    layers.append(save(shards, tmp_path / "next", base=False))
    for day in range(NUM_DAYS, NUM_DAYS + 4):
        together(quiet, live, day)
    assert state_of(loaded(layers)) == state_of(shards) == state_of(quiet)  # and training did not notice


def test_changes_before_the_writer_begins_are_not_in_the_snapshot(tmp_path: Path) -> None:
    shards = lived(2)
    expected, snapshots = state_of(shards), [Snapshot(shard, base=True) for shard in shards]
    for day in range(NUM_DAYS, NUM_DAYS + 3):
        together(shards, live, day)
    parts = [part for snapshot in snapshots for part in snapshot.write(LOCAL, str(tmp_path))]
    assert state_of(loaded([Layer(str(tmp_path), parts)])) == expected != state_of(shards)


def test_training_goes_on_after_a_snapshot_of_the_same_day_as_if_there_had_been_none(tmp_path: Path) -> None:
    shards, quiet = lived(1), lived(1)
    layers = [save(shards, tmp_path / "0", base=True)]
    for batch in range(1, 4):
        for run in (shards, quiet):
            meet(run[0], "item", range(50 * batch, 50 * batch + 150), click=batch)
            meet(run[0], "item", EXTREMES)
        layers.append(save(shards, tmp_path / str(batch), base=False))
        assert state_of(shards) == state_of(quiet) == state_of(loaded(layers))


def test_after_writing_or_failing_to_write_nobody_needs_to_be_told_of_changes(tmp_path: Path) -> None:
    (shard,) = lived(1)
    (tmp_path / "file").write_text("no folder")
    snapshot = Snapshot(shard, base=True)
    with pytest.raises(OSError):
        snapshot.write(LOCAL, str(tmp_path / "file"))
    told = shard.before_change.__qualname__
    assert "lambda" in told
    live(shard, NUM_DAYS)
    expected = state_of([shard])
    assert state_of(loaded([save([shard], tmp_path / "good", base=True)])) == expected


def test_what_was_not_kept_counts_as_changed_again_and_comes_into_the_next(tmp_path: Path) -> None:
    """Two deltas are thrown away while rows come, wait, leave and are given to others: the third holds it all."""
    shards = lived(1)
    (shard,) = shards
    layers = [save(shards, tmp_path / "base", base=True)]
    for day in range(NUM_DAYS, NUM_DAYS + 2):
        together(shards, live, day)
        snapshot = Snapshot(shard, base=day == NUM_DAYS)
        meet(shard, "item", range(50 * day, 50 * day + 30))
        snapshot.write(LOCAL, str(tmp_path / f"thrown-away-{day}"))
        snapshot.undo()
    together(shards, live, NUM_DAYS + 2)
    layers.append(save(shards, tmp_path / "next", base=False))
    assert state_of(loaded(layers)) == state_of(shards)
    assert {part.kind for part in layers[-1].parts} >= {"rows", "evicted", "waiting"}
