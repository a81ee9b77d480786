"""Where the server and the workers of one run meet: steps go one way, gradients the other.

It is an actor of the Ray cluster. Nobody calls the workers, they ask for steps. So the server needs not know which
processes they are, and workers that were started again ask for the step that has no gradient yet.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from fortwo.records import Json
from fortwo.train.losses import Accumulated


@dataclass(frozen=True)
class Gradient:
    """The gradient of a whole step, flat, and what it was made of."""

    gradient_N: np.ndarray
    found: Accumulated


@dataclass(frozen=True)
class News:
    """groups: how often a group of workers has begun so far; error: why workers gave the run up, as FortwoError.body
    has it; gradient: that of the step that was asked for, if it is there."""

    groups: int
    error: Json | None
    gradient: Gradient | None


class StepExchange:
    """The methods of the actor. Steps are numbered from 1; there is one at a time."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._closed = False
        self._error: Json | None = None
        self._groups = 0
        self._posted: tuple[int, list[Any]] = (0, [])
        self._finished: tuple[int, Gradient | None] = (0, None)

    # ------------------------------------------------------------ for the server

    async def post(self, number: int, step: list[Any]) -> None:
        """Give the workers a step. step: a list with the reference of a gradients.Step, so that Ray sends the step to
        the workers and not here."""
        await self._set(_posted=(number, step))

    async def news(self, number: int, groups: int) -> News:
        """Wait for the gradient of a step, for an error, or for a group of workers beyond the first `groups`."""

        def there() -> bool:
            return self._error is not None or self._groups > groups or self._finished[0] == number

        async with self._changed:
            await self._changed.wait_for(there)
        done, gradient = self._finished
        return News(self._groups, self._error, gradient if done == number else None)

    async def close(self) -> None:
        """Let the workers end."""
        await self._set(_closed=True)

    # ------------------------------------------------------------ for the workers

    async def begin(self) -> None:
        """All workers of a group are ready."""
        await self._set(_groups=self._groups + 1)

    async def next_step(self, after: int) -> tuple[int, list[Any]] | None:
        """Wait for a step behind number `after` that has no gradient yet; None once the run is over."""

        def over() -> bool:
            return self._closed or self._error is not None

        async with self._changed:
            await self._changed.wait_for(lambda: over() or self._posted[0] > max(after, self._finished[0]))
        return None if over() else self._posted

    async def finish(self, number: int, gradient: Gradient) -> None:
        await self._set(_finished=(number, gradient))

    async def fail(self, error: Json) -> None:
        """A worker gives the run up, because another one would, too."""
        await self._set(_error=error)

    async def _set(self, **changes: Any) -> None:
        async with self._changed:
            vars(self).update(changes)
            self._changed.notify_all()
