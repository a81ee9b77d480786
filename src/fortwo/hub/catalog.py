"""The base models that exist, and the directory in which each of them is prepared.

Owns home/models: catalog.json (the models that the user added) and one folder for each model, which has Hugging Face's
layout and a base.json. A folder appears complete or not at all. Importing this module does not import torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from fortwo import disk
from fortwo.errors import Conflict, FortwoError, InvalidRequest, NotFound, StorageFailed
from fortwo.hub import prepared
from fortwo.hub.bundled import BUNDLED
from fortwo.hub.gguf_files import is_gguf
from fortwo.hub.huggingface import PREFIX, HubSource
from fortwo.hub.identity import read_json
from fortwo.hub.prepared import ModelInfo
from fortwo.hub.sources import DirectorySource, Source, local_source
from fortwo.hub.weights import ProgressCallback
from fortwo.records import Json


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be prepared. origin is "user" when the user gave the path that it comes from."""

    id: str
    source: str
    description: str
    origin: Literal["catalog", "user"]
    licence: str | None = None


_BUNDLED = BUNDLED
_ADDED = TypeAdapter(dict[str, str])  # catalog.json: for each id the path that the user gave, or hf:OWNER/REPO@COMMIT


class Catalog:
    """The base models whose prepared files are under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = self._folder / "catalog.json"

    def entries(self) -> list[ModelEntry]:
        """All models, the bundled ones first."""
        return [self.get(id) for id in self._ids()]

    def get(self, id: str) -> ModelEntry:
        """The model with this id. Raises NotFound, which lists the existing ids."""
        source = str(self._source(id))
        if (bundled := _BUNDLED.get(id)) is None:
            return ModelEntry(id, source, "added by the user", "user")
        origin: Literal["catalog", "user"] = "user" if id in self._added() else "catalog"
        return ModelEntry(id, source, bundled.description, origin, bundled.licence)

    def missing_sources(self) -> dict[str, str]:
        """The paths that the user gave and that do not exist, by model."""
        added = self._added().items()
        return {id: path for id, path in added if not path.startswith(PREFIX) and not Path(path).exists()}

    def config(self, id: str) -> Json:
        """The model's config.json, or its dimensions under the names of one, as far as they are known before it is
        prepared; an empty object otherwise. Raises NotFound."""
        source = self._source(id)
        folders = [self._folder / id, *([source.path] if isinstance(source, DirectorySource) else [])]
        found = next((config for folder in folders if (config := read_json(folder / "config.json"))), {})
        return found if found or id not in _BUNDLED else _BUNDLED[id].config

    def add(self, id: str, path: Path | HubSource) -> ModelEntry:
        """Make `path`, a model directory in Hugging Face's layout, a .gguf file or a repository, the source of `id`.

        A bundled model may be given a path too, which replaces its download. Nothing is read before `prepare`. Raises
        InvalidRequest for an id or a path that is not allowed, and Conflict when the id has another path already.
        """
        if not disk.NAME.fullmatch(id):
            raise InvalidRequest(
                f"model id {id!r} is not allowed",
                param="id",
                hint="Use up to 128 letters, digits, '.', '_' and '-', a letter or digit first, no '..'.",
            )
        given = path.reference if isinstance(path, HubSource) else _checked(path)
        with self._lock("catalog"):
            added = self._added()
            if added.get(id, given) != given:
                raise Conflict(
                    f"model {id!r} is already {added[id]}", param="id", hint=f"First run: fortwo models remove {id}"
                )
            self._save({**added, id: given})
        return self.get(id)

    def remove(self, id: str) -> None:
        """Remove a model that the user added, and what was prepared from it; the user's own files stay. Of a bundled
        model only what was downloaded is removed. Raises what `check_removable` raises."""
        with self._lock("catalog"):
            self.check_removable(id)
            source = self._source(id)
            self._save({other: path for other, path in self._added().items() if other != id})
        with self._lock(id):
            shutil.rmtree(self._folder / id, ignore_errors=True)
            if isinstance(source, HubSource):
                shutil.rmtree(source.folder(self._folder), ignore_errors=True)

    def check_removable(self, id: str) -> None:
        """Raises NotFound for an unknown id, and Conflict for a bundled model that nothing was prepared of."""
        self.get(id)
        if id not in self._added() and not (self._folder / id).exists():
            raise Conflict(
                f"model {id!r} is part of the catalog and not on disk",
                param="id",
                hint="There is nothing to remove. Only models that were added leave the catalog.",
            )

    def model_info(self, id: str) -> ModelInfo | None:
        """The prepared model, or None when it must be prepared first, also because its base.json is damaged. Raises
        NotFound for an unknown id."""
        with suppress(StorageFailed):
            return self._read(id)
        return None

    def damage(self, id: str) -> FortwoError | None:
        """What is wrong with the prepared model, if base.json is damaged; `prepare` makes it anew."""
        try:
            self._read(id)
        except StorageFailed as error:
            return error
        return None

    def prepare(self, id: str, progress: ProgressCallback | None = None) -> Path:
        """Download, verify and convert the model unless it is prepared already; return its directory.

        progress(label, done, total) is called now and then. When two processes prepare the same model, one of them
        waits for the other. Raises NotFound, SourceUnreachable, UnsupportedModel or StorageFailed.
        """
        report = progress if progress is not None else lambda label, done, total: None
        source = self._source(id)
        if info := self.model_info(id):
            return info.directory
        target, partial = self._folder / id, self._folder / f".{id}.partial"
        with self._lock(id):
            if info := self.model_info(id):
                return info.directory
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                download = source.populate(partial, report)
                prepared.describe(partial, id, str(source), report, download)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
            except OSError as error:
                raise StorageFailed(
                    f"preparing model {id!r} in {target} failed: {error}",
                    hint="Free some space, or set FORTWO_HOME to another disk. Incomplete files were removed.",
                ) from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return target

    def _read(self, id: str) -> ModelInfo | None:
        return prepared.read(self._folder / id, id, str(self._source(id)))

    def _ids(self) -> list[str]:
        return [*_BUNDLED, *sorted(self._added().keys() - _BUNDLED.keys())]

    def _source(self, id: str) -> Source:
        added = self._added()
        if id in added:
            given = added[id]
            return HubSource.parse(given, id) if given.startswith(PREFIX) else local_source(Path(given))
        if id in _BUNDLED:
            return _BUNDLED[id].source
        raise NotFound(
            f"there is no model {id!r}",
            param="model",
            hint=f"There are: {', '.join(self._ids())}. To add one, run: fortwo models add ID PATH",
        )

    def _added(self) -> dict[str, str]:
        try:
            added = _ADDED.validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise StorageFailed(f"{self._file} is damaged: {reason}", hint="Repair or delete the file.") from None
        if wrong := [id for id in added if not disk.NAME.fullmatch(id)]:
            raise StorageFailed(
                f"{self._file} has the id {wrong[0]!r}, which is not allowed", hint="Delete this line of the file."
            )
        return added

    def _save(self, added: dict[str, str]) -> None:
        try:
            disk.replace(self._file, disk.dump(dict(sorted(added.items()))))
        except OSError as error:
            raise disk.storage_failed(self._file, error) from error

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold the lock `name` between threads and processes; the system releases it when its holder dies."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageFailed(f"{self._folder} cannot be created: {error}", hint="Change FORTWO_HOME.") from error
        with FileLock(self._folder / f".{name}.lock"):
            yield


def _checked(path: Path) -> str:
    """The absolute path. Raises InvalidRequest for what is neither a directory nor a .gguf file."""
    path = path.expanduser().absolute()
    if not (path.is_dir() or (path.is_file() and is_gguf(path))):
        raise InvalidRequest(
            f"{path} is neither a directory nor a .gguf file" if path.exists() else f"{path} does not exist",
            param="path",
            hint="Name a Hugging Face model directory (config.json, safetensors, tokenizer.json), a .gguf file, or a "
            "repository of the hub as hf:OWNER/REPO.",
        )
    return str(path)
