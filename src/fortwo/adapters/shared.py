"""An adapter store whose versions are kept under a URL, for all servers that have the same URL.

The folder on the disk is a cache of it: manifests come when another server has published something, tensors when they
are read. versions.json is a copy of the list that the URL has (see `remote`), and every change is made there first.
What is not under the URL yet, because the setting is new, is brought there when a server joins.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo import disk
from fortwo.adapters import deletion
from fortwo.adapters.drafts import publish_draft
from fortwo.adapters.refs import parse_ref
from fortwo.adapters.remote import RemoteStore
from fortwo.adapters.store import AdapterStore, Followers
from fortwo.adapters.version_files import CACHED, CONFIG, MANIFEST, STATE, TENSORS, read_state, version_numbers
from fortwo.errors import Conflict, FortwoError, InvalidAdapter, InvalidRequest, NotFound
from fortwo.records import AdapterVersion, Json

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
POLL_SECONDS = 5
ATTEMPTS = 20


def open_store(root: Path, url: str | None, followers: Followers | None = None) -> AdapterStore:
    """The store in the folder `root`, whose versions are kept under `url` if there is one. Raises what RemoteStore
    raises."""
    return AdapterStore(root, followers) if url is None else SharedAdapterStore(root, RemoteStore(url), followers)


class SharedAdapterStore(AdapterStore):
    """As AdapterStore. What changes something also raises what RemoteStore raises; then nothing has changed. A version
    that is not known here is looked for under the URL."""

    def __init__(self, root: Path, remote: RemoteStore, followers: Followers | None = None) -> None:
        super().__init__(root, followers)
        self._remote = remote
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ with other servers

    def join(self) -> None:
        """Bring versions that only this folder has under the URL, and take over what others have published. Raises
        Conflict when the folder belongs to another URL, or has other versions of the same name."""
        mark = self._root / CACHED
        self._root.mkdir(parents=True, exist_ok=True)
        known = mark.read_text("ascii", "replace") if mark.exists() else None
        if known is not None and known != self._remote.id:
            raise Conflict(
                f"adapters_url = {self._remote.url!r} is another store than the one that {self._root} belongs to",
                param="adapters_url",
                hint="Set FORTWO_ADAPTERS_URL back, or use another FORTWO_HOME.",
            )
        for name in self._folders():
            with self._locked_folder(name) as folder:
                self._bring(folder, fresh=known is None)
        disk.replace(mark, self._remote.id.encode())
        self.refresh()

    def follow(self) -> None:
        """From now on take over what others publish, within seconds."""
        self._thread = threading.Thread(target=self._run, name="fortwo-adapters", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        reached = True
        while not self._closed.wait(POLL_SECONDS):
            try:
                self.refresh()
                reached = True
            except FortwoError as error:
                log.log(logging.WARNING if reached else logging.DEBUG, "%s %s", error.message, error.hint)
                reached = False

    def refresh(self) -> None:
        """Take over what others have changed. A version that the followers refuse does not become current here."""
        for name, number in self._remote.newest().items():
            try:
                self._take_over(name, number)
            except (Conflict, InvalidAdapter) as error:
                log.warning("%s is not taken over: %s %s", name, error.message, error.hint)

    def _take_over(self, name: str, number: int) -> bool:
        """Whether there was something new."""
        if number == read_state(self._root / name).get("sequence", 0):
            return False
        with self._locked_folder(name) as folder:
            self._pull(folder)
        return True

    def _look(self, ref: str) -> bool:
        try:
            name, _ = parse_ref(ref)
        except InvalidRequest:
            return False
        return self._take_over(name, self._remote.newest_of(name))

    # ------------------------------------------------------------ reading

    def has(self, name: str) -> bool:
        return super().has(name) or (self._look(name) and super().has(name))

    def get(self, ref: str) -> AdapterVersion:
        try:
            return super().get(ref)
        except NotFound:
            if not self._look(ref):
                raise
        return super().get(ref)

    def read(self, ref: str) -> tuple[AdapterVersion, Json, dict[str, Tensor]]:
        version = self.get(ref)
        for file in (CONFIG, TENSORS):
            path = Path(version.path) / file
            if not path.exists():
                content = self._remote.read_file(version.name, version.version, file)
                try:
                    disk.replace(path, content)  # its checksum is compared where it is read
                except OSError as error:
                    raise disk.storage_failed(path, error) from error
        return super().read(version.id)

    # ------------------------------------------------------------ changing

    def _update(self, folder: Path, change: Callable[[Json], None]) -> None:
        for _ in range(ATTEMPTS):
            before = self._pull(folder)
            state = {**_copy(before), "sequence": before["sequence"] + 1}
            change(state)
            if self._remote.add_list(folder.name, state["sequence"], state):
                self._apply(folder, before, state)
                return
        raise Conflict(
            f"adapter {folder.name!r} is changed by other servers all the time",
            param="adapter_name",
            hint="Try again later.",
        )

    def _next_number(self, folder: Path) -> int:
        """The number is reserved under the URL, so that no other server uses it."""
        least = super()._next_number(folder)
        self._update(folder, lambda state: state.update(last=max(least, state["last"] + 1)))
        return int(read_state(folder)["last"])

    def _add(self, folder: Path, number: int, draft: Path, current: bool, last: bool) -> None:
        entry = self._upload(folder.name, number, draft)
        version_folder = folder / str(number)
        publish_draft(draft, version_folder)

        def change(state: Json) -> None:
            state["versions"][str(number)] = entry
            state["current"] += [number] if current else []

        try:
            self._update(folder, change)
        except BaseException:
            shutil.rmtree(version_folder, ignore_errors=True)
            raise

    def _remove(self, folder: Path, paths: Sequence[Path], permanently: bool) -> None:
        numbers = [deletion.number_of(path) for path in paths]

        def change(state: Json) -> None:
            for number in map(str, numbers):
                entry = state["versions"].pop(number, None) or state["deleted"].pop(number, {})
                if not permanently:
                    state["deleted"][number] = {**entry, "at": time.time()}

        self._update(folder, change)
        if permanently:
            for number in numbers:
                self._remote.remove_version(folder.name, number)

    def _bring_back(self, folder: Path, numbers: Sequence[int]) -> None:
        def change(state: Json) -> None:
            for number in map(str, numbers):
                if (entry := state["deleted"].pop(number, None)) is not None:
                    state["versions"][number] = {"manifest": entry["manifest"]}

        self._update(folder, change)

    def _bring(self, folder: Path, fresh: bool) -> None:
        """Upload the versions that the URL does not know. fresh: the folder has not belonged to a store yet."""
        number = self._remote.newest_of(folder.name)
        listed = _entries(self._remote.read_list(folder.name, number)) if number else {}
        here = {number: folder / str(number) for number in version_numbers(folder)}
        here |= {number: deletion.place(folder, number) for number in deletion.set_aside_numbers(folder)}
        unknown = [number for number in here if str(number) not in listed]
        other = [one for one, path in here.items() if one not in unknown and _sha(path) != listed[str(one)]["manifest"]]
        if other or (fresh and number and unknown):
            raise Conflict(
                f"adapters_url = {self._remote.url!r} has another adapter {folder.name!r} than {self._root}",
                param="adapters_url",
                hint=f"Rename the folder {folder}, choose another URL, or use another FORTWO_HOME.",
            )
        entries = {number: self._upload(folder.name, number, here[number]) for number in unknown}

        def change(state: Json) -> None:
            state["last"] = max([state["last"], *entries])
            for number, entry in entries.items():
                if here[number].name == str(number):
                    state["versions"][str(number)] = entry
                else:
                    at = deletion.deleted_at(folder, number)
                    state["deleted"][str(number)] = {**entry, "at": at}

        if entries:
            self._update(folder, change)

    def _upload(self, name: str, number: int, folder: Path) -> Json:
        """What the list says of a version whose files are in `folder`."""
        for file in (CONFIG, TENSORS, MANIFEST):
            self._remote.write_file(name, number, file, (folder / file).read_bytes())
        return {"manifest": _sha(folder)}

    # ------------------------------------------------------------ the folder as the list says

    def _pull(self, folder: Path) -> Json:
        """The list that holds. The folder, which is locked, is as it says."""
        local = _copy(read_state(folder))
        number = self._remote.newest_of(folder.name)
        if number == local["sequence"]:
            return local
        state = _copy(self._remote.read_list(folder.name, number))
        self._fetch(folder, state)
        current = deletion.history(state, [int(number) for number in state["versions"]])
        if self._followers is not None and current and current[-1] != self._current_number(folder.name, local):
            version = self._version(folder.name, current[-1], state, current[-1])
            self._followers.before_current(version)
        self._apply(folder, local, state)
        return state

    def _fetch(self, folder: Path, state: Json) -> None:
        """Manifests of versions that are not here yet."""
        for number, entry in _entries(state).items():
            if (folder / number).exists() or deletion.place(folder, int(number)).exists():
                continue
            content = self._remote.read_file(folder.name, int(number), MANIFEST)
            if hashlib.sha256(content).hexdigest() != entry["manifest"]:
                raise Conflict(
                    f"The manifest of {folder.name}@{number} under {self._remote.url} is not what was published",
                    param="adapters_url",
                    hint="Restore the object from a backup, or delete the version and train it again.",
                )
            draft = Path(tempfile.mkdtemp(prefix=disk.DRAFT_PREFIX, dir=folder))
            try:
                disk.write(draft / MANIFEST, content)
                disk.sync(draft)
                publish_draft(draft, folder / number)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def _apply(self, folder: Path, before: Json, state: Json) -> None:
        """Let the folder be as the list says. Versions that no list has named stay."""
        aside = deletion.set_aside_numbers(folder)
        for number in map(int, state["versions"]):
            if number in aside:
                deletion.bring_back(folder, number)
        for text, entry in state["deleted"].items():
            if (folder / text).exists():
                deletion.set_aside(folder, int(text))
                os.utime(deletion.place(folder, int(text)), (entry["at"], entry["at"]))
        for text in _entries(before).keys() - _entries(state).keys():
            for path in (folder / text, deletion.place(folder, int(text))):
                with suppress(FileNotFoundError):
                    deletion.remove(path)
        disk.replace(folder / STATE, disk.dump(state))


def _copy(state: Json) -> Json:
    """A list with all its fields, whose changes do not change the one that was given."""
    full: Json = {"sequence": 0, "versions": {}, "deleted": {}, **state}
    return {key: value.copy() if isinstance(value, dict | list) else value for key, value in full.items()}


def _entries(state: Mapping[str, Json]) -> dict[str, Json]:
    """What the list says of each version, by number."""
    return {**state.get("versions", {}), **state.get("deleted", {})}


def _sha(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
