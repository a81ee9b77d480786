"""OpenAI's chat API: takes a conversation and returns the assistant's next message."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field, model_validator

from fortwo.data.messages import Content, wrong
from fortwo.errors import InvalidRequest
from fortwo.prompts import Delta, Prompt
from fortwo.records import Json, Message
from fortwo.server.openai import logprobs
from fortwo.server.openai.logprobs import Bytes
from fortwo.server.openai.parameters import TOP_LOGPROBS, Parameters, Strict, at_most, check_length, only
from fortwo.server.openai.replies import Replies, fingerprint, stream
from fortwo.server.request_body import MOST_ITEMS, JsonRoute
from fortwo.server.state import AppStateDep

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

REPLY_TOKENS = 512  # the limit if the request sets none
METADATA = 1000  # pairs; OpenAI takes 16

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


def _role(role: Any) -> Any:
    """OpenAI's newer name of the system message is one too."""
    if role in ("tool", "function"):
        raise wrong(
            "results of tools are not supported, because fortwo calls no tools",
            "Leave the calls and their results out, or write in words what came back.",
        )
    return "system" if role == "developer" else role


class ChatMessage(Strict):
    """name: the chat template writes it, if it has a place for names."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_role)]
    tool_calls: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    content: Content

    name: str | None = None
    tool_call_id: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None

    @model_validator(mode="before")
    @classmethod
    def _without_words(cls, given: Any) -> Any:
        """A message that only calls tools is refused for its calls, not for its missing words."""
        calls = isinstance(given, dict) and (given.get("tool_calls") or given.get("function_call"))
        return given | {"content": ""} if calls and given.get("content") is None else given

    def message(self) -> Message:
        return Message(self.role, self.content, name=self.name or "")


class ChatRequest(Parameters):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_ITEMS)
    max_completion_tokens: int | None = Field(
        None, ge=1, description=f"Default: what fits the context, at most {REPLY_TOKENS}."
    )
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(
        None, description="Default false. They are those of the raw logits, before temperature and penalties."
    )
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS, description="Only with logprobs.")

    metadata: Annotated[dict[str, str], at_most(METADATA)] | None = Field(None, description="Accepted; has no effect.")
    safety_identifier: str | None = Field(None, description="Accepted; has no effect.")
    prompt_cache_key: str | None = Field(None, description="Accepted; has no effect.")

    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = Field(None, description="With none, tools may be given.")
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only("medium")] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    moderation: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only("in-memory", "in_memory")] = None
    web_search_options: Annotated[Any, only()] = None

    # Parameters of vLLM, with the values that change nothing.
    echo: Annotated[Any, only(False)] = None
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: Annotated[Any, only(False)] = None
    add_special_tokens: Annotated[Any, only(False)] = None
    chat_template_kwargs: Annotated[Any, only({}, {"enable_thinking": False})] = None

    @model_validator(mode="before")
    @classmethod
    def _without_tools_that_are_off(cls, given: Any) -> Any:
        """Tools that must not be called change nothing."""
        off = {"tools": "tool_choice", "functions": "function_call"}
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if given.get(off.get(name, "")) != "none"}

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        older, newer = self.max_tokens, self.max_completion_tokens
        if older is not None and newer is not None and older != newer:
            raise InvalidRequest(
                f"max_tokens = {older} and max_completion_tokens = {newer} contradict each other.",
                param="max_tokens",
                hint="Give only one of them.",
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
async def chat(request: Request, state: AppStateDep, body: ChatRequest) -> Response:
    replies = Replies(state, request, body.choices, streamed=bool(body.stream))
    async with replies.target(body.model) as target:
        prompts, bytes_of = await run_in_threadpool(prompts_of, target, body)
        await replies.submit(prompts, body.choices)
    frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": target.name}
    frame["system_fingerprint"] = fingerprint(target)
    if body.stream:
        frame |= {"object": "chat.completion.chunk"}
        first = [_chunk_choice(index, {"role": "assistant", "content": ""}) for index in range(body.choices)]
        return stream(replies, frame, partial(_chunk_choices, bytes_of), first=first, with_usage=body.with_usage())
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": _logprobs(bytes_of, reply),
            "finish_reason": reply.finish_reason,
        }
        for index, reply in enumerate(await replies.collect())
    ]
    return JSONResponse(frame | {"object": "chat.completion", "choices": choices, "usage": replies.usage()})


def prompts_of(
    target: Target, body: ChatRequest, *, param: str = "messages", default: int = REPLY_TOKENS
) -> tuple[list[Prompt], Bytes | None]:
    """The prompts, and what gives the bytes of a token if logprobs are wanted. param: the name of the messages in
    errors; default: the limit of the reply's tokens if the request sets none."""
    messages = [message.message() for message in body.messages]
    check_length(target, sum(len(message.content.strip()) for message in messages), param)
    tokens = target.model.renderer.encode_prompt(messages)
    top = (body.top_logprobs or 0) if body.logprobs else None
    prompts = body.prompts(target, tokens, param=param, default=default, logprobs=top)
    if texts := target.model.renderer.stop_texts:
        ends = [replace(prompt.sampling, stop=(*prompt.sampling.stop, *texts)) for prompt in prompts]
        prompts = [replace(prompt, sampling=sampling) for prompt, sampling in zip(prompts, ends, strict=True)]
    return prompts, target.model.renderer.vocabulary.token_bytes if body.logprobs else None


def _chunk_choices(bytes_of: Bytes | None, index: int, delta: Delta) -> Iterator[Json]:
    """The choices of a stream's chunks for one delta: its text, its finish_reason."""
    if delta.text or delta.logprobs:
        yield _chunk_choice(index, {"content": delta.text}, _logprobs(bytes_of, delta))
    if delta.finish_reason is not None:
        yield _chunk_choice(index, {}, reason=delta.finish_reason)


def _chunk_choice(index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(bytes_of: Bytes | None, delta: Delta) -> Json | None:
    return None if bytes_of is None else logprobs.chat(delta.logprobs, bytes_of)
