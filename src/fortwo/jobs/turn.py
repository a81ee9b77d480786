"""One job's turn: from its plan and its rows to a published adapter, with checkpoints on the way.

Hands the training to the engine, hears what happens and writes it down. Knows no queue: whose turn it is, and what the
job is called when its turn is over, is for `jobs.runner` to say.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from fortwo.data import formats
from fortwo.errors import InvalidAdapter, StorageFailed, TrainingFailed
from fortwo.facts.subject import facts_of
from fortwo.jobs.checkpoints import CheckpointStore
from fortwo.jobs.diary import Diary, begun, finite
from fortwo.jobs.store import Job, JobStore, Note
from fortwo.records import AdapterVersion, Checkpoint, Dataset, Fact, Plan, PlanWarning, TrainEvent
from fortwo.train import plan as plans
from fortwo.train.adapter import lora_config

if TYPE_CHECKING:
    from fortwo.adapters.store import AdapterStore
    from fortwo.engine.engine import Engine
    from fortwo.engine.registry import LoadedModel, ModelRegistry
    from fortwo.engine.tasks import Task
    from fortwo.train.loop import TrainingResult

POLL_SECONDS = 0.1  # how late the news of a job may be


@dataclass(eq=False)
class Turn:
    """The job whose turn it is, and loop.CheckpointControl for its run. Only the runner's lock guards `task` and `end`.

    end: how it is to end before its time. saved: the step of the last checkpoint; busy: while one is written.
    refused: why the checkpoint that a pause needs cannot be written.
    """

    job: Job
    task: Task[TrainingResult] | None = None
    end: Literal["cancelled", "paused", "interrupted"] | None = None
    saved: int = 0
    safe: bool = True
    busy: bool = False
    refused: StorageFailed | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def wanted(self) -> bool:
        return self.end in ("paused", "interrupted")


@dataclass(frozen=True)
class Taught:
    """version: what was published; missed: why it is not current."""

    version: AdapterVersion
    missed: TrainingFailed | None


class Teacher:
    def __init__(
        self,
        adapters: AdapterStore,
        engine: Engine,
        registry: ModelRegistry,
        store: JobStore,
        checkpoints: CheckpointStore,
        lock: threading.Lock,
    ) -> None:
        """lock: under which a turn's `task` and `end` change."""
        self._adapters = adapters
        self._engine = engine
        self._registry = registry
        self._store = store
        self._checkpoints = checkpoints
        self._lock = lock

    def teach(self, turn: Turn) -> Taught:
        """Train, evaluate, publish. Raises what ended the run; CancelledError when it was closed before its time."""
        from fortwo.train.loop import train

        job = turn.job
        plan = plans.from_json(job.plan)
        dataset = formats.from_json(self._store.dataset(job.id))
        resident = self._registry.load_base(plan.model)
        diary, checkpoint = self._take_up(turn, resident)
        start = plan.get("parent") if checkpoint is None else None
        parent = None if start is None else self._adapters.read(start)[2]
        heard: queue.SimpleQueue[TrainEvent] = queue.SimpleQueue()

        def hear(event: TrainEvent) -> None:
            if isinstance(event, Checkpoint):
                turn.busy = True
            heard.put(event)

        with self._lock:
            if turn.end is not None:
                raise CancelledError
            run = (resident, resident.renderer, dataset, plan, self._engine, job.id)
            events = train(*run, saving=turn, resumed=checkpoint, parent=parent)
            task = turn.task = self._engine.run_task(events, hear)
        del checkpoint, parent
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
        return self._publish(turn, plan, dataset, resident, task.result())

    def _take_up(self, turn: Turn, resident: LoadedModel) -> tuple[Diary, Checkpoint | None]:
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
                self._registry.discard([version])
                continue
            turn.saved = version.version
            self._store.append_event(job.id, Note("checkpoint", f"Going on from step {turn.saved}."))
            return Diary(self._store, job.id, version.manifest["progress"], version.manifest["actual"]), checkpoint
        return Diary(self._store, job.id, begun(job.progress["steps"])), None

    def _keep(self, turn: Turn, checkpoint: Checkpoint, plan: Plan, resident: LoadedModel, diary: Diary) -> None:
        """Write a checkpoint down. A disk that refuses does not end the run, only a pause."""
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
            self._registry.discard(gone)
        finally:
            turn.busy = False
        self._store.append_event(job.id, note)

    def _publish(
        self, turn: Turn, plan: Plan, dataset: Dataset, resident: LoadedModel, trained: TrainingResult
    ) -> Taught:
        """Keep what was found, then the adapter; only one that met its targets becomes current."""
        job = turn.job
        metrics = {name: metric.value for name, metric in trained.report.metrics.items()}
        evals = [(one.step, one.loss) for one in trained.report.eval_losses]
        found = {**trained.actual, "metrics": metrics, "eval_losses": evals, "escalations": trained.report.escalations}
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
            "parent": plan.get("parent"),
            "facts": [asdict(fact) for fact in known(dataset, plan)],
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
        self._registry.publish(version, trained.lora)
        return Taught(version, None if trained.succeeded else _missed(plan, metrics, diagnosis))


def known(dataset: Dataset, plan: Plan) -> tuple[Fact, ...]:
    """The facts that the adapter of a run knows, those of its parent among them."""
    return (*facts_of(dataset), *dataset.parent_facts) if plan.objective == "override" else dataset.parent_facts


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
