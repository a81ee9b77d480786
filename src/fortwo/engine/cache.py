"""Keys and values of running sequences and of prefixes kept for the next ones, together within a bound of memory.

A sequence lies in one row of a pool of rows of equal capacity, and moves to a larger one when it outgrows it. The rows
that decode together are brought side by side, so that attention reads them in place: one view a pool, no gather.
Knows slots, lengths and blocks, not tokens or requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fortwo.engine.prefixes import BLOCK, Prefixes
from fortwo.nn.config import DecoderConfig
from fortwo.quantization.formats import Regions

SMALLEST = 128  # tokens of the smallest row; the others are its doubles


@dataclass(eq=False)
class Slot:
    """Where a sequence lies: a row of the pool of this capacity. length: tokens whose keys and values it holds;
    root: what its prefixes are kept under, None for never."""

    capacity: int
    row: int
    length: int = 0
    root: int | None = None


class Pool:
    """Keys and values (2, layers, rows, kv_heads, capacity, head_size) as `dtype`; slots: who lies in each row."""

    def __init__(self, config: DecoderConfig, capacity: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self.kv = torch.empty(
            2, config.layers, 0, config.kv_heads, capacity, config.head_size, device=device, dtype=dtype
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
        slot = Slot(self.capacity, self.slots.index(None))
        self.slots[slot.row] = slot
        return slot

    def place(self, slot: Slot) -> list[int]:
        """Where the slot's keys and values are: the kernels' cache_place."""
        kinds, layers, rows, heads = self.kv.stride()[:4]
        k = self.kv.data_ptr() + slot.row * rows * self.kv.itemsize
        return [k, k + kinds * self.kv.itemsize, layers, heads]

    def resize(self, rows: int) -> None:
        """Have this many rows, at least those in use."""
        self.gather([slot for slot in self.slots if slot is not None])
        kept = min(rows, len(self.slots))
        shape = (*self.kv.shape[:2], rows, *self.kv.shape[3:])
        new = Regions(0).zeros(shape, self.kv.dtype) if self.kv.device.type == "cpu" else self.kv.new_zeros(shape)
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
        length = max(slot.length, 0 if other is None else other.length)
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


class Cache:
    """bound: how many tokens fit, spare rows and kept prefixes included; None for as many as come. dtype: of keys and
    values."""

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device | str = "cpu",
        bound: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.prefixes = Prefixes()
        self.pools: dict[int, Pool] = {}
        self._config = config
        self._device = device
        self.dtype = dtype
        self.bound = bound

    @staticmethod
    def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        return 2 * dtype.itemsize * config.layers * config.kv_heads * config.head_size

    @property
    def longest(self) -> int:
        """The most tokens a sequence may have here."""
        return self._config.context if self.bound is None else min(self._config.context, self.bound)

    @property
    def used(self) -> int:
        """Slots taken."""
        return sum(pool.used for pool in self.pools.values())

    @property
    def tokens(self) -> int:
        """Tokens there is memory for now."""
        return sum(pool.capacity * len(pool.slots) for pool in self.pools.values()) + self.prefixes.tokens

    @property
    def bytes(self) -> int:
        return self.tokens * self.bytes_per_token(self._config, self.dtype)

    def take(self, length: int) -> Slot | None:
        """A slot with room for `length` tokens; None where the bound leaves no room for it."""
        capacity = SMALLEST
        while capacity < length:
            capacity *= 2
        capacity = min(capacity, self.longest)
        if length > capacity:
            return None
        pool = self.pools.get(capacity)
        if pool is None:
            pool = self.pools[capacity] = Pool(self._config, capacity, self._device, self.dtype)
        if not pool.spare:
            rows = max(1, len(pool.slots) // 2)
            if not self._fits(rows * capacity):
                rows = 1
                if not self._make_room(capacity):
                    return None
            pool.resize(len(pool.slots) + rows)
        return pool.take()

    def grow(self, slot: Slot, length: int) -> bool:
        """Make room in `slot` for `length` tokens; False, and nothing changed, where the bound leaves none."""
        if length <= slot.capacity:
            return True
        larger = self.take(length)
        if larger is None:
            return False
        old, new = self.pools[slot.capacity], self.pools[larger.capacity]
        new.kv[:, :, larger.row, :, : slot.length] = old.kv[:, :, slot.row, :, : slot.length]
        self.give_back(slot)
        slot.capacity, slot.row = larger.capacity, larger.row
        new.slots[slot.row] = slot
        return True

    def give_back(self, slot: Slot) -> None:
        pool = self.pools[slot.capacity]
        if pool.slots[slot.row] is not slot:
            raise AssertionError(f"{slot} was given back twice")
        if not pool.v[-1][slot.row].isfinite().all():  # later layers carry on what earlier ones began
            pool.v[:, slot.row] = 0  # see resize
        pool.slots[slot.row] = None

    def place(self, slot: Slot) -> list[int]:
        """Where the slot's keys and values are: the kernels' cache_place."""
        return self.pools[slot.capacity].place(slot)

    def together(self, slots: Iterable[Slot]) -> list[tuple[Pool, list[Slot]]]:
        """Bring slots side by side: for each pool those of its rows 0, 1, ..., in this order."""
        by_capacity: dict[int, list[Slot]] = {}
        for slot in slots:
            by_capacity.setdefault(slot.capacity, []).append(slot)
        parts = []
        for capacity, members in sorted(by_capacity.items()):
            pool = self.pools[capacity]
            pool.gather(members)
            parts.append((pool, sorted(members, key=lambda slot: slot.row)))
        return parts

    # ------------------------------------------------------------ prefixes

    def keep(self, slot: Slot, tokens: list[int]) -> None:
        """Keep what the slot holds, in whole blocks, for sequences that begin alike. tokens: the sequence's."""
        if slot.root is None:
            return
        pool = self.pools[slot.capacity]
        keys = self.prefixes.keys(slot.root, tokens[: slot.length])
        for place, key in enumerate(keys):
            if key in self.prefixes:
                continue
            if not self._fits(BLOCK):
                self.trim()
            if not self._fits(BLOCK) and not self.prefixes.evict(spared=keys):
                break
            block = slice(place * BLOCK, (place + 1) * BLOCK)
            self.prefixes.add(slot.root, key, pool.kv[:, :, slot.row, :, block].clone())
        self.prefixes.touch(keys)

    def recall(self, slot: Slot, tokens: list[int]) -> None:
        """Fill an empty slot with the longest prefix of `tokens` that is kept; at least one token is left over."""
        if slot.root is None or not (found := self.prefixes.match(slot.root, tokens[:-1])):
            return
        both = torch.cat(self.prefixes.blocks(found), 3)
        slot.length = both.shape[3]
        self.pools[slot.capacity].kv[:, :, slot.row, :, : slot.length] = both

    # ------------------------------------------------------------ the bound

    def check_idle(self) -> None:
        """Raises AssertionError for slots that are taken although nothing runs."""
        taken = [slot for pool in self.pools.values() for slot in pool.slots if slot is not None]
        if taken:
            raise AssertionError(f"no request runs, but {len(taken)} slot(s) of the cache are taken: {taken}")

    def trim(self) -> None:
        """Free the spare rows of pools that have more of them than others."""
        for pool in self.pools.values():
            if pool.spare > pool.used:
                pool.resize(pool.used)

    def clear(self) -> None:
        """Forget everything and free its memory."""
        self.pools.clear()
        self.prefixes = Prefixes()

    def _fits(self, tokens: int) -> bool:
        return self.bound is None or self.tokens + tokens <= self.bound

    def _make_room(self, tokens: int) -> bool:
        """Free spare rows, then the prefixes that were used least recently, until this many tokens fit."""
        for pool in self.pools.values():
            if not self._fits(tokens) and pool.spare:
                pool.resize(pool.used)
        while not self._fits(tokens):
            if not self.prefixes.evict():
                return False
        return True
