"""What a run tells, as the database keeps it: an event for each thing that happened, and how far the job is.

Numbers that are none become null; JSON has no NaN.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from fortwo.jobs.store import JobStore, Note
from fortwo.records import Evaluated, Json, Phase, Stepped, TrainEvent


class Diary:
    """Writes the events of a run as rows, and into the job how far it is and what it took so far."""

    def __init__(self, store: JobStore, job_id: str, progress: Json, actual: Json | None = None) -> None:
        """progress, actual: as the checkpoint has them from which the run goes on."""
        self._store = store
        self._job_id = job_id
        self._progress = dict(progress)
        self._actual: Json = {"training_seconds": 0.0, "tokens": 0, "peak_learning_rate": 0.0} | (actual or {})

    @property
    def step(self) -> int:
        """The last step that was told of."""
        step: int = self._progress["step"]
        return step

    def so_far(self) -> Json:
        """Progress and what it took, for a checkpoint's manifest."""
        return {"progress": dict(self._progress), "actual": finite(self._actual)}

    def write(self, event: TrainEvent) -> None:
        match event:
            case Phase():
                message = event.detail if event.detail else f"{event.name.capitalize()}."
                self._store.update(self._job_id, Note(event.name, message), status=event.name)
            case Stepped():
                self._count(event)
                data = finite(asdict(event)) | {"tokens_per_second": event.tokens / event.seconds}
                message = f"Step {event.step}/{event.steps}: loss {event.loss:.4g}, rate {event.learning_rate:.3g}"
                self._advance(Note("step", message, data), actual=finite(self._actual))
            case Evaluated():
                loss = [] if event.eval_loss is None else [f"eval_loss {event.eval_loss:.4g}"]
                shares = "  ".join([*(f"{name} {share:.2f}" for name, share in event.metrics.items()), *loss])
                self._advance(Note("metrics", f"Step {event.step}: {shares}", finite(asdict(event))))

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
        self._store.update(self._job_id, note, progress=self._progress, **more)


def begun(steps: int) -> Json:
    """The progress of a job of which nothing is done."""
    return {
        "step": 0,
        "steps": steps,
        "loss": None,
        "learning_rate": None,
        "tokens_per_second": None,
        "metrics": {},
    }


def finite(data: Json) -> Json:
    """JSON has no NaN: null."""
    return {name: _finite_value(value) for name, value in data.items()}


def _finite_value(value: Any) -> Any:
    if isinstance(value, dict):
        return finite(value)
    if isinstance(value, list | tuple):
        return [_finite_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
