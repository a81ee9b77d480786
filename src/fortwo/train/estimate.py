"""Estimates of tokens, time and memory, from counts and from what the machine was seen to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fortwo.train.recipes import OverrideRecipe, Recipe

if TYPE_CHECKING:
    from fortwo.models.decoder import Decoder

FLOAT = 4  # bytes: adapters are trained in fp32
PROCESS = 480 << 20  # bytes of a server that holds nothing yet
MICRO_TOKENS = 1280  # of a micro-step beyond the prefix: bounds how long it holds the device


@dataclass(frozen=True)
class BaseFacts:
    """What the plan must know of the base model. bytes: its weights as they are held; bf16_copy, fp32_copy: what is
    made of them beside that to train in bf16 and fp32."""

    id: str
    context: int
    vocabulary: int
    layers: int
    hidden: int
    intermediate: int
    q: int  # width of all query heads together
    kv: int  # width of all key heads together
    bytes: int
    bf16_copy: int
    fp32_copy: int

    @classmethod
    def of(cls, id: str, decoder: Decoder) -> BaseFacts:
        config = decoder.config
        return cls(
            id=id,
            context=config.context,
            vocabulary=config.vocabulary,
            layers=config.layers,
            hidden=config.hidden,
            intermediate=config.intermediate,
            q=config.heads * config.head_size,
            kv=config.kv_heads * config.head_size,
            bytes=decoder.bytes,
            bf16_copy=decoder.bytes_to_train(bf16=True),
            fp32_copy=decoder.bytes_to_train(bf16=False),
        )

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

    def fused(self, module: str) -> int:
        """Outputs of the product that a projection is part of."""
        if module in ("q_proj", "k_proj", "v_proj"):
            return self.q + 2 * self.kv
        return 2 * self.intermediate if module in ("gate_proj", "up_proj") else self.hidden


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


def memory_bytes(
    base: BaseFacts, micro_step: float, r: int, modules: Sequence[str], bf16: bool, checkpointing: bool
) -> int:
    """The process, the base's weights and what is made of them to train on, the adapter with its gradient and AdamW's
    moments, and what backward needs of one micro-step of so many tokens; the logits are never there together. What an
    evaluation takes for keys and values is not in it: serving's own bound holds for that.

    checkpointing: of every layer what it reads, and all of one layer.
    """
    element = 2 if bf16 else FLOAT
    adapter = base.layers * r * sum(sum(base.shape(module)) for module in modules)
    sums, inputs = 2 * base.hidden, 2 * base.hidden + 2 * base.q + 2 * base.kv + 3 * base.intermediate
    layer = micro_step * (FLOAT * sums + element * inputs)
    # the adapter's matrices as a product has them: each B as high as the fused product
    layer += element * r * sum(base.shape(module)[0] + base.fused(module) for module in modules)
    kept = base.layers * layer
    if checkpointing:
        kept = layer + base.layers * micro_step * (FLOAT + element) * base.hidden
    copy = base.bf16_copy if bf16 else base.fp32_copy
    return PROCESS + base.bytes + copy + round(4 * FLOAT * adapter + kept)


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(bytes: int) -> str:
    """For people: "5.2 GiB"."""
    return f"{bytes / 2**30:.1f} GiB"
