"""A model for serving, in a folder that needs nothing else: two programs, the tables' rows, and what to hand to whom.

    OUT/user.pt2            torch.export: the user's and the request's features -> entry [1, O]
    OUT/item.pt2            torch.export: entry, the features of n items -> by address the predictions [n], and `score`
    OUT/rows/<table>.arrow  embeddings/rowfile.py: sorted by id, to be mapped into memory
    OUT/export.json         written last: columns, pooling, tables, outputs, and every file's SHA-256

Served reads it, in Python; any other server does the same by export.json. Shape letters: B rows, D numbers a row, O
width of the body's entry, L longest list.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embeddings.jagged import Jagged
from embeddings.rowfile import RowFile, write_rows
from trainer.data import decode
from trainer.errors import UserError
from trainer.features import Inputs
from trainer.learner import Learner
from trainer.parts import ItemPart, UserPart, split
from trainer.predictions import told
from trainer.schema import Schema, as_table
from trainer.storage import Storage

FORMAT = 1
_ROWS_CHECKED = 33
_CLOSE = 1e-5  # of what is told, in the parts and in the whole: float32 adds up in another order


def save(
    learner: Learner, schema: Schema, item: Sequence[str], powers: Mapping[str, float], out: str, about: dict[str, Any]
) -> dict[str, Any]:
    """Write what scores, as of the learner's day. item: the features that belong to an item. powers: of the fused
    score. about: what else export.json is to say. Returns export.json.
    """
    storage = Storage(out)
    if storage.exists("export.json"):
        do = "choose another --out: servers may be reading it"
        raise UserError("a model is exported there already", storage.path, do=do)
    try:
        parts = split(learner, item, powers)
    except ValueError as error:
        do = "correct serving.item, or the model: what a user's part reads must not depend on the item"
        raise UserError("the model cannot be split", "serving.item", got=str(error), do=do) from None
    user, items = parts
    programs = {"user.pt2": _program(user, (_some(learner, user, 1),))}
    entry_1O = user(_some(learner, user, 1))
    programs["item.pt2"] = _program(items, (entry_1O, _some(learner, items, _ROWS_CHECKED)))
    _check(learner, user, items, powers, programs)
    try:
        storage.filesystem.create_dir(f"{storage.root}/rows", recursive=True)
        tables = _write_tables(learner, storage, [user, items])
        for name, content in programs.items():
            storage.write(name, content)
        files = [*programs, *(table["file"] for table in tables.values())]
        manifest = {"format": FORMAT, "torch": torch.__version__.partition("+")[0], **about}
        manifest |= {"user": _described(learner, schema, user), "item": _described(learner, schema, items)}
        manifest |= {"tables": tables, "outputs": learner.graph.addresses | {"score": "ranking"}}
        manifest |= {"sha256": {name: storage.fingerprint(name)["sha256"] for name in files}}
        storage.write("export.json", json.dumps(manifest, indent=1).encode())
    except OSError as error:
        raise UserError(
            "the export cannot be written", storage.path, got=str(error), do="free space, or choose another --out"
        ) from None
    return manifest


class Served:
    """An exported model. A request is scored in two calls: `user` once, then `items`, all of them or some at a time."""

    def __init__(self, path: str):
        storage = Storage(path)
        try:
            self.about: dict[str, Any] = json.loads(storage.read("export.json"))
        except (OSError, ValueError) as error:
            do = "name the folder that daybreak export wrote"
            raise UserError("no exported model", storage.path, got=str(error), do=do) from None
        for name, want in self.about["sha256"].items():
            if not storage.exists(name) or storage.fingerprint(name)["sha256"] != want:
                raise UserError(
                    "a file of the export is damaged or missing", f"{storage.path}/{name}", do="export again"
                )
        self._rows = {
            name: RowFile(storage.filesystem, f"{storage.root}/{table['file']}", _maybe_tensor(table["default"]))
            for name, table in self.about["tables"].items()
        }
        self.programs: dict[str, Callable[..., Any]] = {}
        for part in ("user", "item"):
            self.programs[part] = torch.export.load(io.BytesIO(storage.read(f"{part}.pt2"))).module()
        self._schema = {part: _schema(self.about[part]) for part in self.programs}

    @torch.no_grad()
    def user(self, values: Mapping[str, Any]) -> Tensor:
        """One user in one request, a value by column: what items are scored with [1, O]."""
        return self.programs["user"](self._given("user", {column: [value] for column, value in values.items()}))

    @torch.no_grad()
    def items(self, user_1O: Tensor, columns: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """The user's items, values by column: by address the predictions [B], and the fused `score`."""
        return self.programs["item"](user_1O, self._given("item", columns))

    def score(self, user: Mapping[str, Any], items: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """The two in one."""
        return self.items(self.user(user), items)

    def _given(self, part: str, columns: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        about, schema = self.about[part], self._schema[part]
        batch = decode(schema, as_table(schema, columns, f"the {part}'s values"), f"the {part}'s values")
        given = dict(zip(schema.numbers, batch.numbers_BK.unbind(1), strict=True))
        given |= dict(zip(schema.labels, batch.labels_BT.unbind(1), strict=True))
        for name, feature in about["features"].items():
            if feature["kind"] in ("id", "ids"):
                given |= self._pulled(name, feature, batch.ids[name])
        for name, feature in about["features"].items():
            if feature["kind"] == "id_stats":
                ids = batch.ids[feature["id"]]
                _, statistics_NS = self._rows[feature["table"]].find(ids.values_N)
                given[name] = _every(ids).sums(statistics_NS)
        return given

    def _pulled(self, name: str, feature: Mapping[str, Any], ids: Jagged) -> dict[str, Tensor]:
        row_ND, _ = self._rows[feature["table"]].find(ids.values_N)
        if feature["pool"] != "none":
            sum_BD = _every(ids).sums(row_ND)
            return {name: sum_BD / ids.lengths_B.clamp(min=1).unsqueeze(1) if feature["pool"] == "mean" else sum_BD}
        there_BL = torch.arange(feature["max_len"]) < ids.lengths_B.unsqueeze(1)
        row_BLD = torch.zeros(*there_BL.shape, row_ND.shape[1])
        row_BLD[there_BL] = row_ND
        return {name: row_BLD, f"{name} there": there_BL}


def _every(ids: Jagged) -> Jagged:
    """The places of all the ids, in the same lists."""
    return Jagged(torch.arange(ids.values_N.numel()), ids.offsets)


def _described(learner: Learner, schema: Schema, part: UserPart | ItemPart) -> dict[str, Any]:
    """What a part wants to be handed."""
    features, lists = learner.features, part.lists if isinstance(part, UserPart) else []
    tables = learner.embeddings.table_of
    found: dict[str, Any] = {}
    for name in (*part.side.ids, *lists):
        feature = features.ids.get(name) or features.lists[name][0]
        found[name] = {"kind": "ids" if name in schema.max_len else "id", "column": schema.ids[name]}
        found[name] |= {"table": tables[name], "pool": "none" if name in lists else "mean" if feature.mean else "sum"}
        found[name] |= {"max_len": schema.max_len[name]} if name in schema.max_len else {}
    for name in part.side.logged:
        found[name] = {"kind": "number", "column": schema.numbers[name]}
        found[name] |= {"transform": "log1p"} if name in schema.log1p else {}
    for name, each in part.side.statistics.items():
        found[name] = {"kind": "id_stats", "id": each.feature, "table": each.table}
    by = learner.graph.by if isinstance(part, ItemPart) else {}
    return {"program": "item.pt2" if isinstance(part, ItemPart) else "user.pt2", "features": found, "expressions": by}


def _schema(about: Mapping[str, Any]) -> Schema:
    """How the values of a part are read."""
    ids = {name: each for name, each in about["features"].items() if each["kind"] in ("id", "ids")}
    numbers = {name: each for name, each in about["features"].items() if each["kind"] == "number"}
    unpooled = tuple(name for name, each in ids.items() if each["pool"] == "none")
    return Schema(
        {name: each["column"] for name, each in ids.items()},
        {name: each["column"] for name, each in numbers.items()},
        about["expressions"],
        max_len={name: each["max_len"] for name, each in ids.items() if "max_len" in each},
        log1p=frozenset(name for name, each in numbers.items() if each.get("transform") == "log1p"),
        aligned=(unpooled,) if len(unpooled) > 1 else (),
    )


def _write_tables(learner: Learner, storage: Storage, parts: Sequence[UserPart | ItemPart]) -> dict[str, Any]:
    """Every table that a part reads."""
    shard, table_of = learner.embeddings.shard, learner.embeddings.table_of
    names = [name for part in parts for name in (*part.side.ids, *(part.lists if isinstance(part, UserPart) else ()))]
    tables = {}
    for table in dict.fromkeys(table_of[name] for name in names):
        file = f"rows/{table}.arrow"
        rows = write_rows(shard, table, storage.filesystem, f"{storage.root}/{file}")
        default = shard.default_of(table)
        tables[table] = {"file": file, "dim": shard.tables[table].dim, "rows": rows, "default": default}
    return tables


def _some(learner: Learner, part: UserPart | ItemPart, num_rows: int) -> dict[str, Tensor]:
    """Inputs of a part by chance, the same each time, with nulls and empty lists among them."""
    generator, features = torch.Generator().manual_seed(0), learner.features
    some = {name: torch.randn(num_rows, features.ids[name].dim, generator=generator) for name in part.side.ids}
    for k, name in enumerate(part.side.logged):
        value_B = torch.randn(num_rows, generator=generator)
        some[name] = torch.where(torch.arange(num_rows) % 7 == k % 7, torch.nan, value_B)
    for name, each in part.side.statistics.items():
        width = len(learner.embeddings.shard.statistics(each.table))
        some[name] = torch.rand(num_rows, width, generator=generator) * 9
    for name in part.lists if isinstance(part, UserPart) else ():
        feature, longest = features.lists[name]
        there_BL = torch.arange(longest) < torch.arange(num_rows).add(2).remainder(longest + 1).unsqueeze(1)
        row_BLD = torch.randn(num_rows, longest, feature.dim, generator=generator)
        some |= {name: row_BLD * there_BL.unsqueeze(2), f"{name} there": there_BL}
    for name in learner.graph.by if isinstance(part, ItemPart) else ():
        some[name] = torch.rand(num_rows, generator=generator) * 100
    return some


def _program(part: torch.nn.Module, inputs: tuple[Any, ...]) -> bytes:
    """A part as torch.export has it; whatever comes last in its inputs may have any number of rows."""
    rows = torch.export.Dim("rows")
    *fixed, given = inputs
    free = {name: {0: rows} for name in given} if fixed else dict.fromkeys(given)
    with torch.no_grad():
        program = torch.export.export(part, inputs, dynamic_shapes=(*({} for _ in fixed), free))
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


@torch.no_grad()
def _check(
    learner: Learner, user: UserPart, items: ItemPart, powers: Mapping[str, float], programs: Mapping[str, bytes]
) -> None:
    """The programs tell what the whole model tells."""
    of_user, of_items = _some(learner, user, 1), _some(learner, items, _ROWS_CHECKED)
    run_user, run_items = (torch.export.load(io.BytesIO(programs[name])).module() for name in ("user.pt2", "item.pt2"))
    got = run_items(run_user(of_user), of_items)
    x_BI = torch.zeros(_ROWS_CHECKED, learner.features.layout.input_dim)
    for part, given in ((user, of_user), (items, of_items)):
        x_BI[:, part.side.column_M] = part.side(given)
    lists = {
        name: (of_user[name].expand(len(x_BI), -1, -1), of_user[f"{name} there"].expand(len(x_BI), -1))
        for name in user.lists
    }
    missing = [
        (torch.zeros(len(x_BI), each.dim), torch.zeros(len(x_BI))) for each in learner.features.position.values()
    ]
    logits_BL = learner.averaged(Inputs(x_BI, lists, missing), None).logits_BL
    unknown_BT = torch.full((len(x_BI), len(learner.graph.tasks)), torch.nan)
    by = [of_items[name].unsqueeze(1) for name in learner.graph.by]
    for address, want_B in told(learner.graph, logits_BL, torch.cat([unknown_BT, *by], dim=1), powers).items():
        torch.testing.assert_close(got[address], want_B, rtol=_CLOSE, atol=_CLOSE, msg=f"{address}: the parts differ")


def _maybe_tensor(values: Sequence[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values)
