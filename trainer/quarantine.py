"""Malformed rows and files are set aside before a day is scored and trained on: told, and kept for a person to look at.

    <checkpoints>/<model>/quarantine/day=2026-11-20/rows-0000.parquet   a file's bad rows as they stand in it, and
                                                                        _file, _row_group, _row, _column, _reason
    <checkpoints>/<model>/quarantine/day=2026-11-20/quarantine.json     the bad files, and how many rows for what reason

A pass over the day's columns finds them first, each worker in its share of the row groups: so which rows are left,
where they stand, and all batches made of them, are the same for any number of workers. It costs about one more reading
of the day, and is made only where data.max_bad_rows is above 0.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from embeddings.exchange import Exchange
from trainer.agree import gather_json, together, told
from trainer.data import Logs
from trainer.errors import UserError
from trainer.lanes import BadFile, BadRows, DayPlan, RowGroup
from trainer.storage import Storage

_DO = "mend the logs and deliver the day again, or raise data.max_bad_rows; nothing was trained on"


def sift(exchange: Exchange, logs: Logs, plan: DayPlan) -> DayPlan:
    """The plan without the rows and files that mean nothing, which it names; above the logs' max_bad_rows an error.
    Collective.
    """
    if not logs.max_bad_rows:
        return plan
    found = together(exchange, lambda: list(_look(exchange, logs, plan)))
    mine = sum(len(each["rows"]) for each in found)
    share = int(exchange.all_reduce(torch.tensor([mine])).item()) / plan.num_rows
    if share > logs.max_bad_rows:  # too many to be told to everybody
        found = [each | {"rows": each["rows"][:1]} for each in found[:1]]
    parts = gather_json(exchange, found)
    everybodys = sorted(told(exchange, [each for part in parts for each in part]), key=lambda each: each["group"])
    sifted = _without(logs, plan, everybodys)
    share = max(share, 1 - sifted.num_rows / plan.num_rows)
    if share > logs.max_bad_rows:
        raise _too_many(plan, everybodys[0], share, logs.max_bad_rows)
    return sifted


def keep(storage: Storage, logs: Logs, plan: DayPlan) -> None:
    """Write down what a plan sets aside, in the place of what was written of its interval before. Worker 0 alone calls
    it; the same plan writes the same bytes.
    """
    folder = storage.within(plan.interval.folder)
    try:
        folder.delete_folder()
        if not plan.bad_rows and not plan.bad_files:
            return
        for number, path in enumerate(dict.fromkeys(bad.path for bad in plan.bad_rows)):
            with folder.open_output(f"rows-{number:04d}.parquet") as stream:
                pq.write_table(_rows(logs, path, [bad for bad in plan.bad_rows if bad.path == path]), stream)
        folder.write("quarantine.json", json.dumps({"day": plan.interval.name, **summary(plan)}, indent=1).encode())
    except (OSError, pa.ArrowException) as error:
        do = "free space or mend the storage, then run the same command again"
        raise UserError("malformed rows cannot be set aside", folder.path, got=str(error), do=do) from None


def summary(plan: DayPlan) -> dict[str, Any]:
    """What a plan sets aside, for the report: how many rows and files, for what reasons."""
    reasons: Counter[tuple[str, str]] = Counter()
    for bad in plan.bad_rows:
        reasons[bad.column, bad.reason] += len(bad.rows)
    rows = reasons.total()
    return {
        "rows": rows,
        "share": rows / (plan.num_rows + rows),
        "files": len(plan.bad_files),
        "reasons": [{"column": column, "reason": reason, "rows": n} for (column, reason), n in reasons.items()],
        "bad_files": [{"file": bad.path, "bytes": bad.bytes, "reason": bad.reason} for bad in plan.bad_files],
    }


def _look(exchange: Exchange, logs: Logs, plan: DayPlan) -> Iterator[dict[str, Any]]:
    """What this worker finds in its share of the row groups: {group: its number, column, reason, rows: their places in
    it}, and of a file that cannot be read {group, column: None, reason, rows: []}.
    """
    for number in range(exchange.rank, len(plan.row_groups), exchange.num_workers):
        group = plan.row_groups[number]
        checked = logs.files.tried(group.path, partial(logs.check, group))
        if isinstance(checked, UserError):
            yield {"group": number, "column": None, "reason": f"{checked.what}: {checked.got}", "rows": []}
            continue
        refused, places = checked
        for column, reason, rows in refused.reasons:
            rows = rows if places is None else places[rows].tolist()
            yield {"group": number, "column": column, "reason": reason, "rows": rows}


def _without(logs: Logs, plan: DayPlan, found: list[dict[str, Any]]) -> DayPlan:
    """The plan without what was found, in the order of its row groups."""
    if not found:
        return plan
    groups = plan.row_groups
    reasons = {groups[each["group"]].path: each["reason"] for each in reversed(found) if each["column"] is None}
    rows = [each for each in found if groups[each["group"]].path not in reasons]
    left_out: dict[int, list[int]] = {}
    for each in rows:
        left_out.setdefault(each["group"], []).extend(each["rows"])
    left: list[RowGroup] = []
    for number, group in enumerate(groups):
        places = np.array(sorted(left_out.get(number, ())), np.int64)
        num_rows = 0 if group.path in reasons else group.num_rows - places.size
        if num_rows:
            first_row = left[-1].first_row + left[-1].num_rows if left else 0
            left.append(
                replace(group, num_rows=num_rows, first_row=first_row, left_out=places if places.size else None)
            )
    files = [BadFile(path, logs.filesystem.get_file_info(path).size, reason) for path, reason in reasons.items()]
    bad = [_bad_rows(groups[each["group"]], each) for each in rows]
    return replace(plan, row_groups=tuple(left), bad_files=(*plan.bad_files, *files), bad_rows=(*plan.bad_rows, *bad))


def _bad_rows(group: RowGroup, found: dict[str, Any]) -> BadRows:
    return BadRows(group.path, group.index, found["column"], found["reason"], tuple(found["rows"]))


def _too_many(plan: DayPlan, found: dict[str, Any], share: float, max_bad_rows: float) -> UserError:
    group = plan.row_groups[found["group"]]
    where = group.where if found["column"] is None else f"{group.where}, '{found['column']}', row {found['rows'][0]}"
    got = f"{share:.2%} of the rows; the first: {found['reason']} ({where})"
    what, expected = "too many malformed rows", f"at most {max_bad_rows:.2%} (data.max_bad_rows)"
    return UserError(what, plan.interval.words, got=got, expected=expected, do=_DO)


def _rows(logs: Logs, path: str, bad: list[BadRows]) -> pa.Table:
    """The bad rows of a file, in its order, with their places and reasons."""
    tables = []
    for index in sorted({each.index for each in bad}):
        of_group = sorted((row, each.column, each.reason) for each in bad if each.index == index for row in each.rows)
        rows, columns, reasons = map(list, zip(*of_group, strict=True))
        table = logs.files.whole(RowGroup(path, index, 0, 0)).take(pa.array(rows, pa.int64()))
        places = {"_file": [path] * len(rows), "_row_group": [index] * len(rows), "_row": rows}
        for name, values in (places | {"_column": columns, "_reason": reasons}).items():
            table = table.append_column(name, pa.array(values))
        tables.append(table)
    return pa.concat_tables(tables)
