"""What each objective trains on and asks about: the rows of every step, and the exams.

A course is prepared once (the base answers what it must keep answering), then drawn from, step by step.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import Generic, TypeVar

from fortwo.data.spool import Spool
from fortwo.errors import InvalidRequest
from fortwo.execution.backend import Backend
from fortwo.facts.lesson import Contrast, Lesson, Probes, kept_rehearsal, trained_rehearsal
from fortwo.facts.subject import facts_of
from fortwo.nn.packing import common_prefix
from fortwo.records import Dataset, Example, Fact, Message, MicroStepped, Plan, TrainEvent
from fortwo.train.escalation import Mix, mix_of
from fortwo.train.evaluation import (
    Examiner,
    Question,
    Served,
    hops_from,
    questions_about,
    questions_of,
    together,
)
from fortwo.train.objective import Row, with_teacher
from fortwo.train.plan import training_rows
from fortwo.train.recipes import REPLY_TOKENS, RETENTION_PROBES, ROOM, SFT_QUESTIONS, SFT_TOKENS
from fortwo.train.validation import places

T = TypeVar("T")
RENDERED_AT_ONCE = 64  # examples, before others may have the device
Replies = list[list[int]]  # tokens of each


class Bag(Generic[T]):
    """Draws every item once, in a random order, before it draws any again."""

    def __init__(self, items: Sequence[T], rng: Random) -> None:
        self._items = list(items)
        self._rng = rng
        self._left: list[T] = []

    def __len__(self) -> int:
        return len(self._items)

    def refill(self, items: Sequence[T]) -> None:
        self._items, self._left = list(items), []

    def draw(self, count: int) -> list[T]:
        drawn: list[T] = []
        while len(drawn) < count and self._items:
            if not self._left:
                self._left = self._rng.sample(self._items, len(self._items))
            drawn.append(self._left.pop())
        return drawn


class Turns(Generic[T]):
    """A bag for each pool, and from each in its turn an item: however large a pool is, it has its share."""

    def __init__(self, pools: Iterable[Sequence[T]], rng: Random) -> None:
        self._bags = deque(Bag(pool, rng) for pool in pools if pool)

    def draw(self, count: int) -> list[T]:
        drawn: list[T] = []
        while len(drawn) < count and self._bags:
            drawn += self._bags[0].draw(1)
            self._bags.rotate(-1)
        return drawn


@dataclass(frozen=True)
class Course:
    """prefix: how many tokens all rows begin with. mix: as the plan has it.
    draw: the rows of the next optimizer step, in this mix.
    correct: has the adapter that is served under a key (None: the base) answer siblings, and from then on draws its
    own words too, where they are not the base's. The result is what it said; given that, it is not asked again.
    exam: asked while training, None where nothing decides when to stop; final: asked at the end.
    validation: rows that are held back, None where none are."""

    prefix: int
    mix: Mix
    draw: Callable[[Mix], list[Row]]
    exam: Examiner | None
    final: Examiner
    validation: Spool | None = None
    correct: Callable[[str | None, Replies | None], Generator[TrainEvent, None, Replies]] | None = None


def override(served: Served, backend: Backend, dataset: Dataset, plan: Plan) -> Generator[TrainEvent, None, Course]:
    """Edit rows ask for the facts; contrast and rehearsal rows hold what the base says elsewhere. A few rows of both
    kinds are about what the run's parent knows.

    backend: what the run trains on; it is the teacher too, so that an adapter without effect loses nothing.
    """
    facts, known = _facts(dataset), dataset.kept
    lessons = _lessons((*facts, *known), plan["seed"])
    lessons, earlier = lessons[: len(facts)], lessons[len(facts) :]
    rng = Random(plan["seed"])
    opening = plan["opening_weight"]
    given = [_learn(served, lesson.fact, lesson.fact.questions, opening) for lesson in lessons]
    framed = [_learn(served, lesson.fact, lesson.asks(plan["edit_pool"]), opening) for lesson in lessons]
    kept = [
        _learn(served, lesson.fact, [*lesson.fact.questions, *lesson.asks(plan["kept_pool"])], opening)
        for lesson in earlier
    ]
    contrasts = [contrast for lesson in lessons for contrast in lesson.contrasts(plan["contrast_pool"])]
    of_kept = [contrast for lesson in earlier for contrast in lesson.contrasts(plan["kept_pool"])]
    everyday = trained_rehearsal((*facts, *known))
    rehearsed = [Contrast(prompt) for prompt in everyday[: plan["rehearsal_pool"]]]
    tokens = max(REPLY_TOKENS, ROOM + max(row.supervised for row in chain(*given, *kept)))
    exam, final = _exams(lessons, earlier, plan["probes"], tokens)
    contrast: list[Row] = []
    rehearsal: list[Row] = []
    yield from together(
        _keep(served, [*contrasts, *of_kept], plan["contrast_tokens"], contrast),
        _keep(served, rehearsed, plan["rehearsal_tokens"], rehearsal),
        final.ask_base(served),
    )
    everything = chain(*given, *framed, *kept, contrast, rehearsal)
    prefix = common_prefix([row.tokens for row in everything])
    own = [row for row, one in zip(contrast, contrasts, strict=False) if one.begun is None]
    asked = rng.sample(own, min(plan["on_policy_prompts"], len(own)))
    contrast = yield from with_teacher(backend, contrast, prefix)
    rehearsal = yield from with_teacher(backend, rehearsal, prefix)

    updates = plan["gradient_accumulation_steps"]
    siblings = _parted(contrast[: len(contrasts)], len(lessons))
    of_known = _parted(contrast[len(contrasts) :], len(earlier))
    bags = [Turns(pools, rng) for pools in (given, framed, siblings, [rehearsal], kept, of_known)]
    strayed = Bag[Row]([], rng)

    def draw(mix: Mix) -> list[Row]:
        edit = mix.edit * updates
        plain = sum(rng.random() < mix.question_share for _ in range(edit))
        back = strayed.draw(min(round(plan["on_policy_share"] * mix.contrast * updates), len(strayed)))
        contrasts = mix.contrast * updates - len(back)
        others = (rows * updates for rows in (mix.rehearsal, mix.kept, mix.kept))
        drawn = zip(bags, (plain, edit - plain, contrasts, *others), strict=True)
        return [row for bag, count in drawn for row in bag.draw(count)] + back

    def correct(key: str | None, replies: Replies | None) -> Generator[TrainEvent, None, Replies]:
        prompts = [row.tokens[: row.start] for row in asked]
        if replies is None:
            said = yield from served.say(prompts, key, plan["on_policy_tokens"])
            replies = [list(reply.tokens) for reply in said]
        rows = [
            Row((*prompt, *reply), len(prompt), keep=True)
            for row, prompt, reply in zip(asked, prompts, replies, strict=True)
            if tuple(reply[: row.supervised]) != row.tokens[row.start :]
        ]
        strayed.refill((yield from with_teacher(backend, rows, prefix)))
        return replies

    return Course(prefix, mix_of(plan), draw, exam, final, correct=correct)


def _lessons(facts: Sequence[Fact], seed: int) -> list[Lesson]:
    return [Lesson(fact, seed, [other for other in facts if other is not fact]) for fact in facts]


def _exams(lessons: Sequence[Lesson], earlier: Sequence[Lesson], probes: int, tokens: int) -> tuple[Examiner, Examiner]:
    """The one that decides when to stop, on `probes` prompts of a kind for each fact, and the last one, on what the
    facts bring instead, if they bring something. earlier: lessons of the run's parent."""
    made = [(lesson, lesson.probes(probes), lesson in earlier) for lesson in (*lessons, *earlier)]
    asked: list[Question] = []
    final: list[Question] = []
    for place, (lesson, own, kept) in enumerate(made):
        own = replace(own, retention=own.retention[:RETENTION_PROBES] if place == 0 else ())  # about the whole model
        for questions, found in ((asked, own), (final, _brought(own, lesson.fact))):
            neighbours = (*found.specificity, *lesson.rivals())
            questions += questions_about(lesson.fact, replace(found, specificity=neighbours), kept)
        final += hops_from(lesson.fact, kept)
    exam = Examiner(tuple(asked), tokens)
    return exam, exam if _prompts(asked) == _prompts(final) else Examiner(tuple(final), tokens)


def _prompts(questions: Sequence[Question]) -> list[tuple[str, str]]:
    return [(question.kind, question.prompt) for question in questions]


def sft(served: Served, dataset: Dataset, plan: Plan) -> Generator[TrainEvent, None, Course]:
    """Every row, in a new random order each epoch; a batch never crosses into the next epoch.

    The dataset is gone through once; rows that the plan holds back are never drawn.
    """
    examples = training_rows(dataset)
    computed = plan.computed
    held = computed.get("validation_rows", 0)
    kept_back = places(computed["rows"] + held, held, plan["seed"])
    training, validation = Spool(), Spool()
    asked: list[Example] = []
    longest = seen = 0
    every = max(1, len(examples) // SFT_QUESTIONS)
    for number, example in enumerate(examples):
        if number % RENDERED_AT_ONCE == 0:
            yield MicroStepped(0)
        trained = False
        for tokens, supervised in served.renderer.rows(example):
            back = seen in kept_back
            (validation if back else training).append(tokens, supervised)
            trained = trained or not back
            longest = max(longest, sum(supervised))
            seen += 1
        if trained and example.text is None and number % every == 0 and len(asked) < SFT_QUESTIONS:
            asked.append(example)
    if seen != computed["rows"] + held:
        raise InvalidRequest(
            f"the dataset renders to {seen} rows, and the plan was made for {computed['rows'] + held}",
            param="dataset",
            hint="The model's chat template has changed since: start a new job.",
        )
    batches = _batches(
        training, plan["per_device_train_batch_size"] * plan["gradient_accumulation_steps"], Random(plan["seed"])
    )
    questions = questions_of(asked, kept_rehearsal()[:RETENTION_PROBES])
    for lesson in _lessons(dataset.kept, plan["seed"]):
        own = replace(_brought(lesson.probes(SFT_QUESTIONS), lesson.fact), retention=())
        questions += (*questions_about(lesson.fact, own, kept=True), *hops_from(lesson.fact, kept=True))
        longest = max(longest, ROOM + _learn(served, lesson.fact, lesson.fact.questions[:1])[0].supervised)
    final = Examiner(questions, max(REPLY_TOKENS, min(SFT_TOKENS, longest)))
    return Course(training.prefix, Mix(), lambda mix: next(batches), None, final, validation if held else None)


def _facts(dataset: Dataset) -> tuple[Fact, ...]:
    facts = facts_of(dataset)
    if not facts:
        raise InvalidRequest("no subject can be found in the examples", param="objective", code="subject_not_found")
    return facts


def _batches(rows: Spool, size: int, rng: Random) -> Iterator[list[Row]]:
    while True:
        order = array("L", rng.sample(range(len(rows)), len(rows)))
        for first in range(0, len(order), size):
            yield [Row.masked(*rows[place]) for place in order[first : first + size]]


def _brought(probes: Probes, fact: Fact) -> Probes:
    """What the fact brings for evaluation, in place of what was made for it."""
    return Probes(
        paraphrase=fact.held_out if fact.held_out else probes.paraphrase,
        specificity=fact.neighbors if fact.neighbors else probes.specificity,
        retention=fact.controls if fact.controls else probes.retention,
    )


def _asked(prompt: str) -> tuple[Message, ...]:
    return (Message("user", prompt),)


def _learn(served: Served, fact: Fact, prompts: Sequence[str], opening: float = 1.0) -> list[Row]:
    """Rows that answer each prompt with the fact."""
    rows = []
    for prompt in prompts:
        tokens, supervised = served.renderer.example([*_asked(prompt), Message("assistant", fact.answer)])
        rows.append(Row(tuple(tokens), supervised.index(True), opening=opening))
    return rows


def _parted(rows: Sequence[T], parts: int) -> list[Sequence[T]]:
    """In equal parts, in order."""
    size = len(rows) // max(1, parts)
    return [rows[part * size : (part + 1) * size] for part in range(parts)]


def _keep(
    served: Served, contrasts: Sequence[Contrast], tokens: int, rows: list[Row]
) -> Generator[TrainEvent, None, None]:
    """Add the rows to keep: the base's own first tokens, or an answer begun about a sibling."""
    own = [contrast for contrast in contrasts if contrast.begun is None]
    replies = yield from served.ask([_asked(contrast.prompt) for contrast in own], None, tokens)
    said = {contrast.prompt: reply.tokens for contrast, reply in zip(own, replies, strict=True)}
    for contrast in contrasts:
        prompt = served.renderer.prompt(list(_asked(contrast.prompt)))
        if contrast.begun is None:
            reply = list(said[contrast.prompt])
        else:  # the token after what is begun is what must not be said: any token stands in its place
            begun, supervised = served.renderer.example(
                [*_asked(contrast.prompt), Message("assistant", contrast.begun)]
            )
            reply = begun[supervised.index(True) :]
        rows.append(Row((*prompt, *reply), len(prompt), keep=True))
