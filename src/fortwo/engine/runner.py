"""Forwards of the serving path: prefill new sequences, then one token for every running one.

Rows of the plain base and of any adapters share one forward; each row gets its own adapter's update and no other.
The runner knows tensors and slots; who runs when is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fortwo.data.packing import PackedAttention, pack
from fortwo.engine.cache import SlotCache
from fortwo.models.decoder import Decoder
from fortwo.models.functions import decode_attention
from fortwo.models.lora import Lora, Segment

PREFILL_TOKENS = 2048


class Running(Protocol):
    """What the runner needs of a sequence. tokens: prompt and reply so far. slot: None until prefilled."""

    tokens: list[int]
    adapter: str | None
    slot: int | None


class Runner:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.cache = SlotCache(decoder.config, decoder.device)
        self._loras: dict[str, Lora] = {}

    def attach(self, key: str, lora: Lora) -> None:
        self._loras[key] = lora

    def detach(self, key: str) -> None:
        self._loras.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self._loras

    @torch.no_grad()
    def prefill(self, sequences: Sequence[Running]) -> Tensor:
        """Give each sequence a slot and run its tokens. Next-token logits (len(sequences), V), in order."""
        logits: list[Tensor | None] = [None] * len(sequences)
        for places in _prefill_groups(sequences):
            group = [sequences[place] for place in places]
            for place, row in zip(places, self._prefill_group(group), strict=True):
                logits[place] = row
        return torch.stack([row for row in logits if row is not None])

    def _prefill_group(self, sequences: Sequence[Running]) -> Tensor:
        """Sequences of one adapter; what they begin with in common is computed once."""
        device = self.decoder.device
        packed = pack([sequence.tokens for sequence in sequences], device)
        self.cache.reserve(max(len(sequence.tokens) for sequence in sequences) + 1)
        slots = []
        for sequence in sequences:
            sequence.slot = self.cache.take()
            slots.append(sequence.slot)
        P = packed.prefix
        slot_index = torch.tensor(
            [slot for slot, length in zip(slots, packed.lengths, strict=True) for _ in range(length)], device=device
        )
        all_slots = torch.tensor(slots, device=device)
        rest_positions = packed.positions_T[P:]
        attention = PackedAttention(packed, self.decoder.config)

        heads = [self.decoder.config.heads] + 2 * [self.decoder.config.kv_heads]

        def attend(layer: int, qkv_TNE: Tensor) -> Tensor:
            _, k_TKE, v_TKE = qkv_TNE.split(heads, 1)
            for stored, new_TKE in ((self.cache.k[layer], k_TKE), (self.cache.v[layer], v_TKE)):
                stored[slot_index, :, rest_positions] = new_TKE[P:]
                if P:
                    stored[all_slots, :, :P] = new_TKE[:P].transpose(0, 1)
            return attention(layer, qkv_TNE)

        hidden_TD = self.decoder.forward(
            packed.tokens_T, packed.positions_T, attend, self._segments(sequences[:1], whole=True)
        )
        return self.decoder.logits(hidden_TD[packed.last_places()])

    @torch.no_grad()
    def step(self, sequences: Sequence[Running]) -> Tensor:
        """Run the last token of each prefilled sequence. Next-token logits (len(sequences), V), in order."""
        device = self.decoder.device
        self.cache.reserve(max(len(sequence.tokens) for sequence in sequences))
        slots_B = torch.tensor([sequence.slot for sequence in sequences], device=device)
        positions_B = torch.tensor([len(sequence.tokens) - 1 for sequence in sequences], device=device)
        tokens_B = torch.tensor([sequence.tokens[-1] for sequence in sequences], device=device)

        def attend(layer: int, qkv_BNE: Tensor) -> Tensor:
            return decode_attention(qkv_BNE, self.cache.k[layer], self.cache.v[layer], slots_B, positions_B)

        hidden_BD = self.decoder.forward(tokens_B, positions_B, attend, self._segments(sequences))
        return self.decoder.logits(hidden_BD)

    def release(self, sequence: Running) -> None:
        """Give the sequence's slot back."""
        if sequence.slot is not None:
            self.cache.give_back(sequence.slot)
            sequence.slot = None

    def _segments(self, sequences: Sequence[Running], whole: bool = False) -> list[Segment]:
        keys = [sequence.adapter for sequence in sequences]
        if whole or len(set(keys)) == 1:
            return [] if keys[0] is None else [Segment(self._loras[keys[0]])]
        return [
            Segment(
                self._loras[key],
                torch.tensor([row for row, other in enumerate(keys) if other == key], device=self.decoder.device),
            )
            for key in dict.fromkeys(keys)
            if key is not None
        ]


def _prefill_groups(sequences: Sequence[Running]) -> list[list[int]]:
    """Places of sequences to prefill together: same adapter, at most PREFILL_TOKENS tokens (or one sequence)."""
    groups: list[list[int]] = []
    open_groups: dict[str | None, tuple[list[int], int]] = {}
    for place, sequence in enumerate(sequences):
        members, tokens = open_groups.get(sequence.adapter, ([], 0))
        if members and tokens + len(sequence.tokens) > PREFILL_TOKENS:
            members, tokens = [], 0
        if not members:
            groups.append(members)
        members.append(place)
        open_groups[sequence.adapter] = (members, tokens + len(sequence.tokens))
    return groups
