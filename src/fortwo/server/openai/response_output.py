"""The items of a response, which are messages and calls of functions, and the events that tell how they grow."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Literal

from fortwo.records import Json
from fortwo.server.openai.tool_replies import Part

Event = tuple[str, Json]  # its type after "response.", and its fields
Status = Literal["in_progress", "completed", "incomplete"]


class ResponseOutput:
    """Grows part by part; the last item is open until `finish`. items: OpenAI's objects, each as it is now."""

    def __init__(self) -> None:
        self.items: list[Json] = []

    def add(self, parts: Iterable[Part]) -> Iterator[Event]:
        """The events of new parts of the reply."""
        for part in parts:
            if isinstance(part, str):
                if not self.items or self.items[-1]["type"] != "message":
                    yield from self.begin_message()
                self.items[-1]["content"][0]["text"] += part
                yield "output_text.delta", {**self._place(), "delta": part, "logprobs": []}
            elif part.name:
                yield from self._begin(_call(part.name))
            else:
                self.items[-1]["arguments"] += part.arguments
                yield "function_call_arguments.delta", {**self._place(), "delta": part.arguments}

    def begin_message(self) -> Iterator[Event]:
        message = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
        yield from self._begin(message | {"content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield "content_part.added", {**self._place(), "content_index": 0, "part": part}
        self.items[-1]["content"] = [dict(part)]

    def finish(self, status: Status) -> Iterator[Event]:
        """Close the last item. A reply without any has an empty message."""
        if not self.items:
            yield from self.begin_message()
        yield from self._end(status)

    def _begin(self, item: Json) -> Iterator[Event]:
        if self.items:
            yield from self._end("completed")
        self.items.append(item)
        yield "output_item.added", {"output_index": len(self.items) - 1, "item": dict(item)}

    def _end(self, status: Status) -> Iterator[Event]:
        item, place = self.items[-1], self._place()
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield "output_text.done", {**place, "text": part["text"], "logprobs": []}
            yield "content_part.done", {**place, "part": part}
        else:
            yield "function_call_arguments.done", {**place, "name": item["name"], "arguments": item["arguments"]}
        yield "output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _place(self) -> Json:
        place = {"output_index": len(self.items) - 1, "item_id": self.items[-1]["id"]}
        return place | ({"content_index": 0} if self.items[-1]["type"] == "message" else {})


def _call(name: str) -> Json:
    ids = {"id": f"fc_{uuid.uuid4().hex}", "call_id": f"call_{uuid.uuid4().hex[:24]}"}
    return {**ids, "type": "function_call", "name": name, "arguments": "", "status": "in_progress"}
