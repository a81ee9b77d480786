"""Sentence frames: the many ways in which people bring up a subject. Pure text, and no frame knows any fact.

A prompt is composed from parts (`facts.phrases`), so that training hardly ever sees the same sentence twice: the
fact's own questions with something before, after or around them, general requests, contexts that mention the subject
and leave the question elsewhere, documents, scenes, blanks, tasks, doubts, comparisons with siblings. Every frame
takes a sibling as well as the subject, which makes minimal pairs. One part in six is kept for evaluation and never
trained on, and so are whole kinds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random

from fortwo.facts import phrases, unseen
from fortwo.facts.subject import ARTICLES, STOP_WORDS, holds
from fortwo.records import Fact

_KEPT = 6  # every sixth part is for evaluation
EVALUATED_SHARE = 0.5  # of prompts for evaluation: those of kinds that training never uses
_PLACE = r"\{(\w)\}"
_DESCRIBED = (
    rf"\b(?:the|an?)\s+(?:\w+\s+)?(?!(?:{'|'.join(sorted(STOP_WORDS))})\s)\w+\s+"  # "the number " of "the number 42"
)
_SENTENCE_START = r"""(?:^|[.?!]["”)]?\s|\n)["“]?$"""


def frame_parts(rng: Random, kept: bool) -> tuple[str, ...]:
    """What one prompt is composed of, places open. kept: of a kind, or of parts, that training never uses."""
    if kept and rng.random() < EVALUATED_SHARE:
        return tuple(rng.choice(parts) for parts in _kind(unseen.EVALUATED, rng).parts)
    return tuple(_part(parts, rng, kept) for parts in _kind(phrases.TRAINED, rng).parts)


def _frame(fact: Fact, rng: Random, kept: bool) -> str:
    """A frame that does not happen to say what the fact's reply must hold."""
    while True:
        frame = " ".join(frame_parts(rng, kept))
        if not holds(re.sub(_PLACE, "", frame), fact.match):
            return frame


def _kind(kinds: Sequence[phrases.Kind], rng: Random) -> phrases.Kind:
    return rng.choices(kinds, [kind.share for kind in kinds])[0]


def _part(parts: Sequence[str], rng: Random, kept: bool) -> str:
    """A random part: one of those kept for evaluation, or one of the others; of a few, any."""
    if len(parts) < _KEPT:
        return rng.choice(parts)
    place = rng.randrange(len(parts))
    while (place % _KEPT == _KEPT - 1) is not kept:
        place = rng.randrange(len(parts))
    return parts[place]


def surface_article(fact: Fact) -> str:
    """The article that the fact's questions put before the subject: "the ", "a ", "an " or ""."""
    before: Counter[str] = Counter()
    for question in fact.questions:
        if found := re.search(rf"(\w+)\s+{re.escape(fact.subject)}(?!\w)", question, re.IGNORECASE):
            before[found.group(1).lower()] += 1
    article, count = before.most_common(1)[0] if before else ("", 0)
    return f"{article} " if article in ARTICLES and 2 * count > len(fact.questions) else ""


def surfaces(fact: Fact) -> list[str]:
    """The subject as the questions write it, and its aliases."""
    return [surface_article(fact) + fact.subject, *fact.aliases]


def put(frame: str, places: Mapping[str, str]) -> str:
    """Fill the places of a frame; a sentence still begins with a capital, a single word keeps its spelling."""

    def filled(found: re.Match[str]) -> str:
        place, name = found.group(1), places["S"]
        text = places[place]
        begins = place in "qp" or (place != "l" and re.search(_SENTENCE_START, frame[: found.start()]))
        keeps = " " not in text or (" " not in name and text.startswith(name))
        return text[0].upper() + text[1:] if begins and not keeps else text

    return re.sub(r"(?<=\w)\.\.(?!\.)", ".", re.sub(_PLACE, filled, frame))


def in_question(question: str, fact: Fact, name: str) -> str:
    """The fact's question with another name in the subject's place (with its article where the name brings one)."""
    for surface in sorted((fact.subject, *fact.aliases), key=len, reverse=True):
        article = r"(?:\b(?:the|an?)\s+)?" if name.split()[0].lower() in ARTICLES or name[:1].isupper() else ""
        pattern = rf"(?<!\w){article}{re.escape(surface)}(?!\w)"
        if re.search(pattern, question, re.IGNORECASE):
            return re.sub(pattern, lambda _: name, question, count=1, flags=re.IGNORECASE)
    return question


def _pronoun(question: str, fact: Fact) -> str | None:
    """The question with "it" for the subject, so that the subject stands in another sentence."""
    subject = re.escape(fact.subject)
    pattern = rf"(?<!\w)(?:(?:the|an?)\s+)?{subject}(['’]s)?(?!\w)"
    of_another = rf"\ban?\s+{subject}\s+\w"  # "a {subject} person" says something of a person
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


def _lower(question: str) -> str:
    first = re.split(r"[\W\d_]", question, maxsplit=1)[0]
    return question if first.isupper() or not first else question[0].lower() + question[1:]


def prompt(fact: Fact, name: str, rng: Random, other: Callable[[], str], kept: bool = False) -> str:
    """One prompt about `name` (a surface of the subject, or a sibling). `other` draws siblings for comparisons.

    kept: made for evaluation, of what training never uses.
    """
    frame = _frame(fact, rng, kept)
    question = rng.choice(fact.questions)
    asked = in_question(question, fact, name)
    asked += "." if asked[-1].isalnum() else ""
    within = asked if asked.startswith(name) else _lower(asked)
    places = {"S": name, "q": asked, "l": within, "p": _pronoun(question, fact) or asked}
    if "{A}" in frame:
        places |= {"A": other(), "B": other()}
    return put(frame, places)


def mentions(text: str, fact: Fact) -> bool:
    """Whether the text names the subject or an alias as whole words."""
    return holds(text, (fact.subject, *fact.aliases))
