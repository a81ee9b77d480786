"""The home folder: made for its user alone, locked by the one server that may use it, and known by an id.

A second server would take the first one's running jobs for interrupted ones. The lock is the kernel's: it ends with the
process that holds it, so no lock is ever left behind.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fortwo import disk
from fortwo.errors import Conflict, StorageFailed

LOCK = ".server.lock"
ID = "instance_id"
PRIVATE = 0o700


def make_home(home: Path) -> None:
    """Make the home if necessary. Raises StorageFailed when it cannot be written."""
    try:
        if not home.is_dir():
            home.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        (home / LOCK).touch()
    except OSError as error:
        raise _unwritable(home, error) from None


def _unwritable(home: Path, error: OSError) -> StorageFailed:
    return StorageFailed(
        f"The home {home} cannot be written: {error.strerror}.",
        param="home",
        hint="Make it writable for this user, or set FORTWO_HOME to another folder.",
    )


@contextmanager
def lock_home(home: Path) -> Iterator[None]:
    """Make the home if necessary, and hold its lock inside the context. Raises Conflict when a server holds it, and
    StorageFailed when the home cannot be written."""
    make_home(home)
    lock = FileLock(home / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Conflict(
            f"Another server already uses {home}.",
            param="home",
            hint="Stop it, or set FORTWO_HOME to another folder for this one.",
        ) from None
    except OSError as error:
        raise _unwritable(home, error) from None
    try:
        yield
    finally:
        lock.release()


def home_id(home: Path) -> str:
    """The id by which servers that share a database know whose a job is; made at the first start of the home. Raises
    StorageFailed when it cannot be written."""
    path = home / ID
    try:
        found = path.read_text("ascii", "replace").strip() if path.exists() else ""
        if not re.fullmatch(r"[0-9a-f]{32}", found):
            found = uuid.uuid4().hex
            disk.replace(path, f"{found}\n".encode())
    except OSError as error:
        raise disk.storage_failed(path, error) from error
    return found
