"""Weights in groups of 32 inputs, in 4, 5, 6 or 8 bits, for the kernels in quantized_gemm.c, which has the layout.

They hold what GGUF's types can express: see `blocks`. Shape suffixes: O out, I in, T rows, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.kernels import cpu
from fortwo.quantization import matmul
from fortwo.quantization.tiles import Memory

GROUP, TILE = 32, 16
QUADS = GROUP // 4
MIDDLE = {6: 32, 8: 128}  # the code of zero, where a group has no minimum


@dataclass(frozen=True)
class Grouped:
    """Codes and, for each group of 32 inputs of an output, fp16 scale and minimum: w = scale * q + minimum, q of 4 or 5
    bits; or w = scale * (q - 128), q of 8 bits; or w = scale * (q - 32), q of 6 bits, with a scale for each half of a
    group.

    x is rounded to 16 bits in the same groups, sums are exact whole numbers; of many rows both are rounded to bf16
    where that is faster (kernels.cpu.widening_rows). Without kernels it is made dense for each product.
    """

    bits: int
    shape: tuple[int, int]
    q: Tensor  # (tiles, G, 64 * bits)
    scale_OG: Tensor  # (tiles, G, 16); with 6 bits (tiles, 2 * G, 16)
    minimum_OG: Tensor | None  # (tiles, G, 16) with 4 and 5 bits

    @staticmethod
    def fits(weight_OI: Tensor) -> bool:
        """Whether `of` takes the weight here."""
        return weight_OI.shape[1] % GROUP == 0 and cpu.usable(weight_OI.new_empty(0, dtype=torch.float32))

    @classmethod
    def of(cls, weight_OI: Tensor, bits: int, arena: Memory) -> Grouped:
        """The weight rounded to 4 or 8 bits. What came from GGUF's Q4_1 or Q8_0 is the same again."""
        O, I = weight_OI.shape  # noqa: E741
        tiles, G = -(-O // TILE), I // GROUP
        weight_OI = weight_OI.float().contiguous()
        groups_OG = weight_OI.view(O, G, GROUP)
        if bits == 4:
            minimum_OG = groups_OG.amin(-1).half()
            scale_OG = ((groups_OG.amax(-1) - groups_OG.amin(-1)) / 15).half()
        else:
            scale_OG = (groups_OG.abs().amax(-1) / 127).half()
            minimum_OG = None
        start_OG = scale_OG.float() * -128 if minimum_OG is None else minimum_OG.float()
        q = torch.zeros(tiles, G, GROUP * TILE * bits // 8, dtype=torch.uint8)
        cpu.kernels().quantize(bits, O, I, weight_OI, scale_OG.float(), start_OG, q)
        return cls._held(bits, (O, I), q, scale_OG, minimum_OG, arena)

    @classmethod
    def of_codes(
        cls, bits: int, codes_OI: Tensor, scale_OG: Tensor, minimum_OG: Tensor | None, arena: Memory
    ) -> Grouped:
        """Of codes (uint8), scales (O, G; with 6 bits O, 2 * G) and minima (O, G) that are there already."""
        O, I = codes_OI.shape  # noqa: E741
        tiles, G = -(-O // TILE), I // GROUP
        padded = F.pad(codes_OI, (0, 0, 0, tiles * TILE - O)).view(tiles, TILE, G, QUADS, 4)
        quads = padded.permute(0, 2, 3, 1, 4).reshape(tiles, G, QUADS, 4 * TILE)
        return cls._held(bits, (O, I), _packed(quads, bits), scale_OG, minimum_OG, arena)

    @classmethod
    def _held(
        cls,
        bits: int,
        shape: tuple[int, int],
        q: Tensor,
        scale_OG: Tensor,
        minimum_OG: Tensor | None,
        arena: Memory,
    ) -> Grouped:
        def tiled(given_OG: Tensor) -> Tensor:
            O, G = given_OG.shape  # noqa: E741
            return F.pad(given_OG.half(), (0, 0, 0, -O % TILE)).view(-1, TILE, G).transpose(1, 2).contiguous()

        minimum = None if minimum_OG is None else arena.hold(tiled(minimum_OG))
        return cls(bits, shape, arena.hold(q), arena.hold(tiled(scale_OG)), minimum)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.q, self.scale_OG, self.minimum_OG) if tensor is not None)

    @cached_property
    def struct(self) -> Any:
        """The quantized_weight, as the fields' values."""
        return quantized_weight([self])

    def product(self, x_TI: Tensor) -> Tensor:
        if not cpu.usable(x_TI):
            return matmul.product(x_TI, self.dense())
        return _product(self.struct, self.shape[0], x_TI)

    def dense(self) -> Tensor:
        O, I = self.shape  # noqa: E741
        tiles, G = self.q.shape[:2]
        quads = _unpacked(self.q, self.bits).view(tiles, G, QUADS, TILE, 4)
        codes = quads.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, I)

        def plain(tiled: Tensor) -> Tensor:
            return tiled.transpose(1, 2).reshape(tiles * TILE, -1)

        minimum_OG = None if self.minimum_OG is None else plain(self.minimum_OG)
        return _values(self.bits, codes, plain(self.scale_OG), minimum_OG)[:O]

    def rows(self, numbers_T: Tensor) -> Tensor:
        """Rows of the weight (T, I) as fp32."""
        tiles, G = self.q.shape[:2]
        tile_T, at_T = numbers_T // TILE, numbers_T % TILE
        packed = self.q.view(tiles, G, self.bits, TILE, 4)[tile_T, :, :, at_T]  # (T, G, bits, 4)
        codes = _unpacked(packed.flatten(2), self.bits).view(len(packed), self.shape[1])
        minimum_TG = None if self.minimum_OG is None else self.minimum_OG[tile_T, :, at_T]
        return _values(self.bits, codes, self.scale_OG[tile_T, :, at_T], minimum_TG)


@dataclass(frozen=True)
class Parts:
    """Several weights of one width below each other, each in bits of its own."""

    parts: tuple[Grouped, ...]

    @staticmethod
    def fits(outputs: Sequence[int]) -> bool:
        """Whether weights of so many outputs can be parts: the kernels take up to three, and whole tiles of all but the
        last."""
        return len(outputs) <= 3 and all(count % TILE == 0 for count in outputs[:-1])

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def struct(self) -> Any:
        """The quantized_weight, as the fields' values."""
        return quantized_weight(self.parts)

    def product(self, x_TI: Tensor) -> Tensor:
        if not cpu.usable(x_TI):
            return torch.cat([part.product(x_TI) for part in self.parts], 1)
        return _product(self.struct, self.shape[0], x_TI)

    def dense(self) -> Tensor:
        return torch.cat([part.dense() for part in self.parts])

    def rows(self, numbers_T: Tensor) -> Tensor:
        """Rows of the weight (T, I) as fp32."""
        found = torch.empty(len(numbers_T), self.shape[1])
        first = 0
        for part in self.parts:
            own = (numbers_T >= first) & (numbers_T < first + part.shape[0])
            found[own] = part.rows(numbers_T[own] - first)
            first += part.shape[0]
        return found


def quantized_weight(parts: Sequence[Grouped]) -> tuple[Any, ...]:
    """The values of a quantized_weight; the parts must outlive it."""
    rows, first = [], 0
    for part in parts:
        rows.append((first, part.bits, *map(cpu.pointer, (part.q, part.scale_OG, part.minimum_OG))))
        first += part.shape[0]
    return first, parts[0].shape[1], len(rows), rows


def _product(struct: tuple[Any, ...], outputs: int, x_TI: Tensor) -> Tensor:
    T = x_TI.shape[0]
    y_TO = x_TI.new_empty(T, outputs)
    kernels = cpu.kernels()
    rows = cpu.widening_rows()
    multiply = kernels.quantized_gemm if rows is None or rows > T else kernels.quantized_gemm_tiled
    multiply(cpu.ffi.new("quantized_weight *", struct), T, x_TI.contiguous(), y_TO)
    return y_TO


def _packed(quads: Tensor, bits: int) -> Tensor:
    """Codes (tiles, G, 8, N) of eight quads as the kernels read them (tiles, G, bits * N)."""
    if bits == 8:
        return quads.flatten(2)
    low = quads & 15
    found = [low[:, :, 0::2] | low[:, :, 1::2] << 4]
    if bits > 4:
        wide = bits - 4
        high = quads >> 4
        each = 8 // wide  # quads whose high bits share a byte
        for first in range(0, QUADS, each):
            shared = torch.zeros_like(high[:, :, 0])
            for i in range(each):
                shared |= high[:, :, first + i] << (i * wide)
            found.append(shared[:, :, None])
    return torch.cat(found, 2).flatten(2)


def _unpacked(q: Tensor, bits: int) -> Tensor:
    """Codes (tiles, G, 8, N) of what `_packed` made."""
    if bits == 8:
        whole: Tensor = q.unflatten(2, (QUADS, q.shape[2] // QUADS))
        return whole
    rows = q.unflatten(2, (bits, q.shape[2] // bits))
    halves = rows[:, :, : QUADS // 2]
    codes = torch.stack([halves & 15, halves >> 4], 3).flatten(2, 3)
    if bits > 4:
        wide = bits - 4
        each = 8 // wide
        for i in range(QUADS):
            high = rows[:, :, QUADS // 2 + i // each] >> (i % each * wide)
            codes[:, :, i] |= (high & (1 << wide) - 1) << 4
    return codes


def _values(bits: int, codes_OI: Tensor, scale_OG: Tensor, minimum_OG: Tensor | None) -> Tensor:
    """The reference of the format: fp32 numbers of codes (O, I), scales and minima (O, G)."""
    O, G = scale_OG.shape  # noqa: E741
    codes, scale_OG1 = codes_OI.reshape(O, G, codes_OI.shape[1] // G), scale_OG.float()[:, :, None]
    start_OG1 = scale_OG1 * -MIDDLE[bits] if minimum_OG is None else minimum_OG.float()[:, :, None]
    values: Tensor = codes * scale_OG1 + start_OG1
    return values.flatten(1)
