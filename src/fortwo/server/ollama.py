"""Ollama's API for replies and vectors: POST /api/chat, /api/generate, /api/embed and /api/embeddings.

A request is translated into one for OpenAI's API and answered in Ollama's form: a JSON object for each part of the
reply, one a line. Defaults of sampling are Ollama's (temperature 0.8, top_k 40, top_p 0.9), except that there is no
repeat_penalty, and that the limit of a reply is that of chat. What changes a reply is honoured or refused by name.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Self

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import to_json

from fortwo.data.messages import wrong
from fortwo.errors import FortwoError, InvalidRequest
from fortwo.prompts import Logprob, Prompt
from fortwo.records import Json, Message
from fortwo.server import sse
from fortwo.server.errors import plain_body, unexpected
from fortwo.server.llama_options import UNLIMITED, LlamaOptions, json_schema
from fortwo.server.openai import chat as openai_chat
from fortwo.server.openai import logprobs
from fortwo.server.openai.chat import Asked, ChatMessage, ChatRequest, prompts_of
from fortwo.server.openai.embeddings import INPUTS, EmbeddingRequest, vectors_of
from fortwo.server.openai.parameters import TOP_LOGPROBS, Strict, Texts, check_length, only
from fortwo.server.openai.replies import Replies
from fortwo.server.openai.tool_replies import Part, message_of, parts_of
from fortwo.server.openai.tools import TOOLS, Tool
from fortwo.server.request_body import MOST_ITEMS, JsonRoute
from fortwo.server.state import AppState, AppStateDep
from fortwo.server.streams import ClosingStream
from fortwo.server.workers import until_disconnect

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

LATEST = ":latest"  # what Ollama adds to a name without a tag; here it means the name itself

router = APIRouter(prefix="/api", tags=["Ollama"], route_class=JsonRoute)

Ask = Callable[["Target"], Asked]
Write = Callable[[str, list[Json]], Json]  # the part of an answer that holds text and whole calls of tools

Name = Annotated[
    str,
    Field(
        description="A base model, an adapter (for its current version) or adapter@version; :latest changes nothing."
    ),
]
KeepAlive = Annotated[str | int | float | None, Field(description="Accepted; has no effect: models stay in memory.")]


def _num_predict(given: int) -> int:
    if given == 0:
        raise ValueError("Input should be at least 1, or -1 for what the context has room for")
    return given


class Options(LlamaOptions):
    num_predict: Annotated[int, Field(ge=-2), AfterValidator(_num_predict)] | None = Field(
        None,
        description="The most tokens of the reply; -1 and -2 for what the context has room for. "
        f"Default: as -1, but at most {openai_chat.REPLY_TOKENS}.",
    )
    num_ctx: int | None = Field(
        None, ge=1, description="A prompt with more tokens is refused. Otherwise it has no effect."
    )

    tfs_z: Annotated[Any, only(1, 1.0)] = None
    penalize_newline: Annotated[Any, only(True)] = None

    # They say how a reply is computed, not what it is.
    num_keep: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None

    def default_limit(self) -> int:
        """The limit of the reply's tokens where num_predict gives none."""
        return openai_chat.REPLY_TOKENS if self.num_predict is None else UNLIMITED

    def check_context(self, prompts: list[Prompt], param: str) -> None:
        """Raises InvalidRequest when a prompt has more tokens than num_ctx; Ollama would cut it."""
        longest = max(len(prompt.tokens) for prompt in prompts)
        if self.num_ctx is not None and longest > self.num_ctx:
            raise InvalidRequest(
                f"{param} takes {longest} tokens, but options.num_ctx = {self.num_ctx}. fortwo never cuts a prompt.",
                param="options.num_ctx",
                code="context_length_exceeded",
                hint="Raise or leave out options.num_ctx, or shorten the prompt.",
            )


class _OllamaChat(ChatRequest):
    """A translated request, whose errors have Ollama's names."""

    def limit(self) -> tuple[str, int] | None:
        return None if self.max_tokens is None else ("options.num_predict", self.max_tokens)


def _format(given: Any) -> Any:
    if given not in (None, "", "json") and not isinstance(given, dict):
        raise wrong(
            'it is neither "json" nor a JSON Schema', 'Set it to "json", or to an object that is a JSON Schema.'
        )
    return given


class Generating(Strict):
    """What requests for chat and for generate have in common."""

    model: Name
    stream: bool | None = Field(None, description="Default true.")
    options: Options | None = None
    format: Annotated[Any, BeforeValidator(_format)] = Field(None, description='"json" or a JSON Schema.')
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS, description="Only with logprobs.")
    keep_alive: KeepAlive = None
    truncate: bool | None = Field(None, description="Accepted: a prompt that does not fit is refused, never cut.")
    shift: bool | None = Field(None, description="Accepted: a reply ends where the context ends.")

    think: Annotated[Any, only(False)] = None

    @property
    def settings(self) -> Options:
        return Options.model_validate({}) if self.options is None else self.options

    def chat_request(self, messages: list[ChatMessage], tools: list[Tool] | None = None) -> ChatRequest:
        """The same request for chat."""
        as_schema = json_schema(self.format) if isinstance(self.format, dict) else None
        return _OllamaChat.model_validate(
            {
                "model": self.model,
                "messages": messages,
                "tools": tools,
                "logprobs": self.logprobs,
                "top_logprobs": self.top_logprobs,
                "response_format": {"type": "json_object"} if self.format == "json" else as_schema,
                **self.settings.sampling(self.settings.num_predict),
            }
        )

    def check_unload(self) -> None:
        """Raises InvalidRequest for a request without a prompt that only unloads the model."""
        if self.keep_alive in (0, "0"):
            raise InvalidRequest(
                f"keep_alive = {self.keep_alive!r} without a prompt means to unload {self.model!r}.",
                param="keep_alive",
                code="unsupported_parameter",
                hint="Use POST /api/models/{id}/unload or POST /api/adapters/{name}/unload instead.",
            )


class OllamaMessage(ChatMessage):
    images: Annotated[Any, only([])] = None
    thinking: Annotated[Any, only("")] = None
    tool_name: str | None = Field(None, description="Of a tool's result: the function that was called.")

    def message(self) -> Message:
        said = super().message()
        return replace(said, name=self.tool_name) if self.tool_name else said


class OllamaChatRequest(Generating):
    messages: list[OllamaMessage] | None = Field(
        None, max_length=MOST_ITEMS, description="Without messages the model is only loaded."
    )
    tools: list[Tool] | None = Field(None, max_length=TOOLS)

    def ask(self, target: Target) -> Asked:
        body = self.chat_request(list(self.messages or ()), self.tools)
        asked = prompts_of(target, body, default=self.settings.default_limit())
        self.settings.check_context(asked.prompts, "messages")
        return asked


class GenerateRequest(Generating):
    prompt: str | None = Field(None, description="Without a prompt the model is only loaded.")
    system: str | None = Field(None, description="A system message before the prompt.")
    raw: bool | None = Field(None, description="Default false. Continue the prompt without the chat template.")

    suffix: Annotated[Any, only("")] = None
    images: Annotated[Any, only([])] = None
    template: Annotated[Any, only("")] = None
    context: Annotated[Any, only([])] = None

    @model_validator(mode="after")
    def _check_raw(self) -> Self:
        if self.raw and self.system:
            raise InvalidRequest(
                "system has no place in a raw prompt.",
                param="system",
                hint="Write it into the prompt, or set raw to false.",
            )
        return self

    def ask(self, target: Target) -> Asked:
        question = ChatMessage.model_validate({"role": "user", "content": self.prompt or ""})
        system = [ChatMessage.model_validate({"role": "system", "content": self.system})] if self.system else []
        body, default = self.chat_request([*system, question]), self.settings.default_limit()
        if self.raw:
            check_length(target, len(question.content), "prompt")
            tokens = target.model.renderer.encode_text(question.content)
            top = (self.top_logprobs or 0) if self.logprobs else None
            continued = body.prompts(target, tokens, param="prompt", default=default, logprobs=top)
            prompts = [replace(prompt, continues=True) for prompt in continued]
            asked = Asked(prompts, target.model.renderer.vocabulary.token_bytes if self.logprobs else None)
        else:
            asked = prompts_of(target, body, param="prompt", default=default)
        self.settings.check_context(asked.prompts, "prompt")
        return asked


@router.post("/chat", response_model=None, summary="Chat, as Ollama does")
async def chat(request: Request, state: AppStateDep, body: OllamaChatRequest) -> Response:
    def write(text: str, calls: list[Json]) -> Json:
        return {"message": {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})}

    return await _answer(request, state, body, body.ask if body.messages else None, write)


@router.post("/generate", response_model=None, summary="Answer or continue a prompt, as Ollama does")
async def generate(request: Request, state: AppStateDep, body: GenerateRequest) -> Response:
    return await _answer(request, state, body, body.ask if body.prompt else None, lambda text, _: {"response": text})


async def _answer(request: Request, state: AppState, body: Generating, ask: Ask | None, write: Write) -> Response:
    """ask: None where the model is only loaded."""
    began = time.perf_counter_ns()
    if ask is None:
        body.check_unload()
    replies = Replies(state, request, 1, streamed=True)
    async with replies.target(without_tag(body.model)) as target:
        loaded = time.perf_counter_ns()
        asked = Asked([]) if ask is None else await run_in_threadpool(ask, target)
        await replies.submit(asked.prompts)
    answer = _Answer(body.model, write, asked, replies, began, loaded)
    if ask is None:
        replies.close()
        return JSONResponse(answer.frame("") | {"done": True, "done_reason": "load"})
    if body.stream is not False:
        deadline = replies.deadline + sse.KEEP_ALIVE_SECONDS
        return ClosingStream(answer.lines(), "application/x-ndjson", deadline, replies.close)
    try:
        return JSONResponse(await until_disconnect(request.receive, answer.whole()))
    finally:
        replies.close()


@dataclass(frozen=True)
class _Part:
    """A part of a reply. calls: those that it completed; end: with the last part why the reply ended, with counts and
    durations in nanoseconds."""

    text: str
    calls: list[Json]
    logprobs: tuple[Logprob, ...]
    end: Json


def _calls(found: list[Part], begin: int, end: int) -> list[Json]:
    """The calls from number `begin` to `end` in Ollama's form, with their arguments as objects."""
    if begin == end:
        return []
    functions = [call["function"] for call in message_of(found)["tool_calls"][begin:end]]
    return [{"function": function | {"arguments": json.loads(function["arguments"])}} for function in functions]


class _Answer:
    """The reply to one request in Ollama's form. began, loaded: when the request came and when the model was loaded,
    in nanoseconds of perf_counter."""

    def __init__(self, model: str, write: Write, asked: Asked, replies: Replies, began: int, loaded: int) -> None:
        self._model = model
        self._write = write
        self._bytes_of = asked.bytes_of
        self._parser = asked.parser()
        self._replies = replies
        self._began = began
        self._loaded = loaded

    def frame(self, text: str, calls: Sequence[Json] = (), logged: tuple[Logprob, ...] | None = None) -> Json:
        """An object with text and calls of tools, and log-probabilities if they are wanted."""
        created = timestamp(time.time())
        frame = {"model": self._model, "created_at": created, **self._write(text, list(calls)), "done": False}
        if logged is not None and self._bytes_of is not None:
            frame["logprobs"] = logprobs.chat(logged, self._bytes_of)["content"]
        return frame

    async def whole(self) -> Json:
        """The whole reply. Raises the reason when it failed or was cut off."""
        parts = [part async for part in self._parts()]
        calls = [call for part in parts for call in part.calls]
        logged = tuple(one for part in parts for one in part.logprobs)
        return self.frame("".join(part.text for part in parts), calls, logged) | parts[-1].end

    async def lines(self) -> AsyncIterator[bytes]:
        """The reply as lines of JSON. Once it has begun, an error can only be sent as its last line."""
        try:
            async for part in self._parts():
                if part.text or part.calls or part.logprobs:
                    yield _line(self.frame(part.text, part.calls, part.logprobs))
                if part.end:
                    yield _line(self.frame("") | part.end)
        except FortwoError as error:
            yield _line(plain_body(error))
        except Exception as error:
            yield _line(plain_body(unexpected(error)))

    async def _parts(self) -> AsyncIterator[_Part]:
        first, found, sent = None, list[Part](), 0
        async for items in self._replies.items():
            first = time.perf_counter_ns() if first is None else first
            for _, delta in items:
                new = parts_of(self._parser, delta)
                found += [part for part in new if not isinstance(part, str)]
                complete = 0 if self._parser is None else self._parser.calls
                calls = _calls(found, sent, complete)
                sent = complete
                end = {} if delta.finish_reason is None else self._end(delta.finish_reason, first)
                yield _Part("".join(part for part in new if isinstance(part, str)), calls, delta.logprobs, end)

    def _end(self, reason: str, first: int) -> Json:
        now, usage = time.perf_counter_ns(), self._replies.usage()
        return {
            "done": True,
            "done_reason": reason,
            "total_duration": now - self._began,
            "load_duration": self._loaded - self._began,
            "prompt_eval_count": usage["prompt_tokens"],
            "prompt_eval_duration": first - self._loaded,
            "eval_count": usage["completion_tokens"],
            "eval_duration": now - first,
        }


def _line(body: Json) -> bytes:
    return to_json(body, ensure_ascii=True) + b"\n"


def without_tag(model: str) -> str:
    """The name as the rest of the server knows it."""
    return model.removesuffix(LATEST)


def timestamp(seconds: float) -> str:
    """A time since the epoch as Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class EmbedRequest(Strict):
    model: Name
    input: Annotated[Texts, Field(max_length=INPUTS, description="A text or a list of texts.")]
    truncate: bool | None = Field(None, description="Accepted: an input that does not fit is refused, never cut.")
    options: Options | None = Field(None, description="Accepted; they have no effect on a vector.")
    keep_alive: KeepAlive = None

    dimensions: Annotated[Any, only()] = None


class OlderEmbedRequest(Strict):
    model: Name
    prompt: str = Field(min_length=1)
    options: Options | None = None
    keep_alive: KeepAlive = None


@router.post("/embed", summary="Texts as vectors, as Ollama does")
async def embed(request: Request, state: AppStateDep, body: EmbedRequest) -> Json:
    """load_duration is part of total_duration and not measured on its own."""
    began = time.perf_counter_ns()
    vectors, tokens = await vectors_of(
        request, state, EmbeddingRequest.model_validate({"model": without_tag(body.model), "input": body.input})
    )
    return {
        "model": body.model,
        "embeddings": vectors,
        "total_duration": time.perf_counter_ns() - began,
        "load_duration": 0,
        "prompt_eval_count": tokens,
    }


@router.post("/embeddings", summary="A text as a vector, in Ollama's older form")
async def embeddings(request: Request, state: AppStateDep, body: OlderEmbedRequest) -> Json:
    vectors, _ = await vectors_of(
        request, state, EmbeddingRequest.model_validate({"model": without_tag(body.model), "input": [body.prompt]})
    )
    return {"embedding": vectors[0]}
