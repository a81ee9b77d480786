"""One file with everything of a home that cannot be fetched or computed again: `fortwo backup`.

The file is a tar archive. Its first member, backup.json, has the size and the SHA-256 of every other one.

A server may run meanwhile. Its files are written beside and renamed, and never changed afterwards. So hard links make a
copy of them in a moment, and a copy is taken if nothing appeared or went between its begin and its end, the copy of the
database included. A job whose end falls between is as after a crash: the next start gives it its end.
"""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from fortwo import disk
from fortwo.data.datasets import file_sha256
from fortwo.errors import Conflict, InvalidRequest, NotFound
from fortwo.home import ID
from fortwo.jobs.database import DatabaseFailed
from fortwo.settings import Settings

FORMAT = 1
MANIFEST = "backup.json"
DATABASE = "fortwo.db"
FOLDERS = ("adapters", "files")
FILES = (ID, "settings.toml", "models/catalog.json")
ATTEMPTS = 10
DELETED = ".deleted-"  # a deleted version, which can be restored; other names with a dot are unfinished


class StoredFile(BaseModel):
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """backup.json. created_at: Unix seconds; files: by their path in the home."""

    format: int
    fortwo: str
    created_at: float
    files: dict[str, StoredFile]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True)
class _State:
    """What a file was when it was listed."""

    bytes: int
    changed_ns: int


def backup(settings: Settings, target: Path) -> Manifest:
    """Write the home's backup to `target`, readable by this user alone. Raises InvalidRequest for a database that is
    not a file of SQLite, NotFound when there is none, Conflict when the target exists or the home keeps changing,
    DatabaseFailed and StorageFailed."""
    database = _database_file(settings)
    if target.exists():
        raise Conflict(f"{target} exists already.", param="file", hint="Choose another name, or delete that file.")
    with _snapshot(settings.home, database) as folder:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        stored = {
            name: StoredFile(bytes=(folder / name).stat().st_size, sha256=file_sha256(folder / name)) for name in files
        }
        manifest = Manifest(format=FORMAT, fortwo=version("fortwo"), created_at=time.time(), files=stored)
        try:
            _pack(folder, manifest, target)
        except OSError as error:
            raise disk.storage_failed(target, error) from error
    return manifest


def _database_file(settings: Settings) -> Path:
    try:
        url = make_url(settings.database)
    except ArgumentError:
        url = None
    if url is None or url.get_backend_name() != "sqlite" or not url.database:
        raise InvalidRequest(
            "database_url does not name a file of SQLite, so the database is not part of a backup.",
            param="database_url",
            hint="Back up the database with its own program (pg_dump, for example), and FORTWO_HOME as files while no "
            "server runs.",
        )
    file = Path(url.database)
    if not file.is_file():
        raise NotFound(
            f"There is no database {file}, so there is nothing to back up.",
            param="home",
            hint="Set FORTWO_HOME to the home of a server.",
        )
    return file


@contextmanager
def _snapshot(home: Path, database: Path) -> Iterator[Path]:
    """A folder with the home's files at one moment, which goes at the end."""
    for leftover in home.glob(".backup-*"):  # of a backup that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    for _ in range(ATTEMPTS):
        with _temporary(home) as folder:
            before = _listing(home)
            _copy_database(database, folder / DATABASE)
            if _link(home, before, folder) and _listing(home) == before:
                yield folder
                return
    raise Conflict(
        f"{home} changed each of the {ATTEMPTS} times that it was copied.",
        param="home",
        hint="Try again when fewer adapters and files come and go.",
    )


@contextmanager
def _temporary(home: Path) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix=".backup-", dir=home))
    except OSError as error:
        raise disk.storage_failed(home, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _listing(home: Path) -> dict[str, _State]:
    """The files to copy, by their path in the home."""
    found = {}
    walked = (Path(parent, name) for top in FOLDERS for parent, _, names in os.walk(home / top) for name in names)
    for path in (*(home / name for name in FILES), *walked):
        name = path.relative_to(home)
        finished = all(not part.startswith(".") or part.startswith(DELETED) for part in name.parts)
        with suppress(FileNotFoundError):  # it went meanwhile
            if finished and path.is_file() and not path.is_symlink():
                found[name.as_posix()] = _State(path.stat().st_size, path.stat().st_mtime_ns)
    return found


def _link(home: Path, names: dict[str, _State], folder: Path) -> bool:
    """Put the files into the folder; False when one of them went meanwhile."""
    try:
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(home / name, target)
            except FileNotFoundError:
                return False
            except OSError:  # another disk, or one without hard links
                shutil.copy2(home / name, target)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise disk.storage_failed(folder, error) from error
    return True


def _copy_database(source: Path, target: Path) -> None:
    """Copy a database that may be in use. Raises DatabaseFailed."""
    try:
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)
            found = new.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise DatabaseFailed(
            f"The database {source} cannot be copied: {found}.",
            hint="See what is wrong with: fortwo doctor --repair",
        )


def _pack(folder: Path, manifest: Manifest, target: Path) -> None:
    """Write the archive beside the target, and rename it."""
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                content = manifest.model_dump_json(indent=1).encode()
                archive.addfile(_member(MANIFEST, len(content), manifest.created_at), io.BytesIO(content))
                for name, stored in manifest.files.items():
                    with (folder / name).open("rb") as part:
                        archive.addfile(_member(name, stored.bytes, manifest.created_at), part)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(target)
        disk.sync(target.absolute().parent)
    finally:
        draft.unlink(missing_ok=True)


def _member(name: str, size: int, created_at: float) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(created_at)
    return member
