"""A decode step in one kernel (step.h): one new token of each sequence through all layers, its adapter included.

For weights that are held in 4 or 8 bits. `decoder` computes the same from torch's operations, for everything else and
for comparison. Shape suffixes as in `decoder`, and B rows, L layers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fortwo.models import kernels
from fortwo.models.decoder import Decoder, DecoderConfig
from fortwo.models.forms import Grouped, Weight
from fortwo.models.laid import SIXTEEN, Rows
from fortwo.models.lora import Update

WHOLE_STEP = ("int8", "int4")  # forms that there is a kernel for


class Step:
    """The decoder's step; `takes` says for how many rows it is there."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tables: dict[str, Tensor] = {}  # by form: step.h's layers
        c = decoder.config
        sizes = [c.layers, c.hidden, c.heads, c.kv_heads, c.head_size, c.intermediate, _bits(c.norm_eps)]
        self._shape = torch.tensor(sizes)
        held = all(isinstance(weight, Weight) for weight in (decoder.layers[0].qkv_OD, decoder.head))
        self._fits = held and kernels.usable(decoder.embedding_VD) and self.fits(c)

    @staticmethod
    def fits(config: DecoderConfig) -> bool:
        """Whether all of the network's sizes are whole sixteens."""
        c = config
        return all(size % SIXTEEN == 0 for size in (c.hidden, c.intermediate, c.head_size))

    @property
    def laid(self) -> bool:
        """Whether adapters are to be laid out for the kernel."""
        return self._fits

    @property
    def tiles(self) -> bool:
        """Whether attention over prompts may be in bf16, as their products are: where that is the processor's."""
        return self._fits and kernels.multiplies_tiles()

    def takes(self, rows: int) -> bool:
        """Whether this many rows are multiplied with weights in 4 or 8 bits."""
        weight = self._decoder.layers[0].qkv_OD
        return self._fits and isinstance(weight, Weight) and weight.choice.form(rows) in WHOLE_STEP

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, places_LB5: Tensor, updates: Sequence[Update]) -> Tensor:
        """Hidden states (B, D) after the final norm. places: step.h's `place` of each row's keys and values, which have
        room at positions_B."""
        decoder, B = self._decoder, len(tokens_B)
        weight = decoder.layers[0].qkv_OD
        assert isinstance(weight, Weight)
        form = weight.choice.form(B)
        if form not in self._tables:
            self._tables[form] = torch.tensor([_layer(layer, form) for layer in decoder.layers])
        x_BD = decoder.embed(tokens_B)
        cos_BE, sin_BE = decoder.angles(positions_B)
        told: list[Tensor | int | None] = [0, None, None]
        if updates:
            (rows,) = updates
            assert isinstance(rows, Rows)
            told = [len(rows.adapters_N4), rows.adapters_N4, rows.members]
        arguments = (self._shape, self._tables[form], cos_BE, sin_BE, places_LB5, positions_B + 1, *told, x_BD)
        kernels.call("decode_layers", None, B, *arguments)
        return decoder.norm(x_BD)


def _layer(layer: object, form: str) -> list[int]:
    """step.h's `layer`."""
    found = [_address(getattr(layer, name)) for name in _SMALL]
    for name in ("qkv_OD", "o_DI", "gate_up_OD", "down_DI"):
        held = getattr(layer, name).forms[form]
        assert isinstance(held, Grouped)
        found += [held.bits, *held.shape, *map(_address, (held.q, held.scale_OG, held.minimum_OG))]
    return found


_SMALL = ("attention_norm_D", "mlp_norm_D", "qkv_bias_O", "q_norm_E", "k_norm_E")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bits(number: float) -> int:
    """A double's bits as a whole number."""
    return int(struct.unpack("q", struct.pack("d", number))[0])
