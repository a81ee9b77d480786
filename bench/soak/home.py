"""Damages each file of a home in turn: what is wrong is said, everything else works, and all does once it is mended."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from bench.soak.fuzz import place
from bench.soak.kinds import Raised
from bench.soak.server import new_home, running
from fortwo.errors import FortwoError
from fortwo.hub.catalog import Catalog
from fortwo.settings import load
from tests.serving import serve
from tests.tiny import save_gguf, tiny_model


def _make_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "other JSON": lambda file: file.write_bytes(b'{"a": []}'),
    "gone": Path.unlink,
    "a folder": _make_a_folder,
}
LISTS = ("/v1/models", "/api/models", "/api/adapters", "/api/training/jobs", "/v1/files", "/api/exports", "/healthz")
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
LEFT_OUT = ("instance_id", "-wal", "-shm", ".safetensors.index.json")
LOCK_DAMAGES = ("a folder",)  # what is in a lock does not matter


def damage_each(folder: Path, only: str = "") -> int:
    """The number of faults. only: of the files whose path in the home contains this."""
    whole = filled(folder)
    faults = 0
    files = sorted(path for path in whole.rglob("*") if path.is_file() and not path.is_symlink())
    files = [path for path in files if not path.name.endswith(LEFT_OUT) and only in str(path.relative_to(whole))]
    for file in files:
        for how in LOCK_DAMAGES if file.name.endswith(".lock") else DAMAGES:
            home = folder / "damaged"
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(whole, home, symlinks=True)
            target = home / file.relative_to(whole)
            DAMAGES[how](target)
            faults += _check(home, f"{file.relative_to(whole)}, {how}", file.read_bytes(), target)
    print(f"{len(files)} files, each damaged in {len(DAMAGES)} ways", flush=True)
    return faults


def filled(folder: Path) -> Path:
    """A home with a converted base, an adapter of two versions, a paused job with checkpoints, an uploaded file and an
    export."""
    home = new_home(folder, "whole")
    Catalog(home / "models").add("converted", save_gguf(folder / "tiny.gguf", tiny_model("llama", num_hidden_layers=1)))
    with running(home) as server:
        server.http.post("/v1/chat/completions", json={"model": "converted", **CHAT}).raise_for_status()
        for steps in (1, 2):
            server.train("taught", steps)
            server.wait_until_idle()
        server.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b'{"text": "a"}')})
        server.http.post("/api/adapters/taught/export", json={"to": "peft"})
        job = server.train("paused", 1_000_000)
        while server.job(job)["progress"]["step"] < 25:
            time.sleep(0.1)
        server.http.post(f"/api/training/jobs/{job}/pause")
        while server.job(job)["status"] != "paused":
            time.sleep(0.1)
    return home


def _check(home: Path, what: str, good: bytes, target: Path) -> int:
    """Start with the damage, then with the file as it was."""
    found = [*wrong(home, damaged=True)]
    if target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(good)
    if target.name == "fortwo.db":
        for rest in home.glob("fortwo.db-*"):
            rest.unlink()
    found += [f"when mended: {fault}" for fault in wrong(home, damaged=False)]
    for fault in found:
        print(f"FAULT {what}: {fault}", flush=True)
    return len(found)


def wrong(home: Path, damaged: bool) -> Iterator[str]:
    raised = Raised()
    logging.getLogger().addHandler(raised)
    try:
        with serve(load(home=home, port=0, default_model="tiny", threads=1)) as served:
            yield from asked(served.http, damaged)
    except FortwoError as error:
        if not (damaged and error.hint):
            yield f"the server did not start: {error}"
    except Exception as error:
        yield f"the server did not start: {type(error).__name__} in {place(error)}: {error}"
    finally:
        logging.getLogger().removeHandler(raised)
    if raised.error is not None and not isinstance(raised.error, FortwoError):
        yield f"{type(raised.error).__name__} in {place(raised.error)}: {raised.error!s:.200}"


def asked(http: httpx.Client, damaged: bool) -> Iterator[str]:
    """Lists always answer. The base, and what else the home has, answer once the home is whole."""
    for path in LISTS:
        status = http.get(path).status_code
        if status >= 500 and not (damaged and status in (503, 507)):
            yield f"GET {path}: {status}"
    for model in ("tiny", "converted", "taught", "taught@1"):
        answer = http.post("/v1/chat/completions", json={"model": model, **CHAT})
        refused = answer.status_code in (400, 404, 409, 503, 507) and answer.json()["error"]["hint"]
        if not (answer.is_success or (damaged and refused)):
            yield f"chat with {model}: {answer.status_code} {answer.text:.200}"
