"""The backend for GPUs: forwards and training passes as CUDA graphs, where there are kernels for the network's shape;
else what the reference computes, with kernels for its operations. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from fortwo.execution.adapters_cuda import TabledAdapters
from fortwo.execution.adapters_dora import DoraAdapters, decode_apart, prefill_apart
from fortwo.execution.cuda_graphs import Graphs
from fortwo.execution.packed_fused import FusedPackedAttention, seen
from fortwo.execution.parts import Computed, Part
from fortwo.execution.reference import ReferenceBackend, within_window
from fortwo.execution.train_cuda_graph import Recorded
from fortwo.execution.train_fused import through
from fortwo.kernels import operations
from fortwo.nn.decoder import Decoder, Operations
from fortwo.nn.lora import Lora
from fortwo.nn.packing import Pack, PackedAttention


class CudaBackend(ReferenceBackend):
    """`backend.Backend` for a GPU. With a decoder on the CPU, in tests, nothing is recorded."""

    operations: ClassVar[Operations] = operations
    packed_attention: ClassVar[type[PackedAttention]] = FusedPackedAttention

    decoder: Decoder

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.kv_dtype = decoder.dtype
        self._plain = TabledAdapters(decoder.dtype, decoder.device)
        self.adapters = DoraAdapters(self._plain, self.decoder)
        self._graphs = Graphs(self.decoder, self.kv_dtype) if Graphs.fits(self.decoder, self.kv_dtype) else None
        self._recorded: Recorded | None = None

    def warm(self) -> None:
        if self._graphs is not None:
            self._graphs.warm()

    def _train_layers(self, x_TD: Tensor, packed: Pack, lora: Lora, checkpointing: bool) -> Tensor:
        within = self.decoder.config.fits_window(packed.prefix + packed.longest)
        if checkpointing or lora.config.use_dora or not within or not Recorded.fits(self.decoder, len(x_TD)):
            return super()._train_layers(x_TD, packed, lora, checkpointing)
        if self._recorded is None or self._recorded.lora is not lora:
            self._recorded = Recorded(self.decoder, lora)
        return through(self._recorded(packed.positions_T, seen(packed), lora.seeds()), x_TD, lora)

    @torch.no_grad()
    def decode(self, parts: Sequence[Part]) -> Tensor:
        within = within_window(parts, self.decoder.config)
        if self._graphs is None or not within or all(map(self.adapters.answer, parts)):
            return super().decode(parts)
        if any(map(self.adapters.answer, parts)):
            return decode_apart(parts, self.adapters.answer, self.decode, super().decode)
        return self._play(self._graphs, parts)

    @torch.no_grad()
    def prefill(self, parts: Sequence[Part]) -> Iterator[Computed]:
        within = within_window(parts, self.decoder.config)
        if self._graphs is None or not within or all(map(self.adapters.answer, parts)):
            yield from super().prefill(parts)
            return
        if any(map(self.adapters.answer, parts)):
            yield from prefill_apart(parts, self.adapters.answer, self.prefill, super().prefill)
            return
        ends = accumulate((len(part.tokens) for part in parts), initial=0)
        spans = [list(range(*span)) for span in pairwise(ends)]
        yield Computed(list(range(len(parts))), self._play(self._graphs, parts), spans)

    def _play(self, graphs: Graphs, parts: Sequence[Part]) -> Tensor:
        """Hidden states (T, D) of the parts' tokens, one behind the other."""
        rows, adapted = [], False
        for part in parts:
            place, owner = part.slot.place, self._plain.address(part.adapter)
            adapted = adapted or owner != 0
            rows += [(token, at, *place, owner) for at, token in enumerate(part.tokens, part.before)]
        return graphs(rows, self._plain.most if adapted else 0)
