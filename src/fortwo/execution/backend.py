"""What computes a decoder: the one interface through which engine and trainer use it, and which implementation serves.

`nn.decoder` defines the arithmetic; a backend computes the same. Shape suffixes as in `decoder`, and B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fortwo.execution.adapters import AdapterPool
from fortwo.execution.cpu import CpuBackend
from fortwo.execution.cuda import CudaBackend
from fortwo.execution.generic import GenericBackend
from fortwo.execution.parts import Computed, Part
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora, Update
from fortwo.nn.network import Network
from fortwo.nn.packing import Pack


class Backend(Protocol):
    """A decoder, and how it is computed. Use it on the device's thread.

    kv_dtype: the type in which it reads and writes keys and values; adapters: those that prefill and decode know.
    """

    @property
    def decoder(self) -> Network: ...
    @property
    def kv_dtype(self) -> torch.dtype: ...
    @property
    def adapters(self) -> AdapterPool: ...

    def with_decoder(self, decoder: Network) -> Backend:
        """A backend of the same kind for another network on the same device, without adapters."""

    def warm(self) -> None:
        """Do what the first request would have to wait for."""

    def prefill(self, parts: Sequence[Part]) -> Iterator[Computed]:
        """Hidden states after the final norm of parts of several sequences, some parts after the other. Keys and values
        of their tokens are written to their slots, which have room for them."""

    def decode(self, parts: Sequence[Part]) -> Tensor:
        """Hidden states (B, D) after the final norm of one token of each of B sequences; else as `prefill`. The slots
        may move to other rows of their pools."""

    def forward(self, packed: Pack, segments: Sequence[Update] = ()) -> Tensor:
        """Hidden states (T, D) after the final norm of packed rows, without gradients and without the cache."""

    def train(self, packed: Pack, lora: Lora, checkpointing: bool = False, x_TD: Tensor | None = None) -> Tensor:
        """Hidden states (T, D) after the final norm of packed rows, with a gradient for the adapter, whose dropout is
        drawn.

        lora: flattened; its gradients are added to. checkpointing: as in `Decoder.through_layers`. x_TD: what the first
        layer reads, if not the tokens' embeddings. The backward must come before the next call.
        """

    def release(self) -> None:
        """Free the memory that `train` keeps for its next call."""


def backend_for(decoder: Network) -> Backend:
    """The fastest backend for the network and its device."""
    if not isinstance(decoder, Decoder):
        return GenericBackend(decoder)
    return CpuBackend(decoder) if decoder.device.type == "cpu" else CudaBackend(decoder)
