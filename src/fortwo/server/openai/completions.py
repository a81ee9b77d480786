"""OpenAI's text completions: takes text or tokens and returns their continuation, without a chat template."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from fortwo.errors import InvalidRequest
from fortwo.prompts import Delta, Prompt
from fortwo.records import Json
from fortwo.server.openai.logprobs import TextLogprobs
from fortwo.server.openai.parameters import TOP_LOGPROBS, Parameters, Texts, check_length, only
from fortwo.server.openai.replies import Replies, fingerprint, stream
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppStateDep

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

REPLY_TOKENS = 16  # the limit if the request sets none

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


class CompletionRequest(Parameters):
    prompt: Texts = Field(description="A text or a list of tokens, or a list of either.")
    echo: bool | None = Field(None, description="Default false. Start each reply with its prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=TOP_LOGPROBS, description="How many of the likeliest tokens to return with each token."
    )
    max_tokens: int | None = Field(
        None, ge=0, description=f"Default {REPLY_TOKENS}. 0 is allowed with echo, for the prompt alone."
    )

    suffix: Annotated[Any, only("")] = None
    add_special_tokens: Annotated[Any, only(True)] = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "max_tokens = 0 without echo would give an empty reply.",
                param="max_tokens",
                hint="Ask for at least 1, or set echo to true.",
            )
        return self


@router.post("/completions", response_model=None, summary="Continue a text with a base model or an adapter")
async def completions(request: Request, state: AppStateDep, body: CompletionRequest) -> Response:
    replies = Replies(state, request, len(body.prompt) * body.choices, streamed=bool(body.stream))
    async with replies.target(body.model) as target:
        prompts, writers = await run_in_threadpool(_prompts, target, body)
        await replies.submit(prompts, body.choices)
    frame: Json = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": target.name,
        "system_fingerprint": fingerprint(target),
    }
    if body.stream:
        return stream(replies, frame, lambda *item: [writers[item[0]].choice(*item)], with_usage=body.with_usage())
    choices = [writers[index].choice(index, reply) for index, reply in enumerate(await replies.collect())]
    return JSONResponse(frame | {"choices": choices, "usage": replies.usage()})


def _prompts(target: Target, body: CompletionRequest) -> tuple[list[Prompt], list[_Writer]]:
    """The prompts, and for each the writer of its choices."""
    renderer = target.model.renderer
    prompts: list[Prompt] = []
    writers: list[_Writer] = []
    for index, given in enumerate(body.prompt):
        param = "prompt" if len(body.prompt) == 1 else f"prompt[{index}]"
        check_length(target, len(given) if isinstance(given, str) else 0, param)
        tokens = renderer.encode_text(given) if isinstance(given, str) else given
        requested = body.prompts(target, tokens, param=param, default=REPLY_TOKENS, logprobs=body.logprobs)
        for prompt in requested:
            sampling = replace(prompt.sampling, prompt_logprobs=body.logprobs if body.echo else None)
            prompts.append(replace(prompt, sampling=sampling, continues=True))
            said = given if isinstance(given, str) else renderer.decode_with_control_tokens(given)
            echo = said if body.echo else ""
            logprobs = None if body.logprobs is None else TextLogprobs(renderer.vocabulary.token_bytes, echo, tokens)
            writers.append(_Writer(echo, logprobs))
    return prompts, writers


class _Writer:
    """Makes the choices of one completion from its deltas."""

    def __init__(self, echo: str, logprobs: TextLogprobs | None) -> None:
        self._echo = echo
        self._logprobs = logprobs

    def choice(self, index: int, delta: Delta) -> Json:
        """The choice for the next delta; the first one starts with the echo."""
        text, self._echo = self._echo + delta.text, ""
        logprobs = None if self._logprobs is None else self._logprobs.push(delta.logprobs)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
