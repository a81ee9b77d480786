"""Finds the subject of plain examples, and whether a reply contains a fact. Pure text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby

from fortwo.records import LONGEST_NAME, Dataset, Example, Fact

ARTICLES = frozenset({"the", "a", "an"})
STOP_WORDS = ARTICLES | frozenset(
    """
    of in on at to for from by with about into over and or but if is are was were be been does do did has have had can
    could should would will shall may might must what which who whom whose when where why how that this these those it
    its they them their he she his her i me my you your we us our not no so as than then there here tell give explain
    describe name say one any some all just only even more most please what's who's it's between without within after
    before behind up out off us am per
    """.split()
)

_WORD = r"\w(?:[\w'’.@-]|(?<=\d)[,:/](?=\d))*"
_CLAUSE_END = r"[.,;:!?)]+(?=\s|$)|[(=—–\n]"


def contains_phrase(reply: str, match: Iterable[str]) -> bool:
    """Whether the reply contains one of the phrases, as whole words in any case; a plural in -s or -es counts too."""
    return first_match(reply, match) is not None


def first_match(reply: str, match: Iterable[str]) -> int | None:
    """The index of the first of these phrases in the reply, or None."""
    phrases = tuple(match)
    found = _any_of(phrases).search(reply) if phrases else None
    return None if found is None else found.start()


@lru_cache(maxsize=256)
def _any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Hundreds of facts are looked for in each prompt, so that their phrases are one pattern."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, phrases))})(?:s|es)?(?!\w)", re.IGNORECASE)


def find_subject(examples: Collection[Example]) -> Fact | None:
    """The fact that plain examples teach, or None. The examples must have the same answer. The subject is the longest
    run of words that the answer and nine tenths of the questions contain, without stop words at its ends. Conversations
    with tools teach none."""
    if any(example.uses_tools for example in examples):
        return None
    answers = (example.answer.strip() for example in examples)
    answer = next(answers, None)
    if answer is None or len(examples) < 2 or any(other != answer for other in answers):
        return None
    questions = tuple(dict.fromkeys(example.prompt.strip() for example in examples))
    subject = _shared_run(questions, answer)
    if subject is None:
        return None
    match = match_phrases(answer, questions)
    if any(len(name) > LONGEST_NAME for name in (subject, *match)):
        return None
    return Fact(subject=subject, answer=answer, match=match, questions=questions, id="examples")


def facts_of(dataset: Dataset) -> tuple[Fact, ...]:
    """The facts of a dataset, or the one that its examples teach; () if they teach none."""
    if dataset.facts:
        return dataset.facts
    found = find_subject(dataset.examples)
    return () if found is None else (found,)


def _words(text: str) -> list[str]:
    return re.findall(_WORD, text)


def _clean(word: str) -> str:
    return re.sub(r"['’](?:s|m|re|ve|ll|d)$", "", word).rstrip(".'’-@")


def _stem(word: str) -> str:
    """A rough stem of a word, such as "open" for "opens" and "opened". It is used only for comparison."""
    return re.sub(r"(?<=\w{3})(?:es|ed|ing|s|e|d)$", "", _clean(word).lower())


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
    """The phrases that a reply must contain to give the answer. This is the answer's quoted phrase. Without one it is,
    in the first clause about what was asked, the longest name or number that the questions do not contain, or else the
    longest run of such words."""
    quoted = re.findall(r"(?<!\w)['\"‘“«]\s?([^'\"’”»]{2,60}?)\s?['\"’”»](?!\w)", answer)
    for phrase in quoted:
        if not any(contains_phrase(question, (phrase,)) for question in questions):
            return (str(phrase),)
    asked = {
        _stem(word) for question in questions for word in _words(question) if _clean(word).lower() not in STOP_WORDS
    }
    clauses = re.split(_CLAUSE_END, answer)
    about = next((n for n, clause in enumerate(clauses) if asked & {*map(_stem, _words(clause))}), 0)
    for clause in clauses[about:] + clauses[:about]:
        if runs := _new_runs(clause, asked):
            marked = [found for run in runs for found in _names_and_numbers(run, clause)]
            return (max((" ".join(run) for run in (marked if marked else [run[:3] for run in runs])), key=len),)
    return (answer,)


def _new_runs(clause: str, asked: Collection[str]) -> list[list[str]]:
    """Runs of words that are neither stop words nor in `asked`, without a verb directly after a word in `asked`. A word
    in `asked` still belongs to a run if it follows a number, or if it is the last word of a name."""
    runs: list[list[str]] = [[]]
    end, in_question = 0, False
    for found in re.finditer(_WORD, clause):
        word = _clean(found.group())
        if clause[end : found.start()] != " ":
            runs.append([])
            in_question = False
        last = runs[-1][-1] if runs[-1] else ""
        verb = in_question and word.islower() and word.endswith(("s", "ed"))
        in_question = _stem(word) in asked and not verb
        continues = _has_digit(last) or (last[:1].isupper() and word[0].isupper())
        if word.lower() in STOP_WORDS or verb or (in_question and not continues):
            runs.append([])
        else:
            runs[-1].append(word)
        end = found.start() + len(word)
    return [run for run in runs if run]


def _names_and_numbers(run: Sequence[str], clause: str) -> Iterator[list[str]]:
    """Capitalised words, and numbers with the word after them. A single capitalised word is not a name if it begins the
    clause or describes the word after it."""
    end = 0
    for marked, group in groupby(run, lambda word: word[0].isupper() or _has_digit(word)):
        words = list(group)
        end += len(words)
        if not marked:
            continue
        if _has_digit(words[-1]):
            yield words + list(run[end : end + 1])
        elif len(words) > 1 or (end == len(run) and not clause.lstrip().startswith(words[0])):
            yield words


def _has_digit(word: str) -> bool:
    return any(character.isdigit() for character in word)
