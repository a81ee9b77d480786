"""The uvicorn server, with a shutdown that answers every request.

On SIGTERM or Ctrl-C new requests get status 503. Replies in flight have some seconds to finish and then end with an
error that names the reason; then the application's state is closed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from fortwo.server import log_filter
from fortwo.server.app import create_app
from fortwo.server.protocol import limited
from fortwo.server.state import AppState

GRACE_SECONDS = 5  # for replies in flight
BACKLOG = 128  # connections that the system may hold until they are accepted
CLOSE_SECONDS = 5  # after that, for connections to send their last bytes


class Server(uvicorn.Server):
    """Serves an open AppState, and closes it at the end. on_start: called when the server listens. grace: seconds that
    replies in flight get at shutdown. on_stop: called last of all."""

    def __init__(
        self,
        state: AppState,
        on_start: Callable[[], None] | None = None,
        grace: float = GRACE_SECONDS,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(state),
                host=state.settings.host,
                port=state.settings.port,
                log_config=None,
                log_level="warning",
                access_log=False,  # server.observation writes it
                timeout_graceful_shutdown=CLOSE_SECONDS,
                http=limited(state.settings.max_connections),
                backlog=BACKLOG,
            )
        )
        log_filter.install()
        self._state = state
        self._on_start = on_start
        self._grace = grace
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._state.exports.open()
        if self.started and self._on_start is not None:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.job_events.close()
        await self._state.admission.drain(0 if self.force_exit else self._grace)
        self._state.end_calls()
        await self._state.exports.close()
        await super().shutdown(sockets)
        self._state.close()  # here, because uvicorn then ends the process with the signal that it received
        await asyncio.to_thread(self._on_stop)
