"""The backend for CPUs: kernels in C for a whole pass, where there are some for the weights; else what the reference
computes, with kernels for its operations. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fortwo.execution.adapters import updates_of
from fortwo.execution.adapters_dora import DoraAdapters
from fortwo.execution.adapters_int8 import Int8Adapters
from fortwo.execution.adapters_stacked import StackedAdapters
from fortwo.execution.decode_fused import Step
from fortwo.execution.packed_fused import FusedPackedAttention
from fortwo.execution.parts import Computed, Part
from fortwo.execution.prefill_fused import Piece, Prefill
from fortwo.execution.reference import ReferenceBackend, prefill_groups, within_window
from fortwo.execution.train_fused import Scratch, TrainedLayers, through, trained_whole
from fortwo.kernels import operations
from fortwo.nn.decoder import Decoder, Operations
from fortwo.nn.lora import Lora
from fortwo.nn.packing import Pack, PackedAttention, common_prefix


class CpuBackend(ReferenceBackend):
    """`backend.Backend` for the CPU."""

    operations: ClassVar[Operations] = operations
    packed_attention: ClassVar[type[PackedAttention]] = FusedPackedAttention

    decoder: Decoder

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self._step = Step(self.decoder)
        self._prefill = Prefill(self.decoder)
        self._trained_whole = trained_whole(self.decoder.config, self.decoder.layers)
        self._scratch = Scratch()
        self._mixes = self._step.laid
        self.kv_dtype = torch.float16 if self._step.laid else torch.float32
        plain = Int8Adapters() if self._step.laid else StackedAdapters(self.decoder.config, self.decoder.device)
        self.adapters = DoraAdapters(plain, self.decoder, scaling=self._step.laid)

    def release(self) -> None:
        self._scratch.memory = None

    def _train_layers(self, x_TD: Tensor, packed: Pack, lora: Lora, checkpointing: bool) -> Tensor:
        c = self.decoder.config
        (angles, *_) = self.decoder.angles(packed.positions_T)
        if (
            not self._trained_whole
            or lora.config.use_dora
            or angles is None
            or not c.fits_window(packed.prefix + packed.longest)
        ):
            return super()._train_layers(x_TD, packed, lora, checkpointing)
        rows, seeds = FusedPackedAttention(packed, c).packed, lora.seeds()
        told = self.decoder.layers, lora, seeds, rows, angles, checkpointing, self._scratch
        return through(TrainedLayers(c, *told), x_TD, lora)

    @torch.no_grad()
    def decode(self, parts: Sequence[Part]) -> Tensor:
        """Of many rows by the kernel of the prompts, where there is one."""
        few = len(parts) < self._prefill.fewest_rows or not self._prefill.takes
        steps = few and self._step.takes(len(parts))
        whole = (steps or self._prefill.takes) and within_window(parts, self.decoder.config)
        if not whole:
            return super().decode(parts)
        if steps:
            rows = [(part.tokens[0], part.before, part.slot.place) for part in parts]
            return self._step(rows, self._updates(parts))
        pieces = [Piece(part.tokens, part.before, [part.slot.place]) for part in parts]
        return self._prefill(pieces, self._updates(parts))

    @torch.no_grad()
    def prefill(self, parts: Sequence[Part]) -> Iterator[Computed]:
        """In one kernel all parts together; what those of a group that is alike begin with is computed once."""
        few = sum(len(part.tokens) for part in parts) < self._prefill.fewest_tokens
        if few or not self._prefill.takes or not within_window(parts, self.decoder.config):
            yield from super().prefill(parts)
            return
        pieces: list[Piece] = []
        keys: list[str | None] = []  # whose rows they are
        found: dict[int, list[int]] = {}  # where in T the tokens of each part lie

        def put(tokens: Sequence[int], before: int, numbers: Sequence[int]) -> None:
            pieces.append(Piece(tokens, before, [parts[number].slot.place for number in numbers]))
            for number in numbers:
                found[number] = found.get(number, []) + list(range(len(keys), len(keys) + len(tokens)))
            keys.extend([parts[numbers[0]].adapter] * len(tokens))

        for numbers, alike in prefill_groups(parts, self._mixes):
            together = alike and len(numbers) > 1
            shared = common_prefix([parts[number].tokens for number in numbers]) if together else 0
            if shared:
                put(parts[numbers[0]].tokens[:shared], 0, numbers)
            for number in numbers:
                put(parts[number].tokens[shared:], parts[number].before + shared, [number])
        yield Computed(list(found), self._prefill(pieces, updates_of(self.adapters, keys)), list(found.values()))
