"""The command line: commands that send requests to the server over HTTP and show the answers with Rich."""

from fortwo.cli.commands import app

__all__ = ["app"]
