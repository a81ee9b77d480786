"""A home from the file of a backup: `fortwo restore`. The home appears whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO

from pydantic import ValidationError

from fortwo import disk
from fortwo.errors import Conflict, InvalidRequest
from fortwo.jobs.backup import DATABASE, FILES, FOLDERS, FORMAT, MANIFEST, Manifest, StoredFile
from fortwo.settings import Settings

LONGEST_MANIFEST = 256 << 20  # bytes
PART = 1 << 20
SHOWN = 10  # damaged files that an error names


class InvalidBackup(InvalidRequest):
    """The file is not a backup, or it is damaged."""

    code = "invalid_backup"


def restore(settings: Settings, source: Path) -> Manifest:
    """Make the home of the settings from a backup. Raises Conflict when the home is not empty, InvalidBackup, which
    names all files that are damaged, InvalidRequest when the settings name another database, and StorageFailed. Then
    nothing has changed."""
    if settings.database_url is not None:
        raise InvalidRequest(
            "database_url is set, but a backup's database becomes fortwo.db of the home.",
            param="database_url",
            hint="Unset FORTWO_DATABASE_URL, restore, and copy the file to where it belongs. PostgreSQL is restored by "
            "its own program, from what pg_dump wrote.",
        )
    home = settings.home.resolve()
    try:
        if home.exists() and (inside := sorted(path.name for path in home.iterdir())):
            raise Conflict(
                f"{home} is not empty: it has {', '.join(inside[:SHOWN])}.",
                param="home",
                hint="Set FORTWO_HOME to a folder that does not exist yet or is empty.",
            )
        home.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{home.name}.restore-", dir=home.parent))
    except OSError as error:
        raise disk.storage_failed(home, error) from error
    try:
        manifest = _unpack(source, folder)
        _check_database(folder / DATABASE, source)
        disk.sync(folder)
        folder.rename(home)
        disk.sync(home.parent)
    except OSError as error:
        raise disk.storage_failed(home, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _unpack(source: Path, folder: Path) -> Manifest:
    """Write the archive's files into the folder and compare each with its checksum."""
    try:
        with tarfile.open(source, mode="r:") as archive:
            manifest = _read_manifest(archive, source)
            missing, damaged = set(manifest.files), []
            while (member := archive.next()) is not None:
                if member.name not in missing or not member.isreg():
                    raise _invalid(source, f"it has {member.name!r}, which its {MANIFEST} does not name")
                missing.remove(member.name)
                content = archive.extractfile(member)
                if content is None or not _write(content, folder / member.name, manifest.files[member.name]):
                    damaged.append(member.name)
    except tarfile.TarError as error:
        raise _invalid(source, str(error)) from None
    except FileNotFoundError:
        raise _invalid(source, "it does not exist") from None
    except (IsADirectoryError, PermissionError) as error:
        raise _invalid(source, str(error.strerror)) from None
    if wrong := [*damaged, *sorted(missing)]:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise _invalid(source, f"these files are damaged or missing: {', '.join(wrong[:SHOWN])}{more}")
    return manifest


def _read_manifest(archive: tarfile.TarFile, source: Path) -> Manifest:
    first = archive.next()
    content = archive.extractfile(first) if first is not None and first.name == MANIFEST else None
    if first is None or content is None or first.size > LONGEST_MANIFEST:
        raise _invalid(source, f"its first file is not {MANIFEST}")
    try:
        manifest = Manifest.model_validate_json(content.read(), strict=True)
    except ValidationError as error:
        raise _invalid(source, f"its {MANIFEST} is damaged: {error.errors()[0]['msg']}") from None
    if manifest.format != FORMAT:
        raise _invalid(source, f"it has format {manifest.format}, of fortwo {manifest.fortwo}; this one reads {FORMAT}")
    if foreign := [name for name in manifest.files if not belongs_to_home(name)]:
        raise _invalid(source, f"it has {foreign[0]!r}, which is no file of a home")
    if DATABASE not in manifest.files:
        raise _invalid(source, "it has no database")
    return manifest


def belongs_to_home(name: str) -> bool:
    """Whether a backup may have a file of this path: one that stays within the home, in a place where backups put
    files."""
    path = PurePosixPath(name)
    if path.is_absolute() or path.as_posix() != name or ".." in path.parts or "\\" in name or "\0" in name:
        return False
    return name in (DATABASE, *FILES) or (path.parts[0] in FOLDERS and len(path.parts) > 1)


def _write(content: IO[bytes], target: Path, stored: StoredFile) -> bool:
    """Whether the file is the one that the manifest describes."""
    digest, size = hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        while part := content.read(PART):
            size += len(part)
            if size > stored.bytes:
                return False
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return (size, digest.hexdigest()) == (stored.bytes, stored.sha256)


def _check_database(file: Path, source: Path) -> None:
    try:
        with closing(sqlite3.connect(file)) as database:
            found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise _invalid(source, f"its database is damaged: {found}")


def _invalid(source: Path, reason: str) -> InvalidBackup:
    return InvalidBackup(
        f"{source} cannot be restored: {reason}.",
        param="file",
        hint="Name a whole file that `fortwo backup` wrote. Nothing was changed.",
    )
