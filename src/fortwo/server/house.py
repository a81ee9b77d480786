"""Everything a server owns, built in order and closed in reverse: catalog, adapters, engine, residents, jobs.

One house to a home: a second server there would take the first one's running jobs for interrupted ones.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from fortwo.errors import Conflict
from fortwo.kernels import isa
from fortwo.server.admission import Admission, closing
from fortwo.server.errors import respond
from fortwo.server.relay import Relay
from fortwo.server.security import check_binding
from fortwo.settings import Settings

if TYPE_CHECKING:
    from fortwo.adapters.store import AdapterStore
    from fortwo.engine.engine import Engine
    from fortwo.engine.residents import Residents, Target
    from fortwo.hub.catalog import Catalog
    from fortwo.jobs.checkpoints import CheckpointStore
    from fortwo.jobs.runner import JobRunner
    from fortwo.jobs.store import JobStore


class House:
    """Nothing is built before `open`; nothing of it is used after `close`."""

    catalog: Catalog
    adapters: AdapterStore
    engine: Engine
    residents: Residents
    jobs: JobStore
    checkpoints: CheckpointStore
    runner: JobRunner
    admission: Admission

    def __init__(self, settings: Settings) -> None:
        check_binding(settings)
        self.settings = settings
        self.relay = Relay()
        self._closing = ExitStack()
        self._loading = CapacityLimiter(1)  # as it is done one at a time
        self._loads: dict[str, asyncio.Future[Target]] = {}

    def open(self) -> None:
        """Build all of it and take up the queue of jobs. This loads torch, but no model."""
        isa.cap(self.settings.isa)
        from fortwo.adapters.store import AdapterStore
        from fortwo.engine.engine import RUNNING, Engine
        from fortwo.engine.residents import Residents
        from fortwo.hub.catalog import Catalog
        from fortwo.jobs.checkpoints import CheckpointStore
        from fortwo.jobs.runner import JobRunner
        from fortwo.jobs.store import JobStore
        from fortwo.kernels import cpu

        cpu.prepare()
        with ExitStack() as built:
            built.enter_context(_only_one(self.settings))
            self.catalog = Catalog(self.settings)
            self.adapters = AdapterStore(self.settings.adapters_dir)
            self.engine = Engine(self.settings.threads, self.relay.send)
            self.engine.start()
            built.callback(self.engine.close)
            self.checkpoints = CheckpointStore(self.settings.jobs_dir)
            self.residents = Residents(self.settings, self.catalog, self.adapters, self.engine, self.checkpoints)
            self.jobs = JobStore(self.settings.database)
            built.callback(self.jobs.close)
            self.runner = JobRunner(
                self.settings, self.catalog, self.adapters, self.engine, self.residents, self.jobs, self.checkpoints
            )
            self.runner.start()
            built.callback(self.runner.close)
            self.admission = Admission(RUNNING + self.settings.queue)
            self._closing = built.pop_all()

    async def resolve(self, model: str) -> Target:
        """Who answers to this name, loaded if need be. Those who wait for that take no threads that others need, and
        may go away meanwhile. Raises what Residents.resolve does."""
        target = await run_in_threadpool(self.residents.find, model)
        return target if target is not None else await asyncio.shield(self._load(model))

    def _load(self, model: str) -> asyncio.Future[Target]:
        """One for all who wait for this name."""
        if (load := self._loads.get(model)) is None:
            loading = to_thread.run_sync(self.residents.resolve, model, limiter=self._loading)
            load = self._loads[model] = asyncio.ensure_future(loading)
            load.add_done_callback(lambda done: self._loaded(model, done))
        return load

    def _loaded(self, model: str, load: asyncio.Future[Target]) -> None:
        del self._loads[model]
        if not load.cancelled():
            load.exception()  # nobody may be left to hear it

    def close(self) -> None:
        """Jobs are interrupted, replies end, then the house is empty."""
        self._closing.close()


@contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / ".server.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"Another server already uses {settings.home}.",
                param="home",
                hint="Stop it, or give this one a folder of its own with FORTWO_HOME.",
            ) from None
        yield


class Door:
    """ASGI middleware: once the server is to end, every new request is told so."""

    def __init__(self, app: ASGIApp, house: House) -> None:
        self._app = app
        self._house = house

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._house.admission.closed:
            await respond(closing(), {"Connection": "close"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _here(request: Request) -> House:
    house: House = request.app.state.house
    return house


Here = Annotated[House, Depends(_here)]
