"""What replies say, from the device's thread to the event loop: all of a step at once, since each crossing is a write
to a pipe, a wake-up and a wait for the interpreter's lock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Relay:
    """`put` and `send` are called on the device's thread."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Have it called on the loop, after what was put before, once `send` is called. Raises RuntimeError when the
        loop has ended."""
        if loop.is_closed():
            raise RuntimeError("the event loop has ended")
        self._calls.setdefault(loop, []).append(call)

    def send(self) -> None:
        calls, self._calls = self._calls, {}
        for loop, together in calls.items():
            try:
                loop.call_soon_threadsafe(_carry_out, together)
            except RuntimeError:
                log.warning("an event loop ended before it heard the last of its replies")


def _carry_out(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        try:
            call()
        except Exception:
            log.exception("a reply could not be told")
