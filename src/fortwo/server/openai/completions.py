"""OpenAI's text completions: raw text or tokens in, what comes after them out. No chat template is involved."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticKnownError

from fortwo.errors import InvalidRequest
from fortwo.records import Delta, Json, Prompt
from fortwo.server.house import Here, House
from fortwo.server.openai.logprobs import TextLogprobs
from fortwo.server.openai.parameters import TOP_LOGPROBS, Parameters, only
from fortwo.server.openai.replies import Replies, Stream

if TYPE_CHECKING:
    from fortwo.engine.residents import Target

REPLY_TOKENS = 16  # when the request does not say

router = APIRouter(prefix="/v1", tags=["OpenAI"])


def _several(given: Any) -> list[str | list[int]]:
    """The prompts, each a text or its tokens."""
    prompts = [given] if isinstance(given, str) or (given and _are_tokens(given)) else given
    if not isinstance(prompts, list) or not all(isinstance(one, str) or _are_tokens(one) for one in prompts):
        raise ValueError("it is neither text nor token ids, nor a list of those")
    if not all(prompts) or not prompts:
        raise ValueError("it is empty")
    for text in prompts:
        if isinstance(text, str) and not text.isprintable() and any("\ud800" <= one <= "\udfff" for one in text):
            raise PydanticKnownError("string_unicode")
    return prompts


def _are_tokens(given: Any) -> bool:
    return isinstance(given, list) and all(type(one) is int and one >= 0 for one in given)


Prompts = Annotated[
    list[Any], PlainValidator(_several, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]


class CompletionRequest(Parameters):
    prompt: Prompts = Field(description="A text, several, a list of tokens, or several.")
    echo: bool | None = Field(None, description="Default false. Begin each reply with its prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=TOP_LOGPROBS, description="How many of the likeliest tokens are told with each token's own."
    )
    max_tokens: int | None = Field(None, ge=1, description=f"Default {REPLY_TOKENS}.")

    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[Any, only("")] = None

    @model_validator(mode="after")
    def _agree_too(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo with logprobs is not supported: the prompt's own log-probabilities are not kept.",
                param="echo",
                code="unsupported_parameter",
                hint="Leave out one of them.",
            )
        return self


@router.post("/completions", response_model=None, summary="Continue a text with a base model or an adapter")
async def completions(request: Request, house: Here, body: CompletionRequest) -> Response:
    with_usage = body.with_usage()
    target, prompts, echoes = await run_in_threadpool(_ask, house, body)
    replies = Replies(house, prompts, body.choices, streamed=bool(body.stream))
    await replies.submit()
    writers = [_Writer(target, body, echo) for echo in echoes]
    frame: Json = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": target.name,
    }
    if body.stream:
        frame |= {"usage": None} if with_usage else {}
        return Stream(replies, _chunks(replies, writers, frame), frame | {"choices": []} if with_usage else None)
    choices = [writers[index].choice(index, reply) for index, reply in enumerate(await replies.whole(request))]
    return JSONResponse(frame | {"choices": choices, "usage": replies.usage()})


def _ask(house: House, body: CompletionRequest) -> tuple[Target, list[Prompt], list[str]]:
    """Who answers (loaded when it is not), what exactly it is asked, and what each reply is to begin with."""
    target = house.residents.resolve(body.model)
    renderer = target.resident.renderer
    prompts: list[Prompt] = []
    echoes: list[str] = []
    for place, given in enumerate(body.prompt):
        param = "prompt" if len(body.prompt) == 1 else f"prompt[{place}]"
        tokens = renderer.text(given) if isinstance(given, str) else given
        asked = body.prompts(target, tokens, param=param, otherwise=REPLY_TOKENS, logprobs=body.logprobs)
        prompts += [replace(prompt, continues=True) for prompt in asked]
        echo = "" if not body.echo else given if isinstance(given, str) else renderer.decode(given)
        echoes += [echo] * len(asked)
    return target, prompts, echoes


class _Writer:
    """The pieces of one completion."""

    def __init__(self, target: Target, body: CompletionRequest, echo: str) -> None:
        self._echo = echo
        self._logprobs = None
        if body.logprobs is not None:
            self._logprobs = TextLogprobs(target.resident.renderer.vocabulary.bytes)

    def choice(self, index: int, delta: Delta) -> Json:
        """The next piece; the echo is before the first."""
        text, self._echo = self._echo + delta.text, ""
        told = None if self._logprobs is None else self._logprobs.push(delta.logprobs)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": delta.finish_reason}


async def _chunks(replies: Replies, writers: list[_Writer], frame: Json) -> AsyncIterator[Json | None]:
    async for heard in replies.deltas():
        yield None if heard is None else frame | {"choices": [writers[heard[0]].choice(*heard)]}
