"""OpenAI's embeddings: texts or tokens in, a vector of length 1 for each out.

The vector is the hidden state of the last token after the final norm, as vLLM takes it for a model that was trained to
go on with text. Inputs go the way of prompts, some at a time, so that chats get their turns in between.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import Field

from fortwo.prompts import Prompt, Sampling
from fortwo.records import Json
from fortwo.server.house import Here
from fortwo.server.openai.parameters import Model, Strict, Texts, only, room
from fortwo.server.openai.replies import Replies

if TYPE_CHECKING:
    from fortwo.engine.residents import Target

INPUTS = 2048  # OpenAI's bound
TOGETHER = 32  # inputs under way at once
TOKENS = 2048  # of those, unless a single one has more

router = APIRouter(prefix="/v1", tags=["OpenAI"])


class EmbeddingRequest(Strict):
    model: Model
    input: Annotated[Texts, Field(max_length=INPUTS, description="A text, several, a list of tokens, or several.")]
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Default float. base64: of little-endian float32."
    )

    user: str | None = Field(None, description="Accepted; changes nothing.")

    dimensions: Annotated[Any, only()] = None


@router.post("/embeddings", response_model=None, summary="Texts as vectors, by a base model or an adapter")
async def embeddings(request: Request, house: Here, body: EmbeddingRequest) -> JSONResponse:
    replies = Replies(house, request, min(len(body.input), TOGETHER))
    vectors: list[tuple[float, ...]] = []
    async with replies.answerer(body.model) as target:
        prompts = await run_in_threadpool(_ask, target, body)
        for portion in _portions(prompts):
            if vectors:
                replies = Replies(house, request, len(portion), deadline=replies.deadline)
            await replies.submit(portion)
            await replies.whole()
            vectors += replies.embeddings()
    tokens = sum(len(prompt.tokens) for prompt in prompts)
    return await run_in_threadpool(_answer, target, body, vectors, tokens)  # a million numbers take a second to write


def _ask(target: Target, body: EmbeddingRequest) -> list[Prompt]:
    prompts = []
    for place, given in enumerate(body.input):
        tokens = target.resident.renderer.encode_text(given) if isinstance(given, str) else given
        room(target, tokens, param="input" if len(body.input) == 1 else f"input[{place}]", least=0)
        sampling = Sampling(max_tokens=0)
        prompts.append(Prompt(target.resident.id, tuple(tokens), target.adapter_key, sampling, embed=True))
    return prompts


def _portions(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """All of them in order, so many at a time."""
    portion: list[Prompt] = []
    for prompt in prompts:
        tokens = sum(len(one.tokens) for one in portion) + len(prompt.tokens)
        if portion and (len(portion) == TOGETHER or tokens > TOKENS):
            yield portion
            portion = []
        portion.append(prompt)
    yield portion


def _answer(target: Target, body: EmbeddingRequest, vectors: list[tuple[float, ...]], tokens: int) -> JSONResponse:
    def entry(index: int, vector: tuple[float, ...]) -> Json:
        packed = body.encoding_format == "base64"
        shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if packed else vector
        return {"object": "embedding", "index": index, "embedding": shown}

    return JSONResponse(
        {
            "object": "list",
            "data": [entry(index, vector) for index, vector in enumerate(vectors)],
            "model": target.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )
