"""A prepared model: its directory, and base.json, the last file that is written into it.

base.json says what was prepared from which source. Importing this module does not import torch.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from fortwo import disk
from fortwo.errors import StorageFailed, UnsupportedModel
from fortwo.hub import weights
from fortwo.hub.identity import identity
from fortwo.hub.sources import Download
from fortwo.hub.weights import ProgressCallback
from fortwo.records import Json

FILE = "base.json"


@dataclass(frozen=True)
class ModelInfo:
    """A prepared model. digest: of everything that changes its replies (identity.identity); weights_digest: of the
    tensors alone (weights.digest), which is what adapters of earlier versions name; bytes: the size of the weights on
    disk; revision: the commit of a repository of the hub."""

    id: str
    digest: str
    weights_digest: str
    directory: Path
    bytes: int
    parameters: int
    architecture: str
    source: str
    revision: str | None


class _Stored(BaseModel):
    """base.json. Earlier versions wrote the digest of the weights as `digest`, and no weights_digest."""

    digest: str
    weights_digest: str | None = None
    source: str
    parameters: int
    architecture: str
    bytes: int
    linked: Json
    revision: str | None = None


def read(directory: Path, id: str, source: str) -> ModelInfo | None:
    """The model prepared in `directory` from `source`; None when there is none, or when the source or a linked file
    has changed since. Raises StorageFailed when base.json is damaged."""
    file = directory / FILE
    try:
        stored = _Stored.model_validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise StorageFailed(
            f"{file} is damaged: {reason}",
            param="model",
            hint=f"Prepare the model again: fortwo models fetch {id}",
            code="model_damaged",
        ) from None
    if stored.source != source or stored.linked != linked(directory):
        return None
    if stored.weights_digest is None:
        stored = _upgraded(directory, stored)
    return ModelInfo(
        id=id,
        digest=stored.digest,
        weights_digest=stored.weights_digest or stored.digest,
        directory=directory,
        bytes=stored.bytes,
        parameters=stored.parameters,
        architecture=stored.architecture,
        source=stored.source,
        revision=stored.revision,
    )


def describe(directory: Path, id: str, source: str, progress: ProgressCallback, download: Download | None) -> None:
    """Write base.json. download: of a repository. Raises UnsupportedModel for tensors or a config.json that cannot be
    read."""
    tensors = weights.tensor_infos(directory)
    try:
        architecture = json.loads((directory / "config.json").read_text("utf-8-sig"))["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        architecture = None
    if not isinstance(architecture, str):
        raise UnsupportedModel(
            f"the config.json of model {id!r} is not a JSON object that names its architectures",
            hint="Save the model again with transformers' save_pretrained.",
        )
    digest = weights.digest(directory, progress)
    base = {
        "id": id,
        "digest": identity(directory, digest),
        "weights_digest": digest,
        "source": source,
        "revision": None if download is None else download.revision,
        "files": {} if download is None else download.files,
        "parameters": weights.parameter_count(tensors),
        "architecture": architecture,
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "linked": linked(directory),
    }
    disk.write(directory / FILE, disk.dump(base))


def linked(directory: Path) -> Json:
    """Size and modification time of every linked file: when one changes, the digests are out of date."""
    state: Json = {}
    for file in sorted(directory.rglob("*")):
        if file.is_symlink():
            stat = file.stat() if file.exists() else None
            state[str(file.relative_to(directory))] = [stat.st_size, stat.st_mtime_ns] if stat else None
    return state


def _upgraded(directory: Path, stored: _Stored) -> _Stored:
    """base.json of an earlier version with both digests; the tensors are not read again."""
    digests = {"digest": identity(directory, stored.digest), "weights_digest": stored.digest}
    file = directory / FILE
    with suppress(OSError):  # a disk that cannot be written to: it is computed again next time
        disk.replace(file, disk.dump({**json.loads(file.read_bytes()), **digests}))
    return stored.model_copy(update=digests)
