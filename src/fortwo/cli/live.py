"""Follows a job: a progress bar with loss and learning rate, a line for every other event, and then the outcome."""

from __future__ import annotations

from collections.abc import Iterable

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fortwo.cli import views
from fortwo.cli.client import Client
from fortwo.cli.terminal import screen
from fortwo.records import Json


def _watch(events: Iterable[Json]) -> None:
    """Show a job's events until they end."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=screen) as bar:
        task = bar.add_task("queued", total=None, pace="")
        for event in events:
            data = event["data"]
            if event["type"] == "step":
                speed = f"{data['tokens_per_second']:.0f} tokens/s"
                pace = f"loss {views.value(data['loss'])}  rate {data['learning_rate']:.1e}  {speed}"
                bar.update(task, completed=data["step"], total=data["steps"], pace=pace)
            elif event["type"] == "metrics":
                screen.print(f"step {data['step']}: {views.metrics_line(data['metrics'], data.get('eval_loss'))}")
            else:
                if event["type"] != "checkpoint":
                    bar.update(task, description=event["type"])
                screen.print(event["message"])


def follow(client: Client, job_id: str) -> None:
    """Show a job until it ends or is paused, then its outcome. Exits with status 1 unless it succeeded."""
    try:
        _watch(client.events(job_id))
    except KeyboardInterrupt:
        screen.print(f"\nThe job continues. Show, pause or cancel it with: fortwo jobs show | pause | cancel {job_id}")
        raise typer.Exit(130) from None
    job = client.get(f"/api/training/jobs/{job_id}")
    outcome(job)
    if job["status"] != "succeeded":
        raise typer.Exit(1)


def outcome(job: Json) -> None:
    """Print what came of a job: checkpoints, metrics, diagnosis, error and adapter."""
    for checkpoint in job["checkpoints"]:
        screen.print(f"Checkpoint of step {checkpoint['step']}: fortwo chat --model {checkpoint['model']}")
    if job["status"] == "paused":
        screen.print(f"Resume it with: fortwo jobs resume {job['job_id']}")
    if job["report"] is not None:
        screen.print(views.metrics_line({name: found["value"] for name, found in job["report"]["metrics"].items()}))
        screen.print(views.notes(job["report"]["diagnosis"], style="red"))
    if job["error"] is not None:
        screen.print(views.error(job["error"]["message"], job["error"]["hint"]))
    if job["adapter"] is not None:
        name, version = job["adapter"]["name"], job["adapter"]["version"]
        ref = name if job["status"] == "succeeded" else f"{name}@{version}"
        screen.print(f"The adapter is {name}@{version}. Try it with: fortwo chat --model {ref}")
