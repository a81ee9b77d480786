"""A home whose database is locked, that cannot be written, whose disk is full, and a clock that goes backwards."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from bench.soak.home import CHAT, LISTS, asked, filled, wrong
from bench.soak.server import Running, running, train
from fortwo.settings import load
from tests.serving import serve

LOCKED_SECONDS = 40  # longer than any wait for a lock
DISK_BYTES = 64 << 20
HOUR = 3600.0


def try_each(folder: Path) -> int:
    """The number of faults."""
    whole = filled(folder)
    tried: dict[str, Callable[[Path], Iterator[str]]] = {
        "a locked database": _locked,
        "a second server": _second_server,
        "a home that cannot be written": _read_only,
        "a full disk": _full,
        "a clock that goes backwards": _clock,
    }
    faults = 0
    for what, run in tried.items():
        if run in (_read_only, _full) and os.geteuid() != 0:
            print(f"{what}: not tried, because only root may mount a disk for it")
            continue
        found = list(run(whole))
        print(f"{what}: {found or 'as it should be'}", flush=True)
        faults += len(found)
    return faults


@contextmanager
def _of_its_own(whole: Path) -> Iterator[Path]:
    home = whole.with_name("copy")
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(whole, home, symlinks=True)
    yield home


@contextmanager
def _small_disk(whole: Path) -> Iterator[Path]:
    """A copy of the home on a disk of its own."""
    disk = whole.with_name("disk")
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk], check=True)
    try:
        shutil.copytree(whole, disk / "home", symlinks=True)
        yield disk / "home"
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def _busy(server: Running) -> str:
    """The id of a job that trains and writes checkpoints."""
    job = server.train("busy", 1_000_000)
    while server.job(job)["progress"]["step"] < 5:
        time.sleep(0.1)
    return job


def _reads(server: Running) -> Iterator[str]:
    """Chat and lists work."""
    if not server.http.post("/v1/chat/completions", json={"model": "tiny", **CHAT}).is_success:
        yield "chat does not answer"
    yield from (f"GET {path} fails" for path in LISTS if server.http.get(path).status_code not in (200, 503, 507))


def _locked(whole: Path) -> Iterator[str]:
    """Another program holds the database while a job trains: chat goes on, and so does the job when it is free."""
    with _of_its_own(whole) as home, running(home) as server:
        job = _busy(server)
        other = sqlite3.connect(home / "fortwo.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(LOCKED_SECONDS)
        yield from _reads(server)
        other.execute("ROLLBACK")
        other.close()
        time.sleep(5)
        status = server.job(job)
        if status["status"] != "running":
            yield f"the job is {status['status']}: {status['error']}"


def _second_server(whole: Path) -> Iterator[str]:
    """It is refused while the first one runs."""
    with _of_its_own(whole) as home, running(home) as server:
        refused = list(wrong(home, damaged=False))
        if len(refused) != 1 or "Another server already uses" not in refused[0]:
            yield f"the second server: {refused}"
        yield from _reads(server)


def _read_only(whole: Path) -> Iterator[str]:
    """A start is refused in words, and works once the disk can be written."""
    with _small_disk(whole) as home:
        subprocess.run(["mount", "-o", "remount,ro", home.parent], check=True)
        found = list(wrong(home, damaged=False))
        if len(found) != 1 or "cannot be written" not in found[0]:
            yield f"the start: {found}"
        subprocess.run(["mount", "-o", "remount,rw", home.parent], check=True)
        yield from (f"when it can be written: {fault}" for fault in wrong(home, damaged=False))


def _full(whole: Path) -> Iterator[str]:
    """While a job trains, the disk becomes full: chat goes on, what has to be stored is refused with 507, and the job
    goes on or ends with that reason; with space, everything works again."""
    with _small_disk(whole) as home:
        with running(home) as server:
            job = _busy(server)
            with (home.parent / "filler").open("wb", buffering=0) as filler:
                with_space = shutil.disk_usage(home).free
                while shutil.disk_usage(home).free:
                    filler.write(b"\0" * min(1 << 20, shutil.disk_usage(home).free))
            time.sleep(10)
            yield from _reads(server)
            file = {"file": ("a.jsonl", b'{"text": "a"}\n' * 10_000)}
            status = server.http.post("/v1/files", data={"purpose": "fine-tune"}, files=file).status_code
            if status != 507:
                yield f"an upload to a full disk of {with_space} bytes: {status}"
            full = server.job(job) if server.http.get(f"/api/training/jobs/{job}").is_success else None
            (home.parent / "filler").unlink()
            time.sleep(10)
            freed = server.job(job)
            if freed["status"] == "failed" and "disk" not in str(freed["error"]):
                yield f"the job failed: {freed['error']}"
            if freed["status"] == "failed":
                server.http.post(f"/api/training/jobs/{job}/resume").raise_for_status()
            elif full is not None and freed["progress"]["step"] <= full["progress"]["step"]:
                yield f"the job stands still: {freed['status']} at step {freed['progress']['step']}"
            if not server.http.post("/v1/files", data={"purpose": "fine-tune"}, files=file).is_success:
                yield "an upload with space again"
        yield from (f"at the next start: {fault}" for fault in wrong(home, damaged=False))


def _clock(whole: Path) -> Iterator[str]:
    """The clock goes back by an hour while a job trains, and by another one before the next start: jobs end, and none
    ends before it began."""
    clock, back = time.time, 0.0

    def behind() -> float:
        return clock() - back

    with _of_its_own(whole) as home, mock.patch.object(time, "time", behind):
        for number in range(2):
            with serve(load(home=home, port=0, default_model="tiny", threads=1)) as served:
                jobs = [train(served.http, f"back{number}", 300)]
                served.wait(jobs[0], "running", seconds=300)
                back += HOUR
                jobs.append(train(served.http, f"forth{number}", 3))
                for job in (served.wait(id, seconds=300) for id in jobs):
                    if job["status"] != "succeeded" or not job["created_at"] <= job["started_at"] <= job["finished_at"]:
                        yield f"{job['status']}: {[job[f'{what}_at'] for what in ('created', 'started', 'finished')]}"
                yield from asked(served.http, damaged=False)
