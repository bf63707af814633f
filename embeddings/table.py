"""What a table is: a name, the width of its rows, and how large it starts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TableConfig:
    """One embedding table.

    dim: floats a row. capacity_rows: rows that all shards together reserve at the start; they double as ids appear.
    init_scale: a new row is uniform in [-init_scale, init_scale], a pure function of (seed, id), so that neither the
    number of workers nor the order of arrival matters; 0 starts rows at zero.
    """

    dim: int = 16
    capacity_rows: int = 65_536
    init_scale: float = 0.0
