"""The replies to one request on the event loop: collected, or streamed as server-sent events.

Deltas come from the device's thread. Whatever happens (the client disconnects, the deadline passes, the server shuts
down, one of the replies fails), all replies end and the client, if it is still there, gets the reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi.concurrency import run_in_threadpool
from pydantic_core import to_json
from starlette.requests import Request

from fortwo.errors import DeadlineExceeded, FortwoError, InvalidRequest, Unavailable
from fortwo.prompts import SCHEMA_FAILED, Delta, Generation, Prompt
from fortwo.records import Json
from fortwo.server import sse
from fortwo.server.errors import error_document, unexpected
from fortwo.server.state import AppState
from fortwo.server.tracing import GenerationSpan
from fortwo.server.workers import until_disconnect

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

FINGERPRINT = 12  # characters of a digest

StreamItem = tuple[int, Delta]  # the index of a prompt, and a delta of its reply


class Replies:
    """An ActiveRequest of at most `limit` replies, admitted on construction, before its model is loaded. deadline: on
    the event loop's clock; None for that of the settings. model: its name, if `target` is not asked. Raises what
    Admission.admit raises."""

    def __init__(
        self,
        state: AppState,
        request: Request,
        limit: int,
        streamed: bool = False,
        deadline: float | None = None,
        model: str = "",
    ) -> None:
        self._state = state
        self._request = request
        self._timeout = state.settings.request_timeout
        self._admitted, self._model = limit, model
        self._streamed = streamed
        self._loop = asyncio.get_running_loop()
        self._began, self._began_ns = self._loop.time(), time.time_ns()
        self._span: GenerationSpan | None = None
        self._generations: list[Generation] = []
        self._items: list[StreamItem] = []  # received and not yet passed on
        self._failure: FortwoError | None = None  # to be raised after them
        self._changed = asyncio.Event()
        self._resolving: asyncio.Future[Target] | None = None
        self._state.admission.admit(self, limit)
        self.deadline = self._began + self._timeout if deadline is None else deadline
        self._deadline_timer = self._loop.call_at(self.deadline, self._on_deadline)

    @asynccontextmanager
    async def target(self, model: str) -> AsyncIterator[Target]:
        """The weights that a model name means, loaded if necessary and pinned inside the context. Raises what
        AppState.resolve raises, and the reason when the request ends while it waits."""
        registry, self._model = self._state.registry, model
        try:
            while not registry.pin(target := await self._resolve(model)):
                pass  # it was unloaded since it was resolved
            try:
                yield target
            finally:
                registry.unpin(target)
        except BaseException:
            self._release_unsubmitted()
            self.close()
            raise

    async def _resolve(self, model: str) -> Target:
        self._resolving = asyncio.ensure_future(until_disconnect(self._request.receive, self._state.resolve(model)))
        try:
            return await self._resolving
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            raise self._failure from None

    async def submit(self, prompts: Sequence[Prompt], n: int = 1) -> None:
        """Submit the prompts; each is there `n` times in a row. Raises what Engine.submit raises; then all are
        cancelled."""
        self._prompts, self._n = prompts, n
        if prompts:
            self._span = GenerationSpan(self._model, prompts, n, self._began_ns)
        try:
            await run_in_threadpool(self._submit)  # compiling a schema takes a while
        except BaseException:
            self.close()
            raise
        finally:
            self._release_unsubmitted()

    def _submit(self) -> None:
        for index, prompt in enumerate(self._prompts):
            self._generations.append(self._state.engine.submit(prompt, partial(self._on_delta, index)))

    def _release_unsubmitted(self) -> None:
        self._state.admission.release(self, self._admitted - len(self._generations))
        self._admitted = len(self._generations)

    def _on_delta(self, index: int, delta: Delta) -> None:
        """Called on the device's thread."""
        if delta.token is not None and self._span is not None:
            self._span.token()
        if self._streamed or delta.finish_reason is not None:
            self._state.bridge.add(self._loop, partial(self._receive, index, delta))

    def _receive(self, index: int, delta: Delta) -> None:
        if delta.finish_reason is not None:
            self._state.admission.release(self, 1, self._loop.time() - self._began)
        if delta.finish_reason in ("error", "cancelled"):
            self._fail(_failure(delta, self._prompts[index]))
        else:
            self._items.append((index, delta))
            self._changed.set()

    def _fail(self, error: FortwoError) -> None:
        """Only the first failure is reported."""
        if self._failure is None:
            self._failure = error
        self._changed.set()

    def close(self) -> None:
        """Cancel what still runs; nobody is waiting for it any more."""
        self._deadline_timer.cancel()
        for generation in self._generations:
            generation.cancel()
        if self._span is not None:
            self._span.end(self.usage(), self._generations, self._failure)

    def stop(self) -> None:
        """End all replies now, because the server is shutting down."""
        self._abort(
            Unavailable("The reply was cut off: the server is shutting down.", hint="Ask again when it is back.")
        )

    def _on_deadline(self) -> None:
        self._abort(
            DeadlineExceeded(
                f"The reply did not end within {self._timeout:g} seconds, including its wait.",
                hint="Ask for fewer tokens, or raise FORTWO_REQUEST_TIMEOUT.",
            )
        )

    def _abort(self, error: FortwoError) -> None:
        self.close()
        self._fail(error)
        if self._resolving is not None:
            self._resolving.cancel()

    async def items(self) -> AsyncIterator[list[StreamItem]]:
        """What came since the last iteration, as it comes; ends when every reply has finished. Raises the reason when
        one of them failed or was cut off."""
        left = len(self._prompts)
        while left:
            await self._changed.wait()
            self._changed.clear()
            items, self._items, failure = self._items, [], self._failure
            if items:
                yield items
            left -= sum(delta.finish_reason is not None for _, delta in items)
            if left and failure is not None:
                raise failure

    async def collect(self) -> list[Delta]:
        """Each whole reply as one delta, in order. Raises the reason when one of them failed or was cut off, or when
        the client disconnected."""

        async def finish() -> None:
            async for _ in self.items():
                pass

        try:
            await until_disconnect(self._request.receive, finish())
        finally:
            self.close()
        return [_merge(list(generation.deltas())) for generation in self._generations]

    def embeddings(self) -> list[tuple[float, ...]]:
        """Those of prompts with `embed`, in order, once `collect` has returned."""
        return [generation.embedding for generation in self._generations]

    def usage(self) -> Json:
        """OpenAI's usage object. A prompt with `n` replies counts once."""
        prompt_tokens = sum(len(prompt.tokens) for prompt in self._prompts[:: self._n])
        cached_tokens = sum(generation.cached_tokens for generation in self._generations[:: self._n])
        completion_tokens = sum(len(generation.tokens) for generation in self._generations)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }


def _failure(delta: Delta, prompt: Prompt) -> FortwoError:
    if delta.cause is not None:
        return delta.cause
    if delta.finish_reason == "error" and SCHEMA_FAILED in (delta.error or ""):
        return InvalidRequest(
            f"{delta.error}.",
            param="response_format.json_schema.schema" if prompt.sampling.grammar is None else "tools",
            hint="Make the schema smaller: fewer properties in one object, and fewer patterns.",
        )
    if delta.finish_reason == "error":
        return FortwoError(f"The generation failed: {delta.error}.", hint="Ask again; the server's log has more.")
    return Unavailable(
        "The reply was cut off: its model was unloaded or the server is shutting down.", hint="Ask again."
    )


def _merge(deltas: list[Delta]) -> Delta:
    last = deltas[-1]
    text = "".join(delta.text for delta in deltas)
    logprobs = tuple(logprob for delta in deltas for logprob in delta.logprobs)
    return Delta(text, last.token, last.finish_reason, last.error, logprobs)


def fingerprint(target: Target) -> str:
    """OpenAI's system_fingerprint: the beginning of the digest of the adapter version that answers, or of the base."""
    digest = target.model.digest if target.adapter_key is None else target.adapter_key
    return f"fp_{digest.removeprefix('sha256:')[:FINGERPRINT]}"


def stream(
    replies: Replies,
    frame: Json,
    choices: Callable[[int, Delta], Iterable[Json]],
    *,
    first: Sequence[Json] = (),
    with_usage: bool,
) -> sse.EventStream:
    """The replies as OpenAI's chunks: `frame` with one choice each, then usage if asked for, then [DONE].

    first: choices to send before any reply; choices: those of a delta of the prompt with this index. Once the stream
    has begun, an error can only be sent as its last event. A client that does not read cannot be told of the deadline;
    its connection is closed soon after it.
    """
    frame |= {"usage": None} if with_usage else {}
    begin = b"data: " + to_json(frame, ensure_ascii=True)[:-1] + b',"choices":['

    def chunks(choices: Iterable[Json]) -> bytes:
        return b"".join(begin + to_json(choice, ensure_ascii=True) + b"]}\n\n" for choice in choices)

    async def events() -> AsyncIterator[bytes]:
        try:
            if first:
                yield chunks(first)
            async for items in replies.items():
                if encoded := b"".join(chunks(choices(*item)) for item in items):
                    yield encoded
            usage = {"choices": [], "usage": replies.usage()}
            yield (sse.encode(frame | usage) if with_usage else b"") + b"data: [DONE]\n\n"
        except FortwoError as error:
            yield sse.encode(error_document(error))
        except Exception as error:
            yield sse.encode(error_document(unexpected(error)))

    return sse.EventStream(events(), replies.deadline + sse.KEEP_ALIVE_SECONDS, replies.close)
