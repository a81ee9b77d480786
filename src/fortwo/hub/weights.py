"""Tensors of a model directory in Hugging Face's layout: names, shapes, bytes and digest.

Only safetensors files are read, never pickles. torch is imported by the functions that need it, not with this module.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from fortwo.errors import UnsupportedModel
from fortwo.records import Json

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fortwo.quantization.blocks import Read

ProgressCallback = Callable[[str, int, int], None]  # label, amount done, total amount

SAFE_WEIGHTS_NAME = "model.safetensors"
BLOCKS_NAME = "model.blocks"  # the weights once more, as a quantised file has them; others load every *.safetensors
OLDER_BLOCKS_NAME = "blocks.safetensors"
SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
_CHUNK_BYTES = 1 << 24
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about a tensor. dtype is safetensors' name for it, such as F32 or BF16."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)


def safetensors_files(directory: Path) -> list[Path]:
    """The safetensors files of `directory`. Raises UnsupportedModel when there are none or when one is missing."""
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        return [directory / SAFE_WEIGHTS_NAME]
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            shards = [directory / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            names = shards = []
        if not names or any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise UnsupportedModel(f"{index} is not a safetensors index", hint="Download the file again.") from None
        for shard in shards:
            if not shard.is_file():
                raise UnsupportedModel(
                    f"{directory} lacks {shard.relative_to(directory)}, which {index.name} lists",
                    hint="Download the missing file.",
                )
        return shards
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
    if pickled:
        raise UnsupportedModel(
            f"{directory} holds pickled weights ({pickled[0].name}), which can run code when they are loaded",
            hint="Save the model again with transformers' save_pretrained, which writes safetensors.",
        )
    raise UnsupportedModel(
        f"{directory} holds no {SAFE_WEIGHTS_NAME}", hint="Name a Hugging Face model directory or a .gguf file."
    )


@contextmanager
def _open(file: Path, framework: Literal["numpy", "pt"]) -> Iterator[Any]:
    """The file, mapped into memory while it is open. Raises UnsupportedModel when the file is damaged."""
    try:
        with safe_open(file, framework) as opened:
            yield opened
    except SafetensorError as error:
        is_pointer = _begins_with(file, b"version https://git-lfs")
        raise UnsupportedModel(
            f"{file} ({file.stat().st_size} bytes) is truncated or not a safetensors file: {error}",
            hint="It is a pointer of Git LFS. Run: git lfs pull" if is_pointer else "Download the file again.",
        ) from None


def _begins_with(file: Path, text: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(text)) == text


def tensor_infos(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of the directory, by name in sorted order; only the headers of the files are read.

    Raises UnsupportedModel for a file that is damaged and for a dtype that is not supported.
    """
    infos: dict[str, TensorInfo] = {}
    for file in safetensors_files(directory):
        with _open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
                tensor = opened.get_slice(name)
                infos[name] = TensorInfo(tensor.get_dtype(), tuple(tensor.get_shape()), file)
                if infos[name].dtype not in _ITEM_BYTES:
                    raise UnsupportedModel(
                        f"tensor {name!r} in {file} is of type {infos[name].dtype}, which is not supported",
                        hint="Save the model again in bf16 or fp32.",
                    )
    return dict(sorted(infos.items()))


def check_weights(infos: Mapping[str, TensorInfo]) -> None:
    """Raises UnsupportedModel for weights that are whole numbers: they stand for other numbers, by a rule that is not
    in the file."""
    if wrong := [name for name, info in infos.items() if name.endswith(".weight") and info.dtype in _WHOLE_NUMBERS]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        info = infos[wrong[0]]
        raise UnsupportedModel(
            f"tensor {wrong[0]!r}{more} in {info.file} is of type {info.dtype}: the weights are quantised already",
            hint="Add the model that is not quantised, in bf16 or fp32. fortwo quantises it itself (FORTWO_WEIGHTS).",
        )


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """All tensors by name. Each access reads the tensor anew and returns a copy that the caller owns; no file stays
    open or mapped into memory."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = infos

    def __getitem__(self, name: str) -> torch.Tensor:
        with _open(self._infos[name].file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor.clone()

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def open_tensors(directory: Path) -> LazyTensors:
    """The tensors of the directory. Raises UnsupportedModel as tensor_infos does."""
    return LazyTensors(tensor_infos(directory))


def parameter_count(infos: Mapping[str, TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in infos.values())


def digest(directory: Path, progress: ProgressCallback) -> str:
    """sha256 over (name, dtype, shape, bytes) of all tensors in sorted order: independent of paths and of shards."""
    import torch

    infos = tensor_infos(directory)
    total = sum(info.nbytes for info in infos.values())
    sha256, done = hashlib.sha256(), 0
    for name, info in infos.items():
        sha256.update(json.dumps([name, info.dtype, info.shape]).encode())
        with _open(info.file, "pt") as opened:
            content = memoryview(opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(content), _CHUNK_BYTES):
                chunk = content[start : start + _CHUNK_BYTES]
                sha256.update(chunk)
                done += len(chunk)
                progress("checksum", done, total)
    return sha256.hexdigest()


def write_fp32(path: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a safetensors file of fp32 tensors one by one. The library would need all of them in memory at once.

    shapes: the shape of every tensor, in the order in which `tensors` yields them.
    """
    _write(path, "F32", shapes, tensors, {})


def write_blocks(directory: Path, types: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> None:
    """Write the tensors of a quantised file as it has them, beside the weights. types: ggml's type of each; tensors:
    bytes (outputs, bytes of one)."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    _write(directory / BLOCKS_NAME, "U8", shapes, tensors.items(), {"types": json.dumps(dict(types))})


def block_types(directory: Path) -> dict[str, str]:
    """ggml's type of each tensor that `write_blocks` has written; none for a directory without. Raises UnsupportedModel
    when the file is damaged."""
    if not (file := _blocks_file(directory)).is_file():
        return {}
    with _open(file, "numpy") as opened:
        types: dict[str, str] = json.loads(opened.metadata()["types"])
    return types


def block_bytes(directory: Path) -> int:
    """Bytes of what `write_blocks` has written; 0 for a directory without."""
    file = _blocks_file(directory)
    return file.stat().st_size if file.is_file() else 0


def _blocks_file(directory: Path) -> Path:
    """Where the blocks lie. Earlier versions gave the file another name, by which vLLM loads it too; it is renamed
    where the directory may be written."""
    file, older = directory / BLOCKS_NAME, directory / OLDER_BLOCKS_NAME
    if not file.exists() and older.is_file():
        with suppress(OSError):
            older.replace(file)
    return file if file.exists() else older


class QuantisedTensors(Mapping[str, "Read"]):
    """All tensors of a directory by name: those that `write_blocks` has written as blocks, the others as LazyTensors
    has them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._types, self._others = block_types(directory), open_tensors(directory)

    def __getitem__(self, name: str) -> Read:
        from fortwo.quantization.blocks import Blocks

        if name not in self._types:
            return self._others[name]
        with _open(_blocks_file(self._directory), "pt") as opened:
            return Blocks(((self._types[name], opened.get_tensor(name).clone()),))

    def __contains__(self, name: object) -> bool:
        return name in self._others

    def __iter__(self) -> Iterator[str]:
        return iter(self._others)

    def __len__(self) -> int:
        return len(self._others)


def _write(
    path: Path,
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    header: Json = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (given, tensor.shape, tensor.itemsize) == (name, shape, _ITEM_BYTES[dtype])
            stream.write(tensor.data)
        stream.flush()
        os.fsync(stream.fileno())


def serialize(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The content of a safetensors file with these CPU tensors."""
    import safetensors.torch

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, {"format": "pt"})
