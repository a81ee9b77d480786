"""Repositories of the Hugging Face hub as sources of base models.

Only files that a base needs are downloaded: safetensors, JSON, chat templates. An interrupted download is resumed, also
by another process. A commit is what is downloaded, never a branch that may move meanwhile, and every file is checked
against the checksum that the hub has of it.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fortwo.errors import InvalidRequest, SourceUnreachable, StorageFailed, UnsupportedModel
from fortwo.hub import template_files, weights
from fortwo.hub.folder_progress import report_folder_bytes
from fortwo.hub.identity import read_json
from fortwo.hub.quantised import check_quantisation
from fortwo.hub.sources import CONFIG_FILES, DirectorySource, Download
from fortwo.hub.weights import ProgressCallback

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

PREFIX = "hf:"
_SECONDS = 10  # for the first answer; downloads have no limit


@dataclass(frozen=True)
class HubFile:
    """sha256: of a large file; sha1: git's, of a small one. None where the hub does not say."""

    name: str
    size: int
    sha256: str | None
    sha1: str | None


@dataclass(frozen=True)
class HubRepository:
    """A commit of a repository, and the files of it that a base needs."""

    repo_id: str
    revision: str
    licence: str | None
    files: tuple[HubFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class HubSource:
    """A repository, and the commit or branch of it. Its cache stays beside the models, so that a download can be
    resumed. model_id: in the catalog, for hints."""

    repo_id: str
    model_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, model_id: str) -> HubSource:
        """From hf:OWNER/REPO or hf:OWNER/REPO@REVISION. Raises InvalidRequest."""
        repo_id, at, revision = text.removeprefix(PREFIX).partition("@")
        parts = repo_id.split("/")
        if len(parts) != 2 or not all(parts) or (at and not revision):
            raise InvalidRequest(
                f"{text!r} is not a repository of the Hugging Face hub",
                param="path",
                hint="Write hf:OWNER/REPO, or hf:OWNER/REPO@REVISION with a branch, tag or commit.",
            )
        return cls(repo_id, model_id, revision or None)

    @property
    def reference(self) -> str:
        """What `parse` reads."""
        return PREFIX + str(self).removeprefix("hub:")

    def __str__(self) -> str:
        return f"hub:{self.repo_id}" + (f"@{self.revision}" if self.revision else "")

    def folder(self, models: Path) -> Path:
        """Where the files of this repository are kept, a folder for each commit, below the folder of all models."""
        return models / ".hub" / f"models--{self.repo_id.replace('/', '--')}"

    def repository(self) -> HubRepository:
        """What the hub says about it. Raises SourceUnreachable, and UnsupportedModel for one without safetensors."""
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(self.repo_id, revision=self.revision, files_metadata=True, timeout=_SECONDS)
        except Exception as error:  # the exceptions depend on huggingface_hub's version
            raise self._unreachable(error) from error
        files = tuple(_wanted(info))
        if not any(file.name.endswith(".safetensors") for file in files):
            raise UnsupportedModel(
                f"{self.repo_id} has no safetensors files",
                hint="Take another repository of the model; pickled weights and GGUF files are not downloaded.",
            )
        licence = next((tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")), None)
        return HubRepository(self.repo_id, info.sha or "", licence, files)

    def populate(self, target: Path, progress: ProgressCallback) -> Download:
        found = self.repository()
        free = shutil.disk_usage(target).free
        folder = self.folder(target.parent)
        if found.bytes > free and not folder.exists():
            raise StorageFailed(
                f"{self.repo_id} takes {found.bytes:,} bytes; the disk of {target.parent} has {free:,} left",
                hint="Free some space, or set FORTWO_HOME to another disk.",
            )
        snapshot = folder / found.revision
        first = sorted(found.files, key=lambda file: file.name != "config.json")  # before anything large
        with report_folder_bytes(snapshot, "download", found.bytes, progress):
            for file in first:
                self._download(snapshot / file.name, file, found.revision)
                check_quantisation(self.repo_id, read_json(snapshot / "config.json"))
        sums = {file.name: self._verified(snapshot / file.name, file) for file in found.files}
        DirectorySource(snapshot).populate(target, progress)
        return Download(found.revision, sums)

    def _download(self, path: Path, file: HubFile, revision: str) -> None:
        """The file at `path`, from where an interrupted download left off."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if path.is_file():
            return
        disable_progress_bars()
        partial = path.with_name(f"{path.name}.incomplete")
        partial.parent.mkdir(parents=True, exist_ok=True)
        url = hf_hub_url(self.repo_id, file.name, revision=revision)
        try:
            with partial.open("ab") as out:
                http_get(url, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=file.size)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            if partial.stat().st_size > file.size:
                partial.unlink()
            raise self._unreachable(error) from error
        partial.rename(path)

    def _verified(self, path: Path, file: HubFile) -> str:
        """The file's sha256. Removes a file that is not the one that the hub has, and raises SourceUnreachable."""
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with path.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                sha256.update(chunk)
                sha1.update(chunk)
        given, expected = sha256.hexdigest(), file.sha256
        if expected is None and file.sha1 is not None:
            given, expected = sha1.hexdigest(), file.sha1
        if expected is not None and given != expected:
            path.unlink()
            raise SourceUnreachable(
                f"{file.name} of {self.repo_id} has the checksum {given}, the hub says {expected}",
                code="checksum_mismatch",
                hint=f"The file was removed. Try again: fortwo models fetch {self.model_id}",
            )
        return sha256.hexdigest()

    def _unreachable(self, error: Exception) -> SourceUnreachable:
        from huggingface_hub import errors

        where = self.repo_id if self.revision is None else f"{self.repo_id} at {self.revision}"
        elsewhere = f"Download the model elsewhere and add its folder: fortwo models add {self.model_id} PATH"
        kinds = (
            (errors.GatedRepoError, "source_gated", "is gated", "Accept its terms on the hub, and set HF_TOKEN."),
            (
                errors.RevisionNotFoundError,
                "source_not_found",
                "has no such revision; it may have been moved or deleted",
                "Add the model again with a revision that exists: fortwo models add ID hf:OWNER/REPO@REVISION",
            ),
            (
                errors.RepositoryNotFoundError,
                "source_not_found",
                "does not exist on the Hugging Face hub, or is private",
                "Check the name. For a private one, set HF_TOKEN.",
            ),
            (
                errors.OfflineModeIsEnabled,
                "source_offline",
                "cannot be downloaded: HF_HUB_OFFLINE is set",
                f"Unset HF_HUB_OFFLINE. Or: {elsewhere}",
            ),
        )
        for one in _chain(error):
            for kind, code, what, hint in kinds:
                if isinstance(one, kind):
                    return SourceUnreachable(f"{where} {what}", code=code, hint=hint)
        return SourceUnreachable(
            f"{where} cannot be downloaded from the Hugging Face hub: {error}",
            hint=f"Try again; what was downloaded is kept. {elsewhere}",
        )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _wanted(info: ModelInfo) -> Iterator[HubFile]:
    """The files that a base needs. Other safetensors than model*.safetensors hold the same weights in another form."""
    names = [file.rfilename for file in info.siblings or []]
    weights_files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    named = [name for name in weights_files if name.startswith("model")] or weights_files
    for file in info.siblings or []:
        path = PurePosixPath(file.rfilename)
        template = path.parent.name == template_files.FOLDER and path.suffix == ".jinja" and len(path.parts) == 2
        if file.rfilename in (*CONFIG_FILES, weights.SAFE_WEIGHTS_INDEX_NAME, *named) or template:
            sha256 = None if file.lfs is None else file.lfs.sha256
            yield HubFile(file.rfilename, file.size or 0, sha256, None if sha256 else file.blob_id)
