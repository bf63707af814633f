"""Predictions to Parquet: key columns as they stand in the log, one column an address, and the fused score."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.heads import TaskGraph
from trainer.storage import open_filesystem

_PART = re.compile(r"part-\d{5}-of-\d{5}\.parquet(\.tmp)?")


def told(graph: TaskGraph, logits_BL: Tensor, labels_BT: Tensor, powers: Mapping[str, float]) -> dict[str, Tensor]:
    """What the world is told of some rows: by address each prediction in the unit of its label, and the fused `score`,
    the product of predictions to their powers. labels_BT: see TaskGraph.predictions.
    """
    predictions = graph.predictions(logits_BL, labels_BT)
    in_units = {
        address: graph.tasks[address.split("@")[0]].to_label(predictions[address])
        for address, kind in graph.addresses.items()
        if kind == "regression"
    }
    score_B = log_fused(in_logs(predictions, graph.addresses), powers).exp()
    return predictions | in_units | {"score": score_B}


def in_logs(predictions: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """The logarithms of predictions, by address. A ranking's score has no unit: it counts as a logarithm."""
    return {
        address: values_B if kinds[address] == "ranking" else values_B.clamp(min=1e-30).log()
        for address, values_B in predictions.items()
    }


def log_fused(logs: Mapping[str, Tensor], powers: Mapping[str, float]) -> Tensor:
    """The logarithm of the product of predictions to their powers, which at least one address has."""
    return torch.stack([power * logs[address] for address, power in powers.items()]).sum(0)


class PredictionFile:
    """out/part-00000-of-00002.parquet, written batch by batch; it gets its name when it is closed whole. Use in a with
    block; close may come earlier.
    """

    def __init__(self, out: str, worker: int, num_workers: int):
        self._filesystem, self._folder = open_filesystem(out)
        self._worker, self.num_rows = worker, 0
        self._path = f"{self._folder}/part-{worker:05d}-of-{num_workers:05d}.parquet"
        self._writer: Any = None

    def clear(self) -> None:
        """Worker 0 removes the parts of an earlier call, which may have had more workers."""
        if self._worker == 0:
            with self._in_words():
                selector = pyarrow.fs.FileSelector(self._folder, allow_not_found=True)
                for info in self._filesystem.get_file_info(selector):
                    if _PART.fullmatch(info.base_name):
                        self._filesystem.delete_file(info.path)

    def write(self, keys: Any, columns: Mapping[str, Tensor]) -> None:
        """keys: the batch's key columns (Arrow table or None). columns: one value a row."""
        if not next(iter(columns.values())).numel():
            return  # a worker's share of a step may be empty, and then it has no keys
        table = pa.table({name: pa.array(values.float().cpu().numpy()) for name, values in columns.items()})
        if keys is not None:
            table = pa.table({**{n: keys[n] for n in keys.column_names}, **{n: table[n] for n in table.column_names}})
        with self._in_words():
            if self._writer is None:
                self._filesystem.create_dir(self._folder, recursive=True)
                self._writer = pq.ParquetWriter(f"{self._path}.tmp", table.schema, filesystem=self._filesystem)
            self._writer.write_table(table)
        self.num_rows += table.num_rows

    def close(self) -> None:
        """Write the footer and give the file its name."""
        if self._writer is not None:
            with self._in_words():
                self._writer.close()
                self._filesystem.move(f"{self._path}.tmp", self._path)
        self._writer = None

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if kind is None:
            self.close()
        elif self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._remove()

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        """Trouble with the disk becomes an error in words, and what was written so far is removed."""
        try:
            yield
        except OSError as error:
            self._remove()
            do = "free space or choose another --out"
            raise UserError("predictions cannot be written", self._path, got=str(error), do=do) from None

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._filesystem.delete_file(f"{self._path}.tmp")
