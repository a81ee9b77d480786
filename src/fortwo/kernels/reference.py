"""What the kernels compute, in plain torch, on any device and in any type of number: the tests hold the kernels to it.

Shape suffixes as in `decoder`; B blocks of 64 numbers in NF4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(
    x_TD: Tensor, y_TD: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    sum_TD = x_TD if y_TD is None else x_TD + y_TD
    scale_T1 = torch.rsqrt(sum_TD.square().mean(-1, keepdim=True) + eps)
    return sum_TD, (sum_TD * scale_T1 * weight_D).to(dtype)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """The same seed drops other elements than the kernels do."""
    generator = torch.Generator(x.device).manual_seed(seed)
    kept_x = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * kept_x / (1 - p)


def rotate(x_TNE: Tensor, turned: int, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    turn_TNE, rest_TNE = x_TNE.split([turned, x_TNE.shape[1] - turned], 1)
    first, second = turn_TNE.chunk(2, -1)
    half_TNE = torch.cat([-second, first], -1)
    return torch.cat([(turn_TNE * cos_TE[:, None] + half_TNE * sin_TE[:, None]).to(x_TNE.dtype), rest_TNE], 1)


def swiglu(gate_up_T2I: Tensor) -> Tensor:
    gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
    return F.silu(gate_TI) * up_TI


def decode_attention(
    qkv_BNE: Tensor,
    k: Tensor,
    v: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    K, E = k.shape[1], k.shape[3]
    B, H = qkv_BNE.shape[0], qkv_BNE.shape[1] - 2 * K
    q_BHE, k_BKE, v_BKE = qkv_BNE.split([H, K, K], 1)
    k[rows_B, :, positions_B], v[rows_B, :, positions_B] = k_BKE.to(k.dtype), v_BKE.to(v.dtype)
    first, longest = 0, int(positions_B.max()) + 1
    if window is not None:
        first = max(0, int(positions_B.min()) - window + 1)
    k_BKSE, v_BKSE = (kept[rows_B, :, first:longest].to(q_BHE.dtype) for kept in (k, v))
    places_S = torch.arange(first, longest, device=k.device)
    unseen_BS = places_S > positions_B[:, None]
    if window is not None:
        unseen_BS |= places_S <= positions_B[:, None] - window
    unseen_B11S = unseen_BS[:, None, None]
    scores_BKGS = q_BHE.reshape(B, K, H // K, E) @ k_BKSE.transpose(2, 3) * E**-0.5
    if softcap is not None:
        scores_BKGS = (scores_BKGS / softcap).tanh() * softcap
    weights_BKGS = scores_BKGS.masked_fill_(unseen_B11S, -torch.inf).softmax(-1)
    mixed_BHE: Tensor = (weights_BKGS @ v_BKSE.masked_fill(unseen_B11S.transpose(2, 3), 0)).view(B, H, E)
    return mixed_BHE


def cross_entropy(logits_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    logits_NV = _wide(logits_NV)
    slope_NV = torch.softmax(logits_NV, -1)
    slope_NV[torch.arange(len(tokens_N), device=tokens_N.device), tokens_N] -= 1
    return F.cross_entropy(logits_NV, tokens_N, reduction="none"), slope_NV


def divergence(logits_NV: Tensor, wanted_NV: Tensor) -> tuple[Tensor, Tensor]:
    log_q_NV, log_p_NV = F.log_softmax(_wide(logits_NV), -1), F.log_softmax(_wide(wanted_NV), -1)
    p_NV = log_p_NV.exp()
    return torch.linalg.vecdot(p_NV, log_p_NV - log_q_NV), log_q_NV.exp() - p_NV


def _wide(logits_NV: Tensor) -> Tensor:
    """At least fp32: sums over a vocabulary lose too much in fewer bits."""
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def nf4_dense(codes: Tensor, largest_B: Tensor, scale_B: Tensor, map: Tensor, offset: Tensor, levels: Tensor) -> Tensor:
    """Blocks (B, 64) as fp32, of codes (B, 32), two a byte, the first in the high half."""
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)  # both levels of a byte
    return pairs[codes.int()].view(len(codes), -1) * (map[largest_B.int()] * scale_B + offset)[:, None]
