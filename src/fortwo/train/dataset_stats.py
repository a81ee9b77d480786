"""Statistics of a dataset in one pass: tokens of each row, duplicates, contradictions, foreign templates, truncation.

Free of torch. It needs a few dozen bytes for a row of any length, because texts are compared by 64-bit hashes.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol, overload

import numpy as np

from fortwo.data.findings import Finding, Findings, RowLocation
from fortwo.errors import InvalidDataset
from fortwo.records import Example, Message
from fortwo.train.estimate import RowLength, TokenCounts

Column = np.ndarray[Any, Any]
LINES_SHOWN = 5  # lines that a warning names
TRUNCATED_CHARACTERS = 100  # answers count as truncated from this length on
TRUNCATED_ROWS = 3  # and if at least so many end at exactly the same length

# Control text that common chat templates write around messages. In the text of a row it is ordinary characters.
_TEMPLATES = re.compile(
    r"<\|im_(?:start|end)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|endoftext|system|user|assistant|end)\|>"
    r"|\A\s*<s>|</s>\s*\Z|^### (?:Instruction|Response|Human|Assistant):",
    re.MULTILINE,
)


@dataclass(frozen=True)
class AffectedLines:
    """The number of rows that a warning is about, and the lines of the first LINES_SHOWN of them."""

    count: int = 0
    first: tuple[int, ...] = ()

    def __str__(self) -> str:
        named = ", ".join(map(str, self.first))
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"line{'' if self.count == 1 else 's'} {named}{more}"

    @classmethod
    def from_lines(cls, lines: Iterable[int]) -> AffectedLines:
        lines = sorted(lines)
        return cls(len(lines), tuple(lines[:LINES_SHOWN]))


@dataclass(frozen=True)
class DatasetWarnings:
    """Rows that probably contain mistakes. duplicates: rows with the same text as an earlier row. contradictions: rows
    with the prompt of an earlier row and another answer; of preferences, with its answers and another choice.
    foreign_templates: rows that contain the control text of a chat template; template: the first such text. truncated:
    rows whose answers end within a word, at the same length as several others."""

    duplicates: AffectedLines = AffectedLines()
    contradictions: AffectedLines = AffectedLines()
    foreign_templates: AffectedLines = AffectedLines()
    template: str = ""
    truncated: AffectedLines = AffectedLines()


@dataclass(frozen=True)
class ValidationStats:
    """Of the rows of a validation_dataset. trained: those that are also rows of the dataset."""

    counts: TokenCounts
    warnings: DatasetWarnings = DatasetWarnings()
    trained: AffectedLines = AffectedLines()


class RowLengths(Sequence[RowLength]):
    """A sequence of `RowLength` that needs sixteen bytes for each row."""

    def __init__(self, rows: Iterable[RowLength] = ()) -> None:
        self._lines, self._prompts, self._answers = array("Q"), array("I"), array("I")
        for row in rows:
            self.append(row)

    def append(self, row: RowLength) -> None:
        self._lines.append(row.line)
        self._prompts.append(row.prompt)
        self._answers.append(row.answer)

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> RowLength: ...
    @overload
    def __getitem__(self, index: slice) -> RowLengths: ...
    def __getitem__(self, index: int | slice) -> RowLength | RowLengths:
        if isinstance(index, slice):
            return RowLengths(self[one] for one in range(*index.indices(len(self))))
        return RowLength(self._lines[index], self._prompts[index], self._answers[index])

    def __iter__(self) -> Iterator[RowLength]:
        return map(RowLength, self._lines, self._prompts, self._answers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(RowLength.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


class Rendering(Protocol):
    """What `collect_stats` needs of data.chat_template.ChatTemplateRenderer."""

    @property
    def shared_prefix(self) -> list[int]: ...
    def dataset_rows(self, example: Example, /) -> list[tuple[list[int], list[bool]]]: ...


def collect_stats(renderer: Rendering, examples: Iterable[Example]) -> tuple[TokenCounts, DatasetWarnings]:
    """The token counts of the rows as they will be trained on, and warnings about them. Raises InvalidDataset with the
    lines of all conversations that the model's chat template refuses."""
    rows, texts = RowLengths(), _TextChecks()
    prefix = renderer.shared_prefix
    findings, count = Findings(), 0
    for example in examples:
        count += 1
        texts.add(example)
        try:
            rendered = renderer.dataset_rows(example)
        except InvalidDataset as error:
            findings.add(*_finding(example, error))
            continue
        for tokens, supervised in rendered:
            answer = sum(supervised)
            rows.append(RowLength(example.line, len(tokens) - answer, answer))
            limit = min(len(prefix), len(tokens) - 1)
            prefix = prefix[: next((n for n in range(limit) if prefix[n] != tokens[n]), limit)]
    if findings:
        raise findings.error(count)
    return TokenCounts(rows, len(prefix)), texts.warnings()


def shared_rows(validation: Iterable[Example], trained: Iterable[Example]) -> AffectedLines:
    """The validation rows whose text is also that of a row that is trained on."""
    lines, wholes = array("Q"), array("Q")
    for example in validation:
        lines.append(example.line)
        wholes.append(_whole(example))
    known = np.fromiter(map(_whole, trained), np.uint64)
    return _lines(np.frombuffer(lines, np.uint64), np.flatnonzero(np.isin(np.frombuffer(wholes, np.uint64), known)))


def _finding(example: Example, error: InvalidDataset) -> tuple[RowLocation, list[Finding]]:
    what = error.message.removeprefix(f"line {example.line}: ")
    location = RowLocation(f"line {example.line}", "dataset", example.line)
    return location, [Finding(what, "", what, error.hint or "Change the row, or leave it out.")]


class _TextChecks:
    """Collects the hashes and lengths of the examples' texts that the warnings need."""

    def __init__(self) -> None:
        self._lines = array("Q")
        self._wholes, self._prompts, self._answers = array("Q"), array("Q"), array("Q")
        self._lengths = array("I")  # characters of an answer that ends within a word, else 0
        self._longest = 0
        self._templates: list[int] = []
        self._templates_count = 0
        self._template = ""

    def add(self, example: Example) -> None:
        messages, rejected, label = _parts(example)
        answer, whole = example.answer.strip(), _whole(example)
        self._lines.append(example.line)
        self._wholes.append(whole)
        if rejected:  # which of two answers is chosen answers the question that the two are
            self._prompts.append(_hash(sorted([_hash(messages), _hash(rejected)])))
            self._answers.append(_hash(messages))
        elif label:
            self._prompts.append(_hash(messages))
            self._answers.append(_hash(label))
        else:
            self._prompts.append(_hash(messages[: len(example.prompt_messages)]) if example.text is None else whole)
            self._answers.append(_hash([answer]))
        self._lengths.append(len(answer) if answer[-1:].isalnum() else 0)
        self._longest = max(self._longest, len(answer))
        said = (*example.messages, *example.rejected)
        texts = (example.text,) if example.text is not None else (message.content for message in said)
        found = next((match for text in texts if (match := _TEMPLATES.search(text))), None)
        if found is not None:
            self._templates_count += 1
            self._template = self._template if self._templates else found[0].strip()
            if len(self._templates) < LINES_SHOWN:
                self._templates.append(example.line)

    def warnings(self) -> DatasetWarnings:
        lines, wholes, prompts, answers = (
            np.frombuffer(column, np.uint64) for column in (self._lines, self._wholes, self._prompts, self._answers)
        )
        return DatasetWarnings(
            duplicates=_lines(lines, _repeated(wholes)),
            contradictions=_lines(lines, _contradicting(prompts, answers)),
            foreign_templates=AffectedLines(self._templates_count, tuple(self._templates)),
            template=self._template,
            truncated=self._truncated(lines, answers),
        )

    def _truncated(self, lines: Column, answers: Column) -> AffectedLines:
        if self._longest < TRUNCATED_CHARACTERS:
            return AffectedLines()
        cut = np.flatnonzero(np.frombuffer(self._lengths, np.uint32) == self._longest)
        return _lines(lines, cut) if len(np.unique(answers[cut])) >= TRUNCATED_ROWS else AffectedLines()


def _whole(example: Example) -> int:
    """The hash of all texts of an example."""
    return _hash([text for part in _parts(example) for text in part] if example.text is None else [example.text])


def _parts(example: Example) -> tuple[list[str], list[str], list[str]]:
    """The texts of the messages, of those of the rejected answer, and of the label."""
    label = [] if example.label is None else [str(example.label)]
    return _texts(example.messages), _texts(example.rejected), label


def _texts(messages: Sequence[Message]) -> list[str]:
    return [
        f"{message.role} {message.weight} {message.content}{message.name}{message.tool_calls}{message.tools}"
        for message in messages
    ]


def _hash(parts: Iterable[object]) -> int:
    whole = "\x1f".join(map(str, parts)).encode(errors="surrogatepass")
    return int.from_bytes(blake2b(whole, digest_size=8).digest(), "little")


def _repeated(hashes: Column) -> Column:
    """The indices of hashes that also occur at an earlier index."""
    order = np.argsort(hashes, kind="stable")
    again: Column = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    return again


def _contradicting(prompts: Column, answers: Column) -> Column:
    """The indices at which a prompt has another answer than where it first occurs."""
    order = np.argsort(prompts, kind="stable")
    begins = np.append(True, prompts[order[1:]] != prompts[order[:-1]])[: len(order)]
    first = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]  # the first index with the same prompt
    different: Column = order[answers[order] != answers[first]]
    return different


def _lines(lines: Column, indices: Column) -> AffectedLines:
    return AffectedLines.from_lines(int(line) for line in lines[indices])
