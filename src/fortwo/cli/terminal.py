"""What all commands share: the two consoles, the connection to the server, how an error of ours ends a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fortwo.cli import views
from fortwo.errors import FortwoError

if TYPE_CHECKING:
    from fortwo.cli.client import Client

# What models and servers say is printed as it is: no markup, no emoji codes.
screen = Console(highlight=False, markup=False, emoji=False)
complaints = Console(stderr=True, highlight=False, markup=False, emoji=False)


class Commands(TyperGroup):
    """Turns an error of ours into its message, its hint and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FortwoError as error:
            complaints.print(views.error(error.message, error.hint))
            raise typer.Exit(1) from None


def connect() -> Client:
    """A client of the server that the settings name."""
    from fortwo.cli.client import Client
    from fortwo.settings import load

    return Client(load())
