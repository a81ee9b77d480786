"""llama.cpp's API beside OpenAI's: tokens, the chat template, properties, adapters, and POST /completion.

llama.cpp's server has one model; here a request may name one by `model`, and otherwise means the default model.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import Field, field_validator

from fortwo.errors import FortwoError, InvalidRequest
from fortwo.hub.template_files import choose_template
from fortwo.prompts import Delta, Prompt
from fortwo.records import Json
from fortwo.server import sse
from fortwo.server.errors import error_document, unexpected
from fortwo.server.llama_options import UNLIMITED, LlamaOptions, json_schema
from fortwo.server.openai.chat import ChatMessage
from fortwo.server.openai.parameters import Model, Parameters, Strict, check_known, check_length, only
from fortwo.server.openai.replies import Replies
from fortwo.server.request_body import MOST_ITEMS, JsonRoute
from fortwo.server.state import AppState, AppStateDep

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

router = APIRouter(tags=["llama.cpp"], route_class=JsonRoute)

Token = Annotated[int, Field(ge=0)]


class OfModel(Strict):
    model: Model | None = Field(None, description="Default: the server's default model.")


async def _target(request: Request, state: AppState, model: str | None) -> Target:
    """The model, loaded if necessary. Raises what Replies.target raises."""
    replies = Replies(state, request, 0)
    async with replies.target(state.settings.default_model if model is None else model) as target:
        await replies.submit(())
    replies.close()
    return target


@router.get("/props", summary="Context, chat template and control tokens of a model")
async def props(
    request: Request, state: AppStateDep, model: Annotated[str | None, Query(description="As in chat.")] = None
) -> Json:
    """The model is loaded if necessary. total_slots: how many replies are computed together."""
    target = await _target(request, state, model)
    specials, context = target.model.renderer.special_tokens, target.model.runner.cache.longest
    info = state.catalog.model_info(target.model.id)
    return {
        "default_generation_settings": {"n_ctx": context, "params": CompletionRequest.defaults},
        "total_slots": state.running,
        "model_alias": target.name,
        "model_path": target.model.id,
        "modalities": {"vision": False, "audio": False},
        "chat_template": ("" if info is None else choose_template(info.directory).text or ""),
        "bos_token": specials.get("bos_token", ""),
        "eos_token": specials.get("eos_token", ""),
        "build_info": "fortwo",
    }


class TokenizeRequest(OfModel):
    content: str
    add_special: bool | None = Field(None, description="Default false. Put the tokenizer's BOS before the text.")
    with_pieces: bool | None = Field(None, description="Default false. Return the text of each token too.")

    parse_special: Annotated[Any, only(True)] = None


@router.post("/tokenize", summary="The tokens of a text")
async def tokenize(request: Request, state: AppStateDep, body: TokenizeRequest) -> Json:
    target = await _target(request, state, body.model)
    return await run_in_threadpool(_tokenize, target, body)


def _tokenize(target: Target, body: TokenizeRequest) -> Json:
    """A piece is a text, or a list of bytes if it is not UTF-8 on its own."""
    check_length(target, len(body.content), "content")
    renderer = target.model.renderer
    tokens = renderer.encode_text(body.content, specials=bool(body.add_special))
    if not body.with_pieces:
        return {"tokens": tokens}
    return {"tokens": [{"id": token, "piece": _piece(renderer.vocabulary.token_bytes(token))} for token in tokens]}


def _piece(raw: bytes) -> str | list[int]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


class DetokenizeRequest(OfModel):
    tokens: list[Token]


@router.post("/detokenize", summary="The text of tokens, control tokens included")
async def detokenize(request: Request, state: AppStateDep, body: DetokenizeRequest) -> Json:
    target = await _target(request, state, body.model)
    check_known(target, body.tokens, "tokens")
    return {"content": await run_in_threadpool(target.model.renderer.decode_with_control_tokens, body.tokens)}


class TemplateRequest(OfModel):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_ITEMS)


@router.post("/apply-template", summary="A conversation as the text that the model reads")
async def apply_template(request: Request, state: AppStateDep, body: TemplateRequest) -> Json:
    target = await _target(request, state, body.model)
    check_length(target, sum(len(message.content) for message in body.messages), "messages")
    messages = [message.message() for message in body.messages]
    return {"prompt": await run_in_threadpool(target.model.renderer.render, messages)}


@router.get("/lora-adapters", summary="The current version of each adapter, as llama.cpp lists them")
def lora_adapters(state: AppStateDep) -> list[Json]:
    """scale: with which an adapter is added when `model` names it."""
    versions = [version for name in state.adapters.names() for version in state.adapters.versions(name)]
    current = [version for version in versions if version.current]
    return [{"id": id, "path": version.id, "scale": 1.0} for id, version in enumerate(current)]


@router.post("/lora-adapters", summary="Refused: a request chooses its adapter by `model`")
async def set_lora_adapters() -> None:
    raise InvalidRequest(
        "The scale of adapters cannot be set for the whole server, because each request chooses its adapter.",
        hint="Name the adapter, or the base for none, as `model` of each request.",
        code="unsupported_path",
    )


class CompletionRequest(LlamaOptions):
    defaults: ClassVar[Json] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
    place: ClassVar[str] = ""

    model: Model | None = Field(None, description="Default: the server's default model.")
    prompt: str | list[Token] = Field(min_length=1, description="A text or tokens, without a chat template.")
    stream: bool | None = Field(None, description="Default false.")
    n_predict: int | None = Field(
        None, ge=-1, description="The most tokens of the reply. -1, the default: what the context has room for."
    )
    json_schema: Json | None = Field(None, description="The reply is JSON of this schema.")
    ignore_eos: bool | None = Field(None, description="Default false. Continue after end tokens.")
    cache_prompt: bool | None = Field(None, description="Accepted; has no effect: prompts are always cached.")
    id_slot: int | None = Field(None, description="Accepted; has no effect.")
    n_keep: int | None = Field(None, description="Accepted; has no effect: a prompt is never cut.")

    grammar: Annotated[Any, only("")] = None
    lora: Annotated[Any, only([])] = None
    logit_bias: Annotated[Any, only([])] = None
    n_probs: Annotated[Any, only(0)] = None
    samplers: Annotated[Any, only()] = None
    dynatemp_range: Annotated[Any, only(0, 0.0)] = None
    dynatemp_exponent: float | None = Field(None, description="Accepted; has no effect without dynatemp_range.")
    xtc_probability: Annotated[Any, only(0, 0.0)] = None
    xtc_threshold: float | None = Field(None, description="Accepted; has no effect without xtc_probability.")
    dry_multiplier: Annotated[Any, only(0, 0.0)] = None
    dry_base: float | None = Field(None, description="Accepted; has no effect without dry_multiplier.")
    dry_allowed_length: int | None = Field(None, description="Accepted; has no effect without dry_multiplier.")
    dry_penalty_last_n: int | None = Field(None, description="Accepted; has no effect without dry_multiplier.")
    min_keep: Annotated[Any, only(0)] = None
    n_indent: Annotated[Any, only(0)] = None
    t_max_predict_ms: Annotated[Any, only(0, -1)] = None
    post_sampling_probs: Annotated[Any, only(False)] = None
    timings_per_token: Annotated[Any, only(False)] = None
    return_tokens: Annotated[Any, only(False)] = None
    response_fields: Annotated[Any, only([])] = None

    @field_validator("n_predict")
    @classmethod
    def _some(cls, given: int | None) -> int | None:
        if given == 0:
            raise ValueError("Input should be at least 1, or -1 for what the context has room for")
        return given

    def prompts(self, target: Target) -> list[Prompt]:
        check_length(target, len(self.prompt) if isinstance(self.prompt, str) else 0, "prompt")
        tokens = target.model.renderer.encode_text(self.prompt) if isinstance(self.prompt, str) else self.prompt
        asked = _Asked.model_validate(
            {
                "model": target.name,
                "response_format": None if self.json_schema is None else json_schema(self.json_schema),
                "ignore_eos": self.ignore_eos,
                **self.sampling(self.n_predict),
            }
        )
        prompts = asked.prompts(target, tokens, param="prompt", default=UNLIMITED, logprobs=None)
        return [replace(prompt, continues=True) for prompt in prompts]


class _Asked(Parameters):
    """A translated request, whose errors have llama.cpp's names."""

    def limit(self) -> tuple[str, int] | None:
        return None if self.max_tokens is None else ("n_predict", self.max_tokens)


@router.post("/completion", response_model=None, summary="Continue a text, as llama.cpp does")
async def completion(request: Request, state: AppStateDep, body: CompletionRequest) -> Response:
    replies = Replies(state, request, 1, streamed=bool(body.stream))
    async with replies.target(body.model or state.settings.default_model) as target:
        prompts = await run_in_threadpool(body.prompts, target)
        await replies.submit(prompts)
    frame: Json = {"index": 0, "id_slot": 0, "model": target.name}
    if body.stream:
        return sse.EventStream(_events(replies, frame), replies.deadline + sse.KEEP_ALIVE_SECONDS, replies.close)
    (reply,) = await replies.collect()
    return JSONResponse(frame | _end(replies, reply) | {"content": reply.text})


async def _events(replies: Replies, frame: Json) -> AsyncIterator[bytes]:
    """The parts of the reply. Once it has begun, an error can only be sent as its last event."""
    try:
        async for items in replies.items():
            for _, delta in items:
                if delta.text:
                    yield sse.encode(frame | {"content": delta.text, "tokens": [], "stop": False})
                if delta.finish_reason is not None:
                    yield sse.encode(frame | _end(replies, delta))
    except FortwoError as error:
        yield sse.encode(error_document(error))
    except Exception as error:
        yield sse.encode(error_document(unexpected(error)))


def _end(replies: Replies, delta: Delta) -> Json:
    """What the last part says."""
    usage = replies.usage()
    return {
        "content": "",
        "tokens": [],
        "stop": True,
        "stop_type": "limit" if delta.finish_reason == "length" else "eos",
        "tokens_predicted": usage["completion_tokens"],
        "tokens_evaluated": usage["prompt_tokens"],
        "tokens_cached": usage["prompt_tokens_details"]["cached_tokens"],
        "truncated": False,
    }
