"""The rows of datasets as pydantic models: Alpaca's, OpenAI's, ShareGPT's, plain text and facts.

Each says how a row becomes an Example or a Fact. Which model a row is for is decided in `row_formats`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fortwo import strict_json
from fortwo.data import messages
from fortwo.data.messages import ToolCalls, Tools, calls_json, tools_json, wrong
from fortwo.records import LONGEST_NAME, Example, Fact, Message, OneHop

EMPTY = "it is empty"
LONGEST_QUESTION = 10_000  # characters
MOST_ALIASES = 100
AS_TOOLS = (
    'Write calls as "tool_calls": [{"type": "function", "function": {"name": "...", "arguments": {...}}}], their '
    'results as messages of the role "tool", and what may be called as "tools" beside the messages.'
)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start + 1} is not valid Unicode") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(EMPTY)
    return text


def _old_calls(value: Any) -> Any:
    raise wrong("functions are the older form of tools, which is not read", AS_TOOLS)


Unicode = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[Unicode, AfterValidator(_not_blank)]
Name = Annotated[str, Field(max_length=LONGEST_NAME), AfterValidator(_unicode), AfterValidator(_not_blank)]
Question = Annotated[str, Field(max_length=LONGEST_QUESTION), AfterValidator(_unicode), AfterValidator(_not_blank)]
Content = Annotated[messages.Content, AfterValidator(_unicode)]
Flag = Annotated[Any, BeforeValidator(lambda value: value)]  # accepted, as it changes nothing about a finished row
OldCalls = Annotated[Any, BeforeValidator(_old_calls)]


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class InstructionRow(Row):
    """Alpaca's row. An input that is not empty follows the instruction after a blank line."""

    instruction: Text
    input: Unicode = ""
    output: Text

    def example(self, line: int) -> Example:
        prompt = asked(self.instruction, self.input)
        return Example((Message("user", prompt), Message("assistant", self.output)), line)


def asked(instruction: str, input: str) -> str:
    """Alpaca's prompt."""
    return f"{instruction}\n\n{input}" if input else instruction


class CompletionRow(Row):
    prompt: Text
    completion: Text

    def example(self, line: int) -> Example:
        return Example((Message("user", self.prompt), Message("assistant", self.completion)), line)


class TextRow(Row):
    text: Text

    def example(self, line: int) -> Example:
        return Example((), line, self.text)


Role = Literal["system", "user", "assistant", "tool"]


def _role(role: Any) -> Any:
    """OpenAI's newer name of the system message is one too."""
    if role == "function":
        raise wrong("the role of a tool's result is 'tool'", AS_TOOLS)
    return "system" if role == "developer" else role


class ChatMessage(Row):
    role: Annotated[Role, BeforeValidator(_role)]
    name: Unicode = ""
    tool_calls: ToolCalls = []
    tool_call_id: Unicode = ""
    function_call: OldCalls = None
    content: Content
    weight: Literal[0, 1] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_words(cls, given: Any) -> Any:
        """A message that only calls tools needs no content."""
        if isinstance(given, dict) and given.get("tool_calls") and "content" not in given:
            return given | {"content": ""}
        return given

    def message(self) -> Message:
        return Message(
            self.role,
            self.content,
            0 if self.weight == 0 else 1,
            name=self.name,
            tool_calls=calls_json(self.tool_calls),
            tool_call_id=self.tool_call_id,
        )


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def _speaker(name: Any) -> Any:
    if not isinstance(name, str) or name not in _SPEAKERS:
        raise ValueError(f"the speaker must be one of {', '.join(map(repr, _SPEAKERS))}")
    return _SPEAKERS[name]


class ShareTurn(Row):
    role: Annotated[Role, BeforeValidator(_speaker)] = Field(alias="from")
    content: Content = Field(alias="value")
    tool_calls: ToolCalls = Field([], alias="function_call")  # what _as_a_call makes of the value
    weight: Literal[0, 1] | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_a_call(cls, given: Any) -> Any:
        """A turn of the speaker function_call holds the JSON text of a call, or of a list of calls."""
        if not isinstance(given, dict) or given.get("from") not in ("function_call", "tool_call"):
            return given
        try:
            calls = strict_json.loads(str(given.get("value")))
        except (ValueError, RecursionError):
            raise wrong(
                f"the value of {given['from']} is not the JSON text of a call",
                'Write the value like "{\\"name\\": \\"...\\", \\"arguments\\": {...}}".',
            ) from None
        return given | {"value": "", "function_call": calls if isinstance(calls, list) else [calls]}

    def message(self) -> Message:
        weight, calls = 0 if self.weight == 0 else 1, calls_json(self.tool_calls)
        return Message(self.role, self.content, weight, tool_calls=calls)


AnyMessage = TypeVar("AnyMessage", ChatMessage, ShareTurn)


def is_conversation(turns: list[AnyMessage]) -> list[AnyMessage]:
    """The turns. Raises for those that are no conversation with an answer to learn."""
    said = [turn.message() for turn in turns]
    roles = [message.role for message in said]
    if "user" not in roles:
        raise wrong("there is no user message", "Add what the user said, or leave the row out.")
    if roles[-1] != "assistant":
        raise wrong(
            f"the last message has the role {roles[-1]}, so there is no answer to learn",
            "Add the assistant's answer, or leave that message out.",
        )
    if "system" in roles[1:]:
        raise wrong(
            "a system message can only be the first message",
            "Write it into the user message that follows, or into the first system message.",
        )
    for number, (turn, message) in enumerate(zip(turns, said, strict=True), 1):
        _check_turn(number, message, said[: number - 1], turn.weight)
    if not any(message.role == "assistant" and message.weight for message in said):
        raise wrong("every answer has weight 0, so there is nothing to learn", "Give one answer weight 1.")
    return turns


def _check_turn(number: int, message: Message, before: list[Message], weight: int | None) -> None:
    """Raises for a turn that cannot stand where it does."""
    if message.role != "assistant":
        if weight is not None:
            raise wrong(
                f"turn {number} has the role {message.role} and a weight: only an assistant's may have one",
                "Leave the weight of that turn out.",
            )
        if message.tool_calls:
            raise wrong(f"turn {number} has the role {message.role} and tool_calls", "Only the assistant calls tools.")
        if message.role == "tool" and not any(earlier.tool_calls for earlier in before):
            raise wrong(f"turn {number} is a tool's result, and no tool was called before it", AS_TOOLS)
    elif message.weight:
        if not any(earlier.role == "user" for earlier in before):
            raise wrong(
                f"turn {number} has no user message before it: add one, or give the turn weight 0",
                'Write "weight": 0 into that turn, and it is context without being learned.',
            )
        if not message.content.strip() and not message.tool_calls:
            raise wrong(f"turn {number}: the answer is empty", "Give an answer, or leave the row out.")


def with_tools(said: tuple[Message, ...], tools: list[dict[str, Any]]) -> tuple[Message, ...]:
    """The conversation with its tools, which the first message carries."""
    return (replace(said[0], tools=tools_json(tools)), *said[1:])


class ChatRow(Row):
    """OpenAI's row. Every assistant message is learned, calls of tools included, except those of weight 0."""

    tools: Tools = []
    functions: OldCalls = None
    parallel_tool_calls: Flag = None
    turns: Annotated[list[ChatMessage], AfterValidator(is_conversation)] = Field(alias="messages")

    def example(self, line: int) -> Example:
        return Example(with_tools(tuple(turn.message() for turn in self.turns), self.tools), line)


class ShareRow(Row):
    """ShareGPT's row. `system`, where it is given, becomes the first message."""

    id: Unicode | int | None = None
    tools: Tools = []
    system: Unicode = ""
    turns: Annotated[list[ShareTurn], AfterValidator(is_conversation)] = Field(alias="conversations")

    def example(self, line: int) -> Example:
        said = tuple(turn.message() for turn in self.turns)
        whole = (Message("system", self.system), *said) if self.system else said
        return Example(with_tools(whole, self.tools), line)


class OneHopRow(Row):
    prompt: Question
    match: list[Name] = Field(min_length=1)


class FactRow(Row):
    """records.Fact in JSON."""

    id: Unicode = ""
    subject: Name
    aliases: list[Name] = Field([], max_length=MOST_ALIASES)
    answer: Text
    match: list[Name] = Field(min_length=1)
    questions: list[Question] = Field(min_length=1)
    held_out: list[Question] = []
    neighbors: list[Question] = []
    controls: list[Question] = []
    portability: list[OneHopRow] = []

    def fact(self) -> Fact:
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in self}
        hops = tuple(OneHop(hop.prompt, tuple(hop.match)) for hop in self.portability)
        return Fact(**values | {"portability": hops})
