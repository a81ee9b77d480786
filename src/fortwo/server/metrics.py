"""GET /metrics: what the server does, in the text format of Prometheus.

Requests are counted by `server.request_metrics`. Everything else is read when Prometheus asks, and nothing waits for
the device. Labels are routes, methods, statuses and names of bases: never a prompt, a key or a path of a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fortwo.engine import statistics
from fortwo.jobs.database import DATABASE_ERRORS
from fortwo.jobs.store import STATUSES, JobStore
from fortwo.records import Json
from fortwo.server.state import AppState, AppStateDep

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

router = APIRouter(tags=["server"])


@router.get(
    "/metrics", response_class=PlainTextResponse, summary="What the server does, in the text format of Prometheus"
)
async def metrics(state: AppStateDep) -> PlainTextResponse:
    jobs = await asyncio.get_running_loop().run_in_executor(state.probes, _read_jobs, state.jobs)
    now = CollectorRegistry()
    now.register(_State(state, jobs, await state.families()))
    return PlainTextResponse(
        generate_latest(state.request_metrics.registry) + generate_latest(now), media_type=CONTENT_TYPE
    )


@dataclass(frozen=True)
class _Jobs:
    """counts: by status; running: the progress of each active job."""

    counts: dict[str, int]
    running: list[tuple[str, Json]]


def _read_jobs(store: JobStore) -> _Jobs | None:
    """None when the database refuses."""
    try:
        return _Jobs(store.counts(), store.running())
    except DATABASE_ERRORS:
        return None


class _State(Collector):
    """What is read when Prometheus asks."""

    def __init__(self, state: AppState, jobs: _Jobs | None, more: Iterable[Metric]) -> None:
        self._state = state
        self._jobs = jobs
        self._more = more

    def collect(self) -> Iterator[Metric]:
        yield from _engine(self._state.engine.statistics)
        yield from _bases(self._state.engine.loads())
        yield from _server(self._state)
        yield _gauge("fortwo_database_up", "Whether the database can be read.", int(self._jobs is not None))
        if self._jobs is not None:
            yield from _training(self._jobs)
        yield from self._more


def _engine(found: statistics.EngineStatistics) -> Iterator[Family]:
    yield _counter("fortwo_prompt_tokens", "Tokens of prompts, without those of jobs.", found.prompt_tokens)
    yield _counter("fortwo_cached_prompt_tokens", "Those of them that the prefix cache had.", found.cached_tokens)
    yield _counter("fortwo_generation_tokens", "Tokens of replies, without those of jobs.", found.generated_tokens)
    yield _counter("fortwo_preemptions", "Requests that waited again because the cache was full.", found.preemptions)
    yield _histogram(
        "fortwo_time_to_first_token_seconds",
        "From a request to its first token, the wait for its turn included.",
        found.first_token_seconds,
    )
    yield _histogram("fortwo_batch_size", "Rows of each decode step.", found.batch_rows)


def _bases(loads: list[statistics.BaseLoad]) -> Iterator[Family]:
    running = GaugeMetricFamily("fortwo_requests_running", "Requests that the base computes.", labels=["model"])
    waiting = GaugeMetricFamily("fortwo_requests_waiting", "Requests that wait for their turn.", labels=["model"])
    tokens = GaugeMetricFamily("fortwo_cache_tokens", "Tokens that the cache has memory for now.", labels=["model"])
    usage = GaugeMetricFamily("fortwo_cache_usage_ratio", "The share of its limit that it has.", labels=["model"])
    for load in loads:
        running.add_metric([load.id], load.running)
        waiting.add_metric([load.id], load.waiting)
        tokens.add_metric([load.id], load.cache_tokens)
        if load.cache_limit:
            usage.add_metric([load.id], load.cache_tokens / load.cache_limit)
    yield from (running, waiting, tokens, usage)


def _server(state: AppState) -> Iterator[Family]:
    loaded = state.registry.state()
    yield _gauge("fortwo_replies_active", "Replies of clients that run or wait.", state.admission.active)
    yield _gauge("fortwo_event_streams", "Event streams of jobs and exports.", state.streams.count)
    yield _gauge("fortwo_models_loaded", "Bases in memory.", len(loaded.models))
    yield _gauge("fortwo_adapters_loaded", "Adapters in memory.", len(loaded.adapters))
    yield _counter("fortwo_adapter_loads", "How often an adapter was loaded.", state.registry.adapter_loads)


def _training(jobs: _Jobs) -> Iterator[Family]:
    counts = GaugeMetricFamily("fortwo_jobs", "Jobs of this server.", labels=["status"])
    for status in STATUSES:
        counts.add_metric([status], jobs.counts.get(status, 0))
    yield counts
    steps = [progress.get("step") or 0 for _, progress in jobs.running]
    planned = [progress.get("steps") or 0 for _, progress in jobs.running]
    rates = [progress.get("tokens_per_second") or 0.0 for _, progress in jobs.running]
    yield _gauge("fortwo_training_step", "The last step of the job that runs; 0 if none does.", sum(steps))
    yield _gauge("fortwo_training_steps_planned", "The steps that its plan has.", sum(planned))
    yield _gauge("fortwo_training_tokens_per_second", "Tokens a second of its last step.", sum(rates))


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _histogram(name: str, text: str, found: statistics.Histogram) -> HistogramMetricFamily:
    bounds = [*(str(float(bound)) for bound in found.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(found.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=found.sum)
