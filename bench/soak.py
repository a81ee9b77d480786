"""Does a server survive what users and machines do to it? A tiny random base, so that much happens in little time.

    python -m bench.soak [--kills N] [--seconds S]

kills:    a server that trains is killed (SIGKILL) at random moments and started again. After each start the database is
          whole, no version is half written, every ended job has a reason, and no digest is published twice.
requests: while a job trains, clients chat, hang up at random moments and send bad bodies. Memory and open files of the
          server are read before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from fortwo.adapters.store import AdapterStore
from fortwo.hub.catalog import Catalog
from scripts.readme import free_port
from tests.tiny import save_directory

ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(8)]
CLIENTS = 8
LONGEST_LIFE = 8.0  # seconds from the start of a server to its kill
BAD = (
    b'{"model": "tiny", "mess',
    b"[" * 5000,
    json.dumps({"model": "tiny", "messages": [[]] * 100_000}).encode(),
    json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a" * 1_000_000}]}).encode(),
    b"x" * (17 << 20),
)


@contextmanager
def server(home: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A server in a process of its own, once it answers; killed at the end."""
    port = free_port()
    environment = {"FORTWO_HOME": str(home), "FORTWO_DEFAULT_MODEL": "tiny", "FORTWO_THREADS": "1", **settings}
    command = [sys.executable, "-m", "fortwo", "serve", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            while process.poll() is None:
                with suppress(httpx.TransportError):
                    if http.get("/healthz").is_success:
                        break
                time.sleep(0.1)
            if process.poll() is not None:
                raise SystemExit(f"the server did not start: see {home / 'server.log'}")
            yield process, http
    finally:
        process.kill()
        process.wait()


def start(http: httpx.Client, name: str, steps: int) -> None:
    config = {"max_steps": steps, "save_steps": 10, "per_device_train_batch_size": 4}
    body = {"adapter_name": name, "objective": "sft", "dataset": {"examples": ROWS}, "training_config": config}
    http.post("/api/training/start", json=body).raise_for_status()


def kills(home: Path, count: int) -> None:
    """Kill the server `count` times at random moments, and look at what is left after each."""
    found: Counter[str] = Counter()
    waits: list[float] = []
    for _ in range(count):
        began = time.monotonic()
        with server(home, FORTWO_RESUME="true") as (process, http):
            waits.append(time.monotonic() - began)
            found.update(faults(home, http))
            if not any(job["status"] in ("queued", "running", "preparing", "evaluating") for job in jobs(http)):
                start(http, f"job{random.randrange(4)}", random.choice((5, 40, 150)))
            time.sleep(random.uniform(0.0, LONGEST_LIFE))
            process.send_signal(signal.SIGKILL)
            process.wait()
    with server(home, FORTWO_RESUME="true") as (_, http):
        while any(job["status"] in ("queued", "running", "preparing", "evaluating") for job in jobs(http)):
            time.sleep(0.5)
        found.update(faults(home, http))
        ends = Counter(job["status"] for job in jobs(http))
    waits.sort()
    print(f"kills: {count}; jobs: {dict(ends)}; faults: {dict(found) or 'none'}")
    print(f"start to first answer: median {waits[len(waits) // 2]:.1f} s, longest {waits[-1]:.1f} s")


def jobs(http: httpx.Client) -> list[dict[str, Any]]:
    return list(http.get("/api/training/jobs?limit=1000").raise_for_status().json()["jobs"])


def faults(home: Path, http: httpx.Client) -> Iterator[str]:
    """Names of what must not be, each as often as it is."""
    with sqlite3.connect(home / "fortwo.db") as database:
        if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            yield "database damaged"
    database.close()
    store, published = AdapterStore(home / "adapters"), Counter[str]()
    for name in store.names():
        yield from ("damaged file" for _ in store.damage(name))
        for version in store.versions(name):
            store.read(version.id)  # raises when a checksum is wrong
            published[f"{version.manifest['job_id']} {version.digest}"] += 1
    yield from ("published twice" for times in published.values() if times > 1)
    for job in jobs(http):
        if job["status"] == "failed" and not (job["error"] or {}).get("hint"):
            yield "failed without a reason"
        if job["status"] == "succeeded" and not job["adapter"]:
            yield "succeeded without an adapter"


def requests(home: Path, seconds: float) -> None:
    """Chats, hang-ups and bad bodies from CLIENTS clients while a job trains."""
    outcomes: Counter[str] = Counter()
    with server(home) as (process, http):
        start(http, "long", 1_000_000)
        for _ in range(50):
            chat(http, 8)
        before = used(process.pid)
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=client, args=(str(http.base_url), until, outcomes)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        slowest = 0.0
        while any(thread.is_alive() for thread in threads):
            asked = time.monotonic()
            http.get("/healthz").raise_for_status()
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.1)
        time.sleep(2)
        after = used(process.pid)
        step = jobs(http)[0]["progress"]["step"]
        process.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        process.wait()
        print(
            f"requests: {sum(outcomes.values())} in {seconds:g} s: {dict(outcomes.most_common())}; job at step {step}"
        )
        print(f"memory {before[0]} -> {after[0]} MiB; open files {before[1]} -> {after[1]}")
        print(f"slowest /healthz {slowest:.2f} s; SIGTERM to the end {time.monotonic() - stopped:.1f} s")


def client(url: str, until: float, outcomes: Counter[str]) -> None:
    while time.monotonic() < until:
        kind = random.random()
        try:
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
                if kind < 0.6:
                    outcome = str(chat(http, random.randrange(1, 40)))
                elif kind < 0.8:
                    with suppress(httpx.ReadTimeout):
                        chat(http, 500, timeout=random.uniform(0.01, 0.3))
                    outcome = "hung up"
                else:
                    headers = {"Content-Type": "application/json"}
                    bad = http.post("/v1/chat/completions", content=random.choice(BAD), headers=headers)
                    outcome = str(bad.status_code)
        except httpx.TransportError as error:
            outcome = type(error).__name__
        outcomes[outcome] += 1


def chat(http: httpx.Client, tokens: int, timeout: float = 60) -> int:
    message = {"role": "user", "content": f"{random.random()}"}
    body = {"model": "tiny", "messages": [message], "max_tokens": tokens}
    return http.post("/v1/chat/completions", json=body, timeout=timeout).status_code


def used(pid: int) -> tuple[int, int]:
    """Resident memory in MiB, and open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20, len(os.listdir(f"/proc/{pid}/fd"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = save_directory(Path(folder), num_hidden_layers=2, max_position_embeddings=1024)
        for name in ("kills", "requests"):
            Catalog(Path(folder) / name / "models").add("tiny", base)
        kills(Path(folder) / "kills", arguments.kills)
        requests(Path(folder) / "requests", arguments.seconds)


if __name__ == "__main__":
    main()
