"""The adapter store: all published versions, each of which is complete or absent.

    <root>/<name>/<version>/adapter_config.json, adapter_model.safetensors   in PEFT's format
                            manifest.json     where the version came from, and the sha256 of the other two files
    <root>/<name>/versions.json               the highest number ever used, which versions are or were current, their
                                              tags, and which are protected
    <root>/<name>/.deleted-<version>/         a deleted version, which can be restored until it is removed

A version is written into a draft folder beside the others, synced, and renamed. The rename makes it exist and, where
that is wanted, makes it current. `versions.json` may therefore name versions that do not exist, because they were never
finished or were deleted; readers skip them, and no number is used twice. A version that is to be served somewhere first
is made current after that. Writers, threads and processes alike, lock the
name's folder. A draft stays locked while its writer lives, so that the next writer can recognise and remove the drafts
of killed ones. Readers need no lock.

A store may have followers, which serve the same files elsewhere. They are told before a version becomes current and
before versions are deleted, and what they raise keeps everything as it was.

This module does not know what the tensors mean. torch is imported only to read or write them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock

from fortwo import disk
from fortwo.adapters import deletion
from fortwo.adapters.drafts import LOCK, lock_of, publish_draft, release, remove_abandoned_drafts
from fortwo.adapters.peft_files import PeftFiles
from fortwo.adapters.reader import AdapterReader
from fortwo.adapters.refs import check_name, parse_ref
from fortwo.adapters.version_files import (
    CONFIG,
    MANIFEST,
    STATE,
    TAG,
    TENSORS,
    is_readable,
    read_state,
    shas_of,
    version_numbers,
)
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest, NotFound
from fortwo.hub import weights
from fortwo.records import AdapterVersion, Json

if TYPE_CHECKING:
    from torch import Tensor


class Followers(Protocol):
    """Those who serve the versions of a store besides its own process."""

    def before_current(self, version: AdapterVersion) -> None:
        """Get ready to serve a version that is about to become current. What is raised keeps the earlier one."""

    def before_delete(self, versions: Sequence[AdapterVersion]) -> None:
        """Stop serving versions that are about to be deleted. What is raised keeps them. Raises Conflict while requests
        use one of them."""


class AdapterStore(AdapterReader):
    """The adapters under `root`, to read and to change. The methods that change something also raise what the followers
    raise."""

    def __init__(self, root: Path, followers: Followers | None = None) -> None:
        super().__init__(root)
        self._followers = followers

    def publish(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        peft_config: Json,
        manifest: Json,
        *,
        current: bool,
        serve: Callable[[AdapterVersion], None] | None = None,
    ) -> AdapterVersion:
        """Store a new version, and make it the current one if `current`.

        tensors, peft_config: under PEFT's names. manifest: base_model, base_digest, and where they are known
        job_id, dataset_digest, plan, report and parent. A job that publishes the same files again gets the version that
        it already has. serve: called when the version exists, before it is made current; what it raises is passed on,
        and the version stays without being current. Raises StorageFailed when the disk refuses; then nothing has
        changed.
        """
        on_cpu = {key: tensor.cpu() for key, tensor in tensors.items()}
        files = {CONFIG: disk.dump(peft_config), TENSORS: weights.serialize(on_cpu)}
        job_id = manifest.get("job_id")
        earlier = None if job_id is None else self.published_by(name, job_id)
        if earlier is not None and earlier.manifest["files"] == shas_of(files):
            return self._serve(earlier, current and not earlier.current, serve)
        return self._commit(name, files, manifest, current, serve)

    def _make_current(self, version: AdapterVersion) -> AdapterVersion:
        name, number = version.name, version.version

        def change(state: Json) -> None:
            self._announce(name, number)
            state["last"] = max(state["last"], number)
            state["current"].append(number)

        self._change(name, change)
        return self.get(version.id)

    def finish_publication(self, version: AdapterVersion) -> AdapterVersion:
        """Make a version current that was to be made current when it was stored, but whose writer was killed before.
        Raises what `promote` raises."""
        meant = version.manifest.get("made_current", False)
        waits = meant and version.version not in read_state(self._root / version.name)["current"]
        return self._make_current(version) if waits else version

    def _serve(
        self, version: AdapterVersion, current: bool, serve: Callable[[AdapterVersion], None] | None
    ) -> AdapterVersion:
        if serve is not None:
            serve(version)
        return self._make_current(version) if current else version

    def import_peft(
        self,
        name: str,
        adapter: PeftFiles,
        manifest: Json,
        serve: Callable[[AdapterVersion], None] | None = None,
    ) -> AdapterVersion:
        """Store an adapter that PEFT saved as a new version and make it current. serve: as for `publish`."""
        return self._commit(name, adapter.files, manifest, True, serve)

    def rollback(self, name: str) -> AdapterVersion:
        """Make the version current that was current before, and return it; no version is deleted. Raises NotFound for
        an unknown name and Conflict when no earlier version was current."""
        check_name(name)
        self._existing_numbers(name)

        def change(state: Json) -> None:
            history = deletion.history(state, version_numbers(self._root / name))
            if len(history) < 2:
                raise Conflict(
                    f"adapter {name!r} has no earlier version that was current",
                    param="adapter_name",
                    hint=f"Use the name of a version: {self._version_refs(name)}.",
                )
            self._announce(name, history[-2])
            state["current"] = history[:-1]

        self._change(name, change)
        return self.get(name)

    def promote(self, ref: str) -> AdapterVersion:
        """Make a version current, and return it. Raises NotFound, and InvalidRequest for a bare name."""
        version = self._named_version(ref)
        return version if version.current else self._make_current(version)

    def tag(self, ref: str, tag: str) -> AdapterVersion:
        """Let `tag` mean this version, also if it meant another one. Raises NotFound, and InvalidRequest for a bare
        name or a bad tag."""
        version = self._named_version(ref)
        if not TAG.fullmatch(tag):
            raise InvalidRequest(
                f"tag = {tag!r} is not allowed",
                param="tag",
                hint="Use 1 to 64 letters, digits, '.' or '_'; begin with a letter.",
            )
        self._change(version.name, lambda state: state["tags"].update({tag: version.version}))
        return self.get(version.id)

    def untag(self, name: str, tag: str) -> None:
        """Forget a tag. Raises NotFound."""
        self._existing_numbers(name)

        def change(state: Json) -> None:
            if state["tags"].pop(tag, None) is None:
                raise self._no_tag(name, tag, state["tags"])

        self._change(name, change)

    def protect(self, ref: str, protected: bool) -> AdapterVersion:
        """Let a version be deleted no longer, or again. Raises NotFound, and InvalidRequest for a bare name."""
        version = self._named_version(ref)

        def change(state: Json) -> None:
            others = [number for number in state["protected"] if number != version.version]
            state["protected"] = [*others, version.version] if protected else others

        self._change(version.name, change)
        return self.get(version.id)

    def delete(self, ref: str, *, permanently: bool = False) -> None:
        """Delete one version, or all versions when `ref` is a bare name. When the current version is deleted, the one
        that was current before becomes current again. `restore` brings them back, unless permanently. Raises NotFound,
        and Conflict for a protected version; then nothing is deleted."""
        name, number = self._resolve(ref)
        existing = self._existing_numbers(name, number)
        with self._locked_folder(name) as folder:
            if number is None and not is_readable(folder):  # nothing is left that it could describe
                disk.replace(folder / STATE, disk.dump({"last": max(existing), "current": []}))
            deleted = existing if number is None else [number]
            if is_readable(folder) and (kept := sorted({*read_state(folder)["protected"]} & {*deleted})):
                raise Conflict(
                    f"{name}@{kept[0]} is protected from deletion",
                    param="adapter_name",
                    hint=f"Run `fortwo adapters unprotect {name}@{kept[0]}` first.",
                )
            self._announce_change(name, [one for one in existing if one not in deleted])
            self._before_delete(name, deleted)
            self._remove(folder, [folder / str(version) for version in deleted], permanently)

    def restore(self, ref: str) -> tuple[AdapterVersion, ...]:
        """Bring back a deleted version, or with a bare name all that were deleted, as they were. Raises NotFound."""
        name, number = parse_ref(ref)
        deleted = deletion.set_aside_numbers(self._root / name)
        wanted = deleted if number is None else [one for one in deleted if one == number]
        if not wanted:
            others = ", ".join(f"{name}@{one}" for one in deleted)
            raise NotFound(
                f"no deleted version {ref!r} can be restored",
                param="adapter_name",
                hint=f"These can: {others}." if others else f"Deleted versions are kept for {deletion.DAYS} days.",
            )
        with self._locked_folder(name) as folder:
            self._bring_back(folder, wanted)
        return tuple(self.get(f"{name}@{one}") for one in wanted)

    def prune(self, keep: int, *, apply: bool, needed: Collection[str] = ()) -> list[Json]:
        """Which versions are more than so many newest ones of their adapter and serve nothing (see
        `deletion.superfluous`), and deleted versions whose time to be restored is over: each as {id, bytes, why}.
        apply: they are removed for good. needed: versions, as name@version, that stay."""
        versions = [version for name in self.names() for version in self.versions(name)]
        parents = {version.manifest.get("parent") for version in versions} | {*needed}
        listed = []
        for name in self._folders():
            if not is_readable(self._root / name):
                continue
            with self._locked_folder(name) as folder:
                own = self.versions(name) if version_numbers(folder) else ()
                superfluous = deletion.superfluous(own, read_state(folder), parents, keep)
                found = [(number, folder / str(number), f"{name} has {keep} newer versions") for number in superfluous]
                why = f"deleted over {deletion.DAYS} days ago"
                found += [(deletion.number_of(path), path, why) for path in deletion.expired(folder, time.time())]
                for number, path, why in found:
                    listed.append({"id": f"{name}@{number}", "bytes": deletion.size(path), "why": why})
                if apply and found:
                    self._before_delete(name, superfluous)
                    self._remove(folder, [path for _, path, _ in found], permanently=True)
        return listed

    def remove_expired(self) -> None:
        """Remove the deleted versions whose time to be restored is over."""
        for name in self._folders():
            if deletion.expired(self._root / name, time.time()):
                with self._locked_folder(name) as folder:
                    self._remove(folder, deletion.expired(folder, time.time()), permanently=True)

    def _commit(
        self,
        name: str,
        files: dict[str, bytes],
        manifest: Json,
        current: bool,
        serve: Callable[[AdapterVersion], None] | None,
    ) -> AdapterVersion:
        at_once = current and serve is None and self._followers is None  # otherwise once it can be served
        with self._locked_folder(name) as folder:
            remove_abandoned_drafts(folder)
            read_state(folder)  # a damaged one is found before anything is written
            draft = version_folder = Path(tempfile.mkdtemp(prefix=disk.DRAFT_PREFIX, dir=folder))
            lock = lock_of(draft)
            lock.acquire()
        try:
            for file, content in files.items():
                disk.write(draft / file, content)
            with self._locked_folder(name) as folder:
                number = self._next_number(folder)
                version_folder = folder / str(number)
                identity = {"name": name, "version": number, "created_at": time.time(), "made_current": current}
                disk.write(draft / MANIFEST, disk.dump({**manifest, **identity, "files": shas_of(files)}))
                disk.sync(draft)
                self._add(folder, number, draft, at_once, last=at_once or not current)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, OSError):
                raise disk.storage_failed(version_folder, error) from error
            raise
        finally:
            release(lock)
        version = self.get(f"{name}@{number}")
        return version if at_once else self._serve(version, current, serve)

    def _next_number(self, folder: Path) -> int:
        """A number that no version has had."""
        last: int = read_state(folder)["last"]
        return 1 + max([last, *version_numbers(folder), *deletion.set_aside_numbers(folder)])

    def _add(self, folder: Path, number: int, draft: Path, current: bool, last: bool) -> None:
        """Turn a draft into a version, and make it the current one if `current`. last: versions.json says now that the
        number was used; else it will when the version becomes current."""

        def change(state: Json) -> None:
            state["last"] = number
            state["current"] += [number] if current else []

        if last:
            self._update(folder, change)
        publish_draft(draft, folder / str(number))

    def _remove(self, folder: Path, paths: Sequence[Path], permanently: bool) -> None:
        """Delete versions, which may have been set aside."""
        last = max(map(deletion.number_of, paths), default=0)
        if is_readable(folder) and read_state(folder)["last"] < last:  # no number is used twice
            self._update(folder, lambda state: state.update(last=last))
        for path in paths:
            deletion.remove(path) if permanently else deletion.set_aside(folder, deletion.number_of(path))

    def _bring_back(self, folder: Path, numbers: Sequence[int]) -> None:
        for number in numbers:
            deletion.bring_back(folder, number)

    def _announce(self, name: str, number: int) -> None:
        """Tell the followers of a version that is about to become current."""
        if self._followers is not None:
            self._followers.before_current(self.get(f"{name}@{number}"))

    def _announce_change(self, name: str, left: Collection[int]) -> None:
        """Tell the followers if another version becomes current when only these versions are left."""
        state = read_state(self._root / name) if is_readable(self._root / name) else {"current": []}
        history = deletion.history(state, left)
        if history and history[-1] != self._current_number(name, state):
            self._announce(name, history[-1])

    def _before_delete(self, name: str, numbers: Collection[int]) -> None:
        """Tell the followers of versions that are about to be deleted; damaged ones are served by nobody."""
        if self._followers is None or not numbers:
            return
        versions = []
        for number in numbers:
            with suppress(InvalidAdapter):
                versions.append(self.get(f"{name}@{number}"))
        self._followers.before_delete(versions)

    def _change(self, name: str, change: Callable[[Json], None]) -> None:
        """Change versions.json. What `change` raises leaves it as it was."""
        with self._locked_folder(name) as folder:
            self._update(folder, change)

    def _update(self, folder: Path, change: Callable[[Json], None]) -> None:
        """The same in a folder that is locked."""
        state = read_state(folder)
        change(state)
        disk.replace(folder / STATE, disk.dump(state))

    @contextmanager
    def _locked_folder(self, name: str) -> Iterator[Path]:
        """The folder of `name`, locked against other writers."""
        check_name(name)
        folder = self._root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            disk.sync(self._root)
            with FileLock(folder / LOCK):
                yield folder
        except OSError as error:
            raise disk.storage_failed(folder, error) from error
