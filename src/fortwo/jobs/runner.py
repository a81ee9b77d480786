"""From a request to a published adapter: plan, queue, train, evaluate, publish, one job at a time.

A request is checked and planned before it becomes a job, so bad input never does. A thread of its own takes jobs in
order of arrival, hands the training to the engine, and writes down what happens; the device's thread never waits for
the database. Every job ends: succeeded, failed with a reason, or cancelled. The rows a job was given are kept with
it, so that changing the file later changes nothing; of a large file its checksum is, and a change is refused.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fortwo.adapters import check_name
from fortwo.data import formats
from fortwo.errors import Conflict, FortwoError, InvalidRequest, TrainingFailed, Unavailable
from fortwo.jobs.machine import look
from fortwo.jobs.store import INTERRUPTED, Job, JobStore, Note, Status
from fortwo.records import Dataset, Evaluated, Json, Phase, Plan, PlanWarning, Stepped, TrainEvent
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
CANCEL_SECONDS = 10.0  # how long `cancel` waits for the micro-step under way


@dataclass(eq=False)
class _Turn:
    """The job whose turn it is. Changed under the runner's lock only."""

    job: Job
    task: Task[Trained] | None = None
    stop_requested: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class JobRunner:
    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        adapters: AdapterStore,
        engine: Engine,
        residents: Residents,
        store: JobStore,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._adapters = adapters
        self._engine = engine
        self._residents = residents
        self._store = store
        self._lock = threading.Lock()
        self._turn: _Turn | None = None
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fortwo-jobs", daemon=True)

    # ------------------------------------------------------------ any thread

    def start(self) -> None:
        """Fail what ran when the last server died, then take up what was queued."""
        self._store.mark_interrupted()
        self._thread.start()

    def close(self) -> None:
        """Interrupt the job that runs; queued ones stay queued for the next start."""
        with self._lock:
            self._closing = True
            if self._turn is not None and self._turn.task is not None:
                self._turn.task.cancel()
        self._wake.set()
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
            progress=_progress(plan.computed["steps"]),
        )
        self._wake.set()
        return job

    def cancel(self, job_id: str) -> Job:
        """Stop a job, queued or running; what it is after a few seconds is returned."""
        note = Note("cancelled", "Cancelled before it began.", level="warn")
        if self._store.update(job_id, note, when=("queued",), status="cancelled", finished_at=time.time()):
            return self._store.get(job_id)
        with self._lock:
            turn = self._turn if self._turn is not None and self._turn.job.id == job_id else None
            if turn is not None:
                turn.stop_requested = True
                if turn.task is not None:
                    turn.task.cancel()
        if turn is not None:
            turn.ended.wait(CANCEL_SECONDS)
        job = self._store.get(job_id)
        if turn is None and job.ended:
            raise Conflict(
                f"Job {job_id} has already {job.status}.",
                param="job_id",
                hint="Only a job that has not ended can be cancelled.",
            )
        return job

    def resume(self, job_id: str) -> Job:
        """Queue a job again that failed or was cancelled; it starts from the beginning, by the plan it had."""
        old = self._store.get(job_id)
        queued = self._store.update(
            job_id,
            Note("queued", "Queued again; it starts from the beginning."),
            when=("failed", "cancelled"),
            status="queued",
            queued_at=time.time(),
            started_at=None,
            finished_at=None,
            progress=_progress(old.plan["computed"]["steps"]),
            actual=None,
            report=None,
            adapter=None,
            error=None,
        )
        if not queued:
            raise Conflict(
                f"Job {job_id} is {old.status}.", param="job_id", hint="Only a failed or cancelled job can be resumed."
            )
        self._wake.set()
        return self._store.get(job_id)

    def _resolve(self, request: TrainingRequest) -> tuple[Dataset, Plan]:
        check_free(request.adapter_name, self._catalog)
        dataset = formats.load(request.dataset, self._settings.allowed_data_dirs)
        model = self._settings.default_model if request.model is None else request.model
        resident = self._residents.load_base(model)
        base = plans.BaseFacts.of(resident.id, resident.decoder.config, resident.bytes)
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
            if turn.stop_requested:
                self._end(job, "cancelled", Note("cancelled", "Cancelled.", level="warn"))
            else:
                self._fail(job, INTERRUPTED)
        except FortwoError as error:
            self._fail(job, error.body()["error"])
        except Exception as error:
            log.exception("job %s failed", job.id)
            self._fail(job, FortwoError(f"The job failed: {type(error).__name__}: {error}").body()["error"])
        finally:
            with self._lock:
                self._turn = None
            turn.ended.set()

    def _teach(self, turn: _Turn) -> None:
        from fortwo.train.loop import teach

        job = turn.job
        plan = plans.from_json(job.plan)
        dataset = formats.from_json(self._store.dataset(job.id))
        resident = self._residents.load_base(plan.model)
        heard: queue.SimpleQueue[TrainEvent] = queue.SimpleQueue()
        with self._lock:
            if turn.stop_requested or self._closing:
                raise CancelledError
            events = teach(resident, resident.renderer, dataset, plan, self._engine, job.id)
            task = turn.task = self._engine.run_task(events, heard.put)
        diary = _Diary(self._store, job)
        try:
            while not task.done or not heard.empty():
                with suppress(queue.Empty):
                    diary.write(heard.get(timeout=POLL_SECONDS))
        finally:
            task.cancel()  # when the diary could not be written; a task that is done stays as it ended
        self._publish(turn, plan, dataset, resident, task.result())

    def _publish(self, turn: _Turn, plan: Plan, dataset: Dataset, resident: Resident, trained: Trained) -> None:
        """Keep what was found, then the adapter; only one that met its targets becomes current."""
        job = turn.job
        metrics = {name: metric.value for name, metric in trained.report.metrics.items()}
        evals = [(one.step, one.loss) for one in trained.report.eval_losses]
        found = {**trained.actual, "metrics": metrics, "eval_losses": evals}
        proven = trained.succeeded and bool(plan.targets)  # where nothing had to be reached, what was seen is told
        diagnosis = () if proven else plans.diagnose(plan, found)
        actual = _finite(trained.actual)
        report = _finite(asdict(replace(trained.report, diagnosis=diagnosis)))
        self._store.update(job.id, actual=actual, report=report)
        if turn.stop_requested:
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


class _Diary:
    """Writes the events of a run as rows, and into the job how far it is and what it took so far."""

    def __init__(self, store: JobStore, job: Job) -> None:
        self._store = store
        self._job = job
        self._progress = dict(job.progress)
        self._actual: Json = {"training_seconds": 0.0, "tokens": 0, "peak_learning_rate": 0.0}

    def write(self, event: TrainEvent) -> None:
        match event:
            case Phase():
                message = event.detail if event.detail else f"{event.name.capitalize()}."
                self._store.update(self._job.id, Note(event.name, message), status=event.name)
            case Stepped():
                self._count(event)
                data = _finite(asdict(event)) | {"tokens_per_second": event.tokens / event.seconds}
                message = f"Step {event.step}/{event.steps}: loss {event.loss:.4g}, rate {event.learning_rate:.3g}"
                self._advance(Note("step", message, data), actual=_finite(self._actual))
            case Evaluated():
                loss = [] if event.eval_loss is None else [f"eval_loss {event.eval_loss:.4g}"]
                shares = "  ".join([*(f"{name} {share:.2f}" for name, share in event.metrics.items()), *loss])
                self._advance(Note("metrics", f"Step {event.step}: {shares}", _finite(asdict(event))))

    def _count(self, event: Stepped) -> None:
        so_far = self._actual
        so_far.setdefault("first_loss", event.parts["learn"])
        so_far["final_loss"] = event.parts["learn"]
        so_far["steps"] = event.step
        so_far["training_seconds"] += event.seconds
        so_far["tokens"] += event.tokens
        so_far["tokens_per_second"] = so_far["tokens"] / so_far["training_seconds"]
        so_far["peak_learning_rate"] = max(so_far["peak_learning_rate"], event.learning_rate)

    def _advance(self, note: Note, **more: Any) -> None:
        self._progress |= {name: note.data[name] for name in self._progress.keys() & note.data.keys()}
        self._store.update(self._job.id, note, progress=self._progress, **more)


def check_free(name: str, catalog: Catalog) -> None:
    """Whether an adapter may be called this. A base model's id would hide it: chat names both in one field."""
    check_name(name)
    if name in (entry.id for entry in catalog.entries()):
        raise InvalidRequest(
            f"adapter_name = {name!r} is the id of a base model.", param="adapter_name", hint="Choose another name."
        )


def _progress(steps: int) -> Json:
    return {
        "step": 0,
        "steps": steps,
        "loss": None,
        "learning_rate": None,
        "tokens_per_second": None,
        "metrics": {},
    }


def _finite(data: Json) -> Json:
    """JSON has no NaN: null."""
    return {name: _finite_value(value) for name, value in data.items()}


def _finite_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _finite(value)
    if isinstance(value, list | tuple):
        return [_finite_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
