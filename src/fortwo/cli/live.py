"""A job as it goes: one bar with loss and rate, and a line for every other thing that happens."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fortwo.cli.views import metrics_line
from fortwo.records import Json


def watch(console: Console, events: Iterable[Json]) -> None:
    """Show events until they end."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("queued", total=None, pace="")
        for event in events:
            data = event["data"]
            if event["type"] == "step":
                speed = f"{data['tokens_per_second']:.0f} tokens/s"
                pace = f"loss {data['loss']:.3f}  rate {data['learning_rate']:.1e}  {speed}"
                bar.update(task, completed=data["step"], total=data["steps"], pace=pace)
            elif event["type"] == "metrics":
                console.print(f"step {data['step']}: {metrics_line(data['metrics'])}")
            else:
                bar.update(task, description=event["type"])
                console.print(event["message"])
