"""Admission control: limits how many replies clients may have running or waiting, and admits none during shutdown.

Everything here runs on the event loop, so nothing is locked. Jobs use the engine directly and are not counted.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from fortwo.errors import InvalidRequest, Overloaded, Unavailable

RETRY_SECONDS = 5  # after which the server may have been restarted
LATEST_WEIGHT = 0.1  # of the latest reply in the moving average of durations
POLL_SECONDS = 0.05


class ActiveRequest(Protocol):
    """An admitted request with its replies."""

    def stop(self) -> None:
        """End it now, because the server is shutting down."""


class Admission:
    """limit: the number of replies that may run and wait at the same time; it may be changed."""

    def __init__(self, limit: int) -> None:
        self.closed = False
        self.limit = limit
        self._requests: dict[ActiveRequest, int] = {}  # with the number of their replies
        self._seconds = 1.0  # moving average of how long a reply takes

    @property
    def active(self) -> int:
        """How many replies run or wait."""
        return sum(self._requests.values())

    def admit(self, request: ActiveRequest, replies: int) -> None:
        """Count `replies` more for the request. Raises Overloaded when they do not fit now, InvalidRequest when they
        never would, Unavailable during shutdown."""
        if self.closed:
            raise shutting_down()
        if replies > self.limit:
            raise InvalidRequest(
                f"The request asks for {replies} replies, but this server gives at most {self.limit} at once.",
                param="n",
                hint="Split the request, or raise FORTWO_QUEUE.",
            )
        active = self.active
        if active + replies > self.limit:
            # Little's law: a reply ends every self._seconds / active seconds.
            raise Overloaded(
                f"The server is at its limit of {self.limit} replies: {active} run or wait.",
                retry_after=max(1, math.ceil(replies * self._seconds / active)),
                hint="Try again after the seconds in the header Retry-After, or raise FORTWO_QUEUE.",
            )
        self._requests[request] = self._requests.get(request, 0) + replies

    def release(self, request: ActiveRequest, replies: int, seconds: float | None = None) -> None:
        """Stop counting `replies` of the request. seconds: how long one of them took, if it ran."""
        left = self._requests.pop(request, 0) - replies
        if left > 0:
            self._requests[request] = left
        if seconds is not None:
            self._seconds += LATEST_WEIGHT * (seconds - self._seconds)

    async def drain(self, seconds: float) -> None:
        """Admit no more requests. Those in flight get `seconds` to finish; then they are stopped."""
        self.closed = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self._requests and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        for request in list(self._requests):
            request.stop()


def shutting_down() -> Unavailable:
    """The error for requests that arrive during shutdown."""
    error = Unavailable("The server is shutting down.", hint="Try again when it is back.")
    error.retry_after = RETRY_SECONDS
    return error
