"""EventLoopBridge: calls arrive in one batch and in order, and one that fails does not affect the others."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

import pytest

from fortwo.server.event_loop_bridge import EventLoopBridge


def test_added_calls_arrive_in_order_and_in_one_crossing(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []

    async def receive() -> list[int]:
        bridge, loop = EventLoopBridge(), asyncio.get_running_loop()
        crossings: list[object] = []
        cross = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (crossings.append(call), cross(*call)))

        def step(first: int) -> None:
            for number in range(first, first + 32):
                bridge.add(loop, partial(received.append, number))
            bridge.flush()
            bridge.flush()

        await asyncio.to_thread(lambda: [step(0), step(32)])
        while len(received) < 64:
            await asyncio.sleep(0)
        return [len(call[1]) for call in crossings if call[0].__module__ == EventLoopBridge.__module__]  # type: ignore[index]

    assert asyncio.run(asyncio.wait_for(receive(), 10)) == [32, 32]
    assert received == list(range(64))


def test_a_call_that_fails_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    received: list[str] = []

    def fail() -> None:
        raise ValueError("the client is a teapot")

    async def receive() -> None:
        bridge, loop = EventLoopBridge(), asyncio.get_running_loop()
        for call in (fail, lambda: received.append("the other")):
            bridge.add(loop, call)
        bridge.flush()
        await asyncio.sleep(0.01)

    asyncio.run(receive())
    assert received == ["the other"]
    assert "teapot" in caplog.text


def test_a_closed_loop_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    bridge, loop = EventLoopBridge(), asyncio.new_event_loop()
    bridge.add(loop, lambda: None)
    loop.close()
    with caplog.at_level(logging.WARNING):
        bridge.flush()
    assert "closed" in caplog.text
    with pytest.raises(RuntimeError, match="closed"):
        bridge.add(loop, lambda: None)
