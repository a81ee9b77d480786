"""The backend for models of transformers: the reference's passes, with kernels for attention and for the products with
frozen weights.
"""

from __future__ import annotations

from typing import ClassVar

from fortwo.execution.adapters_dora import DoraAdapters
from fortwo.execution.adapters_stacked import StackedAdapters
from fortwo.execution.packed_fused import FusedPackedAttention
from fortwo.execution.reference import ReferenceBackend
from fortwo.kernels import operations
from fortwo.nn.decoder import Operations
from fortwo.nn.network import Network
from fortwo.nn.packing import PackedAttention


class GenericBackend(ReferenceBackend):
    """`backend.Backend` for `nn.generic`, on any device."""

    operations: ClassVar[Operations] = operations
    packed_attention: ClassVar[type[PackedAttention]] = FusedPackedAttention

    def __init__(self, decoder: Network) -> None:
        super().__init__(decoder)
        self.adapters = DoraAdapters(StackedAdapters(decoder.config, decoder.device), self.decoder)
