"""Executes one job: from its plan and its dataset to a published adapter, with checkpoints on the way.

The executor hands the training to the engine, receives its events and stores them. It knows no queue: `jobs.runner`
decides which job runs and sets the final status.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from fortwo.data import datasets
from fortwo.errors import InvalidAdapter, StorageFailed, TrainingFailed
from fortwo.facts.subject import facts_of
from fortwo.jobs.checkpoints import CheckpointStore
from fortwo.jobs.progress import ProgressRecorder, initial_progress, nan_to_null
from fortwo.jobs.store import Job, JobStore, NewEvent
from fortwo.jobs.tracing import JobSpan
from fortwo.records import AdapterVersion, Checkpoint, Dataset, Fact, Phase, Plan, PlanWarning, TrainEvent
from fortwo.train import plan as plans
from fortwo.train.adapter import lora_config

if TYPE_CHECKING:
    from torch import Tensor

    from fortwo.adapters.store import AdapterStore
    from fortwo.engine.engine import Engine
    from fortwo.engine.registry import LoadedModel, ModelRegistry
    from fortwo.engine.tasks import Task
    from fortwo.jobs.workers import RunWorkers, TrainingCluster
    from fortwo.train.loop import TrainingResult

POLL_SECONDS = 0.1  # how late a change of a job may be noticed


@dataclass(eq=False)
class JobRun:
    """The job that runs, and the loop.CheckpointControl of its training. Only the runner's lock guards `task` and
    `stop`.

    stop: why the run is to end early, if it is. saved_step: the step of the last checkpoint; busy: whether one is being
    written. pause_error: why the checkpoint that a pause needs could not be written. ended: set when the run is
    over. recorder: it may hold what the database refused. span: of this run.
    """

    job: Job
    task: Task[TrainingResult] | None = None
    stop: Literal["cancelled", "paused", "interrupted"] | None = None
    saved_step: int = 0
    safe: bool = True
    busy: bool = False
    pause_error: StorageFailed | None = None
    recorder: ProgressRecorder | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    span: JobSpan = field(init=False)

    def __post_init__(self) -> None:
        self.span = JobSpan(self.job)

    @property
    def wanted(self) -> bool:
        return self.stop in ("paused", "interrupted")


@dataclass(frozen=True)
class RunResult:
    """version: the published adapter; failure: why it did not become the current version, if it did not."""

    version: AdapterVersion
    failure: TrainingFailed | None


class JobExecutor:
    def __init__(
        self,
        adapters: AdapterStore,
        engine: Engine,
        registry: ModelRegistry,
        store: JobStore,
        checkpoints: CheckpointStore,
        lock: threading.Lock,
        cluster: TrainingCluster | None = None,
    ) -> None:
        """lock: it guards `task` and `stop` of every JobRun."""
        self._adapters = adapters
        self._engine = engine
        self._registry = registry
        self._store = store
        self._checkpoints = checkpoints
        self._lock = lock
        self._cluster = cluster

    def execute(self, run: JobRun) -> RunResult:
        """Train, evaluate and publish. Raises the error that ended the run, or CancelledError when `stop` ended it."""
        from fortwo.train.loop import train

        job = run.job
        plan = plans.from_json(job.plan)
        dataset = datasets.from_json(self._store.dataset(job.id))
        resident, device = self._registry.training_base(plan.model), self._registry.training_engine
        recorder, checkpoint = self._load_checkpoint(run, resident)
        start = plan.get("parent") if checkpoint is None or plan.objective == "kto" else None  # KTO reads it in steps
        parent = None if start is None else self._adapters.read(start)[2]
        received: queue.SimpleQueue[TrainEvent] = queue.SimpleQueue()

        def receive(event: TrainEvent) -> None:
            if isinstance(event, Checkpoint):
                run.busy = True
            received.put(event)

        with ExitStack() as ending:
            workers = self._start_workers(plan, resident, run.saved_step, parent, recorder)
            if workers is not None:
                ending.callback(workers.close)
            with self._lock:
                if run.stop is not None:
                    raise CancelledError
                events = train(
                    resident,
                    resident.renderer,
                    dataset,
                    plan,
                    device,
                    job.id,
                    saving=run,
                    resumed=checkpoint,
                    parent=parent,
                    workers=workers,
                    proof=None if device is self._engine else self._engine,
                )
                task = run.task = device.run_task(events, receive)
            del checkpoint, parent
            self._follow(run, task, received, plan, resident, recorder)
        trained = task.result()
        if workers is not None:
            trained.actual["workers"] = workers_of(plan)
        return self._publish(run, plan, dataset, resident, trained, recorder)

    def _start_workers(
        self,
        plan: Plan,
        resident: LoadedModel,
        steps_done: int,
        parent: Mapping[str, Tensor] | None,
        recorder: ProgressRecorder,
    ) -> RunWorkers | None:
        """The workers that compute the gradients, if not this process does."""
        workers = workers_of(plan)
        if self._cluster is None:
            if workers > 1:
                message = f"The job was planned for {workers} workers; this server computes the gradients itself."
                recorder.store(NewEvent("preparing", message, level="warn"))
            return None
        compared = parent if plan.objective == "kto" else None
        weights = self._registry.training_weights(resident)
        return self._cluster.start(resident, weights, plan, workers, steps_done, compared)

    def _follow(
        self,
        run: JobRun,
        task: Task[TrainingResult],
        received: queue.SimpleQueue[TrainEvent],
        plan: Plan,
        resident: LoadedModel,
        recorder: ProgressRecorder,
    ) -> None:
        """Store the events of a run until it is done."""
        try:
            while not task.done or not received.empty():
                with suppress(queue.Empty):
                    event = received.get(timeout=POLL_SECONDS)
                    if isinstance(event, Checkpoint):
                        self._save_checkpoint(run, event, plan, resident, recorder)
                    else:
                        if isinstance(event, Phase):
                            run.span.enter_phase(event.name)
                        recorder.record(event)
                if received.empty():
                    recorder.flush()
                nothing_is_lost = run.wanted and run.safe and not run.busy and received.empty()
                if nothing_is_lost and recorder.step == run.saved_step:
                    task.cancel()
        finally:
            task.cancel()  # needed when an event could not be stored; it does not change a task that is done

    def _load_checkpoint(self, run: JobRun, resident: LoadedModel) -> tuple[ProgressRecorder, Checkpoint | None]:
        """The newest intact checkpoint of this base, and a recorder with its progress. Unusable ones are deleted."""
        job, notes = run.job, list[NewEvent]()
        progress, actual, checkpoint = initial_progress(job.progress["steps"]), None, None
        for version in reversed(self._checkpoints.of_job(job.id)):
            try:
                if not resident.taught(version):
                    raise InvalidAdapter(f"{version.id} was trained on another base than {resident.id} is now")
                checkpoint = self._checkpoints.restore(version)
            except InvalidAdapter as error:
                notes.append(NewEvent("checkpoint", f"A checkpoint is unusable: {error.message}.", level="warn"))
                self._checkpoints.delete(version)
                self._registry.discard([version])
                continue
            run.saved_step = version.version
            notes.append(NewEvent("checkpoint", f"The run resumes from step {run.saved_step}."))
            progress, actual = version.manifest["progress"], version.manifest["actual"]
            break
        recorder = run.recorder = ProgressRecorder(self._store, job.id, progress, actual)
        for note in notes:
            recorder.store(note)
        return recorder, checkpoint

    def _save_checkpoint(
        self, run: JobRun, checkpoint: Checkpoint, plan: Plan, resident: LoadedModel, recorder: ProgressRecorder
    ) -> None:
        """Write a checkpoint. When the disk refuses, the run continues; a pause that waits for it fails."""
        job = run.job
        manifest = {
            "adapter_name": job.adapter_name,
            "base_model": resident.id,
            "base_digest": resident.digest,
            **recorder.snapshot(),
        }
        try:
            peft, limit = lora_config(plan).to_peft(resident.id), plan["save_total_limit"]
            version, deleted = self._checkpoints.save(job.id, checkpoint, peft, manifest, limit)
        except StorageFailed as error:
            message = f"The checkpoint of step {checkpoint.step} was not saved: {error.message}."
            event = NewEvent("checkpoint", message, level="warn")
            with self._lock:
                if run.stop == "paused":
                    run.stop, run.pause_error = None, error
        else:
            run.saved_step = version.version
            message = f"Step {run.saved_step} is saved; chat can use it as {version.id}."
            event = NewEvent("checkpoint", message, {"model": version.id})
            self._registry.discard(deleted)
        finally:
            run.busy = False
        recorder.store(event)

    def _publish(
        self,
        run: JobRun,
        plan: Plan,
        dataset: Dataset,
        resident: LoadedModel,
        trained: TrainingResult,
        recorder: ProgressRecorder,
    ) -> RunResult:
        """Store the report, then publish the adapter. It becomes the current version only if it met its targets."""
        job = run.job
        run.span.enter_phase("publishing")
        metrics = {name: metric.value for name, metric in trained.report.metrics.items()}
        evals = [(one.step, one.loss) for one in trained.report.eval_losses]
        results = {**trained.actual, "metrics": metrics, "eval_losses": evals}
        results["escalations"] = trained.report.escalations
        proven = trained.succeeded and bool(plan.targets)  # a plan without targets proves nothing: it gets a diagnosis
        diagnosis = () if proven else plans.diagnose(plan, results)
        actual = nan_to_null(trained.actual)
        report = nan_to_null(asdict(replace(trained.report, diagnosis=diagnosis, engine=self._engine.name)))
        recorder.store(None, actual=actual, report=report)
        if run.stop == "cancelled":
            raise CancelledError
        manifest = {
            "job_id": job.id,
            "base_model": resident.id,
            "base_digest": resident.digest,
            "dataset_digest": dataset.digest,
            "validation_digest": None if dataset.validation is None else dataset.validation.digest,
            "parent": plan.get("parent"),
            "facts": [asdict(fact) for fact in learned_facts(dataset, plan)],
            "plan": job.plan,
            "actual": actual,
            "report": report,
        }
        peft = trained.lora.config.to_peft(resident.id)
        tensors = trained.lora.state()
        version = self._adapters.publish(
            job.adapter_name,
            tensors,
            peft,
            manifest,
            current=trained.succeeded,
            serve=lambda version: self._registry.publish(version, trained.lora),
        )
        return RunResult(version, None if trained.succeeded else _targets_missed(plan, metrics, diagnosis))


def published_result(version: AdapterVersion) -> RunResult:
    """The result of the run that published `version`, as its manifest has it: for a server that died in between."""
    manifest = version.manifest
    if manifest.get("made_current", version.current):
        return RunResult(version, None)
    metrics = {name: metric["value"] for name, metric in manifest["report"]["metrics"].items()}
    diagnosis = tuple(PlanWarning(**finding) for finding in manifest["report"]["diagnosis"])
    return RunResult(version, _targets_missed(plans.from_json(manifest["plan"]), metrics, diagnosis))


def workers_of(plan: Plan) -> int:
    """For how many workers of a cluster a run was planned."""
    return int(plan.get("workers") or 1)


def learned_facts(dataset: Dataset, plan: Plan) -> tuple[Fact, ...]:
    """All facts that the adapter of a run has learned, including those of its parent."""
    return (*facts_of(dataset), *dataset.parent_facts) if plan.objective == "override" else dataset.parent_facts


def _targets_missed(plan: Plan, metrics: dict[str, float], diagnosis: tuple[PlanWarning, ...]) -> TrainingFailed:
    missed = [
        f"{name} {metrics[name]:.2f} < {target:.2f}"
        for name, target in plan.targets.items()
        if name in metrics and metrics[name] < target
    ]
    reasons = [finding.message for finding in diagnosis]
    return TrainingFailed(
        f"The adapter missed its targets ({', '.join(missed)}): {'; '.join(reasons)}.",
        code="targets_missed",
        hint=diagnosis[0].hint if diagnosis else None,
    )
