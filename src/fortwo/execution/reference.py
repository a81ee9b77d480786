"""The reference backend: the decoder's plain forward, its operations and its attention as torch's formulas.

The other backends extend it: what they have no kernel for, they compute as it does. Shape suffixes as in `decoder`, and
B rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.execution.adapters import SeparateAdapters, updates_of
from fortwo.execution.adapters_dora import DoraAdapters
from fortwo.execution.kv_cache import side_by_side
from fortwo.execution.parts import Computed, Part
from fortwo.kernels import reference
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Operations
from fortwo.nn.lora import Lora, Segment, Update
from fortwo.nn.network import Network
from fortwo.nn.packing import Pack, PackedAttention, additive, attention, pack, seen
from fortwo.nn.rows import Rows


class ReferenceBackend:
    """`backend.Backend` for any device. decoder: computed by `operations`."""

    operations: ClassVar[Operations] = reference
    packed_attention: ClassVar[type[PackedAttention]] = PackedAttention

    def __init__(self, decoder: Network) -> None:
        self.decoder = decoder.with_operations(self.operations)
        self.kv_dtype = torch.float32
        self.adapters = DoraAdapters(SeparateAdapters(), self.decoder)
        self._mixes = False  # whether rows of several adapters take hardly longer than those of one

    def with_decoder(self, decoder: Network) -> Self:
        return type(self)(decoder)

    def warm(self) -> None:
        """Nothing has to be compiled or recorded."""

    def release(self) -> None:
        """Nothing is kept."""

    # ------------------------------------------------------------ packed rows

    def forward(self, packed: Pack, segments: Sequence[Update] = ()) -> Tensor:
        attend = self.packed_attention(packed, self.decoder.config)
        with torch.no_grad():
            network = self.decoder.with_rows(Rows(packed.lengths, packed.prefix))
            return network.forward(packed.tokens_T, packed.positions_T, attend, segments)

    def train(self, packed: Pack, lora: Lora, checkpointing: bool = False, x_TD: Tensor | None = None) -> Tensor:
        x_TD = self.decoder.embed(packed.tokens_T) if x_TD is None else x_TD
        return self.decoder.norm(self._train_layers(x_TD, packed, lora, checkpointing))

    def _train_layers(self, x_TD: Tensor, packed: Pack, lora: Lora, checkpointing: bool) -> Tensor:
        attend, angles = self.packed_attention(packed, self.decoder.config), self.decoder.angles(packed.positions_T)
        told = attend, [Segment(lora)], lora.seeds(), checkpointing
        return self.decoder.with_rows(Rows(packed.lengths, packed.prefix)).through_layers(x_TD, angles, *told)

    # ------------------------------------------------------------ the cache

    @torch.no_grad()
    def decode(self, parts: Sequence[Part]) -> Tensor:
        device = self.decoder.device
        numbers = {id(part.slot): number for number, part in enumerate(parts)}
        pools = side_by_side(part.slot for part in parts)
        order = [numbers[id(slot)] for _, slots in pools for slot in slots]
        rows = [parts[number] for number in order]
        tokens_B = torch.tensor([row.tokens[0] for row in rows], device=device)
        positions_B = torch.tensor([row.before for row in rows], device=device)
        c, own, first = self.decoder.config, [], 0
        for pool, slots in pools:
            last = first + len(slots)
            own.append((pool, slice(first, last), torch.arange(len(slots), device=device)))
            first = last

        def attend(layer: int, qkv_BNE: Tensor) -> Tensor:
            """A pool at a time."""
            how = c.window_of(layer), c.attention_softcap
            mixed = [
                self.operations.decode_attention(
                    qkv_BNE[members], pool.k[layer], pool.v[layer], rows_B, positions_B[members], *how
                )
                for pool, members, rows_B in own
            ]
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

        with carried(rows) as carrying:
            network = self.decoder.with_rows(carrying)
            hidden_BD = network.forward(tokens_B, positions_B, attend, self._updates(rows))
        if order != list(range(len(order))):
            hidden_BD = hidden_BD[torch.tensor(order, device=device).argsort()]
        return hidden_BD

    @torch.no_grad()
    def prefill(self, parts: Sequence[Part]) -> Iterator[Computed]:
        for numbers, alike in prefill_groups(parts, self._mixes):
            group = [parts[number] for number in numbers]
            lengths = [len(part.tokens) for part in group]
            even = len(lengths) * max(lengths) <= 2 * sum(lengths)  # the grid of a pack is as wide as its longest row
            yield Computed(numbers, *(self._prefill_whole(group) if alike and even else self._prefill_parts(group)))

    def _prefill_whole(self, parts: Sequence[Part]) -> tuple[Tensor, list[list[int]]]:
        """Whole sequences of one adapter; what they begin with in common is computed once. Hidden states (T, D), and
        where in T the tokens of each lie."""
        c = self.decoder.config
        packed = pack([part.tokens for part in parts], self.decoder.device)
        P, packed_attention = packed.prefix, self.packed_attention(packed, c)
        rests = list(zip([part.slot for part in parts], packed.starts, packed.lengths, strict=True))

        def attend(layer: int, qkv_TNE: Tensor) -> Tensor:
            _, k_TKE, v_TKE = qkv_TNE.split([c.heads, c.kv_heads, c.kv_heads], 1)
            for slot, start, length in rests:
                for stored, new_TKE in ((slot.pool.k[layer], k_TKE), (slot.pool.v[layer], v_TKE)):
                    new_KTE = new_TKE.transpose(0, 1)
                    if P:
                        stored[slot.row, :, :P] = new_KTE[:, :P]
                    stored[slot.row, :, P : P + length] = new_KTE[:, start : start + length]
            return packed_attention(layer, qkv_TNE)

        updates = updates_of(self.adapters, [parts[0].adapter] * len(packed.tokens_T))
        with carried(parts, P) as carrying:
            network = self.decoder.with_rows(carrying)
            hidden_TD = network.forward(packed.tokens_T, packed.positions_T, attend, updates)
        return hidden_TD, [[*range(P), *range(start, start + length)] for _, start, length in rests]

    def _prefill_parts(self, parts: Sequence[Part]) -> tuple[Tensor, list[list[int]]]:
        """Parts of sequences, after what their slots hold. Hidden states (T, D), and where in T the tokens of each
        lie."""
        c, device = self.decoder.config, self.decoder.device
        ends = list(accumulate((len(part.tokens) for part in parts), initial=0))
        spans = [range(*span) for span in pairwise(ends)]

        @functools.cache
        def mask(part: int, window: int | None) -> Tensor:
            """Of a part's tokens, over the tokens that some of them see."""
            L, before = len(parts[part].tokens), parts[part].before
            return seen(L, before if window is None else min(before, window - 1), window, device)

        def attend(layer: int, qkv_TNE: Tensor) -> Tensor:
            q_THE, k_TKE, v_TKE = qkv_TNE.split([c.heads, c.kv_heads, c.kv_heads], 1)
            mixed_THE = torch.empty_like(q_THE)
            for number, (part, span) in enumerate(zip(parts, spans, strict=True)):
                pool, own, end = part.slot.pool, slice(span.start, span.stop), part.before + len(part.tokens)
                k_KSE, v_KSE = (stored[layer][part.slot.row, :, :end] for stored in (pool.k, pool.v))
                k_KSE[:, part.before :] = k_TKE[own].transpose(0, 1)
                v_KSE[:, part.before :] = v_TKE[own].transpose(0, 1)
                mask_LS = mask(number, c.window_of(layer))
                k_1KSE, v_1KSE = (kept[None, :, -mask_LS.shape[1] :].to(q_THE.dtype) for kept in (k_KSE, v_KSE))
                q_1HLE = q_THE[own].transpose(0, 1)[None]
                mixed_1HLE = _mixed(q_1HLE, k_1KSE, v_1KSE, mask_LS, c.attention_softcap)
                mixed_THE[own] = mixed_1HLE[0].transpose(0, 1)
            return mixed_THE

        tokens_T = torch.tensor([token for part in parts for token in part.tokens], device=device)
        positions = [part.before + place for part in parts for place in range(len(part.tokens))]
        positions_T = torch.tensor(positions, device=device)
        with carried(parts) as carrying:
            network = self.decoder.with_rows(carrying)
            hidden_TD = network.forward(tokens_T, positions_T, attend, self._updates(parts))
        return hidden_TD, [list(span) for span in spans]

    def _updates(self, parts: Sequence[Part]) -> list[Update]:
        """What the adapters of the parts add to their tokens, one part behind the other."""
        return updates_of(self.adapters, [part.adapter for part in parts for _ in part.tokens])


@contextmanager
def carried(parts: Sequence[Part], prefix: int = 0) -> Iterator[Rows]:
    """The rows of a pass over these parts; once it is done their slots hold what the sequences carry on. prefix: tokens
    that all begin with, and that lie in the pass once."""
    lengths = [len(part.tokens) - prefix for part in parts]
    rows = Rows(lengths, prefix, [part.slot.state if part.before else {} for part in parts])
    yield rows
    for part, state in zip(parts, rows.after, strict=True):
        part.slot.state = state


def within_window(parts: Sequence[Part], config: DecoderConfig) -> bool:
    """Whether the sequences of all parts are within the window of every layer, so that a kernel which knows none
    computes them."""
    return config.fits_window(max(part.before + len(part.tokens) for part in parts))


def _mixed(q_1HLE: Tensor, k_1KSE: Tensor, v_1KSE: Tensor, mask_LS: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(q_1HLE, k_1KSE, v_1KSE, attn_mask=mask_LS, enable_gqa=True)
    return attention(q_1HLE, k_1KSE, v_1KSE, additive(mask_LS), softcap)


def prefill_groups(parts: Sequence[Part], mixed: bool) -> list[tuple[list[int], bool]]:
    """Numbers of parts to compute together, and whether they are alike: all whole, and of one adapter, so that what
    they begin with is computed once. The others are grouped by adapter; where adapters can be `mixed`, all that are
    alone or begun."""
    groups: dict[tuple[str | None, bool], list[int]] = {}
    for number, part in enumerate(parts):
        groups.setdefault((part.adapter, part.whole), []).append(number)
    if not mixed:
        return [(numbers, whole) for (_, whole), numbers in groups.items()]
    alike = [(numbers, True) for (_, whole), numbers in groups.items() if whole and len(numbers) > 1]
    others = sorted(
        number for (_, whole), numbers in groups.items() if not whole or len(numbers) == 1 for number in numbers
    )
    return [*alike, (others, False)] if others else alike
