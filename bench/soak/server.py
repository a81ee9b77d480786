"""A server in a process of its own, on a tiny random base, and what can be seen of it from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fortwo.hub.catalog import Catalog
from scripts.readme import free_port
from tests.tiny import save_directory

ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(8)]
UNDER_WAY = ("queued", "running", "preparing", "evaluating")


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    http: httpx.Client
    seconds: float  # from the start of the process to its first answer

    def jobs(self) -> list[dict[str, Any]]:
        return list(self.http.get("/api/training/jobs?limit=1000").raise_for_status().json()["jobs"])

    def job(self, id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/api/training/jobs/{id}").raise_for_status().json())

    def train(self, name: str, steps: int) -> str:
        return train(self.http, name, steps)

    def idle(self) -> bool:
        return not any(job["status"] in UNDER_WAY for job in self.jobs())

    def wait_until_idle(self) -> None:
        while not self.idle():
            time.sleep(0.3)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def train(http: httpx.Client, name: str, steps: int) -> str:
    """The id of a job that was started."""
    config = {"max_steps": steps, "save_steps": 10, "per_device_train_batch_size": 4}
    body = {"adapter_name": name, "objective": "sft", "dataset": {"examples": ROWS}, "training_config": config}
    return str(http.post("/api/training/start", json=body).raise_for_status().json()["job_id"])


def new_home(folder: Path, name: str) -> Path:
    """A home whose catalog has the base "tiny", which all homes in `folder` share."""
    base = folder / "tiny"
    if not base.exists():
        save_directory(base, num_hidden_layers=2, max_position_embeddings=1024)
    Catalog(folder / name / "models").add("tiny", base)
    return folder / name


def started(home: Path, port: int, **settings: str) -> subprocess.Popen[bytes]:
    """The process of a server, which writes its log beside the home."""
    own = {"FORTWO_HOME": str(home), "FORTWO_DEFAULT_MODEL": "tiny", "FORTWO_THREADS": "1", **settings}
    with home.with_suffix(".log").open("ab") as log:
        command = [sys.executable, "-m", "fortwo", "serve", "--port", str(port)]
        return subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)


@contextmanager
def running(home: Path, **settings: str) -> Iterator[Running]:
    """A server on this home, once it answers; killed at the end. Raises RuntimeError if it ends before it answers."""
    port, began = free_port(), time.monotonic()
    process = started(home, port, **settings)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            while process.poll() is None:
                with suppress(httpx.TransportError):
                    if http.get("/healthz").is_success:
                        break
                time.sleep(0.02)
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start: see {home.with_suffix('.log')}")
            yield Running(process, http, time.monotonic() - began)
    finally:
        process.kill()
        process.wait()


def used(pid: int) -> tuple[int, int, int]:
    """Resident memory in bytes, open files and threads of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
