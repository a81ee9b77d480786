"""The event streams of jobs: woken by the store when a job changes, so that an idle stream costs nothing.

Streams that are at the same event share one read of the database. A job of another server that uses the same database
is looked up every FOREIGN_SECONDS, because its changes are made elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

from fastapi.concurrency import run_in_threadpool

from fortwo.jobs.store import JobStore
from fortwo.server import sse
from fortwo.server.admission import shutting_down
from fortwo.server.errors import error_document
from fortwo.server.streams import StreamLimit

READ_SECONDS = 0.1  # the shortest time between two reads of a stream
FOREIGN_SECONDS = 2.0


@dataclass(frozen=True)
class News:
    """encoded: the events after the last one that was sent; last: the number of the newest; over: whether no more can
    come unless somebody asks for it; foreign: whether another server runs the job."""

    encoded: bytes
    last: int
    over: bool
    foreign: bool


class _Feed:
    """What the streams of one job share."""

    def __init__(self) -> None:
        self.streams = 0
        self.changed = asyncio.Event()
        self.reads: dict[int, asyncio.Task[News]] = {}  # since the last change, by the last event that was sent

    def wake(self) -> None:
        self.reads.clear()
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class JobEvents:
    """The event streams of all jobs of a server. All but `changed` is called on the event loop."""

    def __init__(self, store: JobStore, limit: StreamLimit) -> None:
        self._store = store
        self._limit = limit
        self._feeds: dict[str, _Feed] = {}
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        store.listen(self.changed)

    def changed(self, job_id: str) -> None:
        """Wake the streams of a job, from any thread."""
        if self._loop is not None and job_id in self._feeds:
            try:
                self._loop.call_soon_threadsafe(self._wake, job_id)
            except RuntimeError:  # the loop has been closed
                return

    def _wake(self, job_id: str) -> None:
        if job_id in self._feeds:
            self._feeds[job_id].wake()

    def close(self) -> None:
        """End all streams, because the server is shutting down."""
        self._closed = True
        for feed in self._feeds.values():
            feed.wake()

    def open(self, job_id: str) -> None:
        """Count one more stream of a job; `release` ends it. Raises Overloaded when there are too many."""
        self._limit.take()
        self._loop = asyncio.get_running_loop()
        self._feeds.setdefault(job_id, _Feed()).streams += 1

    def release(self, job_id: str) -> None:
        self._limit.release()
        feed = self._feeds[job_id]
        feed.streams -= 1
        if not feed.streams:
            del self._feeds[job_id]

    async def read(self, job_id: str, after: int) -> News:
        """What is new of a job whose stream is open."""
        reads = self._feeds[job_id].reads
        if after not in reads:
            reads[after] = asyncio.create_task(run_in_threadpool(self._read, job_id, after))
            reads[after].add_done_callback(lambda done: done.cancelled() or done.exception())  # all may have gone
        return await asyncio.shield(reads[after])

    def _read(self, job_id: str, after: int) -> News:
        job, events = self._store.news(job_id, after)
        frames = []
        for event in events:
            data = asdict(event)
            del data["job_id"]
            frames.append(sse.encode(data, id=event.id, event=event.type))
        over = job.ended_or_paused and not events
        return News(b"".join(frames), events[-1].id if events else after, over, job.owner != self._store.owner)

    async def stream(self, job_id: str, last: int) -> AsyncIterator[bytes]:
        """The encoded events after `last`, as they happen, until the job has ended or is paused. During shutdown the
        last one, `shutdown`, says so."""
        while not self._closed:
            changed = self._feeds[job_id].changed
            news = await self.read(job_id, last)
            if news.over:
                return
            if news.encoded:
                last = news.last
                yield news.encoded
                continue
            try:
                async with asyncio.timeout(FOREIGN_SECONDS if news.foreign else None):
                    await changed.wait()
                await asyncio.sleep(READ_SECONDS)
            except TimeoutError:
                self._feeds[job_id].reads.clear()
        yield sse.encode(error_document(shutting_down()), event="shutdown")
