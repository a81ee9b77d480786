"""Records a run in the database: an event for everything that happens, and how far the job has come.

When the database refuses (locked, full, damaged), what was not stored waits in memory in its order while the training
goes on, and is stored with the next record that works. NaN and infinity become null, because JSON has neither.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import asdict
from typing import Any

from fortwo.jobs.database import DATABASE_ERRORS
from fortwo.jobs.store import JobStore, NewEvent
from fortwo.records import Evaluated, Json, Phase, Stepped, TrainEvent

log = logging.getLogger(__name__)


class ProgressRecorder:
    """Stores the events of one run, and updates the job's progress and its measurements (`actual`)."""

    def __init__(self, store: JobStore, job_id: str, progress: Json, actual: Json | None = None) -> None:
        """progress, actual: those of the checkpoint from which the run resumes, or initial ones."""
        self._store = store
        self._job_id = job_id
        self._progress = dict(progress)
        self._refused = False  # whether the database refused the last time
        self._waiting: deque[tuple[NewEvent | None, dict[str, Any]]] = deque()
        self._actual: Json = {"training_seconds": 0.0, "tokens": 0, "peak_learning_rate": 0.0} | (actual or {})

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        step: int = self._progress["step"]
        return step

    def snapshot(self) -> Json:
        """Progress and measurements so far, for a checkpoint's manifest."""
        return {"progress": dict(self._progress), "actual": nan_to_null(self._actual)}

    def record(self, event: TrainEvent) -> None:
        """Store one event of the run. Events of other types than Phase, Stepped and Evaluated are ignored."""
        match event:
            case Phase():
                message = event.detail if event.detail else f"{event.name.capitalize()}."
                self.store(NewEvent(event.name, message), status=event.name)
            case Stepped():
                self._count(event)
                data = nan_to_null(asdict(event)) | {"tokens_per_second": event.tokens / event.seconds}
                message = f"Step {event.step}/{event.steps}: loss {event.loss:.4g}, rate {event.learning_rate:.3g}"
                self._advance(NewEvent("step", message, data), actual=nan_to_null(self._actual))
            case Evaluated():
                loss = [] if event.eval_loss is None else [f"eval_loss {event.eval_loss:.4g}"]
                shares = "  ".join([*(f"{name} {share:.2f}" for name, share in event.metrics.items()), *loss])
                self._advance(NewEvent("metrics", f"Step {event.step}: {shares}", nan_to_null(asdict(event))))

    def _count(self, event: Stepped) -> None:
        actual = self._actual
        actual.setdefault("first_loss", event.parts["learn"])
        actual["final_loss"] = event.parts["learn"]
        actual["steps"] = event.step
        actual["training_seconds"] += event.seconds
        actual["tokens"] += event.tokens
        actual["tokens_per_second"] = actual["tokens"] / actual["training_seconds"]
        actual["peak_learning_rate"] = max(actual["peak_learning_rate"], event.learning_rate)

    def _advance(self, note: NewEvent, **more: Any) -> None:
        self._progress |= {name: note.data[name] for name in self._progress.keys() & note.data.keys()}
        self.store(note, progress=dict(self._progress), **more)

    def store(self, event: NewEvent | None, **changes: Any) -> None:
        """Store an event and changes of the job, now or when the database works again."""
        self._waiting.append((event, changes))
        self.flush()

    def flush(self) -> bool:
        """Try to store what waits; whether nothing waits any more."""
        while self._waiting:
            event, changes = self._waiting[0]
            try:
                if changes:
                    self._store.update(self._job_id, event, **changes)
                elif event is not None:
                    self._store.append_event(self._job_id, event)
            except DATABASE_ERRORS as error:
                if not self._refused:
                    log.warning("Job %s goes on, but cannot be recorded: %s", self._job_id, error.message)
                self._refused = True
                return False
            self._waiting.popleft()
        if self._refused:
            log.warning("Job %s is recorded again; nothing is missing.", self._job_id)
        self._refused = False
        return True


def initial_progress(steps: int) -> Json:
    """The progress of a job that has not begun. steps: how many optimizer steps its plan has."""
    return {"step": 0, "steps": steps, "loss": None, "learning_rate": None, "tokens_per_second": None, "metrics": {}}


def nan_to_null(data: Json) -> Json:
    """The same data with null in place of NaN and infinity, at any depth."""
    return {name: _nan_to_null(value) for name, value in data.items()}


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, dict):
        return nan_to_null(value)
    if isinstance(value, list | tuple):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
