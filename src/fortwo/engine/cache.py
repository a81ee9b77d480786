"""Keys and values of running sequences: one slot a sequence, grown by doubling, both in slots and in length.

Knows slots and lengths, not tokens or requests.
"""

from __future__ import annotations

import torch

from fortwo.models.decoder import DecoderConfig


class SlotCache:
    """k and v per layer as (slots, kv_heads, length, head_size)."""

    def __init__(
        self, config: DecoderConfig, device: torch.device | str = "cpu", slots: int = 8, length: int = 128
    ) -> None:
        self.config = config
        shape = (slots, config.kv_heads, length, config.head_size)
        self.k = [torch.zeros(shape, device=device) for _ in range(config.layers)]
        self.v = [torch.zeros(shape, device=device) for _ in range(config.layers)]
        self._free = list(range(slots))

    @property
    def slots(self) -> int:
        return self.k[0].shape[0]

    @property
    def length(self) -> int:
        return self.k[0].shape[2]

    @property
    def used(self) -> int:
        return self.slots - len(self._free)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.k + self.v)

    def take(self) -> int:
        """The lowest free slot."""
        if not self._free:
            self._free = list(range(self.slots, 2 * self.slots))
            self._grow(2 * self.slots, self.length)
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def give_back(self, slot: int) -> None:
        if slot in self._free:
            raise AssertionError(f"slot {slot} was given back twice")
        if not self.v[-1][slot].isfinite().all():  # later layers carry on what earlier ones began
            for v in self.v:  # masked values are multiplied by zero, and zero times nan is nan
                v[slot].zero_()
        self._free.append(slot)

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` tokens."""
        if length > self.length:
            grown = self.length
            while grown < length:
                grown *= 2
            self._grow(self.slots, min(grown, max(self.config.context, length)))

    def _grow(self, slots: int, length: int) -> None:
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(slots, old.shape[1], length, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                tensors[layer] = new
