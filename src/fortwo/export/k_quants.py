"""Rounds weights to llama.cpp's Q4_K and Q6_K, whose blocks have 256 numbers.

For each small group a grid of scales is tried, and the one with the least weighted squared error stays. gguf writes the
simpler formats itself; it can only read these two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 256
_CHUNK = 4096  # blocks at once: about 4 MB of fp32


def quantize_q4_k(values: np.ndarray) -> np.ndarray:
    """values (rows, columns) in fp32 -> bytes (rows, columns / 256 * 144)."""
    return _by_blocks(values, _q4_k)


def quantize_q6_k(values: np.ndarray) -> np.ndarray:
    """values (rows, columns) in fp32 -> bytes (rows, columns / 256 * 210)."""
    return _by_blocks(values, _q6_k)


def _by_blocks(values: np.ndarray, quantize: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, BLOCK)
    parts = [quantize(blocks[start : start + _CHUNK]) for start in range(0, len(blocks), _CHUNK)]
    return np.concatenate(parts).reshape(values.shape[0], -1)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where below is 0."""
    found: np.ndarray = np.divide(above, below, out=np.zeros_like(above), where=below != 0)
    return found


def _half(values: np.ndarray) -> np.ndarray:
    """Rounded to fp16, as it is stored."""
    return values.astype(np.float16).astype(np.float32)


# ---------------------------------------------------------------- Q4_K: scale * q - minimum, q from 0 to 15


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    groups = blocks.reshape(-1, 8, 32)
    scale, minimum = _best_affine(groups)
    d, dmin = (_half(part.max(1, keepdims=True) / 63) for part in (scale, minimum))
    scales, minima = (
        np.clip(np.rint(_divide(part, np.broadcast_to(step, part.shape))), 0, 63).astype(np.uint8)
        for part, step in ((scale, d), (minimum, dmin))
    )
    step, offset = (d * scales)[..., None], (dmin * minima)[..., None]
    q = np.clip(np.rint(_divide(groups + offset, np.broadcast_to(step, groups.shape))), 0, 15).astype(np.uint8)
    pairs = q.reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    low = np.concatenate([scales[:, :4] | ((scales[:, 4:] >> 4) << 6), minima[:, :4] | ((minima[:, 4:] >> 4) << 6)], 1)
    high = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    heads = np.concatenate([d, dmin], 1).astype(np.float16).view(np.uint8)
    return np.concatenate([heads, low, high, packed], 1)


def _best_affine(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum (blocks, 8), both at least 0, of scale * q - minimum with q from 0 to 15. Large numbers weigh
    more."""
    weight = np.sqrt((groups**2).mean(-1, keepdims=True)) + np.abs(groups)
    lowest = np.minimum(groups.min(-1, keepdims=True), 0)
    span = groups.max(-1, keepdims=True) - lowest
    w, wx = weight.sum(-1), (weight * groups).sum(-1)
    scale, minimum = (span / 15)[..., 0], -lowest[..., 0]
    best = np.full(w.shape, np.inf, np.float32)
    for steps in (15.0, *(np.arange(21, dtype=np.float32) * 0.1 + 14)):
        q = np.clip(np.rint(_divide(steps * (groups - lowest), np.broadcast_to(span, groups.shape))), 0, 15)
        wq, wqq, wqx = (weight * q).sum(-1), (weight * q * q).sum(-1), (weight * q * groups).sum(-1)
        below = w * wqq - wq * wq
        below = np.where(below > 1e-4 * w * wqq, below, 0)  # otherwise all q are alike, and there is no slope
        tried, offset = _divide(w * wqx - wx * wq, below), _divide(wqq * wx - wq * wqx, below)
        positive = offset > 0
        tried = np.where(positive, _divide(wqx, wqq), tried)
        offset = np.where(positive, 0, offset)
        error = (weight * (tried[..., None] * q + offset[..., None] - groups) ** 2).sum(-1)
        better = (error < best) & (tried > 0) & (below > 0)
        best = np.where(better, error, best)
        scale, minimum = np.where(better, tried, scale), np.where(better, -offset, minimum)
    return scale, minimum


# ---------------------------------------------------------------- Q6_K: scale * q, q from -32 to 31


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    groups = blocks.reshape(-1, 16, 16)
    scale = _best_scale(groups)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    d = _half(largest / -128)
    scales = np.clip(np.rint(_divide(scale, np.broadcast_to(d, scale.shape))), -128, 127).astype(np.int8)
    step = (d * scales)[..., None]
    q = np.clip(np.rint(_divide(groups, np.broadcast_to(step, groups.shape))), -32, 31).astype(np.int8) + 32
    quarters = q.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([(quarters[:, :, n] & 15) | ((quarters[:, :, n + 2] & 15) << 4) for n in (0, 1)], -1)
    high = sum(((quarters[:, :, n] >> 4) << (2 * n)) for n in range(4))
    count = len(blocks)
    ends = d.astype(np.float16).view(np.uint8)
    return np.concatenate(
        [low.reshape(count, 128), np.asarray(high, np.uint8).reshape(count, 64), scales.view(np.uint8), ends], 1
    )


def _best_scale(groups: np.ndarray) -> np.ndarray:
    """The scale (blocks, 16) of scale * q with q from -32 to 31, errors weighted by the squares of the numbers."""
    weight = groups**2
    place = np.abs(groups).argmax(-1)[..., None]
    largest = np.take_along_axis(groups, place, -1)
    best, scale = np.zeros(groups.shape[:2], np.float32), np.zeros(groups.shape[:2], np.float32)
    for steps in np.arange(-9, 10, dtype=np.float32) * -0.1 - 32:
        q = np.clip(np.rint(_divide(steps * groups, np.broadcast_to(largest, groups.shape))), -32, 31)
        along, length = (weight * groups * q).sum(-1), (weight * q * q).sum(-1)
        gain = _divide(along * along, length)
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, _divide(along, length), scale)
    return scale
