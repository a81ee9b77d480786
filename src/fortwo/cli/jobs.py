"""The commands that list, show, watch, cancel, pause and resume training jobs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from fortwo.cli import views
from fortwo.cli.terminal import AsJson, connect, respond
from fortwo.errors import NotFound

jobs = typer.Typer(help="List, show, watch, cancel, pause and resume training jobs.", no_args_is_help=True)


@jobs.command("list")
def list_jobs(as_json: AsJson = False) -> None:
    """List the jobs, newest first."""
    found = connect().get("/api/training/jobs")
    rows = views.table("job", "status", "adapter", "step", "created", wrapped=("adapter",))
    for job in found["jobs"]:
        progress = job["progress"]
        step = f"{progress['step']}/{progress['steps']}"
        rows.add_row(
            job["job_id"], views.status(job["status"]), job["adapter_name"], step, views.moment(job["created_at"])
        )
    respond(found, rows, as_json)


@jobs.command("show")
def show_job(job_id: str, as_json: AsJson = False) -> None:
    """Show a job, and follow it while it runs. With --json the job as it is now is printed, and not followed."""
    from fortwo.cli.live import follow

    client = connect()
    job = client.get(f"/api/training/jobs/{job_id}")
    if not as_json and job["finished_at"] is None and job["status"] != "paused":
        follow(client, job_id)
        return
    title = Text.assemble(f"{job['adapter_name']} on {job['model']}: ", views.status(job["status"]))
    parts = [] if job["actual"] is None else [views.plan_against_actual(job["plan"], job["actual"])]
    respond(job, Group(title, *parts, views.outcome(job)), as_json)


@jobs.command("watch")
def watch_job(
    job_id: Annotated[
        str | None, typer.Argument(help="Id of the job.", show_default="the one that runs, or runs next")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch a job until it ends or is paused, from its first event. Exits with 0 if it succeeded, else with 1. With
    --json each event is a line, and the last line is the job."""
    from fortwo.cli.client import ENDED
    from fortwo.cli.live import follow

    client = connect()
    if job_id is None:
        waiting = [job for job in client.get("/api/training/jobs")["jobs"] if job["status"] not in (*ENDED, "paused")]
        if not waiting:
            raise NotFound("No job runs or waits.", param="job_id", hint="List all jobs with: fortwo jobs list")
        queued = [job for job in waiting if job["status"] == "queued"]
        job_id = min([job for job in waiting if job not in queued] or queued, key=lambda job: job["created_at"])[
            "job_id"
        ]
    follow(client, job_id, as_json)


@jobs.command("cancel")
def cancel_job(job_id: str, as_json: AsJson = False) -> None:
    """Cancel a job and delete its checkpoints."""
    job = connect().post(f"/api/training/jobs/{job_id}/cancel")
    respond(job, f"Job {job_id} is {job['status']}.", as_json)


@jobs.command("pause")
def pause_job(job_id: str, as_json: AsJson = False) -> None:
    """Pause a job with a checkpoint; the next one in the queue begins."""
    job = connect().post(f"/api/training/jobs/{job_id}/pause")
    respond(job, f"Job {job_id} is {job['status']}.", as_json)


@jobs.command("resume")
def resume_job(job_id: str, as_json: AsJson = False) -> None:
    """Resume a paused, failed or cancelled job from its last checkpoint, and follow it."""
    from fortwo.cli.live import follow

    client = connect()
    client.post(f"/api/training/jobs/{job_id}/resume")
    follow(client, job_id, as_json)
