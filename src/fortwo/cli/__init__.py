"""The command line: what a user types, sent to the server over HTTP and shown with Rich."""

from fortwo.cli.commands import app

__all__ = ["app"]
