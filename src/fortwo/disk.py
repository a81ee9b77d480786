"""Crash-safe writing: after a crash a file has its old content or its new content, never a part of it."""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path

from fortwo.errors import StorageFailed
from fortwo.records import Json

DRAFT_PREFIX = ".draft-"
NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of a model or an adapter, and of its folder


def dump(content: Json) -> bytes:
    """JSON as this program stores it: UTF-8, indented by one space."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def write(path: Path, content: bytes) -> None:
    """Create a file and wait until it is on the disk. Raises FileExistsError when it exists."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Create a file or replace its content atomically: readers see the old content or the new. Raises OSError."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(fresh, content)
        fresh.replace(path)
        sync(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def sync(directory: Path) -> None:
    """Wait until everything that was created, renamed or removed in a directory is on the disk. Windows opens no
    directories and needs nothing."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def storage_failed(path: Path, error: OSError) -> StorageFailed:
    """The error to raise when writing `path` failed."""
    return StorageFailed(
        f"{path} cannot be written: {error.strerror or error}",
        hint="Free space on the disk of FORTWO_HOME or make it writable; what was stored before is untouched.",
    )
