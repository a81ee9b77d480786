"""NF4: 4-bit NormalFloat in blocks of 64 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314).

Levels and layout are bitsandbytes'. A product makes the weight dense part by part and throws each part away: what is in
memory is the codes and one part; where the processor has tiles (gemm_bf16.c), a part is what fits into a core's cache.
Shape suffixes as in `formats`; B blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.kernels import cpu, cuda, reference
from fortwo.quantization import matmul
from fortwo.quantization.tiles import Memory

BLOCK, SHARED = 64, 256  # weights to a largest value, largest values to a scale
PIECE = 1 << 24  # weights that are quantised at once
SUMMED = 2048  # outputs whose part of a gradient is one product from the codes
PART = 8 << 20  # bytes of a dense part: what is read again soon after it is written
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """256 numbers from near -1 to 1, denser towards 0: seven decades, each with twice as many steps as the one below
    (Dettmers 2016, arXiv:1511.04561)."""
    middles = []
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1)
        middles.append((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(middles)
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values.to(device)


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


def _nearest(value: Tensor, steps: Tensor) -> Tensor:
    """Which of the rising `steps` is nearest."""
    return torch.bucketize(value, (steps[1:] + steps[:-1]) / 2).to(torch.uint8)


@dataclass(frozen=True)
class Nf4:
    """A weight (O, I): the nearest of 16 levels of a block's largest magnitude, which is held in 8 bits itself, as
    map[code] * scale + offset, one scale for 256 blocks."""

    shape: tuple[int, int]
    codes: Tensor  # (B, 32), two a byte, the first in the high half
    largest_B: Tensor  # codes of the dynamic map
    scale_S: Tensor
    offset: Tensor

    @staticmethod
    def fits(weight_OI: Tensor) -> bool:
        return weight_OI.numel() % BLOCK == 0

    @classmethod
    def of(cls, weight_OI: Tensor, memory: Memory) -> Nf4:
        """A piece at a time: what it takes beside the weight is small."""
        O, I = weight_OI.shape  # noqa: E741
        device = weight_OI.device
        flat = weight_OI.reshape(-1)
        codes = torch.empty(len(flat) // BLOCK, BLOCK // 2, dtype=torch.uint8, device=device)
        largest_B = torch.empty(len(codes), device=device)
        for begin in range(0, len(codes), PIECE // BLOCK):
            piece = slice(begin, begin + PIECE // BLOCK)
            blocks = flat[begin * BLOCK : (begin + PIECE // BLOCK) * BLOCK].float().view(-1, BLOCK)
            quantise(blocks, codes[piece], largest_B[piece])
        offset = largest_B.mean()
        shared = F.pad(largest_B - offset, (0, -len(largest_B) % SHARED)).view(-1, SHARED)
        scale_S = shared.abs().amax(-1)
        found = _nearest(shared / scale_S.clamp_min(1e-30)[:, None], dynamic_map(device))
        largest_B = found.view(-1)[: len(largest_B)]
        return cls((O, I), memory.hold(codes), memory.hold(largest_B), scale_S, offset)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.largest_B.nbytes + self.scale_S.nbytes + self.offset.nbytes

    def dense(self) -> Tensor:
        return self.part(0, self.shape[0], torch.float32)

    def part(self, first: int, last: int, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """Outputs first .. last - 1 as a tensor (last - first, I), at the beginning of `into` if that is given; whole
        blocks: first * I and last * I are multiples of 64."""
        I = self.shape[1]  # noqa: E741
        begin, blocks, device = first * I // BLOCK, (last - first) * I // BLOCK, self.codes.device
        out = torch.empty(blocks * BLOCK, dtype=dtype, device=device) if into is None else into[: blocks * BLOCK]
        if cuda.fused(out, self.scale_S):
            cuda.run("nf4_dense", out, begin, blocks, self.codes, *self._tables(), out)
        else:
            out.copy_(plain(self, begin, begin + blocks).view(-1))
        return out.view(last - first, I)

    def product(self, x_TI: Tensor) -> Tensor:
        bf16 = matmul.multiplies_bf16(x_TI.device)
        return self.forward(x_TI, torch.bfloat16 if bf16 else torch.float32, torch.float32)

    def forward(self, x_TI: Tensor, dtype: torch.dtype, result: torch.dtype) -> Tensor:
        """x @ weight.T by products in `dtype`, as `result`."""
        O, I = self.shape  # noqa: E741
        y_TO = x_TI.new_empty(len(x_TI), O, dtype=result)
        x_TI = x_TI.to(dtype)
        if self._multiplies_tiles(x_TI):
            self._product(x_TI.contiguous(), O, I, 0, (I, 1), y_TO)
            return y_TO
        for first, last, part in self._parts(dtype):
            y_TO[:, first:last] = matmul.product(x_TI, part, dtype=result)
        return y_TO

    def backward(self, grad_TO: Tensor, dtype: torch.dtype, result: torch.dtype) -> Tensor:
        """grad @ weight likewise; summed over the parts in fp32."""
        O, I = self.shape  # noqa: E741
        grad_TI = grad_TO.new_zeros(len(grad_TO), I, dtype=torch.float32)
        grad_TO = grad_TO.to(dtype)
        if self._multiplies_tiles(grad_TO):
            grad_TO, part_TI = grad_TO.contiguous(), torch.empty_like(grad_TI)
            for first in range(0, O, SUMMED):
                last = min(first + SUMMED, O)
                self._product(grad_TO[:, first:last], I, last - first, first * I, (1, I), part_TI)
                grad_TI += part_TI
            return grad_TI.to(result)
        for first, last, part in self._parts(dtype):
            grad_TI += matmul.product(grad_TO[:, first:last], part.t(), dtype=torch.float32)
        return grad_TI.to(result)

    def _multiplies_tiles(self, x: Tensor) -> bool:
        """Whether products of this x may be made from the codes themselves."""
        whole = all(size % BLOCK == 0 for size in self.shape)
        return whole and x.dtype == torch.bfloat16 and cpu.usable(x) and cpu.multiplies_tiles()

    def _product(self, a_MK: Tensor, N: int, K: int, begin: int, steps: tuple[int, int], out_MN: Tensor) -> None:
        """a @ b.T, where b (N, K) is the weight from number `begin` on, with `steps` from row to row and column to
        column."""
        left = cpu.pointer(a_MK, strided=True), a_MK.stride(0)
        out = out_MN, N, int(out_MN.dtype == torch.float32)
        cpu.kernels().gemm_nf4(len(a_MK), N, K, *left, self.codes, *self._tables(), begin, *steps, *out)

    def _tables(self) -> tuple[Tensor, ...]:
        device = self.codes.device
        return self.largest_B, dynamic_map(device), self.scale_S, self.offset, _levels(device)

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """(first, last, outputs first .. last - 1); a part is gone when the next one is asked for."""
        O, I = self.shape  # noqa: E741
        step = O if self.codes.device.type != "cpu" else max(BLOCK, PART // (dtype.itemsize * I) // BLOCK * BLOCK)
        into = torch.empty(min(step, O) * I, dtype=dtype, device=self.codes.device)
        for first in range(0, O, step):
            last = min(first + step, O)
            yield first, last, self.part(first, last, dtype, into)


def quantise(blocks: Tensor, codes: Tensor, largest_B: Tensor) -> None:
    """Codes (B, 32) and largest magnitudes of fp32 blocks (B, 64) are written."""
    levels = _levels(blocks.device)
    between = (levels[1:] + levels[:-1]) / 2
    if cpu.usable(blocks):
        cpu.kernels().nf4_quantize(len(blocks), blocks.contiguous(), between, codes, largest_B)
        return
    torch.amax(blocks.abs(), -1, out=largest_B)
    found = _nearest(blocks / largest_B.clamp_min(1e-30)[:, None], levels)
    torch.bitwise_or(found[:, 0::2] << 4, found[:, 1::2], out=codes)


def plain(weight_format: Nf4, first: int, last: int) -> Tensor:
    """Blocks first .. last - 1 by torch's operations, as fp32 (blocks, 64)."""
    device = weight_format.codes.device
    scale_B = weight_format.scale_S[torch.arange(first, last, device=device) // SHARED]
    tables = dynamic_map(device), weight_format.offset, _levels(device)
    return reference.nf4_dense(weight_format.codes[first:last], weight_format.largest_B[first:last], scale_B, *tables)
