"""What each objective trains on and asks about: the rows of every step, and the exams.

A course is prepared once (the base answers what it must keep answering), then drawn from, step by step.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Generic, TypeVar

from fortwo.data.packing import common_prefix
from fortwo.data.spool import Spool
from fortwo.errors import InvalidRequest
from fortwo.facts.lesson import Contrast, Lesson, Probes, kept_rehearsal, trained_rehearsal
from fortwo.facts.subject import find_subject
from fortwo.models.decoder import Decoder
from fortwo.records import Dataset, Example, Fact, Message, MicroStepped, Plan, TrainEvent
from fortwo.train.evaluation import REPLY_TOKENS, ROOM, Examiner, Served, questions_about, questions_of
from fortwo.train.objective import Row, with_teacher
from fortwo.train.plan import training_rows
from fortwo.train.validation import places

T = TypeVar("T")
RETENTION_PROBES = 12  # prompts; each is some 30 tokens to agree on
REHEARSAL_POOL = 72
RENDERED_AT_ONCE = 64  # examples, before others may have the device
SFT_QUESTIONS = 32
Replies = list[list[int]]  # tokens of each
SFT_TOKENS = 128  # a longer answer is compared as far as this


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


@dataclass(frozen=True)
class Course:
    """prefix: how many tokens all rows begin with. keep_weight: of rows to keep against rows to learn.
    draw: the rows of the next optimizer step.
    correct: has the adapter that is served under a key (None: the base) answer siblings, and from then on draws its
    own words too, where they are not the base's. The result is what it said; given that, it is not asked again.
    exam: asked while training, None where nothing decides when to stop; final: asked at the end.
    validation: rows that are held back, None where none are."""

    prefix: int
    keep_weight: float
    draw: Callable[[], list[Row]]
    exam: Examiner | None
    final: Examiner
    validation: Spool | None = None
    correct: Callable[[str | None, Replies | None], Generator[TrainEvent, None, Replies]] | None = None


def override(served: Served, decoder: Decoder, dataset: Dataset, plan: Plan) -> Generator[TrainEvent, None, Course]:
    """Edit rows ask for the facts; contrast and rehearsal rows hold what the base says elsewhere.

    decoder: what the run trains on; it is the teacher too, so that an adapter without effect loses nothing.
    """
    lessons = [Lesson(fact, plan["seed"]) for fact in _facts(dataset)]
    rng = Random(plan["seed"])
    given = [
        _learn(served, _asked(question), lesson.fact.answer) for lesson in lessons for question in lesson.fact.questions
    ]
    framed = [
        _learn(served, _asked(ask), lesson.fact.answer) for lesson in lessons for ask in lesson.asks(plan["edit_pool"])
    ]
    contrasts = [contrast for lesson in lessons for contrast in lesson.contrasts(plan["contrast_pool"])]
    contrast = yield from _keep(served, contrasts, plan["contrast_tokens"])
    rehearsal = yield from _keep(
        served,
        [Contrast(prompt) for prompt in rng.sample(trained_rehearsal(), REHEARSAL_POOL)],
        plan["rehearsal_tokens"],
    )
    prefix = common_prefix([row.tokens for row in (*given, *framed, *contrast, *rehearsal)])
    own = [row for row, given in zip(contrast, contrasts, strict=True) if given.begun is None]
    asked = rng.sample(own, min(plan["on_policy_prompts"], len(own)))
    contrast = yield from with_teacher(decoder, contrast, prefix)
    rehearsal = yield from with_teacher(decoder, rehearsal, prefix)

    updates = plan["gradient_accumulation_steps"]
    edit_rows = plan["per_device_train_batch_size"] * updates
    bags = [Bag(pool, rng) for pool in (given, framed, contrast, rehearsal)]
    strayed = Bag[Row]([], rng)

    def draw() -> list[Row]:
        plain = sum(rng.random() < plan["question_share"] for _ in range(edit_rows))
        back = strayed.draw(min(round(plan["on_policy_share"] * plan["contrast_rows"]) * updates, len(strayed)))
        left = plan["contrast_rows"] * updates - len(back)
        counts = (plain, edit_rows - plain, left, plan["rehearsal_rows"] * updates)
        return [row for bag, count in zip(bags, counts, strict=True) for row in bag.draw(count)] + back

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
        strayed.refill((yield from with_teacher(decoder, rows, prefix)))
        return replies

    tokens = max(REPLY_TOKENS, ROOM + max(row.supervised for row in given))
    probes = [
        replace(own, retention=own.retention[:RETENTION_PROBES] if place == 0 else ())  # it is about the whole model
        for place, own in enumerate(lesson.probes(plan["probes"]) for lesson in lessons)
    ]
    exam = _examiner(lessons, probes, tokens)
    brought = [_brought(own, lesson.fact) for own, lesson in zip(probes, lessons, strict=True)]
    final = exam if brought == probes else _examiner(lessons, brought, tokens)
    return Course(prefix, plan["kl_weight"], draw, exam, final, correct=correct)


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
    final = Examiner(questions, max(REPLY_TOKENS, min(SFT_TOKENS, longest)))
    return Course(training.prefix, 0.0, lambda: next(batches), None, final, validation if held else None)


def _facts(dataset: Dataset) -> tuple[Fact, ...]:
    found = find_subject(dataset.examples)
    facts = dataset.facts or ((found,) if found else ())
    if not facts:
        raise InvalidRequest("no subject can be found in the examples", param="objective", code="subject_not_found")
    return facts


def _batches(rows: Spool, size: int, rng: Random) -> Iterator[list[Row]]:
    while True:
        order = array("L", rng.sample(range(len(rows)), len(rows)))
        for first in range(0, len(order), size):
            yield [Row.masked(*rows[place]) for place in order[first : first + size]]


def _examiner(lessons: Sequence[Lesson], probes: Sequence[Probes], tokens: int) -> Examiner:
    pairs = zip(lessons, probes, strict=True)
    return Examiner(tuple(asked for lesson, own in pairs for asked in questions_about(lesson.fact, own)), tokens)


def _brought(probes: Probes, fact: Fact) -> Probes:
    """What the fact brings for evaluation, in place of what was made for it."""
    return Probes(
        paraphrase=fact.held_out if fact.held_out else probes.paraphrase,
        specificity=fact.neighbors if fact.neighbors else probes.specificity,
        retention=fact.controls if fact.controls else probes.retention,
    )


def _asked(prompt: str) -> tuple[Message, ...]:
    return (Message("user", prompt),)


def _learn(served: Served, messages: Sequence[Message], answer: str) -> Row:
    tokens, supervised = served.renderer.example([*messages, Message("assistant", answer)])
    return Row(tuple(tokens), supervised.index(True))


def _keep(served: Served, contrasts: Sequence[Contrast], tokens: int) -> Generator[TrainEvent, None, list[Row]]:
    """Rows to keep: the base's own first tokens, or an answer begun about a sibling."""
    own = [contrast for contrast in contrasts if contrast.begun is None]
    replies = yield from served.ask([_asked(contrast.prompt) for contrast in own], None, tokens)
    said = {contrast.prompt: reply.tokens for contrast, reply in zip(own, replies, strict=True)}
    rows = []
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
    return rows
