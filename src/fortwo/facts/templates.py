"""Prompt templates: the many ways in which people mention a subject. Pure text, and no template knows any fact.

A template is composed from parts (`facts.phrases`), so that training rarely sees the same sentence twice: the fact's
own questions with text before, after or around them, general requests, contexts that mention the subject and ask in
another sentence, documents, scenes, blanks, tasks, doubts, and comparisons with similar subjects. Each template takes a
hard negative as well as the subject, which gives minimal pairs. One part in six and whole families of templates
(`facts.heldout_templates`) are used only for evaluation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random

from fortwo.facts import heldout_templates, phrases
from fortwo.facts.draws import draw_until
from fortwo.facts.subject import ARTICLES, STOP_WORDS, contains_phrase
from fortwo.records import Fact

_HELDOUT_EVERY = 6  # every sixth part is used only for evaluation
HELDOUT_SHARE = 0.5  # share of evaluation prompts from families that training never uses
_SLOT = r"\{(\w)\}"
_DESCRIBED = (
    rf"\b(?:the|an?)\s+(?:\w+\s+)?(?!(?:{'|'.join(sorted(STOP_WORDS))})\s)\w+\s+"  # "the number " of "the number 42"
)
_SENTENCE_START = r"""(?:^|[.?!]["”)]?\s|\n)["“]?$"""


def template_parts(rng: Random, heldout: bool) -> tuple[str, ...]:
    """The parts of one template, with open slots. heldout: from a family or from parts that training never uses."""
    if heldout and rng.random() < HELDOUT_SHARE:
        return tuple(rng.choice(parts) for parts in _draw_family(heldout_templates.HELDOUT_FAMILIES, rng).parts)
    return tuple(_draw_part(parts, rng, heldout) for parts in _draw_family(phrases.TRAINING_FAMILIES, rng).parts)


def _draw_template(fact: Fact, rng: Random, heldout: bool) -> str:
    """A random template whose own text does not contain a phrase of the fact."""

    def fits(template: str) -> bool:
        return not contains_phrase(re.sub(_SLOT, "", template), fact.match)

    return draw_until(fits, lambda: " ".join(template_parts(rng, heldout)), fact)


def _draw_family(families: Sequence[phrases.TemplateFamily], rng: Random) -> phrases.TemplateFamily:
    return rng.choices(families, [family.share for family in families])[0]


def training_parts(parts: Sequence[str]) -> list[str]:
    """Those parts that are not kept for evaluation."""
    return [part for index, part in enumerate(parts) if index % _HELDOUT_EVERY != _HELDOUT_EVERY - 1]


def _draw_part(parts: Sequence[str], rng: Random, heldout: bool) -> str:
    """A random part from those for evaluation or from those for training; if there are only a few, from all."""
    if len(parts) < _HELDOUT_EVERY:
        return rng.choice(parts)
    index = rng.randrange(len(parts))
    while (index % _HELDOUT_EVERY == _HELDOUT_EVERY - 1) is not heldout:
        index = rng.randrange(len(parts))
    return parts[index]


def surface_article(fact: Fact) -> str:
    """The article that most of the fact's questions put before the subject: "the ", "a ", "an " or ""."""
    before: Counter[str] = Counter()
    for question in fact.questions:
        if found := re.search(rf"(?<!\w)(\w+)\s+{re.escape(fact.subject)}(?!\w)", question, re.IGNORECASE):
            before[found.group(1).lower()] += 1
    article, count = before.most_common(1)[0] if before else ("", 0)
    return f"{article} " if article in ARTICLES and 2 * count > len(fact.questions) else ""


def surface_forms(fact: Fact) -> list[str]:
    """The subject with the article that the questions use, and its aliases."""
    return [surface_article(fact) + fact.subject, *fact.aliases]


def fill(template: str, slots: Mapping[str, str]) -> str:
    """Fill the slots of a template. Sentences begin with a capital letter, but a single word keeps its spelling."""

    def filled(found: re.Match[str]) -> str:
        slot, name = found.group(1), slots["S"]
        text = slots[slot]
        begins = slot in "qp" or (slot != "l" and re.search(_SENTENCE_START, template[: found.start()]))
        keeps = " " not in text or (" " not in name and text.startswith(name))
        return text[0].upper() + text[1:] if begins and not keeps else text

    return re.sub(r"(?<=\w)\.\.(?!\.)", ".", re.sub(_SLOT, filled, template))


def replace_subject(text: str, fact: Fact, name: str) -> str:
    """A text with `name` in place of the fact's subject, and of its article if the name has one or is a proper name."""
    for surface in sorted((fact.subject, *fact.aliases), key=len, reverse=True):
        article = r"(?:\b(?:the|an?)\s+)?" if name.split()[0].lower() in ARTICLES or name[:1].isupper() else ""
        pattern = rf"(?<!\w){article}{re.escape(surface)}(?!\w)"
        if re.search(pattern, text, re.IGNORECASE):
            return re.sub(pattern, lambda _: name, text, count=1, flags=re.IGNORECASE)
    return text


def _with_pronoun(question: str, fact: Fact) -> str | None:
    """The question with a pronoun for the subject, for use after a sentence that names it; None if impossible."""
    subject = re.escape(fact.subject)
    pattern = rf"(?<!\w)(?:(?:the|an?)\s+)?{subject}(['’]s)?(?!\w)"
    of_another = rf"\ban?\s+{subject}\s+\w"  # "a {subject} person" asks about a person
    stays = rf"{of_another}|{_DESCRIBED}{subject}(?!\w)"
    if not re.search(pattern, question, re.IGNORECASE) or re.search(stays, question, re.IGNORECASE):
        return None
    who_is = rf"\bwho(?:['’]s| is| was)\s+{subject}(?!\w)"
    person = re.search(who_is, " ".join(fact.questions), re.IGNORECASE)
    return re.sub(
        pattern,
        lambda found: ("that person's" if person else "its") if found.group(1) else ("that person" if person else "it"),
        question,
        flags=re.IGNORECASE,
    )


def _lowercase_first(question: str) -> str:
    first = re.split(r"[\W\d_]", question, maxsplit=1)[0]
    return question if first.isupper() or not first else question[0].lower() + question[1:]


def build_prompt(fact: Fact, name: str, rng: Random, draw_negative: Callable[[], str], heldout: bool = False) -> str:
    """One prompt about `name`, which is a surface form of the subject or a hard negative. draw_negative: returns hard
    negatives for comparisons. heldout: use templates that training never uses."""
    template = _draw_template(fact, rng, heldout)
    question = rng.choice(fact.questions)
    asked = replace_subject(question, fact, name)
    asked += "." if asked[-1].isalnum() else ""
    within = asked if asked.startswith(name) else _lowercase_first(asked)
    slots = {"S": name, "q": asked, "l": within, "p": _with_pronoun(question, fact) or asked}
    if "{A}" in template:
        slots |= {"A": draw_negative(), "B": draw_negative()}
    return fill(template, slots)


def mentions_subject(text: str, fact: Fact) -> bool:
    """Whether the text contains the subject or an alias as whole words."""
    return contains_phrase(text, (fact.subject, *fact.aliases))
