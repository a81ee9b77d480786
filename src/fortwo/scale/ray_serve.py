"""The replicas of a server, as an application of Ray Serve: started, told of publications, counted and stopped.

On one machine Ray is started here and ends with the server. FORTWO_RAY_ADDRESS names a cluster that runs already.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ReplicaState
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fortwo import hardware
from fortwo.errors import Conflict, FortwoError, InvalidRequest, Unavailable, all_of
from fortwo.home import home_id
from fortwo.hub.catalog import Catalog
from fortwo.prompts import MAX_RUNNING
from fortwo.records import AdapterVersion, Json
from fortwo.scale.pins import Pin
from fortwo.scale.ray_cluster import connect
from fortwo.scale.replica import Replica, check_home
from fortwo.settings import Settings

log = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 100 << 20  # of a local cluster: only parts of replies lie in it
START_SECONDS = 600  # for the first replica to be ready
CONTROL_SECONDS = 120  # for all replicas to load a version or to drop one
DESCRIBE_SECONDS = 5
HEALTH_SECONDS = 5
STARTS = 3  # of a replica that ends while it starts
POLL_SECONDS = 0.2
DEPLOYMENT = "Replica"
OF_THE_HEAD = ("api_key", "database_url", "replicas", "train", "jobs", "worker_cpus", "shard")  # no replica reads them


class ReplicaRefused(Conflict):
    code = "replica_refused"


class ReplicaSet:
    """Started on construction; `close` stops the replicas. A store's Followers.

    settings.replicas: how many there are. Raises Unavailable when the cluster cannot be reached or no replica becomes
    ready, StoreNotShared when a machine cannot read the home, and InvalidRequest for too few GPUs."""

    def __init__(self, settings: Settings) -> None:
        assert settings.replicas is not None
        self.wanted = settings.replicas
        self._settings = settings
        self._name = f"fortwo-{home_id(settings.home)[:12]}"
        self._local = settings.ray_address is None
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        hardware.limit_spinning()  # a Ray that is started here hands its environment on
        self._connected = connect(settings, OBJECT_STORE_BYTES)
        self._deployed = False
        try:
            self._check_gpus()
            self._arguments = _arguments(settings, self.wanted)
            check_machines(settings.home.absolute(), *self._arguments[1:])
            serve.start(proxy_location="Disabled")
            self._deploy()
            self._deployed = True
            self._wait()
            self.handle: DeploymentHandle[Any] = serve.get_app_handle(self._name)
        except BaseException:
            self.close()
            raise

    @property
    def _cpus(self) -> int:
        """CPUs of Ray that a replica takes. On one machine the cores are shared by their threads."""
        return 0 if self._local else int(self._arguments[0]["threads"])

    @property
    def _gpus(self) -> int:
        return 1 if self._settings.device.startswith("cuda") else 0

    def taken(self) -> dict[str, float]:
        """Resources of the cluster that others cannot have."""
        return {"CPU": self.wanted * self._cpus, "GPU": self.wanted * self._gpus}

    def _check_gpus(self) -> None:
        """Raises InvalidRequest when this machine has fewer GPUs than replicas; a cluster may still grow."""
        there = int(ray.cluster_resources().get("GPU", 0))
        if self._local and self._settings.device.startswith("cuda") and there < self.wanted:
            raise InvalidRequest(
                f"replicas = {self.wanted} with device = {self._settings.device!r} need a GPU each, and this machine "
                f"has {there}.",
                param="replicas",
                hint="Start fewer replicas, set FORTWO_DEVICE to cpu, or join a cluster with FORTWO_RAY_ADDRESS.",
            )

    def _deploy(self) -> None:
        """Tell Serve how many replicas there should be. Those that run stay as they are."""
        version = hashlib.sha256(repr(self._arguments).encode()).hexdigest()
        deployment = serve.deployment(Replica).options(
            name=DEPLOYMENT,
            num_replicas=self.wanted,
            max_ongoing_requests=MAX_RUNNING,
            graceful_shutdown_timeout_s=self._settings.request_timeout,
            graceful_shutdown_wait_loop_s=POLL_SECONDS,
            health_check_period_s=HEALTH_SECONDS,
            max_constructor_retry_count=STARTS,
            ray_actor_options={"num_cpus": self._cpus, "num_gpus": self._gpus},
            version=version,  # else Serve would replace all replicas to change their number
            _internal=True,
        )
        target = serve.RunTarget(target=deployment.bind(*self._arguments), name=self._name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

    def _wait(self) -> None:
        """Until all replicas are ready. Raises Unavailable."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            found = serve.status().applications[self._name]
            if found.status == ApplicationStatus.RUNNING:
                return
            if found.status == ApplicationStatus.DEPLOY_FAILED:
                messages = [one.message for one in found.deployments.values()]
                raise Unavailable(
                    f"The replicas do not start: {' '.join(messages) or found.message}",
                    param="replicas",
                    hint="The log of Ray has more: /tmp/ray/session_latest/logs/serve on the machine of the replica.",
                )
            time.sleep(POLL_SECONDS)
        raise Unavailable(
            f"After {START_SECONDS} seconds not all of the {self.wanted} replicas were ready. The cluster has "
            f"{ray.cluster_resources().get('CPU', 0):g} CPUs and {ray.cluster_resources().get('GPU', 0):g} GPUs; each "
            f"replica takes {self._arguments[0]['threads']} CPUs.",
            param="replicas",
            hint="Add machines to the cluster, or set --replicas or FORTWO_THREADS to less.",
        )

    def scale(self, replicas: int) -> None:
        """Change how many there are. Those that are too many answer their requests in flight and then end."""
        self.wanted = replicas
        self._deploy()

    def describe(self) -> list[Json]:
        """What each replica holds and does (see Replica.describe), by id; nothing while one does not answer."""
        try:
            found = self._ask("describe", seconds=DESCRIBE_SECONDS)
        except TimeoutError:
            return []
        return sorted(found, key=lambda one: str(one["id"]))

    def running(self) -> int:
        """How many replicas pass Serve's health checks."""
        states = serve.status().applications[self._name].deployments[DEPLOYMENT].replica_states
        return int(states.get(ReplicaState.RUNNING, 0))

    def before_current(self, version: AdapterVersion) -> None:
        pin = Pin(version.id, version.id, version.digest)
        self._agree(
            "prepare",
            vars(pin),
            f"{version.id} is stored, but does not become current",
            f"Then run: fortwo adapters promote {version.id}",
        )

    def before_delete(self, versions: Sequence[AdapterVersion]) -> None:
        refs = [version.id for version in versions]
        if refs:
            self._agree("unload", refs, f"{', '.join(refs)} cannot be deleted", "Then delete it again.")

    def _agree(self, method: str, argument: object, what: str, remedy: str) -> None:
        """Call a method of all replicas. Raises ReplicaRefused naming those that refuse."""
        try:
            answers = self._ask(method, argument, seconds=CONTROL_SECONDS)
        except TimeoutError:
            raise Unavailable(
                f"{what}: a replica did not answer within {CONTROL_SECONDS} seconds.",
                hint=f"See GET /api/replicas. {remedy}",
            ) from None
        refusals = [
            ReplicaRefused(
                f"{what}: replica {one['id']} on {one['machine']} refuses it: {one['error']['message']}",
                param="adapter_name",
                hint=f"{one['error']['hint']} {remedy}",
            )
            for one in answers
            if one["error"] is not None
        ]
        if refusals:
            raise all_of(refusals)

    def _ask(self, method: str, *arguments: object, seconds: float) -> list[Json]:
        """What a method of each replica returns. One that ends meanwhile is left out: its successor reads the store
        itself. Raises TimeoutError."""
        try:
            answers = self.handle.broadcast(method, *arguments).results(timeout_s=seconds, return_exceptions=True)
        except serve.exceptions.DeploymentUnavailableError:  # none runs at present
            return []
        for one in answers:
            if isinstance(one, BaseException) and not isinstance(one, RayError):
                raise one
        return [one for one in answers if not isinstance(one, BaseException)]

    def close(self) -> None:
        """Stop the replicas, and leave Ray. One that was started for them ends."""
        if self._deployed and not (self._local and self._connected):
            with suppress(TimeoutError):  # their last requests take longer than Serve waits here
                serve.delete(self._name, _blocking=not self._local)
        if self._connected:
            ray.shutdown()
        self._deployed = self._connected = False


def _arguments(settings: Settings, replicas: int) -> tuple[Json, str | None, dict[str, str]]:
    """Of each Replica."""
    given = settings.model_dump(mode="json", exclude=set(OF_THE_HEAD), exclude_none=True)
    threads = settings.threads or max(1, (os.cpu_count() or 1) // replicas)
    device = "cuda" if settings.device.startswith("cuda") else settings.device  # Ray gives each its own
    more = {"home": str(settings.home.absolute()), "threads": threads, "device": device}
    catalog = Catalog(settings.models_dir)
    infos = [catalog.model_info(entry.id) for entry in catalog.entries()]
    id = home_id(settings.home) if settings.adapters_url is None else None  # else each machine may have its own home
    return {**given, **more}, id, {info.id: info.digest for info in infos if info is not None}


def check_machines(home: Path, id: str | None, digests: dict[str, str]) -> None:
    """Raises StoreNotShared, with all findings, unless each machine of the cluster passes `check_home`."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    checks = [
        ray.remote(_check_machine)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(home, id, digests, node["NodeManagerHostname"])
        for node in nodes
    ]
    if findings := [error for error in ray.get(checks) if error is not None]:
        raise all_of(findings)


def _check_machine(home: Path, id: str | None, digests: dict[str, str], machine: str) -> FortwoError | None:
    try:
        check_home(home, id, digests, machine)
    except FortwoError as error:
        return error
    return None
