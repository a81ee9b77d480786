"""A base whose layers lie in parts over the workers of a run, as FSDP lays them (Zhao et al. 2023, arXiv:2304.11277).

Each worker holds 1/N of each weight of each layer. A layer is gathered before its forward and again before its
backward, into memory that is freed when the next layer is gathered. torch's `fully_shard` does this for the parameters
of modules; the decoder's weights are frozen tensors of no module, and need neither gradients nor an optimizer's state.

Workers compute different numbers of passes. One that has nothing to compute takes part in what the others gather, until
all have come to the end (`drain`). Embedding, head, norms and biases are whole in each worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import ClassVar, overload

import torch
import torch.distributed
from torch import Tensor

from fortwo.errors import InvalidRequest
from fortwo.execution.reference import ReferenceBackend
from fortwo.hub import weights
from fortwo.hub.prepared import ModelInfo
from fortwo.kernels import operations
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder, Operations
from fortwo.nn.layer import Layer
from fortwo.nn.lora import Lora
from fortwo.nn.packing import Pack
from fortwo.quantization.formats import Frozen, dense
from fortwo.records import Plan
from fortwo.train.adapter import lora_config

PRODUCTS = 4  # weights of a layer that are sharded
FORMATS = ("fp32", "bf16")
NONE = -(1 << 30)


def check_shardable(held: str, plan: Plan) -> None:
    """Raises InvalidRequest for what cannot be trained on a sharded base. held: FORTWO_WEIGHTS of the run."""
    if held not in FORMATS:
        raise InvalidRequest(
            f"FORTWO_SHARD is set, but a base whose weights are held in {held} cannot be sharded.",
            param="shard",
            hint="Set FORTWO_WEIGHTS to bf16 or fp32, or FORTWO_SHARD to false.",
        )
    if lora_config(plan).use_dora:
        raise InvalidRequest(
            "FORTWO_SHARD is set, but DoRA needs all weights of the base in each worker.",
            param="lora_config.use_dora",
            hint="Leave use_dora out, or set FORTWO_SHARD to false.",
        )


class ShardedLayers(Sequence[Layer]):
    """Layers that are gathered when they are asked for, one at a time. All workers ask for the same ones in the same
    order, or drain."""

    def __init__(self, rank: int, size: int, dtype: torch.dtype, rounded: torch.dtype) -> None:
        self._rank, self._size, self._dtype, self._rounded = rank, size, dtype, rounded
        self._parts: list[tuple[Tensor, Tensor]] = []  # of each weight: the whole, which is mostly empty, and the part
        self._layers: list[Layer] = []
        self._full: int | None = None  # the layer that is whole at present

    def hold(self, weight: Frozen, is_head: bool) -> Frozen:
        """As decoder.Hold: keep this worker's part of a weight."""
        weight_OI = dense(weight, self._rounded).to(self._dtype)
        if is_head:
            return weight_OI
        count = weight_OI.numel()
        each = -(-count // self._size)
        whole_P = weight_OI.new_zeros(each * self._size)
        whole_P[:count] = weight_OI.flatten()
        part_N = whole_P[self._rank * each : (self._rank + 1) * each].clone()
        view_OI = whole_P[:count].view(weight_OI.shape)
        _free(whole_P)
        self._parts.append((whole_P, part_N))
        return view_OI

    def take(self, layers: Sequence[Layer]) -> None:
        """The layers whose weights have been held."""
        self._layers = list(layers)

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            raise TypeError("sharded layers are gathered one at a time")
        self._agree(index)
        self._gather(index)
        return self._layers[index]

    def __iter__(self) -> Iterator[Layer]:
        """The layers as they are, without their weights: for sizes and types."""
        return iter(self._layers)

    def drain(self) -> None:
        """Take part in what other workers gather until none of them gathers any more."""
        while (index := self._agree(NONE)) != NONE:
            self._gather(index)
        self._release()

    def _agree(self, index: int) -> int:
        """The layer that is gathered next; NONE if all workers drain."""
        wanted = torch.tensor([index, NONE if index == NONE else -index], device=self._parts[0][1].device)
        torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
        largest, smallest = wanted.tolist()
        if largest != NONE and largest != -smallest:
            raise RuntimeError(f"workers ask for the layers {-smallest} and {largest} at the same time")
        return int(largest)

    def _gather(self, index: int) -> None:
        self._release()
        for whole_P, part_N in self._parts[PRODUCTS * index : PRODUCTS * (index + 1)]:
            whole_P.untyped_storage().resize_(whole_P.numel() * whole_P.itemsize)
            torch.distributed.all_gather_into_tensor(whole_P, part_N)
        self._full = index

    def _release(self) -> None:
        if self._full is not None:
            for whole_P, _ in self._parts[PRODUCTS * self._full : PRODUCTS * (self._full + 1)]:
                _free(whole_P)
            self._full = None


class ShardedBackend(ReferenceBackend):
    """Trains on a sharded base, always with checkpoints of layers: what a layer needs is there again in its
    backward."""

    operations: ClassVar[Operations] = operations

    def train(self, packed: Pack, lora: Lora, checkpointing: bool = False, x_TD: Tensor | None = None) -> Tensor:
        return super().train(packed, lora, True, x_TD)


def read_sharded(
    info: ModelInfo, device: torch.device, held: str, bf16: bool, rank: int, size: int
) -> tuple[ShardedBackend, ShardedLayers]:
    """The base from its folder, of which one weight after the other is read. held: FORTWO_WEIGHTS, one of FORMATS;
    bf16: as in the plan. Raises UnsupportedModel for a network that only transformers knows."""
    config = DecoderConfig.from_hf(json.loads((info.directory / "config.json").read_text("utf-8-sig")))
    rounded = torch.bfloat16 if held == "bf16" else torch.float32
    layers = ShardedLayers(rank, size, torch.bfloat16 if bf16 else torch.float32, rounded)
    decoder = Decoder(config, weights.open_tensors(info.directory), device, layers.hold)
    layers.take(decoder.layers)
    decoder.layers = layers
    return ShardedBackend(decoder), layers


def _free(whole_P: Tensor) -> None:
    whole_P.untyped_storage().resize_(0)
