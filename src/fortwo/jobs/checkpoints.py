"""Checkpoints on disk, until their job is done.

    <root>/<job id>/checkpoint-<step>/adapter_config.json, adapter_model.safetensors   as PEFT reads them
                                      state.safetensors, state.json    what else it takes to go on
                                      manifest.json     whose it is, and the sha256 of the other four

A checkpoint is written into a draft beside the others, synced and renamed: a reader sees a whole one or none. What is
to go is renamed first. Only one server, and in it one thread, writes to a job's folder; so a draft that is there
before a write was left behind by a killed one. A checkpoint is called `name@job-step`, with the first eight digits of
the job's id; versions are numbers, so the two never meet. Knows no tensors' meaning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo import disk
from fortwo.adapters.store import CONFIG, MANIFEST, TENSORS
from fortwo.errors import InvalidAdapter, NotFound
from fortwo.hub import weights
from fortwo.records import Checkpoint, CheckpointVersion, Json

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

STATE = "state.json"
STATE_TENSORS = "state.safetensors"

_DRAFT = ".draft-"
_PLACE = re.compile(r"checkpoint-([1-9][0-9]{0,8})")
_REF = re.compile(r"([0-9a-f]{8})-([1-9][0-9]{0,8})")


class CheckpointStore:
    """The checkpoints of all jobs under `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    # ------------------------------------------------------------ writing

    def save(
        self, job_id: str, checkpoint: Checkpoint, peft_config: Json, manifest: Json, keep: int
    ) -> tuple[CheckpointVersion, list[CheckpointVersion]]:
        """Keep a checkpoint, and of the job's others the newest, `keep` in all. Returns it and those that went.

        manifest: adapter_name, base_model, base_digest. Raises StorageFailed when the disk refuses; then nothing has
        changed.
        """
        files: dict[str, list[bytes | memoryview]] = {
            CONFIG: [disk.dump(peft_config)],
            TENSORS: weights.parts(checkpoint.adapter),
            STATE_TENSORS: weights.parts(checkpoint.tensors),
            STATE: [json.dumps(checkpoint.state, allow_nan=False).encode()],
        }
        shas = {file: _sha(content) for file, content in files.items()}
        told = {**manifest, "job_id": job_id, "step": checkpoint.step, "created_at": time.time(), "files": shas}
        folder = self._root / job_id
        place = folder / f"checkpoint-{checkpoint.step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder))
            files[MANIFEST] = [disk.dump(told)]
            for file, content in files.items():
                disk.write(draft / file, *content)
            disk.sync(draft)
            if place.exists():  # damaged, or the same
                _discard(place)
            draft.rename(place)
            disk.sync(folder)
        except OSError as error:
            _sweep(folder)
            raise disk.refused(place, error) from error
        gone = list(self.of(job_id)[:-keep])
        for version in gone:
            self.drop(version)
        return _version(place), gone

    def drop(self, version: CheckpointVersion) -> None:
        """It is of no use any more."""
        _discard(Path(version.path))

    def remove(self, job_id: str) -> list[CheckpointVersion]:
        """The job is done. Returns what went."""
        gone = list(self.of(job_id))
        if (self._root / job_id).is_dir():
            _discard(self._root / job_id)
        return gone

    def sweep(self) -> None:
        """Remove what a killed server was about to remove."""
        if self._root.is_dir():
            _sweep(self._root)

    # ------------------------------------------------------------ reading

    def jobs(self) -> list[str]:
        """Jobs that have a folder here."""
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if not path.name.startswith("."))

    def of(self, job_id: str) -> tuple[CheckpointVersion, ...]:
        """A job's checkpoints, oldest first; one whose manifest cannot be read is passed over."""
        return tuple(version for version in map(_readable, _places(self._root / job_id)) if version is not None)

    def get(self, ref: str) -> CheckpointVersion:
        """The checkpoint that is called `ref`, name@job-step. Raises NotFound naming the job's others."""
        name, _, at = ref.partition("@")
        found = _REF.fullmatch(at)
        if found is None:
            raise NotFound(
                f"no model {ref!r}: {at!r} is neither a version nor a checkpoint",
                param="model",
                hint=f"Write {name}@1 for a version, {name}@1a2b3c4d-28 for step 28 of the job 1a2b3c4d...",
            )
        others = []
        for folder in self._root.glob(f"{found[1]}*"):
            for version in self.of(folder.name):
                if version.id == ref:
                    return version
                others.append(version.id)
        raise NotFound(
            f"no checkpoint {ref!r}",
            param="model",
            hint=f"There are: {', '.join(others)}."
            if others
            else "Checkpoints go when their job is done; a job that runs lists its own.",
        )

    def read(self, ref: str) -> tuple[CheckpointVersion, Json, dict[str, Tensor]]:
        """As the store of adapters reads a version. Raises InvalidAdapter naming the file that is damaged."""
        import safetensors.torch

        version = self.get(ref)
        return version, json.loads(_content(version, CONFIG)), safetensors.torch.load(_content(version, TENSORS))

    def restore(self, version: CheckpointVersion) -> Checkpoint:
        """All of it, as it was saved. Raises InvalidAdapter naming the file that is damaged."""
        import safetensors.torch

        return Checkpoint(
            version.version,
            safetensors.torch.load(_content(version, TENSORS)),
            safetensors.torch.load(_content(version, STATE_TENSORS)),
            json.loads(_content(version, STATE)),
        )


def _sha(parts: Iterable[bytes | memoryview]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def _places(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError, NotADirectoryError):
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := _PLACE.fullmatch(path.name))]
        return [path for _, path in sorted(found)]
    return []


def _version(place: Path) -> CheckpointVersion:
    content = (place / MANIFEST).read_bytes()
    manifest = json.loads(content)
    return CheckpointVersion(
        name=manifest["adapter_name"],
        version=manifest["step"],
        digest=hashlib.sha256(content).hexdigest(),  # of its own: a version with the same tensors outlives it
        path=str(place),
        base_model=manifest["base_model"],
        base_digest=manifest["base_digest"],
        created_at=manifest["created_at"],
        current=False,
        manifest=manifest,
    )


def _readable(place: Path) -> CheckpointVersion | None:
    try:
        return _version(place)
    except FileNotFoundError:  # it has just gone
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s is damaged", place, exc_info=True)
        return None


def _content(version: CheckpointVersion, file: str) -> bytes:
    """A file of a checkpoint, as it was written."""
    path = Path(version.path) / file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidAdapter(f"{path} cannot be read: {error.strerror}", param="model") from None
    if hashlib.sha256(content).hexdigest() != version.manifest["files"].get(file):
        raise InvalidAdapter(
            f"{path} ({len(content)} bytes) is not what was written: truncated or changed",
            param="model",
            hint="The job can go on from an earlier checkpoint, or from the beginning.",
        )
    return content


def _discard(place: Path) -> None:
    """Gone at once for every reader, whatever happens to the files."""
    try:
        doomed = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=place.parent))
        shutil.rmtree(place.rename(doomed / place.name).parent, ignore_errors=True)
    except OSError:
        log.warning("%s could not be removed", place, exc_info=True)


def _sweep(folder: Path) -> None:
    for draft in folder.glob(f"{_DRAFT}*"):
        shutil.rmtree(draft, ignore_errors=True)
