"""From a request to a published adapter: plan, queue, train, evaluate, publish, one job at a time.

A request is checked and planned before it becomes a job, so bad input never does. A thread of its own takes jobs in
order of arrival, hands the training to the engine, and writes down what happens; the device's thread never waits for
the database. Every job ends: succeeded, failed with a reason, or cancelled; or it is paused and waits to be resumed.
The rows a job was given are kept with it, so that changing the file later changes nothing; of a large file its
checksum is, and a change is refused.

Checkpoints are kept as long as a job can go on from them: a run that came to its end, whichever, or was cancelled
leaves none behind.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from fortwo.adapters import check_name
from fortwo.data import formats
from fortwo.errors import (
    Conflict,
    FortwoError,
    InvalidAdapter,
    InvalidRequest,
    NotFound,
    StorageFailed,
    TrainingFailed,
    Unavailable,
)
from fortwo.jobs.checkpoints import CheckpointStore
from fortwo.jobs.diary import Diary, begun, finite
from fortwo.jobs.machine import look
from fortwo.jobs.store import ACTIVE, INTERRUPTED, Job, JobStore, Note, Status
from fortwo.records import Checkpoint, Dataset, Json, Plan, PlanWarning, TrainEvent
from fortwo.settings import Settings
from fortwo.train import plan as plans
from fortwo.train.request import TrainingRequest
from fortwo.train.survey import survey

if TYPE_CHECKING:
    from fortwo.adapters import AdapterStore
    from fortwo.engine.engine import Engine
    from fortwo.engine.residents import Resident, Residents
    from fortwo.engine.tasks import Task
    from fortwo.models.catalog import Catalog
    from fortwo.train.loop import Trained

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # how late the news of a job may be
RETRY_SECONDS = 1.0
CANCEL_SECONDS = 10.0  # how long `cancel` waits for the micro-step under way, and `pause` for the step
CLOSE_SECONDS = 3.0  # how long a server that ends waits for the step under way


@dataclass(eq=False)
class _Turn:
    """The job whose turn it is, and loop.Saving for its run. `task` and `end` change under the runner's lock only.

    end: how it is to end before its time. saved: the step of the last checkpoint; busy: while one is written.
    refused: why the checkpoint that a pause needs cannot be written.
    """

    job: Job
    task: Task[Trained] | None = None
    end: Literal["cancelled", "paused", "interrupted"] | None = None
    saved: int = 0
    safe: bool = True
    busy: bool = False
    refused: StorageFailed | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def wanted(self) -> bool:
        return self.end in ("paused", "interrupted")


class JobRunner:
    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        adapters: AdapterStore,
        engine: Engine,
        residents: Residents,
        store: JobStore,
        checkpoints: CheckpointStore,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._adapters = adapters
        self._engine = engine
        self._residents = residents
        self._store = store
        self._checkpoints = checkpoints
        self._lock = threading.Lock()
        self._turn: _Turn | None = None
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
        for job_id in self._checkpoints.jobs():
            if self._is_done(job_id):
                self._checkpoints.remove(job_id)
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

    def _turn_of(self, job_id: str) -> _Turn | None:
        return self._turn if self._turn is not None and self._turn.job.id == job_id else None

    def _settled(self, job_id: str, turn: _Turn | None, hint: str) -> Job:
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

    def _is_done(self, job_id: str) -> bool:
        try:
            return self._store.get(job_id).status in ("succeeded", "cancelled")
        except NotFound:
            return True

    def _resolve(self, request: TrainingRequest) -> tuple[Dataset, Plan]:
        check_free(request.adapter_name, self._catalog)
        dataset = formats.load(request.dataset, self._settings.allowed_data_dirs)
        model = self._settings.default_model if request.model is None else request.model
        resident = self._residents.load_base(model)
        base = plans.BaseFacts.of(resident.id, resident.decoder)
        last = self._store.last_actual(model)
        seen = None if last is None else last["tokens_per_second"]
        machine = self._engine.call(lambda: look(resident.decoder, seen)).result()
        counts, suspicions = survey(resident.renderer, plans.training_rows(dataset))
        return dataset, plans.resolve(request, dataset, base, counts, machine, suspicions)

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
        turn = _Turn(job)
        with self._lock:
            note = Note("preparing", f"Loading {job.model}.")
            if self._closing or not self._store.update(
                job.id, note, when=("queued",), status="preparing", started_at=time.time()
            ):
                return
            self._turn = turn
        try:
            self._teach(turn)
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

    def _stopped(self, turn: _Turn) -> None:
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

    def _teach(self, turn: _Turn) -> None:
        from fortwo.train.loop import teach

        job = turn.job
        plan = plans.from_json(job.plan)
        dataset = formats.from_json(self._store.dataset(job.id))
        resident = self._residents.load_base(plan.model)
        diary, checkpoint = self._take_up(turn, resident)
        heard: queue.SimpleQueue[TrainEvent] = queue.SimpleQueue()

        def hear(event: TrainEvent) -> None:
            if isinstance(event, Checkpoint):
                turn.busy = True
            heard.put(event)

        with self._lock:
            if turn.end is not None:
                raise CancelledError
            events = teach(resident, resident.renderer, dataset, plan, self._engine, job.id, turn, checkpoint)
            task = turn.task = self._engine.run_task(events, hear)
        del checkpoint
        try:
            while not task.done or not heard.empty():
                with suppress(queue.Empty):
                    event = heard.get(timeout=POLL_SECONDS)
                    if isinstance(event, Checkpoint):
                        self._keep(turn, event, plan, resident, diary)
                    else:
                        diary.write(event)
                nothing_is_lost = turn.wanted and turn.safe and not turn.busy and heard.empty()
                if nothing_is_lost and diary.step == turn.saved:
                    task.cancel()
        finally:
            task.cancel()  # when the diary could not be written; a task that is done stays as it ended
        self._publish(turn, plan, dataset, resident, task.result())

    def _take_up(self, turn: _Turn, resident: Resident) -> tuple[Diary, Checkpoint | None]:
        """The newest checkpoint that is whole and of this base, and the diary as it was then; those that are not are
        dropped."""
        job = turn.job
        for version in reversed(self._checkpoints.of(job.id)):
            try:
                if version.base_digest != resident.digest:
                    raise InvalidAdapter(f"{version.id} was trained on other weights than {resident.id} has now")
                checkpoint = self._checkpoints.restore(version)
            except InvalidAdapter as error:
                self._store.append_event(job.id, Note("checkpoint", f"Unusable: {error.message}.", level="warn"))
                self._checkpoints.drop(version)
                self._residents.forget([version])
                continue
            turn.saved = version.version
            self._store.append_event(job.id, Note("checkpoint", f"Going on from step {turn.saved}."))
            return Diary(self._store, job.id, version.manifest["progress"], version.manifest["actual"]), checkpoint
        return Diary(self._store, job.id, begun(job.progress["steps"])), None

    def _keep(self, turn: _Turn, checkpoint: Checkpoint, plan: Plan, resident: Resident, diary: Diary) -> None:
        """Write a checkpoint down. A disk that refuses does not end the run, only a pause."""
        from fortwo.train.loop import lora_config

        job = turn.job
        manifest = {
            "adapter_name": job.adapter_name,
            "base_model": resident.id,
            "base_digest": resident.digest,
            **diary.so_far(),
        }
        try:
            version, gone = self._checkpoints.save(
                job.id, checkpoint, lora_config(plan).to_peft(resident.id), manifest, plan["save_total_limit"]
            )
        except StorageFailed as error:
            note = Note("checkpoint", f"None of step {checkpoint.step}: {error.message}.", level="warn")
            with self._lock:
                if turn.end == "paused":
                    turn.end, turn.refused = None, error
        else:
            turn.saved = version.version
            note = Note("checkpoint", f"Step {turn.saved} can be chatted with as {version.id}.", {"model": version.id})
            self._residents.forget(gone)
        finally:
            turn.busy = False
        self._store.append_event(job.id, note)

    def _forget(self, job_id: str) -> None:
        """Remove the checkpoints of a job that is done."""
        self._residents.forget(self._checkpoints.remove(job_id))

    def _publish(self, turn: _Turn, plan: Plan, dataset: Dataset, resident: Resident, trained: Trained) -> None:
        """Keep what was found, then the adapter; only one that met its targets becomes current."""
        job = turn.job
        metrics = {name: metric.value for name, metric in trained.report.metrics.items()}
        evals = [(one.step, one.loss) for one in trained.report.eval_losses]
        found = {**trained.actual, "metrics": metrics, "eval_losses": evals}
        proven = trained.succeeded and bool(plan.targets)  # where nothing had to be reached, what was seen is told
        diagnosis = () if proven else plans.diagnose(plan, found)
        actual = finite(trained.actual)
        report = finite(asdict(replace(trained.report, diagnosis=diagnosis)))
        self._store.update(job.id, actual=actual, report=report)
        if turn.end == "cancelled":
            raise CancelledError
        manifest = {
            "job_id": job.id,
            "base_model": resident.id,
            "base_digest": resident.digest,
            "dataset_digest": dataset.digest,
            "plan": job.plan,
            "actual": actual,
            "report": report,
        }
        version = self._adapters.publish(
            job.adapter_name,
            trained.lora.state(),
            trained.lora.config.to_peft(resident.id),
            manifest,
            current=trained.succeeded,
        )
        self._residents.publish(version, trained.lora)
        adapter = {"name": version.name, "version": version.version, "digest": version.digest}
        if trained.succeeded:
            note = Note("succeeded", f"{version.id} is published and current.", {"adapter": adapter})
            self._end(job, "succeeded", note, adapter=adapter)
        else:
            self._fail(job, _missed(plan, metrics, diagnosis).body()["error"], adapter=adapter)

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


def _missed(plan: Plan, metrics: dict[str, float], diagnosis: tuple[PlanWarning, ...]) -> TrainingFailed:
    missed = [
        f"{name} {metrics[name]:.2f} < {target:.2f}"
        for name, target in plan.targets.items()
        if name in metrics and metrics[name] < target
    ]
    why = [finding.message for finding in diagnosis]
    return TrainingFailed(
        f"The adapter missed its targets ({', '.join(missed)}): {'; '.join(why)}.",
        code="targets_missed",
        hint=diagnosis[0].hint if diagnosis else None,
    )
