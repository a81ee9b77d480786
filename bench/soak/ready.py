"""How long a server takes from its start to its first answer, with many jobs and versions in its home."""

from __future__ import annotations

import json
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path

from bench.soak.server import new_home, running

PATHS = ("/v1/models", "/api/adapters", "/api/training/jobs", "/readyz")
VERSIONS_OF_ONE = 20  # versions of one adapter


def start_times(folder: Path, count: int, times: int = 3) -> dict[str, float]:
    """Medians in seconds: of the start with `count` jobs and versions, of the start without, of the first answer of
    each path, and of the import of torch alone."""
    empty, full = new_home(folder, "empty"), new_home(folder, "full")
    with running(full) as server:
        server.train("taught", steps=1)
        server.wait_until_idle()
    _multiply(full, count)
    found: dict[str, list[float]] = {}
    for _ in range(times):
        found.setdefault("import torch", []).append(_import_torch())
        with running(empty) as server:
            found.setdefault("an empty home", []).append(server.seconds)
        with running(full) as server:
            found.setdefault(f"{count} jobs and versions", []).append(server.seconds)
            for path in PATHS:
                began = time.monotonic()
                server.http.get(path).raise_for_status()
                found.setdefault(f"GET {path}", []).append(time.monotonic() - began)
    return {what: statistics.median(seconds) for what, seconds in found.items()}


def _import_torch() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - began


def _multiply(home: Path, count: int) -> None:
    """Copy the one job and the one version of the home until there are `count` of each."""
    first = home / "adapters" / "taught"
    state = json.loads((first / "versions.json").read_text())
    for number in range(1, count):
        adapter, version = divmod(number, VERSIONS_OF_ONE)
        name = first.with_name(f"taught{adapter}") if adapter else first
        shutil.copytree(first / "1", name / str(version + 1))
        last = version + 1
        (name / "versions.json").write_text(json.dumps(state | {"current": [last], "last": last}))
    with sqlite3.connect(home / "fortwo.db") as database:
        (job,) = database.execute("SELECT id FROM jobs").fetchone()
        columns = [row[1] for row in database.execute("PRAGMA table_info(jobs)") if row[1] != "id"]
        names = ", ".join(columns)
        for _ in range(1, count):
            database.execute(
                f"INSERT INTO jobs (id, {names}) SELECT ?, {names} FROM jobs WHERE id = ?", (str(uuid.uuid4()), job)
            )
    database.close()
