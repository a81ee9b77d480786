"""OpenAI's chat API: a conversation in, the assistant's next turn out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field, model_validator

from fortwo.errors import InvalidRequest
from fortwo.prompts import Delta, Prompt
from fortwo.records import Json, Message
from fortwo.server.house import Here
from fortwo.server.openai import logprobs
from fortwo.server.openai.logprobs import Bytes
from fortwo.server.openai.parameters import TOP_LOGPROBS, Parameters, Strict, only
from fortwo.server.openai.replies import Replies, Stream

if TYPE_CHECKING:
    from fortwo.engine.residents import Target

REPLY_TOKENS = 512  # when the request does not say

router = APIRouter(prefix="/v1", tags=["OpenAI"])


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content = Annotated[
    list[TextPart],
    BeforeValidator(
        lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given,
        json_schema_input_type=str | list[TextPart],
    ),
]


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: Content

    name: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None

    def message(self) -> Message:
        return Message(self.role, "".join(part.text for part in self.content))


class ChatRequest(Parameters):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=1, description=f"Default: the rest of the context, at most {REPLY_TOKENS}."
    )
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Default false. Of the model's own distribution, see Logprob.")
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS, description="Needs logprobs.")

    metadata: dict[str, str] | None = Field(None, description="Accepted; changes nothing.")
    safety_identifier: str | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Accepted; changes nothing.")

    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only()] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    moderation: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _agree_too(self) -> Self:
        older, newer = self.max_tokens, self.max_completion_tokens
        if older is not None and newer is not None and older != newer:
            raise InvalidRequest(
                f"max_tokens = {older} and max_completion_tokens = {newer} contradict each other.",
                param="max_tokens",
                hint="Give one of them.",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                f"top_logprobs = {self.top_logprobs}, but logprobs is not true.",
                param="top_logprobs",
                hint="Set logprobs to true.",
            )
        return self

    def limit(self) -> tuple[str, int] | None:
        newer = self.max_completion_tokens
        return super().limit() if newer is None else ("max_completion_tokens", newer)


@router.post("/chat/completions", response_model=None, summary="Chat with a base model or an adapter")
async def chat(request: Request, house: Here, body: ChatRequest) -> Response:
    replies = Replies(house, request, body.choices, streamed=bool(body.stream))
    async with replies.answerer(body.model) as target:
        prompts, bytes_of = await run_in_threadpool(_ask, target, body)
        await replies.submit(prompts, body.choices)
    frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": target.name}
    if body.stream:
        frame |= {"object": "chat.completion.chunk"}
        first = [_piece(index, {"role": "assistant", "content": ""}) for index in range(body.choices)]
        return Stream(replies, frame, partial(_pieces, bytes_of), first=first, with_usage=body.with_usage())
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": _logprobs(bytes_of, reply),
            "finish_reason": reply.finish_reason,
        }
        for index, reply in enumerate(await replies.whole())
    ]
    return JSONResponse(frame | {"object": "chat.completion", "choices": choices, "usage": replies.usage()})


def _ask(target: Target, body: ChatRequest) -> tuple[list[Prompt], Bytes | None]:
    """What exactly is asked, and what the tokens of logprobs stand for."""
    tokens = target.resident.renderer.encode_prompt([message.message() for message in body.messages])
    top = (body.top_logprobs or 0) if body.logprobs else None
    prompts = body.prompts(target, tokens, param="messages", otherwise=REPLY_TOKENS, logprobs=top)
    return prompts, target.resident.renderer.vocabulary.token_bytes if body.logprobs else None


def _pieces(bytes_of: Bytes | None, index: int, delta: Delta) -> Iterator[Json]:
    """What a delta is in a stream: its text, its end."""
    if delta.text or delta.logprobs:
        yield _piece(index, {"content": delta.text}, _logprobs(bytes_of, delta))
    if delta.finish_reason is not None:
        yield _piece(index, {}, reason=delta.finish_reason)


def _piece(index: int, delta: Json, told: Json | None = None, reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}


def _logprobs(bytes_of: Bytes | None, delta: Delta) -> Json | None:
    return None if bytes_of is None else logprobs.chat(delta.logprobs, bytes_of)
