import datetime
from collections import defaultdict, deque
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from cluster import simulate as simulation
from cluster.simulate import law_auc, simulate
from trainer.errors import UserError

START = datetime.date(2026, 11, 1)
SIZES: dict[str, Any] = {"start": START, "users": 300, "items": 150, "rows_per_day": 6_001, "seed": 5}


def date(day: int) -> datetime.date:
    return START + datetime.timedelta(days=day)


def read(out: Path, tree: str, day: int) -> pd.DataFrame:
    return pq.read_table(out / tree / f"day={date(day)}", partitioning=None).to_pandas()


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def three_days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated")
    simulate(str(out), days=3, **SIZES)
    return out


@pytest.fixture(scope="module")
def rows(three_days: Path) -> pd.DataFrame:
    """Logs and truth of all days, joined."""
    return pd.concat(
        read(three_days, "logs", day).merge(read(three_days, "truth", day), on="impression_id", validate="one_to_one")
        for day in range(3)
    )


def test_same_seed_writes_the_same_bytes_over_what_is_there_and_another_seed_does_not(
    tmp_path: Path, three_days: Path
) -> None:
    simulate(str(tmp_path), days=3, **{**SIZES, "seed": 6})
    assert files(tmp_path).keys() == files(three_days).keys()
    assert files(tmp_path) != files(three_days)
    simulate(str(tmp_path), days=3, **SIZES)
    assert files(tmp_path) == files(three_days)


def test_a_day_is_the_same_however_many_days_are_simulated(tmp_path: Path, three_days: Path) -> None:
    simulate(str(tmp_path), days=2, **SIZES)
    expected = {name: content for name, content in files(three_days).items() if f"day={date(2)}" not in name}
    assert files(tmp_path) == expected


@pytest.mark.parametrize("fails_at", [1, 3, 4, 6])
def test_a_killed_run_leaves_whole_days_only_and_the_next_run_mends_it(
    tmp_path: Path, three_days: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    # A day renames four times where it replaces another: fails_at runs through the first day and the second.
    simulate(str(tmp_path), days=2, **{**SIZES, "seed": 6})
    other_seed = files(tmp_path)
    rename, calls = simulation.os.rename, iter(range(1, 99))

    def rename_or_die(source: str, target: str) -> None:
        if next(calls) == fails_at:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(simulation.os, "rename", rename_or_die)
        simulate(str(tmp_path), days=2, **SIZES)
    for folder in (tmp_path / "logs").iterdir():
        seen = {name: content for name, content in files(tmp_path).items() if folder.name in name}
        assert len(seen) == 4, "logs are there only where their truth is"
        assert seen.items() <= files(three_days).items() or seen.items() <= other_seed.items()
    simulate(str(tmp_path), days=3, **SIZES)
    assert files(tmp_path) == files(three_days)


def test_columns_have_the_types_that_readers_are_promised(three_days: Path) -> None:
    schema = pq.read_schema(three_days / "logs" / f"day={START}" / "part-0.parquet")
    types = {field.name: str(field.type).replace("element", "item") for field in schema}
    assert types == {
        **dict.fromkeys(["impression_id", "request_id", "ts_ms", "user_id", "item_id"], "int64"),
        **dict.fromkeys(["category", "device"], "string"),
        **dict.fromkeys(["price", "item_age_h", "duration_s", "weight", "watch_s"], "float"),
        **dict.fromkeys(["position", "click", "cart", "buy"], "int8"),
        **dict.fromkeys(["history", "history_outcome"], "list<item: int64>"),
    }


def test_every_day_has_two_files_of_even_row_groups_in_the_order_of_time(tmp_path: Path) -> None:
    simulate(str(tmp_path), days=1, **{**SIZES, "rows_per_day": 40_004})
    parts = [pq.ParquetFile(path) for path in sorted((tmp_path / "logs" / f"day={START}").iterdir())]
    groups = [[part.metadata.row_group(i).num_rows for i in range(part.num_row_groups)] for part in parts]
    assert groups == [[10_008, 10_000], [10_000, 9_996]]  # whole requests of eight
    logs = read(tmp_path, "logs", 0)
    midnight_ms = pd.Timestamp(START, tz="UTC").value // 10**6
    assert logs.ts_ms.is_monotonic_increasing and (logs.ts_ms - midnight_ms).between(0, 86_399_999).all()
    assert logs.request_id[:20_008].max() < logs.request_id[20_008:].min(), "no request is cut by a file"


def test_a_request_is_one_user_on_one_device_shown_eight_different_items(rows: pd.DataFrame) -> None:
    requests = rows.groupby("request_id")
    assert (requests[["user_id", "device", "ts_ms", "randomized"]].nunique() == 1).all(axis=None)
    assert (requests.item_id.nunique() == requests.size()).all()
    assert (requests.position.agg(list).map(lambda shown: shown == list(range(1, len(shown) + 1)))).all()
    assert requests.size().value_counts().to_dict() == {8: 3 * 750, 1: 3}  # 6,001 rows a day


def test_labels_are_null_exactly_where_they_are_undefined(rows: pd.DataFrame) -> None:
    assert set(rows.click) == {0, 1}
    assert (rows.cart.notna() == (rows.click == 1)).all()
    assert (rows.buy.notna() == (rows.cart == 1)).all()
    assert (rows.watch_s.notna() == (rows.click == 1)).all()
    assert (rows.watch_s.dropna() > 0).all()


@pytest.mark.parametrize(("label", "probability"), [("click", "p_click_shown"), ("cart", "p_cart"), ("buy", "p_buy")])
def test_labels_come_as_often_as_the_truth_says(rows: pd.DataFrame, label: str, probability: str) -> None:
    space = rows[rows[label].notna()]
    p = space[probability]
    sigma = np.sqrt((p * (1 - p)).sum())  # of a sum of independent Bernoulli draws
    assert abs(space[label].sum() - p.sum()) < 4 * sigma


def test_watch_time_is_log_normal_around_the_truth(rows: pd.DataFrame) -> None:
    clicked = rows[rows.click == 1]
    z = (np.log(clicked.watch_s) - clicked.watch_log_mean) / simulation.WATCH_SIGMA
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / len(z))  # the variance of a sample variance of normals is 2 / n


def test_clicks_fall_with_the_position_where_the_order_is_random(rows: pd.DataFrame) -> None:
    randomized = rows[rows.randomized]
    assert 0.07 < len(randomized) / len(rows) < 0.13  # 10 % of 2,250 requests, 4 sigma is 2.5 %
    rates = randomized.groupby("position").click.mean()
    top, bottom = rates[:2].mean(), rates[-2:].mean()
    assert top > 2 * bottom  # the bias of about -2 divides the odds by seven


def test_the_shown_order_confounds_position_with_taste_except_in_randomized_requests(rows: pd.DataFrame) -> None:
    ends = rows[rows.position.isin([1, 8])]
    liking = ends.groupby(["randomized", "position"]).p_click.agg(["mean", "sem"])
    gap = liking.xs(1, level="position")["mean"] - liking.xs(8, level="position")["mean"]
    sigma = np.sqrt((liking["sem"] ** 2).groupby("randomized").sum())
    assert gap[False] > 10 * sigma[False]
    assert abs(gap[True]) < 4 * sigma[True]


def test_the_bias_is_additive_in_the_logit_zero_at_the_top_and_strongest_on_phones(rows: pd.DataFrame) -> None:
    logit = np.log(rows.p_click_shown / (1 - rows.p_click_shown)) - np.log(rows.p_click / (1 - rows.p_click))
    bias = logit.groupby([rows.device, rows.position]).agg(["min", "max"]).round(9)
    assert (bias["min"] == bias["max"]).all(), "one number for a device and a position"
    last = bias["min"].xs(8, level="position")
    assert (bias["min"].xs(1, level="position") == 0).all()
    assert last.to_dict() == pytest.approx({"phone": -2.4, "desktop": -1.7, "tablet": -2.0})


def test_history_is_what_the_user_clicked_in_earlier_requests(rows: pd.DataFrame) -> None:
    clicked: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=20))
    for _, request in groupby(rows.itertuples(), key=lambda row: row.request_id):
        shown = list(request)
        user = shown[0].user_id
        assert all(list(row.history) == list(clicked[user]) for row in shown)
        clicked[user].extend(row.item_id for row in shown if row.click)
    assert max(len(history) for history in clicked.values()) == 20, "some were full, so the cut was tried"


def test_every_day_brings_new_users_and_items_and_drops_old_ones(three_days: Path) -> None:
    days = [read(three_days, "logs", day) for day in range(3)]
    for column in ("user_id", "item_id"):
        today = [set(day[column]) for day in days]
        assert today[1] - today[0] and today[2] - today[1] - today[0]
        assert today[0] - today[1] - today[2]
    ages = pd.concat(days).assign(published_h=lambda row: row.ts_ms / 3.6e6 - row.item_age_h)
    spread = ages.groupby("item_id").published_h.agg(["min", "max"])
    assert (ages.item_age_h >= 0).all()
    assert (spread["max"] - spread["min"] < 1e-3).all()  # hours; ages are float32 numbers below 400
    assert ages.item_age_h.max() < 24 * (12 + 1)  # the longest life, and the day before the first


def test_ids_are_scattered_over_all_64_bits(rows: pd.DataFrame) -> None:
    for ids in (rows.user_id.unique(), rows.item_id.unique()):
        assert 0.3 < (ids < 0).mean() < 0.7  # a fair coin for 150 ids and more, 4 sigma is 0.16
        assert np.abs(ids.astype(float)).max() > 2.0**62
        assert 0.3 < (ids & 1).mean() < 0.7


def test_prices_are_sometimes_missing_and_traffic_is_skewed(rows: pd.DataFrame) -> None:
    assert rows.price.isna().mean() == pytest.approx(0.02, abs=0.005)  # 4 sigma of 18,000 draws
    assert (rows.price.dropna() > 0).all() and (rows.weight == 1).all()
    for column in ("user_id", "item_id"):
        counts = rows[column].value_counts()
        assert counts[: len(counts) // 10].sum() > 0.25 * len(rows), "a tenth of them has much more than a tenth"


def test_truth_lies_beside_the_logs_row_by_row(three_days: Path) -> None:
    for day in range(3):
        logs, truth = read(three_days, "logs", day), read(three_days, "truth", day)
        assert len(logs) == 6_001 and logs.impression_id.is_unique
        assert (logs.impression_id == truth.impression_id).all()
        assert truth.drop(columns=["impression_id", "watch_log_mean"]).astype(float).stack().between(0, 1).all()


def test_law_auc_is_that_of_sklearn_and_worth_learning(three_days: Path) -> None:
    day = read(three_days, "logs", 2).merge(read(three_days, "truth", 2), on="impression_id")
    clicked, carted = day[day.click == 1], day[day.cart == 1]
    cart_p = day.p_click * day.p_cart
    expected = {
        "click@all": roc_auc_score(day.click, day.p_click.astype(np.float32)),
        "cart@click": roc_auc_score(clicked.cart, clicked.p_cart.astype(np.float32)),
        "cart@all": roc_auc_score(day.cart.fillna(0), cart_p.astype(np.float32)),
        "buy@cart": roc_auc_score(carted.buy, carted.p_buy.astype(np.float32)),
        "buy@all": roc_auc_score(day.buy.fillna(0), (cart_p * day.p_buy).astype(np.float32)),
    }
    found = law_auc(str(three_days), date(2))
    assert found == pytest.approx(expected, abs=1e-12)  # the same pairs of float32 scores: only the division rounds
    assert found["click@all"] > 0.7 and found["cart@click"] > 0.65


def test_a_day_that_was_not_simulated_is_a_user_error(three_days: Path) -> None:
    with pytest.raises(UserError, match="day=2026-11-04: no simulated day"):
        law_auc(str(three_days), date(3))


@pytest.mark.parametrize("wrong", [{"days": 0}, {"users": 0}, {"items": 15}, {"rows_per_day": 15}, {"seed": -1}])
def test_sizes_that_make_no_day_are_user_errors_and_write_nothing(tmp_path: Path, wrong: dict[str, int]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        simulate(str(tmp_path / "out"), **{"days": 1, **SIZES, **wrong})
    assert not (tmp_path / "out").exists()
