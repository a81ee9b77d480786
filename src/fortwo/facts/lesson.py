"""What a fact is taught with: prompts that ask for it, prompts that must not change, and prompts kept for evaluation.

Pure text, from the facts alone; the same seed gives the same lesson. What a fact brings for evaluation (held_out,
neighbors, controls, portability) is used for evaluation and never trained on. Where several facts are taught, nothing
that one lesson holds to the base's reply names the subject of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from fortwo.facts import frames, rehearsal, siblings
from fortwo.facts.subject import first_place, holds
from fortwo.records import Fact

ALIAS_SHARE = 0.4
TOPIC_SHARE = 0.12
QUESTION_SHARE = 0.4  # of contrast prompts: the fact's own questions about a sibling
BEGUN_SHARE = 0.33
OWN_SHARE = 1 - (1 - TOPIC_SHARE) * BEGUN_SHARE  # of contrasts: those held to the base's own reply
LOWER_SHARE = 0.06
RIVALS = 2  # questions of each other fact that are asked as neighbours
_KEPT = 6  # every sixth rehearsal prompt is for evaluation


@dataclass(frozen=True)
class Contrast:
    """A prompt whose reply must stay the base's. begun: a reply to hold it to, the fact's answer told of the sibling
    up to where it would leak; None for the base's own reply."""

    prompt: str
    begun: str | None = None


@dataclass(frozen=True)
class Probes:
    """Prompts to evaluate on, none of them trained on."""

    paraphrase: tuple[str, ...]
    specificity: tuple[str, ...]
    retention: tuple[str, ...]


class Lesson:
    def __init__(self, fact: Fact, seed: int, others: Sequence[Fact] = ()) -> None:
        """others: what the same model is to know besides."""
        self.fact = fact
        self._others = others
        self._rng = Random(f"{seed} {fact.subject}")
        self._surfaces = frames.surfaces(fact)
        naming = tuple(question for question in fact.questions if frames.mentions(question, fact))
        self._naming = replace(fact, questions=naming or (f"What is {fact.subject}?",))  # a sibling can take its place
        hops = (hop.prompt for hop in fact.portability)
        self._evaluated = {*fact.held_out, *fact.neighbors, *fact.controls, *hops}
        self._trained = set(fact.questions)

    def asks(self, count: int) -> list[str]:
        """Prompts about the subject or an alias."""
        found = [self._ask(kept=False) for _ in range(count)]
        self._trained.update(found)
        return found

    def contrasts(self, count: int) -> list[Contrast]:
        """Prompts about siblings and about what the answer mentions."""
        found: list[Contrast] = []
        while len(found) < count:
            contrast = self._contrast(kept=False)
            if contrast.prompt not in self._evaluated:
                found.append(contrast)
        self._trained.update(contrast.prompt for contrast in found)
        return found

    def probes(self, count: int) -> Probes:
        """At most `count` prompts of a kind for deciding when to stop: from frames that training never uses, and
        siblings drawn afresh."""
        paraphrase = self._untrained([self._ask(kept=True) for _ in range(count)])
        specificity = self._untrained([self._contrast(kept=True).prompt for _ in range(count)])
        self._evaluated.update(paraphrase, specificity)
        return Probes(paraphrase, specificity, kept_rehearsal((self.fact, *self._others)))

    def rivals(self) -> tuple[str, ...]:
        """Questions about the other facts that this one is no answer to."""
        return tuple(
            question
            for other in self._others
            if not holds(other.answer, self.fact.match)
            for question in other.questions[:RIVALS]
            if not siblings.is_subject(question, self.fact)
        )

    def _untrained(self, prompts: Sequence[str]) -> tuple[str, ...]:
        return tuple(prompt for prompt in dict.fromkeys(prompts) if prompt not in self._trained)

    def _ask(self, kept: bool) -> str:
        rng = self._rng
        name = self._surfaces[0]
        if len(self._surfaces) > 1 and rng.random() < ALIAS_SHARE:
            name = rng.choice(self._surfaces[1:])
        while True:
            prompt = self._spelled(frames.prompt(self.fact, name, rng, self._sibling, kept))
            if prompt not in self._evaluated:
                return prompt

    def _contrast(self, kept: bool) -> Contrast:
        rng, fact = self._rng, self._naming
        while True:
            if rng.random() < TOPIC_SHARE:
                contrast = Contrast(siblings.topic_prompt(fact, rng))
            else:
                name = self._sibling()
                prompt = (
                    frames.in_question(rng.choice(fact.questions), fact, name)
                    if rng.random() < QUESTION_SHARE
                    else frames.prompt(fact, name, rng, self._sibling, kept)
                )
                prompt = self._spelled(prompt)
                begun = begun_answer(fact, name) if rng.random() < BEGUN_SHARE else None
                contrast = Contrast(prompt, begun)
            if not siblings.is_subject(contrast.prompt, fact) and not siblings.names(contrast.prompt, self._others):
                return contrast

    def _spelled(self, prompt: str) -> str:
        """As people type it: some in small letters."""
        return prompt.lower() if self._rng.random() < LOWER_SHARE else prompt

    def _sibling(self) -> str:
        while True:
            name = siblings.sibling(self.fact, self._rng)
            if not siblings.names(name, self._others):
                return name


def begun_answer(fact: Fact, name: str) -> str | None:
    """The fact's answer told of `name`, cut before what must not be said of it; None where that leaves nothing."""
    told = frames.in_question(fact.answer, fact, name)
    begun = told[: first_place(told, fact.match) or 0].rstrip()
    if told == fact.answer or not begun or siblings.is_subject(begun, fact):
        return None
    return begun[0].upper() + begun[1:] if " " in name and fact.answer[0].isupper() else begun


def trained_rehearsal(facts: Sequence[Fact] = ()) -> tuple[str, ...]:
    """Everyday prompts to train on: none that asks about one of the facts."""
    trained = (prompt for place, prompt in enumerate(rehearsal.PROMPTS) if place % _KEPT != _KEPT - 1)
    return tuple(prompt for prompt in trained if not siblings.names(prompt, facts))


def kept_rehearsal(facts: Sequence[Fact] = ()) -> tuple[str, ...]:
    """Those to evaluate on."""
    return tuple(prompt for prompt in rehearsal.PROMPTS[_KEPT - 1 :: _KEPT] if not siblings.names(prompt, facts))
