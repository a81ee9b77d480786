"""Datasets of the Hugging Face hub: their files are downloaded and checked, and no code of a dataset is run.

<root>/OWNER--NAME/<commit>/<part>/files/...   the files as they are in the repository
<root>/OWNER--NAME/<commit>/<part>/origin.json written last: what was downloaded, and which file has the rows
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fortwo import disk
from fortwo.errors import InvalidDataset
from fortwo.hub.dataset_files import choose_files
from fortwo.hub.repository import HubFile, Repository, check_space, licence_of
from fortwo.records import Json

PREFIX = "hub:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@:\s]+))?(:(?P<part>[^:\s][^:]*))?")
WAIT_SECONDS = 0.5  # for another download, between two calls of `check`
ORIGIN, FILES = "origin.json", "files"


@dataclass(frozen=True)
class DatasetReference:
    """hub:OWNER/NAME[@REVISION][:PART]. part: a file, config/split, a config or a split."""

    repo_id: str
    revision: str | None
    part: str | None

    @classmethod
    def parse(cls, text: object) -> DatasetReference:
        """With or without the prefix. Raises InvalidDataset."""
        found = _REFERENCE.fullmatch(text.removeprefix(PREFIX)) if isinstance(text, str) else None
        if found is None or ".." in found["repo"]:
            raise InvalidDataset(
                f"dataset.hub = {text!r} is not a dataset of the Hugging Face hub",
                param="dataset.hub",
                hint="Write OWNER/NAME, OWNER/NAME@REVISION, or with a part behind it: OWNER/NAME:FILE, "
                "OWNER/NAME:CONFIG/SPLIT.",
            )
        return cls(found["repo"], found["revision"], found["part"])

    @property
    def repository(self) -> Repository:
        return Repository(
            self.repo_id,
            self.revision,
            "dataset",
            again="Try again.",
            revised="Name a revision that exists: hub:OWNER/NAME@REVISION",
            elsewhere="Download the file elsewhere and give its path. A dataset that was downloaded before can be used "
            "offline by its commit: hub:OWNER/NAME@COMMIT",
        )


@dataclass(frozen=True)
class FoundDataset:
    """What would be downloaded for a reference: the files of one commit."""

    reference: DatasetReference
    commit: str
    licence: str | None
    files: tuple[HubFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def body(self) -> Json:
        """As JSON: hub (with the commit), licence, bytes, and files with name and bytes."""
        files = [{"name": file.name, "bytes": file.size} for file in self.files]
        return {"hub": _pinned(self), "licence": self.licence, "bytes": self.bytes, "files": files}


def find(reference: DatasetReference) -> FoundDataset:
    """What the hub has for a reference; nothing is downloaded. Raises InvalidDataset for one that means no single part,
    and SourceUnreachable."""
    info = reference.repository.dataset_info()
    card: Any = info.card_data
    configs = (card.get("configs") if card is not None else None) or []
    files = {sibling.rfilename: HubFile.of(sibling) for sibling in info.siblings or []}
    chosen = choose_files(tuple(files), configs if isinstance(configs, list) else [], reference.part)
    return FoundDataset(reference, info.sha or "", licence_of(info), tuple(files[name] for name in chosen))


class HubDatasets:
    """What was downloaded, below `root`. For any thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()  # two downloads would write the same file

    def fetch(self, text: object, check: Callable[[], None] = lambda: None) -> Path:
        """The file with the rows, downloaded if it is not here. One that is named by its commit and is here needs no
        network. check: called now and then; it may raise to give up, and what was downloaded is kept. Raises
        InvalidDataset, SourceUnreachable, and StorageFailed for a disk that is full or refuses."""
        reference = DatasetReference.parse(text)
        while not self._lock.acquire(timeout=WAIT_SECONDS):
            check()
        try:
            return self._fetched(reference, check)
        except OSError as error:
            raise disk.storage_failed(self._root, error) from error
        finally:
            self._lock.release()

    def _fetched(self, reference: DatasetReference, check: Callable[[], None]) -> Path:
        commit = _COMMIT.fullmatch(reference.revision or "")
        if commit is not None and (here := _rows(self._folder(reference, commit[0]))) is not None:
            return here
        found = find(reference)
        folder = self._folder(reference, found.commit)
        here = _rows(folder)
        return _download(found, folder, check) if here is None else here

    def origin(self, source: str) -> Json | None:
        """Where the rows in a file come from: hub (with the commit), licence, bytes, and files with name, bytes and
        sha256. None for a file that was not downloaded from the hub."""
        path = Path(source)
        for folder in path.parents:
            if folder.is_relative_to(self._root) and (folder / ORIGIN).is_file():
                body = json.loads((folder / ORIGIN).read_text("utf-8"))
                return {name: body[name] for name in ("hub", "licence", "bytes", "files")}
        return None

    def _folder(self, reference: DatasetReference, commit: str) -> Path:
        part = hashlib.sha256((reference.part or "").encode()).hexdigest()[:16]
        return self._root / reference.repo_id.replace("/", "--") / commit / part


def _pinned(found: FoundDataset) -> str:
    part = "" if found.reference.part is None else f":{found.reference.part}"
    return f"{PREFIX}{found.reference.repo_id}@{found.commit}{part}"


def _rows(folder: Path) -> Path | None:
    """The file with the rows of a complete download; None where it is missing or was changed."""
    try:
        body = json.loads((folder / ORIGIN).read_text("utf-8"))
        path: Path = folder / body["rows"]
        return path if _sha256(path) == body["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def _download(found: FoundDataset, folder: Path, check: Callable[[], None]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ORIGIN).unlink(missing_ok=True)
    check_space(_pinned(found), found.bytes * (2 if len(found.files) > 1 else 1), folder)
    repository, paths, sums = found.reference.repository, [], []
    for file in found.files:
        path = folder / FILES / file.name
        repository.download(path, file, found.commit, check)
        sums.append(repository.verified(path, file))
        paths.append(path)
    rows = _joined(paths, folder, check)
    body = found.body()
    files = [{**file, "sha256": sha256} for file, sha256 in zip(body["files"], sums, strict=True)]
    origin = {**body, "files": files, "rows": str(rows.relative_to(folder)), "sha256": _sha256(rows)}
    disk.replace(folder / ORIGIN, disk.dump(origin))
    if rows.parent == folder:
        shutil.rmtree(folder / FILES)
    return rows


def _joined(paths: list[Path], folder: Path, check: Callable[[], None]) -> Path:
    """One file with the rows of all. A .json file with one object per line gets the name that says so."""
    if len(paths) > 1:
        rows = folder / f"rows{paths[0].suffix}"
        (_join_parquet if rows.suffix == ".parquet" else _join_lines)(paths, rows, check)
        return rows
    (path,) = paths
    if path.suffix == ".json" and _has_lines(path):
        path.replace(folder / "rows.jsonl")
        return folder / "rows.jsonl"
    return path


def _has_lines(path: Path) -> bool:
    """Whether the first line is an object of its own."""
    with path.open("rb") as file:
        try:
            return isinstance(json.loads(file.readline(1 << 24)), dict)
        except ValueError:
            return False


def _join_lines(paths: list[Path], rows: Path, check: Callable[[], None]) -> None:
    with rows.open("wb") as out:
        for path in paths:
            with path.open("rb") as file:
                for line in file:
                    check()
                    out.write(line if line.endswith(b"\n") else line + b"\n")


def _join_parquet(paths: list[Path], rows: Path, check: Callable[[], None]) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetWriter(rows, pyarrow.parquet.read_schema(paths[0])) as out:
            for path in paths:
                with pyarrow.parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches():
                        check()
                        out.write_batch(batch.cast(out.schema))
    except pyarrow.ArrowException as error:
        names = ", ".join(path.name for path in paths)
        raise InvalidDataset(
            f"the files {names} cannot be joined: {error}",
            param="dataset.hub",
            hint="Name one of them: hub:OWNER/NAME:FILE",
        ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
