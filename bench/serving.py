"""A server of a benchmark's own: fresh home and port, the prepared models of the user's home."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fortwo.cli.client import ENDED, Client
from fortwo.hub.catalog import Catalog
from fortwo.records import Json
from fortwo.settings import Settings, load
from scripts.readme import free_port

COMMAND = [sys.executable, "-m", "fortwo", "serve"]


@contextmanager
def home() -> Iterator[tuple[Settings, dict[str, str]]]:
    """Settings and environment of a server that is to be started; what it wrote is gone at the end of the block."""
    own = load()
    Catalog(own.models_dir).prepare(own.default_model)
    with tempfile.TemporaryDirectory(prefix="fortwo-bench-") as folder:
        (Path(folder) / "models").symlink_to(own.models_dir.resolve())
        settings = load(home=Path(folder), host="127.0.0.1", port=free_port())
        yield settings, os.environ | {"FORTWO_HOME": folder, "FORTWO_PORT": str(settings.port)}


@contextmanager
def server() -> Iterator[tuple[Settings, Client]]:
    """`fortwo serve`, from its first answer to the end of the block."""
    with home() as (settings, environment), started(settings, environment) as (_, client):
        yield settings, client


@contextmanager
def started(settings: Settings, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """The same in an environment that says what `settings` do."""
    process = subprocess.Popen(COMMAND, env=environment, stdout=subprocess.DEVNULL)
    try:
        client = Client(settings.url, settings.plain_api_key)
        while not client.answers():
            if process.poll() is not None:
                sys.exit(f"the server ended with exit status {process.returncode}")
            time.sleep(0.2)
        yield process, client
    finally:
        process.terminate()
        process.wait()


def run_job(client: Client, request: Json, every: float = 0.2) -> tuple[Json, float]:
    """(the job at its end, seconds from the request to the end); asked after every so many seconds."""
    began = time.perf_counter()
    job_id = client.post("/api/training/start", request)["job_id"]
    while (job := client.get(f"/api/training/jobs/{job_id}"))["status"] not in ENDED:
        time.sleep(every)
    return job, time.perf_counter() - began


def peak(process: int) -> int:
    """The most bytes that were resident in a process so far."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
