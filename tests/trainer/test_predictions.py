"""Prediction files, whose oracle is what pyarrow reads back, beside what was handed in; and laws of the fused score."""

import datetime
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_disk import fill, small_disk
from torch import Tensor

from trainer.errors import UserError
from trainer.heads import Task, TaskGraph
from trainer.losses import Pairwise
from trainer.predictions import PredictionFile, told

KEYS = pa.table(
    {"request": pa.array(["a", None, "b"]), "at": pa.array([datetime.datetime(2026, 11, 20)] * 3), "n": [1, 2, 3]}
)
COLUMNS = {"click@all": torch.tensor([0.1, 0.2, 0.3]), "score": torch.tensor([1.0, 2.0, 3.0])}
NOTHING = {"click@all": torch.empty(0), "score": torch.empty(0)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_keys_come_first_as_they_were_and_then_one_float_column_an_address(tmp_path: Path) -> None:
    with PredictionFile(str(tmp_path / "new" / "out"), 1, 2) as file:
        file.write(KEYS, COLUMNS)
        file.write(KEYS.slice(2, 1), {name: values[2:].double() for name, values in COLUMNS.items()})
    assert file.num_rows == 4
    found = pq.read_table(tmp_path / "new" / "out" / "part-00001-of-00002.parquet")
    assert found.schema.names == ["request", "at", "n", "click@all", "score"]
    assert found.select(KEYS.column_names) == pa.concat_tables([KEYS, KEYS.slice(2, 1)])
    assert found.schema.field("score").type == pa.float32() and found["score"].to_pylist() == [1.0, 2.0, 3.0, 3.0]


def test_another_call_with_fewer_workers_removes_the_parts_of_the_first_and_nothing_else(
    tmp_path: Path,
) -> None:
    (tmp_path / "notes.parquet").write_text("mine")
    for worker, of in ((0, 2), (1, 2), (0, 1)):
        with PredictionFile(str(tmp_path), worker, of) as file:
            file.clear()
            file.write(KEYS, COLUMNS)
    assert names(tmp_path) == ["notes.parquet", "part-00000-of-00001.parquet"]


def test_without_keys_there_are_the_predictions_alone(tmp_path: Path) -> None:
    with PredictionFile(str(tmp_path), 0, 1) as file:
        file.write(None, {"score": torch.tensor([0.5, 0.25], dtype=torch.bfloat16)})  # both exact in bfloat16
    assert pq.read_table(tmp_path / "part-00000-of-00001.parquet").to_pydict() == {"score": [0.5, 0.25]}


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    with PredictionFile(str(tmp_path), 0, 1) as file:
        file.write(KEYS, COLUMNS)
        assert names(tmp_path) == ["part-00000-of-00001.parquet.tmp"]
    assert names(tmp_path) == ["part-00000-of-00001.parquet"]


def test_what_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PredictionFile(str(tmp_path), 0, 1) as file:
        file.write(KEYS, COLUMNS)
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_workers_empty_share_of_a_step_changes_nothing(tmp_path: Path) -> None:
    with PredictionFile(str(tmp_path), 0, 1) as file:
        file.write(None, NOTHING)  # a share without rows has no keys
        file.write(KEYS, COLUMNS)
        file.write(None, NOTHING)
    assert pq.read_table(tmp_path / "part-00000-of-00001.parquet").num_rows == file.num_rows == 3


def test_a_worker_without_a_row_writes_no_file(tmp_path: Path) -> None:
    with PredictionFile(str(tmp_path / "out"), 4, 5) as file:
        file.write(None, NOTHING)
    assert file.num_rows == 0 and names(tmp_path / "out") == []


def test_a_filesystem_uri_is_a_place_to_write_to(tmp_path: Path) -> None:
    with PredictionFile(f"file://{tmp_path}/out", 0, 1) as file:
        file.write(KEYS, COLUMNS)
    assert names(tmp_path / "out") == ["part-00000-of-00001.parquet"]


def test_a_file_where_the_folder_should_be_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=f"(?s){tmp_path}/out/part-00000.*cannot be written.*another --out"):
        with PredictionFile(str(tmp_path / "out"), 0, 1) as file:
            file.write(KEYS, COLUMNS)


@pytest.mark.parametrize("found_by", ["the first byte", "the rows", "the footer"])
def test_a_full_disk_is_told_with_the_path_and_leaves_nothing_behind(tmp_path: Path, found_by: str) -> None:
    rows = {f"task{i}@all": torch.rand(10_000 if found_by == "the rows" else 1) for i in range(100)}
    with small_disk(tmp_path / "disk", size_kib=512) as disk:
        fill(disk, leave_kib=0 if found_by == "the first byte" else 64)
        with pytest.raises(UserError, match=f"(?s){disk}/part-00000.*No space left on device.*-> free space or choose"):
            with PredictionFile(str(disk), 0, 1) as file:
                file.write(None, rows)
                fill(disk, leave_kib=0)  # a footer of a hundred columns takes more than a page
        assert [name for name in names(disk) if name.startswith("part")] == []


# The fused score


GRAPH = TaskGraph({"click": Task(), "like": Task(), "order": Task(Pairwise())})
POWERS = {"click@all": 1.5, "like@all": 0.3, "order@all": 0.2}


def rows() -> Tensor:
    """Logits: [500, 3]."""
    drawn_BL = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    return drawn_BL - torch.tensor([3.0, 6.0, 0.0])


def told_of(logits_BL: Tensor, powers: dict[str, float]) -> dict[str, Tensor]:
    return told(GRAPH, logits_BL, torch.empty(len(logits_BL), 3), powers)


def order(score_B: Tensor) -> list[int]:
    return score_B.argsort(stable=True).tolist()


@pytest.mark.parametrize("address", ["click@all", "like@all", "order@all"])
def test_a_power_on_one_prediction_alone_gives_its_own_order(address: str) -> None:
    found = told_of(rows(), {address: 1.0})
    assert order(found["score"]) == order(found[address])


def test_a_prediction_that_is_off_by_a_factor_changes_no_order_of_scores() -> None:
    eighth_BL = rows()
    p_B = torch.sigmoid(eighth_BL[:, 0]) / 8
    eighth_BL[:, 0], eighth_BL[:, 2] = torch.logit(p_B), eighth_BL[:, 2] + 2
    right, wrong = told_of(rows(), POWERS), told_of(eighth_BL, POWERS)
    # the law of a product: every score is off by the same factor; float32
    factor_B = wrong["score"] / right["score"]
    torch.testing.assert_close(factor_B, torch.full((500,), 8**-1.5 * math.exp(0.4)), rtol=1e-4, atol=0)
    sums = [each["click@all"] + each["like@all"] for each in (right, wrong)]
    assert order(sums[0]) != order(sums[1])  # a sum of predictions is not like that


def test_all_powers_times_a_number_change_no_order_of_scores() -> None:
    doubled = told_of(rows(), {address: 2 * power for address, power in POWERS.items()})
    # (product)^2; float32
    torch.testing.assert_close(doubled["score"], told_of(rows(), POWERS)["score"].square(), rtol=1e-5, atol=0)


def test_a_factor_that_float32_does_not_hold_is_no_reason_to_lose_the_product() -> None:
    p_BL = torch.stack([torch.logspace(-10, -8, 200), torch.full((200,), 1e-9), torch.full((200,), 0.5)], dim=1)
    score_B = told_of(torch.logit(p_BL), {"click@all": 5.0, "like@all": -3.0})["score"]
    # 1e-50 * 1e27: the first is below float32, the product is not. Logarithms are near 100, of which float32 keeps 1e-5
    torch.testing.assert_close(score_B, torch.logspace(-23, -13, 200), rtol=1e-4, atol=0)
    assert order(score_B) == list(range(200))
