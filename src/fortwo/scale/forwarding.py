"""Hands requests that a model answers to a replica, and its response back to the client.

The head has checked the key, the body's size and the limits before. It pins the version that the request means, so the
reply comes from one that was current after the request had come and before the reply went.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi.concurrency import run_in_threadpool
from pydantic_core import to_json
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fortwo import log_context
from fortwo.errors import FortwoError, Unavailable
from fortwo.records import Json
from fortwo.scale.pins import REPLICA_ROUTES, Pin, requested_model
from fortwo.scale.replica import GONE
from fortwo.server import sse
from fortwo.server.admission import Admission
from fortwo.server.errors import error_document, plain_body, respond, unexpected
from fortwo.server.request_body import LARGE_BYTES
from fortwo.server.workers import until_disconnect

SENT_ON = ("method", "path", "raw_path", "query_string", "headers", "scheme", "http_version", "server", "client")
ATTEMPTS = 3  # with a version that is deleted each time before the replica reads it
RETRY_SECONDS = 1


class ReplicaLost(Unavailable):
    code = "replica_lost"
    retry_after = RETRY_SECONDS


class ForwardMiddleware:
    """ASGI middleware: answers the requests of REPLICA_ROUTES by a replica, and leaves the others to the application,
    also those whose model it cannot pin: the application knows what is wrong with them.

    pin: the Pin of a model's name; raises FortwoError. default: the default model, as in requested_model. Every replica
    holds it, so any of them answers for it; requests for other models go where they are in memory."""

    def __init__(
        self,
        app: ASGIApp,
        handle: DeploymentHandle[Any],
        admission: Admission,
        pin: Callable[[str], Awaitable[Pin]],
        default: str,
    ) -> None:
        self._app = app
        self._handle = handle
        self._admission = admission
        self._pin = pin
        self._default = default

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) not in REPLICA_ROUTES:
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:  # the client has gone
            return
        model = await self._model(scope, body)
        pin = None if model is None else await self._pinned(model)
        if model is None or pin is None:
            await self._app(scope, _replay(body, receive), send)
            return
        scope["route"] = _Route(scope["path"])
        answer = _Answer(self._handle, scope, body, send, anywhere=self._default)
        try:
            self._admission.admit(answer, 1)
        except FortwoError as error:
            await respond(error)(scope, receive, send)
            return
        began = asyncio.get_running_loop().time()
        try:
            with suppress(Unavailable):  # the client has gone
                await until_disconnect(receive, answer.run(pin, lambda: self._pin(model)))
        finally:
            self._admission.release(answer, 1, asyncio.get_running_loop().time() - began)

    async def _model(self, scope: Scope, body: bytes) -> str | None:
        given = scope["path"], scope["query_string"], body, self._default
        return await run_in_threadpool(requested_model, *given) if len(body) >= LARGE_BYTES else requested_model(*given)

    async def _pinned(self, model: str) -> Pin | None:
        try:
            return await self._pin(model)
        except FortwoError:
            return None


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None when the client disconnects first."""
    parts: list[bytes] = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body again, and then what else comes."""
    again = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return again.pop() if again else await receive()

    return replay


@dataclass(frozen=True)
class _Route:
    """By whose path requests are counted."""

    path: str


class _Answer:
    """One request on its way through a replica; an ActiveRequest. anywhere: a base for which any replica answers."""

    def __init__(self, handle: DeploymentHandle[Any], scope: Scope, body: bytes, send: Send, anywhere: str) -> None:
        self._anywhere = anywhere
        self._handle = handle
        self._scope = scope
        self._body = body
        self._send = send
        self._started = False
        self._kind = ""  # of the content
        self._events = 0  # that were sent
        self._running: asyncio.Task[bool] | None = None
        self._stopped: FortwoError | None = None

    def stop(self) -> None:
        self._stopped = Unavailable(
            "The reply was cut off: the server is shutting down.", hint="Ask again when it is back."
        )
        if self._running is not None:
            self._running.cancel()

    async def run(self, pin: Pin, pin_again: Callable[[], Awaitable[Pin]]) -> None:
        """Send the response of a replica to the client, or an error in its place, or at its end."""
        try:
            for _ in range(ATTEMPTS):
                self._running = asyncio.create_task(self._forward(pin))
                if await self._cancelled_with(self._running):
                    return
                earlier, pin = pin, await pin_again()
                if earlier == pin:
                    break
            raise Unavailable(
                f"A replica does not find {pin.ref}, which the head has.",
                hint="See whether all machines see the same FORTWO_HOME, and send the request again.",
                code="store_not_shared",
            )
        except FortwoError as error:
            await self._fail(error)
        except asyncio.CancelledError:
            if self._stopped is None:
                raise
            await self._fail(self._stopped)
        except Exception as error:
            await self._fail(unexpected(error))

    async def _cancelled_with(self, task: asyncio.Task[bool]) -> bool:
        """The result of a task, which is cancelled when the caller is."""
        try:
            return await task
        finally:
            task.cancel()

    async def _forward(self, pin: Pin) -> bool:
        """Whether the response was sent; False if the pinned version is gone. Raises ReplicaLost when the replica ends
        before the response does."""
        place = "" if pin.ref == self._anywhere else pin.ref
        call = self._handle.options(stream=True, multiplexed_model_id=place)
        scope = {name: self._scope[name] for name in SENT_ON if name in self._scope}
        scope["headers"] = [one for one in scope["headers"] if one[0] != b"authorization"]  # keys stay at the head
        parts = call.answer.remote(scope, self._body, vars(pin), log_context.request_id.get())
        finished = False
        try:
            async for part in parts:
                if part == GONE:
                    return False
                await self._pass_on(part)
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            finished = True
        except RayTaskError:  # the replica is alive, and fortwo has a defect
            finished = True
            raise
        except (RayError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
            finished = not isinstance(error, TaskCancelledError)
            raise ReplicaLost(
                "The replica that computed this reply has ended.",
                hint="Send the request again: another replica answers it.",
            ) from error
        finally:
            if not finished:
                parts.cancel()
        return True

    async def _pass_on(self, part: Json | bytes) -> None:
        if isinstance(part, bytes):
            self._events += part.count(b"\n\n")
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
            return
        self._started = True
        self._kind = next((value for name, value in part["headers"] if name == b"content-type"), b"").decode()
        await self._send({"type": "http.response.start", **part})

    async def _fail(self, error: FortwoError) -> None:
        """Tell the client. Once a stream has begun, an error can only be sent as its last event."""
        if not self._started:
            await respond(error)(self._scope, _nothing, self._send)
        elif event := last_event(self._scope["path"], self._kind, error, self._events):
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            raise error  # the connection is closed in the middle of the body


def last_event(path: str, kind: str, error: FortwoError, number: int) -> bytes | None:
    """The event with which a stream of this content type ends in an error; None for a body that is no stream. number:
    of the events before it."""
    if kind.startswith("application/x-ndjson"):
        return to_json(plain_body(error)) + b"\n"
    if not kind.startswith("text/event-stream"):
        return None
    if path != "/v1/responses":
        return sse.encode(error_document(error))
    fields: Json = {"code": error.code, "message": error.message, "param": error.param}
    return sse.encode({"type": "error", "sequence_number": number, **fields}, event="error")


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
