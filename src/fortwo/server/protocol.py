"""HTTP/1.1 as uvicorn speaks it, with limits: of connections, and of the size, the number and the time of headers. A
client that only opens connections, or sends a request byte by byte, cannot use the server up."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fortwo import hardware
from fortwo.errors import FortwoError, InvalidRequest, Unavailable
from fortwo.server.errors import error_document
from fortwo.server.observation import HEADER, new_request_id
from fortwo.server.request_body import BodyTimeout

HEADER_SECONDS = 10.0  # from a connection's first moment, or a request's first byte, to the end of the headers
HEADER_BYTES = 64 << 10
HEADERS = 200
OWN_FILES = 100  # descriptors that are left for files, the database and pipes
FEWEST = 8


class HeadersTooLarge(InvalidRequest):
    code = "headers_too_large"
    status = 431


class _TooLarge(Exception):
    """Ends the parsing of a request whose headers are too large."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. max_connections is set by `limited`."""

    max_connections = FEWEST

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._bytes = 0  # since the last whole headers
        self._too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(
                Unavailable(
                    f"The server is at its limit of {self.max_connections} connections.",
                    hint="Close connections that are not used, or raise FORTWO_MAX_CONNECTIONS and `ulimit -n`.",
                )
            )
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        before = self.cycle
        if self._deadline is None and (before is None or before.response_complete):
            self._await_headers()
        self._bytes += len(data)
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(self.url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(self._header_bytes + len(name) + len(value))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0

    def _count(self, size: int) -> None:
        self._header_bytes = size
        if size > HEADER_BYTES or len(self.headers) > HEADERS:
            self._too_large = True
            raise _TooLarge

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._refuse(
                HeadersTooLarge(
                    f"The headers have more than {HEADER_BYTES >> 10} KiB, or there are more than {HEADERS}.",
                    hint="Send fewer and shorter headers; data belongs into the body.",
                )
            )
        else:
            self._refuse(InvalidRequest("The request is not HTTP/1.1.", hint="Use http://, not https://."))

    def _await_headers(self) -> None:
        self._bytes = 0
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._on_deadline)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        answered = self.cycle is not None  # what still comes is the rest of a body that was refused
        if self._bytes and not answered:
            message = f"The headers did not arrive within {HEADER_SECONDS:g} seconds."
            self._refuse(BodyTimeout(message, code="headers_timeout", hint="Send the whole request at once."))
        else:
            self.transport.close()

    def _refuse(self, error: FortwoError) -> None:
        """Answer outside of the application and close the connection."""
        request_id = new_request_id()
        body = json.dumps(error_document(error, request_id)).encode()
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{HEADER.lower()}: {request_id}\r\nconnection: close\r\n\r\n"
        )
        if not self.transport.is_closing():
            self.transport.write(head.encode() + body)
            self.transport.close()


def limited(max_connections: int) -> type[LimitedProtocol]:
    """The protocol for a server with at most so many connections, or as many as the process may have open files."""
    files = hardware.open_files()
    most = max_connections if files is None else min(max_connections, files - OWN_FILES)
    return type("Protocol", (LimitedProtocol,), {"max_connections": max(FEWEST, most)})
