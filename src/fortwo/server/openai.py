"""OpenAI's chat API and its list of models.

What OpenAI's own server would take and this one cannot honour is refused by name, unless the value asks for nothing
(n = 1, tools = []). Marks that change no reply (user, metadata) are accepted. Defaults are OpenAI's: temperature 1,
top_p 1; a reply without max_tokens may take what is left of the context, at most REPLY_TOKENS.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from sse_starlette import EventSourceResponse

from fortwo.errors import FortwoError, InvalidRequest, NotFound, Unavailable
from fortwo.records import Delta, Json, Message, Prompt, Sampling
from fortwo.server.errors import unexpected
from fortwo.server.house import Here, House

if TYPE_CHECKING:
    from fortwo.engine.residents import Target

REPLY_TOKENS = 512
STOPS = 4
OWNER = "fortwo"

router = APIRouter(prefix="/v1", tags=["OpenAI"])


def only(*allowed: Any) -> AfterValidator:
    """For a parameter that cannot be honoured yet: null and the values that ask for nothing pass."""
    words = " or ".join(json.dumps(value) for value in allowed)
    remedy = f"Leave it out or set it to {words}." if words else "Leave it out."

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise PydanticCustomError("unsupported_parameter", "{remedy}", {"remedy": remedy})
        return value

    return AfterValidator(check)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Content = Annotated[
    list[TextPart],
    BeforeValidator(
        lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given,
        json_schema_input_type=str | list[TextPart],
    ),
]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(
        lambda given: [given] if isinstance(given, str) else given,
        json_schema_input_type=str | list[str],
    ),
]


class ChatMessage(_Strict):
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


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class ChatRequest(_Strict):
    model: str = Field(
        description="A base model, an adapter (its current version), adapter@version or adapter@job-step."
    )
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = Field(None, description="Default false.")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default 1.")
    top_k: int | None = Field(None, ge=0, description="Default 0: off.")
    seed: int | None = None
    stop: Stop | None = Field(None, max_length=STOPS)
    max_completion_tokens: int | None = Field(None, ge=1, description="Default: the rest of the context, at most 512.")
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")

    user: str | None = Field(None, description="Accepted; changes nothing.")
    metadata: dict[str, str] | None = Field(None, description="Accepted; changes nothing.")
    safety_identifier: str | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Accepted; changes nothing.")

    n: Annotated[Any, only(1)] = None
    logprobs: Annotated[Any, only(False)] = None
    top_logprobs: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    logit_bias: Annotated[Any, only({})] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
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

    def limit(self) -> tuple[str, int] | None:
        """The parameter that bounds the reply, and its value."""
        older, newer = self.max_tokens, self.max_completion_tokens
        if older is not None and newer is not None and older != newer:
            raise InvalidRequest(
                f"max_tokens = {older} and max_completion_tokens = {newer} contradict each other.",
                param="max_tokens",
                hint="Give one of them.",
            )
        if newer is not None:
            return "max_completion_tokens", newer
        return None if older is None else ("max_tokens", older)

    def sampling(self, max_tokens: int) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0 if self.top_k is None else self.top_k,
            seed=self.seed,
            stop=() if self.stop is None else tuple(self.stop),
        )


class Listener:
    """A reply as the event loop hears it: deltas in order, handed over from the device's thread."""

    def __init__(self, house: House, prompt: Prompt) -> None:
        loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[Delta] = asyncio.Queue()

        def hand_over(delta: Delta) -> None:
            loop.call_soon_threadsafe(self._heard.put_nowait, delta)

        self._generation = house.engine.submit(prompt, hand_over)
        self._prompt_tokens = len(prompt.tokens)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Ends after the delta with a finish_reason; raises when the reply did not come to its own end."""
        while True:
            delta = await self._heard.get()
            if delta.finish_reason == "error":
                raise FortwoError(
                    f"The generation failed: {delta.error}.", hint="Ask again; the server's log has more."
                )
            if delta.finish_reason == "cancelled":
                raise Unavailable(
                    "The reply was cut off: its model was unloaded or the server stops.", hint="Ask again."
                )
            yield delta
            if delta.finish_reason is not None:
                return

    def cancel(self) -> None:
        self._generation.cancel()

    def usage(self) -> Json:
        said = len(self._generation.tokens)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": said,
            "total_tokens": self._prompt_tokens + said,
        }


@router.post("/chat/completions", response_model=None, summary="Chat with a base model or an adapter")
async def chat(request: Request, house: Here, body: ChatRequest) -> Response:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            "stream_options is given, but stream is not true.", param="stream_options", hint="Set stream to true."
        )
    target, prompt = await run_in_threadpool(_prompt, house, body)
    frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": target.name}
    listener = Listener(house, prompt)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventSourceResponse(_chunks(listener, frame, with_usage), sep="\n")
    choice = await _unless_gone(request, listener)
    whole = frame | {"object": "chat.completion", "choices": [choice], "usage": listener.usage()}
    return JSONResponse(whole)


def _prompt(house: House, body: ChatRequest) -> tuple[Target, Prompt]:
    """Who answers (loaded when it is not), and what exactly it is asked."""
    limit = body.limit()
    target = house.residents.resolve(body.model)
    tokens = target.resident.renderer.prompt([message.message() for message in body.messages])
    context = target.resident.decoder.config.context
    room = context - len(tokens)
    if room < 1:
        raise InvalidRequest(
            f"The messages take {len(tokens)} tokens; the context of {target.resident.id} is {context}.",
            param="messages",
            code="context_length_exceeded",
            hint="Shorten the messages or leave out the oldest.",
        )
    if limit is not None and limit[1] > room:
        raise InvalidRequest(
            f"{limit[0]} = {limit[1]} does not fit: the messages take {len(tokens)} of {context} tokens of context.",
            param=limit[0],
            code="context_length_exceeded",
            hint=f"Ask for at most {room}.",
        )
    sampling = body.sampling(min(room, REPLY_TOKENS) if limit is None else limit[1])
    return target, Prompt(target.resident.id, tuple(tokens), target.adapter_key, sampling)


async def _unless_gone(request: Request, listener: Listener) -> Json:
    """The whole reply as a choice; a client that hangs up ends the generation."""

    async def whole() -> Json:
        text, reason = [], None
        async for delta in listener:
            text.append(delta.text)
            reason = delta.finish_reason
        message = {"role": "assistant", "content": "".join(text), "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    reply, gone = asyncio.create_task(whole()), asyncio.create_task(hung_up())
    try:
        await asyncio.wait((reply, gone), return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            raise Unavailable("The client hung up.")
        return reply.result()
    finally:
        reply.cancel()
        gone.cancel()
        listener.cancel()


async def _chunks(listener: Listener, frame: Json, with_usage: bool) -> AsyncIterator[Json]:
    """The reply as OpenAI's chunks. Once they flow, a failure can only be told in the stream."""
    frame = frame | {"object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})

    def chunk(delta: Json, reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {"data": json.dumps(frame | {"choices": [choice]})}

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for delta in listener:
            if delta.text:
                yield chunk({"content": delta.text})
            if delta.finish_reason is not None:
                yield chunk({}, delta.finish_reason)
        if with_usage:
            yield {"data": json.dumps(frame | {"choices": [], "usage": listener.usage()})}
        yield {"data": "[DONE]"}
    except FortwoError as error:
        yield {"data": json.dumps(error.body())}
    except Exception as error:
        yield {"data": json.dumps(unexpected(error).body())}
    finally:
        listener.cancel()


@router.get("/models", summary="Base models that are on disk, adapters, their versions, checkpoints")
def models(house: Here) -> Json:
    return {"object": "list", "data": list(_models(house))}


@router.get("/models/{model}", summary="One of them")
def model(house: Here, model: str) -> Json:
    found = {one["id"]: one for one in _models(house)}
    if model not in found:
        raise NotFound(f"There is no model {model!r}.", param="model", hint=f"Known: {', '.join(found)}.")
    return found[model]


def _models(house: House) -> Iterator[Json]:
    """What a request's `model` may be. root: the base that answers; parent: what an adapter was trained from."""
    for entry in house.catalog.entries():
        card = house.catalog.prepared(entry.id)
        if card is not None or entry.id == house.settings.default_model:
            yield _model(entry.id, 0.0, root=entry.id, parent=None)
    for name in house.adapters.names():
        for version in house.adapters.versions(name):
            ids = (name, version.id) if version.current else (version.id,)
            for id in ids:
                yield _model(id, version.created_at, root=version.base_model, parent=version.base_model)
    for job_id in house.checkpoints.jobs():
        for version in house.checkpoints.of(job_id):
            yield _model(version.id, version.created_at, root=version.base_model, parent=version.base_model)


def _model(id: str, created: float, *, root: str, parent: str | None) -> Json:
    return {"id": id, "object": "model", "created": int(created), "owned_by": OWNER, "root": root, "parent": parent}
