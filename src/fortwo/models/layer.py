"""A layer of the decoder to train an adapter on, by one kernel there and one back (layer.h), in bf16 on AMX's tiles.

The same operations, and the same numbers to the bit, as the decoder's own, one after the other. Shape suffixes as in
`decoder`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fortwo.models import kernels
from fortwo.models.functions import kept_of
from fortwo.models.lora import LoraGroup, Place, Segment, Update, draw_seed
from fortwo.models.lora_config import GROUPS
from fortwo.models.tiles import Tiles

if TYPE_CHECKING:
    from fortwo.models.decoder import DecoderConfig, Layer

Packed = tuple[int, Tensor]  # of an attention over packed rows: tokens of the prefix; starts and lengths (2, R)


_PRODUCT = struct.Struct("2P4q" + 3 * "P3qd")  # layer.h's `adapted`
_LAYER = struct.Struct("5qd2P")  # what comes before its four products


class WholeLayer:
    """One layer as it is trained, for one forward and the backward that follows."""

    def __init__(self, config: DecoderConfig, layer: Layer, groups: dict[str, LoraGroup], p: float) -> None:
        """p: of the adapter's dropout."""
        self._config, self._layer, self._groups = config, layer, groups
        self._kept = kept_of(p) if p else 0
        self._seeds = [draw_seed() if p and name in groups else 0 for name in GROUPS]
        self.parameters = [tensor for name in GROUPS if name in groups for tensor in groups[name].tensors]

    @staticmethod
    def fits(config: DecoderConfig, layer: Layer, segments: Iterable[Update]) -> bool:
        """Whether there is such a kernel."""
        if not torch.is_grad_enabled() or config.qkv_bias or config.qk_norm or config.head_size % 32:
            return False
        weights = layer.qkv_OD, layer.o_DI, layer.gate_up_OD, layer.down_DI
        of_one = all(isinstance(segment, Segment) and segment.everywhere for segment in segments)
        return of_one and all(isinstance(weight, Tiles) for weight in weights)

    def told(self, tensors: Sequence[Tensor]) -> bytes:
        """layer.h's `trained_layer`, with these parameters."""
        c, layer = self._config, self._layer
        norms = layer.attention_norm_D.data_ptr(), layer.mlp_norm_D.data_ptr()
        told = _LAYER.pack(c.hidden, c.heads, c.kv_heads, c.head_size, self._kept, c.norm_eps, *norms)
        weights, given = (layer.qkv_OD, layer.o_DI, layer.gate_up_OD, layer.down_DI), iter(tensors)
        for name, weight_OI, seed in zip(GROUPS, weights, self._seeds, strict=True):
            assert isinstance(weight_OI, Tiles)
            places: tuple[Place, ...] = ()
            targets, A, R = list[float](), 0, 0
            if (group := self._groups.get(name)) is not None:
                A_RI = next(given)
                places, A, R = group.places, A_RI.data_ptr(), len(A_RI)
            for place in places:
                targets += [
                    next(given).data_ptr(),
                    place.columns.start,
                    *_sizes(place.columns, place.rows),
                    place.scale,
                ]
            targets += [0, 0, 0, 0, 0.0] * (3 - len(places))
            told += _PRODUCT.pack(weight_OI.laid.data_ptr(), A, *weight_OI.shape, R, seed, *targets)
        return told


class _WholeLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        whole: WholeLayer,
        packed: Packed,
        angles: tuple[Tensor, Tensor],
        x_TD: Tensor,
        update_TD: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        T, told = len(x_TD), whole.told(parameters)
        bytes_1 = torch.empty(1, dtype=torch.int64)
        kernels.call("layer_bytes", None, T, told, bytes_1)
        memory = torch.empty(int(bytes_1), dtype=torch.uint8)
        middle_TD, sum_TD = torch.empty_like(x_TD), torch.empty_like(x_TD, dtype=torch.bfloat16)
        given = T, told, memory, *_rows(packed), *angles, x_TD, update_TD
        kernels.call("layer_forward", None, *given, middle_TD, sum_TD)
        ctx.save_for_backward(memory, middle_TD, *parameters)
        ctx.whole, ctx.told, ctx.packed, ctx.angles, ctx.added = whole, told, packed, angles, update_TD is not None
        return middle_TD, sum_TD

    @staticmethod
    def backward(ctx: Any, along_TD: Tensor, grad_TD: Tensor) -> Any:
        memory, middle_TD, *parameters = ctx.saved_tensors
        sizes = [parameter.numel() for parameter in parameters]
        parts = middle_TD.new_empty(sum(sizes)).split(sizes)
        gradients = [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
        along_TD, grad_TD = along_TD.contiguous(), grad_TD.contiguous()
        grad_x_TD = torch.empty_like(along_TD) if ctx.needs_input_grad[3] else None
        grad_update_TD = torch.empty_like(grad_TD) if ctx.added and grad_x_TD is not None else None
        told = len(middle_TD), ctx.told, ctx.whole.told(gradients)
        given = memory, *_rows(ctx.packed), *ctx.angles, middle_TD, along_TD, grad_TD
        kernels.call("layer_backward", None, *told, *given, grad_x_TD, grad_update_TD)
        return (None, None, None, grad_x_TD, grad_update_TD, *gradients)


def whole_layer(
    whole: WholeLayer, packed: Packed, angles: tuple[Tensor, Tensor], x_TD: Tensor, update_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What comes after the layer: x (T, D) with update (T, D; bf16) and attention added, and what the layer adds last.

    angles: cos and sin (T, E).
    """
    found: tuple[Tensor, Tensor]
    found = _WholeLayer.apply(whole, packed, angles, x_TD, update_TD, *whole.parameters)  # type: ignore[no-untyped-call]
    return found


def _rows(packed: Packed) -> tuple[int, int, Tensor, Tensor]:
    prefix, rows_2R = packed
    return prefix, rows_2R.shape[1], rows_2R[0], rows_2R[1]


def _sizes(*parts: slice) -> list[int]:
    return [int(part.stop - part.start) for part in parts]
