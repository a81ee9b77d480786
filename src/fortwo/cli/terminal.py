"""What all commands share: the two consoles, the connection to the server, and how errors are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fortwo.cli import views
from fortwo.errors import FortwoError

if TYPE_CHECKING:
    from fortwo.cli.client import Client

# Text of models and servers is printed unchanged: no markup, no emoji codes.
screen = Console(highlight=False, markup=False, emoji=False)
error_screen = Console(stderr=True, highlight=False, markup=False, emoji=False)


class CommandGroup(TyperGroup):
    """Shows a FortwoError as its message and hint, and exits with status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FortwoError as error:
            error_screen.print(views.error(error.message, error.hint))
            raise typer.Exit(1) from None


def connect() -> Client:
    """A client of the server at the host and port of the settings."""
    from fortwo.cli.client import Client
    from fortwo.settings import load

    settings = load()
    return Client(settings.url, settings.plain_api_key)


@contextmanager
def progress_bars(console: Console = screen) -> Iterator[Callable[[str, int, int], None]]:
    """A function progress(label, done, total) that shows a bar for each label."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield progress
