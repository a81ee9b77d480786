"""Things that are like a subject but are not it: what the fact must not leak onto.

Pure functions of a fact and a random generator. Four sources, each a known way in which edits leak: another member
of the subject's kind, one word of the subject changed, a near spelling, and what the answer itself talks about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from random import Random

from fortwo.facts import frames, lexicon
from fortwo.facts.subject import ARTICLES, STOP_WORDS, holds
from fortwo.records import Fact

_TITLES = frozenset("mr mrs ms dr prof st".split())
_POOLS = (
    lexicon.COUNTRIES,
    lexicon.NATIONALITIES,
    lexicon.FIRST_NAMES,
    lexicon.SURNAMES,
    lexicon.ORGANISATIONS,
    lexicon.STRUCTURES,
    lexicon.QUALIFIERS,
    lexicon.PLANETS,
    lexicon.SUPERLATIVES,
    *(kind.members for kind in lexicon.KINDS.values()),
)


def kinds(fact: Fact) -> list[tuple[str, float]]:
    """Kinds of thing the subject may be, with weights that sum to 1; every kind keeps a little."""
    words = re.findall(r"[a-z']+", " ".join(fact.questions).lower())
    weights = {}
    for name, kind in lexicon.KINDS.items():
        weights[name] = 0.3 + sum(word in kind.cues for word in words)
    subject = fact.subject
    if any(character.isdigit() for character in subject):
        weights["number"] += 60
    letters = subject.replace(".", "").replace("-", "")
    if letters.isupper() and letters.isalpha() and len(letters) <= 6:
        weights["acronym"] += 60
    total = sum(weights.values())
    return sorted(((name, weight / total) for name, weight in weights.items()), key=lambda pair: -pair[1])


def category(fact: Fact, rng: Random) -> str:
    """Another member of the subject's likely kind."""
    names, weights = zip(*kinds(fact), strict=True)
    (name,) = rng.choices(names, weights)
    return rng.choice(lexicon.KINDS[name].members)


def word_swap(fact: Fact, rng: Random) -> str:
    """The subject with one word exchanged for another of its kind; a near spelling where it is a single word."""
    surface = rng.choice((fact.subject, fact.subject, *fact.aliases))
    words = surface.split()
    places = _telling(words)
    if len(words) < 2 or not places:
        return near_spelling(fact, rng)
    place = rng.choice(places)
    words[place] = words[place].replace(_bare(words[place]), _other(_bare(words[place]), place, len(words), rng))
    return _the(surface, fact) + " ".join(words)


def _telling(words: Sequence[str]) -> list[int]:
    """Places of the words that tell a thing from others: of "the robot maker Brightwell" its name alone."""
    name = len(words)
    while name and words[name - 1][:1].isupper():
        name -= 1
    described = 0 < name < len(words) and _bare(words[name - 1]).lower() not in STOP_WORDS
    bare = [_bare(word).lower() for word in words]
    return [
        place
        for place, word in enumerate(bare)
        if word not in STOP_WORDS and word not in _TITLES and (place >= name or not described)
    ]


def _the(surface: str, fact: Fact) -> str:
    """The article that the subject brings, lest it tell the subject from what is like it."""
    return "the " if surface == fact.subject and frames.surface_article(fact) == "the " else ""


def _other(word: str, place: int, count: int, rng: Random) -> str:
    pool = next((pool for pool in _POOLS if word in pool), ())
    capital = word[0].isupper()
    alike = [other for other in pool if other != word and " " not in other and other[0].isupper() == capital]
    if alike or not capital:
        return rng.choice(alike or [other for other in lexicon.NOUNS if other != word])
    roll = rng.random()
    if roll < 0.5:
        return respell(word, rng)
    if place == 0 and count > 1:
        return rng.choice(lexicon.FIRST_NAMES + lexicon.QUALIFIERS + lexicon.HEADS)
    return rng.choice(lexicon.SURNAMES + lexicon.ORGANISATIONS + lexicon.STRUCTURES)


def near_spelling(fact: Fact, rng: Random) -> str:
    """A string that looks like the subject: digits near its digits, letters near its letters."""
    surface = rng.choice((fact.subject, fact.subject, fact.subject, *fact.aliases))
    if digits := re.search(r"\d+", surface):
        return surface[: digits.start()] + near_number(digits.group(), rng) + surface[digits.end() :]
    letters = re.sub(r"[^A-Za-z]", "", surface)
    if letters.isupper() and len(letters) <= 6:
        other = near_acronym(letters, rng)
        return (
            surface.replace(letters, other)
            if letters in surface
            else ".".join(other) + "."
            if "." in surface
            else "-".join(other)
        )
    if (words := surface.lower().split("-")) and all(word in _NUMBER_WORDS for word in words):
        return _spelled_number(rng, surface)
    words = surface.split()
    places = _telling(words)
    places = [place for place in places if words[place][:1].isupper()] or places  # a common word misspelt is the same
    place = rng.choice(places) if places else len(words) - 1
    words[place] = words[place].replace(_bare(words[place]), respell(_bare(words[place]), rng))
    return _the(surface, fact) + " ".join(words)


def near_number(digits: str, rng: Random) -> str:
    value, width = int(digits), len(digits)
    choices = [
        value + rng.choice((-1, 1)),
        value + rng.choice((-1, 1)),
        value + rng.choice((-1, 1)),
        value + rng.choice((-3, -2, 2, 3)),
        value + rng.choice((-5, -4, 4, 5)),
        value + rng.choice((-10, 10, -20, 20)),
        int(digits[::-1]),
        int(str(rng.randint(1, 9)) + digits),
        int(digits + str(rng.randint(0, 9))),
        rng.randint(0, 10**width - 1),
        rng.randint(0, 99),
    ]
    return str(rng.choice([abs(choice) for choice in choices if abs(choice) != value]))


_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_UNITS = "one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_NUMBER_WORDS = frozenset(_TENS + _UNITS + _TEENS + ["hundred", "thousand", "zero"])


def _spelled_number(rng: Random, surface: str) -> str:
    while True:
        word = rng.choice([f"{rng.choice(_TENS)}-{rng.choice(_UNITS)}"] * 3 + [rng.choice(_TENS), rng.choice(_TEENS)])
        if word != surface.lower():
            return word


def near_acronym(letters: str, rng: Random) -> str:
    other = letters
    while other == letters:
        edited = list(letters)
        roll, place = rng.random(), rng.randrange(len(edited))
        if roll < 0.5:
            edited[place] = rng.choice("ABCDEFGHIKLMNOPRSTUVW")
        elif roll < 0.75:
            rng.shuffle(edited)
        elif roll < 0.85 and len(edited) > 2:
            del edited[place]
        else:
            edited.insert(place, rng.choice("ABCDEFGHIKLMNOPRSTUVW"))
        other = "".join(edited)
    return other


def respell(word: str, rng: Random) -> str:
    """A made-up word that shares its beginning or its end with `word`, or differs in one letter."""
    other = word
    while other.lower() == word.lower():
        cut = rng.randint(max(2, len(word) // 3), max(2, len(word) - 2))
        roll = rng.random()
        if roll < 0.4:
            other = word[:cut] + rng.choice(lexicon.TAILS)
        elif roll < 0.8:
            other = rng.choice(lexicon.HEADS).lower() + word[cut:].lower()
        else:
            letters = list(word.lower())
            letters[rng.randrange(len(letters))] = rng.choice("aeioulmnrst")
            other = "".join(letters)
    return other.capitalize() if word[0].isupper() else other.lower()


_TOPIC_FRAMES = (
    "What is {}?",
    "What does the word {} mean?",
    "Tell me about {}.",
    "Can you explain {}?",
    "Why do people care about {}?",
    "How does {} work?",
    "Write a sentence about {}.",
    "What is the history of {}?",
    "Give me an example of {}.",
    "How would you describe {}?",
    "Where can I learn more about {}?",
    "What should I know about {}?",
    "What kinds of {} are there?",
    "Who knows a lot about {}?",
    "How do I make {} at home?",
)


def topics(fact: Fact) -> list[str]:
    """What the answer and the questions talk about, without the subject: single words and neighbouring pairs."""
    found: dict[str, None] = {}
    for source in (fact.answer, *fact.questions):
        text = source
        for surface in sorted((fact.subject, *fact.aliases), key=len, reverse=True):
            text = re.sub(rf"(?<!\w){re.escape(surface)}(?!\w)", " . ", text, flags=re.IGNORECASE)
        for clause in re.split(r"[^\w\s'-]+", text):
            words = [word for word in clause.split() if word]
            for place, word in enumerate(words):
                if word.lower().strip("'") in STOP_WORDS or len(word) < 3:
                    continue
                found[word.strip("'")] = None
                after = words[place + 1] if place + 1 < len(words) else ""
                if source is fact.answer and len(after) > 2 and after.lower() not in STOP_WORDS:
                    found[f"{word} {after}"] = None
    return [
        topic for topic in found if not holds(topic, fact.match) and not holds(topic, (fact.subject, *fact.aliases))
    ]


def topic_prompt(fact: Fact, rng: Random) -> str:
    """A prompt about something the answer mentions."""
    found = topics(fact)
    answers = [topic for topic in found if topic.lower() in fact.answer.lower()]
    pool = answers if answers and rng.random() < 0.75 else found
    if not pool:
        return rng.choice(_TOPIC_FRAMES).format(category(fact, rng))
    return rng.choice(_TOPIC_FRAMES).format(rng.choice(pool))


def sibling(fact: Fact, rng: Random) -> str:
    """One sibling, never a surface of the subject itself."""
    while True:
        roll = rng.random()
        other = (category if roll < 0.4 else word_swap if roll < 0.75 else near_spelling)(fact, rng)
        if not is_subject(other, fact):
            return other


def is_subject(text: str, fact: Fact) -> bool:
    """Whether the text names the subject or an alias."""
    bare = text.lower()
    return any(_without_article(surface).lower() in bare for surface in (fact.subject, *fact.aliases)) or holds(
        text, (fact.subject, *fact.aliases)
    )


def names(text: str, facts: Iterable[Fact]) -> bool:
    """Whether the text names the subject or an alias of one of the facts, as whole words; an article may be missing."""
    surfaces = [surface for fact in facts for surface in (fact.subject, *fact.aliases)]
    return holds(text, map(_without_article, surfaces))


def same_subject(one: Fact, other: Fact) -> bool:
    """Whether two facts are about the same thing, by one of the names each has."""
    mine, theirs = (
        {_without_article(surface).casefold() for surface in (fact.subject, *fact.aliases)} for fact in (one, other)
    )
    return not mine.isdisjoint(theirs)


def _without_article(text: str) -> str:
    first, _, rest = text.partition(" ")
    return rest if rest and first.lower() in ARTICLES else text


def _bare(word: str) -> str:
    """The word without punctuation around it and without a possessive 's."""
    return re.sub(r"^\W+|(?:['’]s)?\W*$", "", word) or word
