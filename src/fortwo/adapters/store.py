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
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo import disk
from fortwo.adapters.peft_files import CONFIG, TENSORS, PeftFiles, parse_tensors
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest, NotFound
from fortwo.hub import weights
from fortwo.records import AdapterVersion, Json

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"

_STATE = "versions.json"
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


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
        dataset_digest, plan, report and parent. Raises StorageFailed when the disk refuses; then nothing has changed.
        """
        on_cpu = {key: tensor.cpu() for key, tensor in tensors.items()}
        files = {CONFIG: disk.dump(peft_config), TENSORS: weights.serialize(on_cpu)}
        return self._commit(name, files, manifest, current)

    def import_peft(self, name: str, adapter: PeftFiles, manifest: Json) -> AdapterVersion:
        """Store an adapter that PEFT saved as a new version and make it current."""
        return self._commit(name, adapter.files, manifest, current=True)

    def rollback(self, name: str) -> AdapterVersion:
        """Make the version current that was current before, and return it; no version is deleted. Raises NotFound for
        an unknown name and Conflict when no earlier version was current."""
        check_name(name)
        self._existing_numbers(name)
        with self._locked_folder(name) as folder:
            state = _read_state(folder)
            history = [number for number in state["current"] if (folder / str(number)).is_dir()]
            if len(history) < 2:
                raise Conflict(
                    f"adapter {name!r} has no earlier version that was current",
                    param="adapter_name",
                    hint=f"Use the name of a version: {self._version_refs(name)}.",
                )
            disk.replace(folder / _STATE, disk.dump({**state, "current": history[:-1]}))
        return self.get(name)

    def delete(self, ref: str) -> None:
        """Delete one version, or all versions when `ref` is a bare name. When the current version is deleted, the one
        that was current before becomes current again. Raises NotFound."""
        name, number = _parse_ref(ref)
        existing = self._existing_numbers(name, number)
        with self._locked_folder(name) as folder:
            for version in existing if number is None else [number]:
                draft = _new_draft(folder)
                os.rename(folder / str(version), draft)
                disk.sync(folder)
                shutil.rmtree(draft, ignore_errors=True)

    def _commit(self, name: str, files: dict[str, bytes], manifest: Json, current: bool) -> AdapterVersion:
        with self._locked_folder(name) as folder:
            _remove_abandoned_drafts(folder)
            state = _read_state(folder)
            number = 1 + max([state["last"], *_numbers(folder)])
            history = [*state["current"], number] if current else state["current"]
            disk.replace(folder / _STATE, disk.dump({"last": number, "current": history}))
            draft = version_folder = _new_draft(folder)
            lock = _lock(draft)
        shas = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        complete = {**manifest, "name": name, "version": number, "created_at": time.time(), "files": shas}
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
        return tuple(name for name in names if _numbers(self._root / name))

    def versions(self, ref: str) -> tuple[AdapterVersion, ...]:
        """The versions that `ref` means, oldest first: a bare name means all. Damaged versions are left out; `get` says
        what is wrong with them. Raises NotFound when there is no version."""
        name, only = _parse_ref(ref)
        existing = self._existing_numbers(name, only)
        current = self._current_number(name)
        versions = []
        for number in existing if only is None else [only]:
            with suppress(InvalidAdapter):
                versions.append(self._version(name, number, current))
        return tuple(versions)

    def get(self, ref: str) -> AdapterVersion:
        """One version. Raises NotFound, and InvalidAdapter when its manifest is damaged."""
        name, number = _parse_ref(ref)
        self._existing_numbers(name, number)
        current = self._current_number(name)
        if number is None:
            number = current
        if number is None:
            raise NotFound(
                f"adapter {name!r} has no current version",
                param="adapter_name",
                hint=f"No training of it has succeeded yet. Use the name of a version: {self._version_refs(name)}.",
            )
        return self._version(name, number, current)

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
            files[file] = _read(directory / file)
            if hashlib.sha256(files[file]).hexdigest() != version.manifest["files"][file]:
                raise InvalidAdapter(
                    f"{directory / file} ({len(files[file])} bytes) is not what was published: truncated or changed",
                    hint=f"Restore the file from a backup, or delete {version.id} and train again.",
                )
        config = _parse_object(files[CONFIG], directory / CONFIG)
        return version, config, parse_tensors(files[TENSORS], directory / TENSORS)

    def _version(self, name: str, number: int, current: int | None) -> AdapterVersion:
        directory = self._root / name / str(number)
        manifest = _parse_object(_read(directory / MANIFEST), directory / MANIFEST)
        try:
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
            raise InvalidAdapter(
                f"{directory / MANIFEST} is not a manifest: {error}", hint="Restore the file, or delete the version."
            ) from None

    def _current_number(self, name: str) -> int | None:
        """The version that was made current last, among those that still exist."""
        folder = self._root / name
        history: list[int] = _read_state(folder)["current"]
        return next((number for number in reversed(history) if (folder / str(number)).is_dir()), None)

    def _version_refs(self, name: str) -> str:
        return ", ".join(f"{name}@{number}" for number in _numbers(self._root / name))

    def _existing_numbers(self, name: str, number: int | None = None) -> list[int]:
        """The version numbers of `name`. Raises NotFound when there are none, or when `number` is not among them."""
        numbers = _numbers(self._root / name)
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
    if at and not _NUMBER.fullmatch(number):
        raise InvalidRequest(
            f"adapter_name = {ref!r}: {number!r} is not a version",
            param="adapter_name",
            hint=f"Write {name} for the current version, or {name}@1.",
        )
    return name, int(number) if at else None


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _NUMBER.fullmatch(path.name))


def _read_state(folder: Path) -> Json:
    """versions.json. last: the highest number ever used; current: the numbers that were made current, oldest first."""
    path = folder / _STATE
    try:
        state = _parse_object(path.read_bytes(), path)
    except FileNotFoundError:
        return {"last": 0, "current": []}
    if not isinstance(state.get("last"), int) or not isinstance(state.get("current"), list):
        raise InvalidAdapter(f"{path} lacks 'last' or 'current'", hint="Restore the file from a backup.")
    return state


# ---------------------------------------------------------------- disk


def _parse_object(content: bytes, path: Path) -> Json:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{path} is not a JSON object", hint="Restore the file, or train the adapter again.")
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InvalidAdapter(f"{path} is missing", hint="Restore the file, or train the adapter again.") from None
    except OSError as error:
        raise InvalidAdapter(
            f"{path} cannot be read: {error.strerror}", hint="Make it readable for the server."
        ) from None


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
