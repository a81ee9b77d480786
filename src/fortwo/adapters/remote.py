"""The adapters that several servers share under a URL of fsspec, such as s3://bucket/folder.

    <url>/fortwo-adapters.json          says that this is such a store, and has its id
    <url>/adapters/<name>/<version>/    the files of a version, as on disk
    <url>/lists/<name>/<number>.json    which versions an adapter has, and which is current; the highest number holds

A list is never changed. Whoever changes something creates the list with the next number, and fails if another server
was faster (on S3 by If-None-Match). So no change is lost, and a version exists for others only once all its files are
there. fsspec is imported when a store is opened.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from uuid import uuid4

from fortwo import disk
from fortwo.errors import Conflict, FortwoError, InvalidRequest, StorageFailed, Unavailable
from fortwo.records import Json

MARKER = "fortwo-adapters.json"
FORMAT = 1
KEPT_LISTS = 20  # of an adapter: who has stood still for more changes than these begins again
FULL = (errno.ENOSPC, errno.EDQUOT)


class RemoteStore:
    """The store at `url`, made if there is nothing. id: by which it is known wherever it is reached. All methods raise
    Unavailable when the URL does not answer, and StorageFailed when it refuses.

    Raises InvalidRequest for a URL that cannot be used, and Conflict when something else lies there."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self._fs, self._root = url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise InvalidRequest(
                f"adapters_url = {url!r} cannot be opened: {error}",
                param="adapters_url",
                hint="For s3://bucket/folder install it: pip install 'fortwo[s3]'. For another URL install the package "
                "of fsspec that the message names.",
            ) from None
        self._is_local = hasattr(self._fs, "auto_mkdir")
        if self._is_local:
            self._fs.auto_mkdir = True
        self.id = self._open()

    def newest(self) -> dict[str, int]:
        """The number of the list that holds, by adapter."""
        found: dict[str, int] = {}
        for path in self._find("lists"):
            name, number = path.parent.name, path.stem
            if disk.NAME.fullmatch(name) and number.isdecimal():
                found[name] = max(found.get(name, 0), int(number))
        return found

    def newest_of(self, name: str) -> int:
        """The same for one adapter; 0 where it has none."""
        return max(self._numbers(name), default=0)

    def read_list(self, name: str, number: int) -> Json:
        path = f"lists/{name}/{number}.json"
        try:
            content = self._read(path)
            state = json.loads(content)
        except (FileNotFoundError, ValueError) as error:
            raise self._damaged(path, error) from None
        if not isinstance(state, dict) or not all(isinstance(state.get(key), dict) for key in ("versions", "deleted")):
            raise self._damaged(path, "it is no list of versions")
        return state

    def add_list(self, name: str, number: int, state: Json) -> bool:
        """Create a list; False if another server was faster."""
        path = f"lists/{name}/{number}.json"
        content = disk.dump({**state, "id": uuid4().hex})
        try:
            self._create(path, content)
        except FileExistsError:
            with suppress(FileNotFoundError):
                return self._read(path) == content  # the answer to the first try was lost
            return False
        numbers = self._numbers(name)
        if max(numbers) >= number + KEPT_LISTS:  # the lists between were removed already
            self._remove(path)
            return False
        for old in numbers:
            if old <= number - KEPT_LISTS:
                self._remove(f"lists/{name}/{old}.json")
        return True

    def write_file(self, name: str, version: int, file: str, content: bytes) -> None:
        path = f"adapters/{name}/{version}/{file}"
        with self._explained(f"written to ({path})"):
            self._fs.pipe_file(self._path(path), content)

    def read_file(self, name: str, version: int, file: str) -> bytes:
        """Raises StorageFailed when the file is missing, too."""
        path = f"adapters/{name}/{version}/{file}"
        try:
            return self._read(path)
        except FileNotFoundError as error:
            raise self._damaged(path, error) from None

    def remove_version(self, name: str, version: int) -> None:
        """Remove the files of a version that no list names any more."""
        for path in self._find(f"adapters/{name}/{version}"):
            self._remove(str(path.relative_to(self._root)))

    def _open(self) -> str:
        """The id of the store, which is made if there is nothing. Finds out whether the URL can refuse to create what
        exists, because all depends on it."""
        marker = self._marker()
        if marker is None:
            if found := self._find(""):
                raise Conflict(
                    f"adapters_url = {self.url!r} holds other data, for example {found[0]}",
                    param="adapters_url",
                    hint="Choose a URL of its own for fortwo's adapters, such as a new folder of the bucket.",
                )
            with suppress(FileExistsError):
                self._create(MARKER, disk.dump({"format": FORMAT, "id": uuid4().hex}))
            marker = self._marker()
        if marker is None or marker.get("format") != FORMAT or not isinstance(marker.get("id"), str):
            raise Conflict(
                f"{self.url}/{MARKER} is not of a store that this version of fortwo can use",
                param="adapters_url",
                hint="Choose another URL, or install the version of fortwo that wrote it.",
            )
        with suppress(FileExistsError, StorageFailed):  # StorageFailed: it can only be read
            self._create(MARKER, disk.dump(marker))
            raise Conflict(
                f"adapters_url = {self.url!r} replaces a file although it was told to create it only if there is none",
                param="adapters_url",
                hint="Two servers could undo each other's changes there. Use a store with conditional writes, such as "
                "S3 with If-None-Match.",
            )
        return str(marker["id"])

    def _marker(self) -> Json | None:
        try:
            marker = json.loads(self._read(MARKER))
        except FileNotFoundError:
            return None
        except ValueError:
            marker = None
        return marker if isinstance(marker, dict) else {}

    def _numbers(self, name: str) -> list[int]:
        return [int(path.stem) for path in self._find(f"lists/{name}") if path.stem.isdecimal()]

    def _find(self, folder: str) -> list[PurePosixPath]:
        with self._explained("listed"), suppress(FileNotFoundError):
            return [PurePosixPath(path) for path in self._fs.find(self._path(folder))]
        return []

    def _read(self, path: str) -> bytes:
        with self._explained(f"read ({path})"):
            content: bytes = self._fs.cat_file(self._path(path))
            return content

    def _create(self, path: str, content: bytes) -> None:
        """Raises FileExistsError."""
        with self._explained(f"written to ({path})"):
            try:
                if self._is_local:
                    with self._fs.open(self._path(path), "xb") as file:
                        file.write(content)
                else:
                    self._fs.pipe_file(self._path(path), content, mode="create")
            except FileNotFoundError as error:
                raise InvalidRequest(
                    f"adapters_url = {self.url!r} cannot be written to: {error}",
                    param="adapters_url",
                    hint="Create the bucket, or correct the URL.",
                ) from None

    def _remove(self, path: str) -> None:
        with self._explained(f"changed ({path})"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(path))

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Raises FileNotFoundError and FileExistsError as they are, and all other failures as errors of fortwo."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, FortwoError):
            raise
        except Exception as error:  # the packages of fsspec raise what their clients raise
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> FortwoError:
        message = f"{self.url} cannot be {what}: {error or type(error).__name__}"
        if isinstance(error, PermissionError) or "credentials" in str(error):
            return StorageFailed(
                message,
                param="adapters_url",
                hint="Give the server credentials that may list, read, write and delete there; for S3 by "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by a role. What was stored before is untouched.",
                code="adapters_url_denied",
            )
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            full = error.errno in FULL or "quota" in str(error).lower()
            return StorageFailed(
                message,
                param="adapters_url",
                hint="It is full: free space, or raise its quota. What was stored before is untouched."
                if full
                else "Correct what the message says, then try again. What was stored before is untouched.",
            )
        return Unavailable(
            message,
            param="adapters_url",
            hint="Check the network and FORTWO_ADAPTERS_URL, and for another S3 than Amazon's FSSPEC_S3_ENDPOINT_URL. "
            "Versions on this machine are still served; what was not published can be published again.",
            code="adapters_url_unreachable",
        )

    def _damaged(self, path: str, why: object) -> StorageFailed:
        return StorageFailed(
            f"{self.url}/{path} is missing or damaged: {why}",
            param="adapters_url",
            hint="Restore the object from a backup, or delete the version and train it again.",
        )
