"""Threads of their own for calls that take long, so that chat, lists, events and health never wait for one.

A pool runs few calls at once and lets few more wait; beyond that it answers 429. A call whose client disconnects is
dropped if it has not begun, and is told to stop if it has.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from fortwo.errors import Overloaded, Unavailable

T = TypeVar("T")
Check = Callable[[], None]  # raises Unavailable when nobody waits for the call any more
LATEST_WEIGHT = 0.2  # of the latest call in the moving average of durations


class WorkerPool:
    """threads: calls that run at once; waiting: calls that may wait for a thread. `run` is called on the event loop."""

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self._name = name
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"fortwo-{name}")
        self._threads = threads
        self._limit = threads + waiting
        self._inside: dict[Future[Any], threading.Event] = {}  # with the flag that tells it to stop
        self._lock = threading.Lock()
        self._seconds = 1.0  # moving average of how long a call takes
        self._closed = False

    @property
    def active(self) -> int:
        """How many calls run or wait."""
        return len(self._inside)

    async def run(self, request: Request, work: Callable[[Check], T]) -> T:
        """The result of work(check) on a thread of the pool. It should call check() often. Raises what it raises,
        Overloaded when too many calls wait, and Unavailable when the client has disconnected or the pool is closed."""
        stop = threading.Event()
        future = self._submit(work, stop)
        try:
            return await until_disconnect(request.receive, _result(future))
        except asyncio.CancelledError:
            if self._closed and future.cancelled():
                raise _closing() from None
            raise
        finally:
            stop.set()
            future.cancel()  # it has no effect on a call that has begun

    def _submit(self, work: Callable[[Check], T], stop: threading.Event) -> Future[T]:
        def check() -> None:
            if stop.is_set():
                raise Unavailable(
                    "The request was given up: its client disconnected, or the server is shutting down.",
                    hint="Send it again.",
                )

        def call() -> T:
            check()
            began = time.monotonic()
            try:
                return work(check)
            finally:
                self._seconds += LATEST_WEIGHT * (time.monotonic() - began - self._seconds)

        with self._lock:
            if self._closed:
                raise _closing()
            if len(self._inside) >= self._limit:
                raise Overloaded(
                    f"{self._threads} requests of this kind run and {self._limit - self._threads} wait, which is the "
                    "most.",
                    retry_after=max(1, math.ceil(self._seconds * self._limit / self._threads)),
                    hint="Try again after the seconds in the header Retry-After.",
                )
            future = self._pool.submit(contextvars.copy_context().run, call)
            self._inside[future] = stop
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._inside.pop(future, None)

    def stop(self) -> None:
        """Accept no more calls, drop those that wait and tell those that run to stop."""
        with self._lock:
            self._closed = True
            inside = list(self._inside.items())
        for future, flag in inside:
            flag.set()
            future.cancel()

    def close(self) -> None:
        """`stop`, and end the threads once their calls have ended."""
        self.stop()
        self._pool.shutdown(wait=False)


def _closing() -> Unavailable:
    return Unavailable("The server is shutting down.", hint="Try again when it is back.")


async def _result(future: Future[T]) -> T:
    return await asyncio.wrap_future(future)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects first. Raises Unavailable then."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Unavailable("The client disconnected.")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
