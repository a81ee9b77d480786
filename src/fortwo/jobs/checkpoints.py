"""The checkpoints of jobs on disk. They exist until their job has succeeded or was cancelled.

    <root>/<job id>/checkpoint-<step>/adapter_config.json, adapter_model.safetensors   in PEFT's format
                                      state.safetensors, state.json    everything else that resuming needs
                                      manifest.json     job, base and progress, and the sha256 of the other four

A checkpoint is written into a draft folder beside the others, synced and renamed, and is renamed again before it is
removed: readers see a complete one or none. One thread of one server writes to a job's folder, so a draft that exists
before a write was left by a killed server. A checkpoint is called `name@job-step`, with the first eight digits of the
job's id; versions are numbers, so no checkpoint has the name of a version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo import disk
from fortwo.adapters.version_files import CONFIG, MANIFEST, TENSORS
from fortwo.errors import InvalidAdapter, NotFound
from fortwo.hub import weights
from fortwo.records import Checkpoint, CheckpointVersion, Json

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

STATE = "state.json"
STATE_TENSORS = "state.safetensors"

_FOLDER = re.compile(r"checkpoint-([1-9][0-9]{0,8})")
_REF = re.compile(r"([0-9a-f]{8})-([1-9][0-9]{0,8})")


class CheckpointStore:
    """The checkpoints of all jobs under `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    # ------------------------------------------------------------ writing

    def save(
        self, job_id: str, checkpoint: Checkpoint, peft_config: Json, manifest: Json, keep: int
    ) -> tuple[CheckpointVersion, list[CheckpointVersion]]:
        """Write a checkpoint and delete all but the newest `keep` of the job. Returns it and the deleted ones.

        manifest: adapter_name, base_model, base_digest, progress and actual. Raises StorageFailed when the disk
        refuses; then nothing has changed.
        """
        files = {
            CONFIG: disk.dump(peft_config),
            TENSORS: weights.serialize(checkpoint.adapter),
            STATE_TENSORS: weights.serialize(checkpoint.tensors),
            STATE: json.dumps(checkpoint.state, allow_nan=False).encode(),
        }
        shas = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        complete = {**manifest, "job_id": job_id, "step": checkpoint.step, "created_at": time.time(), "files": shas}
        job_folder = self._root / job_id
        folder = job_folder / f"checkpoint-{checkpoint.step}"
        try:
            job_folder.mkdir(parents=True, exist_ok=True)
            _remove_drafts(job_folder)
            draft = Path(tempfile.mkdtemp(prefix=disk.DRAFT_PREFIX, dir=job_folder))
            files[MANIFEST] = disk.dump(complete)
            for file, content in files.items():
                disk.write(draft / file, content)
            disk.sync(draft)
            if folder.exists():  # it is damaged, or has the same content
                _remove(folder)
            draft.rename(folder)
            disk.sync(job_folder)
        except OSError as error:
            _remove_drafts(job_folder)
            raise disk.storage_failed(folder, error) from error
        deleted = list(self.of_job(job_id)[:-keep])
        for version in deleted:
            self.delete(version)
        return _version(folder), deleted

    def delete(self, version: CheckpointVersion) -> None:
        """Delete one checkpoint. A file that cannot be removed is only logged."""
        _remove(Path(version.path))

    def delete_job(self, job_id: str) -> list[CheckpointVersion]:
        """Delete all checkpoints of a job and return them."""
        deleted = list(self.of_job(job_id))
        if (self._root / job_id).is_dir():
            _remove(self._root / job_id)
        return deleted

    def remove_leftovers(self) -> None:
        """Remove the folders whose deletion a killed server did not finish."""
        if self._root.is_dir():
            _remove_drafts(self._root)

    # ------------------------------------------------------------ reading

    def job_ids(self) -> list[str]:
        """The ids of all jobs that have a folder here, sorted."""
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if not path.name.startswith("."))

    def of_job(self, job_id: str) -> tuple[CheckpointVersion, ...]:
        """A job's checkpoints, oldest first; those whose manifest cannot be read are left out."""
        return tuple(version for version in map(_readable, _folders(self._root / job_id)) if version is not None)

    def get(self, ref: str) -> CheckpointVersion:
        """The checkpoint named `ref`, as in name@job-step. Raises NotFound, which lists the job's other checkpoints."""
        name, _, suffix = ref.partition("@")
        match = _REF.fullmatch(suffix)
        if match is None:
            raise NotFound(
                f"there is no model {ref!r}: {suffix!r} is neither a version nor a checkpoint",
                param="model",
                hint=f"Write {name}@1 for a version, or {name}@1a2b3c4d-28 for step 28 of the job 1a2b3c4d...",
            )
        others = []
        for folder in self._root.glob(f"{match[1]}*"):
            for version in self.of_job(folder.name):
                if version.id == ref:
                    return version
                others.append(version.id)
        raise NotFound(
            f"there is no checkpoint {ref!r}",
            param="model",
            hint=f"There are: {', '.join(others)}."
            if others
            else "Checkpoints are deleted when their job is done; a job that is not done lists its checkpoints.",
        )

    def read(self, ref: str) -> tuple[CheckpointVersion, Json, dict[str, Tensor]]:
        """A checkpoint, its PEFT configuration and its adapter's tensors, like AdapterStore.read. Raises NotFound, and
        InvalidAdapter naming the file that is damaged."""
        import safetensors.torch

        version = self.get(ref)
        tensors = safetensors.torch.load(_read_checked(version, TENSORS))
        return version, json.loads(_read_checked(version, CONFIG)), tensors

    def restore(self, version: CheckpointVersion) -> Checkpoint:
        """The whole checkpoint, as it was saved. Raises InvalidAdapter naming the file that is damaged."""
        import safetensors.torch

        return Checkpoint(
            version.version,
            safetensors.torch.load(_read_checked(version, TENSORS)),
            safetensors.torch.load(_read_checked(version, STATE_TENSORS)),
            json.loads(_read_checked(version, STATE)),
        )


def _folders(job_folder: Path) -> list[Path]:
    """The folders of a job's checkpoints, in the order of their steps."""
    with suppress(FileNotFoundError, NotADirectoryError):
        steps = [(int(match[1]), path) for path in job_folder.iterdir() if (match := _FOLDER.fullmatch(path.name))]
        return [path for _, path in sorted(steps)]
    return []


def _version(folder: Path) -> CheckpointVersion:
    content = (folder / MANIFEST).read_bytes()
    manifest = json.loads(content)
    return CheckpointVersion(
        name=manifest["adapter_name"],
        version=manifest["step"],
        digest=hashlib.sha256(content).hexdigest(),  # differs from that of a published version with the same tensors
        path=str(folder),
        base_model=manifest["base_model"],
        base_digest=manifest["base_digest"],
        created_at=manifest["created_at"],
        current=False,
        manifest=manifest,
    )


def _readable(folder: Path) -> CheckpointVersion | None:
    try:
        return _version(folder)
    except FileNotFoundError:  # it has just been deleted
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The checkpoint %s is damaged and is not used: %s %s", folder, type(error).__name__, error)
        return None


def _read_checked(version: CheckpointVersion, file: str) -> bytes:
    """The content of a file whose sha256 is that of the manifest; raises InvalidAdapter for any other."""
    path = Path(version.path) / file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidAdapter(f"{path} cannot be read: {error.strerror}", param="model") from None
    if hashlib.sha256(content).hexdigest() != version.manifest["files"].get(file):
        raise InvalidAdapter(
            f"{path} ({len(content)} bytes) is not what was written: truncated or changed",
            param="model",
            hint="Resume the job: it continues from an earlier checkpoint, or starts from the beginning.",
        )
    return content


def _remove(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that no reader sees half of it."""
    try:
        trash = Path(tempfile.mkdtemp(prefix=disk.DRAFT_PREFIX, dir=folder.parent))
        shutil.rmtree(folder.rename(trash / folder.name).parent, ignore_errors=True)
    except OSError:
        log.warning("%s could not be removed.", folder, exc_info=True)


def _remove_drafts(folder: Path) -> None:
    for draft in folder.glob(f"{disk.DRAFT_PREFIX}*"):
        shutil.rmtree(draft, ignore_errors=True)
