"""Estimates of tokens, time and memory, from counts and from what the machine was seen to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fortwo.train.recipes import OverrideRecipe, Recipe

if TYPE_CHECKING:
    from fortwo.models.decoder import DecoderConfig

FLOAT = 4  # bytes: adapters are trained in fp32


@dataclass(frozen=True)
class BaseFacts:
    """What the plan must know of the base model. bytes: its weights as they are held."""

    id: str
    context: int
    vocabulary: int
    layers: int
    hidden: int
    intermediate: int
    q: int  # width of all query heads together
    kv: int  # width of all key heads together
    bytes: int

    @classmethod
    def of(cls, id: str, config: DecoderConfig, held: int) -> BaseFacts:
        return cls(
            id=id,
            context=config.context,
            vocabulary=config.vocabulary,
            layers=config.layers,
            hidden=config.hidden,
            intermediate=config.intermediate,
            q=config.heads * config.head_size,
            kv=config.kv_heads * config.head_size,
            bytes=held,
        )

    @property
    def parameters(self) -> int:
        """Of the weights that are multiplied with."""
        modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        inner = sum(math.prod(self.shape(module)) for module in modules)
        return self.layers * inner + self.vocabulary * self.hidden

    def shape(self, module: str) -> tuple[int, int]:
        """(in, out) of one projection."""
        return {
            "q_proj": (self.hidden, self.q),
            "k_proj": (self.hidden, self.kv),
            "v_proj": (self.hidden, self.kv),
            "o_proj": (self.q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[module]


@dataclass(frozen=True)
class RowCount:
    """Tokens of one rendered row; `answer` of them are supervised. line: 1-based place in the dataset."""

    line: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class TokenCounts:
    """rows: as `plan.training_rows` orders them; a conversation may be several. prefix: tokens all rows begin with,
    computed once a micro-step."""

    rows: Sequence[RowCount]
    prefix: int = 0


@dataclass(frozen=True)
class Machine:
    """What this machine does with this base: tokens trained and tokens generated a second; memory None is unknown.
    bf16: it has instructions for bf16 products."""

    tokens_per_second: float
    decode_tokens_per_second: float
    memory: int | None = None
    bf16: bool = False


def tokens_per_micro_step(counts: TokenCounts, rows: int, kept_tokens: int = 0, kept_rows: int = 0) -> float:
    """Tokens of `rows` average rows and of `kept_rows` whose replies are `kept_tokens` together, sharing the prefix."""
    prompt = sum(row.prompt for row in counts.rows) / len(counts.rows) - counts.prefix
    answer = sum(row.answer for row in counts.rows) / len(counts.rows)
    return counts.prefix + rows * (prompt + answer) + kept_rows * prompt + kept_tokens


def tokens_per_epoch(counts: TokenCounts, batch: int) -> int:
    """Tokens of every row once, `batch` rows on one shared prefix."""
    rests = sum(row.prompt + row.answer - counts.prefix for row in counts.rows)
    return math.ceil(len(counts.rows) / batch) * counts.prefix + rests


def seconds(tokens: int, recipe: Recipe, facts: int, exams: int, machine: Machine) -> float:
    """Time of a run that goes to its last step: training, and for override preparing and evaluating too."""
    generated = 0
    if isinstance(recipe, OverrideRecipe):
        generated = facts * (recipe.preparation_tokens + exams * recipe.evaluation_tokens)
    return tokens / machine.tokens_per_second + generated / machine.decode_tokens_per_second


def memory_bytes(base: BaseFacts, micro_step: float, r: int, modules: Sequence[str], bf16: bool) -> int:
    """Base weights (bf16: and a copy in it), the adapter with its gradient and AdamW's moments, and what backward needs
    of one micro-step; the logits are never there together."""
    adapter = base.layers * r * sum(sum(base.shape(module)) for module in modules)
    activations = base.layers * (6 * base.hidden + 2 * base.q + 2 * base.kv + 4 * base.intermediate)
    weights = base.bytes + (2 * base.parameters if bf16 else 0)
    return weights + round(FLOAT * (4 * adapter + micro_step * activations))


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
