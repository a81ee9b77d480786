"""A real PostgreSQL, which the tests start for themselves, on a socket and a port of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

PASSWORD = "sesame"
UNPRIVILEGED = ("postgres", "nobody")  # as whom it runs where the tests run as root, which it refuses


def _binaries() -> Path | None:
    """The folder of its programs; the newest version where there are several."""
    found = shutil.which("initdb")
    debian = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    debian.sort(key=lambda folder: float(folder.parent.name))
    return Path(found).resolve().parent if found else debian[-1] if debian else None


def _account() -> dict[str, Any]:
    """Arguments of subprocess.run for a user who is not root."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = next(known[name] for name in UNPRIVILEGED if name in known)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@dataclass(frozen=True)
class Postgres:
    folder: Path
    binaries: Path
    port: int

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.binaries / program), *arguments]
        with (self.folder / "output").open("ab") as output:
            done = subprocess.run(
                command, cwd=self.folder, stdout=output, stderr=output, env={"LC_ALL": "C"}, **_account()
            )
        assert done.returncode == 0, (self.folder / "output").read_text()

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -h 127.0.0.1 -F"
        self.run(
            "pg_ctl", "-D", str(self.folder / "data"), "-w", "-o", options, "-l", str(self.folder / "log"), "start"
        )

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")

    def admin(self, statement: str, database: str = "postgres") -> None:
        with psycopg.connect(self.url(database, driver=""), autocommit=True) as connection:
            connection.execute(statement)

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{uuid.uuid4().hex}"
        self.admin(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str, user: str = "admin", password: str = PASSWORD, driver: str = "+psycopg") -> str:
        return f"postgresql{driver}://{user}:{password}@127.0.0.1:{self.port}/{database}"


@contextmanager
def running() -> Iterator[Postgres]:
    """Skips the test where PostgreSQL is not installed."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="fortwo-postgres-"))
    account = _account()
    if account:
        os.chown(folder, account["user"], account["group"])
    found = Postgres(folder, binaries, port)
    (folder / "password").write_text(PASSWORD)
    os.chmod(folder / "password", 0o644)
    try:
        login = ("-U", "admin", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}")
        found.run("initdb", "-D", str(folder / "data"), *login, "-E", "UTF8", "--locale=C", "--no-sync")
        found.start()
        try:
            yield found
        finally:
            found.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
