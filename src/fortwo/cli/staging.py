"""Puts an adapter's files where the server may read them, for as long as it imports them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fortwo.adapters.peft_files import refuse_pickles
from fortwo.adapters.version_files import CONFIG, MANIFEST, TENSORS
from fortwo.errors import FortwoError, InvalidRequest, StorageFailed
from fortwo.hub.adapter_repositories import download_adapter
from fortwo.hub.huggingface import PREFIX
from fortwo.hub.weights import ProgressCallback
from fortwo.settings import Settings


def name_of(source: str) -> str:
    """What an adapter is called if nothing else is said: as its folder, or as its repository of the hub."""
    if source.startswith(PREFIX):
        return source.partition("@")[0].rpartition("/")[2]
    return _folder(source).name


@contextmanager
def staged(source: str, settings: Settings, progress: ProgressCallback) -> Iterator[Path]:
    """A copy of an adapter, with links followed, in a folder that every server of this home may read. source: the
    folder of the adapter, one of its files, or hf:OWNER/REPO.

    Errors within name the source instead of the copy. Raises InvalidRequest when there is no adapter, InvalidAdapter
    for a pickle, SourceUnreachable for a repository, and StorageFailed when the copy cannot be written.
    """
    data = settings.home / "data"
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="import-", dir=data) as temporary:
        copy = Path(temporary).resolve()
        shown = source if source.startswith(PREFIX) else str(_folder(source))
        try:
            if source.startswith(PREFIX):
                download_adapter(source, copy, progress)
            else:
                _copy(_folder(source), copy, progress)
            yield copy
        except FortwoError as error:
            error.message = error.message.replace(str(copy), shown)
            error.hint = None if error.hint is None else error.hint.replace(str(copy), shown)
            raise
        except OSError as error:
            raise StorageFailed(
                f"{shown} cannot be copied to {data}: {error.strerror}",
                hint="Make its files readable, free some space, or set FORTWO_HOME to another disk.",
            ) from None


def _folder(source: str) -> Path:
    path = Path(source).resolve()
    return path.parent if path.is_file() else path


def _copy(folder: Path, copy: Path, progress: ProgressCallback) -> None:
    if not (folder / CONFIG).is_file():
        raise InvalidRequest(
            f"{folder} has no {CONFIG}, so it is not an adapter that PEFT saved."
            if folder.is_dir()
            else f"{folder} does not exist.",
            param="path",
            hint="Name the directory that PEFT's save_pretrained wrote, or hf:OWNER/REPO.",
        )
    refuse_pickles(folder)
    files = [folder / name for name in (CONFIG, TENSORS, MANIFEST) if (folder / name).is_file()]
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        with file.open("rb") as given, (copy / file.name).open("xb") as written:
            while part := given.read(1 << 20):
                written.write(part)
                done += len(part)
                progress("copy", done, total)
