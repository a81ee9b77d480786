"""The requests that came with a key of `fortwo keys create`: they count against its limits, and end when it is revoked.

Everything here runs on the event loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from fortwo.errors import FortwoError, Overloaded, Unauthorized
from fortwo.jobs.api_keys import ApiKey, ApiKeyStore

T = TypeVar("T")
THREADS = 4  # that read keys, so that no other work makes a request wait for its key
WATCH_SECONDS = 0.5  # how often it is looked up whether keys of running requests were revoked
RETRY_SECONDS = 1


class RateLimited(Overloaded):
    code = "rate_limit_exceeded"


class TokenBucket:
    """At most `per_minute` requests at once, and as many in each minute on average. now: seconds of a steady clock."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = per_minute
        self._left = float(per_minute)
        self._at = now

    def take(self, now: float) -> float:
        """Count one request. The seconds to wait until it is allowed; 0 if it is allowed and was counted."""
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60)
        self._at = now
        if self._left < 1:
            return (1 - self._left) * 60 / self._per_minute
        self._left -= 1
        return 0.0


class KeyUsage:
    """Finds keys, and runs the requests that came with them."""

    def __init__(self, keys: ApiKeyStore) -> None:
        self._keys = keys
        self._limiter = CapacityLimiter(THREADS)
        self._buckets: dict[str, TokenBucket] = {}  # by the digest of the key, as below
        self._running: dict[str, set[asyncio.Timeout]] = {}
        self._watching: asyncio.Task[None] | None = None

    async def find(self, key: str) -> ApiKey | None:
        """As ApiKeyStore.find, which is asked each time: a key that was revoked is not accepted any more."""
        return await self._read(lambda: self._keys.find(key))

    async def run(self, key: ApiKey, request: Callable[[], Awaitable[None]]) -> None:
        """Run a request. Raises RateLimited when the key is at a limit, and Unauthorized when it is revoked meanwhile,
        which cancels the request."""
        self._count(key)
        running = self._running.setdefault(key.digest, set())
        try:
            async with asyncio.timeout(None) as ending:
                running.add(ending)
                if self._watching is None or self._watching.done():
                    self._watching = asyncio.create_task(self._watch())
                await request()
        except TimeoutError:
            if not ending.expired():
                raise
            raise Unauthorized(
                f"The API key {key.name!r} was revoked.", hint="Create another one with: fortwo keys create"
            ) from None
        finally:
            running.discard(ending)
            if not running:
                self._running.pop(key.digest, None)

    def _count(self, key: ApiKey) -> None:
        under_way = len(self._running.get(key.digest, ()))
        if key.concurrent is not None and under_way >= key.concurrent:
            raise RateLimited(
                f"The API key {key.name!r} has {under_way} requests under way, and its limit is {key.concurrent}.",
                retry_after=RETRY_SECONDS,
                hint="Wait for one to end, close event streams that nobody reads, or create a key with a higher "
                "--concurrent.",
            )
        if key.requests_per_minute is None:
            return
        now = asyncio.get_running_loop().time()
        if key.digest not in self._buckets:
            self._buckets[key.digest] = TokenBucket(key.requests_per_minute, now)
        if wait := self._buckets[key.digest].take(now):
            raise RateLimited(
                f"The API key {key.name!r} is at its limit of {key.requests_per_minute} requests a minute.",
                retry_after=math.ceil(wait),
                hint="Try again after the seconds in the header Retry-After, or create a key with a higher "
                "--requests-per-minute.",
            )

    async def _watch(self) -> None:
        """End the requests of revoked keys, until no request with a key runs."""
        while self._running:
            await asyncio.sleep(WATCH_SECONDS)
            with suppress(FortwoError):  # a database that refuses now is asked again
                valid = {key.digest for key in await self._read(self._keys.all)}
                for digest in self._running.keys() - valid:
                    for ending in self._running[digest]:
                        if not ending.expired():
                            ending.reschedule(0)

    async def _read(self, read: Callable[[], T]) -> T:
        return await to_thread.run_sync(read, limiter=self._limiter)
