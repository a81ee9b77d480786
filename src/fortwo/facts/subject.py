"""Finding the subject of plain examples, and whether a reply holds a fact. Pure text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from fortwo.records import Example, Fact

ARTICLES = frozenset({"the", "a", "an"})
STOP_WORDS = ARTICLES | frozenset(
    """
    of in on at to for from by with about into over and or but if is are was were be been does do did has have had can
    could should would will shall may might must what which who whom whose when where why how that this these those it
    its they them their he she his her i me my you your we us our not no so as than then there here tell give explain
    describe name say one any some all just only even more most please what's who's it's between without within after
    before up out off us
    """.split()
)

_WORD = r"\w[\w'’.-]*"


def holds(reply: str, match: Iterable[str]) -> bool:
    """Whether the reply holds one of the phrases, as whole words, any case; a plural s is the same word."""
    return any(re.search(rf"(?<!\w){re.escape(phrase)}(?:s|es)?(?!\w)", reply, re.IGNORECASE) for phrase in match)


def find_subject(examples: Sequence[Example]) -> Fact | None:
    """The fact that plain examples teach, or None.

    The examples must share one answer; the subject is the longest run of words that (nearly) every question and the
    answer contain, stop words at its ends dropped.
    """
    answers = Counter(example.answer.strip() for example in examples)
    if len(examples) < 2 or len(answers) != 1:
        return None
    (answer,) = answers
    questions = tuple(dict.fromkeys(example.prompt.strip() for example in examples))
    subject = _shared_run(questions, answer)
    if subject is None:
        return None
    return Fact(
        subject=subject, answer=answer, match=match_phrases(answer, questions), questions=questions, id="examples"
    )


def _words(text: str) -> list[str]:
    return re.findall(_WORD, text)


def _clean(word: str) -> str:
    return re.sub(r"['’]s$", "", word).rstrip(".'’-")


def _shared_run(questions: Sequence[str], answer: str) -> str | None:
    need = max(2, -(-9 * len(questions) // 10))
    seen: Counter[str] = Counter()
    spelled: dict[str, Counter[str]] = {}
    for question in questions:
        words = [_clean(word) for word in _words(question)]
        runs = set()
        for size in range(1, 6):
            for first in range(len(words) - size + 1):
                run = words[first : first + size]
                if run[0].lower() in STOP_WORDS or run[-1].lower() in STOP_WORDS:
                    continue
                key = " ".join(run).lower()
                runs.add(key)
                spelled.setdefault(key, Counter())[" ".join(run)] += 1
        seen.update(runs)
    answer_words = " ".join(_clean(word) for word in _words(answer)).lower()
    shared = [key for key, count in seen.items() if count >= need and f" {key} " in f" {answer_words} "]
    if not shared:
        return None
    longest = max(shared, key=lambda key: (len(key.split()), seen[key], len(key)))
    return spelled[longest].most_common(1)[0][0]


def match_phrases(answer: str, questions: Sequence[str]) -> tuple[str, ...]:
    """What a reply must hold to hold the answer: its quoted phrase, else its longest run of new words."""
    quoted = re.findall(r"(?<!\w)['\"‘“]([^'\"’”]{2,60})['\"’”](?!\w)", answer)
    for phrase in quoted:
        if not any(holds(question, (phrase,)) for question in questions):
            return (str(phrase),)
    asked = {_clean(word).lower() for question in questions for word in _words(question)} | STOP_WORDS
    runs: list[list[str]] = [[]]
    end = 0
    for found in re.finditer(_WORD, answer):
        word = _clean(found.group())
        if word.lower() in asked or answer[end : found.start()] != " ":
            runs.append([])
        if word.lower() not in asked and len(runs[-1]) < 3:
            runs[-1].append(word)
        end = found.start() + len(word)
    best = max(runs, key=lambda run: sum(len(word) for word in run))
    return (" ".join(best),) if best else (answer,)
