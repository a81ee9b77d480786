"""The exam of an adapter: the questions of its report, by which it can be examined again, anywhere. Pure.

A report keeps each question with the rule that decides about a reply, and the base's reply where the adapter must keep
it. Whoever can answer a conversation, a server or a model in memory, can be examined (`Examinee`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fortwo.errors import InvalidRequest
from fortwo.facts import metrics
from fortwo.facts.subject import contains_phrase
from fortwo.records import Json, Message, Metric, ReplyCheck

OLD_REPLY_TOKENS = 32  # of reports that do not say how long a reply may be
_RULES: Mapping[str, Literal["contains", "lacks"]] = {
    "efficacy": "contains",
    "paraphrase": "contains",
    "specificity": "lacks",
}


def passes(check: ReplyCheck, reply: str) -> bool:
    """Whether a reply is right."""
    match check.rule:
        case "contains":
            return contains_phrase(reply, check.texts)
        case "lacks":
            return not contains_phrase(reply, check.texts)
        case "begins":
            return bool(reply.strip()) and check.texts[0].strip().startswith(reply.strip())
        case "holds":
            return all(text in reply or _unescaped(text) in reply for text in check.texts)


def _unescaped(text: str) -> str:
    """A text as it stands where it is not written as JSON."""
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text


@dataclass(frozen=True)
class ExamQuestion:
    """check: None for retention, which asks how much of the base's reply is kept. base_tokens: empty in reports of
    earlier versions."""

    kind: str
    messages: tuple[Message, ...]
    check: ReplyCheck | None
    base: str
    base_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Exam:
    """reply_tokens: maximum length of a reply. reported: the metrics of the report. targets: those of the plan."""

    questions: tuple[ExamQuestion, ...]
    reply_tokens: int
    reported: dict[str, Metric]
    targets: dict[str, float]


@dataclass(frozen=True)
class Kept:
    """How many of `total` parts of the base's reply are kept. exact: they are tokens, as in the report; otherwise they
    are the characters up to the first difference, which says less."""

    kept: int
    total: int
    exact: bool = True


class Examinee(Protocol):
    """What can be examined. Both methods raise Unavailable when it does not answer."""

    def reply(self, messages: Sequence[Message], tokens: int) -> str:
        """The greedy reply of at most so many tokens."""

    def retention(self, question: ExamQuestion, tokens: int) -> Kept:
        """How much of the base's reply it keeps."""


@dataclass(frozen=True)
class Result:
    """metrics: by name, as in the report. exact: whether retention was measured as the report's was."""

    metrics: dict[str, Metric]
    exact: bool

    def misses(self, exam: Exam) -> list[str]:
        """The metrics below their targets; where there are no targets, those below the report's by more than one
        question. Retention counts only if it was measured as in the report."""
        return [name for name, found in self.metrics.items() if name in self._judged(exam, name, found)]

    @property
    def judges(self) -> bool:
        """Whether anything was measured that counts."""
        return any(name not in ("retention", "score") or (name == "retention" and self.exact) for name in self.metrics)

    def _judged(self, exam: Exam, name: str, found: Metric) -> list[str]:
        if name == "retention" and not self.exact:
            return []
        if exam.targets:
            return [name] if found.value < exam.targets.get(name, 0.0) else []
        before = exam.reported.get(name)
        missed = before is not None and name != "score" and found.value < before.value - 1.0 / max(1, found.n)
        return [name] if missed else []


def exam_of(ref: str, manifest: Mapping[str, Any]) -> Exam:
    """The exam in the manifest of a version. Raises InvalidRequest for an adapter that has none."""
    report = manifest.get("report")
    if not isinstance(report, Mapping):
        raise InvalidRequest(
            f"{ref} has no report, so there is no exam that could be run again.",
            param="name",
            hint="Only adapters that were trained here have one.",
        )
    plan = manifest.get("plan") or {}
    questions = [_question(ref, one, manifest.get("facts") or []) for one in report["transcripts"]]
    return Exam(
        tuple(questions),
        report.get("reply_tokens") or OLD_REPLY_TOKENS,
        {name: Metric(**found) for name, found in report["metrics"].items() if found is not None},
        dict(plan.get("targets") or {}),
    )


def _question(ref: str, transcript: Json, facts: Sequence[Json]) -> ExamQuestion:
    before = tuple(Message(**message) for message in transcript.get("before", ()))
    messages = (*before, Message("user", transcript["prompt"]))
    kind, check = transcript["kind"], transcript.get("check")
    if check is not None:
        check = ReplyCheck(check["rule"], tuple(check["texts"]))
    elif kind != "retention":
        check = _check_of_old(ref, kind, facts)
    return ExamQuestion(kind, messages, check, transcript["base"], tuple(transcript.get("base_tokens", ())))


def _check_of_old(ref: str, kind: str, facts: Sequence[Json]) -> ReplyCheck:
    """The check of a transcript that an earlier version wrote, which is known where there is only one fact."""
    if len(facts) == 1 and kind in _RULES:
        return ReplyCheck(_RULES[kind], tuple(facts[0]["match"]))
    raise InvalidRequest(
        f"{ref} was trained by a version of fortwo that did not record what makes a reply right.",
        param="name",
        hint="Train it again to have an exam that can be repeated.",
    )


def examine(exam: Exam, examinee: Examinee, progress: Callable[[int, int], None]) -> Result:
    """Ask all questions. progress(done, total) is called after each one."""
    hits: dict[str, list[bool]] = {}
    kept: list[Kept] = []
    for done, question in enumerate(exam.questions, 1):
        if question.check is None:
            kept.append(examinee.retention(question, exam.reply_tokens))
        else:
            reply = examinee.reply(question.messages, exam.reply_tokens)
            hits.setdefault(question.kind, []).append(passes(question.check, reply))
        progress(done, len(exam.questions))
    found = {kind: metrics.share(sum(right), len(right)) for kind, right in hits.items()}
    if kept:
        found["retention"] = metrics.share(sum(one.kept for one in kept), sum(one.total for one in kept))
    judged = {name: metric for name, metric in found.items() if not name.endswith("portability")}
    if judged:
        found["score"] = metrics.score(judged)
    return Result(found, exact=all(one.exact for one in kept))


def same_beginning(base: str, reply: str) -> Kept:
    """How many characters of the base's reply come before the first difference."""
    pairs = zip(base, reply, strict=False)
    kept = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(base), len(reply)))
    return Kept(kept, max(1, len(base)) if base else 0, exact=False)
