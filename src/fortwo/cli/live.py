"""Follows a job: a progress bar with loss and learning rate, a line for every other event, and then the outcome."""

from __future__ import annotations

from collections.abc import Iterable

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fortwo.cli import views
from fortwo.cli.client import Client
from fortwo.cli.terminal import error_screen, is_interactive, print_json_line, respond, screen
from fortwo.display import value
from fortwo.records import Json


def start(client: Client, body: Json, *, ask: bool, detach: bool, as_json: bool) -> Json:
    """Show the plan of a request, start its job, and follow it unless `detach`. Returns the job, or what the server
    said when it was started. ask: let a person at a terminal decide behind the plan. Raises typer.Exit as `follow`
    does, and typer.Abort when the person declines."""
    if ask and not as_json and is_interactive():
        screen.print(views.plan_summary(client.post("/api/training/plan", body)))
        typer.confirm("Start?", default=True, abort=True)
        started: Json = client.post("/api/training/start", body)
    else:
        started = client.post("/api/training/start", body)
        if not as_json:
            screen.print(views.plan_summary(started["plan"]))
    job_id = started["job_id"]
    if not detach:
        return follow(client, job_id, as_json)
    respond(started, f"Job {job_id} is {started['status']}. Follow it with: fortwo jobs watch {job_id}", as_json)
    return started


def follow(client: Client, job_id: str, as_json: bool = False) -> Json:
    """What `watch` does. Raises typer.Exit with status 1 unless the job succeeded."""
    job = watch(client, job_id, as_json)
    if job["status"] != "succeeded":
        raise typer.Exit(1)
    return job


def watch(client: Client, job_id: str, as_json: bool) -> Json:
    """Show a job until it ends or is paused, then its outcome, and return it. as_json: each event is a line, and the
    last line is the job. Raises typer.Exit with status 130 after Ctrl-C."""
    events = client.events(job_id)
    try:
        if as_json:
            for event in events:
                print_json_line(event)
        else:
            _show(events)
    except KeyboardInterrupt:
        error_screen.print(
            f"\nThe job continues. Show, pause or cancel it with: fortwo jobs show | pause | cancel {job_id}"
        )
        raise typer.Exit(130) from None
    job: Json = client.get(f"/api/training/jobs/{job_id}")
    if as_json:
        print_json_line(job)
    else:
        screen.print(views.outcome(job))
    return job


def _show(events: Iterable[Json]) -> None:
    """Show a job's events until they end."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("queued", total=None, pace="")
        for event in events:
            data = event["data"]
            if event["type"] == "step":
                speed = f"{data['tokens_per_second']:.0f} tokens/s"
                pace = f"loss {value(data['loss'])}  rate {data['learning_rate']:.1e}  {speed}"
                bar.update(task, completed=data["step"], total=data["steps"], pace=pace)
            elif event["type"] == "metrics":
                screen.print(f"step {data['step']}: {views.metrics_line(data['metrics'], data.get('eval_loss'))}")
            else:
                if event["type"] != "checkpoint":
                    bar.update(task, description=event["type"])
                screen.print(event["message"])
