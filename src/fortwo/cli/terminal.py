"""What all commands share: the two consoles, JSON output, the connection to the server, and how errors are shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from fortwo.cli import views
from fortwo.errors import FortwoError

if TYPE_CHECKING:
    from fortwo.cli.client import Client

AS_JSON = "fortwo.as_json"  # key in the context that all commands of one call share
PIPE_WIDTH = 100_000  # columns; no table is cut or folded in a pipe or a file


class Screen(Console):
    """A console on which text of models and servers is printed unchanged: no markup, no emoji codes. Its width is
    COLUMNS if that is set, else the terminal's, else PIPE_WIDTH."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() or os.environ.get("COLUMNS", "").isdigit() else PIPE_WIDTH
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


_opened: list[Client] = []  # by the command that runs
screen = Screen()
error_screen = Screen(stderr=True)


def _remember(context: typer.Context, value: bool) -> bool:
    context.meta[AS_JSON] = value
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_remember)]


def print_json(body: Any) -> None:
    """Print one JSON document."""
    screen.print_json(data=body)


def print_json_line(body: Any) -> None:
    """Print a JSON document in one line, as part of a stream, at once."""
    print(json.dumps(body, ensure_ascii=False), file=screen.file, flush=True)


def respond(body: Any, shown: RenderableType | None, as_json: bool) -> None:
    """Print the answer of a command: what is `shown` to people, or `body` as JSON; shown: None if that is JSON too."""
    if as_json or shown is None:
        print_json(body)
    else:
        screen.print(shown)


def is_interactive() -> bool:
    """Whether a person reads the output and can answer a question."""
    return sys.stdin.isatty() and screen.is_terminal


class CommandGroup(TyperGroup):
    """Shows a FortwoError as its message and hint, or with --json as {"error": ...}, and exits with status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FortwoError as error:
            if ctx.meta.get(AS_JSON):
                print_json_line(error.body())
            else:
                error_screen.print(views.error(error.message, error.hint))
            raise typer.Exit(1) from None
        finally:
            while _opened:
                _opened.pop().close()


def connect() -> Client:
    """A client of the server at the host and port of the settings. It is closed when the command ends."""
    from fortwo.cli.client import Client
    from fortwo.settings import load

    settings = load()
    client = Client(settings.url, settings.plain_api_key)
    _opened.append(client)
    return client


@contextmanager
def progress_bars(console: Console = screen) -> Iterator[Callable[[str, int, int], None]]:
    """A function progress(label, done, total) that shows a bar for each label; in a pipe, only its last state."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield progress
