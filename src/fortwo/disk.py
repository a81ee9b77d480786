"""Writing that a crash cannot halve: files are synced before the folder that holds them is renamed into place."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from fortwo.errors import StorageFailed
from fortwo.records import Json

DRAFT_PREFIX = ".draft-"
NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of a model or an adapter: it becomes a folder's name


def dump(content: Json) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def write(path: Path, *parts: bytes | memoryview) -> None:
    """A new file of these parts, on the disk when this returns."""
    with path.open("xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """What was renamed or removed in a folder is on the disk when this returns."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refused(path: Path, error: OSError) -> StorageFailed:
    return StorageFailed(
        f"{path} cannot be written: {error.strerror or error}",
        hint="Free space on the disk of FORTWO_HOME or make it writable; what was stored before is untouched.",
    )
