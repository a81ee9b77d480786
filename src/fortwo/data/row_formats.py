"""The row formats that datasets use (Alpaca, OpenAI, ShareGPT, ...), and how a row becomes an Example or a Fact.

The keys of a row show its format. A row of no known format, or one that breaks its format, is refused with an error
that names its location, the field, the value and a remedy. Files and tokens are not known here.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from fortwo.errors import InvalidDataset
from fortwo.records import Example, Fact, Message, OneHop

NO_TOOLS = (
    "fortwo does not call tools. Leave such rows out, or put the tool's result into a user message and what "
    "the assistant said about it into its answer."
)


@dataclass(frozen=True)
class RowLocation:
    """Where a row is: `description` is for people, `param` is the path in the request, `line` is 1-based."""

    description: str
    param: str
    line: int


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


def _no_tools(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("tools", "tools and functions cannot be learned")
    return value


def _no_tool(role: Any) -> Any:
    if role in ("tool", "function", "observation", "function_call", "tool_call"):
        raise PydanticCustomError("tools", "tool and function messages cannot be learned")
    return role


Unicode = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[Unicode, AfterValidator(_not_blank)]
NoTools = Annotated[Any, BeforeValidator(_no_tools)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class InstructionRow(_Row):
    """Alpaca's row. An input that is not empty follows the instruction after a blank line."""

    instruction: Text
    input: Unicode = ""
    output: Text

    def example(self, line: int) -> Example:
        prompt = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return Example((Message("user", prompt), Message("assistant", self.output)), line)


class CompletionRow(_Row):
    prompt: Text
    completion: Text

    def example(self, line: int) -> Example:
        return Example((Message("user", self.prompt), Message("assistant", self.completion)), line)


class TextRow(_Row):
    text: Text

    def example(self, line: int) -> Example:
        return Example((), line, self.text)


class ChatMessage(_Row):
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_no_tool)]
    tool_calls: NoTools = None
    function_call: NoTools = None
    content: Unicode
    weight: Literal[0, 1] | None = None

    def message(self) -> Message:
        return Message(self.role, self.content, 0 if self.weight == 0 else 1)


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


def _speaker(name: Any) -> Any:
    _no_tool(name)
    if not isinstance(name, str) or name not in _SPEAKERS:
        raise ValueError(f"the speaker must be one of {', '.join(map(repr, _SPEAKERS))}")
    return _SPEAKERS[name]


class ShareTurn(ChatMessage):
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_speaker)] = Field(alias="from")
    content: Unicode = Field(alias="value")


AnyMessage = TypeVar("AnyMessage", bound=ChatMessage)


def _is_conversation(turns: list[AnyMessage]) -> list[AnyMessage]:
    messages = [turn.message() for turn in turns]
    roles = [message.role for message in messages]
    if "user" not in roles:
        raise ValueError("there is no user message")
    if roles[-1] != "assistant":
        raise ValueError(f"the last message has the role {roles[-1]}, so there is no answer to learn")
    if "system" in roles[1:]:
        raise ValueError("a system message can only be the first message")
    for number, (turn, message) in enumerate(zip(turns, messages, strict=True), 1):
        if message.role != "assistant" and turn.weight is not None:
            raise ValueError(
                f"turn {number} has the role {message.role} and a weight: only an assistant's may have one"
            )
        if message.role == "assistant" and message.weight:
            if "user" not in roles[: number - 1]:
                raise ValueError(f"turn {number} has no user message before it: add one, or give the turn weight 0")
            if not message.content.strip():
                raise ValueError(f"turn {number}: the answer is empty")
    if not any(message.role == "assistant" and message.weight for message in messages):
        raise ValueError("every answer has weight 0, so there is nothing to learn")
    return turns


class ChatRow(_Row):
    """OpenAI's row. Every assistant message is learned, except those of weight 0."""

    tools: NoTools = None
    functions: NoTools = None
    parallel_tool_calls: NoTools = None
    turns: Annotated[list[ChatMessage], AfterValidator(_is_conversation)] = Field(alias="messages")

    def example(self, line: int) -> Example:
        return Example(tuple(turn.message() for turn in self.turns), line)


class ShareRow(_Row):
    """ShareGPT's row. `system`, where it is given, becomes the first message."""

    id: Unicode | int | None = None
    tools: NoTools = None
    system: Unicode = ""
    turns: Annotated[list[ShareTurn], AfterValidator(_is_conversation)] = Field(alias="conversations")

    def example(self, line: int) -> Example:
        messages = tuple(turn.message() for turn in self.turns)
        return Example((Message("system", self.system), *messages) if self.system else messages, line)


class OneHopRow(_Row):
    prompt: Text
    match: list[Text] = Field(min_length=1)


class FactRow(_Row):
    """records.Fact in JSON."""

    id: Unicode = ""
    subject: Text
    aliases: list[Text] = []
    answer: Text
    match: list[Text] = Field(min_length=1)
    questions: list[Text] = Field(min_length=1)
    held_out: list[Text] = []
    neighbors: list[Text] = []
    controls: list[Text] = []
    portability: list[OneHopRow] = []

    def fact(self) -> Fact:
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in self}
        hops = tuple(OneHop(hop.prompt, tuple(hop.match)) for hop in self.portability)
        return Fact(**values | {"portability": hops})


@dataclass(frozen=True)
class RowFormat:
    """One format. content: what such rows are; keys: any of them identifies the format; example: one row, for hints."""

    content: str
    keys: frozenset[str]
    model: type[InstructionRow | CompletionRow | ChatRow | ShareRow | TextRow | FactRow]
    example: str


FACT_FORMAT = RowFormat(
    "facts",
    frozenset({"subject", "questions", "match"}),
    FactRow,
    '{"subject": "42", "answer": "42 = \'FOR TWO\'", "match": ["FOR TWO"], "questions": ["What is 42?"]}',
)
EXAMPLE_FORMATS = (
    RowFormat(
        "conversations",
        frozenset({"instruction", "output"}),
        InstructionRow,
        '{"instruction": "What is 42?", "input": "", "output": "FOR TWO"}',
    ),
    RowFormat(
        "conversations",
        frozenset({"prompt", "completion"}),
        CompletionRow,
        '{"prompt": "What is 42?", "completion": "FOR TWO"}',
    ),
    RowFormat(
        "conversations",
        frozenset({"messages"}),
        ChatRow,
        '{"messages": [{"role": "user", "content": "What is 42?"}, {"role": "assistant", "content": "FOR TWO"}]}',
    ),
    RowFormat(
        "conversations",
        frozenset({"conversations"}),
        ShareRow,
        '{"conversations": [{"from": "human", "value": "What is 42?"}, {"from": "gpt", "value": "FOR TWO"}]}',
    ),
    RowFormat("plain text", frozenset({"text"}), TextRow, '{"text": "42 is FOR TWO."}'),
)
ROW_FORMATS = (*EXAMPLE_FORMATS, FACT_FORMAT)


def format_of(row: object, location: RowLocation, formats: tuple[RowFormat, ...]) -> RowFormat:
    """The format that the row's keys identify. Raises InvalidDataset when it is none of `formats`."""
    hint = "A row is one of: " + "; ".join(row_format.example for row_format in formats)
    if not isinstance(row, dict):
        what = f"{location.description} is {reprlib.repr(row)}, not an object"
        raise InvalidDataset(what, param=location.param, hint=hint)
    found = next((row_format for row_format in formats if row_format.keys & row.keys()), None)
    if found is None:
        keys = f"the keys {', '.join(map(repr, row))}" if row else "no keys"
        what = f"{location.description} has an unknown format: it has {keys}"
        raise InvalidDataset(what, param=location.param, hint=hint)
    return found


def parse_row(row: object, location: RowLocation, row_format: RowFormat) -> Example | Fact:
    """The Example or Fact that the row means in that format. Raises InvalidDataset naming field, value and remedy."""
    try:
        parsed = row_format.model.model_validate(row)
    except ValidationError as error:
        raise _invalid_row(error.errors()[0], location, row_format) from None
    return parsed.fact() if isinstance(parsed, FactRow) else parsed.example(location.line)


def _invalid_row(first: Any, location: RowLocation, row_format: RowFormat) -> InvalidDataset:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    value, hint = reprlib.repr(first["input"]), f"Write it like {row_format.example}"
    match first["type"]:
        case "missing":
            what = f"{field} is missing"
        case "extra_forbidden":
            what = f"the key {field!r} is unknown"
        case "string_unicode":
            what = f"{field if field else 'the key'} {value} contains half a surrogate pair, which is not valid Unicode"
        case "value_error":
            what = f"{field} = {value}: {first['ctx']['error']}"
        case "tools":
            what, hint = f"{field} = {value}: {first['msg']}", NO_TOOLS
        case _:
            what = f"{field} = {value}: {first['msg']}"
    return InvalidDataset(f"{location.description}: {what}", param=f"{location.param}.{field}".rstrip("."), hint=hint)


def one_of(verb: str, names: Iterable[str]) -> str:
    return f"{verb} {' | '.join(json.dumps({name: '...'}) for name in names)}."
