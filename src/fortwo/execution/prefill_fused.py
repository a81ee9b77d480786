"""Prompts through all layers in one kernel (prefill.c), the adapters of each included; steps of many rows, too.

Products are in bf16, on processors with AMX or AVX-512. Weights in 4 to 8 bits are made bf16 for them on AMX, and where
AVX-512 has fast products of pairs. What is carried from layer to layer is fp32. `decoder` computes the same from
torch's operations, for everything else and for comparison. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fortwo.execution.decode_fused import COMPUTED, Shape, Step, answering, layers_of, place_of
from fortwo.kernels import cpu
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Update
from fortwo.quantization.formats import Weight
from fortwo.quantization.tiles import PANEL

WIDENED = ("int8", "gguf", "int4")  # formats of weights that the kernel makes bf16
MANY = 512  # tokens
FEWEST = 24  # rows of a step for which the kernel is faster with tiles, or with weights that are held in bf16


@dataclass(frozen=True)
class Piece:
    """Tokens of a prompt, or those that several prompts begin with, after `before` that are computed already. places:
    cache_place of each of these prompts, whose keys and values have room for them."""

    tokens: Sequence[int]
    before: int
    places: Sequence[Sequence[int]]


class Prefill:
    """takes: whether there is a kernel for this decoder. fewest_tokens, fewest_rows: of prompts and of a step for which
    it is faster than what else computes them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._shape = Shape(decoder)
        weight = decoder.layers[0].qkv_OD
        weight_format = weight.choice.format_for(MANY) if isinstance(weight, Weight) else None
        widened = weight_format in WIDENED
        rows = cpu.widening_rows() if widened else FEWEST
        self.fewest_rows = FEWEST if rows is None else rows
        self.fewest_tokens = 1 if self.fewest_rows <= FEWEST else FEWEST
        computed = weight_format == "bf16" or (widened and rows is not None)
        fits = computed and Step(decoder).laid and self.fits(decoder.config)
        self._layers = layers_of(decoder, weight_format) if weight_format is not None and fits else None

    @staticmethod
    def fits(config: DecoderConfig) -> bool:
        """Whether the kernel computes the network's features, the processor has such products, and all of the network's
        sizes are whole panels."""
        c = config
        whole = all(size % PANEL == 0 for size in (c.hidden, c.intermediate, c.head_size))
        return whole and c.features <= COMPUTED and cpu.multiplies_tiles()

    @property
    def takes(self) -> bool:
        return self._layers is not None

    def __call__(self, pieces: Sequence[Piece], updates: Sequence[Update]) -> Tensor:
        """Hidden states (T, D) after the final norm of all pieces' tokens, one after the other. updates: whose rows
        are these."""
        tokens = [token for piece in pieces for token in piece.tokens]
        places = [place for piece in pieces for place in piece.places]
        table, first, start = [], 0, 0
        for piece in pieces:
            table.append((first, len(piece.places), piece.before, start, len(piece.tokens)))
            first += len(piece.places)
            start += len(piece.tokens)
        hidden_TD = torch.empty(len(tokens), self._decoder.config.hidden)
        told = cpu.array("prompt_piece", table), cpu.array("cache_place", map(place_of, places)), *answering(updates)
        shape, numbers = self._shape.embedding(tokens)
        sizes, rows = (len(tokens), len(pieces)), torch.tensor(numbers)
        cpu.kernels().prefill(*sizes, shape, self._layers, rows, *told, hidden_TD)
        return hidden_TD
