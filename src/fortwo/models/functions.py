"""Small operations of the decoder with gradients written by hand: fewer passes over memory than autograd's own.

Each is equal to the plain formula in its docstring; the tests hold them to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        y: Tensor = normed * weight
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        normed, scale, weight = ctx.saved_tensors
        weighted = grad * weight
        along = torch.linalg.vecdot(weighted, normed).unsqueeze(-1).div_(-normed.shape[-1])
        return weighted.addcmul_(normed, along).mul_(scale), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    The weight is frozen and gets no gradient.
    """
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        return _turned(x_TNE, cos_TE, sin_TE, 1)

    @staticmethod
    def backward(ctx: Any, grad_TNE: Tensor) -> tuple[Tensor, None, None]:
        cos_TE, sin_TE = ctx.saved_tensors
        return _turned(grad_TNE, cos_TE, sin_TE, -1), None, None


def _turned(x_TNE: Tensor, cos_TE: Tensor, sin_TE: Tensor, sign: int) -> Tensor:
    y_TNE = x_TNE * cos_TE
    (first, second), (y_first, y_second), (sin, _) = (part.chunk(2, -1) for part in (x_TNE, y_TNE, sin_TE))
    y_first.addcmul_(second, sin, value=-sign)
    y_second.addcmul_(first, sin, value=sign)
    return y_TNE


def rotate(x_TNE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """x * cos + [-second half of x, first half] * sin: rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    cos and sin (T, 1, E) hold each angle in both halves; they get no gradient.
    """
    y: Tensor = _Rotate.apply(x_TNE, cos_TE, sin_TE)  # type: ignore[no-untyped-call]
    return y


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2I: Tensor) -> Tensor:
        gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
        activated_TI = F.silu(gate_TI)
        ctx.save_for_backward(gate_up_T2I, activated_TI)
        return activated_TI * up_TI

    @staticmethod
    def backward(ctx: Any, grad_TI: Tensor) -> Tensor:
        gate_up_T2I, activated_TI = ctx.saved_tensors
        gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
        grad_T2I = torch.empty_like(gate_up_T2I)
        grad_gate_TI, grad_up_TI = grad_T2I.chunk(2, -1)
        torch.mul(grad_TI, activated_TI, out=grad_up_TI)
        torch.ops.aten.silu_backward(grad_TI * up_TI, gate_TI, grad_input=grad_gate_TI)
        return grad_T2I


def swiglu(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up, of gate and up side by side (Shazeer 2020, arXiv:2002.05202)."""
    y: Tensor = _SwiGlu.apply(gate_up_T2I)  # type: ignore[no-untyped-call]
    return y
