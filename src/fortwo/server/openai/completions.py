"""OpenAI's text completions: raw text or tokens in, what comes after them out. No chat template is involved."""

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
from fortwo.server.house import Here
from fortwo.server.openai.logprobs import TextLogprobs
from fortwo.server.openai.parameters import TOP_LOGPROBS, Parameters, Texts, only
from fortwo.server.openai.replies import Replies, Stream

if TYPE_CHECKING:
    from fortwo.engine.residents import Target

REPLY_TOKENS = 16  # when the request does not say

router = APIRouter(prefix="/v1", tags=["OpenAI"])


class CompletionRequest(Parameters):
    prompt: Texts = Field(description="A text, several, a list of tokens, or several.")
    echo: bool | None = Field(None, description="Default false. Begin each reply with its prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=TOP_LOGPROBS, description="How many of the likeliest tokens are told with each token's own."
    )
    max_tokens: int | None = Field(
        None, ge=0, description=f"Default {REPLY_TOKENS}. 0, together with echo: only the prompt."
    )

    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[Any, only("")] = None

    @model_validator(mode="after")
    def _agree_too(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "max_tokens = 0 without echo asks for nothing.",
                param="max_tokens",
                hint="Ask for at least 1, or set echo to true.",
            )
        return self


@router.post("/completions", response_model=None, summary="Continue a text with a base model or an adapter")
async def completions(request: Request, house: Here, body: CompletionRequest) -> Response:
    replies = Replies(house, request, len(body.prompt) * body.choices, streamed=bool(body.stream))
    async with replies.answerer(body.model) as target:
        prompts, writers = await run_in_threadpool(_ask, target, body)
        await replies.submit(prompts, body.choices)
    frame: Json = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": target.name,
    }
    if body.stream:
        return Stream(replies, frame, lambda *heard: [writers[heard[0]].choice(*heard)], with_usage=body.with_usage())
    choices = [writers[index].choice(index, reply) for index, reply in enumerate(await replies.whole())]
    return JSONResponse(frame | {"choices": choices, "usage": replies.usage()})


def _ask(target: Target, body: CompletionRequest) -> tuple[list[Prompt], list[_Writer]]:
    """What exactly is asked, and who writes down each reply."""
    renderer = target.resident.renderer
    prompts: list[Prompt] = []
    writers: list[_Writer] = []
    for place, given in enumerate(body.prompt):
        param = "prompt" if len(body.prompt) == 1 else f"prompt[{place}]"
        tokens = renderer.encode_text(given) if isinstance(given, str) else given
        asked = body.prompts(target, tokens, param=param, otherwise=REPLY_TOKENS, logprobs=body.logprobs)
        for prompt in asked:
            sampling = replace(prompt.sampling, prompt_logprobs=body.logprobs if body.echo else None)
            prompts.append(replace(prompt, sampling=sampling, continues=True))
            echo = (
                "" if not body.echo else given if isinstance(given, str) else renderer.decode_with_control_tokens(given)
            )
            told = None if body.logprobs is None else TextLogprobs(renderer.vocabulary.token_bytes, echo, tokens)
            writers.append(_Writer(echo, told))
    return prompts, writers


class _Writer:
    """The pieces of one completion."""

    def __init__(self, echo: str, logprobs: TextLogprobs | None) -> None:
        self._echo = echo
        self._logprobs = logprobs

    def choice(self, index: int, delta: Delta) -> Json:
        """The next piece; the echo is before the first."""
        text, self._echo = self._echo + delta.text, ""
        told = None if self._logprobs is None else self._logprobs.push(delta.logprobs)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": delta.finish_reason}
