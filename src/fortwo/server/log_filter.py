"""Keeps a log from being filled by one message: after the first, it passes once in a while, with how often it came."""

from __future__ import annotations

import logging
import threading
import time

QUIET_SECONDS = 10.0
MOST = 1000  # different messages that are remembered


class RepeatFilter(logging.Filter):
    """Passes a message at most every `seconds`. Messages are the same when their first lines are, before their
    arguments are filled in."""

    def __init__(self, seconds: float = QUIET_SECONDS) -> None:
        super().__init__()
        self._seconds = seconds
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}  # when it last passed, and how often it came since

    def filter(self, record: logging.LogRecord) -> bool:
        key, now = (record.name, str(record.msg).split("\n", 1)[0]), time.monotonic()
        with self._lock:
            if len(self._seen) > MOST:
                self._seen.clear()
            passed, held = self._seen.get(key, (float("-inf"), 0))
            if now - passed < self._seconds:
                self._seen[key] = (passed, held + 1)
                return False
            self._seen[key] = (now, 0)
        if held:
            record.msg = f"{record.msg} ({held} more like this were left out)"
        return True


def install() -> None:
    """Filter the loggers that speak for every connection, and those for every batch of spans."""
    for name in ("asyncio", "uvicorn.error", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
        logger = logging.getLogger(name)
        if not any(isinstance(one, RepeatFilter) for one in logger.filters):
            logger.addFilter(RepeatFilter())
