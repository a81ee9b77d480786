"""OpenAI's objects of fine-tuning: a job, its events and its checkpoints, from fortwo's own. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from fortwo.jobs.fine_tuned_models import ORGANIZATION, model_name
from fortwo.jobs.results import result_file_id
from fortwo.jobs.store import Event, Job, Status
from fortwo.records import CheckpointVersion, Json

JOB_PREFIX, EVENT_PREFIX = "ftjob-", "ftevent-"

STATUSES: dict[Status, str] = {
    "queued": "queued",
    "preparing": "validating_files",  # the base is loaded and the rows are read again
    "running": "running",
    "evaluating": "running",
    "paused": "paused",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}


def job_object(job: Job, files: Container[str]) -> Json:
    """files: the ids of the files that exist, of those of results."""
    asked = job.fine_tuning or {}
    settings = {setting["name"]: setting["value"] for setting in job.plan["settings"]}
    hyperparameters = {
        "n_epochs": _whole(job.plan["computed"]["epochs"]),
        "batch_size": settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"],
        "learning_rate_multiplier": asked.get("hyperparameters", {}).get("learning_rate_multiplier", 1.0),
    }
    method = "dpo" if job.plan["objective"] == "dpo" else "supervised"
    if method == "dpo":
        hyperparameters["beta"] = settings["beta"]
    results, ended = result_file_id(job.id), job.ended
    running = job.started_at is not None and not job.ended_or_paused
    return {
        "id": f"{JOB_PREFIX}{job.id}",
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": int(job.finished_at) if ended and job.finished_at is not None else None,
        "estimated_finish": int((job.started_at or 0) + job.plan["computed"]["seconds"]) if running else None,
        "model": asked.get("model", job.model),
        "fine_tuned_model": model_name(job) if job.status == "succeeded" else None,
        "organization_id": ORGANIZATION,
        "status": STATUSES[job.status],
        "training_file": asked.get("training_file") or "",
        "validation_file": asked.get("validation_file"),
        "result_files": [results] if results in files else [],
        "trained_tokens": job.actual["tokens"] if job.actual is not None and job.status == "succeeded" else None,
        "hyperparameters": hyperparameters,
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
        "seed": settings["seed"],
        "suffix": asked.get("suffix"),
        "user_provided_suffix": asked.get("suffix"),
        "metadata": asked.get("metadata"),
        "integrations": [],
        "error": None if job.error is None else {name: job.error[name] for name in ("code", "message", "param")},
    }


def event_object(event: Event) -> Json:
    """Steps and evaluations are OpenAI's metrics, everything else is a message."""
    data: Json = {}
    if event.type == "step":
        data = {
            "step": event.data["step"],
            "total_steps": event.data["steps"],
            "train_loss": event.data["loss"],
            "learning_rate": event.data["learning_rate"],
        }
    elif event.type == "metrics":
        data = {"step": event.data["step"], **_valid_losses(event.data["eval_loss"]), **event.data["metrics"]}
    return {
        "id": f"{EVENT_PREFIX}{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if data else "message",
        "data": data,
    }


def checkpoint_objects(
    job: Job, saved: tuple[CheckpointVersion, ...], eval_losses: Mapping[int, float | None]
) -> list[Json]:
    """Newest first: the version that a job has published, or the checkpoints of one that is not done. eval_losses: by
    step, where validation rows were evaluated."""
    found = [
        _checkpoint(
            job,
            one.version,
            one.created_at,
            model_name(job, one.version),
            one.manifest["progress"]["loss"],
            eval_losses.get(one.version),
        )
        for one in saved
    ]
    if job.adapter is not None and job.actual is not None:
        step, loss, validated = job.progress["step"], job.actual.get("final_loss"), job.actual.get("eval_loss")
        found.append(_checkpoint(job, step, job.finished_at or 0, model_name(job), loss, validated))
    return found[::-1]


def _valid_losses(loss: float | None) -> Json:
    """OpenAI has one loss on a batch of validation rows and one on all; here every evaluation is of all."""
    return {"valid_loss": loss, "full_valid_loss": loss}


def _checkpoint(
    job: Job, step: int, created: float, name: str, train_loss: float | None, valid_loss: float | None
) -> Json:
    metrics = {"step": step, "train_loss": train_loss, **_valid_losses(valid_loss)}
    return {
        "id": f"ftckpt-{job.id[:8]}-{step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(created),
        "fine_tuned_model_checkpoint": name,
        "fine_tuning_job_id": f"{JOB_PREFIX}{job.id}",
        "step_number": step,
        "metrics": {key: value for key, value in metrics.items() if value is not None},
    }


def _whole(number: Any) -> Any:
    return int(number) if number == int(number) else number
