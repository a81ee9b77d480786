"""The adapter store: every published version, whole or not at all.

    <root>/<name>/<version>/adapter_config.json, adapter_model.safetensors   as PEFT reads them
                            manifest.json     where it came from, and the sha256 of the other two
    <root>/<name>/versions.json               the highest number ever given, and which versions are or were current

A version is written into a draft beside the others, synced, and renamed: the rename is the one moment at which it
begins to exist and, if it is to be, becomes current. `versions.json` may therefore name versions that do not exist
(never finished, or deleted); readers pass over them, and no number is given twice. Threads and processes that write
take turns by a lock on the name's folder; a draft is locked while its writer lives, so that the next one can tell
what a killed writer left behind. Readers need no lock.

This module does not know what tensors mean, nor the device. torch is loaded only to read or write them.
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
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest, NotFound
from fortwo.hub import weights
from fortwo.records import AdapterVersion, Json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MANIFEST = "manifest.json"

_STATE = "versions.json"
_DRAFT = ".draft-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


class AdapterStore:
    """Adapters under `root`. A ref is "name", its current version, or "name@3"."""

    def __init__(self, root: Path) -> None:
        self._root = root

    # ---------------------------------------------------------------- writing

    def publish(
        self, name: str, tensors: Mapping[str, Tensor], peft_config: Json, manifest: Json, *, current: bool
    ) -> AdapterVersion:
        """Store a new version. manifest: base_model, base_digest, dataset_digest, plan, report, parent, as known.

        Raises StorageFailed when the disk refuses; then nothing has changed.
        """
        held = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        files = {CONFIG: disk.dump(peft_config), TENSORS: b"".join(weights.parts(held))}
        return self._commit(name, files, manifest, current)

    def adopt(self, name: str, directory: Path, manifest: Json) -> AdapterVersion:
        """Make the adapter that PEFT saved in `directory` the current version of `name`, byte for byte."""
        if not directory.is_dir():
            raise InvalidAdapter(f"{directory} is not a directory", hint="Name the directory that PEFT saved.")
        pickles = [path for path in directory.glob("adapter_model.*") if path.name != TENSORS]
        if pickles and not (directory / TENSORS).exists():
            raise InvalidAdapter(
                f"{pickles[0]} is a pickle, which can run code when it is read",
                hint="Save the adapter again with PEFT: save_pretrained(..., safe_serialization=True).",
            )
        files = {file: _read(directory / file) for file in (CONFIG, TENSORS)}
        _object(files[CONFIG], directory / CONFIG)
        _tensors(files[TENSORS], directory / TENSORS)
        return self._commit(name, files, manifest, current=True)

    def rollback(self, name: str) -> AdapterVersion:
        """Go back to the version that was current before; both are kept. Returns what is current now."""
        check_name(name)
        self._known(name)
        with self._writing(name) as folder:
            state = _state(folder)
            offered = [number for number in state["current"] if (folder / str(number)).is_dir()]
            if len(offered) < 2:
                raise Conflict(
                    f"adapter {name!r} has no earlier version that was current",
                    param="adapter_name",
                    hint=f"Name a version itself: {self._refs(name)}.",
                )
            disk.replace(folder / _STATE, disk.dump({**state, "current": offered[:-1]}))
        return self.get(name)

    def delete(self, ref: str) -> None:
        """Delete one version, or with a bare name all of them. When the current version goes, the one that was
        current before it is current again."""
        name, number = _parse(ref)
        known = self._known(name, number)
        with self._writing(name) as folder:
            for version in known if number is None else [number]:
                draft = _new_draft(folder)
                os.rename(folder / str(version), draft)
                disk.sync(folder)
                shutil.rmtree(draft, ignore_errors=True)

    def _commit(self, name: str, files: dict[str, bytes], manifest: Json, current: bool) -> AdapterVersion:
        with self._writing(name) as folder:
            _sweep(folder)
            state = _state(folder)
            number = 1 + max([state["last"], *_numbers(folder)])
            offered = [*state["current"], number] if current else state["current"]
            disk.replace(folder / _STATE, disk.dump({"last": number, "current": offered}))
            draft = place = _new_draft(folder)
            owner = _lock(draft)
        shas = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        told = {**manifest, "name": name, "version": number, "created_at": time.time(), "files": shas}
        try:
            for file, content in files.items():
                disk.write(draft / file, content)
            disk.write(draft / MANIFEST, disk.dump(told))
            disk.sync(draft)
            place = draft.rename(folder / str(number))
            disk.sync(folder)
        except BaseException as error:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, OSError):
                raise disk.refused(place, error) from error
            raise
        finally:
            os.close(owner)
        return self.get(f"{name}@{number}")

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
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
            raise disk.refused(folder, error) from error

    # ---------------------------------------------------------------- reading

    def names(self) -> tuple[str, ...]:
        """Adapters that have a version, in order."""
        if not self._root.is_dir():
            return ()
        names = sorted(path.name for path in self._root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
        return tuple(name for name in names if _numbers(self._root / name))

    def versions(self, ref: str) -> tuple[AdapterVersion, ...]:
        """Whole versions, oldest first, of a name all of them; of a damaged one, `get` says what is wrong. Raises
        NotFound without any."""
        name, only = _parse(ref)
        known = self._known(name, only)
        current = self._current(name)
        found = []
        for number in known if only is None else [only]:
            with suppress(InvalidAdapter):
                found.append(self._version(name, number, current))
        return tuple(found)

    def get(self, ref: str) -> AdapterVersion:
        name, number = _parse(ref)
        self._known(name, number)
        current = self._current(name)
        if number is None:
            number = current
        if number is None:
            raise NotFound(
                f"adapter {name!r} has no current version",
                param="adapter_name",
                hint=f"No run of it succeeded yet. Name a version itself: {self._refs(name)}.",
            )
        return self._version(name, number, current)

    def read(self, ref: str) -> tuple[AdapterVersion, Json, dict[str, Tensor]]:
        """The version, PEFT's configuration and the tensors, each checked against the manifest.

        Raises InvalidAdapter naming the file that is missing, changed or foreign.
        """
        version = self.get(ref)
        directory = Path(version.path)
        for path in directory.iterdir():
            if path.name not in (CONFIG, TENSORS, MANIFEST) and not path.name.startswith("."):
                raise InvalidAdapter(
                    f"{path} is foreign: it was not published with {version.id}", hint="Move it elsewhere."
                )
        files = {}
        for file in (CONFIG, TENSORS):
            files[file] = _read(directory / file)
            if hashlib.sha256(files[file]).hexdigest() != version.manifest["files"][file]:
                raise InvalidAdapter(
                    f"{directory / file} ({len(files[file])} bytes) is not what was published: truncated or changed",
                    hint=f"Restore the file from a backup, or delete {version.id} and train again.",
                )
        return version, _object(files[CONFIG], directory / CONFIG), _tensors(files[TENSORS], directory / TENSORS)

    def _version(self, name: str, number: int, current: int | None) -> AdapterVersion:
        directory = self._root / name / str(number)
        manifest = _object(_read(directory / MANIFEST), directory / MANIFEST)
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

    def _current(self, name: str) -> int | None:
        """The newest of the versions that were made current and still exist."""
        folder = self._root / name
        offered: list[int] = _state(folder)["current"]
        return next((number for number in reversed(offered) if (folder / str(number)).is_dir()), None)

    def _refs(self, name: str) -> str:
        return ", ".join(f"{name}@{number}" for number in _numbers(self._root / name))

    def _known(self, name: str, number: int | None = None) -> list[int]:
        """The version numbers of `name`. Raises NotFound when there are none, or `number` is not among them."""
        numbers = _numbers(self._root / name)
        if not numbers:
            others = ", ".join(self.names())
            raise NotFound(
                f"adapter {name!r} does not exist",
                param="adapter_name",
                hint=f"Adapters: {others}." if others else "There is none yet: teach one, or load one that PEFT saved.",
            )
        if number is not None and number not in numbers:
            raise NotFound(
                f"adapter {name!r} has no version {number}",
                param="adapter_name",
                hint=f"Versions: {self._refs(name)}.",
            )
        return numbers


# ---------------------------------------------------------------- names


def check_name(name: str) -> None:
    """Raises InvalidRequest for what cannot be an adapter's name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"adapter_name = {name!r} is not a name",
            param="adapter_name",
            hint="Use 1 to 128 letters, digits, '.', '_' or '-'; begin with a letter or digit; no '..', '/' or '@'.",
        )


def _parse(ref: str) -> tuple[str, int | None]:
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


def _state(folder: Path) -> Json:
    """{"last": the highest number given, "current": the numbers that were offered as current, oldest first}"""
    path = folder / _STATE
    try:
        state = _object(path.read_bytes(), path)
    except FileNotFoundError:
        return {"last": 0, "current": []}
    if not isinstance(state.get("last"), int) or not isinstance(state.get("current"), list):
        raise InvalidAdapter(f"{path} lacks 'last' or 'current'", hint="Restore the file from a backup.")
    return state


# ---------------------------------------------------------------- disk


def _object(content: bytes, path: Path) -> Json:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{path} is not a JSON object", hint="Restore the file, or train the adapter again.")
    return value


def _tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise InvalidAdapter(
            f"{path} ({len(content)} bytes) is truncated or not a safetensors file: {error}",
            hint="Save the adapter again with PEFT.",
        ) from None


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
    """An open handle that holds the lock until it is closed, by us or by the end of the process."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _new_draft(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder))


def _sweep(folder: Path) -> None:
    """Remove the drafts of writers that were killed."""
    for draft in folder.glob(f"{_DRAFT}*"):
        try:
            owner = _lock(draft, wait=False)
        except (BlockingIOError, FileNotFoundError):  # its writer lives, or has just published it
            continue
        shutil.rmtree(draft, ignore_errors=True)
        os.close(owner)
