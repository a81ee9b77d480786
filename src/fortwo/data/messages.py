"""What a message may hold in a row and in a chat: text or parts of text, and calls of tools.

Pydantic types that turn OpenAI's and LLaMA-Factory's spellings into one. Rows and requests are not known here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from fortwo import strict_json

DEPTH = 64  # objects and lists within each other


def wrong(message: str, hint: str) -> PydanticCustomError:
    """A validation error whose words are ours, with a remedy."""
    return PydanticCustomError("told", "{message}", {"message": message, "hint": hint})


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


def text_of(given: Any) -> Any:
    """The text of a message's content: of parts of text, all of them, one after the other. What is neither is returned
    as it is. Raises for a part that is no text."""
    if given is None:
        raise wrong("the text is missing", "Give a text, which may be empty where the message calls tools.")
    if not isinstance(given, list):
        return given
    texts = []
    for number, part in enumerate(given, 1):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise wrong(
                f"part {number} is of the type {kind!r}, and fortwo reads text only",
                "Leave the part out, or describe in words what it shows.",
            )
        try:
            texts.append(TextPart.model_validate(part).text)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise wrong(
                f"part {number} is not a part of text: {where} {error.errors()[0]['msg'].lower()}",
                'Write a part like {"type": "text", "text": "..."}, or the text itself.',
            ) from None
    return "".join(texts)


Content = Annotated[str, BeforeValidator(text_of, json_schema_input_type=str | list[TextPart])]


def _arguments(given: Any) -> Any:
    """The arguments of a call as an object; OpenAI writes them as JSON text."""
    if not isinstance(given, str):
        return given
    try:
        value = strict_json.loads(given) if given.strip() else {}
    except (ValueError, RecursionError) as error:
        raise wrong(
            f"the arguments of a call are not JSON: {error}", "Write an object, or the JSON text of one."
        ) from None
    if not isinstance(value, dict):
        raise wrong("the arguments of a call are not a JSON object", "Write an object, or the JSON text of one.")
    check_depth(value)
    return value


def check_depth(value: Any, depth: int = DEPTH) -> None:
    """Raises for more than `depth` objects and lists within each other."""
    if isinstance(value, dict | list):
        if depth == 0:
            raise wrong(f"more than {DEPTH} objects and lists are within each other", "Write the inner ones as text.")
        for inner in value.values() if isinstance(value, dict) else value:
            check_depth(inner, depth - 1)


class Function(BaseModel):
    """parsed_arguments: the arguments once more, as OpenAI's client adds them to a call that it has parsed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1)
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)] = {}
    parsed_arguments: Any = Field(None, exclude=True)


def _call(given: Any) -> Any:
    """A call as OpenAI writes it; some datasets leave the wrapping out."""
    return {"function": given} if isinstance(given, dict) and "name" in given and "function" not in given else given


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = ""
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


def writable(given: Any) -> Any:
    """Raises for calls or tools that JSON in UTF-8 cannot hold."""
    try:
        json.dumps(given, allow_nan=False, default=BaseModel.model_dump, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise wrong(
            "it contains half a surrogate pair, which is not valid Unicode", "Write whole characters."
        ) from None
    except ValueError:
        raise wrong("it holds NaN or Infinity, which are not JSON", "Write a number or null.") from None
    return given


ToolCalls = Annotated[list[Annotated[ToolCall, BeforeValidator(_call)]], AfterValidator(writable)]


def calls_json(calls: ToolCalls) -> str:
    """Calls as records.Message holds them; "" for none."""
    written = [
        ({"id": call.id} if call.id else {}) | {"type": "function", "function": call.function.model_dump()}
        for call in calls
    ]
    return json.dumps(written, ensure_ascii=False) if written else ""


def _tools(given: Any) -> Any:
    """A list of tools as OpenAI writes them, from it or from its JSON text."""
    if isinstance(given, str):
        try:
            given = strict_json.loads(given) if given.strip() else []
        except (ValueError, RecursionError) as error:
            raise wrong(f"the tools are not JSON: {error}", "Write a list of tools, or the JSON text of one.") from None
    if not isinstance(given, list):
        return given
    check_depth(given)
    tools = []
    for number, tool in enumerate(given, 1):
        whole = {"type": "function", "function": tool} if isinstance(tool, dict) and "name" in tool else tool
        function = whole.get("function") if isinstance(whole, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise wrong(
                f"tool {number} has no function with a name",
                'Write {"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}.',
            )
        # What enforces a schema does not change what the model reads.
        tools.append(whole | {"function": {key: value for key, value in function.items() if key != "strict"}})
    return tools


Tools = Annotated[list[dict[str, Any]], BeforeValidator(_tools), AfterValidator(writable)]


def tools_json(tools: list[dict[str, Any]]) -> str:
    """Tools as records.Message holds them; "" for none."""
    return json.dumps(tools, ensure_ascii=False) if tools else ""
