"""Kills a server at random moments and at chosen ones, and looks at what is left after each start."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
from alembic import command

from bench.soak.server import Running, new_home, running, started, train
from fortwo.adapters.store import AdapterStore
from fortwo.jobs.database import migrations

LONGEST_LIFE = 5.0  # seconds from the first answer to a kill at a random moment
PATIENCE = 30.0  # seconds for a chosen moment to come
TIMES = 2  # of each chosen moment
MIGRATED = (0.3, 0.5, 0.7, 0.9)  # parts of a start after which a migration is killed
NAMES = ("a", "b", "c")
# Each moment is that at which a path appears in the home.
MOMENTS = {
    "a version is written": "adapters/*/.*",
    "a version is published": "adapters/*/*/manifest.json",
    "versions.json is replaced": "adapters/*/.versions.json*",
    "a checkpoint is written": "jobs/*/*",
    "an upload is received": "files/.*",
    "an upload is stored": "files/file-*/*",
    "an export is written": "exports/*/*",
    "a version is deleted": "adapters/*/.deleted-*",
}


@dataclass
class Acknowledged:
    """What the server said is stored: sha256 by id of a file, and digest by id of a version. doubtful: ids whose
    deletion was asked for and not answered. errors: answers with a status from 500 on."""

    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def see(self, answer: httpx.Response) -> None:
        if answer.is_server_error:
            self.errors.append(f"{answer.request.method} {answer.request.url.path}: {answer.status_code}")


def kill_often(folder: Path, count: int, seed: int) -> int:
    """The number of faults after `count` kills at random moments, and those at chosen moments and of a migration."""
    chance = random.Random(seed)
    home, said = new_home(folder, "kills"), Acknowledged()
    found: Counter[str] = Counter()
    waits: list[float] = []
    exported = _adapter(home, folder)

    def life(wait: Callable[[set[Path]], bool]) -> bool:
        with running(home, FORTWO_RESUME="true", FORTWO_DATA_DIRS=json.dumps([str(folder)])) as server:
            waits.append(server.seconds)
            found.update(faults(home, server, said))
            before = set(home.rglob("*"))
            clients = [threading.Thread(target=_use, args=(server, said, exported, chance.random())) for _ in range(2)]
            for client in clients:
                client.start()
            came = wait(before)
            server.kill()
            for client in clients:
                client.join()
        return came

    for _ in range(count):
        life(partial(_sleep, chance.uniform(0.0, LONGEST_LIFE)))
    chosen = [*MOMENTS.items()] * TIMES
    print(f"after {count} kills at random: faults {dict(found) or 'none'}", flush=True)
    missed = [moment for moment, pattern in chosen if not life(partial(_appears, home, pattern))]
    for part in MIGRATED:
        found.update(_killed_migration(folder, part))
    with running(home, FORTWO_RESUME="true") as server:
        server.wait_until_idle()
        found.update(faults(home, server, said))
        found.update(said.errors)
        ends = Counter(job["status"] for job in server.jobs())
    waits.sort()
    print(f"kills: {count} at random, {len(chosen) - len(missed)} at chosen moments, {len(MIGRATED)} of a migration")
    if missed:
        print(f"moments that did not come: {', '.join(missed)}")
    print(f"jobs: {dict(ends)}; files: {len(said.files)}; versions: {len(said.versions)}")
    print(f"faults: {dict(found) or 'none'}")
    print(f"start to first answer: median {waits[len(waits) // 2]:.1f} s, longest {waits[-1]:.1f} s")
    return found.total()


def _adapter(home: Path, folder: Path) -> Path:
    """A directory with an adapter as PEFT saves it, in a folder that the server may read."""
    with running(home) as server:
        server.train("a", steps=2)
        server.wait_until_idle()
    target = folder / "adapter"
    shutil.copytree(home / "adapters" / "a" / "1", target, ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "tiny"}))
    return target


def _use(server: Running, said: Acknowledged, adapter: Path, seed: float) -> None:
    """Train, import, upload, export and delete until the server is gone."""
    chance = random.Random(seed)
    with (
        httpx.Client(
            base_url=server.http.base_url, timeout=30, trust_env=False, event_hooks={"response": [said.see]}
        ) as http,
        suppress(httpx.TransportError),
    ):
        while True:
            name = chance.choice(NAMES)
            match chance.choice(("train", "import", "upload", "upload", "export", "delete")):
                case "train" if server.idle():
                    train(http, name, chance.choice((5, 30)))
                case "import":
                    body = {"lora_name": f"imported{chance.randrange(4)}", "lora_path": str(adapter)}
                    http.post("/v1/load_lora_adapter", json=body)
                case "upload":
                    content = "\n".join(json.dumps({"text": str(chance.random())}) for _ in range(200)).encode()
                    form = {"file": ("rows.jsonl", content)}
                    answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files=form)
                    if answer.is_success:
                        said.files[answer.json()["id"]] = hashlib.sha256(content).hexdigest()
                case "export":
                    http.post(f"/api/adapters/{name}/export", json={"to": "peft"})
                case "delete":
                    _delete(http, said, chance)
            for version in http.get("/api/adapters").json().get("adapters", []):
                said.versions.setdefault(f"{version['name']}@{version['version']}", version["digest"])


def _delete(http: httpx.Client, said: Acknowledged, chance: random.Random) -> None:
    if said.files and chance.random() < 0.5:
        id = chance.choice(list(said.files))
        said.doubtful.add(id)
        http.delete(f"/v1/files/{id}")
    elif said.versions:
        id = chance.choice(list(said.versions))
        said.doubtful.add(id)
        http.delete(f"/api/adapters/{id}")


def _sleep(seconds: float, _before: set[Path]) -> bool:
    time.sleep(seconds)
    return True


def _appears(home: Path, pattern: str, before: set[Path]) -> bool:
    """Whether a new path of the pattern appears in time; returns at once."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with suppress(FileNotFoundError):  # a folder that was deleted meanwhile
            if any(path not in before for path in home.glob(pattern)):
                return True
        time.sleep(0.001)
    return False


def faults(home: Path, server: Running, said: Acknowledged) -> Iterator[str]:
    """Names of what must not be, each as often as it is."""
    with sqlite3.connect(home / "fortwo.db") as database:
        if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            yield "database damaged"
    database.close()
    store, published = AdapterStore(home / "adapters"), Counter[str]()
    digests: dict[str, str] = {}
    for name in store.names():
        yield from ("damaged file" for _ in store.inspect(name)[1])
        for version in store.versions(name):
            store.read(version.id)  # raises when a checksum is wrong
            digests[version.id] = version.digest
            if job := version.manifest.get("job_id"):
                published[f"{job} {version.digest}"] += 1
    yield from ("published twice" for times in published.values() if times > 1)
    for id, digest in said.versions.items():
        if id not in said.doubtful and digests.get(id) != digest:
            yield "an acknowledged version is gone or another one"
    for id, sha256 in said.files.items():
        content = server.http.get(f"/v1/files/{id}/content")
        gone = content.status_code == 404 and id in said.doubtful
        if not gone and hashlib.sha256(content.content).hexdigest() != sha256:
            yield "an acknowledged file is gone or another one"
    for job in server.jobs():
        if job["status"] == "failed" and not (job["error"] or {}).get("hint"):
            yield "failed without a reason"
        if job["status"] == "succeeded" and not job["adapter"]:
            yield "succeeded without an adapter"


def _killed_migration(folder: Path, part: float) -> Iterator[str]:
    """A database of the first schema whose upgrade is killed: the next start finishes it."""
    home = new_home(folder, f"migration{part}")
    command.upgrade(migrations(f"sqlite:///{home / 'fortwo.db'}"), "0001")
    old = (home / "fortwo.db").read_bytes()
    seconds = 0.0
    with running(home) as server:
        seconds = server.seconds
    for file in home.glob("fortwo.db*"):
        file.unlink()
    (home / "fortwo.db").write_bytes(old)
    _start_and_kill(home, part * seconds)
    with running(home) as server:
        if server.jobs():
            yield "jobs of nowhere"
        yield from faults(home, server, Acknowledged())


def _start_and_kill(home: Path, seconds: float) -> None:
    process = started(home, 0)
    time.sleep(seconds)
    process.kill()
    process.wait()
