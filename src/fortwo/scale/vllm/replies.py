"""The replies that vLLM computes, and the thread that writes them: an event loop with one HTTP stream for each."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fortwo.engine.generation import Reply
from fortwo.engine.statistics import EngineStatistics
from fortwo.errors import FortwoError, NotFound, Unavailable
from fortwo.scale.vllm import completions
from fortwo.scale.vllm.adapters import Served
from fortwo.scale.vllm.client import VllmClient

log = logging.getLogger(__name__)
T = TypeVar("T")
CLOSE_SECONDS = 5.0


class VllmReply(Reply):
    """A reply that a coroutine writes. stop: cancels that, on its loop."""

    stop: Callable[[], None] = staticmethod(lambda: None)

    def cancel(self) -> None:
        super().cancel()
        self.stop()


class ReplyThread:
    """flush: called after the deltas of a turn of the loop have gone to all on_delta callbacks. explained: an error of
    vLLM in the words that the client gets."""

    def __init__(
        self,
        client: VllmClient,
        statistics: EngineStatistics,
        flush: Callable[[], None],
        explained: Callable[[FortwoError], FortwoError],
    ) -> None:
        self._client = client
        self._statistics = statistics
        self._flush_deltas = flush
        self._flushing = False
        self._explained = explained
        self._replies: set[VllmReply] = set()
        self._gate = threading.Lock()  # for `_replies`
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fortwo-vllm", daemon=True)

    # ------------------------------------------------------------ any thread

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Cancel all replies, wait for what still talks to vLLM, at most CLOSE_SECONDS, and end the thread."""
        for reply in self.running():
            reply.cancel()
        if self._thread.ident is not None:
            with suppress(TimeoutError, FortwoError):
                self.run(self._finish()).result(CLOSE_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def run(self, call: Coroutine[Any, Any, T]) -> Future[T]:
        """Have the loop run a coroutine that talks to vLLM."""
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def running(self) -> list[VllmReply]:
        with self._gate:
            return list(self._replies)

    def write(self, reply: VllmReply, served: Served, stop_ids: frozenset[int]) -> None:
        """Have the reply written by an adapter. stop_ids: tokens that end it."""
        with self._gate:
            self._replies.add(reply)
        self._loop.call_soon_threadsafe(self._begin, reply, served, stop_ids)

    # ------------------------------------------------------------ the loop's thread

    def _begin(self, reply: VllmReply, served: Served, stop_ids: frozenset[int]) -> None:
        task = self._loop.create_task(self._answer(reply, served, stop_ids))

        def stop() -> None:
            with suppress(RuntimeError):  # the loop is closed, and all replies have ended
                self._loop.call_soon_threadsafe(task.cancel)

        reply.stop = stop
        if reply.cancel_requested:  # before there was a task
            task.cancel()

    async def _answer(self, reply: VllmReply, served: Served, stop_ids: frozenset[int]) -> None:
        """Write the reply. It ends, whatever happens."""
        try:
            try:
                await self._stream(reply, served, stop_ids)
            except NotFound:
                if reply.tokens:
                    raise
                served.pushed = False  # vLLM was started again
                await self._stream(reply, served, stop_ids)
        except asyncio.CancelledError:
            reply.end("cancelled")
        except FortwoError as error:
            reply.fail(self._explained(error))
        except Exception as error:
            log.exception("A reply of vLLM could not be read.")
            reply.end("error", f"{type(error).__name__}: {error}")
        finally:
            with self._gate:
                self._replies.discard(reply)
            self._flush_soon()

    async def _stream(self, reply: VllmReply, served: Served, stop_ids: frozenset[int]) -> None:
        model, prompt, began = served.name, reply.prompt, time.perf_counter()
        await served.push(self._client)
        if (count := prompt.sampling.prompt_logprobs) is not None:
            answer = await self._client.prompt_outputs(completions.prompt_outputs(prompt.tokens, model, count))
            reply.add_prompt_outputs(completions.read_prompt_logprobs(answer, prompt.tokens, count), ())
        if reply.max_tokens == 0:
            reply.end("length")
            return
        last = completions.Chunk()
        body = completions.completion(prompt, model, reply.max_tokens, stop_ids)
        async with aclosing(self._client.stream(body)) as events:
            async for data in events:
                chunk = completions.read_chunk(data, prompt.sampling.logprobs)
                if chunk.finished is not None:
                    last = chunk  # the next event has what the cache knew, which belongs to the reply
                    continue
                if chunk.cached_tokens is not None:
                    reply.cached_tokens = chunk.cached_tokens
                    self._statistics.cached_tokens += 0 if prompt.background else chunk.cached_tokens
                self._write(reply, chunk, began)
                if reply.done:
                    return
        self._write(reply, last, began)
        if not reply.done:
            _end(reply, last.finished)

    def _write(self, reply: VllmReply, chunk: completions.Chunk, began: float) -> None:
        for token, logprob in zip(chunk.tokens, chunk.logprobs, strict=True):
            if not reply.done:
                self._count(reply, began)
                reply.push(token, logprob)
        self._flush_soon()

    def _count(self, reply: VllmReply, began: float) -> None:
        """Count a token of a client's reply before it is added."""
        if reply.prompt.background:
            return
        if not reply.tokens:
            self._statistics.prompt_tokens += len(reply.prompt.tokens)
            self._statistics.first_token_seconds.observe(time.perf_counter() - began)
        self._statistics.generated_tokens += 1

    def _flush_soon(self) -> None:
        """Pass on the deltas of all replies that have new ones in this turn of the loop, together."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flushing = False
        self._flush_deltas()

    async def _finish(self) -> None:
        """Wait for what runs, then close the connections."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        self._flush_deltas()
        await self._client.close()


def _end(reply: Reply, finished: str | None) -> None:
    """End a reply that has fewer tokens than it might, for vLLM's reason."""
    if finished == "length":
        reply.end("length")
    elif finished == "stop":
        reply.end("stop")
    else:
        why = "ended the reply before its end" if finished is None else f"ended the reply with {finished!r}"
        reply.fail(Unavailable(f"vLLM {why}.", hint="Ask again; the log of vLLM has more.", code="vllm_gone"))
