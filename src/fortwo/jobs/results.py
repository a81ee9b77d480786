"""The result file of a job: its step metrics as a table, from the events that the database has."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fortwo.errors import StorageFailed
from fortwo.jobs.store import Event, JobStore

if TYPE_CHECKING:
    from fortwo.jobs.files import FileStore

log = logging.getLogger(__name__)

RESULTS = "fine-tune-results"  # the purpose of such a file
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")  # OpenAI's
BATCH = 1000


def result_file_id(job_id: str) -> str:
    return f"file-{job_id.replace('-', '')}-results"


def step_metrics_csv(store: JobStore, job_id: str) -> bytes:
    """A line for each step; what is not measured is empty. Of a step that was repeated after a resume, the last
    counts."""
    rows: dict[int, dict[str, Any]] = {}
    for event in _events(store, job_id, "step", "metrics"):
        row = rows.setdefault(event.data["step"], {"step": event.data["step"]})
        key = "train_loss" if event.type == "step" else "valid_loss"
        row[key] = event.data["loss" if event.type == "step" else "eval_loss"]
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows[step] for step in sorted(rows))
    return text.getvalue().encode()


def store_results(store: JobStore, files: FileStore, job_id: str) -> None:
    """Write the file of step metrics that OpenAI's API promises. When the disk refuses, the job ends without it."""
    try:
        files.put(result_file_id(job_id), "step_metrics.csv", RESULTS, step_metrics_csv(store, job_id))
    except StorageFailed as error:
        log.warning("The step metrics of job %s were not written: %s", job_id, error.message)


def eval_losses(store: JobStore, job_id: str) -> dict[int, float | None]:
    """The loss on validation rows by step; of a step that was repeated after a resume, the last one."""
    return {event.data["step"]: event.data["eval_loss"] for event in _events(store, job_id, "metrics")}


def _events(store: JobStore, job_id: str, *types: str) -> Iterator[Event]:
    """All events of these types, oldest first."""
    last = 0
    while events := store.events(job_id, last, BATCH, types=types):
        yield from events
        last = events[-1].id
