"""Who may come in: replies that clients have under way, at most so many, and none once the server is to end.

All of it happens on the event loop, so nothing is locked. Jobs ask the engine directly and are not counted.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from fortwo.errors import InvalidRequest, Overloaded, Unavailable

RETRY_SECONDS = 5  # after which another server may stand in this one's place
MEMORY = 0.1  # weight of the latest reply in the average
POLL_SECONDS = 0.05


class Guest(Protocol):
    """The replies to one request."""

    def stop(self) -> None:
        """The server cannot wait for them any longer."""


class Admission:
    """places: replies that may run and wait together."""

    def __init__(self, places: int) -> None:
        self.closed = False
        self._places = places
        self._guests: dict[Guest, int] = {}  # with how many replies
        self._seconds = 1.0  # a reply takes, the latest ones weighing most

    @property
    def open(self) -> int:
        return sum(self._guests.values())

    def enter(self, guest: Guest, replies: int) -> None:
        """Raises Overloaded when they do not all fit now, InvalidRequest when they never do, Unavailable."""
        if self.closed:
            raise closing()
        if replies > self._places:
            raise InvalidRequest(
                f"{replies} replies are more than the {self._places} that this server gives at once.",
                param="n",
                hint="Ask in parts, or raise FORTWO_QUEUE.",
            )
        taken = self.open
        if taken + replies > self._places:
            raise Overloaded(
                f"{taken} replies run or wait; more than {self._places} may not.",
                retry_after=max(
                    1, math.ceil(replies * self._seconds / taken)
                ),  # Little's law: a place in seconds/taken
                hint="Try again after the seconds in the header Retry-After, or raise FORTWO_QUEUE.",
            )
        self._guests[guest] = self._guests.get(guest, 0) + replies

    def leave(self, guest: Guest, replies: int, seconds: float | None = None) -> None:
        """That many have ended. seconds: how long one of them took."""
        left = self._guests.pop(guest, 0) - replies
        if left > 0:
            self._guests[guest] = left
        if seconds is not None:
            self._seconds += MEMORY * (seconds - self._seconds)

    async def drain(self, seconds: float) -> None:
        """Nobody comes in any more. Whoever is in has `seconds` to end by himself, and is then told to go."""
        self.closed = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self._guests and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        for guest in list(self._guests):
            guest.stop()


def closing() -> Unavailable:
    error = Unavailable("The server is shutting down.", hint="Try again when it is back.")
    error.retry_after = RETRY_SECONDS
    return error
