"""key -> row: an open-addressing hash map over tensors, exact for every 64-bit key.

Keys arrive mixed (buckets.hash64), so their low bits are the slot and linear probing stays short at a load of at most
one half. A slot is free when its row is negative: no key value is reserved. All operations are vectorised over a batch
of distinct keys: each round settles the keys whose slot decides, and only the rest goes on to the next slot.
"""

import torch
from torch import Tensor

_FREE = -1
_MAX_LOAD = 0.5
_MIN_SLOTS = 1024


class IdMap:
    """Maps keys to rows (int32, chosen by the caller). Doubles its slots by itself."""

    def __init__(self, capacity: int, device: torch.device):
        self._allocate(int(capacity / _MAX_LOAD), device)
        self.num_keys = 0

    def _allocate(self, slots: int, device: torch.device) -> None:
        slots = 1 << (max(slots, _MIN_SLOTS) - 1).bit_length()
        self._keys = torch.zeros(slots, dtype=torch.int64, device=device)
        self._rows = torch.full((slots,), _FREE, dtype=torch.int32, device=device)

    def find(self, keys_U: Tensor) -> Tensor:
        """The row of each key, -1 for unknown ones: int64 [U]."""
        rows_U = torch.full_like(keys_U, _FREE)
        mask = self._keys.numel() - 1
        slot, pending, wanted = keys_U & mask, torch.arange(keys_U.numel(), device=keys_U.device), keys_U
        while pending.numel():
            row = self._rows[slot]
            hit = (row != _FREE) & (self._keys[slot] == wanted)
            rows_U[pending[hit]] = row[hit].long()
            on = (row != _FREE) & ~hit
            pending, wanted, slot = pending[on], wanted[on], (slot[on] + 1) & mask
        return rows_U

    def insert(self, keys_U: Tensor, rows_U: Tensor) -> None:
        """Add distinct keys that are not in the map yet, with distinct rows."""
        self.num_keys += keys_U.numel()
        if self.num_keys > self._keys.numel() * _MAX_LOAD:
            keys, rows = self.items()
            keys_U, rows_U = torch.cat([keys, keys_U]), torch.cat([rows, rows_U])
            self._allocate(int(self.num_keys / _MAX_LOAD), keys_U.device)
        self._place(keys_U, rows_U.int())

    def _place(self, keys: Tensor, rows: Tensor) -> None:
        mask = self._keys.numel() - 1
        slot = keys & mask
        while keys.numel():
            free = self._rows[slot] == _FREE
            self._rows[slot[free]] = rows[free]  # of several keys for one slot the last written stays ...
            won = free & (self._rows[slot] == rows)
            self._keys[slot[won]] = keys[won]
            keys, rows, slot = keys[~won], rows[~won], (slot[~won] + 1) & mask  # ... and the others go on

    def items(self) -> tuple[Tensor, Tensor]:
        """All keys and their rows, in no particular order."""
        used = self._rows != _FREE
        return self._keys[used], self._rows[used].long()
