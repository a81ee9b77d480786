"""What a request for a response may hold: messages, calls of functions with their outputs, and functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fortwo.data.messages import wrong
from fortwo.records import Json
from fortwo.server.openai.parameters import Strict, only
from fortwo.server.openai.tools import TOOLS
from fortwo.server.request_body import MOST_ITEMS


class Part(Strict):
    """A piece of text of a message; `output_text` where a reply is sent back."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[Any, only([])] = None
    logprobs: Annotated[Any, only([])] = None


Parts = str | Annotated[list[Part], Field(max_length=MOST_ITEMS)]


class InputMessage(Strict):
    """id, status and phase, which a reply has, change nothing."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def message(self) -> Json:
        return {"role": self.role, "content": _text(self.content)}


class FunctionCall(Strict):
    """A call as a response has it. id and status change nothing."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    parsed_arguments: Any = Field(None, description="Accepted: OpenAI's client adds the arguments once more, parsed.")

    def message(self) -> Json:
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": self.call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}


class FunctionCallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: Parts
    id: str | None = None
    status: str | None = None

    def message(self) -> Json:
        return {"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)}


def _kind(given: Any) -> str:
    kind = given.get("type", "message") if isinstance(given, dict) else getattr(given, "type", "message")
    return kind if kind in ("function_call", "function_call_output") else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


def messages_of(items: Sequence[InputItem]) -> list[Json]:
    """The messages of chat. Calls that follow each other, or a text of the assistant, are one message with it."""
    messages: list[Json] = []
    for item in items:
        message = item.message()
        if isinstance(item, FunctionCall) and messages and messages[-1]["role"] == "assistant":
            messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def _text(parts: Parts) -> str:
    return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class ResponseFunction(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = Field(None, description="Default false, unlike OpenAI's.")

    def tool(self) -> Json:
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class FunctionChoice(Strict):
    type: Literal["function"]
    name: str

    def chat(self) -> Json:
        return {"type": "function", "function": {"name": self.name}}


class AllowedFunctions(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1, max_length=TOOLS)

    def chat(self) -> Json:
        return {"type": self.type, "allowed_tools": {"mode": self.mode, "tools": [one.chat() for one in self.tools]}}


def response_choice(given: Any) -> Any:
    """Says in one error what a choice may be, instead of in one for each of its forms."""
    kind = given.get("type") if isinstance(given, dict) else None
    if given in (None, "none", "auto", "required") or isinstance(given, FunctionChoice | AllowedFunctions):
        return given
    if kind == "function":
        return FunctionChoice.model_validate(given)
    if kind == "allowed_tools":
        return AllowedFunctions.model_validate(given)
    raise wrong(
        "it is no choice of tools", 'Set it to "none", "auto", "required" or {"type": "function", "name": "..."}.'
    )
