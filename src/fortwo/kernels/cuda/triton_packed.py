"""Attention over packed rows and its gradient in Triton, and dropout: what training needs beside triton_kernels.

Dao 2023, arXiv:2307.08691: scores are made block by block and never kept; the backward makes them again from each
query's log of the sum. No two programs add to the same number, so the same input gives the same bits. `seen` (T, 3)
says of each token where its own row begins, where those end that see it, and how many tokens all rows share; a token
sees the shared ones and its own row's, up to itself. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scores(q, k, m, n, start, shared, T, scale, PRECISION: tl.constexpr):
    """Of queries m (M,) and keys n (N,): (M, N), very low where a query does not see the key."""
    found = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    sees = (n[None, :] <= m[:, None]) & ((n[None, :] < shared) | (n[None, :] >= start[:, None])) & (n[None, :] < T)
    return tl.where(sees, found, -1e30)


@triton.jit(do_not_specialize=["T"])
def attend_packed(
    seen, qkv, mixed, lse, T, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK queries of a head a program."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    m, e, b = first + tl.arange(0, BLOCK), tl.arange(0, E), tl.arange(0, BLOCK)
    step: tl.constexpr = (H + 2 * K) * E
    own = qkv + m.to(tl.int64)[:, None] * step + e[None, :]
    k_at = qkv + (H + head // (H // K)) * E + e[None, :]
    start, shared = tl.load(seen + m * 3, mask=m < T, other=T), tl.load(seen + 2)
    q = tl.load(own + head * E, mask=m[:, None] < T, other=0.0).to(tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, E], tl.float32)
    behind = tl.minimum(first + BLOCK, T)
    for part in tl.static_range(2):  # what is shared, then the queries' own rows
        low = 0 if part == 0 else tl.maximum(tl.min(start, 0), shared)
        high = tl.minimum(shared, behind) if part == 0 else behind
        for at in range(low, high, BLOCK):
            n = at + b
            inside = n < high
            k = tl.load(k_at + n.to(tl.int64)[:, None] * step, mask=inside[:, None], other=0.0).to(tl.float32)
            v = tl.load(k_at + n.to(tl.int64)[:, None] * step + K * E, mask=inside[:, None], other=0.0).to(tl.float32)
            scores = _scores(q, k, m, n, start, shared, high, scale, PRECISION)
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights, shrunk = tl.exp(scores - higher[:, None]), tl.exp(highest - higher)
            out = out * shrunk[:, None] + tl.dot(weights, v, input_precision=PRECISION)
            total, highest = total * shrunk + tl.sum(weights, 1), higher
    to = mixed + (m.to(tl.int64)[:, None] * H + head) * E + e[None, :]
    tl.store(to, (out / total[:, None]).to(mixed.dtype.element_ty), mask=m[:, None] < T)
    tl.store(lse + m * H + head, highest + tl.log(total), mask=m < T)


@triton.jit(do_not_specialize=["T"])
def attend_packed_queries(
    seen, qkv, mixed, lse, grad, along, out, T, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK queries of a head; along (T, H): of each, its gradient times what came out."""
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1)
    m, e, b = first + tl.arange(0, BLOCK), tl.arange(0, E), tl.arange(0, BLOCK)
    step: tl.constexpr = (H + 2 * K) * E
    own = m.to(tl.int64)[:, None] * step + head * E + e[None, :]
    k_at = qkv + (H + head // (H // K)) * E + e[None, :]
    start, shared = tl.load(seen + m * 3, mask=m < T, other=T), tl.load(seen + 2)
    inside_q = m[:, None] < T
    q = tl.load(qkv + own, mask=inside_q, other=0.0).to(tl.float32)
    of_head = (m.to(tl.int64)[:, None] * H + head) * E + e[None, :]
    g = tl.load(grad + of_head, mask=inside_q, other=0.0).to(tl.float32)
    came = tl.load(mixed + of_head, mask=inside_q, other=0.0).to(tl.float32)
    both = tl.sum(g * came, 1)
    tl.store(along + m * H + head, both, mask=m < T)
    by = tl.load(lse + m * H + head, mask=m < T, other=0.0)
    found = tl.zeros([BLOCK, E], tl.float32)
    behind = tl.minimum(first + BLOCK, T)
    for part in tl.static_range(2):
        low = 0 if part == 0 else tl.maximum(tl.min(start, 0), shared)
        high = tl.minimum(shared, behind) if part == 0 else behind
        for at in range(low, high, BLOCK):
            n = at + b
            inside = n < high
            k = tl.load(k_at + n.to(tl.int64)[:, None] * step, mask=inside[:, None], other=0.0).to(tl.float32)
            v = tl.load(k_at + n.to(tl.int64)[:, None] * step + K * E, mask=inside[:, None], other=0.0).to(tl.float32)
            weights = tl.exp(_scores(q, k, m, n, start, shared, high, scale, PRECISION) - by[:, None])
            slope = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - both[:, None]) * scale
            found += tl.dot(slope, k, input_precision=PRECISION)
    tl.store(out + own, found.to(out.dtype.element_ty), mask=inside_q)


@triton.jit(do_not_specialize=["T"])
def attend_packed_keys(
    seen, qkv, lse, grad, along, out, T, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of the gradient of BLOCK keys and values of a key/value head, out (parts, T, 2K, E) fp32: all rows see the
    shared ones, whose queries one program alone would be long busy with."""
    first, kv_head, part = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    n, e, b = first + tl.arange(0, BLOCK), tl.arange(0, E), tl.arange(0, BLOCK)
    step: tl.constexpr = (H + 2 * K) * E
    inside = n[:, None] < T
    own = qkv + n.to(tl.int64)[:, None] * step + (H + kv_head) * E + e[None, :]
    k = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(own + K * E, mask=inside, other=0.0).to(tl.float32)
    shared = tl.load(seen + 2)
    behind = tl.minimum(tl.max(tl.load(seen + n * 3 + 1, mask=n < T, other=0), 0), T)
    blocks = tl.cdiv(behind - first, BLOCK)
    found_k = tl.zeros([BLOCK, E], tl.float32)
    found_v = tl.zeros([BLOCK, E], tl.float32)
    for number in range(part, blocks * (H // K), tl.num_programs(2)):
        head = kv_head * (H // K) + number // blocks
        m = first + (number % blocks) * BLOCK + b
        inside_q = m[:, None] < T
        q_at = qkv + m.to(tl.int64)[:, None] * step + head * E + e[None, :]
        q = tl.load(q_at, mask=inside_q, other=0.0).to(tl.float32)
        of_head = (m.to(tl.int64)[:, None] * H + head) * E + e[None, :]
        g = tl.load(grad + of_head, mask=inside_q, other=0.0).to(tl.float32)
        by = tl.load(lse + m * H + head, mask=m < T, other=0.0)
        both = tl.load(along + m * H + head, mask=m < T, other=0.0)
        start = tl.load(seen + m * 3, mask=m < T, other=T)
        scores = _scores(q, k, m, n, start, shared, T, scale, PRECISION)
        weights = tl.where(inside_q, tl.exp(scores - by[:, None]), 0.0)
        found_v += tl.dot(tl.trans(weights), g, input_precision=PRECISION)
        slope = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - both[:, None]) * scale
        found_k += tl.dot(tl.trans(slope), q, input_precision=PRECISION)
    to = out + ((part * T + n).to(tl.int64)[:, None] * 2 * K + kv_head) * E + e[None, :]
    tl.store(to, found_k, mask=inside)
    tl.store(to + K * E, found_v, mask=inside)


@triton.jit
def dropout(x, seed, y, N, p, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    kept = tl.rand(tl.load(seed), at) >= p
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, tl.where(kept, value / (1 - p), 0.0).to(y.dtype.element_ty), mask=inside)
