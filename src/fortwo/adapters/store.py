"""The adapter store: all published versions, each of which is complete or absent.

    <root>/<name>/<version>/adapter_config.json, adapter_model.safetensors   in PEFT's format
                            manifest.json     where the version came from, and the sha256 of the other two files
    <root>/<name>/versions.json               the highest number ever used, and which versions are or were current

A version is written into a draft folder beside the others, synced, and renamed. The rename makes it exist and, where
that is wanted, makes it current. `versions.json` may therefore name versions that do not exist, because they were never
finished or were deleted; readers skip them, and no number is used twice. Writers, threads and processes alike, lock the
name's folder. A draft stays locked while its writer lives, so that the next writer can recognise and remove the drafts
of killed ones. Readers need no lock.

This module does not know what the tensors mean. torch is imported only to read or write them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo import disk
from fortwo.adapters.peft_files import PeftFiles
from fortwo.adapters.version_files import (
    CONFIG,
    MANIFEST,
    NUMBER,
    STATE,
    TENSORS,
    check_manifest,
    is_readable,
    parse_object,
    parse_tensors,
    read_file,
    read_state,
    shas_of,
    version_numbers,
)
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest, NotFound
from fortwo.hub import weights
from fortwo.records import AdapterVersion, Json

if TYPE_CHECKING:
    from torch import Tensor


class AdapterStore:
    """The adapters under `root`. A ref is "name", which means its current version, or "name@3"."""

    def __init__(self, root: Path) -> None:
        self._root = root

    # ---------------------------------------------------------------- writing

    def publish(
        self, name: str, tensors: Mapping[str, Tensor], peft_config: Json, manifest: Json, *, current: bool
    ) -> AdapterVersion:
        """Store a new version, and make it the current one if `current`.

        tensors, peft_config: under PEFT's names. manifest: base_model, base_digest, and where they are known
        job_id, dataset_digest, plan, report and parent. A job that publishes the same files again gets the version that
        it already has. Raises StorageFailed when the disk refuses; then nothing has changed.
        """
        on_cpu = {key: tensor.cpu() for key, tensor in tensors.items()}
        files = {CONFIG: disk.dump(peft_config), TENSORS: weights.serialize(on_cpu)}
        job_id = manifest.get("job_id")
        earlier = None if job_id is None else self.published_by(name, job_id)
        if earlier is not None and earlier.manifest["files"] == shas_of(files):
            return self._make_current(earlier) if current and not earlier.current else earlier
        return self._commit(name, files, manifest, current)

    def _make_current(self, version: AdapterVersion) -> AdapterVersion:
        with self._locked_folder(version.name) as folder:
            state = read_state(folder)
            disk.replace(folder / STATE, disk.dump({**state, "current": [*state["current"], version.version]}))
        return self.get(version.id)

    def import_peft(self, name: str, adapter: PeftFiles, manifest: Json) -> AdapterVersion:
        """Store an adapter that PEFT saved as a new version and make it current."""
        return self._commit(name, adapter.files, manifest, current=True)

    def rollback(self, name: str) -> AdapterVersion:
        """Make the version current that was current before, and return it; no version is deleted. Raises NotFound for
        an unknown name and Conflict when no earlier version was current."""
        check_name(name)
        self._existing_numbers(name)
        with self._locked_folder(name) as folder:
            state = read_state(folder)
            history = [number for number in state["current"] if (folder / str(number)).is_dir()]
            if len(history) < 2:
                raise Conflict(
                    f"adapter {name!r} has no earlier version that was current",
                    param="adapter_name",
                    hint=f"Use the name of a version: {self._version_refs(name)}.",
                )
            disk.replace(folder / STATE, disk.dump({**state, "current": history[:-1]}))
        return self.get(name)

    def delete(self, ref: str) -> None:
        """Delete one version, or all versions when `ref` is a bare name. When the current version is deleted, the one
        that was current before becomes current again. Raises NotFound."""
        name, number = _parse_ref(ref)
        existing = self._existing_numbers(name, number)
        with self._locked_folder(name) as folder:
            if number is None and not is_readable(folder):  # nothing is left that it could describe
                disk.replace(folder / STATE, disk.dump({"last": max(existing), "current": []}))
            for version in existing if number is None else [number]:
                draft = _new_draft(folder)
                os.rename(folder / str(version), draft)
                disk.sync(folder)
                shutil.rmtree(draft, ignore_errors=True)

    def _commit(self, name: str, files: dict[str, bytes], manifest: Json, current: bool) -> AdapterVersion:
        with self._locked_folder(name) as folder:
            _remove_abandoned_drafts(folder)
            state = read_state(folder)
            number = 1 + max([state["last"], *version_numbers(folder)])
            history = [*state["current"], number] if current else state["current"]
            disk.replace(folder / STATE, disk.dump({"last": number, "current": history}))
            draft = version_folder = _new_draft(folder)
            lock = _lock(draft)
        identity = {"name": name, "version": number, "created_at": time.time(), "made_current": current}
        complete = {**manifest, **identity, "files": shas_of(files)}
        try:
            for file, content in files.items():
                disk.write(draft / file, content)
            disk.write(draft / MANIFEST, disk.dump(complete))
            disk.sync(draft)
            version_folder = draft.rename(folder / str(number))
            disk.sync(folder)
        except BaseException as error:
            shutil.rmtree(version_folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise disk.storage_failed(version_folder, error) from error
            raise
        finally:
            os.close(lock)
        return self.get(f"{name}@{number}")

    @contextmanager
    def _locked_folder(self, name: str) -> Iterator[Path]:
        """The folder of `name`, locked against other writers."""
        check_name(name)
        folder = self._root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            disk.sync(self._root)
            lock = _lock(folder)
            try:
                yield folder
            finally:
                os.close(lock)
        except OSError as error:
            raise disk.storage_failed(folder, error) from error

    # ---------------------------------------------------------------- reading

    def names(self) -> tuple[str, ...]:
        """The names of all adapters that have a version, sorted."""
        if not self._root.is_dir():
            return ()
        names = sorted(path.name for path in self._root.iterdir() if disk.NAME.fullmatch(path.name) and path.is_dir())
        return tuple(name for name in names if version_numbers(self._root / name))

    def versions(self, ref: str) -> tuple[AdapterVersion, ...]:
        """The versions that `ref` means, oldest first: a bare name means all. Damaged versions are left out; `get` and
        `damage` say what is wrong with them. If versions.json is damaged, none of them is the current one. Raises
        NotFound when there is no version."""
        name, only = _parse_ref(ref)
        existing = self._existing_numbers(name, only)
        current = self._current_number(name) if is_readable(self._root / name) else None
        versions = []
        for number in existing if only is None else [only]:
            with suppress(InvalidAdapter):
                versions.append(self._version(name, number, current))
        return tuple(versions)

    def damage(self, name: str) -> list[tuple[int | None, InvalidAdapter]]:
        """What is wrong with the files that describe an adapter's versions: the number of the version, or None for
        versions.json, and the error with its remedy. Tensors are not read."""
        found: list[tuple[int | None, InvalidAdapter]] = []
        try:
            read_state(self._root / name)
        except InvalidAdapter as error:
            found.append((None, error))
        for number in version_numbers(self._root / name):
            try:
                self._version(name, number, None)
            except InvalidAdapter as error:
                found.append((number, error))
        return found

    def check_publishable(self, name: str) -> None:
        """Raises InvalidAdapter when no version of `name` could be published, because versions.json is damaged."""
        check_name(name)
        read_state(self._root / name)

    def get(self, ref: str) -> AdapterVersion:
        """One version. Raises NotFound, and InvalidAdapter when its manifest is damaged, or when a bare name cannot be
        resolved because versions.json is damaged."""
        name, number = _parse_ref(ref)
        self._existing_numbers(name, number)
        readable = number is None or is_readable(self._root / name)
        current = self._current_number(name) if readable else None
        if number is None:
            number = current
        if number is None:
            raise NotFound(
                f"adapter {name!r} has no current version",
                param="adapter_name",
                hint=f"No training of it has succeeded yet. Use the name of a version: {self._version_refs(name)}.",
            )
        return self._version(name, number, current)

    def published_by(self, name: str, job_id: str) -> AdapterVersion | None:
        """The newest version of `name` that this job published; None if there is none."""
        numbers = version_numbers(self._root / name) if disk.NAME.fullmatch(name) else []
        for number in reversed(numbers):
            with suppress(InvalidAdapter, NotFound):
                version = self.get(f"{name}@{number}")
                if version.manifest.get("job_id") == job_id:
                    return version
        return None

    def read(self, ref: str) -> tuple[AdapterVersion, Json, dict[str, Tensor]]:
        """A version, its PEFT configuration and its tensors, with the files checked against the manifest.

        Raises NotFound, and InvalidAdapter naming the file that is missing, changed or unexpected.
        """
        version = self.get(ref)
        directory = Path(version.path)
        for path in directory.iterdir():
            if path.name not in (CONFIG, TENSORS, MANIFEST) and not path.name.startswith("."):
                raise InvalidAdapter(
                    f"{path} does not belong to {version.id}, which was published without it", hint="Move it elsewhere."
                )
        files = {}
        for file in (CONFIG, TENSORS):
            files[file] = read_file(directory / file)
            if hashlib.sha256(files[file]).hexdigest() != version.manifest["files"][file]:
                raise InvalidAdapter(
                    f"{directory / file} ({len(files[file])} bytes) is not what was published: truncated or changed",
                    hint=f"Restore the file from a backup, or delete {version.id} and train again.",
                )
        config = parse_object(files[CONFIG], directory / CONFIG)
        return version, config, parse_tensors(files[TENSORS], directory / TENSORS)

    def _version(self, name: str, number: int, current: int | None) -> AdapterVersion:
        directory = self._root / name / str(number)
        hint = f"Restore the file from a backup, or delete {name}@{number}."
        manifest = parse_object(read_file(directory / MANIFEST), directory / MANIFEST, hint)
        try:
            check_manifest(manifest)
            shas = "".join(f"{file} {manifest['files'][file]}\n" for file in (CONFIG, TENSORS))
            return AdapterVersion(
                name=name,
                version=number,
                digest=hashlib.sha256(shas.encode()).hexdigest(),
                path=str(directory),
                base_model=manifest["base_model"],
                base_digest=manifest["base_digest"],
                created_at=manifest["created_at"],
                current=number == current,
                manifest=manifest,
            )
        except (KeyError, TypeError) as error:
            raise InvalidAdapter(f"{directory / MANIFEST} is not a manifest: {error}", hint=hint) from None

    def _current_number(self, name: str) -> int | None:
        """The version that was made current last, among those that still exist."""
        folder = self._root / name
        history: list[int] = read_state(folder)["current"]
        return next((number for number in reversed(history) if (folder / str(number)).is_dir()), None)

    def _version_refs(self, name: str) -> str:
        return ", ".join(f"{name}@{number}" for number in version_numbers(self._root / name))

    def _existing_numbers(self, name: str, number: int | None = None) -> list[int]:
        """The version numbers of `name`. Raises NotFound when there are none, or when `number` is not among them."""
        numbers = version_numbers(self._root / name)
        if not numbers:
            others = ", ".join(self.names())
            raise NotFound(
                f"adapter {name!r} does not exist",
                param="adapter_name",
                hint=f"Adapters: {others}." if others else "There is none yet: train one, or load one that PEFT saved.",
            )
        if number is not None and number not in numbers:
            raise NotFound(
                f"adapter {name!r} has no version {number}",
                param="adapter_name",
                hint=f"Versions: {self._version_refs(name)}.",
            )
        return numbers


# ---------------------------------------------------------------- names


def check_name(name: str) -> None:
    """Raises InvalidRequest when an adapter cannot have this name."""
    if not disk.NAME.fullmatch(name):
        raise InvalidRequest(
            f"adapter_name = {name!r} is not allowed",
            param="adapter_name",
            hint="Use 1 to 128 letters, digits, '.', '_' or '-'; begin with a letter or digit; no '..', '/' or '@'.",
        )


def _parse_ref(ref: str) -> tuple[str, int | None]:
    name, at, number = ref.partition("@")
    check_name(name)
    if at and not NUMBER.fullmatch(number):
        raise InvalidRequest(
            f"adapter_name = {ref!r}: {number!r} is not a version",
            param="adapter_name",
            hint=f"Write {name} for the current version, or {name}@1.",
        )
    return name, int(number) if at else None


def _lock(directory: Path, *, wait: bool = True) -> int:
    """An open handle that holds the directory's lock until it is closed, at the latest when the process ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _new_draft(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=disk.DRAFT_PREFIX, dir=folder))


def _remove_abandoned_drafts(folder: Path) -> None:
    """Remove the drafts of writers that were killed."""
    for draft in folder.glob(f"{disk.DRAFT_PREFIX}*"):
        try:
            lock = _lock(draft, wait=False)
        except (BlockingIOError, FileNotFoundError):  # its writer is alive, or has just published it
            continue
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)
