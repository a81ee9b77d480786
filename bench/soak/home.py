"""Damages each file of a home in turn, and locks its database: what is wrong is said, and everything else works."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench.soak.fuzz import place
from bench.soak.kinds import Raised
from bench.soak.server import new_home, running
from fortwo.errors import FortwoError
from fortwo.settings import load
from tests.serving import serve

DAMAGES = {"empty": b"", "cut short": None, "other JSON": b'{"a": []}'}
LISTS = ("/v1/models", "/api/models", "/api/adapters", "/api/training/jobs", "/v1/files", "/api/exports", "/healthz")
LEFT_OUT = ("instance_id", ".lock", "-wal", "-shm", ".safetensors.index.json")


def damage_each(folder: Path) -> int:
    """The number of faults."""
    whole = _filled(folder)
    faults = 0
    files = sorted(path for path in whole.rglob("*") if path.is_file() and not path.is_symlink())
    files = [path for path in files if not path.name.endswith(LEFT_OUT)]
    for file in files:
        for how, content in DAMAGES.items():
            home = folder / "damaged"
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(whole, home, symlinks=True)
            target = home / file.relative_to(whole)
            good = target.read_bytes()
            target.write_bytes(good[: len(good) // 2] if content is None else content)
            faults += _check(home, f"{file.relative_to(whole)}, {how}", good, target)
    print(f"{len(files)} files, each damaged in {len(DAMAGES)} ways")
    for what, found in (("locked", _locked(whole)), ("read-only", _read_only(whole))):
        for fault in found:
            print(f"FAULT database {what}: {fault}")
            faults += 1
    return faults


def _filled(folder: Path) -> Path:
    """A home with an adapter of two versions, a paused job with checkpoints, an uploaded file and an export."""
    home = new_home(folder, "whole")
    with running(home) as server:
        for steps in (1, 2):
            server.train("taught", steps)
            server.wait_until_idle()
        server.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b'{"text": "a"}')})
        server.http.post("/api/adapters/taught/export", json={"to": "peft"})
        job = server.train("paused", 1_000_000)
        while server.http.get(f"/api/training/jobs/{job}").json()["progress"]["step"] < 25:
            time.sleep(0.1)
        server.http.post(f"/api/training/jobs/{job}/pause")
        while server.http.get(f"/api/training/jobs/{job}").json()["status"] != "paused":
            time.sleep(0.1)
    return home


def _check(home: Path, what: str, good: bytes, target: Path) -> int:
    """Start with the damage, then with the file as it was."""
    found = [*_wrong(home, damaged=True)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(good)
    if target.name == "fortwo.db":
        for rest in home.glob("fortwo.db-*"):
            rest.unlink()
    found += [f"when mended: {fault}" for fault in _wrong(home, damaged=False)]
    for fault in found:
        print(f"FAULT {what}: {fault}", flush=True)
    return len(found)


def _wrong(home: Path, damaged: bool) -> Iterator[str]:
    raised = Raised()
    logging.getLogger().addHandler(raised)
    try:
        with serve(load(home=home, port=0, default_model="tiny", threads=1)) as served:
            yield from _asked(served.http, damaged)
    except FortwoError as error:
        if not (damaged and error.hint):
            yield f"the server did not start: {error}"
    except Exception as error:
        yield f"the server did not start: {type(error).__name__} in {place(error)}: {error}"
    finally:
        logging.getLogger().removeHandler(raised)
    if raised.error is not None and not isinstance(raised.error, FortwoError):
        yield f"{type(raised.error).__name__} in {place(raised.error)}: {raised.error!s:.200}"


def _asked(http: httpx.Client, damaged: bool) -> Iterator[str]:
    """Lists always answer. The base, and what else the home has, answer once the home is whole."""
    for path in LISTS:
        status = http.get(path).status_code
        if status >= 500 and not (damaged and status in (503, 507)):
            yield f"GET {path}: {status}"
    said = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for model in ("tiny", "taught", "taught@1"):
        answer = http.post("/v1/chat/completions", json={"model": model, **said})
        refused = answer.status_code in (400, 404, 409, 503, 507) and answer.json()["error"]["hint"]
        if not (answer.is_success or (damaged and refused)):
            yield f"chat with {model}: {answer.status_code} {answer.text:.200}"


@contextmanager
def _of_its_own(whole: Path) -> Iterator[Path]:
    home = whole.with_name("copy")
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(whole, home, symlinks=True)
    yield home


def _locked(whole: Path) -> Iterator[str]:
    """Another program holds the database while a job trains: chat goes on, and so does the job when it is free."""
    with _of_its_own(whole) as home, running(home) as server:
        job = server.train("busy", 1_000_000)
        while server.http.get(f"/api/training/jobs/{job}").json()["progress"]["step"] < 5:
            time.sleep(0.1)
        other = sqlite3.connect(home / "fortwo.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(40)  # longer than any wait for a lock
        said = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        if not server.http.post("/v1/chat/completions", json=said).is_success:
            yield "chat does not answer"
        other.execute("ROLLBACK")
        other.close()
        time.sleep(5)
        status = server.http.get(f"/api/training/jobs/{job}").json()
        if status["status"] != "running":
            yield f"the job is {status['status']}: {status['error']}"


def _read_only(whole: Path) -> Iterator[str]:
    """Nothing can be written (unless root asks, who may write anything)."""
    if os.geteuid() == 0:
        print("read-only home: not tried, because root may write anything")
        return
    with _of_its_own(whole) as home:
        for path in (home, *home.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        yield from _wrong(home, damaged=True)
        for path in (home, *home.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
