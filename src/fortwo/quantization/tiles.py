"""bf16 products by blocks (gemm_bf16.c), and frozen weights laid out as that kernel reads them.

Sums are fp32. Only where `cpu.multiplies_tiles`. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fortwo.kernels import cpu

PANEL, STEP = 32, 32  # outputs of a panel, inputs of a step
LONGEST_SUM = 8192  # inputs: more of them, and a panel does not lie in a core's cache


class Memory(Protocol):
    """Where weights are to lie."""

    def hold(self, tensor: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Tiles:
    """A frozen bf16 weight (O, I). laid: (panels, steps, 2 tiles, 16 pairs of inputs, 16 outputs, 2), those of the
    transpose where `transposed`: products turn them as they read them."""

    shape: tuple[int, int]
    laid: Tensor
    transposed: bool = False

    dtype: ClassVar[torch.dtype] = torch.bfloat16

    @classmethod
    def of(cls, weight_OI: Tensor, arena: Memory) -> Tiles:
        """weight_OI: bf16, or its transposed view."""
        O, I = weight_OI.shape  # noqa: E741
        laid = torch.empty(-(-O // PANEL), -(-I // STEP), 2, STEP // 2, PANEL // 2, 2, dtype=torch.bfloat16)
        if 1 not in weight_OI.stride():
            weight_OI = weight_OI.contiguous()
        cpu.kernels().pack_panels(O, I, cpu.pointer(weight_OI, strided=True), *weight_OI.stride(), laid)
        return cls((O, I), arena.hold(laid))

    def t(self) -> Tiles:
        return Tiles(self.shape[::-1], self.laid, not self.transposed)

    @property
    def nbytes(self) -> int:
        return self.laid.nbytes

    def product(self, x_TI: Tensor) -> Tensor:
        """x @ weight.T in x's type."""
        return tiled_product(x_TI.bfloat16(), self, dtype=x_TI.dtype)

    def dense(self) -> Tensor:
        if self.transposed:
            return self.t().dense().t()
        panels, steps = self.laid.shape[:2]
        O, I = self.shape  # noqa: E741
        return self.laid.permute(0, 2, 4, 1, 3, 5).reshape(panels * PANEL, steps * STEP)[:O, :I]


def tiled_product(
    x_TI: Tensor,
    weight_OI: Tensor | Tiles,
    more: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """x @ weight.T, and for `more` = (h, B) + h @ B.T, in one sum. Everything is bf16; the result fp32 or bf16."""
    T, (O, I) = len(x_TI), weight_OI.shape  # noqa: E741
    if isinstance(weight_OI, Tiles) and weight_OI.transposed and I > LONGEST_SUM:
        sums_TO = torch.empty(T, O)
        cpu.kernels().gemm_bf16_long_sum(T, O, I, x_TI.contiguous(), I, weight_OI.laid, sums_TO)
        if more is not None:
            h_Tr, B_Or = more
            sums_TO.addmm_(h_Tr.float(), B_Or.float().t())
        return sums_TO.to(dtype)
    y_TO = torch.empty(T, O, dtype=dtype)
    sides = _side(x_TI, weight_OI) + ([0, None, 0, None, 0, 0] if more is None else _side(*more))
    factors = [cpu.pointer(one, strided=True) if isinstance(one, Tensor) else one for one in sides]
    cpu.kernels().gemm_bf16(T, O, *factors, y_TO, O, int(dtype == torch.float32))
    return y_TO


def _side(x_TI: Tensor, weight_OI: Tensor | Tiles) -> list[Tensor | int | None]:
    """One of the kernel's two factors."""
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    left: list[Tensor | int | None] = [x_TI.shape[1], x_TI, x_TI.stride(0)]
    if isinstance(weight_OI, Tiles):
        step = -1 if weight_OI.transposed else 0
        return [*left, weight_OI.laid, step, step]
    if 1 not in weight_OI.stride():
        weight_OI = weight_OI.contiguous()
    return [*left, weight_OI, *weight_OI.stride()]
