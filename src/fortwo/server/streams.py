"""The response that streams its body and ends at a deadline, when the body ends, or when the client disconnects; and
the limit of event streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fortwo.errors import Overloaded

RETRY_SECONDS = 5


class StreamLimit:
    """Counts the event streams of a server. most: how many there may be at the same time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.count = 0

    def take(self) -> None:
        """Count one more; `release` ends it. Raises Overloaded when there are too many."""
        if self.count >= self._most:
            raise Overloaded(
                f"The server is at its limit of {self._most} event streams.",
                retry_after=RETRY_SECONDS,
                hint="Close streams that nobody reads, or raise FORTWO_MAX_STREAMS.",
            )
        self.count += 1

    def release(self) -> None:
        self.count -= 1


class ClosingStream(StreamingResponse):
    """Sends parts of the body as they come. deadline: on the event loop's clock, when the connection is closed;
    on_close: called at the end, whatever the reason."""

    def __init__(
        self, parts: AsyncIterator[bytes], media_type: str, deadline: float | None, on_close: Callable[[], None]
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(parts, headers=headers, media_type=media_type)
        self._deadline = deadline
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._deadline):
                    await super().__call__(scope, receive, send)
        finally:
            self._on_close()
