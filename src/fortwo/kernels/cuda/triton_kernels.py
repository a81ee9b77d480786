"""Kernels for GPUs in Triton: what `operations` has formulas for, attention over the cache, and adapters of many rows.

What they take is what those in C take under the same names, but for the order. One program has a row of the batch, or
a part of it; what it keeps is in registers, in fp32. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm(x, y, weight, total, normed, scale, D, eps, HAS_Y: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDE)
    inside = d < D
    s = tl.load(x + row * D + d, mask=inside, other=0.0)
    if HAS_Y:
        s += tl.load(y + row * D + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * D + d, s, mask=inside)
    by = 1.0 / tl.sqrt(tl.sum(s * s, 0) / D + eps)
    tl.store(scale + row, by)
    n = s * by * tl.load(weight + d, mask=inside, other=0.0)
    tl.store(normed + row * D + d, n.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_backward(total, scale, weight, grad, along, grad_x, grad_y, D, HAS_Y: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDE)
    inside = d < D
    s = tl.load(total + row * D + d, mask=inside, other=0.0)
    by = tl.load(scale + row)
    g = tl.load(grad + row * D + d, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + d, mask=inside, other=0.0)
    found = tl.load(along + row * D + d, mask=inside, other=0.0) + by * g - s * (by * by * by * tl.sum(g * s, 0) / D)
    tl.store(grad_x + row * D + d, found, mask=inside)
    if HAS_Y:
        tl.store(grad_y + row * D + d, found.to(grad_y.dtype.element_ty), mask=inside)


@triton.jit
def rotate(x, cos, sin, y, N, turned, sign, E: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    n, e = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (n < N) & (e < E // 2)
    at = (token * N + n) * E + e
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + E // 2, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * E + e, mask=e < E // 2, other=0.0)
    s = tl.load(sin + token * E + e, mask=e < E // 2, other=0.0) * sign
    kept = n >= turned
    out = y.dtype.element_ty
    tl.store(y + at, tl.where(kept, first, first * c - second * s).to(out), mask=inside)
    tl.store(y + at + E // 2, tl.where(kept, second, second * c + first * s).to(out), mask=inside)


@triton.jit
def swiglu(gate_up, y, I, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = tl.load(gate_up + token * 2 * I + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * I + I + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * I + i, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(gate_up, grad, out, I, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = tl.load(gate_up + token * 2 * I + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * I + I + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + token * I + i, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    of_gate = g * up * share * (1 + gate * (1 - share))
    tl.store(out + token * 2 * I + i, of_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + token * 2 * I + I + i, (g * gate * share).to(out.dtype.element_ty), mask=inside)


@triton.jit
def keep(
    rows, qkv, layer, STEP: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, HALF_KV: tl.constexpr
):
    """Write the key and value of a token's head to where the row says: token, position, address of keys, of values,
    numbers from layer to layer, from head to head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    told = rows + row * STEP
    kind = tl.bfloat16 if HALF_KV else tl.float32
    e = tl.arange(0, E)
    to = layer * tl.load(told + 4) + head * tl.load(told + 5) + tl.load(told + 1) * E + e
    own = qkv + (row * (H + 2 * K) + H + head) * E + e
    tl.store(tl.load(told + 2).to(tl.pointer_type(kind)) + to, tl.load(own).to(kind))
    tl.store(tl.load(told + 3).to(tl.pointer_type(kind)) + to, tl.load(own + K * E).to(kind))


@triton.jit
def attend(
    rows, qkv, out, layer, scale, STEP: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, HALF_KV: tl.constexpr,
):  # fmt: skip
    """Attention of a token's query heads that share a key/value head, over all up to its own position (Dao et al. 2022,
    arXiv:2205.14135: the sum goes along, rescaled by the highest score so far)."""
    PRECISION: tl.constexpr = "tf32" if HALF_KV else "ieee"  # tf32 has all of a bf16 number
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    told = rows + row * STEP
    kind = tl.bfloat16 if HALF_KV else tl.float32
    start = layer * tl.load(told + 4) + head * tl.load(told + 5)
    k = tl.load(told + 2).to(tl.pointer_type(kind)) + start
    v = tl.load(told + 3).to(tl.pointer_type(kind)) + start
    e, g = tl.arange(0, E), tl.arange(0, GROUP)
    heads = g[:, None] < H // K
    own = (head * (H // K) + g[:, None]) * E + e[None, :]
    q = tl.load(qkv + row * (H + 2 * K) * E + own, mask=heads, other=0.0).to(tl.float32) * scale
    highest = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    mixed = tl.zeros([GROUP, E], tl.float32)
    length = tl.load(told + 1) + 1
    for first in range(0, length, BLOCK):
        s = first + tl.arange(0, BLOCK)
        seen = s < length
        some_k = tl.load(k + s[:, None] * E + e[None, :], mask=seen[:, None], other=0.0).to(tl.float32)
        some_v = tl.load(v + s[:, None] * E + e[None, :], mask=seen[:, None], other=0.0).to(tl.float32)
        scores = tl.dot(q, tl.trans(some_k), input_precision=PRECISION)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights, shrunk = tl.exp(scores - higher[:, None]), tl.exp(highest - higher)
        mixed = mixed * shrunk[:, None] + tl.dot(weights, some_v, input_precision=PRECISION)
        total, highest = total * shrunk + tl.sum(weights, 1), higher
    tl.store(out + row * H * E + own, (mixed / total[:, None]).to(out.dtype.element_ty), mask=heads)


@triton.jit
def shrink(
    owners, x, h, place, I, WIDE, STEP: tl.constexpr, HALF: tl.constexpr, ENTRY: tl.constexpr, BLOCK: tl.constexpr
):
    """h = x A' of the row's own adapter, 16 ranks a program."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    owner = tl.load(owners + row * STEP)
    if owner != 0:
        entry = owner.to(tl.pointer_type(tl.int64)) + place * ENTRY
        ranks = tl.load(entry + 1)
        if part * 16 < ranks:
            A = tl.load(entry).to(tl.pointer_type(tl.bfloat16 if HALF else tl.float32))
            r = part * 16 + tl.arange(0, 16)
            found = tl.zeros([16], tl.float32)
            for first in range(0, I, BLOCK):
                i = first + tl.arange(0, BLOCK)
                some_x = tl.load(x + row * I + i, mask=i < I, other=0.0).to(tl.float32)
                inside = (r[:, None] < ranks) & (i[None, :] < I)
                some_A = tl.load(A + r[:, None] * I + i[None, :], mask=inside, other=0.0).to(tl.float32)
                found += tl.sum(some_A * some_x[None, :], 1)
            tl.store(h + row * WIDE + r, found, mask=r < ranks)


@triton.jit
def expand(
    owners, h, y, place, O, WIDE, STEP: tl.constexpr, HALF: tl.constexpr, ENTRY: tl.constexpr, BLOCK: tl.constexpr
):
    """y += h B' of the row's own adapter, BLOCK outputs a program."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    owner = tl.load(owners + row * STEP)
    if owner != 0:
        entry = owner.to(tl.pointer_type(tl.int64)) + place * ENTRY
        o = part * BLOCK + tl.arange(0, BLOCK)
        found = tl.zeros([BLOCK], tl.float32)
        for target in tl.static_range(3):
            of = entry + 2 + 5 * target
            ranks, first_rank = tl.load(of + 1), tl.load(of + 2)
            begin, end = tl.load(of + 3), tl.load(of + 4)
            if (ranks > 0) & (begin < part * BLOCK + BLOCK) & (end > part * BLOCK):
                B = tl.load(of).to(tl.pointer_type(tl.bfloat16 if HALF else tl.float32))
                mine = (o >= begin) & (o < end)
                for first in range(0, ranks, 16):
                    r = first + tl.arange(0, 16)
                    some_h = tl.load(h + row * WIDE + first_rank + r, mask=r < ranks, other=0.0)
                    inside = mine[:, None] & (r[None, :] < ranks)
                    some_B = tl.load(B + (o - begin)[:, None] * ranks + r[None, :], mask=inside, other=0.0)
                    found += tl.sum(some_B.to(tl.float32) * some_h[None, :], 1)
        at = y + row * O + o
        before = tl.load(at, mask=o < O, other=0.0).to(tl.float32)
        tl.store(at, (before + found).to(y.dtype.element_ty), mask=o < O)


@triton.jit
def nf4_dense(codes, largest, scales, table, offset, levels, out, begin, SHARED: tl.constexpr):
    """One block of 64 weights a program."""
    block = (begin + tl.program_id(0)).to(tl.int64)
    byte = tl.arange(0, 32)
    both = tl.load(codes + block * 32 + byte).to(tl.int32)
    largest_code = tl.load(largest + block).to(tl.int32)
    by = tl.load(table + largest_code) * tl.load(scales + block // SHARED) + tl.load(offset)
    to = out + tl.program_id(0).to(tl.int64) * 64 + 2 * byte
    tl.store(to, (tl.load(levels + (both >> 4)) * by).to(out.dtype.element_ty))
    tl.store(to + 1, (tl.load(levels + (both & 15)) * by).to(out.dtype.element_ty))
