"""How long a server takes from its start to its first answer, with many jobs and versions in its home."""

from __future__ import annotations

import json
import os
import resource
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


def start_times(folder: Path, count: int, times: int = 3) -> dict[str, tuple[float, float]]:
    """Medians of seconds and of processor seconds: of the start without jobs and versions, of that with `count` of
    each, of the first answer of each path, and of the import of torch alone."""
    empty, full = new_home(folder, "empty"), new_home(folder, "full")
    with running(full) as server:
        server.train("taught", steps=1)
        server.wait_until_idle()
    _multiply(full, count)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(times):
        found.setdefault("import torch", []).append(_import_torch())
        for what, home in (("an empty home", empty), (f"{count} jobs and versions", full)):
            with running(home) as server:
                found.setdefault(what, []).append((server.seconds, processor_seconds(server.process.pid)))
                for path in PATHS if home == full else ():
                    before, began = processor_seconds(server.process.pid), time.monotonic()
                    server.http.get(path).raise_for_status()
                    spent = processor_seconds(server.process.pid) - before
                    found.setdefault(f"GET {path}", []).append((time.monotonic() - began, spent))
    return {what: _medians(seconds) for what, seconds in found.items()}


def _medians(seconds: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(one for one, _ in seconds), statistics.median(one for _, one in seconds)


def processor_seconds(pid: int) -> float:
    """What all threads of a process have used so far, which does not depend on what else the machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _import_torch() -> tuple[float, float]:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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
