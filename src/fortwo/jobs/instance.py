"""The id of a home, by which servers that share a database know whose a job is."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from fortwo import disk

FILE = "instance_id"


def instance_id(home: Path) -> str:
    """The id of this home, which is made at the first start. Raises StorageFailed when it cannot be written."""
    path = home / FILE
    try:
        found = path.read_text("ascii").strip() if path.exists() else ""
        if not re.fullmatch(r"[0-9a-f]{32}", found):
            found = uuid.uuid4().hex
            disk.replace(path, f"{found}\n".encode())
    except (OSError, UnicodeDecodeError) as error:
        raise disk.storage_failed(path, error if isinstance(error, OSError) else OSError(str(error))) from error
    return found
