"""Passes calls from the device's thread to the event loop, all of a step at once: each crossing costs a write to a
pipe, a wake-up and a wait for the interpreter's lock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class EventLoopBridge:
    """`add` and `flush` are called on the device's thread."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Have `call` run on the loop after the next `flush`, behind those added before. Raises RuntimeError when the
        loop is closed."""
        if loop.is_closed():
            raise RuntimeError("The event loop is closed.")
        self._calls.setdefault(loop, []).append(call)

    def flush(self) -> None:
        """Send all added calls to their loops."""
        calls, self._calls = self._calls, {}
        for loop, batch in calls.items():
            try:
                loop.call_soon_threadsafe(_run_all, batch)
            except RuntimeError:
                log.warning("An event loop closed before it received the last deltas of its replies.")


def _run_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        try:
            call()
        except Exception:
            log.exception("Delivering a delta to its reply failed.")
