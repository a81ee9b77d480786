"""The server's process: listens, and ends so that nobody is left without an answer.

On SIGTERM or Ctrl-C new requests get status 503; replies under way have some seconds to end by themselves and are then
cut off with the reason; then the house is closed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from fortwo.server.app import create_app
from fortwo.server.house import House

GRACE_SECONDS = 5  # for replies under way
CLOSE_SECONDS = 5  # after that, for connections to take their last words


class Server(uvicorn.Server):
    """Of a house that is open; closes it. on_start: called when it listens."""

    def __init__(self, house: House, on_start: Callable[[], None] | None = None, grace: float = GRACE_SECONDS) -> None:
        settings = house.settings
        super().__init__(
            uvicorn.Config(
                create_app(house),
                host=settings.host,
                port=settings.port,
                log_level="warning",
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self._house = house
        self._on_start = on_start
        self._grace = grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_start is not None:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._house.admission.drain(0 if self.force_exit else self._grace)
        await super().shutdown(sockets)
        self._house.close()  # here, because uvicorn ends the process by the signal that it got
