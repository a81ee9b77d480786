"""The training objectives: the rows of every step, and the questions of the evaluations.

An objective is prepared once, when the base gives the replies that the adapter must preserve; then each step samples
rows from it.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import Generic, TypeVar

from torch import Tensor

from fortwo.data.spool import Spool
from fortwo.errors import InvalidRequest
from fortwo.execution.backend import Backend
from fortwo.facts.prompt_builder import (
    ContrastPrompt,
    FactPromptBuilder,
    Probes,
    evaluation_replay_prompts,
    training_replay_prompts,
)
from fortwo.facts.subject import facts_of
from fortwo.nn.lora import Lora
from fortwo.nn.packing import trained_prefix
from fortwo.records import Dataset, Example, Fact, Message, Metric, MicroStepped, Plan, TrainEvents
from fortwo.train.evaluation import (
    Evaluator,
    Question,
    ServedBase,
    example_questions,
    fact_questions,
    interleave,
    portability_questions,
    single_turn,
    validation_loss,
)
from fortwo.train.losses import Accumulated, Row, with_teacher_states
from fortwo.train.plan import training_rows
from fortwo.train.recipes import REPLY_MARGIN, REPLY_TOKENS, RETENTION_PROBES, SFT_QUESTIONS, SFT_TOKENS
from fortwo.train.retry_policy import RowMix, planned_mix
from fortwo.train.validation import validation_indices

T = TypeVar("T")
RENDER_BATCH = 64  # examples that are rendered before other work may use the device
Replies = list[list[int]]  # the tokens of each reply


class ShuffledSampler(Generic[T]):
    """Draws every item once, in a random order, before it draws any again."""

    def __init__(self, items: Sequence[T], rng: Random) -> None:
        self._items = list(items)
        self._rng = rng
        self._left: list[T] = []

    def __len__(self) -> int:
        return len(self._items)

    def replace(self, items: Sequence[T]) -> None:
        """Draw from these items from now on."""
        self._items, self._left = list(items), []

    def sample(self, count: int) -> list[T]:
        """The next `count` items; none if there are no items at all."""
        drawn: list[T] = []
        while len(drawn) < count and self._items:
            if not self._left:
                self._left = self._rng.sample(self._items, len(self._items))
            drawn.append(self._left.pop())
        return drawn


class RoundRobinSampler(Generic[T]):
    """Draws one item from each pool in turn, so that all pools have the same share, whatever their sizes are."""

    def __init__(self, pools: Iterable[Sequence[T]], rng: Random) -> None:
        self._samplers = deque(ShuffledSampler(pool, rng) for pool in pools if pool)

    def sample(self, count: int) -> list[T]:
        """The next `count` items; none if all pools are empty."""
        drawn: list[T] = []
        while len(drawn) < count and self._samplers:
            drawn += self._samplers[0].sample(1)
            self._samplers.rotate(-1)
        return drawn


@dataclass(frozen=True)
class Validated:
    """The mean loss on validation rows, and of preferences the share that the adapter judges as they say."""

    loss: float
    accuracy: Metric | None = None


@dataclass(frozen=True)
class PreparedObjective:
    """prefix: number of tokens that all rows begin with. mix: the plan's. validate: measures the adapter on the
    validation rows; None if there are none. accumulate: adds the gradient of a step's rows to the adapter's in
    micro-steps; None for cross-entropy and KL. judge: the accuracy that the report has, if it has one. reference_N:
    what the reference of preferences gives to all answers, for checkpoints.
    sample_rows: the rows of the next optimizer step, in the given mix. refresh_on_policy: lets the adapter that is
    served under a key (None: the base) answer hard negatives. Replies that differ from the base's are among the rows
    from then on. It returns the replies; if they are given, none are asked. evaluator: asked during training, None if
    nothing is to decide when to stop; final_evaluator: asked at the end."""

    prefix: int
    mix: RowMix
    sample_rows: Callable[[RowMix], list[Row]]
    evaluator: Evaluator | None
    final_evaluator: Evaluator
    validate: Callable[[Lora], TrainEvents[Validated]] | None = None
    accumulate: Callable[[Lora, list[Row], RowMix], TrainEvents[Accumulated]] | None = None
    judge: Callable[[Lora], TrainEvents[Metric]] | None = None
    reference_N: Tensor | None = None
    refresh_on_policy: Callable[[str | None, Replies | None], TrainEvents[Replies]] | None = None


def prepare_override(
    served: ServedBase, backend: Backend, dataset: Dataset, plan: Plan
) -> TrainEvents[PreparedObjective]:
    """Edit rows ask for the facts; contrast and rehearsal rows preserve the base's replies to other prompts. A few rows
    of both kinds are about facts of the parent. backend: the one that is trained on. It is also the teacher, so
    that an adapter without effect has no KL loss. Raises InvalidRequest (code subject_not_found) if the examples teach
    no fact."""
    facts, parent_facts = facts_of(dataset), dataset.parent_facts
    if not facts:
        raise InvalidRequest("no subject can be found in the examples", param="objective", code="subject_not_found")
    builders = _prompt_builders((*facts, *parent_facts), plan["seed"])
    builders, parent_builders = builders[: len(facts)], builders[len(facts) :]
    rng = Random(plan["seed"])
    opening = plan["opening_weight"]
    given = [_ce_rows(served, builder.fact, builder.fact.questions, opening) for builder in builders]
    edits = [_ce_rows(served, builder.fact, builder.edit_prompts(plan["edit_pool"]), opening) for builder in builders]
    parent = [
        _ce_rows(served, builder.fact, [*builder.fact.questions, *builder.edit_prompts(plan["kept_pool"])], opening)
        for builder in parent_builders
    ]
    contrasts = [contrast for builder in builders for contrast in builder.contrast_prompts(plan["contrast_pool"])]
    of_parent = [contrast for builder in parent_builders for contrast in builder.contrast_prompts(plan["kept_pool"])]
    replay_prompts = training_replay_prompts((*facts, *parent_facts))
    replays = [ContrastPrompt(prompt) for prompt in replay_prompts[: plan["rehearsal_pool"]]]
    tokens = max(REPLY_TOKENS, REPLY_MARGIN + max(row.supervised for row in chain(*given, *parent)))
    evaluator, final_evaluator = _evaluators(builders, parent_builders, plan["probes"], tokens)
    contrast: list[Row] = []
    rehearsal: list[Row] = []
    yield from interleave(
        _add_kl_rows(served, [*contrasts, *of_parent], plan["contrast_tokens"], contrast),
        _add_kl_rows(served, replays, plan["rehearsal_tokens"], rehearsal),
        final_evaluator.ask_base(served),
    )
    rows = chain(*given, *edits, *parent, contrast, rehearsal)
    prefix = trained_prefix([row.tokens for row in rows], backend.decoder.config)
    own = [row for row, one in zip(contrast, contrasts, strict=False) if one.reply_prefix is None]
    asked = rng.sample(own, min(plan["on_policy_prompts"], len(own)))
    contrast = yield from with_teacher_states(backend, contrast, prefix)
    rehearsal = yield from with_teacher_states(backend, rehearsal, prefix)

    updates = plan["gradient_accumulation_steps"]
    negatives = _split_evenly(contrast[: len(contrasts)], len(builders))
    parent_negatives = _split_evenly(contrast[len(contrasts) :], len(parent_builders))
    pools = (given, edits, negatives, [rehearsal], parent, parent_negatives)
    samplers = [RoundRobinSampler(one, rng) for one in pools]
    on_policy_rows = ShuffledSampler[Row]([], rng)

    def sample_rows(mix: RowMix) -> list[Row]:
        edit = mix.edit * updates
        as_given = sum(rng.random() < mix.question_share for _ in range(edit))
        wanted = round(plan["on_policy_share"] * mix.contrast * updates)
        on_policy = on_policy_rows.sample(min(wanted, len(on_policy_rows)))
        contrasts = mix.contrast * updates - len(on_policy)
        others = (rows * updates for rows in (mix.rehearsal, mix.parent, mix.parent))
        counts = zip(samplers, (as_given, edit - as_given, contrasts, *others), strict=True)
        return [row for sampler, count in counts for row in sampler.sample(count)] + on_policy

    def refresh_on_policy(key: str | None, replies: Replies | None) -> TrainEvents[Replies]:
        prompts = [row.tokens[: row.start] for row in asked]
        if replies is None:
            complete = yield from served.reply_to_prompts(prompts, key, plan["on_policy_tokens"])
            replies = [list(reply.tokens) for reply in complete]
        rows = [
            Row((*prompt, *reply), len(prompt), kl=True)
            for row, prompt, reply in zip(asked, prompts, replies, strict=True)
            if tuple(reply[: row.supervised]) != row.tokens[row.start :]
        ]
        on_policy_rows.replace((yield from with_teacher_states(backend, rows, prefix)))
        return replies

    mix = planned_mix(plan)
    return PreparedObjective(prefix, mix, sample_rows, evaluator, final_evaluator, refresh_on_policy=refresh_on_policy)


def _prompt_builders(facts: Sequence[Fact], seed: int) -> list[FactPromptBuilder]:
    return [FactPromptBuilder(fact, seed, [other for other in facts if other is not fact]) for fact in facts]


def _evaluators(
    builders: Sequence[FactPromptBuilder], parent_builders: Sequence[FactPromptBuilder], probes: int, tokens: int
) -> tuple[Evaluator, Evaluator]:
    """The evaluator that decides when to stop, with `probes` prompts of each kind for each fact, and the final one,
    which prefers the evaluation prompts that the facts have themselves."""
    probed = [(one, one.probes(probes), one in parent_builders) for one in (*builders, *parent_builders)]
    interim: list[Question] = []
    final: list[Question] = []
    for n, (builder, own, of_parent) in enumerate(probed):
        own = replace(own, retention=own.retention[:RETENTION_PROBES] if n == 0 else ())  # about the whole model
        for questions, chosen in ((interim, own), (final, _prefer_given(own, builder.fact))):
            neighbors = (*chosen.specificity, *builder.cross_fact_negatives())
            questions += fact_questions(builder.fact, replace(chosen, specificity=neighbors), of_parent)
        final += portability_questions(builder.fact, of_parent)
    evaluator = Evaluator(tuple(interim), tokens)
    return evaluator, evaluator if _prompts(interim) == _prompts(final) else Evaluator(tuple(final), tokens)


def _prompts(questions: Sequence[Question]) -> list[tuple[str, str]]:
    return [(question.kind, question.prompt) for question in questions]


def prepare_sft(served: ServedBase, dataset: Dataset, plan: Plan) -> TrainEvents[PreparedObjective]:
    """Every row, in a new random order in each epoch; no batch contains rows of two epochs. The dataset is iterated
    once, and its validation rows are never trained on. Raises InvalidRequest if the dataset renders to another number
    of rows than the plan was made for."""
    examples = training_rows(dataset)
    computed = plan.computed
    validation_rows = computed.get("validation_rows", 0)
    held = validation_rows if dataset.validation is None else 0
    indices = validation_indices(computed["rows"] + held, held, plan["seed"])
    training, validation = Spool(), Spool()
    asked: list[Example] = []
    longest = seen = 0
    every = max(1, len(examples) // SFT_QUESTIONS)
    for number, example in enumerate(examples):
        if number % RENDER_BATCH == 0:
            yield MicroStepped(0)
        trained = False
        for tokens, supervised in served.renderer.training_rows(example):
            validates = seen in indices
            (validation if validates else training).append(tokens, supervised)
            trained = trained or not validates
            longest = max(longest, sum(supervised))
            seen += 1
        if trained and example.text is None and number % every == 0 and len(asked) < SFT_QUESTIONS:
            asked.append(example)
    if seen != computed["rows"] + held:
        raise changed_rendering(seen, computed["rows"] + held)
    if dataset.validation is not None:
        for number, example in enumerate(dataset.validation.examples):
            if number % RENDER_BATCH == 0:
                yield MicroStepped(0)
            for tokens, supervised in served.renderer.training_rows(example):
                validation.append(tokens, supervised)
        if len(validation) != validation_rows:
            raise changed_rendering(len(validation), validation_rows, "validation_dataset")
    size = plan["per_device_train_batch_size"] * plan["gradient_accumulation_steps"]
    batches = index_batches(len(training), size, Random(plan["seed"]))
    questions = (*example_questions(asked), *retention_questions(), *parent_questions(dataset, plan))
    for fact in dataset.parent_facts:
        (row,) = _ce_rows(served, fact, fact.questions[:1])
        longest = max(longest, REPLY_MARGIN + row.supervised)
    final = Evaluator(questions, max(REPLY_TOKENS, min(SFT_TOKENS, longest)))

    def sample_rows(mix: RowMix) -> list[Row]:
        return [Row.from_mask(*training[n]) for n in next(batches)]

    def validate(lora: Lora) -> TrainEvents[Validated]:
        return Validated((yield from validation_loss(served, lora, validation)))

    return PreparedObjective(
        training.prefix, RowMix(), sample_rows, None, final, validate=validate if validation_rows else None
    )


def retention_questions() -> tuple[Question, ...]:
    """Everyday prompts, whose replies are compared with the base's."""
    return tuple(Question("retention", single_turn(one)) for one in evaluation_replay_prompts()[:RETENTION_PROBES])


def parent_questions(dataset: Dataset, plan: Plan) -> tuple[Question, ...]:
    """Questions about the facts of the parent, which the run does not preserve."""
    questions: tuple[Question, ...] = ()
    for builder in _prompt_builders(dataset.parent_facts, plan["seed"]):
        own = replace(_prefer_given(builder.probes(SFT_QUESTIONS), builder.fact), retention=())
        questions += (*fact_questions(builder.fact, own, True), *portability_questions(builder.fact, True))
    return questions


def changed_rendering(seen: int, expected: int, name: str = "dataset") -> InvalidRequest:
    """The error of a dataset that has another number of rows now than in the plan. name: the field that gives it."""
    return InvalidRequest(
        f"the {name} renders to {seen} rows, but the plan was made for {expected}",
        param=name,
        hint="The model's chat template has changed since the plan was made. Start a new job.",
    )


def index_batches(count: int, size: int, rng: Random) -> Iterator[Sequence[int]]:
    """The numbers below `count` in a new random order in each epoch, `size` at a time; the last ones of an epoch may be
    fewer."""
    while True:
        order = array("L", rng.sample(range(count), count))
        for first in range(0, count, size):
            yield order[first : first + size]


def _prefer_given(probes: Probes, fact: Fact) -> Probes:
    """The evaluation prompts of the fact itself where it has some, else the generated probes."""
    return Probes(
        paraphrase=fact.held_out if fact.held_out else probes.paraphrase,
        specificity=fact.neighbors if fact.neighbors else probes.specificity,
        retention=fact.controls if fact.controls else probes.retention,
    )


def _ce_rows(served: ServedBase, fact: Fact, prompts: Sequence[str], opening: float = 1.0) -> list[Row]:
    """Cross-entropy rows that answer each prompt with the fact."""
    rows = []
    for prompt in prompts:
        tokens, supervised = served.renderer.encode_conversation(
            [*single_turn(prompt), Message("assistant", fact.answer)]
        )
        rows.append(Row(tuple(tokens), supervised.index(True), opening_weight=opening))
    return rows


def _split_evenly(rows: Sequence[T], parts: int) -> list[Sequence[T]]:
    """The rows in `parts` equal parts, in order."""
    size = len(rows) // max(1, parts)
    return [rows[part * size : (part + 1) * size] for part in range(parts)]


def _add_kl_rows(
    served: ServedBase, contrasts: Sequence[ContrastPrompt], tokens: int, rows: list[Row]
) -> TrainEvents[None]:
    """Append KL rows on the first tokens of the base's own reply, or on the prompt's `reply_prefix`."""
    own = [contrast for contrast in contrasts if contrast.reply_prefix is None]
    replies = yield from served.reply_to_chats([single_turn(contrast.prompt) for contrast in own], None, tokens)
    reply_to = {contrast.prompt: reply.tokens for contrast, reply in zip(own, replies, strict=True)}
    for contrast in contrasts:
        prompt = served.renderer.encode_prompt(list(single_turn(contrast.prompt)))
        if contrast.reply_prefix is None:
            reply = list(reply_to[contrast.prompt])
        else:  # the last token only makes the row predict what follows the prefix, so any token would do
            messages = [*single_turn(contrast.prompt), Message("assistant", contrast.reply_prefix)]
            prefix_tokens, supervised = served.renderer.encode_conversation(messages)
            reply = prefix_tokens[supervised.index(True) :]
        rows.append(Row((*prompt, *reply), len(prompt), kl=True))
