"""What the rows of a dataset are like, seen in one pass: tokens of each, repeats, contradictions, foreign templates.

Torch-free. Memory is a few dozen bytes a row, whatever the rows hold: texts are compared by hashes of 64 bits.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, overload

import numpy as np

from fortwo.records import Example
from fortwo.train.estimate import RowCount, TokenCounts

Column = np.ndarray[Any, Any]
SHOWN = 5  # lines that a finding names
CUT_CHARACTERS = 100  # an answer that was cut off is at least so long
CUT_ROWS = 3  # and so many end at exactly the same length

# What the chat templates in use write around messages. In a row's text it is characters, not control.
_TEMPLATES = re.compile(
    r"<\|im_(?:start|end)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|endoftext|system|user|assistant|end)\|>"
    r"|\A\s*<s>|</s>\s*\Z|^### (?:Instruction|Response|Human|Assistant):",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Lines:
    """How many rows something is true of, and the lines of the first ones."""

    count: int = 0
    first: tuple[int, ...] = ()

    def __str__(self) -> str:
        named = ", ".join(map(str, self.first))
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"line{'' if self.count == 1 else 's'} {named}{more}"

    @classmethod
    def of(cls, lines: Iterable[int]) -> Lines:
        lines = sorted(lines)
        return cls(len(lines), tuple(lines[:SHOWN]))


@dataclass(frozen=True)
class Suspicions:
    """Rows that are likely not what was meant.

    repeats: that say exactly what an earlier one says. contradictions: that answer the prompt of an earlier one
    otherwise. templates: whose text holds a chat template's control text, `template` the first of it. cut: whose
    answers end in mid-word at the very length where others end too.
    """

    repeats: Lines = Lines()
    contradictions: Lines = Lines()
    templates: Lines = Lines()
    template: str = ""
    cut: Lines = Lines()


class RowCounts(Sequence[RowCount]):
    """RowCounts of many rows in sixteen bytes each."""

    def __init__(self, rows: Iterable[RowCount] = ()) -> None:
        self._lines, self._prompts, self._answers = array("Q"), array("I"), array("I")
        for row in rows:
            self.append(row)

    def append(self, row: RowCount) -> None:
        self._lines.append(row.line)
        self._prompts.append(row.prompt)
        self._answers.append(row.answer)

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, place: int) -> RowCount: ...
    @overload
    def __getitem__(self, place: slice) -> RowCounts: ...
    def __getitem__(self, place: int | slice) -> RowCount | RowCounts:
        if isinstance(place, slice):
            return RowCounts(self[one] for one in range(*place.indices(len(self))))
        return RowCount(self._lines[place], self._prompts[place], self._answers[place])

    def __iter__(self) -> Iterator[RowCount]:
        return map(RowCount, self._lines, self._prompts, self._answers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(RowCount.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


class Rendering(Protocol):
    """A `data.render.Renderer`, as far as rows are counted."""

    def prefix(self) -> list[int]: ...
    def dataset_rows(self, example: Example, /) -> list[tuple[list[int], list[bool]]]: ...


def survey(renderer: Rendering, examples: Iterable[Example]) -> tuple[TokenCounts, Suspicions]:
    """Tokens as the rows will be trained on, and what looks wrong with them.

    Raises InvalidDataset naming the line of a conversation that the model's chat template refuses.
    """
    rows, texts = RowCounts(), _Texts()
    prefix = renderer.prefix()
    for example in examples:
        texts.add(example)
        for tokens, supervised in renderer.dataset_rows(example):
            answer = sum(supervised)
            rows.append(RowCount(example.line, len(tokens) - answer, answer))
            limit = min(len(prefix), len(tokens) - 1)
            prefix = prefix[: next((n for n in range(limit) if prefix[n] != tokens[n]), limit)]
    return TokenCounts(rows, len(prefix)), texts.suspicions()


class _Texts:
    """What must be remembered of each example's text."""

    def __init__(self) -> None:
        self._lines = array("Q")
        self._wholes, self._prompts, self._answers = array("Q"), array("Q"), array("Q")
        self._lengths = array("I")  # characters of an answer that ends in mid-word, else 0
        self._longest = 0
        self._templates: list[int] = []
        self._templates_count = 0
        self._template = ""

    def add(self, example: Example) -> None:
        said = [f"{message.role} {message.weight} {message.content}" for message in example.messages]
        answer = example.answer.strip()
        whole = _hash(said if example.text is None else [example.text])
        self._lines.append(example.line)
        self._wholes.append(whole)
        self._prompts.append(_hash(said[: len(example.asked)]) if example.text is None else whole)
        self._answers.append(_hash([answer]))
        self._lengths.append(len(answer) if answer[-1:].isalnum() else 0)
        self._longest = max(self._longest, len(answer))
        texts = (example.text,) if example.text is not None else (message.content for message in example.messages)
        found = next((match for text in texts if (match := _TEMPLATES.search(text))), None)
        if found is not None:
            self._templates_count += 1
            self._template = self._template if self._templates else found[0].strip()
            if len(self._templates) < SHOWN:
                self._templates.append(example.line)

    def suspicions(self) -> Suspicions:
        lines, wholes, prompts, answers = (
            np.frombuffer(column, np.uint64) for column in (self._lines, self._wholes, self._prompts, self._answers)
        )
        return Suspicions(
            repeats=_lines(lines, _later(wholes)),
            contradictions=_lines(lines, _contradicting(prompts, answers)),
            templates=Lines(self._templates_count, tuple(self._templates)),
            template=self._template,
            cut=self._cut(lines, answers),
        )

    def _cut(self, lines: Column, answers: Column) -> Lines:
        if self._longest < CUT_CHARACTERS:
            return Lines()
        cut = np.flatnonzero(np.frombuffer(self._lengths, np.uint32) == self._longest)
        return _lines(lines, cut) if len(np.unique(answers[cut])) >= CUT_ROWS else Lines()


def _hash(parts: Iterable[str]) -> int:
    whole = "\x1f".join(parts).encode(errors="surrogatepass")
    return int.from_bytes(blake2b(whole, digest_size=8).digest(), "little")


def _later(hashes: Column) -> Column:
    """Places of hashes that stand at an earlier place too."""
    order = np.argsort(hashes, kind="stable")
    again: Column = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    return again


def _contradicting(prompts: Column, answers: Column) -> Column:
    """Places whose prompt stands at an earlier place with another answer than there."""
    order = np.argsort(prompts, kind="stable")
    begins = np.append(True, prompts[order[1:]] != prompts[order[:-1]])[: len(order)]
    first = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]  # the first place with the same prompt
    otherwise: Column = order[answers[order] != answers[first]]
    return otherwise


def _lines(lines: Column, places: Column) -> Lines:
    return Lines.of(int(line) for line in lines[places])
