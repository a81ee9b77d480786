"""Server-sent events: how an event is encoded, and the response that streams events until the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fortwo.errors import Unavailable

KEEP_ALIVE_SECONDS = 15  # the longest silence of a stream, because proxies close silent connections
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"  # OpenAI's last event
T = TypeVar("T")


def encode(data: object, *, id: int | None = None, event: str | None = None) -> bytes:
    """An event with `data` as JSON, in ASCII: some clients take Unicode's line separators for the end of a line."""
    fields = (b"" if id is None else b"id: %d\n" % id) + (b"" if event is None else b"event: %s\n" % event.encode())
    return fields + b"data: " + to_json(data, ensure_ascii=True) + b"\n\n"


class EventStream(Response):
    """Sends encoded events as they come, and KEEP_ALIVE between them. deadline: on the event loop's clock, when the
    connection is closed; on_close: called at the end, whatever the reason."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], deadline: float | None = None, on_close: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._deadline = deadline
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        keep_alive = asyncio.create_task(self._keep_alive(send))
        try:
            with suppress(Unavailable, TimeoutError):
                async with asyncio.timeout_at(self._deadline):
                    await until_disconnect(receive, self._write(send))
        finally:
            keep_alive.cancel()
            self._on_close()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

    async def _write(self, send: Send) -> None:
        async for events in self._events:
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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
