"""Asking the adapter as it is served: efficacy, paraphrase, specificity, retention, with transcripts.

Replies come from the serving path, greedy; retention is teacher-forced on the base's own replies. Functions here are
generators that yield `Waiting` while replies are on their way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from fortwo.data.render import Renderer
from fortwo.data.spool import Spool
from fortwo.errors import TrainingFailed
from fortwo.execution.backend import Backend
from fortwo.facts import metrics
from fortwo.facts.lesson import Probes
from fortwo.facts.subject import holds
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.packing import common_prefix, pack
from fortwo.prompts import NOT_NUMBERS, Generation, Prompt, Sampling, Serving
from fortwo.records import (
    Example,
    Fact,
    FactReport,
    Message,
    Metric,
    MicroStepped,
    OneHop,
    Report,
    TrainEvent,
    Transcript,
    Waiting,
)
from fortwo.train.objective import Row, micro_batches, predicting
from fortwo.train.recipes import REPLY_TOKENS

AGREEMENT_TOKENS = 1024
HEAD_ROWS = 128  # whose logits are there together


@dataclass(frozen=True)
class Said:
    """A reply that has ended."""

    text: str
    tokens: tuple[int, ...]


@dataclass
class Pace:
    """Tokens of replies, and the seconds that they took with their prompts."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Served:
    """The base in memory, how to speak to it, and the path that users are served on.

    known: what the base itself has said so far, by prompt and length of the reply. A run that goes on from a
    checkpoint brings it along: asked again in other company, the base could round otherwise.
    """

    base: str
    backend: Backend
    renderer: Renderer
    serving: Serving
    known: dict[tuple[tuple[int, ...], int], Said] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)

    def ask(
        self, chats: Iterable[Sequence[Message]], adapter: str | None, tokens: int
    ) -> Generator[TrainEvent, None, list[Said]]:
        """Greedy replies, in order. Raises TrainingFailed (code nan_loss) when the adapter's logits are no numbers."""
        prompts = [tuple(self.renderer.prompt(list(chat))) for chat in chats]
        return (yield from self.say(prompts, adapter, tokens))

    def say(
        self, prompts: Sequence[tuple[int, ...]], adapter: str | None, tokens: int
    ) -> Generator[TrainEvent, None, list[Said]]:
        """The same of prompts that are tokens."""
        sampling = Sampling(max_tokens=tokens, temperature=0.0)
        said = self.known if adapter is None else {}
        began = time.perf_counter()
        asked = {
            prompt: self.serving.submit(Prompt(self.base, prompt, adapter, sampling, kept=False))
            for prompt in dict.fromkeys(prompts)
            if (prompt, tokens) not in said
        }
        while not all(reply.done for reply in asked.values()):
            yield Waiting()
        for prompt, reply in asked.items():
            if adapter is not None and reply.error == NOT_NUMBERS:
                raise diverged("after the last step the adapter's logits are nan or infinite")
            said[prompt, tokens] = Said(reply.wait(), tuple(reply.tokens))  # or raises what ended it
        self.pace.tokens += sum(len(reply.tokens) for reply in asked.values())
        self.pace.seconds += time.perf_counter() - began
        return [said[prompt, tokens] for prompt in prompts]


def diverged(found: str) -> TrainingFailed:
    return TrainingFailed(
        found,
        param="training_config.learning_rate",
        hint="Lower learning_rate or leave it to the plan; check the rows for text that is no language.",
        code="nan_loss",
    )


def together(*runs: Generator[TrainEvent, None, None]) -> Generator[TrainEvent, None, None]:
    """All of them at the same time, so that what each asks for is answered in one batch."""
    left = list(runs)
    while left:
        for run in list(left):
            try:
                yield next(run)
            except StopIteration:
                left.remove(run)


@dataclass(frozen=True)
class Question:
    """One thing to ask. passes: whether a reply is right; None where only the base's own reply counts (retention).
    fact: what it is about, if it is about one."""

    kind: str
    messages: tuple[Message, ...]
    passes: Callable[[str], bool] | None = None
    fact: Fact | None = None

    @property
    def prompt(self) -> str:
        return self.messages[-1].content


@dataclass
class Examiner:
    """A set of questions to the served adapter. Replies that cannot change are asked for once.

    tokens: length of replies.
    """

    questions: tuple[Question, ...]
    tokens: int = REPLY_TOKENS
    _base: dict[tuple[Message, ...], Said] = field(default_factory=dict)
    _said: dict[tuple[Message, ...], Said] = field(default_factory=dict)

    def examine(
        self, served: Served, key: str, lora: Lora, efficacy: int | None = None
    ) -> Generator[TrainEvent, None, dict[str, Metric]]:
        """Metrics of the adapter served under `key` as it is now. efficacy: how many of those questions to ask about
        each fact."""
        self._said.clear()
        asked = self._exam(efficacy)
        yield from self._ask_adapter(served, key, asked)
        return (yield from self._metrics(served, lora, asked))

    def _exam(self, efficacy: int | None) -> list[Question]:
        asked: list[Question] = []
        counted: Counter[Fact | None] = Counter()
        for question in self.questions:
            if question.kind in ("efficacy", "kept_efficacy"):
                counted[question.fact] += 1
                if efficacy is not None and counted[question.fact] > efficacy:
                    continue
            if question.passes is not None:
                asked.append(question)
        return asked

    def report(self, served: Served, key: str, lora: Lora, changed: bool = True) -> Generator[TrainEvent, None, Report]:
        """All questions, base beside adapter, with transcripts. changed: the adapter is not as the last exam saw it."""
        if changed:
            self._said.clear()
        yield from self._ask_adapter(served, key, self.questions)
        found = yield from self._metrics(served, lora, self.questions)
        yield from self.ask_base(served)
        transcripts = []
        for question in self.questions:
            base, reply = self._base[question.messages].text, self._said[question.messages].text
            passed = reply == base if question.passes is None else question.passes(reply)
            transcripts.append(Transcript(question.kind, question.prompt, base, reply, passed))
        base_metrics = _shares(self.questions, self._base)
        if "retention" in found:
            n = found["retention"].n
            base_metrics["retention"] = metrics.share(n, n)
        base_metrics["score"] = _score(base_metrics)
        return Report(found, base_metrics, tuple(transcripts), facts=self.facts())

    def facts(self) -> tuple[FactReport, ...]:
        """What the adapter last said about each fact."""
        about: dict[Fact, list[Question]] = {}
        for question in self.questions:
            if question.fact is not None and question.messages in self._said:
                about.setdefault(question.fact, []).append(question)
        found = []
        for fact, asked in about.items():
            shares = _shares(asked, self._said)
            kept = "kept_efficacy" in shares
            own = {kind.removeprefix("kept_"): share for kind, share in shares.items()}
            found.append(FactReport(fact.subject, fact.answer, own, kept))
        return tuple(found)

    def _metrics(
        self, served: Served, lora: Lora, asked: Sequence[Question]
    ) -> Generator[TrainEvent, None, dict[str, Metric]]:
        found = _shares(asked, self._said)
        kept = [question for question in self.questions if question.passes is None]
        if kept:
            yield from self._ask(served, None, kept, self._base)
            found["retention"] = agreement(served, lora, [(q.messages, self._base[q.messages]) for q in kept])
        return found | {"score": _score(found)}

    def _ask_adapter(self, served: Served, key: str, asked: Sequence[Question]) -> Generator[TrainEvent, None, None]:
        yield from self._ask(served, key, asked, self._said)

    def ask_base(self, served: Served) -> Generator[TrainEvent, None, None]:
        """Everything, once: a report says what the base says, whenever that was."""
        yield from self._ask(served, None, self.questions, self._base)

    def _ask(
        self, served: Served, key: str | None, asked: Sequence[Question], said: dict[tuple[Message, ...], Said]
    ) -> Generator[TrainEvent, None, None]:
        unknown = [chat for chat in dict.fromkeys(question.messages for question in asked) if chat not in said]
        replies = yield from served.ask(unknown, key, self.tokens)
        said.update(zip(unknown, replies, strict=True))


def questions_about(fact: Fact, probes: Probes, kept: bool = False) -> tuple[Question, ...]:
    """A fact's own questions, and the probes'. Those about retention are about no fact. kept: it is one of the
    parent's, and counts apart."""
    before = "kept_" if kept else ""

    def holds_fact(reply: str) -> bool:
        return holds(reply, fact.match)

    def spares_fact(reply: str) -> bool:
        return not holds(reply, fact.match)

    return (
        *(Question(f"{before}efficacy", _single(prompt), holds_fact, fact) for prompt in fact.questions),
        *(Question(f"{before}paraphrase", _single(prompt), holds_fact, fact) for prompt in probes.paraphrase),
        *(Question(f"{before}specificity", _single(prompt), spares_fact, fact) for prompt in probes.specificity),
        *(Question("retention", _single(prompt)) for prompt in probes.retention),
    )


def hops_from(fact: Fact, kept: bool = False) -> tuple[Question, ...]:
    """The questions that the fact brings about what follows from it."""

    def follows(hop: OneHop) -> Callable[[str], bool]:
        return lambda reply: holds(reply, hop.match)

    kind = "kept_portability" if kept else "portability"
    return tuple(Question(kind, _single(hop.prompt), follows(hop), fact) for hop in fact.portability)


def _score(found: Mapping[str, Metric]) -> Metric:
    """Of what is aimed at: portability is only told."""
    return metrics.score({name: metric for name, metric in found.items() if not name.endswith("portability")})


def questions_of(examples: Sequence[Example], retention: Sequence[str]) -> tuple[Question, ...]:
    """Training prompts, each to be answered as it was taught (as far as the reply goes), and prompts to keep."""

    def answers_as(answer: str) -> Callable[[str], bool]:
        return lambda reply: bool(reply.strip()) and answer.strip().startswith(reply.strip())

    return (
        *(Question("efficacy", example.asked, answers_as(example.answer)) for example in examples),
        *(Question("retention", _single(prompt)) for prompt in retention),
    )


def _single(prompt: str) -> tuple[Message, ...]:
    return (Message("user", prompt),)


def _shares(questions: Sequence[Question], said: Mapping[tuple[Message, ...], Said]) -> dict[str, Metric]:
    """Shares of right replies by kind."""
    hits: dict[str, list[bool]] = {}
    for question in questions:
        if question.passes is not None:
            hits.setdefault(question.kind, []).append(question.passes(said[question.messages].text))
    return {kind: metrics.share(sum(right), len(right)) for kind, right in hits.items()}


def agreement(served: Served, lora: Lora, said: Sequence[tuple[Sequence[Message], Said | Generation]]) -> Metric:
    """Share of the base's own greedy tokens that the adapter also ranks first, given what the base said before."""
    decoder, rows = served.backend.decoder, []
    for messages, reply in said:
        asked = served.renderer.prompt(list(messages))
        rows.append(Row((*asked, *reply.tokens), len(asked)))
    agreed = total = 0
    prefix = common_prefix([row.tokens for row in rows])
    for group in micro_batches(rows, prefix, AGREEMENT_TOKENS):
        with torch.no_grad():
            packed = pack([row.tokens for row in group], decoder.device, prefix)
            final_TD = served.backend.forward(packed, [Segment(lora)])
            places = [index for place, row in enumerate(group) for index in predicting(packed, place, row)]
            ranked = decoder.logits(final_TD[places]).argmax(-1).tolist()
        wanted = [row.tokens[place] for row in group for place in row.places]
        agreed += sum(ours == theirs for ours, theirs in zip(ranked, wanted, strict=True))
        total += len(wanted)
    return metrics.share(agreed, total)


def validation_loss(served: Served, lora: Lora, rows: Spool) -> Generator[TrainEvent, None, float]:
    """Mean cross-entropy over the supervised tokens of rows that are held back, of the adapter as it is served."""
    decoder, total, count = served.backend.decoder, 0.0, 0
    held = (Row.masked(*rows[place]) for place in range(len(rows)))
    for group in micro_batches(held, rows.prefix, AGREEMENT_TOKENS):
        with torch.no_grad():
            packed = pack([row.tokens for row in group], decoder.device, rows.prefix)
            final_TD = served.backend.forward(packed, [Segment(lora)])
            places = [index for place, row in enumerate(group) for index in predicting(packed, place, row)]
            wanted = torch.tensor([row.tokens[at] for row in group for at in row.places], device=final_TD.device)
            for part_ND, wanted_N in zip(final_TD[places].split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True):
                total += float(F.cross_entropy(decoder.logits(part_ND), wanted_N, reduction="sum"))
        count += len(wanted)
        yield MicroStepped(len(packed.tokens_T))
    return total / count
