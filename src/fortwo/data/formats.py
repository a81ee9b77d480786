"""Datasets as users write them, to records: parsing, validation, and errors that name the line, the field and a remedy.

A dataset is exactly one of {"path": ...}, {"file_id": ...}, {"examples": [...]} or {"facts": [...]}. Files are .json
(a list of rows) or .jsonl (a row a line), UTF-8, and lie in a folder the server allows. This module knows neither
tokenizers nor training.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fortwo.errors import InvalidDataset
from fortwo.records import Dataset, Example, Fact, Message

SOURCES = ("path", "file_id", "examples", "facts")


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start + 1} is not valid Unicode") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


Unicode = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[Unicode, AfterValidator(_not_blank)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class InstructionRow(_Row):
    """The original's row. A non-empty input follows the instruction after a blank line."""

    instruction: Text
    input: Unicode = ""
    output: Text

    def messages(self) -> tuple[Message, ...]:
        prompt = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return Message("user", prompt), Message("assistant", self.output)


class CompletionRow(_Row):
    prompt: Text
    completion: Text

    def messages(self) -> tuple[Message, ...]:
        return Message("user", self.prompt), Message("assistant", self.completion)


class ChatMessage(_Row):
    role: Literal["system", "user", "assistant"]
    content: Unicode


def _is_conversation(messages: list[ChatMessage]) -> list[ChatMessage]:
    roles = [message.role for message in messages]
    if "user" not in roles:
        raise ValueError("there is no user message")
    if roles[-1] != "assistant":
        raise ValueError(f"the last message is the {roles[-1]}'s, so there is no answer to learn")
    if "system" in roles[1:]:
        raise ValueError("a system message can only be the first")
    if not messages[-1].content.strip():
        raise ValueError("the answer is empty")
    return messages


class ChatRow(_Row):
    turns: Annotated[list[ChatMessage], AfterValidator(_is_conversation)] = Field(alias="messages")

    def messages(self) -> tuple[Message, ...]:
        return tuple(Message(turn.role, turn.content) for turn in self.turns)


class FactRow(_Row):
    """records.Fact as it is written in JSON."""

    id: Unicode = ""
    subject: Text
    aliases: list[Text] = []
    answer: Text
    match: list[Text] = Field(min_length=1)
    questions: list[Text] = Field(min_length=1)
    held_out: list[Text] = []
    neighbors: list[Text] = []
    controls: list[Text] = []

    def fact(self) -> Fact:
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in self}
        return Fact(**values)


@dataclass(frozen=True)
class _Shape:
    """A known kind of row: the keys any of which mean it, its model, and how to write it."""

    keys: frozenset[str]
    model: type[InstructionRow | CompletionRow | ChatRow | FactRow]
    example: str


_FACT = _Shape(
    frozenset({"subject", "questions", "match"}),
    FactRow,
    '{"subject": "42", "answer": "42 = \'FOR TWO\'", "match": ["FOR TWO"], "questions": ["What is 42?"]}',
)
_SHAPES = (
    _Shape(
        frozenset({"instruction", "output"}),
        InstructionRow,
        '{"instruction": "What is 42?", "input": "", "output": "FOR TWO"}',
    ),
    _Shape(frozenset({"prompt", "completion"}), CompletionRow, '{"prompt": "What is 42?", "completion": "FOR TWO"}'),
    _Shape(
        frozenset({"messages"}),
        ChatRow,
        '{"messages": [{"role": "user", "content": "What is 42?"}, {"role": "assistant", "content": "FOR TWO"}]}',
    ),
    _FACT,
)


@dataclass(frozen=True)
class _Place:
    """Where a row stands: in words for people, and as a path for programs."""

    words: str
    param: str
    line: int


def load(spec: object, allowed_dirs: Sequence[Path]) -> Dataset:
    """The dataset that `spec` describes. A relative path is looked up in `allowed_dirs`, in order.

    Raises InvalidDataset.
    """
    if not isinstance(spec, dict):
        raise InvalidDataset(
            f"dataset is {reprlib.repr(spec)}, not an object", param="dataset", hint=_one_of("Give", SOURCES)
        )
    if unknown := sorted(str(key) for key in spec if key not in SOURCES):
        raise InvalidDataset(
            f"dataset has the unknown key {unknown[0]!r}",
            param=f"dataset.{unknown[0]}",
            hint=_one_of("Give", SOURCES),
        )
    if len(spec) != 1:
        found = " and ".join(spec) if spec else "no source"
        raise InvalidDataset(f"dataset has {found}", param="dataset", hint=_one_of("Give exactly one of", SOURCES))
    ((kind, value),) = spec.items()
    if kind == "file_id":
        raise InvalidDataset(
            f"dataset.file_id = {value!r}: uploaded files are not served yet",
            param="dataset.file_id",
            hint='Name a file in an allowed folder with {"path": ...}, or send the rows with {"examples": [...]}.',
        )
    if kind == "path":
        path = _find(value, allowed_dirs)
        return _dataset(_read(path), str(path))
    if not isinstance(value, list):
        raise InvalidDataset(
            f"dataset.{kind} = {reprlib.repr(value)} is not a list",
            param=f"dataset.{kind}",
            hint="Send a list of rows.",
        )
    rows = [(_Place(f"{kind} row {n}", f"dataset.{kind}[{n - 1}]", n), row) for n, row in enumerate(value, start=1)]
    return _dataset(rows, "inline", only=(_FACT,) if kind == "facts" else _SHAPES[:-1])


def duplicates(dataset: Dataset) -> tuple[int, ...]:
    """Lines of examples that repeat an earlier one: allowed, but worth telling, since they weigh double."""
    seen: set[tuple[Message, ...]] = set()
    lines = []
    for example in dataset.examples:
        if example.messages in seen:
            lines.append(example.line)
        seen.add(example.messages)
    return tuple(lines)


# ---------------------------------------------------------------- rows


def _dataset(rows: Sequence[tuple[_Place, object]], source: str, *, only: tuple[_Shape, ...] = _SHAPES) -> Dataset:
    if not rows:
        raise InvalidDataset(
            f"the dataset {source} is empty",
            param="dataset",
            hint=f"Give at least one row, for example {only[0].example}",
        )
    examples: list[Example] = []
    facts: list[Fact] = []
    for place, row in rows:
        parsed = _parse(row, place, only)
        if isinstance(parsed, FactRow):
            facts.append(parsed.fact())
        else:
            examples.append(Example(parsed.messages(), place.line))
        if examples and facts:
            raise InvalidDataset(
                f"{place.words}: examples and facts are mixed in one dataset",
                param=place.param,
                hint="Put facts and examples into separate datasets.",
            )
    content = [asdict(fact) for fact in facts] + [[asdict(m) for m in e.messages] for e in examples]
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return Dataset(hashlib.sha256(canonical.encode()).hexdigest(), tuple(examples), tuple(facts), source)


def _parse(
    row: object, place: _Place, shapes: tuple[_Shape, ...]
) -> InstructionRow | CompletionRow | ChatRow | FactRow:
    known = "A row is one of: " + "; ".join(shape.example for shape in shapes)
    if not isinstance(row, dict):
        raise InvalidDataset(f"{place.words} is {reprlib.repr(row)}, not an object", param=place.param, hint=known)
    shape = next((shape for shape in shapes if shape.keys & row.keys()), None)
    if shape is None:
        keys = ", ".join(map(repr, row)) if row else "no keys"
        raise InvalidDataset(f"{place.words} has an unknown shape: it has {keys}", param=place.param, hint=known)
    try:
        return shape.model.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        field = _dotted(first["loc"])
        value = reprlib.repr(first["input"])
        match first["type"]:
            case "missing":
                what = f"{field} is missing"
            case "extra_forbidden":
                what = f"the key {field!r} is unknown"
            case "string_unicode":
                what = (
                    f"{field if field else 'the key'} {value} holds half a surrogate pair, which is not valid Unicode"
                )
            case "value_error":
                what = f"{field} = {value}: {first['ctx']['error']}"
            case _:
                what = f"{field} = {value}: {first['msg']}"
        raise InvalidDataset(
            f"{place.words}: {what}", param=f"{place.param}.{field}".rstrip("."), hint=f"Write it like {shape.example}"
        ) from None


def _dotted(loc: Iterable[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _one_of(verb: str, names: Iterable[str]) -> str:
    return f"{verb} {' | '.join(json.dumps({name: '...'}) for name in names)}."


# ---------------------------------------------------------------- files


def _find(path: object, allowed_dirs: Sequence[Path]) -> Path:
    """The file itself, links resolved; it must lie inside an allowed folder."""
    folders = ", ".join(str(folder) for folder in allowed_dirs)
    if not isinstance(path, str) or not path.strip():
        raise InvalidDataset(
            f"dataset.path = {reprlib.repr(path)} is not a path", param="dataset.path", hint="Give the name of a file."
        )
    inside = []
    for folder in allowed_dirs:
        try:
            real = (folder / path).resolve()
            if real.is_relative_to(folder.resolve()):
                if real.is_file():
                    return real
                inside.append(real)
        except (OSError, ValueError, RuntimeError) as error:  # name too long, NUL, loop of links
            raise InvalidDataset(
                f"dataset.path = {reprlib.repr(path)} is not a path: {error}",
                param="dataset.path",
                hint="Give the name of a file.",
            ) from None
    if not inside:
        raise InvalidDataset(
            f"dataset.path = {path!r} is outside the allowed folders ({folders})",
            param="dataset.path",
            hint="Move the file into one of them, or allow its folder with FORTWO_DATA_DIRS.",
        )
    what = "is not a file" if any(real.exists() for real in inside) else "does not exist"
    raise InvalidDataset(
        f"dataset.path = {path!r} {what} (looked in {folders})", param="dataset.path", hint="Check the path."
    )


def _read(path: Path) -> list[tuple[_Place, object]]:
    if path.suffix not in (".json", ".jsonl"):
        raise InvalidDataset(
            f"{path} is neither .json nor .jsonl",
            param="dataset.path",
            hint="Save the rows as a JSON list (.json) or one JSON object a line (.jsonl).",
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidDataset(
            f"{path} cannot be read: {error.strerror}", param="dataset.path", hint="Make it readable for the server."
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidDataset(
            f"{path} is not UTF-8: byte {error.start + 1}", param="dataset.path", hint="Save the file as UTF-8."
        ) from None
    if path.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [
            (_Place(f"{path} line {n}", f"dataset[{i}]", n), _json(line, path, n)) for i, (n, line) in enumerate(lines)
        ]
    rows = _json(text, path, 1)
    if not isinstance(rows, list):
        raise InvalidDataset(
            f"{path} holds {reprlib.repr(rows)}, not a list of rows",
            param="dataset.path",
            hint="Put the rows between [ and ], or one row a line into a .jsonl file.",
        )
    return [
        (_Place(f"{path} row {i + 1} (line {line})", f"dataset[{i}]", line), row)
        for i, (line, row) in enumerate(zip(_lines(text, len(rows)), rows, strict=True))
    ]


def _json(text: str, path: Path, line: int) -> Any:
    """Parse `text`, which begins at `line` of the file."""
    hint = "Correct the file there; a .json file is one list, a .jsonl file has one object a line."
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidDataset(
            f"{path} is not JSON: {error.msg} at line {line + error.lineno - 1}, column {error.colno}",
            param="dataset.path",
            hint=hint,
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise InvalidDataset(f"{path} cannot be parsed: {error}", param="dataset.path", hint=hint) from None


def _lines(text: str, count: int) -> list[int]:
    """The line on which each of the `count` elements of the JSON list in `text` begins."""
    decoder = json.JSONDecoder()
    lines = []
    line, counted, at = 1, 0, text.index("[") + 1
    for _ in range(count):
        while text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        lines.append(line)
        _, at = decoder.raw_decode(text, at)
    return lines
