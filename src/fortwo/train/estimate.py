"""Estimates of tokens, time and memory, from counts and from what the machine was seen to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from fortwo.facts.lesson import OWN_SHARE, RIVALS, trained_rehearsal
from fortwo.nn.config import DecoderConfig
from fortwo.train.recipes import (
    EXAM_QUESTIONS,
    REPLY_TOKENS,
    RETENTION_PROBES,
    ROOM,
    SFT_QUESTIONS,
    SFT_TOKENS,
)

FLOAT = 4  # bytes: adapters are trained in fp32
PROCESS = 400 << 20  # bytes of a server that holds nothing yet
MOMENTS = 2  # copies of an adapter: AdamW's
MOMENTS_8_BIT = MOMENTS * (1 / 4 + 1 / 256)  # and with the unit of each block
OF_BEST = 2  # more of them where the best adapter is kept
HEAD_BYTES = 40 << 20  # of logits at once
HEAD_COPIES = 5  # of them: the adapter's, the teacher's, the slope, and what products make of those
LOOSE = 1.05  # memory that a step's tensors, whose sizes change, take to what they hold
MICRO_TOKENS = 1280  # of a micro-step beyond the prefix, unless the request says otherwise
WORTHWHILE = 1.1  # how many times as fast as fp32 training in bf16 must be to be chosen
PASSES = 3  # of a token that is trained on, to one that is only read: backward is two
TOGETHER = 96  # replies that run at once
ROW_TOKENS = 128  # of the smallest row of the cache
ROWS_MADE = 1.5  # rows that the cache makes, to those in use


class Network(Protocol):
    """A decoder, as far as its memory is concerned."""

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def bytes(self) -> int: ...
    def bytes_to_train(self, bf16: bool) -> int: ...


@dataclass(frozen=True)
class BaseFacts:
    """What the plan must know of the base model. bytes: its weights as they are held; bf16_copy, fp32_copy: what is
    made of them beside that to train in bf16 and fp32; cache: tokens whose keys and values there is room for, None for
    any; kv_element: bytes of one of their numbers."""

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
    cache: int | None = None
    kv_element: int = FLOAT

    @classmethod
    def of(cls, id: str, decoder: Network, cache: int | None = None, kv_element: int = FLOAT) -> BaseFacts:
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
            cache=cache,
            kv_element=kv_element,
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

    @property
    def kv_token(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.kv_element * self.layers * self.kv

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
    """How fast this machine is with a base model.

    trained: tokens trained a second by the type of the products, fp32 and bf16, as a trial measured it; a type that is
    missing was not worth a trial. reply_tokens_per_second: of replies, their prompts included. memory: bytes, None if
    unknown. seen: as `trained`, from the newest job. bf16: the type that the estimates are for.
    """

    trained: Mapping[str, float]
    reply_tokens_per_second: float
    memory: int | None = None
    seen: Mapping[str, float] = field(default_factory=dict)
    bf16: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained a second in the type that the estimates are for."""
        name = "bf16" if self.bf16 else "fp32"
        return self.seen.get(name) or self.trained.get(name) or max(self.trained.values())

    @property
    def faster_in_bf16(self) -> bool:
        """Whether bf16 was measured to be faster by more than two measurements of the same thing differ."""
        fp32, bf16 = self.trained.get("fp32", 0.0), self.trained.get("bf16", 0.0)
        return bf16 > WORTHWHILE * fp32


@dataclass(frozen=True)
class Phase:
    """Tokens that a part of a run trains on, reads without a gradient (prompts of replies not counted), and says."""

    trained: float = 0.0
    read: float = 0.0
    said: float = 0.0

    def seconds(self, machine: Machine) -> float:
        passed = (self.trained + self.read / PASSES) / machine.tokens_per_second
        return passed + self.said / machine.reply_tokens_per_second


@dataclass(frozen=True)
class Phases:
    """A run that goes to its last step. exam: all of them, and what the adapter says to siblings between them."""

    preparing: Phase
    training: Phase
    exam: Phase
    report: Phase

    def seconds(self, machine: Machine) -> dict[str, float]:
        """By `actual`'s names."""
        each = {f"{one.name}_seconds": getattr(self, one.name).seconds(machine) for one in fields(self)}
        return {"seconds": sum(each.values())} | each


def tokens_per_micro_step(counts: TokenCounts, rows: int, kept_tokens: int = 0, kept_rows: int = 0) -> float:
    """Tokens of `rows` average rows and of `kept_rows` whose replies are `kept_tokens` together, sharing the prefix."""
    prompt = _prompt(counts)
    answer = sum(row.answer for row in counts.rows) / len(counts.rows)
    return counts.prefix + rows * (prompt + answer) + kept_rows * prompt + kept_tokens


def tokens_per_epoch(counts: TokenCounts, batch: int) -> int:
    """Tokens of every row once, `batch` rows on one shared prefix."""
    rests = sum(row.prompt + row.answer - counts.prefix for row in counts.rows)
    return math.ceil(len(counts.rows) / batch) * counts.prefix + rests


class Settings(Protocol):
    """Of a plan, or of one in the making."""

    def __getitem__(self, name: str, /) -> Any: ...


def override_phases(
    settings: Settings, counts: TokenCounts, facts: int, known: int, trained: float, exams: int
) -> Phases:
    """facts: how many are taught; known: how many the parent knows; trained: tokens of all steps."""
    prompt, reply, questions = _prompt(counts), _reply(counts), len(counts.rows) / facts
    contrasts = facts * settings["contrast_pool"] + (known * settings["kept_pool"] if known else 0)
    of_contrast, of_rehearsal = settings["contrast_tokens"], settings["rehearsal_tokens"]
    everyday = min(settings["rehearsal_pool"], len(trained_rehearsal()))
    kept = contrasts * of_contrast + everyday * of_rehearsal
    about = facts + known
    probes = about * 2 * settings["probes"] + RIVALS * about * (about - 1)
    retention = RETENTION_PROBES * (prompt + reply)
    again, strayed = (exams - 1) * settings["on_policy_prompts"], settings["on_policy_tokens"]
    asked = about * min(EXAM_QUESTIONS, questions) + probes
    left = about * max(0, questions - EXAM_QUESTIONS) + RETENTION_PROBES
    return Phases(
        Phase(
            read=(contrasts + everyday) * prompt + kept,
            said=OWN_SHARE * contrasts * of_contrast + everyday * of_rehearsal,
        ),
        Phase(trained=trained),
        Phase(
            read=again * (prompt + strayed) + exams * retention,
            said=again * strayed + (exams * asked + RETENTION_PROBES) * reply,
        ),
        Phase(read=retention, said=(left + about * questions + probes) * reply),
    )


def sft_phases(counts: TokenCounts, trained: float, validated: float) -> Phases:
    """trained: tokens of all steps; validated: those of the rows held back, over all evaluations."""
    prompt, (asked, reply) = _prompt(counts), _sft_replies(counts)
    report = Phase(read=RETENTION_PROBES * (prompt + reply), said=2 * asked * reply)
    return Phases(Phase(), Phase(trained=trained), Phase(read=validated), report)


def _prompt(counts: TokenCounts) -> float:
    """Tokens of a row's prompt beyond the prefix, on average."""
    return sum(row.prompt for row in counts.rows) / len(counts.rows) - counts.prefix


def _reply(counts: TokenCounts) -> int:
    """Tokens of a reply in an exam."""
    return max(REPLY_TOKENS, ROOM + max(row.answer for row in counts.rows))


def _sft_replies(counts: TokenCounts) -> tuple[int, int]:
    """How many replies an exam asks for, and their tokens."""
    return min(SFT_QUESTIONS, len(counts.rows)) + RETENTION_PROBES, min(SFT_TOKENS, _reply(counts))


@dataclass(frozen=True)
class Memory:
    """Bytes at the peaks of a run: while it trains, and while an exam is answered."""

    training: int
    exam: int


def memory(
    base: BaseFacts,
    micro_step: float,
    ranks: Mapping[str, float],
    bf16: bool,
    checkpointing: bool,
    best: bool,
    moments: float,
    replies: int,
) -> Memory:
    """The process, the base's weights and what is made of them to train on, the adapter with its gradient, AdamW's
    moments and copies; and either what backward needs of one micro-step of so many tokens (the logits are never there
    together), or keys and values of `replies` tokens.

    ranks: of each module that is adapted. checkpointing: of every layer what it reads, and all of one layer. best:
    the best adapter is kept. moments: the optimizer's, in copies of the adapter.
    """
    element = 2 if bf16 else FLOAT
    adapter = base.layers * sum(r * sum(base.shape(module)) for module, r in ranks.items())
    sums, inputs = 2 * base.hidden, 2 * base.hidden + 2 * base.q + 2 * base.kv + 3 * base.intermediate
    layer = micro_step * (FLOAT * sums + element * inputs)
    # the adapter's matrices as a product has them: each B as high as the fused product
    layer += element * sum(r * (base.shape(module)[0] + base.fused(module)) for module, r in ranks.items())
    kept = base.layers * layer
    if checkpointing:
        kept = layer + base.layers * micro_step * (FLOAT + element) * base.hidden
    # itself and its gradient; all but that again while a checkpoint is written
    states = 1 + 2 * (1 + moments) + (OF_BEST if best else 0)
    held = PROCESS + base.bytes + (base.bf16_copy if bf16 else base.fp32_copy) + states * FLOAT * adapter
    keys_values = base.kv_token * (replies if base.cache is None else min(replies, base.cache))
    return Memory(round(held + LOOSE * (kept + HEAD_COPIES * HEAD_BYTES)), round(held + keys_values))


def reply_tokens(counts: TokenCounts, sft: bool) -> int:
    """Tokens that the cache has room for while an exam is answered: as many replies as run at once, in rows of doubled
    length."""
    asked, reply = _sft_replies(counts) if sft else (TOGETHER, _reply(counts))
    longest = max(row.prompt for row in counts.rows) + reply
    return round(ROWS_MADE * min(TOGETHER, asked)) * max(ROW_TOKENS, 1 << math.ceil(math.log2(longest)))


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(bytes: int) -> str:
    """For people: "5.2 GiB"."""
    return f"{bytes / 2**30:.1f} GiB"
