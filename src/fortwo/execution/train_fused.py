"""The decoder's layers to train an adapter on, by one kernel there and one back, in bf16
(train_layers.c), on processors with AMX or AVX-512.

The same numbers to the bit as the decoder's own operations find, one after the other. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fortwo.execution.decode_fused import OUTSIDE, WINDOWS
from fortwo.execution.packed_fused import Packed
from fortwo.kernels import cpu
from fortwo.kernels.operations import kept_of
from fortwo.nn.config import DecoderConfig
from fortwo.nn.layer import Layer
from fortwo.nn.lora import Lora, Seeds
from fortwo.nn.lora_config import GROUPS
from fortwo.nn.lora_group import LoraGroup
from fortwo.quantization.formats import Frozen, HugePageArena
from fortwo.quantization.tiles import PANEL, Tiles

COMPUTED = OUTSIDE | WINDOWS | {"embedding_scale", "rope_amplitude"}
"""Features of a network that the kernel computes."""


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


def trained_whole(config: DecoderConfig, layers: Sequence[Layer]) -> bool:
    """Whether there is such a kernel."""
    c = config
    whole = all(size % PANEL == 0 for size in (c.hidden, c.head_size, c.intermediate))
    return (
        whole
        and c.features <= COMPUTED
        and all(isinstance(weight, Tiles) for layer in layers for weight in _weights(layer))
    )


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
        sizes = len(layers), T, *shape, kept, again, c.norm_eps, prefix, rows_2R.shape[1]
        self._pass = cpu.ffi.new("training_pass *", (*sizes, *map(cpu.pointer, (*rows_2R, *angles))))
        table = []
        for index, layer in enumerate(layers):
            products = [
                _product(weight_OI, lora.layers[index].get(name), seeds.get((index, name), 0))
                for name, weight_OI in zip(GROUPS, _weights(layer), strict=True)
            ]
            norms = cpu.pointer(layer.attention_norm_D), cpu.pointer(layer.mlp_norm_D)
            table.append((cpu.ffi.NULL, cpu.ffi.NULL, *norms, *products))
        self._layers = cpu.array("train_layer", table)

    def forward(self, x_TD: Tensor) -> Tensor:
        """What comes after the last layer."""
        bytes_L = torch.empty(len(self._layers), dtype=torch.int64)
        cpu.kernels().train_layers_bytes(self._pass, self._layers, bytes_L)
        memory = [int(bytes_L.max())] if self._again else bytes_L.tolist()
        room = _room(self._scratch, sum(memory) + x_TD.nbytes * (len(bytes_L) - 1))
        own = cpu.ffi.cast("char *", room.data_ptr())
        x, following = cpu.pointer(x_TD), cpu.ffi.cast("float *", own + sum(memory))
        for place, layer in enumerate(self._layers):
            layer.x, layer.memory = x, own
            own += 0 if self._again else memory[place]
            x, following = following, following + x_TD.numel()
        self._x_TD, out_TD = x_TD, torch.empty_like(x_TD)
        self._room: Tensor | None = room
        cpu.kernels().train_layers_forward(self._pass, self._layers, out_TD)
        return out_TD

    def backward(self, grad_TD: Tensor, wanted: bool) -> Tensor | None:
        """The gradient of x, if it is wanted."""
        flat_N = self._lora.flat_N
        assert flat_N is not None
        assert flat_N.grad is not None
        grad_x_TD = torch.empty_like(grad_TD) if wanted else None
        apart = flat_N.grad.data_ptr() - flat_N.data_ptr()
        cpu.kernels().train_layers_backward(self._pass, self._layers, grad_TD, apart, grad_x_TD)
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
    return HugePageArena().zeros((nbytes * 5 // 4,), torch.uint8) if room is None or len(room) < nbytes else room


def _weights(layer: Layer) -> tuple[Frozen, ...]:
    return layer.qkv_OD, layer.o_DI, layer.gate_up_OD, layer.down_DI


def _product(weight_OI: Frozen, group: LoraGroup | None, seed: int | Tensor) -> tuple[Any, ...]:
    """The lora_product."""
    assert isinstance(weight_OI, Tiles)
    packed = cpu.pointer(weight_OI.laid)
    if group is None:
        return packed, cpu.ffi.NULL, *weight_OI.shape
    targets = [
        (cpu.pointer(B_Or), place.columns.start, *B_Or.shape, place.scale)
        for place, B_Or in zip(group.places, group.Bs, strict=True)
    ]
    return packed, cpu.pointer(group.A_RI), *weight_OI.shape, len(group.A_RI), int(seed), targets
