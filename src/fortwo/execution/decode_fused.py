"""A decode step in one kernel (decode_step.c): one new token of each sequence through all layers, its adapter included.

For weights that are held in 4 or 8 bits. `decoder` computes the same from torch's operations, for everything else and
for comparison. Shape suffixes as in `decoder`, and B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fortwo.execution.adapters_int8 import SIXTEEN, Rows
from fortwo.kernels import cpu
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Update
from fortwo.quantization.formats import Weight, WeightFormat
from fortwo.quantization.grouped import Grouped, Parts
from fortwo.quantization.tiles import Tiles

WHOLE_STEP = ("int8", "gguf", "int4")  # formats that there is a kernel for
OUTSIDE = frozenset({"norm_offset", "logit_scale", "logit_softcap", "joined_projections"})
"""Features of a network that are in its weights, or behind its layers: every kernel computes it with them."""
WINDOWS = frozenset({"window", "windowed"})
"""Features that a kernel without windows computes as long as no sequence is longer than the window."""
COMPUTED = OUTSIDE | WINDOWS | {"qkv_bias", "qk_norm"}
"""Features that the kernels for steps and for prompts compute."""


class Step:
    """The decoder's step; `takes` says for how many rows it is there."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tables: dict[str, Any] = {}  # by format: each decoder_layer
        self._shape = Shape(decoder)
        held = all(isinstance(weight, Weight) for weight in (decoder.layers[0].qkv_OD, decoder.head))
        self._fits = held and cpu.usable(decoder.norm_D) and self.fits(decoder.config)

    @staticmethod
    def fits(config: DecoderConfig) -> bool:
        """Whether the kernel computes the network's features, and all of its sizes are whole sixteens."""
        c = config
        return c.features <= COMPUTED and all(size % SIXTEEN == 0 for size in (c.hidden, c.intermediate, c.head_size))

    @property
    def laid(self) -> bool:
        """Whether adapters are to be laid out for the kernel, and keys and values are in fp16."""
        return self._fits

    def takes(self, rows: int) -> bool:
        """Whether this many rows are multiplied with weights in 4 or 8 bits."""
        weight = self._decoder.layers[0].qkv_OD
        return self._fits and isinstance(weight, Weight) and weight.choice.format_for(rows) in WHOLE_STEP

    def __call__(self, rows: Sequence[tuple[int, int, Sequence[int]]], updates: Sequence[Update]) -> Tensor:
        """Hidden states (B, D) after the final norm. rows: of each its token, its position, and the cache_place of
        its keys and values, which have room there."""
        decoder, B = self._decoder, len(rows)
        weight = decoder.layers[0].qkv_OD
        assert isinstance(weight, Weight)
        weight_format = weight.choice.format_for(B)
        if weight_format not in self._tables:
            self._tables[weight_format] = layers_of(decoder, weight_format)
        shape, numbers = self._shape.embedding([token for token, _, _ in rows])
        tokens = [
            (number, position, place_of(place)) for number, (_, position, place) in zip(numbers, rows, strict=True)
        ]
        hidden_BD = torch.empty(B, decoder.config.hidden)
        told = self._tables[weight_format], cpu.array("new_token", tokens), *answering(updates)
        cpu.kernels().decode_step(B, shape, *told, hidden_BD)
        return hidden_BD


class Shape:
    """The decoder_shape; the decoder must outlive it."""

    def __init__(self, decoder: Decoder) -> None:
        c = decoder.config
        sizes = c.layers, c.hidden, c.heads, c.kv_heads, c.head_size, c.intermediate, c.norm_eps
        embedding_VD = decoder.embedding_VD
        table = None if isinstance(embedding_VD, Weight) else embedding_VD
        tensors = table, decoder.norm_D, decoder.inverse_frequency_E2
        self._struct = cpu.ffi.new("decoder_shape *", (*sizes, *map(cpu.pointer, tensors)))
        self._embedding_VD = embedding_VD
        self._read = table

    def embedding(self, tokens: Sequence[int]) -> tuple[Any, Sequence[int]]:
        """The struct, and the rows of its embedding where those of the tokens are: until the next call, of an embedding
        that is held in a format the rows of these tokens alone."""
        if not isinstance(self._embedding_VD, Weight):
            return self._struct, tokens
        self._read = self._embedding_VD.rows(torch.tensor(tokens))
        self._struct.embedding = cpu.pointer(self._read)
        return self._struct, range(len(tokens))


def layers_of(decoder: Decoder, weight_format: str) -> Any:
    """The decoder_layer of each; the decoder must outlive them."""
    rows = []
    for layer in decoder.layers:
        weights = [_quantized_weight(getattr(layer, name).formats[weight_format]) for name in _PRODUCTS]
        rows.append((*(cpu.pointer(getattr(layer, name)) for name in _SMALL), weights))
    return cpu.array("decoder_layer", rows)


def place_of(place: Sequence[int]) -> tuple[Any, ...]:
    """The cache_place of addresses of keys and of values, and of steps from layer to layer and from head to head."""
    return _ADDRESS + place[0], _ADDRESS + place[1], *place[2:]


def answering(updates: Sequence[Update]) -> tuple[int, Any, Tensor | None]:
    """How many adapters answer for rows, the adapter of each, and members."""
    if not updates:
        return 0, None, None
    (rows,) = updates
    assert isinstance(rows, Rows)
    return len(rows.adapters), rows.adapters, rows.members


def _quantized_weight(weight_format: WeightFormat) -> tuple[Any, ...]:
    """The quantized_weight; of weights in 16 bits the panels."""
    if isinstance(weight_format, Tiles):
        laid = cpu.ffi.cast("uint8_t *", weight_format.laid.data_ptr())
        return *weight_format.shape, 1, [(0, 16, laid, cpu.ffi.NULL, cpu.ffi.NULL)]
    assert isinstance(weight_format, Grouped | Parts)
    struct: tuple[Any, ...] = weight_format.struct
    return struct


_ADDRESS = cpu.ffi.cast("char *", 0)
_SMALL = ("attention_norm_D", "mlp_norm_D", "qkv_bias_O", "q_norm_E", "k_norm_E")
_PRODUCTS = ("qkv_OD", "o_DI", "gate_up_OD", "down_DI")
