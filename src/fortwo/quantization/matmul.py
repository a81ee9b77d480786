"""Matrix products of activations with frozen weights, by the kernel that measured fastest on this machine.

torch's own fp32 product goes to MKL, which on some processors (AMD's among them) runs at less than half of
what oneDNN reaches on the same shapes. Both are exact fp32, but they round differently. The clock decides once which
one a machine uses, and FORTWO_HOME remembers it: a job that is resumed in another process multiplies as before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo import disk
from fortwo.kernels import cpu
from fortwo.kernels.isa import processor
from fortwo.quantization.tiles import LONGEST_SUM, Tiles, tiled_product

WIDENED = 2 << 20  # bytes of a bf16 weight that are fp32 at once
Product = Callable[[Tensor, Tensor], Tensor]


class Multiplies(Protocol):
    """A weight in formats of its own (`formats.Weight`)."""

    def product(self, x_TI: Tensor, /) -> Tensor: ...


def _onednn(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, None, "none", [], "")
    return y


def _median_seconds(product: Product, x_TI: Tensor, weight_OI: Tensor, repeats: int = 5) -> float:
    product(x_TI, weight_OI)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        product(x_TI, weight_OI)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[repeats // 2]


def _fastest() -> str:
    """oneDNN where it is at least a fifth faster than torch's default on a typical shape."""
    if not torch.backends.mkldnn.is_available():
        return "torch"
    x_TI, weight_OI = torch.ones(256, 576), torch.ones(1024, 576)
    default = _median_seconds(F.linear, x_TI, weight_OI)
    return "onednn" if _median_seconds(_onednn, x_TI, weight_OI) * 1.2 < default else "torch"


_KERNELS: dict[str, Product] = {"torch": F.linear, "onednn": _onednn}


class _Fp32Kernel:
    """The choice of this process, which is made once."""

    name: str | None = None


def fp32_kernel() -> str:
    """What multiplies fp32 on the CPU in this process: torch (its default) or onednn."""
    if _Fp32Kernel.name is None:
        _Fp32Kernel.name = _fastest()
    return _Fp32Kernel.name


def remember_fp32_kernel(file: Path) -> None:
    """Take the choice that this machine made before, or write the choice of this process, which stays once it is made.
    What another kind of processor chose, or cannot be read, counts for nothing. Raises OSError."""
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError):
        known = None
    here = [{"processor": processor(), "kernel": name} for name in _KERNELS]
    if _Fp32Kernel.name is None and known in here and torch.backends.mkldnn.is_available():
        _Fp32Kernel.name = known["kernel"]
    chosen = {"processor": processor(), "kernel": fp32_kernel()}
    if known != chosen:
        disk.replace(file, disk.dump(chosen))


def take_fp32_kernel(name: str) -> None:
    """Multiply fp32 as another process does, whose `fp32_kernel` is `name`, where this process can."""
    if torch.backends.mkldnn.is_available():
        _Fp32Kernel.name = name


def _cpu_product() -> Product:
    return _KERNELS[fp32_kernel()]


def product(
    x_TI: Tensor,
    weight_OI: Tensor | Tiles | Multiplies,
    more: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T, and for `more` = (h, B) + h @ B.T; x (rows, in), weight (out, in), any of them may be a transposed
    view. No gradient: see lora.

    A bf16 weight is multiplied with x rounded to bf16, and summed in fp32: on the CPU by blocks (tiles.h), or else as
    fp32, a part of the weight after the other, since torch's own product of bf16 rounds each sum to bf16. The result
    has the type of x, or `dtype`. A `Weight` takes the format that is chosen for this many rows.
    """
    dtype = x_TI.dtype if dtype is None else dtype
    if isinstance(weight_OI, Tiles):
        return tiled_product(x_TI.bfloat16(), weight_OI, more, dtype)
    if not isinstance(weight_OI, Tensor):
        y_TO = weight_OI.product(x_TI)
    elif weight_OI.dtype == torch.bfloat16:
        if cpu.usable(x_TI) and cpu.multiplies_tiles() and x_TI.shape[1] <= LONGEST_SUM:
            return tiled_product(x_TI.bfloat16(), weight_OI, more, dtype)
        multiply = _widened if x_TI.device.type == "cpu" else F.linear
        y_TO = multiply(x_TI.bfloat16(), weight_OI)
    elif x_TI.device.type == "cpu" and x_TI.dtype == torch.float32 and x_TI.numel():
        y_TO = _cpu_product()(x_TI, weight_OI)
    else:
        y_TO = F.linear(x_TI, weight_OI)
    if more is not None:
        h_Tr, B_Or = (tensor.to(y_TO.dtype) for tensor in more)
        y_TO.addmm_(h_Tr, B_Or.t())
    return y_TO.to(dtype)


def _widened(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight.T of bf16 numbers as fp32; parts of the weight become fp32 in the processor's cache."""
    O, I = weight_OI.shape  # noqa: E741
    multiply, x_TI, y_TO = _cpu_product(), x_TI.float(), x_TI.new_empty(len(x_TI), O, dtype=torch.float32)
    outputs = max(16, WIDENED // (4 * I))
    for first in range(0, O, outputs) if x_TI.numel() else ():
        y_TO[:, first : first + outputs] = multiply(x_TI, weight_OI[first : first + outputs].float())
    return y_TO


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.weight_OI = weight_OI  # type: ignore[attr-defined]  # frozen: needs no version check
        return product(x_TI, weight_OI)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_TO: Tensor) -> tuple[Tensor, None]:
        return product(grad_TO, ctx.weight_OI.t()), None  # type: ignore[attr-defined]


def frozen_product(x_TI: Tensor, weight_OI: Tensor | Tiles | Multiplies) -> Tensor:
    """`product` with a gradient for x; the weight is frozen and gets none."""
    if torch.is_grad_enabled() and x_TI.requires_grad:
        y: Tensor = _FrozenProduct.apply(x_TI, weight_OI)  # type: ignore[no-untyped-call]
        return y
    return product(x_TI, weight_OI)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether there are products in bf16 on the device that may be faster than fp32: on the CPU, those by
    blocks."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu.multiplies_tiles()
