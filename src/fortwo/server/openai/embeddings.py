"""OpenAI's embeddings: takes texts or tokens and returns a vector of length 1 for each.

The vector is the hidden state of the last token after the final norm, which is also vLLM's choice for causal language
models. Inputs are computed as prompts, a few at a time, so that chats get their turns in between.
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
from fortwo.server.openai.parameters import Model, Strict, Texts, check_length, context_left, only
from fortwo.server.openai.replies import Replies
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppState, AppStateDep

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

INPUTS = 2048  # OpenAI's limit
BATCH_INPUTS = 32  # inputs that are computed at a time
BATCH_TOKENS = 2048  # their tokens, unless a single input has more

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


class EmbeddingRequest(Strict):
    model: Model
    input: Annotated[Texts, Field(max_length=INPUTS, description="A text or a list of tokens, or a list of either.")]
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Default float. base64 encodes little-endian float32 numbers."
    )

    user: str | None = Field(None, description="Accepted; has no effect.")

    dimensions: Annotated[Any, only()] = None


@router.post("/embeddings", response_model=None, summary="Texts as vectors, by a base model or an adapter")
async def embeddings(request: Request, state: AppStateDep, body: EmbeddingRequest) -> JSONResponse:
    vectors, tokens = await vectors_of(request, state, body)
    return await run_in_threadpool(_response, body, vectors, tokens)  # encoding may take a second


async def vectors_of(request: Request, state: AppState, body: EmbeddingRequest) -> tuple[list[tuple[float, ...]], int]:
    """The vector of each input, and how many tokens the inputs have together. Raises what Replies raises."""
    replies = Replies(state, request, min(len(body.input), BATCH_INPUTS))
    vectors: list[tuple[float, ...]] = []
    async with replies.target(body.model) as target:
        prompts = await run_in_threadpool(_prompts, target, body)
        for batch in _batches(prompts):
            if vectors:
                replies = Replies(state, request, len(batch), deadline=replies.deadline, model=body.model)
            await replies.submit(batch)
            await replies.collect()
            vectors += replies.embeddings()
    return vectors, sum(len(prompt.tokens) for prompt in prompts)


def _prompts(target: Target, body: EmbeddingRequest) -> list[Prompt]:
    prompts = []
    for index, given in enumerate(body.input):
        param = "input" if len(body.input) == 1 else f"input[{index}]"
        check_length(target, len(given) if isinstance(given, str) else 0, param)
        tokens = target.model.renderer.encode_text(given) if isinstance(given, str) else given
        context_left(target, tokens, param=param, least=0)
        sampling = Sampling(max_tokens=0)
        prompts.append(Prompt(target.model.id, tuple(tokens), target.adapter_key, sampling, embed=True))
    return prompts


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """The prompts in order, cut into batches."""
    batch: list[Prompt] = []
    for prompt in prompts:
        tokens = sum(len(one.tokens) for one in batch) + len(prompt.tokens)
        if batch and (len(batch) == BATCH_INPUTS or tokens > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def _response(body: EmbeddingRequest, vectors: list[tuple[float, ...]], tokens: int) -> JSONResponse:
    def entry(index: int, vector: tuple[float, ...]) -> Json:
        as_base64 = body.encoding_format == "base64"
        encoded = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if as_base64 else vector
        return {"object": "embedding", "index": index, "embedding": encoded}

    return JSONResponse(
        {
            "object": "list",
            "data": [entry(index, vector) for index, vector in enumerate(vectors)],
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )
