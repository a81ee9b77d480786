"""Evaluation of the adapter as it is served: efficacy, paraphrase, specificity and retention, with transcripts.

Replies are greedy and come from the serving path; retention is teacher-forced on the base's own replies. The functions
here are generators that yield `Waiting` until the replies are complete.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.data.spool import Spool
from fortwo.errors import InvalidRequest, TrainingFailed
from fortwo.execution.backend import Backend
from fortwo.facts import metrics
from fortwo.facts.exam import passes
from fortwo.facts.prompt_builder import Probes
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.packing import common_prefix, pack
from fortwo.prompts import NON_FINITE_LOGITS, Prompt, Sampling, Serving
from fortwo.records import (
    Example,
    Fact,
    FactReport,
    Message,
    Metric,
    MicroStepped,
    ReplyCheck,
    Report,
    Sample,
    TrainEvent,
    TrainEvents,
    Transcript,
    Waiting,
)
from fortwo.train.losses import Row, micro_batches, predicting_positions
from fortwo.train.recipes import REPLY_TOKENS

AGREEMENT_TOKENS = 1024
FACTS_STATED = "Answer questions about the following according to it.\n"
SAMPLES = 2  # of each kind of question
HEAD_ROWS = 128  # rows whose logits are in memory at once


@dataclass(frozen=True)
class Reply:
    """A complete reply."""

    text: str
    tokens: tuple[int, ...]


@dataclass
class ReplyRate:
    """The number of tokens in replies, and the seconds that they took, including their prompts."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class ServedBase:
    """The base in memory, its renderer, and the path on which users are served. elsewhere: whether replies are scored
    there, too (see Serving), or by `backend`. base_replies: the base's own replies so far, by prompt tokens and maximum
    length. A checkpoint stores them, because in a batch with other prompts the base could round differently and give
    another reply."""

    base: str
    backend: Backend
    renderer: ChatTemplateRenderer
    serving: Serving
    elsewhere: bool = False
    base_replies: dict[tuple[tuple[int, ...], int], Reply] = field(default_factory=dict)
    pace: ReplyRate = field(default_factory=ReplyRate)

    def reply_to_chats(
        self, chats: Iterable[Sequence[Message]], adapter: str | None, tokens: int
    ) -> TrainEvents[list[Reply]]:
        """Greedy replies of at most `tokens` tokens, in order; adapter: None for the base. Raises TrainingFailed (code
        nan_loss) if the adapter's logits are NaN or infinite."""
        prompts = [tuple(self.renderer.encode_prompt(list(chat))) for chat in chats]
        return (yield from self.reply_to_prompts(prompts, adapter, tokens))

    def with_system(self, text: str, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The conversation with a system prompt; where the chat template has none, the text begins the first message of
        the user."""
        first, *others = messages
        if first.role == "system":
            return (Message("system", f"{text}\n\n{first.content}"), *others)
        chat = (Message("system", text), *messages)
        try:
            self.renderer.encode_prompt(list(chat))
        except InvalidRequest:
            return (Message(first.role, f"{text}\n\n{first.content}"), *others)
        return chat

    def reply_to_prompts(
        self, prompts: Sequence[tuple[int, ...]], adapter: str | None, tokens: int
    ) -> TrainEvents[list[Reply]]:
        """The same for prompts that are given as tokens."""
        sampling = Sampling(max_tokens=tokens, temperature=0.0, stop=self.renderer.stop_texts)
        said = self.base_replies if adapter is None else {}
        began = time.perf_counter()
        asked = {
            prompt: self.serving.submit(Prompt(self.base, prompt, adapter, sampling, background=True))
            for prompt in dict.fromkeys(prompts)
            if (prompt, tokens) not in said
        }
        while not all(reply.done for reply in asked.values()):
            yield Waiting()
        for prompt, reply in asked.items():
            if adapter is not None and reply.error == NON_FINITE_LOGITS:
                raise divergence_error("after the last step the adapter's logits are nan or infinite")
            said[prompt, tokens] = Reply(reply.wait(), tuple(reply.tokens))  # wait raises the error of a failed reply
        self.pace.tokens += sum(len(reply.tokens) for reply in asked.values())
        self.pace.seconds += time.perf_counter() - began
        return [said[prompt, tokens] for prompt in prompts]


def divergence_error(message: str) -> TrainingFailed:
    """The error of a run whose loss or logits are NaN or infinite."""
    return TrainingFailed(
        message,
        param="training_config.learning_rate",
        hint="Lower learning_rate, or leave it out; and check whether the rows contain text that makes no sense.",
        code="nan_loss",
    )


def interleave(*runs: TrainEvents[None]) -> TrainEvents[None]:
    """Run the generators in turns, so that the replies that they wait for are computed in one batch."""
    left = list(runs)
    while left:
        for run in list(left):
            try:
                yield next(run)
            except StopIteration:
                left.remove(run)


@dataclass(frozen=True)
class Question:
    """One prompt of an evaluation. check: when a reply is right; None for retention, which compares with the base's
    reply. fact: the fact that the question is about, if any."""

    kind: str
    messages: tuple[Message, ...]
    check: ReplyCheck | None = None
    fact: Fact | None = None

    @property
    def passes(self) -> Callable[[str], bool] | None:
        return None if self.check is None else partial(passes, self.check)

    @property
    def prompt(self) -> str:
        return self.messages[-1].content


@dataclass
class Evaluator:
    """A set of questions to the served adapter. The base's replies are requested only once. tokens: maximum length of a
    reply."""

    questions: tuple[Question, ...]
    tokens: int = REPLY_TOKENS
    _base_replies: dict[tuple[Message, ...], Reply] = field(default_factory=dict)
    _replies: dict[tuple[Message, ...], Reply] = field(default_factory=dict)

    def evaluate(
        self, served: ServedBase, key: str, lora: Lora, efficacy: int | None = None
    ) -> TrainEvents[dict[str, Metric]]:
        """The metrics of the adapter that is served under `key`, in its present state. efficacy: at most so many
        efficacy questions are asked about each fact; None for all."""
        self._replies.clear()
        asked = self._select(efficacy)
        yield from self._ask(served, key, asked, self._replies)
        return (yield from self._metrics(served, key, lora, asked))

    def _select(self, efficacy: int | None) -> list[Question]:
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

    def report(self, served: ServedBase, key: str, lora: Lora, changed: bool = True) -> TrainEvents[Report]:
        """Ask base and adapter all questions. changed: whether the adapter has changed since the last evaluation."""
        if changed:
            self._replies.clear()
        yield from self._ask(served, key, self.questions, self._replies)
        found = yield from self._metrics(served, key, lora, self.questions)
        yield from self.ask_base(served)
        transcripts = []
        for question in self.questions:
            base, reply = self._base_replies[question.messages], self._replies[question.messages].text
            passed = reply == base.text if question.passes is None else question.passes(reply)
            before, kept = question.messages[:-1], base.tokens if question.check is None else ()
            asked = (question.kind, question.prompt, base.text, reply, passed, before, question.check, kept)
            transcripts.append(Transcript(*asked))
        base_metrics = _shares(self.questions, self._base_replies)
        if "retention" in found:
            n = found["retention"].n
            base_metrics["retention"] = metrics.share(n, n)
        base_metrics["score"] = _score(base_metrics)
        prompted = yield from self._prompted_metrics(served)
        facts = self.fact_reports()
        return Report(found, base_metrics, tuple(transcripts), prompted, facts=facts, reply_tokens=self.tokens)

    def _prompted_metrics(self, served: ServedBase) -> TrainEvents[dict[str, Metric]]:
        """The metrics of the base when the system prompt states the facts: what one gets without training."""
        facts = dict.fromkeys(question.fact for question in self.questions if question.fact is not None)
        if not facts:
            return {}
        stated = FACTS_STATED + "\n".join(fact.answer for fact in facts)
        chats = {question.messages: served.with_system(stated, question.messages) for question in self.questions}
        asked = [question for question in self.questions if question.passes is not None]
        replies = yield from served.reply_to_chats([chats[one.messages] for one in asked], None, self.tokens)
        said = {question.messages: reply for question, reply in zip(asked, replies, strict=True)}
        found = _shares(asked, said)
        retention = [question.messages for question in self.questions if question.passes is None]
        if retention:
            own = [(chats[messages], self._base_replies[messages]) for messages in retention]
            found["retention"] = yield from agreement(served, None, None, own)
        return found | {"score": _score(found)}

    def samples(self) -> tuple[Sample, ...]:
        """The replies of the last evaluation to the first questions of each kind."""
        counted: Counter[str] = Counter()
        found = []
        for question in self.questions:
            reply = self._replies.get(question.messages)
            if reply is None or question.passes is None or counted[question.kind] == SAMPLES:
                continue
            counted[question.kind] += 1
            found.append(Sample(question.kind, question.prompt, reply.text, question.passes(reply.text)))
        return tuple(found)

    def fact_reports(self) -> tuple[FactReport, ...]:
        """The metrics of each fact, by the adapter's last replies."""
        about: dict[Fact, list[Question]] = {}
        for question in self.questions:
            if question.fact is not None and question.messages in self._replies:
                about.setdefault(question.fact, []).append(question)
        found = []
        for fact, asked in about.items():
            shares = _shares(asked, self._replies)
            own = {kind.removeprefix("kept_"): share for kind, share in shares.items()}
            found.append(FactReport(fact.subject, fact.answer, own, kept="kept_efficacy" in shares))
        return tuple(found)

    def _metrics(
        self, served: ServedBase, key: str, lora: Lora, asked: Sequence[Question]
    ) -> TrainEvents[dict[str, Metric]]:
        found = _shares(asked, self._replies)
        retention = [question for question in self.questions if question.passes is None]
        if retention:
            yield from self._ask(served, None, retention, self._base_replies)
            replies = [(question.messages, self._base_replies[question.messages]) for question in retention]
            found["retention"] = yield from agreement(served, key, lora, replies)
        return found | {"score": _score(found)}

    def forget_replies(self) -> None:
        """Ask base and adapter everything again from here on."""
        self._base_replies.clear()
        self._replies.clear()

    def ask_base(self, served: ServedBase) -> TrainEvents[None]:
        """Ask the base all questions that it has not answered yet."""
        yield from self._ask(served, None, self.questions, self._base_replies)

    def _ask(
        self, served: ServedBase, key: str | None, asked: Sequence[Question], said: dict[tuple[Message, ...], Reply]
    ) -> TrainEvents[None]:
        missing = [chat for chat in dict.fromkeys(question.messages for question in asked) if chat not in said]
        replies = yield from served.reply_to_chats(missing, key, self.tokens)
        said.update(zip(missing, replies, strict=True))


def fact_questions(fact: Fact, probes: Probes, of_parent: bool = False) -> tuple[Question, ...]:
    """Questions from a fact and from its probes; those for retention are about no fact. of_parent: the fact belongs to
    the parent and is counted under separate kinds (kept_efficacy and so on)."""
    prefix = "kept_" if of_parent else ""
    holds, spares = ReplyCheck("contains", fact.match), ReplyCheck("lacks", fact.match)
    return (
        *(Question(f"{prefix}efficacy", single_turn(prompt), holds, fact) for prompt in fact.questions),
        *(Question(f"{prefix}paraphrase", single_turn(prompt), holds, fact) for prompt in probes.paraphrase),
        *(Question(f"{prefix}specificity", single_turn(prompt), spares, fact) for prompt in probes.specificity),
        *(Question("retention", single_turn(prompt)) for prompt in probes.retention),
    )


def portability_questions(fact: Fact, of_parent: bool = False) -> tuple[Question, ...]:
    """The fact's questions about what follows from it."""
    kind = "kept_portability" if of_parent else "portability"
    hops = [(single_turn(hop.prompt), ReplyCheck("contains", hop.match)) for hop in fact.portability]
    return tuple(Question(kind, messages, follows, fact) for messages, follows in hops)


def _score(found: Mapping[str, Metric]) -> Metric:
    """The score of all metrics but portability, which is only reported."""
    return metrics.score({name: metric for name, metric in found.items() if not name.endswith("portability")})


def example_questions(examples: Sequence[Example]) -> tuple[Question, ...]:
    """Training prompts, for which a reply is right if the trained answer begins with it, or if it has the names and
    the values of the calls of tools that were trained."""

    def right(example: Example) -> ReplyCheck:
        calls = "" if example.text is not None else example.messages[len(example.prompt_messages)].tool_calls
        if not calls:
            return ReplyCheck("begins", (example.answer,))
        called = [call["function"] for call in json.loads(calls)]
        wanted = [text for one in called for text in (one["name"], *map(_written, one["arguments"].values()))]
        return ReplyCheck("holds", tuple(wanted))

    return tuple(Question("efficacy", example.prompt_messages, right(example)) for example in examples)


def _written(value: Any) -> str:
    """A value of a call as the template writes it within the call, without the quotes of a text."""
    text = json.dumps(value, ensure_ascii=False)
    return text[1:-1] if isinstance(value, str) else text


def single_turn(prompt: str) -> tuple[Message, ...]:
    """A conversation with one message of the user."""
    return (Message("user", prompt),)


def _shares(questions: Sequence[Question], said: Mapping[tuple[Message, ...], Reply]) -> dict[str, Metric]:
    """The share of right replies for each kind of question."""
    hits: dict[str, list[bool]] = {}
    for question in questions:
        if question.passes is not None:
            hits.setdefault(question.kind, []).append(question.passes(said[question.messages].text))
    return {kind: metrics.share(sum(right), len(right)) for kind, right in hits.items()}


def agreement(
    served: ServedBase, key: str | None, lora: Lora | None, replies: Sequence[tuple[Sequence[Message], Reply]]
) -> TrainEvents[Metric]:
    """The share of the tokens of these replies that the adapter (None: the base) ranks first, given the conversation
    and the reply's previous tokens, by the program that replies to users. key: under which the adapter is served."""
    rows = []
    for messages, reply in replies:
        asked = served.renderer.encode_prompt(list(messages))
        rows.append(Row((*asked, *reply.tokens), len(asked)))
    if not served.elsewhere:
        return top1_agreement(served, lora, rows)
    sampling = Sampling(max_tokens=0, prompt_logprobs=1)
    prompts = [Prompt(served.base, row.tokens, key, sampling, background=True) for row in rows]
    asked_for = [served.serving.submit(prompt) for prompt in prompts]
    while not all(one.done for one in asked_for):
        yield Waiting()
    hits = []
    for row, one in zip(rows, asked_for, strict=True):
        one.wait()  # raises the error of one that failed
        found = [logprob for delta in one.deltas() for logprob in delta.logprobs]
        hits += [found[place].token == found[place].top[0][0] for place in row.supervised_positions]
    return metrics.share(sum(hits), len(hits))


def top1_agreement(served: ServedBase, lora: Lora | None, rows: Sequence[Row]) -> Metric:
    """The share of the rows' supervised tokens that the adapter (None: the base) ranks first, by the weights in this
    process."""
    decoder = served.backend.decoder
    agreed = total = 0
    prefix = common_prefix([row.tokens for row in rows])
    for group in micro_batches(rows, prefix, AGREEMENT_TOKENS):
        with torch.no_grad():
            packed = pack([row.tokens for row in group], decoder.device, prefix)
            final_TD = served.backend.forward(packed, [] if lora is None else [Segment(lora)])
            places = [index for place, row in enumerate(group) for index in predicting_positions(packed, place, row)]
            ranked = decoder.logits(final_TD[places]).argmax(-1).tolist()
        wanted = [row.tokens[place] for row in group for place in row.supervised_positions]
        agreed += sum(ours == theirs for ours, theirs in zip(ranked, wanted, strict=True))
        total += len(wanted)
    return metrics.share(agreed, total)


def validation_loss(served: ServedBase, lora: Lora, rows: Spool) -> Generator[TrainEvent, None, float]:
    """Mean cross-entropy of the served adapter over the supervised tokens of the validation rows."""
    decoder, total, count = served.backend.decoder, 0.0, 0
    validation = (Row.from_mask(*rows[n]) for n in range(len(rows)))
    for group in micro_batches(validation, rows.prefix, AGREEMENT_TOKENS):
        with torch.no_grad():
            packed = pack([row.tokens for row in group], decoder.device, rows.prefix)
            final_TD = served.backend.forward(packed, [Segment(lora)])
            places = [index for place, row in enumerate(group) for index in predicting_positions(packed, place, row)]
            wanted = torch.tensor(
                [row.tokens[at] for row in group for at in row.supervised_positions], device=final_TD.device
            )
            for part_ND, wanted_N in zip(final_TD[places].split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True):
                total += float(F.cross_entropy(decoder.logits(part_ND), wanted_N, reduction="sum"))
        count += len(wanted)
        yield MicroStepped(len(packed.tokens_T))
    return total / count
