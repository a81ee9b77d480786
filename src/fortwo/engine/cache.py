"""Keys and values of running sequences and of prefixes kept for the next ones, together within a bound of memory.

A sequence lies in one row of a pool of rows of equal capacity (`execution.kv_cache`), and moves to a larger one when it
outgrows it. Knows slots, lengths and blocks, not tokens or requests.
"""

from __future__ import annotations

import torch

from fortwo.engine.prefixes import BLOCK, Prefixes
from fortwo.execution.kv_cache import Pool, Slot
from fortwo.nn.config import Shape
from fortwo.prompts import MIN_ROW_TOKENS


class Cache:
    """bound: how many tokens fit, spare rows and kept prefixes included; None for as many as come. dtype: of keys and
    values. The state that a row carries besides them counts as tokens of the same memory. context: the most tokens of a
    sequence; it may be lowered to that of a server that computes the replies instead."""

    def __init__(
        self,
        config: Shape,
        device: torch.device | str = "cpu",
        bound: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.prefixes = Prefixes()
        self.pools: dict[int, Pool] = {}
        self._config = config
        self._device = device
        self.dtype = dtype
        self._state_tokens = -(-config.state_bytes // self.bytes_per_token(config, dtype))
        self.bound = bound
        self.context = config.context

    @staticmethod
    def bytes_per_token(config: Shape, dtype: torch.dtype) -> int:
        return 2 * dtype.itemsize * config.kv_layers * config.kv_heads * config.head_size

    @property
    def longest(self) -> int:
        """The most tokens a sequence may have here."""
        room = self.context if self.bound is None else self.bound - self._state_tokens
        return max(0, min(self.context, room))

    @property
    def used(self) -> int:
        """Slots taken."""
        return sum(pool.used for pool in self.pools.values())

    @property
    def tokens(self) -> int:
        """Tokens there is memory for now."""
        pools = list(self.pools.values())  # other threads ask too
        return sum(self._cost(pool.capacity) * len(pool.slots) for pool in pools) + self.prefixes.tokens

    @property
    def bytes(self) -> int:
        return self.tokens * self.bytes_per_token(self._config, self.dtype)

    def take(self, length: int) -> Slot | None:
        """A slot with room for `length` tokens; None where the bound leaves no room for it."""
        capacity = MIN_ROW_TOKENS
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
            if not self._fits(rows * self._cost(capacity)):
                rows = 1
                if not self._make_room(self._cost(capacity)):
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
        new = larger.pool
        new.kv[:, :, larger.row, :, : slot.length] = slot.pool.kv[:, :, slot.row, :, : slot.length]
        self.give_back(slot)
        slot.pool, slot.row = new, larger.row
        new.slots[slot.row] = slot
        return True

    def give_back(self, slot: Slot) -> None:
        pool = slot.pool
        if pool.slots[slot.row] is not slot:
            raise AssertionError(f"{slot} was given back twice")
        if not pool.v[-1][slot.row].isfinite().all():  # later layers carry on what earlier ones began
            pool.v[:, slot.row] = 0  # see resize
        pool.slots[slot.row] = None

    # ------------------------------------------------------------ prefixes

    def keep(self, slot: Slot, tokens: list[int]) -> None:
        """Keep what the slot holds, in whole blocks, for sequences that begin alike. tokens: the sequence's."""
        if slot.root is None:
            return
        pool = slot.pool
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
        slot.pool.kv[:, :, slot.row, :, : slot.length] = both

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

    def _cost(self, capacity: int) -> int:
        """Tokens that a row counts as."""
        return capacity + self._state_tokens

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
