"""Teach a local language model something new, prove on its replies that it learned it, and serve it.

Most users need only the `fortwo` command and the HTTP API of `fortwo serve`. From Python, `Client` calls a running
server, `Settings` reads settings.toml and FORTWO_*, errors are `FortwoError`s. Importing fortwo imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fortwo.errors import FortwoError

if TYPE_CHECKING:
    from fortwo.cli.client import Client
    from fortwo.settings import Settings

__all__ = ["Client", "FortwoError", "Settings"]
_LAZY = {"Client": "fortwo.cli.client", "Settings": "fortwo.settings"}  # imported on first use, to start quickly


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fortwo' has no attribute {name!r}")
