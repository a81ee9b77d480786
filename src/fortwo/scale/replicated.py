"""The head: a whole fortwo server whose requests to models are answered by replicas.

Its own engine runs jobs and their exams. It alone has the database and writes to the home.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware import Middleware

from fortwo.adapters.store import AdapterStore
from fortwo.errors import Conflict, Unavailable
from fortwo.records import Json
from fortwo.scale.forwarding import ForwardMiddleware
from fortwo.scale.pins import Pin
from fortwo.scale.ray_serve import ReplicaSet
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppState, join_store
from fortwo.settings import Settings

if TYPE_CHECKING:
    from fortwo.jobs.workers import TrainingCluster
    from fortwo.server.state import MakeEngine

MOST_REPLICAS = 1000


class ReplicatedState(AppState):
    """AppState with replicas. Raises also what ReplicaSet raises."""

    replicas: ReplicaSet

    def _build(
        self, settings: Settings, built: ExitStack, make_engine: MakeEngine | None, cluster: TrainingCluster | None
    ) -> None:
        self.replicas = ReplicaSet(settings)
        built.callback(self.replicas.close)
        if cluster is not None:
            cluster.leave_room(self.replicas.taken)
        self._preparing = CapacityLimiter(1)
        super()._build(settings, built, make_engine, cluster)
        self._one_limit = self.admission.limit
        self._adjust_limit()
        self.middleware = (
            Middleware(
                ForwardMiddleware,
                handle=self.replicas.handle,
                admission=self.admission,
                pin=self.pin,
                default=settings.default_model,
            ),
        )
        self.routers = (_router(self),)

    def _adapter_store(self, settings: Settings, built: ExitStack) -> AdapterStore:
        return join_store(settings, built, self.replicas)

    def checks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {"replicas": self._check_replicas}

    async def _check_replicas(self) -> None:
        """Raises Unavailable when no replica runs."""
        if not await run_in_threadpool(self.replicas.running):
            raise Unavailable("no replica runs", hint="GET /api/replicas shows those that do.")

    async def families(self) -> Sequence[Metric]:
        wanted = GaugeMetricFamily("fortwo_replicas_wanted", "Replicas that there should be.", self.replicas.wanted)
        replies = GaugeMetricFamily("fortwo_replica_replies_active", "Replies that run or wait.", labels=["replica"])
        adapters = GaugeMetricFamily("fortwo_replica_adapters_loaded", "Adapters in memory.", labels=["replica"])
        read = CounterMetricFamily("fortwo_replica_prompt_tokens", "Tokens of prompts.", labels=["replica"])
        written = CounterMetricFamily("fortwo_replica_generation_tokens", "Tokens of replies.", labels=["replica"])
        for one in await run_in_threadpool(self.replicas.describe):
            label = [one["id"]]
            replies.add_metric(label, one["replies"])
            adapters.add_metric(label, len(one["adapters"]))
            read.add_metric(label, one["prompt_tokens"])
            written.add_metric(label, one["generation_tokens"])
        return wanted, replies, adapters, read, written

    async def pin(self, model: str) -> Pin:
        """What the name means now. A base is prepared first if necessary, because replicas only read the home. Raises
        NotFound, and what Catalog.prepare raises."""
        pin, base = await run_in_threadpool(self._look_up, model)
        if pin is not None:
            return pin
        await to_thread.run_sync(self.catalog.prepare, base, limiter=self._preparing)
        return await self.pin(model)

    def _look_up(self, model: str) -> tuple[Pin | None, str]:
        """The pin, and the base that it needs; None if the base must be prepared first."""
        ref = self.ref_of(model)
        version = self.registry.version_of(ref)
        if version is not None:
            return Pin(model, version.id, version.digest), version.base_model
        info = self.catalog.model_info(ref)
        return None if info is None else Pin(model, ref, info.digest), ref

    def scale(self, replicas: int) -> None:
        self.replicas.scale(replicas)
        self._adjust_limit()

    def _adjust_limit(self) -> None:
        self.admission.limit = self._one_limit * self.replicas.wanted


class ScaleRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    replicas: int = Field(ge=1, le=MOST_REPLICAS, description="How many replicas there should be.")


def _router(state: ReplicatedState) -> APIRouter:
    router = APIRouter(prefix="/api/replicas", tags=["server"], route_class=JsonRoute)

    @router.get("", summary="The replicas that answer, and how many there should be")
    def replicas() -> Json:
        """Each with its machine, the replies that it computes, and the bases and adapters in its memory."""
        return {"wanted": state.replicas.wanted, "replicas": state.replicas.describe()}

    @router.put("", summary="Change how many replicas there should be")
    async def scale(request: Request, body: ScaleRequest) -> Json:
        """A new one answers when it is ready. One that is too many finishes its requests first."""
        await state.control.run(request, lambda _: state.scale(body.replicas))
        return await run_in_threadpool(replicas)

    return router


def check_address(host: str, port: int) -> None:
    """Raises Conflict when the address is in use: replicas take long to start, so this is seen before."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Conflict(
                f"The server cannot listen on {host}:{port}: {error.strerror}.",
                param="port",
                hint="Stop the server that listens there, or choose another one with --port.",
            ) from None


def create(settings: Settings, cluster: TrainingCluster | None = None) -> ReplicatedState:
    """The head with its replicas, which are ready. cluster: whose workers compute the gradients of jobs. Raises what
    check_address and ReplicatedState raise."""
    check_address(settings.host, settings.port)
    return ReplicatedState(settings, cluster=cluster)
