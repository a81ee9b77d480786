"""Repositories of the Hugging Face hub as sources of base models.

Only files that a base needs are downloaded: safetensors, JSON, chat templates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fortwo.errors import InvalidRequest, UnsupportedModel
from fortwo.hub import template_files, weights
from fortwo.hub.folder_progress import report_folder_bytes
from fortwo.hub.identity import read_json
from fortwo.hub.quantised import check_quantisation
from fortwo.hub.repository import HubFile, Repository, check_space, licence_of
from fortwo.hub.sources import CONFIG_FILES, DirectorySource, Download
from fortwo.hub.weights import ProgressCallback

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

PREFIX = "hf:"


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

    @property
    def _repository(self) -> Repository:
        return Repository(
            self.repo_id,
            self.revision,
            "model",
            again=f"Try again: fortwo models fetch {self.model_id}",
            revised="Add the model again with a revision that exists: fortwo models add ID hf:OWNER/REPO@REVISION",
            elsewhere=f"Download the model elsewhere and add its folder: fortwo models add {self.model_id} PATH",
        )

    def folder(self, models: Path) -> Path:
        """Where the files of this repository are kept, a folder for each commit, below the folder of all models."""
        return models / ".hub" / f"models--{self.repo_id.replace('/', '--')}"

    def repository(self) -> HubRepository:
        """What the hub says about it. Raises SourceUnreachable, and UnsupportedModel for one without safetensors."""
        info = self._repository.model_info()
        files = tuple(_wanted(info))
        if not any(file.name.endswith(".safetensors") for file in files):
            raise UnsupportedModel(
                f"{self.repo_id} has no safetensors files",
                hint="Take another repository of the model; pickled weights and GGUF files are not downloaded.",
            )
        return HubRepository(self.repo_id, info.sha or "", licence_of(info), files)

    def populate(self, target: Path, progress: ProgressCallback) -> Download:
        found = self.repository()
        folder = self.folder(target.parent)
        if not folder.exists():
            check_space(self.repo_id, found.bytes, target.parent)
        snapshot = folder / found.revision
        first = sorted(found.files, key=lambda file: file.name != "config.json")  # before anything large
        with report_folder_bytes(snapshot, "download", found.bytes, progress):
            for file in first:
                self._repository.download(snapshot / file.name, file, found.revision)
                check_quantisation(self.repo_id, read_json(snapshot / "config.json"))
        sums = {file.name: self._repository.verified(snapshot / file.name, file) for file in found.files}
        DirectorySource(snapshot).populate(target, progress)
        return Download(found.revision, sums)


def _wanted(info: ModelInfo) -> Iterator[HubFile]:
    """The files that a base needs. Other safetensors than model*.safetensors hold the same weights in another form."""
    names = [file.rfilename for file in info.siblings or []]
    weights_files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    named = [name for name in weights_files if name.startswith("model")] or weights_files
    for file in info.siblings or []:
        path = PurePosixPath(file.rfilename)
        template = path.parent.name == template_files.FOLDER and path.suffix == ".jinja" and len(path.parts) == 2
        if file.rfilename in (*CONFIG_FILES, weights.SAFE_WEIGHTS_INDEX_NAME, *named) or template:
            yield HubFile.of(file)
