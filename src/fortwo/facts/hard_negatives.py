"""Hard negatives: names that are similar to a subject, about which the fact must not be told.

Pure functions of a fact and a random generator. There are four sources, each a known way in which edits leak: another
entity of the subject's type, the subject with one word changed, a similar spelling, and topics of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from random import Random

from fortwo.facts import lexicon, templates
from fortwo.facts.draws import draw_until
from fortwo.facts.subject import ARTICLES, STOP_WORDS, contains_phrase
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
    *(kind.members for kind in lexicon.ENTITY_TYPES.values()),
)


def entity_types(fact: Fact) -> list[tuple[str, float]]:
    """The types of entity that the subject may have, by falling weight. The weights sum to 1, and none is 0."""
    words = re.findall(r"[a-z']+", " ".join(fact.questions).lower())
    weights = {}
    for name, kind in lexicon.ENTITY_TYPES.items():
        weights[name] = 0.3 + sum(word in kind.cues for word in words)
    subject = fact.subject
    if any(character.isdigit() for character in subject):
        weights["number"] += 60
    letters = subject.replace(".", "").replace("-", "")
    if letters.isupper() and letters.isalpha() and len(letters) <= 6:
        weights["acronym"] += 60
    total = sum(weights.values())
    return sorted(((name, weight / total) for name, weight in weights.items()), key=lambda pair: -pair[1])


def same_type_entity(fact: Fact, rng: Random) -> str:
    """A random entity of a type that the subject probably has."""
    names, weights = zip(*entity_types(fact), strict=True)
    (name,) = rng.choices(names, weights)
    return rng.choice(lexicon.ENTITY_TYPES[name].members)


def word_swap(fact: Fact, rng: Random) -> str:
    """The subject with one word replaced by another of its type; a similar spelling if the subject is a single word."""
    surface = rng.choice((fact.subject, fact.subject, *fact.aliases))
    words = surface.split()
    indices = _distinguishing_words(words)
    if len(words) < 2 or not indices:
        return near_spelling(fact, rng)
    index = rng.choice(indices)
    word = _strip_punctuation(words[index])
    words[index] = words[index].replace(word, _replacement_word(word, index, len(words), rng))
    return _article(surface, fact) + " ".join(words)


def _distinguishing_words(words: Sequence[str]) -> list[int]:
    """The indices of the words that identify the subject: in "the robot maker Brightwell" only that of the name."""
    name = len(words)
    while name and words[name - 1][:1].isupper():
        name -= 1
    described = 0 < name < len(words) and _strip_punctuation(words[name - 1]).lower() not in STOP_WORDS
    bare = [_strip_punctuation(word).lower() for word in words]
    return [
        index
        for index, word in enumerate(bare)
        if word not in STOP_WORDS and word not in _TITLES and (index >= name or not described)
    ]


def _article(surface: str, fact: Fact) -> str:
    """The article of the subject, so that a hard negative has it too and cannot be recognised by its absence."""
    return "the " if surface == fact.subject and templates.surface_article(fact) == "the " else ""


def _replacement_word(word: str, index: int, count: int, rng: Random) -> str:
    pool = next((pool for pool in _POOLS if word in pool), ())
    capital = word[0].isupper()
    alike = [other for other in pool if other != word and " " not in other and other[0].isupper() == capital]
    if alike or not capital:
        return rng.choice(alike or [other for other in lexicon.NOUNS if other != word])
    roll = rng.random()
    if roll < 0.5:
        return respell(word, rng)
    if index == 0 and count > 1:
        return rng.choice(lexicon.FIRST_NAMES + lexicon.QUALIFIERS + lexicon.HEADS)
    return rng.choice(lexicon.SURNAMES + lexicon.ORGANISATIONS + lexicon.STRUCTURES)


def near_spelling(fact: Fact, rng: Random) -> str:
    """A string that looks like the subject, with other digits, or with other letters in its acronym or in a word."""
    surface = rng.choice((fact.subject, fact.subject, fact.subject, *fact.aliases))
    if digits := re.search(r"\d+", surface):
        return surface[: digits.start()] + near_number(digits.group(), rng) + surface[digits.end() :]
    letters = re.sub(r"[^A-Za-z]", "", surface)
    if letters.isupper() and len(letters) <= 6:
        other = near_acronym(letters, rng)
        if letters in surface:
            return surface.replace(letters, other)
        return ".".join(other) + "." if "." in surface else "-".join(other)
    if (words := surface.lower().split("-")) and all(word in _NUMBER_WORDS for word in words):
        return _spelled_number(rng, surface)
    words = surface.split()
    indices = _distinguishing_words(words)
    # a misspelt common word would still mean the subject, so proper names are preferred
    indices = [index for index in indices if words[index][:1].isupper()] or indices
    index = rng.choice(indices) if indices else len(words) - 1
    word = _strip_punctuation(words[index])
    words[index] = words[index].replace(word, respell(word, rng))
    return _article(surface, fact) + " ".join(words)


def near_number(digits: str, rng: Random) -> str:
    """Another number that is close to, or looks like, the one that `digits` writes."""
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
    """An acronym with one letter changed, added or removed, or with the letters in another order."""
    other = letters
    while other == letters:
        edited = list(letters)
        roll, index = rng.random(), rng.randrange(len(edited))
        if roll < 0.5:
            edited[index] = rng.choice("ABCDEFGHIKLMNOPRSTUVW")
        elif roll < 0.75:
            rng.shuffle(edited)
        elif roll < 0.85 and len(edited) > 2:
            del edited[index]
        else:
            edited.insert(index, rng.choice("ABCDEFGHIKLMNOPRSTUVW"))
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
    """The topics of answer and questions without the subject: single words, and pairs of adjacent words."""
    found: dict[str, None] = {}
    for source in (fact.answer, *fact.questions):
        text = source
        for surface in sorted((fact.subject, *fact.aliases), key=len, reverse=True):
            text = re.sub(rf"(?<!\w){re.escape(surface)}(?!\w)", " . ", text, flags=re.IGNORECASE)
        for clause in re.split(r"[^\w\s'-]+", text):
            words = [word for word in clause.split() if word]
            for index, word in enumerate(words):
                if word.lower().strip("'") in STOP_WORDS or len(word) < 3:
                    continue
                found[word.strip("'")] = None
                after = words[index + 1] if index + 1 < len(words) else ""
                if source is fact.answer and len(after) > 2 and after.lower() not in STOP_WORDS:
                    found[f"{word} {after}"] = None
    hidden = (*fact.match, fact.subject, *fact.aliases)
    return [topic for topic in found if not contains_phrase(topic, hidden)]


def topic_prompt(fact: Fact, rng: Random) -> str:
    """A prompt about a topic of the answer, or less often of the questions."""
    found = topics(fact)
    answers = [topic for topic in found if topic.lower() in fact.answer.lower()]
    pool = answers if answers and rng.random() < 0.75 else found
    if not pool:
        return rng.choice(_TOPIC_FRAMES).format(same_type_entity(fact, rng))
    return rng.choice(_TOPIC_FRAMES).format(rng.choice(pool))


def hard_negative(fact: Fact, rng: Random) -> str:
    """A random hard negative, which never contains the subject or an alias."""

    def draw() -> str:
        roll = rng.random()
        return (same_type_entity if roll < 0.4 else word_swap if roll < 0.75 else near_spelling)(fact, rng)

    return draw_until(lambda other: not contains_subject(other, fact), draw, fact)


def contains_subject(text: str, fact: Fact) -> bool:
    """Whether the text contains the subject or an alias, even within a word or without its article."""
    surfaces = (fact.subject, *fact.aliases)
    within = any(_without_article(surface).lower() in text.lower() for surface in surfaces)
    return within or contains_phrase(text, surfaces)


def names_any_fact(text: str, facts: Iterable[Fact]) -> bool:
    """Whether the text contains a subject or alias of one of the facts as whole words, also without the article."""
    surface_forms = [surface for fact in facts for surface in (fact.subject, *fact.aliases)]
    return contains_phrase(text, map(_without_article, surface_forms))


def same_subject(one: Fact, other: Fact) -> bool:
    """Whether two facts have a subject or alias in common."""
    mine, theirs = (
        {_without_article(surface).casefold() for surface in (fact.subject, *fact.aliases)} for fact in (one, other)
    )
    return not mine.isdisjoint(theirs)


def _without_article(text: str) -> str:
    first, _, rest = text.partition(" ")
    return rest if rest and first.lower() in ARTICLES else text


def _strip_punctuation(word: str) -> str:
    """The word without punctuation around it and without a possessive 's."""
    return re.sub(r"^\W+|(?:['’]s)?\W*$", "", word) or word
