"""Predictions to Parquet: key columns as they stand in the log, one column an address, and the fused score."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from torch import Tensor

from trainer.data import open_filesystem
from trainer.errors import UserError


class PredictionFile:
    """out/part-00000-of-00002.parquet, written batch by batch; it gets its name when it is whole. Use in a with
    block.
    """

    def __init__(self, out: str, worker: int, num_workers: int):
        self._filesystem, folder = open_filesystem(out)
        self._path = f"{folder}/part-{worker:05d}-of-{num_workers:05d}.parquet"
        self._folder, self.num_rows = folder, 0
        self._writer: Any = None

    def write(self, keys: Any, columns: Mapping[str, Tensor]) -> None:
        """keys: the batch's key columns (Arrow table or None). columns: one value a row."""
        if not next(iter(columns.values())).numel():
            return  # a worker's share of a step may be empty, and then it has no keys
        table = pa.table({name: pa.array(values.float().cpu().numpy()) for name, values in columns.items()})
        if keys is not None:
            table = pa.table({**{n: keys[n] for n in keys.column_names}, **{n: table[n] for n in table.column_names}})
        try:
            if self._writer is None:
                self._filesystem.create_dir(self._folder, recursive=True)
                self._writer = pq.ParquetWriter(f"{self._path}.tmp", table.schema, filesystem=self._filesystem)
            self._writer.write_table(table)
        except OSError as error:
            raise self._refused(error) from None
        self.num_rows += table.num_rows

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        refused, written = self._close(), f"{self._path}.tmp"
        if kind is None and refused is None and self._writer is not None:
            self._filesystem.move(written, self._path)
        elif self._filesystem.get_file_info(written).type == pyarrow.fs.FileType.File:
            self._filesystem.delete_file(written)
        if kind is None and refused:
            raise refused

    def _close(self) -> UserError | None:
        """Write the footer: a disk may be found full only now."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            return self._refused(error)
        return None

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            "predictions cannot be written", self._path, got=str(error), do="free space or choose another --out"
        )
