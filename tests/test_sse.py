"""Server-sent events: their encoding, keep-alive comments, and how a stream ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message

from fortwo.server import sse

Send = Callable[[Message], Awaitable[None]]
SCOPE: dict[str, Any] = {"type": "http", "asgi": {"spec_version": "2.3"}}


def test_an_event_is_ascii_json_with_its_id_and_type() -> None:
    assert sse.encode({"text": "é\u2028"}) == b'data: {"text":"\\u00e9\\u2028"}\n\n'
    assert sse.encode([1], id=7, event="step") == b"id: 7\nevent: step\ndata: [1]\n\n"


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def disconnect() -> Message:
    await asyncio.sleep(0.01)
    return {"type": "http.disconnect"}


async def events(count: int, seconds: float = 0.0) -> AsyncIterator[bytes]:
    for number in range(count):
        await asyncio.sleep(seconds)
        yield b"%d" % number


async def stream(
    source: AsyncIterator[bytes], receive: Any = never, send: Send | None = None, seconds: float | None = None
) -> tuple[bytes, list[str]]:
    """What is sent, and whether on_close was called."""
    sent: list[bytes] = []
    closed: list[str] = []

    async def collect(message: Message) -> None:
        sent.append(message.get("body", b""))

    deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
    response = sse.EventStream(source, deadline, lambda: closed.append("closed"))
    assert response.headers["content-type"].startswith("text/event-stream")
    await asyncio.wait_for(response(SCOPE, receive, send or collect), 10)
    return b"".join(sent), closed


def test_a_stream_sends_all_events_and_closes() -> None:
    assert asyncio.run(stream(events(3))) == (b"012", ["closed"])


def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.01)
    sent, _ = asyncio.run(stream(events(1, seconds=0.2)))
    assert sent.startswith(sse.KEEP_ALIVE)
    assert sent.replace(sse.KEEP_ALIVE, b"") == b"0"


def test_a_stream_ends_when_its_client_disconnects() -> None:
    assert asyncio.run(stream(events(1, seconds=60), disconnect)) == (b"", ["closed"])


def test_a_stream_ends_at_its_deadline_although_the_client_does_not_read() -> None:
    async def stuck(message: Message) -> None:
        await never()

    assert asyncio.run(stream(events(1), send=stuck, seconds=0.05)) == (b"", ["closed"])
