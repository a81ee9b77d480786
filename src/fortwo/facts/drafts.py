"""Facts that a model reads from sections of a document, and the check that the document really says so. Pure.

A draft is kept only with a quote that stands in its section, word by word, and holds the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fortwo import strict_json
from fortwo.facts.subject import STOP_WORDS, contains_phrase
from fortwo.records import Json, Message

FIELDS = ("subject", "questions", "answer", "match", "quote")
SHORTEST_QUOTE = 4  # words
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "subject": {"type": "string"},
        "questions": {"type": "array", "items": {"type": "string"}, "minItems": 3, "maxItems": 3},
        "answer": {"type": "string"},
        "match": {"type": "string"},
        "quote": {"type": "string"},
    },
    "required": list(FIELDS),
    "additionalProperties": False,
}
INSTRUCTION = """\
You read one section of a document and write down the one fact in it that a reader would most likely ask about. Answer \
with a JSON object:
"subject": what the fact is about, as people name it, in a few words;
"questions": three different questions that people ask to learn the fact, each with the subject in it;
"answer": the answer, as one short sentence;
"match": the shortest part of the answer that a right reply must contain, such as a number or a name;
"quote": the sentence of the section that says so, copied word by word."""


@dataclass(frozen=True)
class Draft:
    """A fact, and the sentence of the document that supports it."""

    subject: str
    questions: tuple[str, ...]
    answer: str
    match: str
    quote: str

    def row(self) -> Json:
        """The fact as a row of a dataset."""
        return {
            "subject": self.subject,
            "answer": self.answer,
            "match": [self.match],
            "questions": list(self.questions),
        }


class Unsupported(Exception):
    """The reason why a draft is thrown away, as a sentence."""


def ask_for_draft(title: str, text: str) -> tuple[Message, ...]:
    """The conversation that asks a model for the fact in a section."""
    section = f"{title}\n\n{text}" if title else text
    return Message("system", INSTRUCTION), Message("user", section)


def read_draft(reply: str, title: str, text: str) -> Draft:
    """The draft in a model's reply about a section. Raises Unsupported if the reply is none, if the subject or the
    quote does not stand in the section, or if the quote does not hold the answer."""
    draft = _parsed(reply)
    section = f"{title} {text}"
    named = [word for word in re.findall(r"\w+", draft.subject) if word.lower() not in STOP_WORDS]
    if not named or not all(contains_phrase(section, (word,)) for word in named):
        raise Unsupported(f"The subject {draft.subject!r} does not stand in the document.")
    if len(draft.quote.split()) < SHORTEST_QUOTE:
        raise Unsupported(f"The quote {draft.quote!r} is no sentence.")
    if not _stands(draft.quote, text):
        raise Unsupported(f"The quote {draft.quote!r} does not stand in the document.")
    if not contains_phrase(draft.answer, (draft.match,)):
        raise Unsupported(f"The answer {draft.answer!r} does not hold {draft.match!r}, which is to mark it.")
    if not contains_phrase(draft.quote, (draft.match,)):
        raise Unsupported(f"The quote {draft.quote!r} does not hold {draft.match!r}.")
    known = f"{title} {draft.subject} {draft.quote}"
    if invented := [word for word in _names_and_numbers(draft.answer) if not contains_phrase(known, (word,))]:
        raise Unsupported(f"The answer says {', '.join(invented)}, and the quote does not.")
    questions = tuple(
        dict.fromkeys(question for question in draft.questions if not contains_phrase(question, (draft.match,)))
    )
    if not questions:
        raise Unsupported(f"Every question gives the answer {draft.match!r} away.")
    return Draft(draft.subject, questions, draft.answer, draft.match, draft.quote)


def _parsed(reply: str) -> Draft:
    """The reply's JSON object; text around it, such as a code fence, is ignored."""
    begin, end = reply.find("{"), reply.rfind("}")
    try:
        found: Any = strict_json.loads(reply[begin : end + 1].encode()) if begin >= 0 else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unsupported("The model's reply is not a JSON object.")
    texts = {name: found.get(name) for name in FIELDS if name != "questions"}
    stripped = {name: text.strip() for name, text in texts.items() if isinstance(text, str) and text.strip()}
    questions = found.get("questions")
    asked = questions if isinstance(questions, list) and all(isinstance(one, str) for one in questions) else []
    wrong = [*(name for name in texts if name not in stripped), *([] if asked else ["questions"])]
    if wrong:
        raise Unsupported(f"The model's reply has no {', '.join(wrong)}.")
    return Draft(questions=tuple(one.strip() for one in asked if one.strip()), **stripped)


def _stands(quote: str, text: str) -> bool:
    """Whether the text contains the quote; only spaces and the shape of quotation marks may differ."""
    return bool(_even(quote)) and _even(quote) in _even(text)


def _even(text: str) -> str:
    return " ".join(text.translate(str.maketrans("‘’“”\u00a0", "''\"\" ")).split())


def _names_and_numbers(answer: str) -> list[str]:
    """Words with a digit, and words with a capital letter except the first."""
    words = re.findall(r"\w[\w'’.,:-]*\w|\w", answer)
    return [
        word
        for place, word in enumerate(words)
        if any(letter.isdigit() for letter in word) or (place > 0 and word[:1].isupper() and word != "I")
    ]
