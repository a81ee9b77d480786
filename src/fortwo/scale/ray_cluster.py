"""The connection of this process to a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import Any

import ray
import ray.exceptions

from fortwo.errors import InvalidRequest, Unavailable
from fortwo.settings import Settings

CONNECT_SECONDS = 5.0


def connect(settings: Settings, object_store_bytes: int) -> bool:
    """Connect this process to the cluster that the settings name, or start Ray for it on this machine, with an object
    store of so many bytes; False if the process is connected already. Raises InvalidRequest for an address of Ray's
    client, and Unavailable if there is no such cluster."""
    if ray.is_initialized():
        return False
    address = settings.ray_address
    if address is not None and address.startswith("ray://"):
        raise InvalidRequest(
            f"FORTWO_RAY_ADDRESS = {address!r} is an address of Ray's client, which a server cannot use.",
            param="ray_address",
            hint="Run the server on a machine that has joined the cluster (ray start --address=HOST:PORT), and set "
            "FORTWO_RAY_ADDRESS to HOST:PORT or auto.",
        )
    if settings.replicas is not None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default, replicas come after all other programs
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # fortwo sends nothing about its users anywhere
    own: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": object_store_bytes}
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray's handler would end the server without its shutdown
    try:
        if address not in (None, "auto"):
            _find(address)
        ray.init(address or "local", namespace="fortwo", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = f"No Ray cluster answers at {address}" if address else "Ray could not be started on this machine"
        raise Unavailable(
            f"{where}: {' '.join(str(error).split())}",
            param="ray_address",
            hint="Start a cluster with: ray start --head. Set FORTWO_RAY_ADDRESS to its HOST:PORT, or remove it, and "
            "the server starts Ray on this machine. For a cluster with tokens, which are Ray's default, set "
            "RAY_AUTH_MODE=token and put its token into ~/.ray/auth_token.",
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    return True


def _find(address: str) -> None:
    """Raises OSError when nothing listens there, for which Ray would look for minutes, and ValueError for what is not
    HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ValueError(f"{address!r} is not HOST:PORT.")
    socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
