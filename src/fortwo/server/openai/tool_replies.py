"""Replies that may call tools, as OpenAI's chat writes them: whole, or in the deltas of a stream."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from fortwo.data.tool_parser import CallDelta, ToolCallParser
from fortwo.prompts import Delta
from fortwo.records import Json

Part = str | CallDelta


def parts_of(parser: ToolCallParser | None, delta: Delta) -> list[Part]:
    """What a delta adds to its reply. parser: that of the reply; None where it cannot call tools."""
    if parser is None:
        return [delta.text] if delta.text else []
    parts = parser.push(delta.text)
    return parts if delta.finish_reason is None else [*parts, *parser.flush()]


def finish_reason(parser: ToolCallParser | None, delta: Delta) -> str | None:
    """OpenAI's reason for the end of a reply; None before the end."""
    if delta.finish_reason == "stop" and parser is not None and parser.finished:
        return "tool_calls"
    return delta.finish_reason


def delta_of(part: Part) -> Json:
    """A part of a streamed message."""
    if isinstance(part, str):
        return {"content": part}
    if part.name:
        return {"tool_calls": [{"index": part.index, **_call(part.name)}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]}


def message_of(parts: Iterable[Part]) -> Json:
    """The whole message of the assistant."""
    text, calls = "", list[Json]()
    for part in parts:
        if isinstance(part, str):
            text += part
        elif part.name:
            calls.append(_call(part.name))
        else:
            calls[-1]["function"]["arguments"] += part.arguments
    message: Json = {"role": "assistant", "content": text, "refusal": None}
    return message | {"content": text or None, "tool_calls": calls} if calls else message


def _call(name: str) -> Json:
    """A call that has just begun."""
    id = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}
