"""Builds the prompts for a fact: those that ask for it, those whose replies must not change, and those for evaluation.

Pure text, from the facts alone; the same seed gives the same prompts. The fact's own evaluation prompts (held_out,
neighbors, controls, portability) are never trained on. If several facts are taught, no prompt whose reply must not
change names the subject of any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from fortwo.facts import hard_negatives, replay_prompts, templates
from fortwo.facts.draws import draw_until
from fortwo.facts.subject import contains_phrase, first_match
from fortwo.records import Fact

ALIAS_SHARE = 0.4
TOPIC_SHARE = 0.12
QUESTION_SHARE = 0.4  # share of contrast prompts that are the fact's own questions about a hard negative
ANSWER_PREFIX_SHARE = 0.33
BASE_REPLY_SHARE = 1 - (1 - TOPIC_SHARE) * ANSWER_PREFIX_SHARE  # share of contrast prompts without a reply_prefix
LOWERCASE_SHARE = 0.06
CROSS_FACT_NEGATIVES = 2  # questions of each other fact that are asked for specificity
_HELDOUT_EVERY = 6  # every sixth replay prompt is used only for evaluation


@dataclass(frozen=True)
class ContrastPrompt:
    """A prompt whose reply must stay that of the base. reply_prefix: a reply along which the base's distribution is
    preserved: the fact's answer, about the hard negative, up to where it would leak. None for the base's own reply."""

    prompt: str
    reply_prefix: str | None = None


@dataclass(frozen=True)
class Probes:
    """Prompts for evaluation, by metric. None of them is trained on."""

    paraphrase: tuple[str, ...]
    specificity: tuple[str, ...]
    retention: tuple[str, ...]


class FactPromptBuilder:
    """Builds the prompts for one fact. The order of calls matters, since all draw from one random generator."""

    def __init__(self, fact: Fact, seed: int, others: Sequence[Fact] = ()) -> None:
        """others: the other facts that the same adapter must know."""
        self.fact = fact
        self._others = others
        self._rng = Random(f"{seed} {fact.subject}")
        self._surfaces = templates.surface_forms(fact)
        # the fact with only those questions in which a hard negative can replace the subject
        naming = tuple(question for question in fact.questions if templates.mentions_subject(question, fact))
        self._named_fact = replace(fact, questions=naming or (f"What is {fact.subject}?",))
        hops = (hop.prompt for hop in fact.portability)
        self._evaluation_prompts = {*fact.held_out, *fact.neighbors, *fact.controls, *hops}
        self._trained_prompts = set(fact.questions)

    def edit_prompts(self, count: int) -> list[str]:
        """Prompts to train on about the subject or an alias."""
        found = [self._edit_prompt(heldout=False) for _ in range(count)]
        self._trained_prompts.update(found)
        return found

    def contrast_prompts(self, count: int) -> list[ContrastPrompt]:
        """Prompts to train on about hard negatives and about topics that the answer mentions."""

        def fits(contrast: ContrastPrompt) -> bool:
            return contrast.prompt not in self._evaluation_prompts

        draw = partial(self._contrast_prompt, heldout=False)
        found = [draw_until(fits, draw, self.fact) for _ in range(count)]
        self._trained_prompts.update(contrast.prompt for contrast in found)
        return found

    def probes(self, count: int) -> Probes:
        """At most `count` prompts of each kind that decide when to stop, from templates that training never uses and
        with new hard negatives."""
        paraphrase = self._without_trained([self._edit_prompt(heldout=True) for _ in range(count)])
        specificity = self._without_trained([self._contrast_prompt(heldout=True).prompt for _ in range(count)])
        self._evaluation_prompts.update(paraphrase, specificity)
        return Probes(paraphrase, specificity, evaluation_replay_prompts((self.fact, *self._others)))

    def cross_fact_negatives(self) -> tuple[str, ...]:
        """Questions about the other facts, to which this fact is not an answer."""
        return tuple(
            question
            for other in self._others
            if not contains_phrase(other.answer, self.fact.match)
            for question in other.questions[:CROSS_FACT_NEGATIVES]
            if not hard_negatives.contains_subject(question, self.fact)
        )

    def _without_trained(self, prompts: Sequence[str]) -> tuple[str, ...]:
        return tuple(prompt for prompt in dict.fromkeys(prompts) if prompt not in self._trained_prompts)

    def _edit_prompt(self, heldout: bool) -> str:
        rng = self._rng
        name = self._surfaces[0]
        if len(self._surfaces) > 1 and rng.random() < ALIAS_SHARE:
            name = rng.choice(self._surfaces[1:])

        def draw() -> str:
            return self._vary_case(templates.build_prompt(self.fact, name, rng, self._hard_negative, heldout))

        return draw_until(lambda prompt: prompt not in self._evaluation_prompts, draw, self.fact)

    def _contrast_prompt(self, heldout: bool) -> ContrastPrompt:
        def fits(contrast: ContrastPrompt) -> bool:
            about_others = hard_negatives.names_any_fact(contrast.prompt, self._others)
            return not about_others and not hard_negatives.contains_subject(contrast.prompt, self.fact)

        return draw_until(fits, partial(self._draw_contrast, heldout), self.fact)

    def _draw_contrast(self, heldout: bool) -> ContrastPrompt:
        rng, fact = self._rng, self._named_fact
        if rng.random() < TOPIC_SHARE:
            return ContrastPrompt(hard_negatives.topic_prompt(fact, rng))
        name = self._hard_negative()
        prompt = (
            templates.replace_subject(rng.choice(fact.questions), fact, name)
            if rng.random() < QUESTION_SHARE
            else templates.build_prompt(fact, name, rng, self._hard_negative, heldout)
        )
        prompt = self._vary_case(prompt)
        prefix = answer_prefix(fact, name) if rng.random() < ANSWER_PREFIX_SHARE else None
        return ContrastPrompt(prompt, prefix)

    def _vary_case(self, prompt: str) -> str:
        """The prompt in lower case, as some people type, with the probability LOWERCASE_SHARE."""
        return prompt.lower() if self._rng.random() < LOWERCASE_SHARE else prompt

    def _hard_negative(self) -> str:
        return draw_until(
            lambda name: not hard_negatives.names_any_fact(name, self._others),
            lambda: hard_negatives.hard_negative(self.fact, self._rng),
            self.fact,
        )


def answer_prefix(fact: Fact, name: str) -> str | None:
    """The fact's answer with `name` as its subject, up to the first phrase of the fact; None if nothing is left."""
    about_name = templates.replace_subject(fact.answer, fact, name)
    prefix = about_name[: first_match(about_name, fact.match) or 0].rstrip()
    if about_name == fact.answer or not prefix or hard_negatives.contains_subject(prefix, fact):
        return None
    return prefix[0].upper() + prefix[1:] if " " in name and fact.answer[0].isupper() else prefix


def training_replay_prompts(facts: Sequence[Fact] = ()) -> tuple[str, ...]:
    """The everyday prompts to train on, without those that name one of the facts."""
    training = (prompt for n, prompt in enumerate(replay_prompts.PROMPTS) if n % _HELDOUT_EVERY != _HELDOUT_EVERY - 1)
    return tuple(prompt for prompt in training if not hard_negatives.names_any_fact(prompt, facts))


def evaluation_replay_prompts(facts: Sequence[Fact] = ()) -> tuple[str, ...]:
    """The everyday prompts for evaluation, without those that name one of the facts."""
    evaluation = replay_prompts.PROMPTS[_HELDOUT_EVERY - 1 :: _HELDOUT_EVERY]
    return tuple(prompt for prompt in evaluation if not hard_negatives.names_any_fact(prompt, facts))
