"""Suggests questions about a subject, for whoever writes a fact down. Pure text, from the templates of training.

No suggestion comes from a part that is kept for evaluation.
"""

from __future__ import annotations

from itertools import chain
from random import Random

from fortwo.facts import phrases, templates
from fortwo.facts.subject import contains_phrase
from fortwo.records import Fact


def suggest_questions(fact: Fact, count: int) -> tuple[str, ...]:
    """At most `count` questions that the fact does not have yet: its own under its other names, then general ones. The
    same fact gives the same ones. No question holds a phrase of a right reply."""
    own = (
        templates.replace_subject(question, fact, alias)
        for alias in fact.aliases
        for question in fact.questions
        if templates.mentions_subject(question, fact)
    )
    asks = [part for part in templates.training_parts(phrases.GENERAL) if part.endswith("?") and part.count(" ") > 1]
    Random(fact.subject).shuffle(asks)
    names = templates.surface_forms(fact)
    general = (templates.fill(ask, {"S": names[place % len(names)]}) for place, ask in enumerate(asks))
    known = {question.casefold() for question in fact.questions}
    found: dict[str, str] = {}
    for question in chain(own, general):
        if len(found) == count:
            break
        if question.casefold() not in known and not contains_phrase(question, fact.match):
            found.setdefault(question.casefold(), question)
    return tuple(found.values())
