"""The frequencies of a rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fortwo.nn.rope_config import Llama3, Rope, Yarn


def inverse_frequency(rope: Rope) -> Tensor:
    """Of the pairs of numbers that are turned (size / 2,), scaled as the rope says."""
    power = rope.theta ** (torch.arange(0, rope.size, 2, dtype=torch.float32) / rope.size)
    inverse, scaling = 1.0 / power, rope.scaling
    if scaling is None:
        return inverse
    if isinstance(scaling, Llama3):
        return _llama3(inverse, scaling)
    if isinstance(scaling, Yarn):
        return _yarn(power, scaling)
    if isinstance(scaling, tuple):
        return 1.0 / (torch.tensor(scaling) * power)
    return inverse / scaling


def _llama3(inverse: Tensor, scaling: Llama3) -> Tensor:
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / scaling.factor, inverse)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled)


def _yarn(power: Tensor, scaling: Yarn) -> Tensor:
    low, high = scaling.low, scaling.high
    if low == high:
        high += 0.001
    stretched = ((torch.arange(len(power), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - stretched
    return (1 - kept) / (scaling.factor * power) + kept / power
