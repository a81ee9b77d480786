"""The replies to one request, as the event loop hears them: whole, or as a stream of events.

Deltas are handed over from the device's thread. Whatever happens (the client hangs up, the deadline passes, the server
ends, one of them fails), all of them end and whoever listens is told why.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi.concurrency import run_in_threadpool
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fortwo.errors import DeadlineExceeded, FortwoError, Unavailable
from fortwo.prompts import Delta, Generation, Prompt
from fortwo.records import Json
from fortwo.server.errors import unexpected
from fortwo.server.state import AppState

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

KEEP_ALIVE_SECONDS = 15  # a stream is never silent for longer: proxies cut what is
Heard = tuple[int, Delta] | None  # place of the prompt, and what is new; None keeps a connection alive
T = TypeVar("T")


class Replies:
    """At most `most` of them, which have their places from now on, while a model is loaded too. deadline: by the loop's
    clock; None for what the settings say. Raises what Admission.enter does."""

    def __init__(
        self, state: AppState, request: Request, most: int, streamed: bool = False, deadline: float | None = None
    ) -> None:
        self._house = state
        self._request = request
        self._timeout = state.settings.request_timeout
        self._places = most
        self._streamed = streamed
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._generations: list[Generation] = []
        self._heard: list[Heard] = []  # and not yet passed on
        self._failure: FortwoError | None = None  # after that
        self._news = asyncio.Event()
        self._finding: asyncio.Future[Target] | None = None
        self._house.admission.enter(self, most)
        self.deadline = self._began + self._timeout if deadline is None else deadline
        self._too_late_timer = self._loop.call_at(self.deadline, self._too_late)
        self._keep_alive_timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def answerer(self, model: str) -> AsyncIterator[Target]:
        """Who answers to this name, loaded if need be, and not evicted while it is asked. Raises what AppState.resolve
        does, and why it could not be waited for."""
        registry = self._house.registry
        try:
            while not registry.pin(target := await self._found(model)):
                pass  # evicted in the meantime
            try:
                yield target
            finally:
                registry.unpin(target)
        except BaseException:
            self._give_back()
            self.close()
            raise

    async def _found(self, model: str) -> Target:
        self._finding = asyncio.ensure_future(_unless_gone(self._request.receive, self._house.resolve(model)))
        try:
            return await self._finding
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            raise self._failure from None

    async def submit(self, prompts: Sequence[Prompt], n: int = 1) -> None:
        """Ask; each prompt comes `n` times in a row. Raises what Engine.submit does; then nothing was asked."""
        self._prompts, self._n = prompts, n
        try:
            await run_in_threadpool(self._submit)  # a schema takes a while to read
        except BaseException:
            self.close()
            raise
        finally:
            self._give_back()
        if self._streamed:
            self._keep_alive_timer = self._loop.call_later(KEEP_ALIVE_SECONDS, self._keep_alive)

    def _submit(self) -> None:
        for index, prompt in enumerate(self._prompts):
            self._generations.append(self._house.engine.submit(prompt, partial(self._hand_over, index)))

    def _give_back(self) -> None:
        """The places of replies that were not asked for."""
        self._house.admission.leave(self, self._places - len(self._generations))
        self._places = len(self._generations)

    def _hand_over(self, index: int, delta: Delta) -> None:
        """On the device's thread."""
        if self._streamed or delta.finish_reason is not None:
            self._house.relay.put(self._loop, partial(self._hear, index, delta))

    def _hear(self, index: int, delta: Delta) -> None:
        if delta.finish_reason is not None:
            self._house.admission.leave(self, 1, self._loop.time() - self._began)
        if delta.finish_reason in ("error", "cancelled"):
            self._fail(_failure(delta))
        else:
            self._heard.append((index, delta))
            self._news.set()

    def _fail(self, error: FortwoError) -> None:
        """The first failure is the one that is told."""
        if self._failure is None:
            self._failure = error
        self._news.set()

    # ------------------------------------------------------------ their ends

    def close(self) -> None:
        """Nobody listens any more."""
        self._too_late_timer.cancel()
        if self._keep_alive_timer is not None:
            self._keep_alive_timer.cancel()
        for generation in self._generations:
            generation.cancel()

    def stop(self) -> None:
        """The server cannot wait for them any longer."""
        self._cut(Unavailable("The reply was cut off: the server is shutting down.", hint="Ask again when it is back."))

    def _too_late(self) -> None:
        self._cut(
            DeadlineExceeded(
                f"The reply did not end within {self._timeout:g} seconds, waiting included.",
                hint="Ask for fewer tokens, or raise FORTWO_REQUEST_TIMEOUT.",
            )
        )

    def _cut(self, error: FortwoError) -> None:
        self.close()
        self._fail(error)
        if self._finding is not None:
            self._finding.cancel()

    def _keep_alive(self) -> None:
        self._heard.append(None)
        self._news.set()
        self._keep_alive_timer = self._loop.call_later(KEEP_ALIVE_SECONDS, self._keep_alive)

    # ------------------------------------------------------------ what they say

    async def deltas(self) -> AsyncIterator[list[Heard]]:
        """What came since the last time, as it comes; ends after each reply had a finish_reason. Raises when one did
        not come to its own end."""
        left = len(self._prompts)
        while left:
            await self._news.wait()
            self._news.clear()
            heard, self._heard, failure = self._heard, [], self._failure
            if heard:
                yield heard
            left -= sum(one is not None and one[1].finish_reason is not None for one in heard)
            if left and failure is not None:
                raise failure

    async def whole(self) -> list[Delta]:
        """Each reply as one delta, in order. Raises when one did not come to its own end, or the client hung up."""

        async def ends() -> None:
            async for _ in self.deltas():
                pass

        try:
            await _unless_gone(self._request.receive, ends())
        finally:
            self.close()
        return [_joined(list(generation.deltas())) for generation in self._generations]

    def embeddings(self) -> list[tuple[float, ...]]:
        """Of prompts that asked for it, in order, once they have ended."""
        return [generation.embedding for generation in self._generations]

    def usage(self) -> Json:
        """A prompt that is asked n times counts once."""
        asked = sum(len(prompt.tokens) for prompt in self._prompts[:: self._n])
        cached = sum(generation.cached_tokens for generation in self._generations[:: self._n])
        said = sum(len(generation.tokens) for generation in self._generations)
        return {
            "prompt_tokens": asked,
            "completion_tokens": said,
            "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _failure(delta: Delta) -> FortwoError:
    """Why a reply did not come to its own end."""
    if delta.finish_reason == "error":
        return FortwoError(f"The generation failed: {delta.error}.", hint="Ask again; the server's log has more.")
    return Unavailable("The reply was cut off: its model was unloaded or the server stops.", hint="Ask again.")


def _joined(deltas: list[Delta]) -> Delta:
    last = deltas[-1]
    text = "".join(delta.text for delta in deltas)
    logprobs = tuple(one for delta in deltas for one in delta.logprobs)
    return Delta(text, last.token, last.finish_reason, last.error, logprobs)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. Raises Unavailable when the client hangs up first."""

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(hung_up())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Unavailable("The client hung up.")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class Stream(Response):
    """Replies as server-sent events: chunks, each `frame` with one choice, then usage when it is asked for, then
    [DONE]. Once they flow, a failure can only be told in the stream; it is then the last event."""

    media_type = "text/event-stream"

    def __init__(
        self,
        replies: Replies,
        frame: Json,
        choices: Callable[[int, Delta], Iterable[Json]],
        *,
        first: Sequence[Json] = (),
        with_usage: bool,
    ) -> None:
        """first: choices that come before the replies do. choices: what the chunks say of a delta."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._replies = replies
        self._frame = frame | ({"usage": None} if with_usage else {})
        self._begin = b"data: " + to_json(self._frame, ensure_ascii=True)[:-1] + b',"choices":['
        self._first = first
        self._choices = choices
        self._with_usage = with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            # A client that stays but does not read cannot be told of the deadline; its connection is closed soon after.
            with suppress(Unavailable, TimeoutError):
                async with asyncio.timeout_at(self._replies.deadline + KEEP_ALIVE_SECONDS):
                    await _unless_gone(receive, self._write(send))
        finally:
            self._replies.close()

    async def _write(self, send: Send) -> None:
        async for events in self._events():
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            if self._first:
                yield b"".join(map(self._chunk, self._first))
            async for heard in self._replies.deltas():
                if events := b"".join(map(self._told, heard)):
                    yield events
            usage = {"choices": [], "usage": self._replies.usage()}
            yield (_event(self._frame | usage) if self._with_usage else b"") + b"data: [DONE]\n\n"
        except FortwoError as error:
            yield _event(error.body())
        except Exception as error:
            yield _event(unexpected(error).body())

    def _told(self, heard: Heard) -> bytes:
        return b": waiting\n\n" if heard is None else b"".join(map(self._chunk, self._choices(*heard)))

    def _chunk(self, choice: Json) -> bytes:
        return self._begin + to_json(choice, ensure_ascii=True) + b"]}\n\n"


def _event(data: Json) -> bytes:
    """In ASCII: some clients take the line separators of Unicode for ends of a line."""
    return b"data: " + to_json(data, ensure_ascii=True) + b"\n\n"
