"""Uploaded files, and files of results: their content in the home, their rows in the database.

    <root>/<id>/<name>    the content, whose size and SHA-256 the row has
    <root>/.pending-<id>  empty; while it is there, the row may not be stored yet

A file is written as a draft, synced and renamed before its row is stored: a row always has its whole content. Of a
server that was killed in between, the next start removes the content, because nobody was told its id. A file
that is deleted or expired is not listed any more; its content goes when no job needs it. Jobs that have succeeded or
were cancelled need none.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Select, and_, or_, select, update
from sqlalchemy.orm import Session

from fortwo import disk
from fortwo.data import datasets
from fortwo.errors import Conflict, InvalidDataset, NotFound
from fortwo.hub.datasets import HubDatasets
from fortwo.jobs.schema import FileRow, JobRow
from fortwo.jobs.store import JobStore
from fortwo.records import Dataset, Json

FINISHED = ("succeeded",)  # jobs that do not read their files again; cancelled ones can be resumed
LONGEST_NAME = 100
PENDING = ".pending-"


@dataclass(frozen=True)
class StoredFile:
    """bytes: its size. Times are Unix seconds; expires_at: None for never."""

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: float
    expires_at: float | None


class FileStore:
    """The files of one home. Methods that take an id raise NotFound when there is no such file."""

    def __init__(self, store: JobStore, root: Path, hub: HubDatasets) -> None:
        """hub: datasets of the Hugging Face hub, which `source` downloads."""
        self._store = store
        self._root = root
        self._hub = hub

    def clean(self) -> None:
        """Remove what a killed server did not finish, and what is deleted or expired and not needed. For the start. A
        folder that the database does not know for another reason is left alone: the database may have been lost."""
        for draft in self._root.glob(f"{disk.DRAFT_PREFIX}*"):
            shutil.rmtree(draft, ignore_errors=True)
        for pending in self._root.glob(f"{PENDING}*"):
            id = pending.name.removeprefix(PENDING)
            with self._store.reading() as session:
                stored = session.get(FileRow, id) is not None
            if not stored:
                shutil.rmtree(self._root / id, ignore_errors=True)
            pending.unlink(missing_ok=True)
        self._sweep()

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """An empty folder for the content of a new file, which is removed at the end unless `add` has moved it."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=disk.DRAFT_PREFIX, dir=self._root))
        except OSError as error:
            raise disk.storage_failed(self._root, error) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add(
        self,
        content: Path,
        filename: str,
        purpose: str,
        *,
        lifetime: float | None = None,
        also: Callable[[Session, StoredFile], None] = lambda _session, _file: None,
    ) -> StoredFile:
        """Store the one file of a draft. lifetime: seconds until it expires; also: called in the same transaction.
        Raises StorageFailed when the disk refuses; then nothing has changed."""
        self._sweep()
        now = time.time()
        folder = self._root / f"file-{uuid.uuid4().hex}"
        file = StoredFile(
            id=folder.name,
            filename=filename,
            purpose=purpose,
            bytes=content.stat().st_size,
            sha256=datasets.file_sha256(content),
            created_at=now,
            expires_at=None if lifetime is None else now + lifetime,
        )
        return self._commit(content, folder, file, also)

    def put(self, id: str, filename: str, purpose: str, content: bytes) -> StoredFile:
        """Store a file under an id of the caller, in place of an earlier one. Raises StorageFailed."""
        with suppress(NotFound):
            earlier = self.get(id)
            if earlier.sha256 == hashlib.sha256(content).hexdigest():
                return earlier
        with self.draft() as draft:
            path = draft / safe_name(filename)
            try:
                disk.write(path, content)
            except OSError as error:
                raise disk.storage_failed(path, error) from error
            shutil.rmtree(self._root / id, ignore_errors=True)  # of a server that died before it stored the row
            file = StoredFile(id, filename, purpose, len(content), datasets.file_sha256(path), time.time(), None)
            return self._commit(path, self._root / id, file, lambda _session, _file: None)

    def _commit(
        self, content: Path, folder: Path, file: StoredFile, also: Callable[[Session, StoredFile], None]
    ) -> StoredFile:
        pending = self._root / f"{PENDING}{file.id}"
        try:
            with content.open("rb") as handle:
                os.fsync(handle.fileno())
            disk.sync(content.parent)
            pending.touch()
            content.parent.rename(folder)
            disk.sync(self._root)
        except OSError as error:
            raise disk.storage_failed(folder, error) from error
        try:
            with self._store.transaction() as session:
                session.merge(FileRow(**vars(file), owner=self._store.owner, deleted_at=None))
                session.flush()
                also(session, file)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            with suppress(OSError):  # the next start removes it
                pending.unlink()
        return file

    def get(self, id: str) -> StoredFile:
        with self._store.reading() as session:
            row = session.scalars(self._present().where(FileRow.id == id)).first()
            if row is None:
                raise NotFound(f"There is no file {id!r}.", param="file_id", hint="GET /v1/files lists the files.")
            return _file(row)

    def existing(self, ids: Collection[str]) -> set[str]:
        """Those of the ids that are files."""
        with self._store.reading() as session:
            return {row.id for row in session.scalars(self._present().where(FileRow.id.in_(ids)))}

    def files(
        self, limit: int, *, after: str | None = None, purpose: str | None = None, ascending: bool = False
    ) -> list[StoredFile]:
        """At most `limit` files by their time, those behind `after`."""
        query = self._present()
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        if after is not None:
            last = self.get(after)
            beyond = FileRow.created_at > last.created_at if ascending else FileRow.created_at < last.created_at
            query = query.where(or_(beyond, and_(FileRow.created_at == last.created_at, FileRow.id > after)))
        order = FileRow.created_at.asc() if ascending else FileRow.created_at.desc()
        with self._store.reading() as session:
            return [_file(row) for row in session.scalars(query.order_by(order, FileRow.id).limit(limit))]

    def delete(self, id: str) -> None:
        """Delete a file. A job that needs it can still read it."""
        self.get(id)
        with self._store.transaction() as session:
            session.execute(update(FileRow).where(FileRow.id == id).values(deleted_at=time.time()))
        self._sweep()

    def path(self, id: str) -> Path:
        """The content of a file, which is compared with its checksum. Raises Conflict when it is damaged."""
        file = self.get(id)
        path = next((one for one in (self._root / id).glob("*") if one.is_file()), None)
        if path is None or path.stat().st_size != file.bytes or datasets.file_sha256(path) != file.sha256:
            raise Conflict(
                f"The content of file {id} is damaged or missing in {self._root / id}.",
                param="file_id",
                hint="Delete the file and upload it again.",
                code="file_damaged",
            )
        return path

    def source(
        self, spec: object, folders: Sequence[Path], check: Callable[[], None] = lambda: None
    ) -> tuple[object, tuple[Path, ...]]:
        """A dataset's source, and the folders in which its path may lie. {"file_id"} becomes the path of the file, and
        {"hub"} that of what is downloaded for it. check: called during a download; it may raise to end it. Raises
        InvalidDataset for a file that does not exist, and what HubDatasets.fetch raises."""
        if not isinstance(spec, dict) or len(spec.keys() - {datasets.COLUMNS}) != 1:
            return spec, tuple(folders)
        columns = {key: value for key, value in spec.items() if key == datasets.COLUMNS}
        if "hub" in spec:
            rows = self._hub.fetch(spec["hub"], check)
            return {"path": str(rows), **columns}, (rows.parent,)
        file_id = spec.get("file_id")
        if not isinstance(file_id, str):
            return spec, tuple(folders)
        try:
            path = self.path(file_id)
        except NotFound as error:
            raise InvalidDataset(
                f"dataset.file_id = {file_id!r}: {error.message}", param="dataset.file_id", hint=error.hint
            ) from None
        return {"path": str(path), **columns}, (path.parent,)

    def as_given(self, source: Json) -> Json:
        """The opposite of `source`: the path of an uploaded file becomes its {"file_id"}, and that of rows of the hub
        {"hub"} with the commit; all else stays."""
        path = Path(source.get("path", ""))
        more = {key: value for key, value in source.items() if key != "path"}
        if (origin := self._hub.origin(str(path))) is not None:
            return {"hub": origin["hub"], **more}
        return {"file_id": path.parent.name, **more} if path.is_relative_to(self._root.resolve()) else source

    def origins(self, read: Mapping[str, Dataset]) -> dict[str, Json]:
        """By field, where the rows of a dataset come from if it was downloaded from the hub (HubDatasets.origin)."""
        found = {field: self._hub.origin(dataset.source) for field, dataset in read.items()}
        return {field: origin for field, origin in found.items() if origin is not None}

    def _present(self) -> Select[FileRow]:
        alive = or_(FileRow.expires_at.is_(None), FileRow.expires_at > time.time())
        return select(FileRow).where(FileRow.owner == self._store.owner, FileRow.deleted_at.is_(None), alive)

    def _sweep(self) -> None:
        """Remove the content of what is deleted or expired, unless a job needs it."""
        expired = and_(FileRow.owner == self._store.owner, FileRow.expires_at <= time.time())
        with self._store.transaction() as session:
            session.execute(update(FileRow).where(expired, FileRow.deleted_at.is_(None)).values(deleted_at=time.time()))
            gone = select(FileRow).where(FileRow.owner == self._store.owner, FileRow.deleted_at.is_not(None))
            rows = list(session.scalars(gone))
            if not rows:
                return
            waiting = select(JobRow.file_ids).where(JobRow.status.not_in(FINISHED), JobRow.file_ids.is_not(None))
            needed = {id for ids in session.scalars(waiting) for id in ids or ()}
            for row in rows:
                if row.id not in needed:
                    shutil.rmtree(self._root / row.id, ignore_errors=True)
                    session.delete(row)


def safe_name(filename: str) -> str:
    """The name under which a file's content is stored: its last part, with unusual characters replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", filename.replace("\\", "/").rpartition("/")[2]).lstrip(".")
    name = name[-LONGEST_NAME:] or "file"
    return name if "." in name else f"{name}.jsonl"


def _file(row: FileRow) -> StoredFile:
    return StoredFile(**{name: getattr(row, name) for name in StoredFile.__dataclass_fields__})
