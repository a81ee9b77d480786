"""Small operations of the decoder with gradients, each in one pass over memory: on the CPU by kernels in C, on a GPU in
Triton.

Elsewhere, and in other types of number, they are the plain formulas below; the tests hold the kernels to them. Weights,
cos and sin are frozen and get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.kernels import cpu, cuda


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
    sum_TD = x_TD if y_TD is None else x_TD + y_TD
    scale_T1 = torch.rsqrt(sum_TD.square().mean(-1, keepdim=True) + eps)
    return sum_TD, (sum_TD * scale_T1 * weight_D).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    _, normed = add_norm(x.reshape(-1, x.shape[-1]).to(weight.dtype), None, weight, eps, x.dtype)
    return normed.view(x.shape)


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
        cpu.call("dropout", x.dtype, x.numel(), seed, kept_of(p), x.contiguous(), y)
        return y
    if isinstance(seed, Tensor) or cuda.usable(x):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        cuda.call("dropout", x.dtype, x.numel(), torch.as_tensor(seed, device=x.device), p, x.contiguous(), y)
        return y
    generator = torch.Generator(x.device).manual_seed(seed)
    kept_x = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * kept_x / (1 - p)


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
    turn_TNE, rest_TNE = x_TNE.split([turned, x_TNE.shape[1] - turned], 1)
    first, second = turn_TNE.chunk(2, -1)
    half_TNE = torch.cat([-second, first], -1)
    return torch.cat([(turn_TNE * cos_TE[:, None] + half_TNE * sin_TE[:, None]).to(x_TNE.dtype), rest_TNE], 1)


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
    gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
    return F.silu(gate_TI) * up_TI


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


def decode_attention(qkv_BNE: Tensor, k: Tensor, v: Tensor, rows_B: Tensor, positions_B: Tensor) -> Tensor:
    """Attention (B, H, E) of one new token a row over a cache k, v (rows, K, length, E), in which token b stands at
    positions_B[b] of row rows_B[b]; its own keys and values are written there. qkv (B, H + 2K, E) as in `decoder`.
    Positions and lengths are not checked."""
    K, E = k.shape[1], k.shape[3]
    B, H = qkv_BNE.shape[0], qkv_BNE.shape[1] - 2 * K
    fits = qkv_BNE.dtype == torch.float32 and k.dtype in (torch.float32, torch.float16) and E % 16 == 0
    if fits and k.stride(2) == E and cpu.usable(qkv_BNE):
        half = int(k.dtype == torch.float16)
        out_BHE = qkv_BNE.new_empty(B, H, E)
        steps = k.stride(0), k.stride(1)
        told = (*steps, rows_B, positions_B, qkv_BNE.contiguous(), k, v, out_BHE, half)
        cpu.call("decode_attention", None, B, H, K, E, *told)
        return out_BHE
    q_BHE, k_BKE, v_BKE = qkv_BNE.split([H, K, K], 1)
    k[rows_B, :, positions_B], v[rows_B, :, positions_B] = k_BKE.to(k.dtype), v_BKE.to(v.dtype)
    longest = int(positions_B.max()) + 1
    k_BKSE, v_BKSE = k[rows_B, :, :longest].to(q_BHE.dtype), v[rows_B, :, :longest].to(q_BHE.dtype)
    unseen_B11S = (torch.arange(longest, device=k.device) > positions_B[:, None])[:, None, None]
    scores_BKGS = q_BHE.reshape(B, K, H // K, E) @ k_BKSE.transpose(2, 3) * E**-0.5
    weights_BKGS = scores_BKGS.masked_fill_(unseen_B11S, -torch.inf).softmax(-1)
    mixed_BHE: Tensor = (weights_BKGS @ v_BKSE.masked_fill(unseen_B11S.transpose(2, 3), 0)).view(B, H, E)
    return mixed_BHE


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
        cpu.call(*_by_vectors("cross_entropy", logits_NV), *logits_NV.shape, logits_NV, tokens_N, loss_N)
        return loss_N, logits_NV
    logits_NV = _wide(logits_NV)
    slope_NV = torch.softmax(logits_NV, -1)
    slope_NV[torch.arange(len(tokens_N), device=tokens_N.device), tokens_N] -= 1
    return F.cross_entropy(logits_NV, tokens_N, reduction="none"), slope_NV


def divergence(logits_NV: Tensor, wanted_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(wanted) || softmax(logits)) of each row (N,), and the gradient of their sum (N, V).

    The logits may be overwritten.
    """
    if cpu.usable(logits_NV, wanted_NV):
        loss_N = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
        cpu.call(*_by_vectors("divergence", logits_NV), *logits_NV.shape, logits_NV, wanted_NV, loss_N)
        return loss_N, logits_NV
    log_q_NV, log_p_NV = F.log_softmax(_wide(logits_NV), -1), F.log_softmax(_wide(wanted_NV), -1)
    p_NV = log_p_NV.exp()
    return torch.linalg.vecdot(p_NV, log_p_NV - log_q_NV), log_q_NV.exp() - p_NV


def _wide(logits_NV: Tensor) -> Tensor:
    """At least fp32: sums over a vocabulary lose too much in fewer bits."""
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def _by_vectors(loss: str, logits_NV: Tensor) -> tuple[str, torch.dtype | None]:
    """Which kernel of a loss takes these logits, as `cpu.call` names it."""
    dtype = logits_NV.dtype
    if dtype == torch.bfloat16 and logits_NV.shape[1] % 32 == 0 and cpu.multiplies_tiles():
        return f"{loss}_vectors", None
    return loss, dtype
