"""OpenAI's chat API: takes a conversation and returns the assistant's next message."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field, model_validator

from fortwo.data.messages import Content, ToolCalls, calls_json, tools_json, wrong
from fortwo.data.tool_form import ToolForm
from fortwo.data.tool_function import Function
from fortwo.data.tool_grammar import ToolUse
from fortwo.data.tool_parser import ToolCallParser
from fortwo.errors import InvalidRequest
from fortwo.prompts import Delta, Prompt
from fortwo.records import Json, Message
from fortwo.server.openai import logprobs
from fortwo.server.openai.logprobs import Bytes
from fortwo.server.openai.parameters import TOP_LOGPROBS, Parameters, Strict, at_most, check_length, only
from fortwo.server.openai.replies import Replies, fingerprint, stream
from fortwo.server.openai.tool_replies import delta_of, finish_reason, message_of, parts_of
from fortwo.server.openai.tools import TOOLS, Tool, ToolChoice, check_calls, reply_grammar, tool_use
from fortwo.server.request_body import MOST_ITEMS, JsonRoute
from fortwo.server.state import AppStateDep

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

REPLY_TOKENS = 512  # the limit if the request sets none
METADATA = 1000  # pairs; OpenAI takes 16

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


def _role(role: Any) -> Any:
    """OpenAI's newer name of the system message is one too."""
    if role == "function":
        raise wrong("the role of a tool's result is 'tool'", "Give it the role tool, and the tool_call_id of its call.")
    return "system" if role == "developer" else role


class ChatMessage(Strict):
    """name: the chat template writes it, if it has a place for names."""

    role: Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(_role)]
    tool_calls: ToolCalls | None = Field(
        None, description="Of the assistant. arguments are the JSON text of an object."
    )
    function_call: Annotated[Any, only()] = None
    content: Content

    name: str | None = None
    tool_call_id: str | None = Field(None, description="Of a tool's result: the id of its call.")
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    parsed: Any = Field(None, description="Accepted: OpenAI's client adds the content to it once more, parsed.")

    @model_validator(mode="before")
    @classmethod
    def _without_words(cls, given: Any) -> Any:
        """A message that only calls tools needs no words."""
        calls = isinstance(given, dict) and (given.get("tool_calls") or given.get("function_call"))
        return given | {"content": ""} if calls and given.get("content") is None else given

    def message(self) -> Message:
        return Message(
            self.role,
            self.content,
            name=self.name or "",
            tool_calls=calls_json(self.tool_calls or []),
            tool_call_id=self.tool_call_id or "",
        )


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

    tools: list[Tool] | None = Field(None, max_length=TOOLS)
    tool_choice: ToolChoice | None = Field(
        None, description="Default auto. With none the model does not see the tools either."
    )
    parallel_tool_calls: bool | None = Field(None, description="Default true. With false there is one call at most.")
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
    def _without_functions_that_are_off(cls, given: Any) -> Any:
        """Functions that must not be called change nothing."""
        if not isinstance(given, dict) or given.get("function_call") != "none":
            return given
        return {name: value for name, value in given.items() if name != "functions"}

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
        if self.ignore_eos and self.use is not None:
            raise InvalidRequest(
                "ignore_eos contradicts tools, because a call has an end.",
                param="ignore_eos",
                hint="Give only one of them.",
            )
        check_calls([message.message() for message in self.messages])
        return self

    @property
    def use(self) -> ToolUse | None:
        """What the reply may call; None for nothing. Raises InvalidRequest."""
        return tool_use(self.tools or [], self.tool_choice, self.parallel_tool_calls is not False, self.schema_text())

    def conversation(self) -> list[Message]:
        """The messages; the first one carries the tools, unless none may be called."""
        first, *rest = (message.message() for message in self.messages)
        tools = [] if self.use is None else [tool.shown() for tool in self.tools or ()]
        return [replace(first, tools=tools_json(tools)), *rest]

    def limit(self) -> tuple[str, int] | None:
        newer = self.max_completion_tokens
        return super().limit() if newer is None else ("max_completion_tokens", newer)


@dataclass(frozen=True)
class Asked:
    """The prompts of a request. bytes_of: gives the bytes of a token if logprobs are wanted. form, functions: of the
    calls that replies may contain."""

    prompts: list[Prompt]
    bytes_of: Bytes | None = None
    form: ToolForm | None = None
    functions: tuple[Function, ...] = ()

    def parser(self) -> ToolCallParser | None:
        """What finds the calls of one reply; None if it has none."""
        return None if self.form is None else ToolCallParser(self.form, self.functions)


@router.post("/chat/completions", response_model=None, summary="Chat with a base model or an adapter")
async def chat(request: Request, state: AppStateDep, body: ChatRequest) -> Response:
    replies = Replies(state, request, body.choices, streamed=bool(body.stream))
    async with replies.target(body.model) as target:
        asked = await run_in_threadpool(prompts_of, target, body)
        await replies.submit(asked.prompts, body.choices)
    frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": target.name}
    frame["system_fingerprint"] = fingerprint(target)
    if body.stream:
        frame |= {"object": "chat.completion.chunk"}
        first = [_chunk_choice(index, {"role": "assistant", "content": ""}) for index in range(body.choices)]
        parsers = [asked.parser() for _ in asked.prompts]
        return stream(
            replies, frame, partial(_chunk_choices, asked, parsers), first=first, with_usage=body.with_usage()
        )
    choices = [_whole_choice(asked, index, reply) for index, reply in enumerate(await replies.collect())]
    return JSONResponse(frame | {"object": "chat.completion", "choices": choices, "usage": replies.usage()})


def prompts_of(target: Target, body: ChatRequest, *, param: str = "messages", default: int = REPLY_TOKENS) -> Asked:
    """The prompts of a request. param: the name of the messages in errors; default: the limit of the reply's tokens if
    the request sets none."""
    renderer, messages, use = target.model.renderer, body.conversation(), body.use
    check_length(target, sum(_characters(message) for message in messages), param)
    grammar = None if use is None else reply_grammar(renderer, body.tools or [], use)
    tokens = renderer.encode_prompt(messages)
    top = (body.top_logprobs or 0) if body.logprobs else None
    prompts = body.prompts(target, tokens, param=param, default=default, logprobs=top)
    if grammar is not None:
        prompts = [
            replace(
                prompt,
                sampling=replace(prompt.sampling, json_schema=None, grammar=grammar),
                shown=renderer.call_tokens,
            )
            for prompt in prompts
        ]
    if texts := renderer.stop_texts:
        ends = [replace(prompt.sampling, stop=(*prompt.sampling.stop, *texts)) for prompt in prompts]
        prompts = [replace(prompt, sampling=sampling) for prompt, sampling in zip(prompts, ends, strict=True)]
    bytes_of = renderer.vocabulary.token_bytes if body.logprobs else None
    if use is None:
        return Asked(prompts, bytes_of)
    return Asked(prompts, bytes_of, renderer.tool_form, use.functions)


def _characters(message: Message) -> int:
    return len(message.content.strip()) + len(message.tool_calls) + len(message.tools)


def _whole_choice(asked: Asked, index: int, reply: Delta) -> Json:
    parser = asked.parser()
    return {
        "index": index,
        "message": message_of(parts_of(parser, reply)),
        "logprobs": _logprobs(asked.bytes_of, reply),
        "finish_reason": finish_reason(parser, reply),
    }


def _chunk_choices(asked: Asked, parsers: Sequence[ToolCallParser | None], index: int, delta: Delta) -> Iterator[Json]:
    """The choices of a stream's chunks for one delta: its text, its calls, its finish_reason. The first one has the
    logprobs of the delta's tokens."""
    deltas = [delta_of(part) for part in parts_of(parsers[index], delta)]
    if delta.logprobs and not deltas:
        deltas = [{"content": ""}]
    for number, one in enumerate(deltas):
        shown = delta if number == 0 else replace(delta, logprobs=())
        yield _chunk_choice(index, one, _logprobs(asked.bytes_of, shown))
    if delta.finish_reason is not None:
        yield _chunk_choice(index, {}, reason=finish_reason(parsers[index], delta))


def _chunk_choice(index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(bytes_of: Bytes | None, delta: Delta) -> Json | None:
    return None if bytes_of is None else logprobs.chat(delta.logprobs, bytes_of)
