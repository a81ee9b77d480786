"""The queue of training jobs: runs one job at a time, or as many as the settings say, and pauses, resumes and cancels
jobs.

A request is checked and planned before it becomes a job, so invalid input never becomes one. Threads take the jobs
in order of arrival and give each to `jobs.executor`; the device's thread never waits for the database. Every job
ends as succeeded, failed with a reason, or cancelled, or it is paused until it is resumed. The rows of a job are stored
with it, so that later changes of the file have no effect; for a large file its checksum is stored, and a change is
an error. Checkpoints exist as long as a job can resume from them: they are deleted when it has succeeded, has missed
its targets or was cancelled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from fortwo import log_context
from fortwo.data import datasets
from fortwo.errors import Conflict, FortwoError, NotFound, TrainingFailed, Unavailable
from fortwo.jobs.checkpoints import CheckpointStore
from fortwo.jobs.database import DATABASE_ERRORS
from fortwo.jobs.executor import POLL_SECONDS, JobExecutor, JobRun, RunResult, published_result
from fortwo.jobs.planner import JobPlanner
from fortwo.jobs.progress import initial_progress
from fortwo.jobs.results import store_results
from fortwo.jobs.store import ACTIVE, INTERRUPTED, LEASE_SECONDS, Job, JobStore, NewEvent, Status
from fortwo.jobs.tracing import name_request_of
from fortwo.records import Json, Plan
from fortwo.settings import Settings
from fortwo.train import plan as plans
from fortwo.train.request import TrainingRequest

if TYPE_CHECKING:
    from fortwo.adapters.store import AdapterStore
    from fortwo.engine.engine import Engine
    from fortwo.engine.registry import ModelRegistry
    from fortwo.hub.catalog import Catalog
    from fortwo.jobs.files import FileStore
    from fortwo.jobs.workers import TrainingCluster

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
CANCEL_SECONDS = 10.0  # how long `cancel` waits for the current micro-step, and `pause` for the current step
CLOSE_SECONDS = 3.0  # how long a server that shuts down waits for the current step


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
        files: FileStore,
        cluster: TrainingCluster | None = None,
    ) -> None:
        """cluster: its workers compute the gradients; None for this process."""
        self._settings = settings
        self._registry = registry
        self._store = store
        self._checkpoints = checkpoints
        self._adapters = adapters
        self._files = files
        self._lock = threading.Lock()
        self._planner = JobPlanner(settings, catalog, adapters, engine, registry, store, files, cluster)
        self._executor = JobExecutor(adapters, engine, registry, store, checkpoints, self._lock, cluster)
        self._active: dict[str, JobRun] = {}  # by job
        self._wake = threading.Event()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._process_queue, name=f"fortwo-jobs-{number}", daemon=True)
            for number in range(settings.jobs)
        ]
        self._closed = threading.Event()
        self._leases = threading.Thread(target=self._renew_leases, name="fortwo-leases", daemon=True)

    # ------------------------------------------------------------ for any thread

    def start(self) -> None:
        """Start the queue. Jobs that ran when the last server died fail, or are queued again with FORTWO_RESUME. One
        that had already published its version ends as that version says."""
        for job in self._store.abandoned():
            self._conclude_abandoned(job)
        self._checkpoints.remove_leftovers()
        self._remove_checkpoints_of_ended_jobs()
        for thread in self._threads:
            thread.start()
        self._leases.start()

    def close(self) -> None:
        """Interrupt the running jobs, each after its step if that ends within CLOSE_SECONDS. Queued jobs stay
        queued."""
        with self._lock:
            self._closing = True
            self._closed.set()
            runs = list(self._active.values())
            for run in runs:
                run.stop = run.stop or "interrupted"
        self._wake.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        for run in runs:
            if not run.ended.wait(max(0.0, deadline - time.monotonic())):
                with self._lock:
                    if run.task is not None:
                        run.task.cancel()
        for thread in self._threads:
            thread.join()

    def check_alive(self) -> None:
        """Raises Unavailable when a thread of the queue has ended."""
        if not all(thread.is_alive() for thread in self._threads):
            raise Unavailable("The queue of jobs has ended.", hint="Restart the server.")

    def plan(self, request: TrainingRequest, check: Callable[[], None] = lambda: None) -> Plan:
        """The plan for a request; nothing is stored. Raises InvalidRequest naming field, value and remedy. check:
        called between rows; it may raise to end the planning."""
        return self._planner.plan(request, check)[1]

    def submit(
        self,
        request: TrainingRequest,
        check: Callable[[], None] = lambda: None,
        *,
        fine_tuning: Json | None = None,
        also: Callable[[Session, Job], None] = lambda _session, _job: None,
    ) -> Job:
        """Plan the request and queue it as a job. fine_tuning: as in Job; also: called in the transaction that stores
        the job. Raises as `plan` does, and Unavailable during shutdown."""
        dataset, plan = self._planner.plan(request, check)
        check()
        if self._closing:
            raise Unavailable("The server is shutting down.", hint="Try again when it is back.")
        job = self._store.create(
            model=plan.model,
            adapter_name=plan.adapter_name,
            dataset=datasets.to_json(dataset),
            plan=plans.to_json(plan),
            progress=initial_progress(plan.computed["steps"]),
            fine_tuning=fine_tuning,
            file_ids=request.file_ids,
            also=also,
        )
        name_request_of(job.id)
        self._wake.set()
        return job

    def cancel(self, job_id: str) -> Job:
        """Cancel a queued, paused or running job, delete its checkpoints, and return it, at most CANCEL_SECONDS later.

        Raises NotFound, and Conflict for a job that has ended."""
        event = NewEvent("cancelled", "The job was cancelled while it did not run.", level="warn")
        if self._store.update(job_id, event, when=("queued", "paused"), status="cancelled", finished_at=time.time()):
            self._delete_checkpoints(job_id)
            return self._store.get(job_id)
        with self._lock:
            run = self._active.get(job_id)
            if run is not None:
                run.stop, run.pause_error = "cancelled", None
                if run.task is not None:
                    run.task.cancel()
        return self._wait_for_end(job_id, run, "Only a job that has not ended can be cancelled.")

    def pause(self, job_id: str) -> Job:
        """Take a job out of the queue, or stop it with a checkpoint after its current step; then the next job runs.

        Returns the job, at most CANCEL_SECONDS later. Raises NotFound, Conflict for a job that is paused or has ended,
        and StorageFailed when the checkpoint cannot be written; then the job continues."""
        event = NewEvent("paused", "The job was paused while it was queued.")
        if self._store.update(job_id, event, when=("queued",), status="paused"):
            return self._store.get(job_id)
        with self._lock:
            run = self._active.get(job_id)
            if run is not None and run.stop is None:
                run.stop, run.pause_error = "paused", None
        return self._wait_for_end(job_id, run, "Only a job that is queued or runs can be paused.")

    def resume(self, job_id: str) -> Job:
        """Queue a paused, failed or cancelled job again with its plan. It resumes from its last checkpoint, or starts
        from the beginning when it has none. One that was interrupted after it had published its version has nothing
        left to do: it ends as that version says. Raises NotFound, and Conflict for a job with another status."""
        old = self._store.get(job_id)
        if old.status == "failed" and self._conclude_published(old):
            return self._store.get(job_id)
        if not self._requeue(job_id, ("paused", "failed", "cancelled"), queued_at=time.time()):
            raise Conflict(
                f"The status of job {job_id} is {old.status}.",
                param="job_id",
                hint="Only a paused, failed or cancelled job can be resumed.",
            )
        self._wake.set()
        return self._store.get(job_id)

    def _requeue(self, job_id: str, when: tuple[Status, ...], **changes: Any) -> bool:
        steps = self._store.get(job_id).plan["computed"]["steps"]
        checkpoints = self._checkpoints.of_job(job_id)
        manifest = checkpoints[-1].manifest if checkpoints else {"progress": initial_progress(steps), "actual": None}
        start = f"resumes from step {checkpoints[-1].version}" if checkpoints else "starts from the beginning"
        return self._store.update(
            job_id,
            NewEvent("queued", f"The job is queued again; it {start}."),
            when=when,
            status="queued",
            started_at=None,
            finished_at=None,
            progress=manifest["progress"],
            actual=manifest["actual"],
            report=None,
            adapter=None,
            error=None,
            owner=self._store.owner,
            **changes,
        )

    def _conclude_abandoned(self, job: Job, error: Json = INTERRUPTED) -> None:
        """Give an active job that nobody runs its end, or its place in the queue."""
        if self._conclude_published(job):
            return
        if self._settings.resume and job.owner == self._store.owner:
            self._requeue(job.id, ACTIVE)
        else:
            self._fail(job, error)

    def _conclude_published(self, job: Job) -> bool:
        """Whether an interrupted job had published its version; then it ends as that version says."""
        if job.status == "failed" and (job.error or {}).get("code") != INTERRUPTED["code"]:
            return False
        version = self._adapters.published_by(job.adapter_name, job.id)
        if version is None:
            return False
        try:
            version = self._adapters.finish_publication(version)
        except FortwoError as error:  # its followers refuse it
            self._fail(job, error.body()["error"])
            return True
        self._finish(job, published_result(version))
        self._delete_checkpoints(job.id)
        return True

    def _wait_for_end(self, job_id: str, run: JobRun | None, hint: str) -> Job:
        """The job after its run has ended, or after CANCEL_SECONDS. Raises Conflict when it neither runs nor waits."""
        deadline = time.monotonic() + CANCEL_SECONDS
        while run is not None and not run.ended.wait(POLL_SECONDS) and time.monotonic() < deadline:
            if run.pause_error is not None:
                raise run.pause_error
        job = self._store.get(job_id)
        if run is None and job.ended_or_paused:
            raise Conflict(f"The status of job {job_id} is {job.status}.", param="job_id", hint=hint)
        if run is None and job.owner != self._store.owner:
            raise Conflict(
                f"Job {job_id} runs on another server, which uses the same database with its own home.",
                param="job_id",
                hint="Send the request to that server.",
            )
        return job

    def _remove_checkpoints_of_ended_jobs(self) -> None:
        """Folders of jobs that the database does not know are logged and not touched: it may be the wrong database."""
        unknown = []
        for name in self._checkpoints.job_ids():
            try:
                status = self._store.get(name).status
            except NotFound:
                unknown.append(name)
                continue
            if status in ("succeeded", "cancelled"):
                self._checkpoints.delete_job(name)
        if unknown:
            log.warning(
                "%s contains %d folder(s) of jobs that are not in the database; they were not changed: %s. "
                "If the database was moved or lost, stop the server and restore it. Otherwise delete the folders.",
                self._settings.jobs_dir,
                len(unknown),
                ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else ""),
            )

    # ------------------------------------------------------------ the runner's own threads

    def _process_queue(self) -> None:
        while True:
            self._wake.clear()
            if self._closing:
                return
            try:
                for job in self._abandoned():
                    self._conclude_abandoned(job)
                following = self._store.next_queued()
                if following is not None:
                    self._wake.set()  # the next thread looks for the job behind it
                    self._run_job(following)
                    continue
                self._wake.wait()
            except DATABASE_ERRORS as error:
                log.warning("The queue waits for the database: %s", error.message)
                self._closed.wait(RETRY_SECONDS)
            except Exception:  # the queue must survive
                log.exception("The queue failed; it is tried again in %g seconds.", RETRY_SECONDS)
                self._closed.wait(RETRY_SECONDS)

    def _abandoned(self) -> list[Job]:
        """The active jobs that nobody runs. The lock keeps runs from beginning or ending meanwhile."""
        with self._lock:
            return [job for job in self._store.abandoned() if job.id not in self._active]

    def _renew_leases(self) -> None:
        while not self._closed.wait(LEASE_SECONDS / 4):
            if self._active:
                try:
                    self._store.renew()
                except DATABASE_ERRORS as error:
                    log.warning("The leases of the running jobs were not renewed: %s", error.message)

    def _run_job(self, job: Job) -> None:
        """Run one queued job and store its final status."""
        run = JobRun(job)
        with self._lock:
            event = NewEvent("preparing", f"Loading {job.model}.")
            if self._closing or not self._store.update(
                job.id, event, when=("queued",), status="preparing", started_at=time.time()
            ):
                return
            self._active[job.id] = run
        with log_context.about_job(job.id), run.span:
            self._execute(run)

    def _execute(self, run: JobRun) -> None:
        job = run.job
        try:
            self._finish(job, self._executor.execute(run))
        except CancelledError:
            self._finish_stopped(run)
        except TrainingFailed as error:
            self._fail(job, error.body()["error"])
            self._delete_checkpoints(job.id)
        except FortwoError as error:
            self._fail(job, error.body()["error"])
        except Exception as error:
            log.exception("Job %s failed.", job.id)
            self._fail(job, FortwoError(f"The job failed: {type(error).__name__}: {error}").body()["error"])
        else:
            self._delete_checkpoints(job.id)
        finally:
            with self._lock:
                del self._active[job.id]
            run.ended.set()

    def _until_stored(self, job: Job, store: Callable[[], bool]) -> None:
        """Call `store` until it returns True, also while the database refuses: the end of a run must not be lost. Once
        the server closes, the next one decides by the job's manifest or its checkpoints. For a job that does not run,
        the error is raised."""
        refused = False
        while True:
            try:
                if store():
                    return
                reason = "its records are not stored yet"
            except DATABASE_ERRORS as error:
                if job.id not in self._active:
                    raise
                reason = error.message
            if not refused:
                log.warning("The end of job %s waits for the database: %s", job.id, reason)
                refused = True
            if self._closed.wait(RETRY_SECONDS):
                log.warning("The end of job %s could not be stored.", job.id)
                return

    def _finish(self, job: Job, result: RunResult) -> None:
        version = result.version
        adapter = {"name": version.name, "version": version.version, "digest": version.digest}
        more = {"adapter": adapter, "report": version.manifest["report"], "actual": version.manifest["actual"]}
        if result.failure is None:
            event = NewEvent("succeeded", f"{version.id} is published and current.", {"adapter": adapter})
            self._end(job, "succeeded", event, error=None, **more)
        else:
            self._fail(job, result.failure.body()["error"], **more)

    def _finish_stopped(self, run: JobRun) -> None:
        """Store the status of a job whose run ended early, as `run.stop` says."""
        job = run.job
        if run.stop == "cancelled":
            self._end(job, "cancelled", NewEvent("cancelled", "The job was cancelled.", level="warn"))
            self._delete_checkpoints(job.id)
        elif run.stop == "paused":
            run.span.note_end("paused")
            event = NewEvent("paused", f"The job was paused after step {run.saved_step}.")
            self._until_stored(job, lambda: self._store.update(job.id, event, status="paused"))
        elif run.stop == "interrupted" and self._settings.resume:
            run.span.note_end("queued")
            self._requeue(job.id, ACTIVE)
        else:
            self._fail(job, INTERRUPTED)

    def _delete_checkpoints(self, job_id: str) -> None:
        self._registry.discard(self._checkpoints.delete_job(job_id))

    def _fail(self, job: Job, error: Json, **changes: Any) -> None:
        self._end(
            job, "failed", NewEvent("failed", error["message"], {"error": error}, "error"), error=error, **changes
        )

    def _end(self, job: Job, status: Status, event: NewEvent, **changes: Any) -> None:
        run = self._active.get(job.id)
        recorder = None if run is None else run.recorder
        if run is not None:
            run.span.note_end(status, changes.get("error"))
        ended = {"status": status, "finished_at": time.time(), **changes}

        def store() -> bool:
            if recorder is not None and not recorder.flush():
                return False
            if job.fine_tuning is not None and changes.get("adapter") is not None:
                store_results(self._store, self._files, job.id)
            return self._store.update(job.id, event, **ended)

        self._until_stored(job, store)
