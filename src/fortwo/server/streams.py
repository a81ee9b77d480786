"""The response that streams its body and ends at a deadline, when the body ends, or when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


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
