"""Predictions to Parquet: key columns as they stand in the log, one column an address, and the fused score."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from trainer.data import open_filesystem
from trainer.errors import UserError


class PredictionFile:
    """out/part-00000-of-00002.parquet, written batch by batch; it gets its name when it is whole. Use in a with block."""

    def __init__(self, out: str, worker: int, num_workers: int):
        self._filesystem, folder = open_filesystem(out)
        self._path = f"{folder}/part-{worker:05d}-of-{num_workers:05d}.parquet"
        self._folder, self._writer, self.num_rows = folder, None, 0

    def write(self, keys: Any, columns: Mapping[str, Tensor]) -> None:
        """keys: the batch's key columns (Arrow table or None). columns: one value a row."""
        table = pa.table({name: pa.array(values.float().cpu().numpy()) for name, values in columns.items()})
        if keys is not None:
            table = pa.table({**{n: keys[n] for n in keys.column_names}, **{n: table[n] for n in table.column_names}})
        try:
            if self._writer is None:
                self._filesystem.create_dir(self._folder, recursive=True)
                self._writer = pq.ParquetWriter(f"{self._path}.tmp", table.schema, filesystem=self._filesystem)
            self._writer.write_table(table)
        except OSError as error:
            raise UserError("predictions cannot be written", self._path, got=str(error), do="free space or choose another --out") from None
        self.num_rows += table.num_rows

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if self._writer is not None:
            self._writer.close()
            if kind is None:
                self._filesystem.move(f"{self._path}.tmp", self._path)
            else:
                self._filesystem.delete_file(f"{self._path}.tmp")
