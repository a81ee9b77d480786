"""Where keys and values of running sequences lie in memory: a row for each, in pools of rows of equal capacity.

The rows that decode together are brought side by side, so that attention reads them in place: one view a pool, no
gather. This module knows no tokens, no bound on memory and no requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fortwo.nn.config import Shape
from fortwo.nn.rows import State
from fortwo.quantization.formats import HugePageArena


@dataclass(eq=False)
class Slot:
    """Where a sequence lies: a row of a pool. length: tokens whose keys and values it holds; root: what its prefixes
    are kept under, None for never; state: what it carries besides keys and values behind its last token."""

    pool: Pool = field(repr=False)
    row: int
    length: int = 0
    root: int | None = None
    state: State = field(default_factory=dict, repr=False)

    @property
    def capacity(self) -> int:
        """The most tokens it has room for."""
        return self.pool.capacity

    @property
    def place(self) -> list[int]:
        """Where its keys and values are, as decode.h's `place`: the addresses of keys and values, and how many numbers
        lie from layer to layer and from head to head."""
        kv = self.pool.kv
        kinds, layers, rows, heads = kv.stride()[:4]
        k = kv.data_ptr() + self.row * rows * kv.itemsize
        return [k, k + kinds * kv.itemsize, layers, heads]


class Pool:
    """Keys and values (2, kv_layers, rows, kv_heads, capacity, head_size) as `dtype`; slots: who lies in each row."""

    def __init__(self, config: Shape, capacity: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self.kv = torch.empty(
            2, config.kv_layers, 0, config.kv_heads, capacity, config.head_size, device=device, dtype=dtype
        )
        self.slots: list[Slot | None] = []

    @property
    def k(self) -> Tensor:
        return self.kv[0]

    @property
    def v(self) -> Tensor:
        return self.kv[1]

    @property
    def used(self) -> int:
        return sum(slot is not None for slot in self.slots)

    @property
    def spare(self) -> int:
        return len(self.slots) - self.used

    def take(self) -> Slot:
        """The lowest free row."""
        slot = Slot(self, self.slots.index(None))
        self.slots[slot.row] = slot
        return slot

    def resize(self, rows: int) -> None:
        """Have this many rows, at least those in use."""
        self.gather([slot for slot in self.slots if slot is not None])
        kept = min(rows, len(self.slots))
        shape = (*self.kv.shape[:2], rows, *self.kv.shape[3:])
        new = HugePageArena(0).zeros(shape, self.kv.dtype) if self.kv.device.type == "cpu" else self.kv.new_zeros(shape)
        new[:, :, :kept] = self.kv[:, :, :kept]  # the rest is zero: what is masked is multiplied by zero, and nan stays
        self.kv = new
        self.slots = self.slots[:kept] + [None] * (rows - kept)

    def gather(self, slots: list[Slot]) -> None:
        """Bring these to the lowest rows, by as few moves as possible."""
        wanted = set(map(id, slots))
        rows = iter([row for row in range(len(slots)) if id(self.slots[row]) not in wanted])
        for slot in slots:
            if slot.row >= len(slots):
                self._swap(slot, next(rows))

    def _swap(self, slot: Slot, row: int) -> None:
        other, came_from = self.slots[row], slot.row
        length = 1 + max(slot.length, 0 if other is None else other.length)  # and the token of the step under way
        here, there = self.kv[:, :, row, :, :length], self.kv[:, :, came_from, :, :length]
        if other is None:
            here.copy_(there)
        else:
            held = here.clone()
            here.copy_(there)
            there.copy_(held)
        self.slots[row], self.slots[came_from], slot.row = slot, other, row
        if other is not None:
            other.row = came_from


def side_by_side(slots: Iterable[Slot]) -> list[tuple[Pool, list[Slot]]]:
    """Bring slots to the lowest rows of their pools: for each pool those of its rows 0, 1, ..., in this order."""
    members: dict[int, list[Slot]] = {}
    for slot in slots:
        members.setdefault(slot.capacity, []).append(slot)
    parts = []
    for _, own in sorted(members.items()):
        pool = own[0].pool
        pool.gather(own)
        parts.append((pool, sorted(own, key=lambda slot: slot.row)))
    return parts
