"""Server-sent events: how an event is encoded, and the response that streams events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from fortwo.server.streams import ClosingStream

KEEP_ALIVE_SECONDS = 15  # the longest silence of a stream, because proxies close silent connections
KEEP_ALIVE = b": keep-alive\n\n"


def encode(data: object, *, id: int | None = None, event: str | None = None) -> bytes:
    """An event with `data` as JSON, in ASCII: some clients take Unicode's line separators for the end of a line."""
    fields = (b"" if id is None else b"id: %d\n" % id) + (b"" if event is None else b"event: %s\n" % event.encode())
    return fields + b"data: " + to_json(data, ensure_ascii=True) + b"\n\n"


class EventStream(ClosingStream):
    """A ClosingStream of encoded events, with KEEP_ALIVE between them."""

    def __init__(
        self, events: AsyncIterator[bytes], deadline: float | None = None, on_close: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(events, "text/event-stream", deadline, on_close)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keep_alive = asyncio.create_task(self._keep_alive(send))
        try:
            await super().__call__(scope, receive, send)
        finally:
            keep_alive.cancel()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
