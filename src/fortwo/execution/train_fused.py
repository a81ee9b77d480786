"""The decoder's layers to train an adapter on, by one kernel there and one back (layer.h), in bf16 on AMX's tiles.

The same numbers to the bit as the decoder's own operations find, one after the other. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fortwo.execution.packed_fused import Packed
from fortwo.kernels import cpu
from fortwo.kernels.operations import kept_of
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Layer
from fortwo.nn.lora import Lora, LoraGroup, Seeds
from fortwo.nn.lora_config import GROUPS
from fortwo.quantization.formats import Frozen, Regions
from fortwo.quantization.tiles import PANEL, Tiles


@dataclass
class Scratch:
    """Memory of a forward, kept for the next one."""

    memory: Tensor | None = None


class Trained(Protocol):
    """Layers, for one forward and the backward that follows, which adds to the adapter's gradients where they are."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """What comes after the last layer."""

    def backward(self, grad_TD: Tensor, wanted: bool) -> Tensor | None:
        """The gradient of x, if it is wanted."""


_TRAINING = struct.Struct("9qd2q4P")  # adapted.h's `training`
_LAYER = struct.Struct("4P")  # what layer.h's `trained_layer` has before its four products
_PRODUCT = struct.Struct("2P4q" + 3 * "P3qd")  # `adapted`
_NONE = (0, 0, 0, 0, 0.0)  # a target that there is not


def trained_whole(config: DecoderConfig, layers: Sequence[Layer]) -> bool:
    """Whether there is such a kernel."""
    c = config
    whole = all(size % PANEL == 0 for size in (c.hidden, c.head_size, c.intermediate))
    fits = whole and not c.qkv_bias and not c.qk_norm
    return fits and all(isinstance(weight, Tiles) for layer in layers for weight in _weights(layer))


class TrainedLayers:
    """A pass through the layers.

    seeds: of the adapter's dropout. angles: cos and sin (T, E). again: keep what each layer reads, and compute the
    layer once more when its gradient is wanted. scratch: of the passes before this one.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layers: Sequence[Layer],
        lora: Lora,
        seeds: Seeds,
        packed: Packed,
        angles: tuple[Tensor, Tensor],
        again: bool,
        scratch: Scratch,
    ) -> None:
        c, T, (prefix, rows_2R, _) = config, len(angles[0]), packed
        self._lora, self._held, self._again, self._scratch = lora, (rows_2R, angles), again, scratch
        shape = c.hidden, c.heads, c.kv_heads, c.head_size, c.intermediate
        kept = kept_of(lora.config.dropout) if seeds else 0
        tables = [tensor.data_ptr() for tensor in (*rows_2R, *angles)]
        self._training = _TRAINING.pack(
            len(layers), T, *shape, kept, again, c.norm_eps, prefix, rows_2R.shape[1], *tables
        )
        self._table = bytearray()
        for index, layer in enumerate(layers):
            norms = layer.attention_norm_D.data_ptr(), layer.mlp_norm_D.data_ptr()
            self._table += _LAYER.pack(0, 0, *norms)
            for name, weight_OI in zip(GROUPS, _weights(layer), strict=True):
                group = lora.layers[index].get(name)
                self._table += _product(weight_OI, group, seeds.get((index, name), 0))

    def forward(self, x_TD: Tensor) -> Tensor:
        """What comes after the last layer."""
        size = _LAYER.size + len(GROUPS) * _PRODUCT.size
        bytes_L = torch.empty(len(self._table) // size, dtype=torch.int64)
        cpu.call("layers_bytes", None, self._training, bytes(self._table), bytes_L)
        memory = [int(bytes_L.max())] if self._again else bytes_L.tolist()
        room = _room(self._scratch, sum(memory) + x_TD.nbytes * (len(bytes_L) - 1))
        own = room.data_ptr()
        x, following = x_TD.data_ptr(), own + sum(memory)
        for place in range(len(bytes_L)):
            struct.pack_into("2P", self._table, place * size, x, own)
            own += 0 if self._again else memory[place]
            x, following = following, following + x_TD.nbytes
        self._x_TD, self._told, out_TD = x_TD, bytes(self._table), torch.empty_like(x_TD)
        self._room: Tensor | None = room
        cpu.call("layers_forward", None, self._training, self._told, out_TD)
        return out_TD

    def backward(self, grad_TD: Tensor, wanted: bool) -> Tensor | None:
        """The gradient of x, if it is wanted."""
        flat_N = self._lora.flat_N
        assert flat_N is not None
        assert flat_N.grad is not None
        grad_x_TD = torch.empty_like(grad_TD) if wanted else None
        apart = flat_N.grad.data_ptr() - flat_N.data_ptr()
        cpu.call("layers_backward", None, self._training, self._told, grad_TD, apart, grad_x_TD)
        self._scratch.memory, self._room = self._room, None
        return grad_x_TD


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Trained, x_TD: Tensor, flat_N: Tensor) -> Tensor:
        ctx.layers = layers
        return layers.forward(x_TD.contiguous())

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        return None, ctx.layers.backward(grad_TD.contiguous(), ctx.needs_input_grad[1]), None


def through(layers: Trained, x_TD: Tensor, lora: Lora) -> Tensor:
    """What comes after the last layer (T, D), of x (T, D) fp32."""
    y_TD: Tensor = _Through.apply(layers, x_TD, lora.flat_N)  # type: ignore[no-untyped-call]
    return y_TD


def _room(scratch: Scratch, nbytes: int) -> Tensor:
    """The memory that is there, or new memory with some to spare, since passes differ in their tokens."""
    room, scratch.memory = scratch.memory, None
    return Regions().zeros((nbytes * 5 // 4,), torch.uint8) if room is None or len(room) < nbytes else room


def _weights(layer: Layer) -> tuple[Frozen, ...]:
    return layer.qkv_OD, layer.o_DI, layer.gate_up_OD, layer.down_DI


def _product(weight_OI: Frozen, group: LoraGroup | None, seed: int | Tensor) -> bytes:
    """adapted.h's `adapted`."""
    assert isinstance(weight_OI, Tiles)
    laid = weight_OI.laid.data_ptr()
    if group is None:
        return _PRODUCT.pack(laid, 0, *weight_OI.shape, 0, 0, *_NONE * 3)
    told: list[float] = []
    for place, B_Or in zip(group.places, group.Bs, strict=True):
        told += B_Or.data_ptr(), place.columns.start, *B_Or.shape, place.scale
    told += _NONE * (3 - len(group.places))
    return _PRODUCT.pack(laid, group.A_RI.data_ptr(), *weight_OI.shape, len(group.A_RI), seed, *told)
