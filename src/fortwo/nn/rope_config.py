"""Which rotary position embedding a config.json asks for, and in how many tokens it stays the same. Torch-free.

The types are those of transformers' modeling_rope_utils: default, linear, llama3, yarn (Peng et al. 2023,
arXiv:2309.00071), dynamic and longrope (Ding et al. 2024, arXiv:2402.13753).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fortwo.nn.config_fields import Fields

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_FORMER = {"su": "longrope"}  # how Phi-3 was first saved


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths are stretched by `factor`, short ones are kept; between them it is blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int


@dataclass(frozen=True)
class Yarn:
    """Frequencies below the number `low` are kept, those above `high` are divided by `factor`, between them it is
    blended."""

    factor: float
    low: float
    high: float


@dataclass(frozen=True)
class Rope:
    """theta: base of the frequencies; size: how many numbers of a head are turned, the first ones; scaling: of the
    frequencies, None for none, a number or one number for each frequency to divide them by; amplitude: of cos and
    sin."""

    theta: float
    size: int
    scaling: float | tuple[float, ...] | Llama3 | Yarn | None = None
    amplitude: float = 1.0


def read_rope(fields: Fields, head_size: int, context: int, original: int | None, partial: bool) -> tuple[Rope, int]:
    """The rope that rope_parameters describe, and the longest context in which it holds. context:
    max_position_embeddings; original: original_max_position_embeddings of the model, if it names one; partial: whether
    the family obeys partial_rotary_factor.

    The scaling "dynamic" begins behind `context`, and "longrope" changes all frequencies behind the original length,
    those of tokens that came before included. Within these lengths both are constant.
    """
    part = (fields.optional_number("partial_rotary_factor") if partial else None) or 1.0
    size = int(head_size * part)
    if size % 2 or not 0 < size <= head_size:
        fields.wrong("partial_rotary_factor", f"turns {size} of the {head_size} numbers of a head, not an even number")
        size = head_size
    theta = fields.number("rope_theta", above=1)
    kind = fields.raw("rope_type") or fields.raw("type") or "default"
    kind = _FORMER.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in TYPES:
        fields.wrong("rope_type", f"is not supported, only {', '.join(TYPES)}", kind)
    if kind == "linear":
        return Rope(theta, size, fields.number("factor")), context
    if kind not in ("llama3", "yarn", "longrope"):
        return Rope(theta, size), context
    original = original or fields.optional_whole("original_max_position_embeddings") or context
    if kind == "llama3":
        factor, low = fields.number("factor"), fields.number("low_freq_factor")
        return Rope(theta, size, Llama3(factor, low, fields.number("high_freq_factor", above=low), original)), context
    factor = fields.optional_number("factor") or context / original
    amplitude = fields.optional_number("attention_factor")
    if kind == "yarn":
        scaling = _yarn(fields, theta, size, factor, original)
        return Rope(theta, size, scaling, amplitude or _yarn_amplitude(fields, factor)), context
    short = fields.numbers("short_factor", size // 2)
    stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return Rope(theta, size, short, amplitude or stretched), min(context, original)


def _yarn(fields: Fields, theta: float, size: int, factor: float, original: int) -> Yarn:
    def number_of(turns: float) -> float:
        """Of the frequency that turns so often within the original length."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = number_of(fields.optional_number("beta_fast") or 32)
    high = number_of(fields.optional_number("beta_slow") or 1)
    truncate: Any = fields.raw("truncate")
    if truncate is None or truncate:
        low, high = math.floor(low), math.ceil(high)
    return Yarn(factor, max(low, 0), min(high, size - 1))


def _yarn_amplitude(fields: Fields, factor: float) -> float:
    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    by, of_all = fields.optional_number("mscale"), fields.optional_number("mscale_all_dim")
    return scale(by) / scale(of_all) if by and of_all else scale(1)
