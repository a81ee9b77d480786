"""Asking the adapter as it is served: efficacy, paraphrase, specificity, retention, with transcripts.

Replies come from the serving path, greedy; retention is teacher-forced on the base's own replies. Functions here are
generators that yield `Waiting` while replies are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fortwo.data.packing import PackedAttention, pack
from fortwo.data.render import Renderer
from fortwo.facts import metrics
from fortwo.facts.lesson import Probes
from fortwo.facts.subject import holds
from fortwo.models.decoder import Decoder
from fortwo.models.lora import Lora, Segment
from fortwo.records import (
    Example,
    Fact,
    Generation,
    Message,
    Metric,
    Prompt,
    Report,
    Sampling,
    Serving,
    TrainEvent,
    Transcript,
    Waiting,
)

REPLY_TOKENS = 48


@dataclass(frozen=True)
class Served:
    """The base in memory, how to speak to it, and the path that users are served on."""

    base: str
    decoder: Decoder
    renderer: Renderer
    serving: Serving

    def ask(
        self, chats: Iterable[Sequence[Message]], adapter: str | None, tokens: int = REPLY_TOKENS
    ) -> Generator[TrainEvent, None, list[Generation]]:
        """Greedy replies, in order."""
        sampling = Sampling(max_tokens=tokens, temperature=0.0)
        asked = [
            self.serving.submit(Prompt(self.base, tuple(self.renderer.prompt(list(chat))), adapter, sampling))
            for chat in chats
        ]
        while not all(reply.done for reply in asked):
            yield Waiting()
        for reply in asked:
            reply.wait()  # raises what ended it
        return asked


@dataclass(frozen=True)
class Question:
    """One thing to ask. passes: whether a reply is right; None where only the base's own reply counts (retention)."""

    kind: str
    messages: tuple[Message, ...]
    passes: Callable[[str], bool] | None = None

    @property
    def prompt(self) -> str:
        return self.messages[-1].content


@dataclass
class Examiner:
    """A set of questions to the served adapter. Base replies are asked for once and kept."""

    questions: tuple[Question, ...]
    _base: dict[tuple[Message, ...], Generation] = field(default_factory=dict)

    def examine(self, served: Served, key: str, lora: Lora) -> Generator[TrainEvent, None, dict[str, Metric]]:
        """Metrics of the adapter served under `key`."""
        asked = [question for question in self.questions if question.passes is not None]
        replies = yield from served.ask([question.messages for question in asked], key)
        return (yield from self._metrics(served, lora, asked, replies))

    def report(self, served: Served, key: str, lora: Lora) -> Generator[TrainEvent, None, Report]:
        """The same, base beside adapter, with transcripts."""
        replies = yield from served.ask([question.messages for question in self.questions], key)
        found = yield from self._metrics(served, lora, self.questions, replies)
        yield from self._ask_base(served, self.questions)
        transcripts = []
        for question, reply in zip(self.questions, replies, strict=True):
            base = self._base[question.messages].text
            passed = reply.text == base if question.passes is None else question.passes(reply.text)
            transcripts.append(Transcript(question.kind, question.prompt, base, reply.text, passed))
        kept = [question for question in self.questions if question.passes is None]
        base_metrics = _shares(
            (question.kind, question.passes(self._base[question.messages].text))
            for question in self.questions
            if question.passes is not None
        )
        if kept:
            n = found["retention"].n
            base_metrics["retention"] = metrics.share(n, n)
        return Report(found, base_metrics | {"score": metrics.score(base_metrics)}, tuple(transcripts))

    def _metrics(
        self, served: Served, lora: Lora, asked: Sequence[Question], replies: Sequence[Generation]
    ) -> Generator[TrainEvent, None, dict[str, Metric]]:
        found = _shares(
            (question.kind, question.passes(reply.text))
            for question, reply in zip(asked, replies, strict=True)
            if question.passes is not None
        )
        kept = [question for question in self.questions if question.passes is None]
        if kept:
            yield from self._ask_base(served, kept)
            found["retention"] = agreement(served, lora, [(q.messages, self._base[q.messages]) for q in kept])
        return found | {"score": metrics.score(found)}

    def _ask_base(self, served: Served, questions: Sequence[Question]) -> Generator[TrainEvent, None, None]:
        unknown = [messages for messages in dict.fromkeys(q.messages for q in questions) if messages not in self._base]
        replies = yield from served.ask(unknown, None)
        self._base.update(zip(unknown, replies, strict=True))


def questions_about(fact: Fact, probes: Probes) -> tuple[Question, ...]:
    """A fact's own questions, and the probes'."""

    def holds_fact(reply: str) -> bool:
        return holds(reply, fact.match)

    def spares_fact(reply: str) -> bool:
        return not holds(reply, fact.match)

    return (
        *(Question("efficacy", _single(prompt), holds_fact) for prompt in fact.questions),
        *(Question("paraphrase", _single(prompt), holds_fact) for prompt in probes.paraphrase),
        *(Question("specificity", _single(prompt), spares_fact) for prompt in probes.specificity),
        *(Question("retention", _single(prompt)) for prompt in probes.retention),
    )


def questions_of(examples: Sequence[Example], retention: Sequence[str]) -> tuple[Question, ...]:
    """Training prompts, each to be answered as it was taught (as far as the reply goes), and prompts to keep."""

    def answers_as(answer: str) -> Callable[[str], bool]:
        return lambda reply: bool(reply.strip()) and answer.strip().startswith(reply.strip())

    return (
        *(Question("efficacy", example.messages[:-1], answers_as(example.answer)) for example in examples),
        *(Question("retention", _single(prompt)) for prompt in retention),
    )


def _single(prompt: str) -> tuple[Message, ...]:
    return (Message("user", prompt),)


def _shares(passed: Iterable[tuple[str, bool]]) -> dict[str, Metric]:
    """Shares by kind."""
    hits: dict[str, list[bool]] = {}
    for kind, ok in passed:
        hits.setdefault(kind, []).append(ok)
    return {kind: metrics.share(sum(oks), len(oks)) for kind, oks in hits.items()}


@torch.no_grad()
def agreement(served: Served, lora: Lora, said: Sequence[tuple[Sequence[Message], Generation]]) -> Metric:
    """Share of the base's own greedy tokens that the adapter also ranks first, given what the base said before."""
    agreed = total = 0
    for messages, reply in said:
        asked = served.renderer.prompt(list(messages))
        packed = pack([[*asked, *reply.tokens]], served.decoder.device, prefix=0)
        final_TD = served.decoder.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed), [Segment(lora)])
        ranked = served.decoder.logits(final_TD[len(asked) - 1 : -1]).argmax(-1).tolist()
        agreed += sum(ours == theirs for ours, theirs in zip(ranked, reply.tokens, strict=True))
        total += len(reply.tokens)
    return metrics.share(agreed, total)
