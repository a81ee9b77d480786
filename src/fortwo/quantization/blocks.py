"""Weights as a quantised GGUF file has them, and as the kernels multiply with them (`grouped`), not rounded again.

The layouts of ggml's types: a block of 32 numbers (Q4_0 to Q8_0) or 256 (K-quants) has its scales and its codes. A
scale of a K-quant is a product of two numbers, which is rounded to fp16 here (a relative 2^-11 at most).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fortwo.quantization.grouped import Grouped, Parts
from fortwo.quantization.tiles import Memory

Decoded = tuple[int, Tensor, Tensor, Tensor | None]  # bits, codes (O, B, n), scales (O, B, g), minima (O, B, g)


@dataclass(frozen=True)
class Blocks:
    """A weight (O, I). parts: below each other, each the name of ggml's type and its bytes (outputs, bytes of one)."""

    parts: tuple[tuple[str, Tensor], ...]

    @property
    def shape(self) -> tuple[int, int]:
        kind, first = self.parts[0]
        numbers, size, _ = TYPES[kind]
        return sum(len(raw) for _, raw in self.parts), first.shape[1] // size * numbers

    def joined(self, *others: Blocks) -> Blocks:
        """With others of this width below it; neighbours of one type become one part."""
        found: list[tuple[str, Tensor]] = []
        for kind, raw in (part for one in (self, *others) for part in one.parts):
            if found and found[-1][0] == kind:
                found[-1] = kind, torch.cat([found[-1][1], raw])
            else:
                found.append((kind, raw))
        return Blocks(tuple(found))

    def equals(self, other: Blocks) -> bool:
        """Whether both have the same bytes."""
        pairs = zip(self.parts, other.parts, strict=False)
        return len(self.parts) == len(other.parts) and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)

    def grouped(self, arena: Memory) -> Grouped | Parts:
        """As what multiplies. Raises ValueError for parts that do not fit (`Parts.fits`)."""
        if not Parts.fits([len(raw) for _, raw in self.parts]):
            raise ValueError(f"parts of {[len(raw) for _, raw in self.parts]} outputs do not lie in whole tiles")
        held = tuple(_grouped(kind, raw, arena) for kind, raw in self.parts)
        return held[0] if len(held) == 1 else Parts(held)


Read = Tensor | Blocks
"""A weight as a file has it."""


def dense(weight: Read) -> Tensor:
    """The weight as a tensor, of blocks in fp32."""
    return weight.grouped(Plain()).dense() if isinstance(weight, Blocks) else weight


class Plain:
    """A `Memory` of torch's own."""

    def hold(self, tensor: Tensor) -> Tensor:
        return tensor


def _grouped(kind: str, raw: Tensor, arena: Memory) -> Grouped:
    _, size, decode = TYPES[kind]
    bits, codes, scale, minimum = decode(raw.view(len(raw), -1, size))
    return Grouped.of_codes(
        bits, codes.flatten(1), scale.flatten(1), None if minimum is None else minimum.flatten(1), arena
    )


def _fp16(raw: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, as fp32 (O, B, 1)."""
    return raw[..., at : at + 2].contiguous().view(torch.float16).float()


def _halves(bytes: Tensor) -> Tensor:
    """The low halves of all bytes, then the high ones."""
    return torch.cat([bytes & 15, bytes >> 4], -1)


def _bits(bytes: Tensor) -> Tensor:
    """The bits of each byte (..., n) as (..., 8 * n), the lowest first."""
    return (bytes[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _q4_0(raw: Tensor) -> Decoded:
    d = _fp16(raw, 0)
    return 4, _halves(raw[..., 2:]), d, d * -8


def _q4_1(raw: Tensor) -> Decoded:
    return 4, _halves(raw[..., 4:]), _fp16(raw, 0), _fp16(raw, 2)


def _q5_0(raw: Tensor) -> Decoded:
    d = _fp16(raw, 0)
    return 5, _halves(raw[..., 6:]) | _bits(raw[..., 2:6]) << 4, d, d * -16


def _q5_1(raw: Tensor) -> Decoded:
    return 5, _halves(raw[..., 8:]) | _bits(raw[..., 4:8]) << 4, _fp16(raw, 0), _fp16(raw, 2)


def _q8_0(raw: Tensor) -> Decoded:
    return 8, raw[..., 2:] ^ 128, _fp16(raw, 0), None


def _k_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima (O, B, 8) of Q4_K and Q5_K: two fp16 numbers, each times eight of 6 bits."""
    first, second, third = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scale = torch.cat([first & 63, third & 15 | first >> 6 << 4], -1)
    minimum = torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)
    return _fp16(raw, 0) * scale, _fp16(raw, 2) * -minimum.float()


def _k_halves(bytes: Tensor) -> Tensor:
    """Of each 32 bytes the low halves, then the high ones."""
    return _halves(bytes.unflatten(-1, (4, 32))).flatten(-2)


def _q4_k(raw: Tensor) -> Decoded:
    return 4, _k_halves(raw[..., 16:]), *_k_scales(raw)


def _q5_k(raw: Tensor) -> Decoded:
    high = raw[..., 16:48, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return 5, _k_halves(raw[..., 48:]) | high.transpose(-1, -2).flatten(-2) << 4, *_k_scales(raw)


def _q6_k(raw: Tensor) -> Decoded:
    low = _halves(raw[..., :128].unflatten(-1, (2, 64))).flatten(-2)
    pairs = raw[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3
    scale = raw[..., 192:208].contiguous().view(torch.int8).float() * _fp16(raw, 208)
    return 6, low | pairs.flatten(-3) << 4, scale, None


TYPES: dict[str, tuple[int, int, Callable[[Tensor], Decoded]]] = {
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
"""By the name of ggml's type: numbers and bytes of a block, and how it is read (blocks (O, B, bytes) of uint8)."""
