"""From a request to a published adapter: plan, queue, train, evaluate, publish, one job at a time.

A request is checked and planned before it becomes a job, so bad input never does. A thread of its own takes jobs in
order of arrival; `jobs.turn` has each taught while it is its turn, and the device's thread never waits for the
database. Every job ends: succeeded, failed with a reason, or cancelled; or it is paused and waits to be resumed.
The rows a job was given are kept with it, so that changing the file later changes nothing; of a large file its
checksum is, and a change is refused.

Checkpoints are kept as long as a job can go on from them: a run that came to its end, whichever, or was cancelled
leaves none behind.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fortwo.adapters.store import check_name
from fortwo.data import formats
from fortwo.errors import (
    Conflict,
    FortwoError,
    InvalidRequest,
    NotFound,
    TrainingFailed,
    Unavailable,
)
from fortwo.facts.subject import facts_of
from fortwo.jobs import parents
from fortwo.jobs.checkpoints import CheckpointStore
from fortwo.jobs.diary import begun
from fortwo.jobs.machine import machine_of, try_out
from fortwo.jobs.store import ACTIVE, INTERRUPTED, Job, JobStore, Note, Status
from fortwo.jobs.turn import POLL_SECONDS, Taught, Teacher, Turn
from fortwo.records import Dataset, Json, Plan
from fortwo.settings import Settings
from fortwo.train import plan as plans
from fortwo.train.dataset_stats import collect_stats
from fortwo.train.parent import Parent
from fortwo.train.request import TrainingRequest

if TYPE_CHECKING:
    from fortwo.adapters.store import AdapterStore
    from fortwo.engine.engine import Engine
    from fortwo.engine.registry import LoadedModel, ModelRegistry
    from fortwo.execution.calibration import Trial
    from fortwo.hub.catalog import Catalog

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
CANCEL_SECONDS = 10.0  # how long `cancel` waits for the micro-step under way, and `pause` for the step
CLOSE_SECONDS = 3.0  # how long a server that ends waits for the step under way


class JobRunner:
    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        adapters: AdapterStore,
        engine: Engine,
        registry: ModelRegistry,
        store: JobStore,
        checkpoints: CheckpointStore,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._engine = engine
        self._registry = registry
        self._store = store
        self._checkpoints = checkpoints
        self._adapters = adapters
        self._lock = threading.Lock()
        self._trials: dict[str, Trial] = {}  # by the digest of the base
        self._teacher = Teacher(adapters, engine, registry, store, checkpoints, self._lock)
        self._turn: Turn | None = None
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fortwo-jobs", daemon=True)

    # ------------------------------------------------------------ any thread

    def start(self) -> None:
        """Fail what ran when the last server died, or queue it again if the settings say so; take up the queue."""
        for job_id in self._store.mark_interrupted():
            if self._settings.resume:
                self._queue_again(job_id, ("failed",))
        self._checkpoints.sweep()
        self._remove_checkpoints_of_ended_jobs()
        self._thread.start()

    def close(self) -> None:
        """Interrupt the job that runs, at the end of its step if that is near; queued ones stay queued."""
        with self._lock:
            self._closing = True
            turn = self._turn
            if turn is not None and turn.end is None:
                turn.end = "interrupted"
        self._wake.set()
        if turn is not None and not turn.ended.wait(CLOSE_SECONDS):
            with self._lock:
                if turn.task is not None:
                    turn.task.cancel()
        self._thread.join()

    def plan(self, request: TrainingRequest) -> Plan:
        """What the request would do. Raises InvalidRequest naming field, value and remedy; nothing is written."""
        return self._resolve(request)[1]

    def submit(self, request: TrainingRequest) -> Job:
        """Check and plan the request, then queue it."""
        dataset, plan = self._resolve(request)
        if self._closing:
            raise Unavailable("The server is shutting down.", hint="Try again when it is back.")
        job = self._store.create(
            model=plan.model,
            adapter_name=plan.adapter_name,
            dataset=formats.to_json(dataset),
            plan=plans.to_json(plan),
            progress=begun(plan.computed["steps"]),
        )
        self._wake.set()
        return job

    def cancel(self, job_id: str) -> Job:
        """Give a job up, queued, paused or running, and its checkpoints; what it is some seconds later is returned."""
        note = Note("cancelled", "Cancelled while it did not run.", level="warn")
        if self._store.update(job_id, note, when=("queued", "paused"), status="cancelled", finished_at=time.time()):
            self._forget(job_id)
            return self._store.get(job_id)
        with self._lock:
            turn = self._turn_of(job_id)
            if turn is not None:
                turn.end, turn.refused = "cancelled", None
                if turn.task is not None:
                    turn.task.cancel()
        return self._settled(job_id, turn, "Only a job that has not ended can be cancelled.")

    def pause(self, job_id: str) -> Job:
        """Take a job out of the queue, or stop it behind the step under way with a checkpoint; the next job's turn has
        come. What it is after a few seconds is returned. Raises StorageFailed when the checkpoint cannot be written;
        then the job goes on."""
        note = Note("paused", "Paused while it was queued.")
        if self._store.update(job_id, note, when=("queued",), status="paused"):
            return self._store.get(job_id)
        with self._lock:
            turn = self._turn_of(job_id)
            if turn is not None and turn.end is None:
                turn.end, turn.refused = "paused", None
        return self._settled(job_id, turn, "Only a job that is queued or runs can be paused.")

    def resume(self, job_id: str) -> Job:
        """Queue a job again that was paused, failed or was cancelled, by the plan it had. It goes on from its last
        checkpoint; one that came to its end or was cancelled has none and starts from the beginning."""
        old = self._store.get(job_id)
        if not self._queue_again(job_id, ("paused", "failed", "cancelled"), queued_at=time.time()):
            raise Conflict(
                f"Job {job_id} is {old.status}.",
                param="job_id",
                hint="Only a paused, failed or cancelled job can be resumed.",
            )
        self._wake.set()
        return self._store.get(job_id)

    def _queue_again(self, job_id: str, when: tuple[Status, ...], **changes: Any) -> bool:
        steps = self._store.get(job_id).plan["computed"]["steps"]
        kept = self._checkpoints.of(job_id)
        manifest = kept[-1].manifest if kept else {"progress": begun(steps), "actual": None}
        place = f"it goes on from step {kept[-1].version}" if kept else "it starts from the beginning"
        return self._store.update(
            job_id,
            Note("queued", f"Queued again; {place}."),
            when=when,
            status="queued",
            started_at=None,
            finished_at=None,
            progress=manifest["progress"],
            actual=manifest["actual"],
            report=None,
            adapter=None,
            error=None,
            **changes,
        )

    def _turn_of(self, job_id: str) -> Turn | None:
        return self._turn if self._turn is not None and self._turn.job.id == job_id else None

    def _settled(self, job_id: str, turn: Turn | None, hint: str) -> Job:
        """The job, once what was asked of it has happened, or it takes too long."""
        deadline = time.monotonic() + CANCEL_SECONDS
        while turn is not None and not turn.ended.wait(POLL_SECONDS) and time.monotonic() < deadline:
            if turn.refused is not None:
                raise turn.refused
        job = self._store.get(job_id)
        if turn is None and job.at_rest:
            participle = f"is {job.status}" if job.status == "paused" else f"has already {job.status}"
            raise Conflict(f"Job {job_id} {participle}.", param="job_id", hint=hint)
        return job

    def _remove_checkpoints_of_ended_jobs(self) -> None:
        """Folders that the database does not know are left alone and reported: the database may be the wrong one."""
        unknown = []
        for name in self._checkpoints.jobs():
            try:
                status = self._store.get(name).status
            except NotFound:
                unknown.append(name)
                continue
            if status in ("succeeded", "cancelled"):
                self._checkpoints.remove(name)
        if unknown:
            log.warning(
                "%s holds %d folder(s) of jobs that the database does not know; nothing in them was changed: %s. "
                "If the database was moved or lost, stop the server and put it back. Otherwise delete them by hand.",
                self._settings.jobs_dir,
                len(unknown),
                ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else ""),
            )

    def _resolve(self, request: TrainingRequest) -> tuple[Dataset, Plan]:
        check_free(request.adapter_name, self._catalog)
        dataset = formats.load(request.dataset, self._settings.allowed_data_dirs)
        parent, resident = self._start(request)
        if parent is not None:
            dataset = replace(dataset, parent_facts=parent.facts_to_keep(facts_of(dataset)))
        cache = resident.runner.cache
        base = plans.BaseFacts.of(resident.id, resident.decoder, cache.bound, cache.dtype.itemsize)
        trial = self._trials.get(resident.digest)
        if trial is None:
            trial = self._trials[resident.digest] = self._engine.call(lambda: try_out(resident.backend)).result()
        machine = machine_of(trial, self._store.last_actual(resident.id))
        counts, dataset_warnings = collect_stats(resident.renderer, plans.training_rows(dataset))
        return dataset, plans.resolve(request, dataset, base, counts, machine, dataset_warnings, parent)

    def _start(self, request: TrainingRequest) -> tuple[Parent | None, LoadedModel]:
        """What the run goes on from, if the request names it, and the base, which then has to be its own."""
        model = self._settings.default_model if request.model is None else request.model
        if request.parent is None:
            return None, self._registry.load_base(model)
        version, parent = parents.find(request.parent, self._adapters)
        if request.model is None:
            return parent, self._registry.base_of(version)
        resident = self._registry.load_base(model)
        if resident.digest != version.base_digest:
            raise InvalidRequest(
                f"parent = {version.id!r} was trained on {version.base_model!r} with digest {version.base_digest}; "
                f"model = {model!r} has digest {resident.digest}",
                param="parent",
                hint="Leave `model` out: the parent's own base is taken.",
            )
        return parent, resident

    # ------------------------------------------------------------ the runner's own thread

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                self._store.mark_interrupted()
                job = self._store.next_queued()
                if job is not None:
                    self._take(job)
                    continue
                self._wake.wait()
            except Exception:  # the database refuses: the queue outlives it, and what it lost is told when it can be
                log.exception("the database refuses")
                self._wake.wait(RETRY_SECONDS)

    def _take(self, job: Job) -> None:
        """One job, from its turn to its end."""
        turn = Turn(job)
        with self._lock:
            note = Note("preparing", f"Loading {job.model}.")
            if self._closing or not self._store.update(
                job.id, note, when=("queued",), status="preparing", started_at=time.time()
            ):
                return
            self._turn = turn
        try:
            self._conclude(job, self._teacher.teach(turn))
        except CancelledError:
            self._stopped(turn)
        except TrainingFailed as error:
            self._fail(job, error.body()["error"])
            self._forget(job.id)
        except FortwoError as error:
            self._fail(job, error.body()["error"])
        except Exception as error:
            log.exception("job %s failed", job.id)
            self._fail(job, FortwoError(f"The job failed: {type(error).__name__}: {error}").body()["error"])
        else:
            self._forget(job.id)
        finally:
            with self._lock:
                self._turn = None
            turn.ended.set()

    def _conclude(self, job: Job, taught: Taught) -> None:
        version = taught.version
        adapter = {"name": version.name, "version": version.version, "digest": version.digest}
        if taught.missed is None:
            note = Note("succeeded", f"{version.id} is published and current.", {"adapter": adapter})
            self._end(job, "succeeded", note, adapter=adapter)
        else:
            self._fail(job, taught.missed.body()["error"], adapter=adapter)

    def _stopped(self, turn: Turn) -> None:
        """The run was closed before its time."""
        job = turn.job
        if turn.end == "cancelled":
            self._end(job, "cancelled", Note("cancelled", "Cancelled.", level="warn"))
            self._forget(job.id)
        elif turn.end == "paused":
            self._store.update(job.id, Note("paused", f"Paused behind step {turn.saved}."), status="paused")
        elif turn.end == "interrupted" and self._settings.resume:
            self._queue_again(job.id, ACTIVE)
        else:
            self._fail(job, INTERRUPTED)

    def _forget(self, job_id: str) -> None:
        """Remove the checkpoints of a job that is done."""
        self._registry.discard(self._checkpoints.remove(job_id))

    def _fail(self, job: Job, error: Json, **changes: Any) -> None:
        self._end(job, "failed", Note("failed", error["message"], {"error": error}, "error"), error=error, **changes)

    def _end(self, job: Job, status: Status, note: Note, **changes: Any) -> None:
        self._store.update(job.id, note, status=status, finished_at=time.time(), **changes)


def check_free(name: str, catalog: Catalog) -> None:
    """Whether an adapter may be called this. A base model's id would hide it: chat names both in one field."""
    check_name(name)
    if name in (entry.id for entry in catalog.entries()):
        raise InvalidRequest(
            f"adapter_name = {name!r} is the id of a base model.", param="adapter_name", hint="Choose another name."
        )
