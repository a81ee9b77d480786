"""From the device's thread to the event loop: together, in order, and whatever one of them does."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

import pytest

from fortwo.server.event_loop_bridge import EventLoopBridge


def test_what_was_put_arrives_in_order_and_in_one_crossing(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []

    async def listen() -> list[int]:
        bridge, loop = EventLoopBridge(), asyncio.get_running_loop()
        crossings: list[object] = []
        cross = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (crossings.append(call), cross(*call)))

        def step(first: int) -> None:
            for number in range(first, first + 32):
                bridge.add(loop, partial(heard.append, number))
            bridge.flush()
            bridge.flush()

        await asyncio.to_thread(lambda: [step(0), step(32)])
        while len(heard) < 64:
            await asyncio.sleep(0)
        return [len(call[1]) for call in crossings if call[0].__module__ == EventLoopBridge.__module__]  # type: ignore[index]

    assert asyncio.run(asyncio.wait_for(listen(), 10)) == [32, 32]
    assert heard == list(range(64))


def test_one_that_fails_silences_no_other(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    def fail() -> None:
        raise ValueError("the client is a teapot")

    async def listen() -> None:
        bridge, loop = EventLoopBridge(), asyncio.get_running_loop()
        for call in (fail, lambda: heard.append("the other")):
            bridge.add(loop, call)
        bridge.flush()
        await asyncio.sleep(0.01)

    asyncio.run(listen())
    assert heard == ["the other"]
    assert "teapot" in caplog.text


def test_a_loop_that_has_ended_is_told_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    bridge, loop = EventLoopBridge(), asyncio.new_event_loop()
    bridge.add(loop, lambda: None)
    loop.close()
    with caplog.at_level(logging.WARNING):
        bridge.flush()
    assert "closed" in caplog.text
    with pytest.raises(RuntimeError, match="closed"):
        bridge.add(loop, lambda: None)
