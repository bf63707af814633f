"""What a table is: the width of its rows, how large it may become, who gets a row, who loses it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Admission:
    """How sightings of ids that have no row yet are counted.

    exact: one counter an id, forgotten when the id was unseen for forget_days. sketch: a count-min sketch of `cells`
    bytes for any number of ids, which may overestimate; its counts are halved every forget_days.
    """

    kind: Literal["exact", "sketch"] = "exact"
    cells: int = 1 << 22
    forget_days: int = 30


@dataclass(frozen=True)
class TableConfig:
    """One embedding table.

    dim: numbers a row; dtype: how they are kept (float16 rows are rounded stochastically). init_scale: a new row is
    uniform in [-init_scale, init_scale], a pure function of (seed, id), so that neither the number of workers nor the
    order of arrival matters; 0 starts rows at zero.

    capacity_rows: rows that all shards together reserve at the start. With grow they double when they do not suffice;
    without, no more ids than these have a row: a new id is refused, or the least valuable rows make room (when_full).

    min_count: an id gets its row on its n-th sighting. default_row: what an id without a row reads: zeros, or one row
    that such ids train together.

    ttl_days: at the end of a day, ids unseen for so many days lose their rows. budget_rows: above so many rows, the
    least valuable ids lose theirs. An id's value is a decayed sum over its sightings: of `value`, weights by event
    (`{click: 1, buy: 20}`), or of ones when not given; it halves in value_half_life_days.
    """

    dim: int = 16
    capacity_rows: int = 65_536
    init_scale: float = 0.0
    dtype: Literal["float32", "float16"] = "float32"
    grow: bool = True
    when_full: Literal["evict", "reject"] = "evict"
    min_count: int = 1
    admission: Admission = field(default_factory=Admission)
    default_row: Literal["zero", "trained"] = "zero"
    ttl_days: int | None = None
    budget_rows: int | None = None
    value: Mapping[str, float] = field(default_factory=dict)
    value_half_life_days: float = 30.0
