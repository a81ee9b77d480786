"""OpenAI's responses in their plain text form: text or messages in, one message out, whole or streamed.

A request is translated into one for chat. Nothing is stored, so `previous_response_id` is refused, and so are tools.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError

from fortwo.errors import FortwoError
from fortwo.prompts import Delta
from fortwo.records import Json
from fortwo.server import sse
from fortwo.server.errors import invalid, unexpected
from fortwo.server.openai import chat
from fortwo.server.openai.parameters import Model, Strict, at_most, only
from fortwo.server.openai.replies import Replies
from fortwo.server.request_body import MOST_ITEMS, JsonRoute
from fortwo.server.state import AppStateDep

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


class Part(Strict):
    """A piece of text of a message; `output_text` where a reply is sent back."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[Any, only([])] = None
    logprobs: Annotated[Any, only([])] = None


class InputMessage(Strict):
    """id, status and phase, which a reply has, change nothing."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MOST_ITEMS)]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def message(self) -> Json:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None

    def response_format(self) -> Json:
        if self.type != "json_schema":
            return {"type": self.type}
        schema = self.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": self.type, "json_schema": schema}


class Text(Strict):
    format: TextFormat | None = None
    verbosity: Annotated[Any, only("medium")] = None


class ResponseRequest(Strict):
    model: Model
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_ITEMS)]
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool | None = None
    text: Text | None = None

    metadata: Annotated[dict[str, str], at_most(chat.METADATA)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    include: Annotated[Any, only([])] = None
    truncation: Annotated[Any, only("disabled")] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    background: Annotated[Any, only(False)] = None
    top_logprobs: Annotated[Any, only(0)] = None
    reasoning: Annotated[Any, only({}, {"effort": "none"})] = None
    previous_response_id: Annotated[Any, only()] = None
    conversation: Annotated[Any, only()] = None
    prompt: Annotated[Any, only()] = None
    max_tool_calls: Annotated[Any, only()] = None
    stream_options: Annotated[Any, only({}, {"include_obfuscation": False})] = None

    def chat_request(self) -> chat.ChatRequest:
        """The same request for chat. Raises InvalidRequest for what chat refuses."""
        messages = [{"role": "system", "content": self.instructions}] if self.instructions is not None else []
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [message.message() for message in self.input]
        body: Json = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
        }
        if self.text is not None and self.text.format is not None:
            body["response_format"] = self.text.format.response_format()
        try:
            return chat.ChatRequest.model_validate(body)
        except ValidationError as error:
            found = [one | {"loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
            raise invalid(RequestValidationError(found).errors()) from None


@router.post("/responses", response_model=None, summary="Answer a text or a conversation, in OpenAI's newer form")
async def responses(request: Request, state: AppStateDep, body: ResponseRequest) -> Response:
    asked = body.chat_request()
    replies = Replies(state, request, 1, streamed=bool(body.stream))
    async with replies.target(body.model) as target:
        prompts = (await run_in_threadpool(chat.prompts_of, target, asked)).prompts
        await replies.submit(prompts)
    frame = _frame(body, target.name)
    if body.stream:
        deadline = replies.deadline + sse.KEEP_ALIVE_SECONDS
        return sse.EventStream(_events(replies, frame), deadline, replies.close)
    (reply,) = await replies.collect()
    return JSONResponse(_finished(frame, f"msg_{uuid.uuid4().hex}", reply.text, reply.finish_reason, replies))


def _frame(body: ResponseRequest, model: str) -> Json:
    """The object of a response that has just begun."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(mode="json", by_alias=True),
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(id: str, status: str, parts: list[Json]) -> Json:
    return {"id": id, "type": "message", "role": "assistant", "status": status, "content": parts}


def _finished(frame: Json, message_id: str, text: str, reason: str | None, replies: Replies) -> Json:
    """The object of a response at its end. reason: as in Delta."""
    cut = reason == "length"
    status, usage = "incomplete" if cut else "completed", replies.usage()
    return frame | {
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [_message(message_id, status, [_part(text)])],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


async def _events(replies: Replies, frame: Json) -> AsyncIterator[bytes]:
    """The events of a streamed response, each with its number. An error can only be sent as the last one."""
    number, message_id = -1, f"msg_{uuid.uuid4().hex}"
    place = {"output_index": 0, "content_index": 0, "item_id": message_id}

    def event(type: str, **more: Any) -> bytes:
        nonlocal number
        number += 1
        return sse.encode({"type": type, "sequence_number": number, **more}, event=type)

    def failed(error: FortwoError) -> bytes:
        return event("error", code=error.code, message=error.message, param=error.param)

    try:
        yield event("response.created", response=frame)
        yield event("response.in_progress", response=frame)
        yield event("response.output_item.added", output_index=0, item=_message(message_id, "in_progress", []))
        yield event("response.content_part.added", part=_part(""), **place)
        text, last = "", Delta("")
        async for items in replies.items():
            for _, last in items:
                text += last.text
                if last.text:
                    yield event("response.output_text.delta", delta=last.text, logprobs=[], **place)
        whole = _finished(frame, message_id, text, last.finish_reason, replies)
        yield event("response.output_text.done", text=text, logprobs=[], **place)
        yield event("response.content_part.done", part=_part(text), **place)
        yield event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield event(f"response.{whole['status']}", response=whole)
    except FortwoError as error:
        yield failed(error)
    except Exception as error:
        yield failed(unexpected(error))
