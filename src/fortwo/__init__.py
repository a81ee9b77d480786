"""Teach a local language model something new, prove on its replies that it learned it, and serve it.

Most users need only the `fortwo` command and the HTTP API of `fortwo serve`. From Python, `Client` calls a running
server, `load_settings` reads the settings, and every error is a `FortwoError`. Importing the package loads no torch.
"""

from typing import TYPE_CHECKING, Any

from fortwo.errors import FortwoError

if TYPE_CHECKING:
    from fortwo.cli.client import Client
    from fortwo.settings import Settings
    from fortwo.settings import load as load_settings

__all__ = ["Client", "FortwoError", "Settings", "load_settings"]


def __getattr__(name: str) -> Any:
    """Imports all but FortwoError on first use, so that the command line starts at once."""
    if name == "Client":
        from fortwo.cli.client import Client

        return Client
    if name in ("Settings", "load_settings"):
        from fortwo import settings

        return settings.Settings if name == "Settings" else settings.load
    raise AttributeError(f"module 'fortwo' has no attribute {name!r}")
