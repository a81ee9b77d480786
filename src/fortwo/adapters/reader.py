"""Reads published versions. What makes a version exist is described in `store`. Readers need no lock."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo import disk
from fortwo.adapters import deletion
from fortwo.adapters.refs import check_name, parse_ref
from fortwo.adapters.version_files import (
    CONFIG,
    MANIFEST,
    TENSORS,
    check_manifest,
    is_readable,
    parse_object,
    parse_tensors,
    read_file,
    read_state,
    version_numbers,
)
from fortwo.errors import InvalidAdapter, InvalidRequest, NotFound
from fortwo.records import AdapterVersion, Json

if TYPE_CHECKING:
    from torch import Tensor


Damage = tuple[int | None, InvalidAdapter]
"""The number of the version, or None for versions.json, and the error with its remedy."""


class AdapterReader:
    """The adapters under `root`. A ref is "name", which means its current version, "name@3", or "name@tag"."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> tuple[str, ...]:
        """The names of all adapters that have a version, sorted."""
        return tuple(name for name in self._folders() if version_numbers(self._root / name))

    def has(self, name: str) -> bool:
        """Whether an adapter of this name has a version; any text may be asked for."""
        return disk.NAME.fullmatch(name) is not None and bool(version_numbers(self._root / name))

    def deleted(self) -> list[Json]:
        """The versions that can be restored, each as {name, version, deleted_at}."""
        return [
            {"name": name, "version": number, "deleted_at": deletion.deleted_at(self._root / name, number)}
            for name in self._folders()
            for number in deletion.set_aside_numbers(self._root / name)
        ]

    def _folders(self) -> list[str]:
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if disk.NAME.fullmatch(path.name) and path.is_dir())

    def versions(self, ref: str) -> tuple[AdapterVersion, ...]:
        """The versions that `ref` means, oldest first: a bare name means all. Damaged versions are left out; `get` and
        `inspect` say what is wrong with them. If versions.json is damaged, none of them is the current one. Raises
        NotFound when there is no version."""
        name, only = self._resolve(ref)
        existing = self._existing_numbers(name, only)
        return self._inspect(name, existing if only is None else [only])[0]

    def inspect(self, name: str) -> tuple[tuple[AdapterVersion, ...], list[Damage]]:
        """All versions of an adapter as `versions` has them, and what is wrong with the files that describe it. Each
        file is read once, and tensors are not read."""
        return self._inspect(name, version_numbers(self._root / name))

    def _inspect(self, name: str, numbers: Sequence[int]) -> tuple[tuple[AdapterVersion, ...], list[Damage]]:
        state: Json | None = None
        found: list[Damage] = []
        try:
            state = read_state(self._root / name)
        except InvalidAdapter as error:
            found.append((None, error))
        current = self._current_number(name, state)
        versions = []
        for number in numbers:
            try:
                versions.append(self._version(name, number, state, current))
            except InvalidAdapter as error:
                found.append((number, error))
        return tuple(versions), found

    def check_publishable(self, name: str) -> None:
        """Raises InvalidAdapter when no version of `name` could be published, because versions.json is damaged."""
        check_name(name)
        read_state(self._root / name)

    def get(self, ref: str) -> AdapterVersion:
        """One version. Raises NotFound, and InvalidAdapter when its manifest is damaged, or when a bare name cannot be
        resolved because versions.json is damaged."""
        name, number = self._resolve(ref)
        self._existing_numbers(name, number)
        readable = number is None or is_readable(self._root / name)
        state = read_state(self._root / name) if readable else None
        current = self._current_number(name, state)
        if number is None:
            number = current
        if number is None:
            raise NotFound(
                f"adapter {name!r} has no current version",
                param="adapter_name",
                hint=f"No training of it has succeeded yet. Use the name of a version: {self._version_refs(name)}.",
            )
        return self._version(name, number, state, current)

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

    def _version(self, name: str, number: int, state: Json | None, current: int | None) -> AdapterVersion:
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
                tags=tuple(tag for tag, of in sorted(state["tags"].items()) if of == number) if state else (),
                protected=state is not None and number in state["protected"],
            )
        except (KeyError, TypeError) as error:
            raise InvalidAdapter(f"{directory / MANIFEST} is not a manifest: {error}", hint=hint) from None

    def _current_number(self, name: str, state: Json | None) -> int | None:
        """The version that was made current last, among those that still exist."""
        history = [] if state is None else deletion.history(state, version_numbers(self._root / name))
        return history[-1] if history else None

    def _resolve(self, ref: str) -> tuple[str, int | None]:
        """Name and number of a ref, whose tag is looked up. Raises NotFound for an unknown tag."""
        name, wanted = parse_ref(ref)
        if not isinstance(wanted, str):
            return name, wanted
        self._existing_numbers(name)
        tags = read_state(self._root / name)["tags"]
        if wanted not in tags:
            raise self._no_tag(name, wanted, tags)
        return name, tags[wanted]

    def _named_version(self, ref: str) -> AdapterVersion:
        if "@" not in ref:
            raise InvalidRequest(
                f"adapter_name = {ref!r} does not say which version",
                param="adapter_name",
                hint=f"Write {ref}@1, for example.",
            )
        return self.get(ref)

    def _no_tag(self, name: str, tag: str, tags: Mapping[str, int]) -> NotFound:
        known = f"Tags: {', '.join(tags)}. " if tags else ""
        return NotFound(
            f"adapter {name!r} has no tag {tag!r}",
            param="adapter_name",
            hint=f"{known}Versions: {self._version_refs(name)}.",
        )

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
