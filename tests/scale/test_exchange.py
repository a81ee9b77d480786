"""Steps reach workers that wait, and again those that began anew; gradients and errors reach the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import numpy as np
import pytest

from fortwo.scale.exchange import Gradient, StepExchange
from fortwo.train.losses import Accumulated

GRADIENT = Gradient(np.ones(3, np.float32), Accumulated(1.0, {}, 5, 0.1, 3))


async def soon(waiting: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(waiting, 10)


async def still(waiting: Any) -> None:
    """It waits, and goes on waiting."""
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(waiting, 0.05)


def test_a_step_is_handed_out_until_it_has_a_gradient() -> None:
    async def run() -> None:
        exchange = StepExchange()
        await still(exchange.next_step(0))
        await exchange.post(1, ["first"])
        assert await soon(exchange.next_step(0)) == (1, ["first"])
        assert await soon(exchange.next_step(0)) == (1, ["first"])  # workers that began anew
        await still(exchange.next_step(1))
        await exchange.finish(1, GRADIENT)
        await still(exchange.next_step(0))  # workers that began anew behind it
        await exchange.post(2, ["second"])
        assert await soon(exchange.next_step(0)) == (2, ["second"])
        assert await soon(exchange.next_step(1)) == (2, ["second"])

    asyncio.run(run())


def test_the_server_hears_of_workers_that_begin_and_of_the_gradient() -> None:
    async def run() -> None:
        exchange = StepExchange()
        await exchange.post(1, ["first"])
        await still(exchange.news(1, 0))
        await exchange.begin()
        news = await soon(exchange.news(1, 0))
        assert (news.groups, news.gradient, news.error) == (1, None, None)
        await still(exchange.news(1, 1))
        await exchange.finish(1, GRADIENT)
        assert (await soon(exchange.news(1, 1))).gradient is GRADIENT
        await still(exchange.news(2, 1))  # the gradient of another step is not this one's

    asyncio.run(run())


def test_an_error_and_the_end_of_the_run_let_workers_end() -> None:
    async def run() -> None:
        failed, closed = StepExchange(), StepExchange()
        waiting = asyncio.create_task(closed.next_step(0))
        await failed.post(1, ["first"])
        await failed.fail({"message": "no base"})
        assert await soon(failed.next_step(0)) is None
        assert (await soon(failed.news(1, 0))).error == {"message": "no base"}
        await closed.close()
        assert await soon(waiting) is None

    asyncio.run(run())
