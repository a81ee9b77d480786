"""Passes calls from the threads of devices to the event loop, many at once: each crossing costs a write to a pipe, a
wake-up and a wait for the interpreter's lock."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class EventLoopBridge:
    """`add` and `flush` are called on the thread of a device; calls of one thread keep their order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Have `call` run on the loop after the next `flush`, behind those added before. Raises RuntimeError when the
        loop is closed."""
        if loop.is_closed():
            raise RuntimeError("The event loop is closed.")
        with self._lock:
            self._calls.setdefault(loop, []).append(call)

    def flush(self) -> None:
        """Send all added calls to their loops."""
        with self._lock:
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
