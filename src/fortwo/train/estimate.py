"""Estimates of tokens, time and memory, from the lengths of the rows and the measured speed of the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from fortwo.facts.prompt_builder import BASE_REPLY_SHARE, CROSS_FACT_NEGATIVES, training_replay_prompts
from fortwo.nn.config import DecoderConfig, Shape
from fortwo.prompts import MAX_RUNNING, MIN_ROW_TOKENS
from fortwo.records import PlanValues
from fortwo.train.recipes import (
    EVALUATION_QUESTIONS,
    REPLY_MARGIN,
    REPLY_TOKENS,
    RETENTION_PROBES,
    SFT_QUESTIONS,
    SFT_TOKENS,
)

FLOAT = 4  # bytes: adapters are trained in fp32
PROCESS = 400 << 20  # bytes of a server without a model
MOMENTS = 2  # AdamW's moments, each of the size of the adapter
MOMENT_BLOCK = 256  # moments of 8 bits that share a scale
MOMENTS_8_BIT = MOMENTS * (1 / 4 + 1 / MOMENT_BLOCK)  # with the scale of each block
BEST_COPIES = 2  # further copies of the adapter if the best one is kept
HEAD_BYTES = 40 << 20  # logits that are in memory at once
HEAD_COPIES = 5  # copies of them: the adapter's, the teacher's, the gradient, and results of their products
FRAGMENTATION = 1.05  # memory that tensors of changing sizes occupy, relative to their sizes
MICRO_TOKENS = 1280  # most tokens of a micro-step beyond the prefix, unless the request says otherwise
SHORT_TOKENS = 64  # of the short micro-step whose time a trial measures, too
FEWEST_MICRO_TOKENS = 320  # 160 made steps up to 1.7 times as long as one piece did, 320 up to 1.25 times
WAIT = 0.5  # seconds for which replies wait for a job, about
LONGER_PASS = 0.6  # the share of a micro-step that its backward takes; replies have the device before and after it
WORTHWHILE = 1.1  # how many times as fast as fp32 training in bf16 must be to be chosen
PASSES = 3  # of a token that is trained on, to one that is only read: backward is two
CACHE_OVERALLOCATION = 1.5  # rows that the cache allocates, relative to those in use


class Network(Protocol):
    """A decoder, as far as its memory is concerned."""

    @property
    def config(self) -> Shape: ...
    @property
    def bytes(self) -> int: ...
    def bytes_to_train(self, bf16: bool) -> int: ...


@dataclass(frozen=True)
class LinearModule:
    """A linear module of some layers. names: PEFT's, one for each layer that has it; fused: outputs of the product that
    it is part of."""

    names: tuple[str, ...]
    inputs: int
    outputs: int
    fused: int


def linear_modules(config: Shape) -> dict[str, LinearModule]:
    """The linear modules that an adapter can change, by their name within a layer."""
    modules = {}
    for group, members in config.groups.items():
        fused = max(config.columns(name)[1] for name in members)
        for name in members:
            first, last = config.columns(name)
            names = tuple(config.module_name(layer, name) for layer in range(config.layers) if config.has(layer, name))
            modules[name] = LinearModule(names, config.in_features(group), last - first, fused)
    return modules


@dataclass(frozen=True)
class BaseFacts:
    """What the plan must know about the base model.

    bytes: the weights as they are stored; bf16_copy, fp32_copy: bytes of the additional copy for training in that type;
    targets: the modules of a layer that an adapter can change; cache: tokens whose keys and values fit, None for any
    number; kv_element: bytes of one element of them; generic: whether transformers computes the layers;
    without_attention: layers that keep no keys and values; state_bytes: what a reply keeps besides them.
    """

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
    targets: Mapping[str, LinearModule]
    cache: int | None = None
    kv_element: int = FLOAT
    generic: bool = False
    without_attention: int = 0
    state_bytes: int = 0

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
            targets=linear_modules(config),
            cache=cache,
            kv_element=kv_element,
            generic=not isinstance(config, DecoderConfig),
            without_attention=config.layers - config.kv_layers,
            state_bytes=config.state_bytes,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.kv_element * (self.layers - self.without_attention) * self.kv


@dataclass(frozen=True)
class RowLength:
    """The tokens of one rendered row, of which `answer` are supervised. line: 1-based line in the dataset."""

    line: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class TokenCounts:
    """The lengths of all rows, in the order of `plan.training_rows`; a conversation may give several rows. prefix:
    number of tokens that all rows begin with, which are computed once in each micro-step."""

    rows: Sequence[RowLength]
    prefix: int = 0


@dataclass(frozen=True)
class Machine:
    """How fast this machine is with a base model.

    trained: tokens trained a second by the type of the products, fp32 and bf16, as a trial measured it; a type that is
    missing was not worth a trial. reply_tokens_per_second: of replies, their prompts included. memory: bytes, None if
    unknown. seen: as `trained`, from the newest job. short: as `trained`, in micro-steps of SHORT_TOKENS instead of
    MICRO_TOKENS. bf16, micro_step: the type and the tokens of a micro-step that the estimates are for.
    """

    trained: Mapping[str, float]
    reply_tokens_per_second: float
    memory: int | None = None
    seen: Mapping[str, float] = field(default_factory=dict)
    short: Mapping[str, float] = field(default_factory=dict)
    bf16: bool = False
    micro_step: float = MICRO_TOKENS

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained a second in the type, and in micro-steps of the size, that the estimates are for."""
        return self.seen.get(_type_name(self.bf16)) or self.trial_rate(self.bf16)

    def trial_rate(self, bf16: bool) -> float:
        """Tokens trained a second in a type, as the trial measured it, or in the fastest if it was not tried."""
        return self.rates.get(_type_name(bf16)) or max(self.rates.values())

    @property
    def rates(self) -> dict[str, float]:
        """Tokens trained a second by type, in micro-steps of the size that the estimates are for. A micro-step's time
        grows with its tokens as between the two that the trial measured."""
        return {name: self._rate(rate, self.short.get(name, rate)) for name, rate in self.trained.items()}

    def _rate(self, long: float, short: float) -> float:
        at_least = SHORT_TOKENS / short
        each = max(0.0, MICRO_TOKENS / long - at_least) / (MICRO_TOKENS - SHORT_TOKENS)
        return self.micro_step / max(self.micro_step / long, at_least + (self.micro_step - SHORT_TOKENS) * each)

    @property
    def faster_in_bf16(self) -> bool:
        """Whether bf16 was measured to be faster by more than two measurements of the same thing differ."""
        return self.rates.get("bf16", 0.0) > WORTHWHILE * self.rates.get("fp32", 0.0)


def _type_name(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"


def choose_micro_tokens(tokens_per_second: float) -> int:
    """The tokens of a micro-step of which neither forward nor backward takes much longer than WAIT: MICRO_TOKENS, or
    that halved some times, since near values would make the bits of a run depend on the noise of a measurement."""
    wanted = max(1.0, tokens_per_second) * WAIT / LONGER_PASS
    return max(FEWEST_MICRO_TOKENS, MICRO_TOKENS >> max(0, round(math.log2(MICRO_TOKENS / wanted))))


@dataclass(frozen=True)
class PhaseCost:
    """Tokens that a phase of a run trains on, reads without a gradient (except prompts of replies), and generates."""

    trained: float = 0.0
    read: float = 0.0
    generated: float = 0.0

    def seconds(self, machine: Machine) -> float:
        passed = (self.trained + self.read / PASSES) / machine.tokens_per_second
        return passed + self.generated / machine.reply_tokens_per_second


@dataclass(frozen=True)
class RunCost:
    """The cost of a run that is not stopped early. exam: all evaluations, and the on-policy replies between them."""

    preparing: PhaseCost
    training: PhaseCost
    exam: PhaseCost
    report: PhaseCost

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Seconds in total and by phase, under the names that `actual` uses too."""
        each = {f"{one.name}_seconds": getattr(self, one.name).seconds(machine) for one in fields(self)}
        return {"seconds": sum(each.values())} | each


def tokens_per_micro_step(counts: TokenCounts, rows: int, kl_tokens: int = 0, kl_rows: int = 0) -> float:
    """Tokens of `rows` average rows and of `kl_rows` KL rows with `kl_tokens` reply tokens in all; the prefix counts
    once."""
    prompt = _prompt_tokens(counts)
    answer = sum(row.answer for row in counts.rows) / len(counts.rows)
    return counts.prefix + rows * (prompt + answer) + kl_rows * prompt + kl_tokens


def tokens_per_epoch(counts: TokenCounts, batch: int) -> int:
    """Tokens of an epoch; each batch of `batch` rows computes the shared prefix once."""
    suffixes = sum(row.prompt + row.answer - counts.prefix for row in counts.rows)
    return math.ceil(len(counts.rows) / batch) * counts.prefix + suffixes


def override_cost(
    settings: PlanValues, counts: TokenCounts, facts: int, parent_facts: int, trained: float, evaluations: int
) -> RunCost:
    """The cost of an override run. facts, parent_facts: numbers of facts that are taught, and of the parent; trained:
    tokens of all steps."""
    prompt, reply, questions = _prompt_tokens(counts), _reply_tokens(counts), len(counts.rows) / facts
    contrasts = facts * settings["contrast_pool"] + (parent_facts * settings["kept_pool"] if parent_facts else 0)
    of_contrast, of_rehearsal = settings["contrast_tokens"], settings["rehearsal_tokens"]
    replays = min(settings["rehearsal_pool"], len(training_replay_prompts()))
    teacher = contrasts * of_contrast + replays * of_rehearsal
    total = facts + parent_facts
    probes = total * 2 * settings["probes"] + CROSS_FACT_NEGATIVES * total * (total - 1)
    retention = RETENTION_PROBES * (prompt + reply)
    on_policy, of_on_policy = (evaluations - 1) * settings["on_policy_prompts"], settings["on_policy_tokens"]
    asked = total * min(EVALUATION_QUESTIONS, questions) + probes
    left = total * max(0, questions - EVALUATION_QUESTIONS) + RETENTION_PROBES
    return RunCost(
        PhaseCost(
            read=(contrasts + replays) * prompt + teacher,
            generated=BASE_REPLY_SHARE * contrasts * of_contrast + replays * of_rehearsal,
        ),
        PhaseCost(trained=trained),
        PhaseCost(
            read=on_policy * (prompt + of_on_policy) + evaluations * retention,
            generated=on_policy * of_on_policy + (evaluations * asked + RETENTION_PROBES) * reply,
        ),
        PhaseCost(read=2 * retention, generated=(left + 2 * (total * questions + probes)) * reply),
    )


def sft_cost(counts: TokenCounts, trained: float, validated: float) -> RunCost:
    """The cost of an sft run. trained: tokens of all steps; validated: validation tokens over all evaluations."""
    prompt, (asked, reply) = _prompt_tokens(counts), _sft_replies(counts)
    report = PhaseCost(read=RETENTION_PROBES * (prompt + reply), generated=2 * asked * reply)
    return RunCost(PhaseCost(), PhaseCost(trained=trained), PhaseCost(read=validated), report)


def preference_cost(
    counts: TokenCounts, trained: float, validated: float, reference: float, estimated: float, units: int
) -> RunCost:
    """The cost of a run on preferences. trained, validated: as in `sft_cost`; reference: tokens that the reference
    reads before the first step; estimated: tokens that are read in the steps for KTO's estimate of the divergence;
    units: pairs or answers that are read to measure the report's accuracy."""
    prompt, reply = _prompt_tokens(counts), REPLY_TOKENS
    mean = sum(row.prompt + row.answer for row in counts.rows) / len(counts.rows)
    judged = units * mean
    report = PhaseCost(read=RETENTION_PROBES * (prompt + reply) + judged, generated=2 * RETENTION_PROBES * reply)
    return RunCost(
        PhaseCost(read=reference), PhaseCost(trained=trained, read=estimated), PhaseCost(read=validated), report
    )


def _prompt_tokens(counts: TokenCounts) -> float:
    """Mean tokens of a prompt beyond the prefix."""
    return sum(row.prompt for row in counts.rows) / len(counts.rows) - counts.prefix


def _reply_tokens(counts: TokenCounts) -> int:
    """Tokens of a reply in an evaluation."""
    return max(REPLY_TOKENS, REPLY_MARGIN + max(row.answer for row in counts.rows))


def _sft_replies(counts: TokenCounts) -> tuple[int, int]:
    """The number of replies in an evaluation, and the tokens of each."""
    return min(SFT_QUESTIONS, len(counts.rows)) + RETENTION_PROBES, min(SFT_TOKENS, _reply_tokens(counts))


@dataclass(frozen=True)
class Memory:
    """Bytes at the peaks of a run: during training, and during an evaluation (exam)."""

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
    """The peak memory of a run: the process, the base's weights with their copy for training, the adapter with its
    gradient, moments and copies; and either the activations of one micro-step or the keys and values of the replies.
    micro_step: its tokens. ranks: the rank of each adapted module. checkpointing: only the inputs of the layers and the
    activations of one layer are stored. best: the best adapter is kept. moments: the optimizer's, in copies of the
    adapter. replies: tokens whose keys and values are stored in an evaluation."""
    element = 2 if bf16 else FLOAT
    targets = [(r, base.targets[name]) for name, r in ranks.items()]
    adapter = sum(r * len(target.names) * (target.inputs + target.outputs) for r, target in targets)
    sums, inputs = 2 * base.hidden, 2 * base.hidden + 2 * base.q + 2 * base.kv + 3 * base.intermediate
    layer = micro_step * (FLOAT * sums + element * inputs)
    # the adapter's matrices as the products read them: each B has as many rows as the fused product has outputs
    layer += element * sum(r * (target.inputs + target.fused) for r, target in targets)
    activations = base.layers * layer
    if checkpointing:
        activations = layer + base.layers * micro_step * (FLOAT + element) * base.hidden
    # the gradient, and twice the adapter with its moments, since a checkpoint that is being written is a copy of them
    states = 1 + 2 * (1 + moments) + (BEST_COPIES if best else 0)
    constant = PROCESS + base.bytes + (base.bf16_copy if bf16 else base.fp32_copy) + states * FLOAT * adapter
    at_once = min(MAX_RUNNING, replies // MIN_ROW_TOKENS)
    kept = base.kv_bytes_per_token * replies + base.state_bytes * at_once
    if base.cache is not None:
        kept = min(kept, base.kv_bytes_per_token * base.cache)
    growing = kept * (1 + 1 / CACHE_OVERALLOCATION)  # what it had so far is there twice while the cache grows
    training = constant + FRAGMENTATION * (activations + HEAD_COPIES * HEAD_BYTES)
    return Memory(round(training), round(constant + growing))


def cache_tokens(counts: TokenCounts, sft: bool) -> int:
    """Tokens for which the cache allocates memory in an evaluation: one row for each concurrent reply, with a length
    that is a power of two."""
    asked, reply = _sft_replies(counts) if sft else (MAX_RUNNING, _reply_tokens(counts))
    longest = max(row.prompt for row in counts.rows) + reply
    return round(CACHE_OVERALLOCATION * min(MAX_RUNNING, asked)) * max(
        MIN_ROW_TOKENS, 1 << math.ceil(math.log2(longest))
    )


def format_duration(seconds: float) -> str:
    """Seconds in a readable form: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_size(bytes: int) -> str:
    """Bytes in a readable form: "5.2 GiB"."""
    return f"{bytes / 2**30:.1f} GiB"
