"""Finds and repairs what a crash or a lost database leaves of jobs and uploads: unfinished checkpoints, folders that
the database does not know, jobs without files. The database is only read: jobs that ran when their server died get
their end at the next start.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import text

from fortwo.adapters.repair import unfinished
from fortwo.adapters.store import AdapterStore
from fortwo.errors import FortwoError
from fortwo.jobs.database import check, connect, errors_of
from fortwo.jobs.store import ACTIVE
from fortwo.records import Repair

ORPHANS = ".orphans"  # in the folder of jobs or files; names that begin with a dot are of neither
_JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def repairs(jobs_dir: Path, adapters: AdapterStore, database_url: str) -> Iterator[Repair]:
    """What can be repaired, and what can only be said. No server may use the home while repairs are carried out."""
    if jobs_dir.is_dir():
        for folder in (jobs_dir, *sorted(jobs_dir.iterdir())):
            if folder.is_dir() and (folder == jobs_dir or _JOB_ID.fullmatch(folder.name)):
                yield from unfinished(folder)
    try:
        rows = _select(database_url, "jobs", "id, status, adapter_name, created_at")
    except FortwoError as error:
        yield Repair(error.message, f"Not repaired. {error.hint}")
        return
    rows.sort(key=lambda row: row["created_at"])
    known = {row["id"] for row in rows}
    for folder in sorted(jobs_dir.iterdir()) if jobs_dir.is_dir() else ():
        if folder.is_dir() and _JOB_ID.fullmatch(folder.name) and folder.name not in known:
            target = jobs_dir / ORPHANS / folder.name
            yield Repair(
                f"{folder} has checkpoints of a job that is not in the database",
                f"Move it to {target}. If the database was lost, restore it instead.",
                _moving(folder, target),
            )
    for row in rows:
        if row["status"] in ACTIVE:
            yield Repair(
                f"job {row['id']} is {row['status']} according to the database",
                "Nothing to do: unless a server runs it now, the next start gives it its end.",
            )
        elif row["status"] == "succeeded" and not adapters.published_by(row["adapter_name"], row["id"]):
            yield Repair(
                f"job {row['id']} published a version of {row['adapter_name']} that is not on disk",
                "Nothing to do if somebody deleted it. Otherwise restore it from a backup.",
            )


def upload_repairs(files_dir: Path, database_url: str) -> Iterator[Repair]:
    """The same for uploaded files. Nothing when the database cannot be read, which `repairs` says."""
    folders = [one for one in sorted(files_dir.glob("*")) if one.is_dir() and not one.name.startswith(".")]
    if not folders:
        return
    try:
        known = {row["id"] for row in _select(database_url, "files", "id")}
    except FortwoError:
        return
    for folder in folders:
        if folder.name not in known:
            target = files_dir / ORPHANS / folder.name
            yield Repair(
                f"{folder} has the content of a file that is not in the database",
                f"Move it to {target}. If the database was lost, restore it instead.",
                _moving(folder, target),
            )


def _select(database_url: str, table: str, columns: str) -> list[dict[str, Any]]:
    """The rows of a table, from a database of any schema; none if there is no database or no such table yet."""
    engine = connect(database_url)
    try:
        file = engine.url.database if engine.dialect.name == "sqlite" else None
        if file is not None and not Path(file).exists():
            return []
        check(engine)
        with errors_of(engine), engine.connect() as connection:
            if not engine.dialect.has_table(connection, table):
                return []
            found = connection.execute(text(f"SELECT {columns} FROM {table}"))
            return [dict(row) for row in found.mappings()]
    finally:
        engine.dispose()


def _moving(folder: Path, target: Path) -> Callable[[], None]:
    def move() -> None:
        target.parent.mkdir(exist_ok=True)
        shutil.move(folder, target)

    return move
