"""Downloads from repositories of the Hugging Face hub, of models and of datasets.

An interrupted download is resumed, also by another process. A commit is what is downloaded, never a branch that may
move meanwhile, and every file is checked against the checksum that the hub has of it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from fortwo.errors import SourceUnreachable, StorageFailed

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoSibling

T = TypeVar("T")

TIMEOUT_SECONDS = 10  # for the first answer; downloads have no limit
SPARE_BYTES = 64 << 20  # that stay free on the disk, where the server's database is, too


@dataclass(frozen=True)
class HubFile:
    """sha256: of a large file; sha1: git's, of a small one. None where the hub does not say."""

    name: str
    size: int
    sha256: str | None
    sha1: str | None

    @classmethod
    def of(cls, sibling: RepoSibling) -> HubFile:
        sha256 = None if sibling.lfs is None else sibling.lfs.sha256
        return cls(sibling.rfilename, sibling.size or 0, sha256, None if sha256 else sibling.blob_id)


@dataclass(frozen=True)
class Repository:
    """A repository at a branch, tag or commit; None for its main branch. again, revised, elsewhere: what the user can
    do when a download failed, with another revision, and without the hub, for hints."""

    repo_id: str
    revision: str | None
    kind: Literal["model", "dataset"]
    again: str
    revised: str
    elsewhere: str

    def model_info(self) -> ModelInfo:
        """What the hub says about a model. Raises SourceUnreachable."""
        from huggingface_hub import HfApi

        return self._asked(
            lambda: HfApi().model_info(
                self.repo_id, revision=self.revision, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
        )

    def dataset_info(self) -> DatasetInfo:
        """What the hub says about a dataset. Raises SourceUnreachable."""
        from huggingface_hub import HfApi

        return self._asked(
            lambda: HfApi().dataset_info(
                self.repo_id, revision=self.revision, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
        )

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except Exception as error:  # the exceptions depend on huggingface_hub's version
            raise self.unreachable(error) from error

    def download(self, path: Path, file: HubFile, revision: str, check: Callable[[], None] = lambda: None) -> None:
        """The file at `path`, from where an interrupted download left off. check: called now and then; it may raise to
        give up. Raises SourceUnreachable, and OSError for a disk that is full."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if path.is_file():
            return
        disable_progress_bars()
        partial = path.with_name(f"{path.name}.incomplete")
        partial.parent.mkdir(parents=True, exist_ok=True)
        url = hf_hub_url(self.repo_id, file.name, revision=revision, repo_type=self.kind)
        try:
            with _CheckedFile(partial, check) as out:
                http_get(url, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=file.size)
        except Exception as error:
            check()
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            if partial.stat().st_size > file.size:
                partial.unlink()
            raise self.unreachable(error) from error
        partial.rename(path)

    def verified(self, path: Path, file: HubFile) -> str:
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
                hint=f"The file was removed. {self.again}",
            )
        return sha256.hexdigest()

    def unreachable(self, error: Exception) -> SourceUnreachable:
        """The error to raise when the hub refused or did not answer."""
        from huggingface_hub import errors

        where = self.repo_id if self.revision is None else f"{self.repo_id} at {self.revision}"
        kinds = (
            (errors.GatedRepoError, "source_gated", "is gated", "Accept its terms on the hub, and set HF_TOKEN."),
            (
                errors.RevisionNotFoundError,
                "source_not_found",
                "has no such revision; it may have been moved or deleted",
                self.revised,
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
                f"Unset HF_HUB_OFFLINE. Or: {self.elsewhere}",
            ),
        )
        for one in _chain(error):
            for kind, code, what, hint in kinds:
                if isinstance(one, kind):
                    return SourceUnreachable(f"{where} {what}", code=code, hint=hint)
        return SourceUnreachable(
            f"{where} cannot be downloaded from the Hugging Face hub: {error}",
            hint=f"Try again; what was downloaded is kept. {self.elsewhere}",
        )


def check_space(what: str, need: int, folder: Path) -> None:
    """Raises StorageFailed where the disk of an existing folder has no room for `need` bytes of `what`."""
    free = shutil.disk_usage(folder).free
    if need + SPARE_BYTES > free:
        raise StorageFailed(
            f"{what} takes {need:,} bytes; the disk of {folder} has {free:,} left, of which {SPARE_BYTES:,} stay free",
            hint="Free some space, or set FORTWO_HOME to another disk.",
        )


def licence_of(info: ModelInfo | DatasetInfo) -> str | None:
    """The licence that the repository's card names."""
    return next((tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")), None)


class _CheckedFile(io.BufferedWriter):
    """A file to which is appended, with a call of `check` before each part."""

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        super().__init__(path.open("ab", buffering=0))
        self._check = check

    def write(self, part: object) -> int:
        self._check()
        return super().write(part)  # type: ignore[arg-type]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
