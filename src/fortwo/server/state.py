"""The application's state: catalog, adapters, engine, registry and jobs, built in order and closed in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from prometheus_client.metrics_core import Metric
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from fortwo import hardware
from fortwo.home import home_id, lock_home
from fortwo.jobs import fine_tuned_models
from fortwo.jobs.api_keys import ApiKeyStore
from fortwo.jobs.store import JobStore
from fortwo.kernels import isa
from fortwo.prompts import MAX_RUNNING
from fortwo.records import Json
from fortwo.server.admission import Admission, shutting_down
from fortwo.server.errors import respond
from fortwo.server.event_loop_bridge import EventLoopBridge
from fortwo.server.export_queue import ExportQueue
from fortwo.server.key_usage import KeyUsage
from fortwo.server.request_metrics import RequestMetrics
from fortwo.server.security import check_api_key, needs_key
from fortwo.server.streams import StreamLimit
from fortwo.server.workers import WorkerPool
from fortwo.settings import Settings

if TYPE_CHECKING:
    from fortwo.adapters.store import AdapterStore, Followers
    from fortwo.engine.engine import Engine
    from fortwo.engine.registry import Target
    from fortwo.jobs.workers import TrainingCluster
    from fortwo.quantization.selection import Measurements

    MakeEngine = Callable[[Settings, Callable[[], None]], Engine]  # from the settings and Engine's flush

PLANNING_THREADS, PLANNING_WAITING = 2, 8  # requests that read whole datasets
DOWNLOAD_THREADS, DOWNLOAD_WAITING = 2, 8  # those that may download them first
CONTROL_THREADS, CONTROL_WAITING = 8, 64  # requests that wait for the device or for a job's step


def join_store(settings: Settings, built: ExitStack, followers: Followers | None = None) -> AdapterStore:
    """The home's adapters, which take over what other servers publish if they are kept under a URL. Raises what
    `open_store` and SharedAdapterStore.join raise."""
    from fortwo.adapters.shared import SharedAdapterStore, open_store

    store = open_store(settings.adapters_dir, settings.adapters_url, followers)
    if isinstance(store, SharedAdapterStore):
        store.join()
        store.follow()
        built.callback(store.close)
    return store


class ServingState:
    """What answers requests to models: catalog, adapters, engine and registry, with their limits."""

    def _build_serving(
        self, settings: Settings, built: ExitStack, measured: Path, make_engine: MakeEngine | None = None
    ) -> None:
        """measured: folder of the files that remember what was measured on this machine."""
        hardware.limit_spinning()  # both before torch is imported
        isa.cap(settings.isa)
        from fortwo.hub.catalog import Catalog
        from fortwo.jobs.checkpoints import CheckpointStore
        from fortwo.kernels import cpu
        from fortwo.quantization.matmul import remember_fp32_kernel
        from fortwo.quantization.selection import Measurements

        cpu.prepare()
        self.settings = settings
        self.running = MAX_RUNNING * (settings.device.count(",") + 1)  # replies that are computed together
        self.admission = Admission(self.running + settings.queue)
        self.bridge = EventLoopBridge()
        self._load_limiter = CapacityLimiter(1)  # the registry loads one model at a time
        self._loads: dict[str, asyncio.Future[Target]] = {}
        remember_fp32_kernel(measured / "fp32_kernel.json")
        self.catalog = Catalog(settings.models_dir)
        self.adapters = self._adapter_store(settings, built)
        self.checkpoints = CheckpointStore(settings.jobs_dir)
        assert (settings.engine == "own") == (make_engine is None)
        self._build_engines(settings, built, Measurements(measured), make_engine)

    def _build_engines(
        self, settings: Settings, built: ExitStack, measurements: Measurements, make_engine: MakeEngine | None
    ) -> None:
        """Engine and registry for replies, and a second pair of them where jobs have a device of their own."""
        from fortwo.engine.data_parallel import DataParallelEngine
        from fortwo.engine.devices import find_devices
        from fortwo.engine.engine import Engine
        from fortwo.engine.registry import ModelRegistry

        devices, training_device = find_devices(settings.device, settings.train_device)
        threads, sharing = settings.threads, [*devices, training_device].count(devices[0])
        if sharing > 1 and threads is None:
            threads = max(1, hardware.cores() // sharing)
        registry = partial(
            ModelRegistry,
            self.catalog,
            self.adapters,
            checkpoints=self.checkpoints,
            measurements=measurements,
            weights=settings.weights,
            threads=threads,
            max_adapters=settings.max_adapters,
            cache_mb=settings.cache_mb,
        )

        def started(engine: Engine) -> Engine:
            engine.start()
            built.callback(engine.close)
            return engine

        training = None
        if training_device is not None:
            training = registry(engine=started(Engine(threads)), device=training_device)
        flush = self.bridge.flush
        others = [Engine(threads, flush) for _ in devices[1:]]
        if make_engine is not None:
            engine = make_engine(settings, flush)
        else:
            engine = DataParallelEngine(threads, flush, others) if others else Engine(threads, flush)
        self.engine = started(engine)
        copies = list(zip(others, devices[1:], strict=True))
        self.registry = registry(engine=engine, device=devices[0], training=training, copies=copies)

    def _adapter_store(self, settings: Settings, built: ExitStack) -> AdapterStore:
        return join_store(settings, built)

    async def resolve(self, model: str) -> Target:
        """The weights that a model name means, loaded if necessary. Waiting for the load takes no thread that other
        requests need, and may be cancelled. Raises what ModelRegistry.resolve raises."""
        target = await run_in_threadpool(self.registry.find, model)
        return await asyncio.shield(self._load(model)) if target is None else target

    def _load(self, model: str) -> asyncio.Future[Target]:
        """The load that all requests for this name share."""
        if (load := self._loads.get(model)) is None:
            loading = to_thread.run_sync(self.registry.resolve, model, limiter=self._load_limiter)
            load = self._loads[model] = asyncio.ensure_future(loading)
            load.add_done_callback(lambda done: self._loaded(model, done))
        return load

    def _loaded(self, model: str, load: asyncio.Future[Target]) -> None:
        del self._loads[model]
        if not load.cancelled():
            load.exception()  # marks it as retrieved: all that waited may have gone


class AppState(ServingState):
    """Everything the server uses, built here and released by `close`. Building it imports torch, but loads no model.
    make_engine: what builds the engine, where it is not fortwo's own. cluster: its workers compute the gradients of
    jobs, and it is closed with the state; None for this process. Raises InvalidRequest for a host that needs an
    API key and for an API key that is not a server's, Conflict when another server uses the home.

    middleware: sees a request last, right before its route; routers: what the server answers besides fortwo's API."""

    middleware: Sequence[Middleware] = ()
    routers: Sequence[APIRouter] = ()

    def __init__(
        self, settings: Settings, make_engine: MakeEngine | None = None, cluster: TrainingCluster | None = None
    ) -> None:
        with ExitStack() as built:
            built.enter_context(lock_home(settings.home))
            self.jobs = JobStore(settings.database, home_id(settings.home))
            built.callback(self.jobs.close)
            keys, api_key = ApiKeyStore(self.jobs), settings.plain_api_key
            check_api_key(None if api_key is None else keys.find(api_key))
            self.keyed = needs_key(settings.host, api_key, created=bool(keys.all()))
            self.key_usage = KeyUsage(keys)
            if cluster is not None:
                built.callback(cluster.close)
            self._build(settings, built, make_engine, cluster)
            self._closing = built.pop_all()

    def _build(
        self, settings: Settings, built: ExitStack, make_engine: MakeEngine | None, cluster: TrainingCluster | None
    ) -> None:
        self._build_serving(settings, built, settings.home, make_engine)
        from fortwo.hub.datasets import HubDatasets
        from fortwo.jobs.files import FileStore
        from fortwo.jobs.idempotency import AnswerStore
        from fortwo.jobs.runner import JobRunner
        from fortwo.server.job_events import JobEvents

        self.request_metrics = RequestMetrics()
        self.planning = WorkerPool("planning", PLANNING_THREADS, PLANNING_WAITING)
        built.callback(self.planning.close)
        self.downloads = WorkerPool("downloads", DOWNLOAD_THREADS, DOWNLOAD_WAITING)
        built.callback(self.downloads.close)
        self.probes = ThreadPoolExecutor(1, thread_name_prefix="fortwo-probes")  # health never waits for other work
        built.callback(self.probes.shutdown, wait=False)
        self.control = WorkerPool("control", CONTROL_THREADS, CONTROL_WAITING)
        built.callback(self.control.close)
        self.adapters.remove_expired()
        self.streams = StreamLimit(settings.max_streams)
        self.job_events = JobEvents(self.jobs, self.streams)
        self.exports = ExportQueue(settings)
        self.files = FileStore(self.jobs, settings.files_dir, HubDatasets(settings.hub_datasets_dir))
        self.files.clean()
        self.answers = AnswerStore(self.jobs)
        self.runner = JobRunner(
            settings,
            self.catalog,
            self.adapters,
            self.engine,
            self.registry,
            self.jobs,
            self.checkpoints,
            self.files,
            cluster,
        )
        self.runner.start()
        built.callback(self.runner.close)

    def checks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """What /readyz asks by name, besides device, queue and database; each raises FortwoError if it is not ready."""
        return {}

    async def families(self) -> Sequence[Metric]:
        """Families of metrics besides those of `server.metrics`."""
        return ()

    def readers(self, *sources: Json) -> WorkerPool:
        """The threads for a request that reads these datasets. A download may take hours, so it takes none of those
        that other requests need."""
        return self.downloads if any("hub" in source for source in sources) else self.planning

    async def resolve(self, model: str) -> Target:
        ref = await run_in_threadpool(self.ref_of, model)
        return replace(await super().resolve(ref), name=model)

    def ref_of(self, model: str) -> str:
        """The base, adapter or version that a model name means: the same, but for a fine-tuned model's name. Raises
        NotFound."""
        return fine_tuned_models.adapter_ref(model, self.jobs) if model.startswith(fine_tuned_models.PREFIX) else model

    def end_calls(self) -> None:
        """Tell long calls to stop, because the server is shutting down."""
        self.planning.stop()
        self.downloads.stop()
        self.control.stop()

    def close(self) -> None:
        """Interrupt the running job, end all replies and release everything."""
        self._closing.close()


class ShutdownMiddleware:
    """ASGI middleware: answers every new request with 503 once the shutdown has begun."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._state.admission.closed:
            await respond(shutting_down(), {"Connection": "close"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _get_state(request: Request) -> AppState:
    state: AppState = request.app.state.fortwo
    return state


AppStateDep = Annotated[AppState, Depends(_get_state)]
