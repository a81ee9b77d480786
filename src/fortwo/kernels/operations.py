"""Small operations of the decoder with gradients, each in one pass over memory: on the CPU by kernels in C, on a GPU in
Triton.

Elsewhere, and in other types of number, they are the plain formulas of `reference`. Weights,
cos and sin are frozen and get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fortwo.kernels import cpu, cuda, reference


def add_norm(
    x_TD: Tensor, y_TD: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """s = x + y (y None: s = x), and s / sqrt(mean(s^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019,
    arXiv:1910.07467) as `dtype`, which is y's too."""
    if x_TD.dtype == torch.float32 and dtype in (torch.float32, torch.bfloat16) and cuda.fused(x_TD, weight_D):
        if not torch.is_grad_enabled():
            return _added(x_TD.contiguous(), y_TD, weight_D, eps, dtype)[:2]
        found: tuple[Tensor, Tensor] = _AddNorm.apply(x_TD, y_TD, weight_D, eps, dtype)  # type: ignore[no-untyped-call]
        return found
    return reference.add_norm(x_TD, y_TD, weight_D, eps, dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, y_TD: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        x_TD = x_TD.contiguous()
        sum_TD, normed_TD, scale_T = _added(x_TD, y_TD, weight_D, eps, dtype)
        ctx.save_for_backward(sum_TD, scale_T, weight_D)
        ctx.added = y_TD is not None
        return (sum_TD if ctx.added else x_TD.view_as(x_TD)), normed_TD

    @staticmethod
    def backward(ctx: Any, along_TD: Tensor, grad_TD: Tensor) -> Any:
        sum_TD, scale_T, weight_D = ctx.saved_tensors
        grad_x_TD = torch.empty_like(sum_TD)
        grad_y_TD = torch.empty_like(grad_TD) if ctx.added else None
        grad_TD, along_TD = grad_TD.contiguous(), along_TD.contiguous()
        arguments = (sum_TD, scale_T, weight_D, grad_TD, along_TD, grad_x_TD, grad_y_TD)
        cuda.run("add_norm_backward", grad_TD, *sum_TD.shape, *arguments)
        return grad_x_TD, grad_y_TD, None, None, None


def dropout(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """Each element zero with probability p, else divided by 1 - p; the same seed (below 2^32; on a GPU it may be one
    there) drops the same places.

    No gradient: a caller drops the gradient's elements with the seed.
    """
    if cpu.usable(x) and not isinstance(seed, Tensor):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        cpu.run("dropout", x.dtype, x.numel(), seed, kept_of(p), x.contiguous(), y)
        return y
    if isinstance(seed, Tensor) or cuda.usable(x):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        cuda.call("dropout", x.numel(), torch.as_tensor(seed, device=x.device), p, x.contiguous(), y)
        return y
    return reference.dropout(x, p, seed)


def kept_of(p: float) -> int:
    """What dropout with probability p keeps, of 2^32, as its kernels take it."""
    return round((1 - p) * 2**32)


def _added(
    x_TD: Tensor, y_TD: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """add_norm's two results, and what each row was multiplied by."""
    sum_TD = x_TD if y_TD is None else torch.empty_like(x_TD)
    scale_T, normed_TD = x_TD.new_empty(len(x_TD)), torch.empty_like(x_TD, dtype=dtype)
    y_TD = None if y_TD is None else y_TD.contiguous()
    cuda.run("add_norm", normed_TD, *x_TD.shape, x_TD, y_TD, weight_D, float(eps), sum_TD, normed_TD, scale_T)
    return sum_TD, normed_TD, scale_T


def rotate(x_TNE: Tensor, turned: int, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """x * cos + [-second half of x, first half] * sin for the first `turned` heads: rotary position embedding
    (Su et al. 2021, arXiv:2104.09864). The other heads are left as they are.

    cos and sin (T, E) hold each angle in both halves.
    """
    if cuda.fused(x_TNE, cos_TE):
        if not torch.is_grad_enabled():
            return _turned(x_TNE, turned, cos_TE, sin_TE, 1.0)
        y: Tensor = _Rotate.apply(x_TNE, turned, cos_TE, sin_TE)  # type: ignore[no-untyped-call]
        return y
    return reference.rotate(x_TNE, turned, cos_TE, sin_TE)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNE: Tensor, turned: int, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        ctx.turned = turned
        return _turned(x_TNE, turned, cos_TE, sin_TE, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_TNE: Tensor) -> Any:
        cos_TE, sin_TE = ctx.saved_tensors
        return _turned(grad_TNE, ctx.turned, cos_TE, sin_TE, -1.0), None, None, None


def _turned(x_TNE: Tensor, turned: int, cos_TE: Tensor, sin_TE: Tensor, sign: float) -> Tensor:
    x_TNE = x_TNE.contiguous()
    y_TNE = torch.empty_like(x_TNE)
    T, N, E = x_TNE.shape
    cuda.run("rotate", x_TNE, T, N, turned, E, x_TNE, cos_TE, sin_TE, sign, y_TNE)
    return y_TNE


def swiglu(gate_up_T2I: Tensor) -> Tensor:
    """silu(gate) * up, of gate and up side by side (Shazeer 2020, arXiv:2002.05202)."""
    if cuda.fused(gate_up_T2I):
        if not torch.is_grad_enabled():
            return _gated(gate_up_T2I.contiguous())
        y: Tensor = _SwiGlu.apply(gate_up_T2I)  # type: ignore[no-untyped-call]
        return y
    return reference.swiglu(gate_up_T2I)


def _gated(gate_up_T2I: Tensor) -> Tensor:
    T, I = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2  # noqa: E741
    y_TI = gate_up_T2I.new_empty(T, I)
    cuda.run("swiglu", y_TI, T, I, gate_up_T2I, y_TI)
    return y_TI


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2I: Tensor) -> Tensor:
        gate_up_T2I = gate_up_T2I.contiguous()
        ctx.save_for_backward(gate_up_T2I)
        return _gated(gate_up_T2I)

    @staticmethod
    def backward(ctx: Any, grad_TI: Tensor) -> Tensor:
        (gate_up_T2I,) = ctx.saved_tensors
        grad_T2I = torch.empty_like(gate_up_T2I)
        cuda.run("swiglu_backward", grad_TI, *grad_TI.shape, gate_up_T2I, grad_TI.contiguous(), grad_T2I)
        return grad_T2I


def decode_attention(
    qkv_BNE: Tensor,
    k: Tensor,
    v: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention (B, H, E) of one new token a row over a cache k, v (rows, K, length, E), in which token b stands at
    positions_B[b] of row rows_B[b]; its own keys and values are written there. qkv (B, H + 2K, E) as in `decoder`.
    window: how many tokens each sees, itself included; softcap: c of c * tanh(score / c); there is no kernel for a
    softcap, and none for rows that are longer than the window. Positions and lengths are not checked."""
    (_, K, _, E), (B, N, _) = k.shape, qkv_BNE.shape
    fits = qkv_BNE.dtype == torch.float32 and k.dtype in (torch.float32, torch.float16) and E % 16 == 0
    plain = softcap is None and (window is None or int(positions_B.max()) < window)
    if plain and fits and k.stride(2) == E and cpu.usable(qkv_BNE):
        out_BHE = qkv_BNE.new_empty(B, N - 2 * K, E)
        cache = (cpu.pointer(one, strided=True) for one in (k, v))
        told = *k.stride()[:2], rows_B, positions_B, qkv_BNE.contiguous(), *cache, out_BHE
        cpu.kernels().decode_attention(B, N - 2 * K, K, E, *told, int(k.dtype == torch.float16))
        return out_BHE
    return reference.decode_attention(qkv_BNE, k, v, rows_B, positions_B, window, softcap)


def packed_attention(qkv_TNE: Tensor, seen_T3: Tensor, kv_heads: int) -> Tensor:
    """Attention (T, H, E) of packed rows on a GPU, with a gradient; seen as in `cuda.attend_packed`."""
    mixed: Tensor = _PackedAttention.apply(qkv_TNE, seen_T3, kv_heads)  # type: ignore[no-untyped-call]
    return mixed


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_TNE: Tensor, seen_T3: Tensor, kv_heads: int) -> Tensor:
        qkv_TNE = qkv_TNE.contiguous()
        mixed_THE, lse_TH = cuda.attend_packed(seen_T3, qkv_TNE, kv_heads)
        ctx.save_for_backward(seen_T3, qkv_TNE, mixed_THE, lse_TH)
        ctx.kv_heads = kv_heads
        return mixed_THE

    @staticmethod
    def backward(ctx: Any, grad_THE: Tensor) -> Any:
        seen_T3, qkv_TNE, mixed_THE, lse_TH = ctx.saved_tensors
        told = seen_T3, qkv_TNE, mixed_THE, lse_TH, grad_THE.contiguous()
        return cuda.attend_packed_backward(*told, ctx.kv_heads), None, None


def cross_entropy(logits_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row against a token (N,), and the gradient of their sum (N, V).

    The logits may be overwritten.
    """
    if cpu.usable(logits_NV):
        loss_N = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
        _loss("cross_entropy", logits_NV)(*logits_NV.shape, logits_NV, tokens_N, loss_N)
        return loss_N, logits_NV
    return reference.cross_entropy(logits_NV, tokens_N)


def divergence(logits_NV: Tensor, wanted_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(wanted) || softmax(logits)) of each row (N,), and the gradient of their sum (N, V).

    The logits may be overwritten.
    """
    if cpu.usable(logits_NV, wanted_NV):
        loss_N = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
        _loss("kl_divergence", logits_NV)(*logits_NV.shape, logits_NV, wanted_NV, loss_N)
        return loss_N, logits_NV
    return reference.divergence(logits_NV, wanted_NV)


def _loss(name: str, logits_NV: Tensor) -> Callable[..., None]:
    """The kernel of a loss that takes these logits."""
    by_vectors = logits_NV.dtype == torch.bfloat16 and logits_NV.shape[1] % 32 == 0 and cpu.multiplies_tiles()
    kernel: Callable[..., None] = getattr(
        cpu.kernels(), f"{name}_tiled" if by_vectors else cpu.typed(name, logits_NV.dtype)
    )
    return kernel
