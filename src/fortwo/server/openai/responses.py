"""OpenAI's responses in their plain form: text, messages and functions in, a message and calls out, whole or streamed.

A request is translated into one for chat. Nothing is stored, so `previous_response_id` is refused.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import to_jsonable_python

from fortwo.data.tool_parser import ToolCallParser
from fortwo.errors import FortwoError, InvalidRequest
from fortwo.prompts import Delta
from fortwo.records import Json
from fortwo.server import sse
from fortwo.server.errors import invalid, unexpected
from fortwo.server.openai import chat
from fortwo.server.openai.parameters import Model, Strict, at_most, only
from fortwo.server.openai.replies import Replies
from fortwo.server.openai.response_input import (
    AllowedFunctions,
    FunctionChoice,
    InputItem,
    ResponseFunction,
    messages_of,
    response_choice,
)
from fortwo.server.openai.response_output import Event, ResponseOutput
from fortwo.server.openai.tool_replies import parts_of
from fortwo.server.openai.tools import TOOLS
from fortwo.server.request_body import MOST_ITEMS, JsonRoute
from fortwo.server.state import AppStateDep

Choice = Annotated[
    Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions, BeforeValidator(response_choice)
]

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


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
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_ITEMS)]
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
    tools: list[ResponseFunction] | None = Field(None, max_length=TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
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
            messages += messages_of(self.input)
        choice = self.tool_choice
        body: Json = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "tools": None if self.tools is None else [tool.tool() for tool in self.tools],
            "tool_choice": choice.chat() if isinstance(choice, FunctionChoice | AllowedFunctions) else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
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
    with _flat_names():
        asked = body.chat_request()
    replies = Replies(state, request, 1, streamed=bool(body.stream))
    async with replies.target(body.model) as target:
        with _flat_names():
            prompts = await run_in_threadpool(chat.prompts_of, target, asked)
        await replies.submit(prompts.prompts)
    frame = _frame(body, target.name)
    if body.stream:
        deadline = replies.deadline + sse.KEEP_ALIVE_SECONDS
        return sse.EventStream(_events(replies, frame, prompts.parser()), deadline, replies.close)
    (reply,) = await replies.collect()
    output = ResponseOutput()
    for _ in (*output.add(parts_of(prompts.parser(), reply)), *output.finish(_status(reply))):
        pass
    return JSONResponse(_finished(frame, output, reply, replies))


@contextmanager
def _flat_names() -> Iterator[None]:
    """Errors of chat about functions, with the names that their fields have in a response."""
    try:
        yield
    except InvalidRequest as error:
        error.message = error.message.replace("].function.", "].")
        error.param = error.param and error.param.replace("].function.", "].")
        raise


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
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(mode="json", by_alias=True),
        "tool_choice": "auto" if body.tool_choice is None else to_jsonable_python(body.tool_choice),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _status(last: Delta) -> Literal["completed", "incomplete"]:
    return "incomplete" if last.finish_reason == "length" else "completed"


def _finished(frame: Json, output: ResponseOutput, last: Delta, replies: Replies) -> Json:
    """The object of a response at its end."""
    status, usage = _status(last), replies.usage()
    return frame | {
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": output.items,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


async def _events(replies: Replies, frame: Json, parser: ToolCallParser | None) -> AsyncIterator[bytes]:
    """The events of a streamed response, each with its number. An error can only be sent as the last one."""
    number, output, last = -1, ResponseOutput(), Delta("")

    def event(type: str, **more: Any) -> bytes:
        nonlocal number
        number += 1
        return sse.encode({"type": type, "sequence_number": number, **more}, event=type)

    def failed(error: FortwoError) -> bytes:
        return event("error", code=error.code, message=error.message, param=error.param)

    def told(events: Iterable[Event]) -> bytes:
        return b"".join(event(f"response.{type}", **fields) for type, fields in events)

    try:
        yield event("response.created", response=frame)
        yield event("response.in_progress", response=frame)
        if parser is None:
            yield told(output.begin_message())
        async for items in replies.items():
            for _, last in items:
                if encoded := told(output.add(parts_of(parser, last))):
                    yield encoded
        yield told(output.finish(_status(last)))
        whole = _finished(frame, output, last, replies)
        yield event(f"response.{whole['status']}", response=whole)
    except FortwoError as error:
        yield failed(error)
    except Exception as error:
        yield failed(unexpected(error))
