"""Tensors of a model directory in Hugging Face's layout: their headers, bytes, shapes and digest.

Only safetensors are read, never pickle. torch is needed by `Tensors` alone; all else works on headers and bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo.errors import UnsupportedModel
from fortwo.records import Json

if TYPE_CHECKING:
    import numpy as np
    import torch

Progress = Callable[[str, int, int], None]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PIECE = 1 << 24


@dataclass(frozen=True)
class Header:
    """Where a tensor lies: `start` and `end` are byte offsets in `file`; dtype is safetensors' name (F32, BF16)."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def files(directory: Path) -> list[Path]:
    """The safetensors files of `directory`. Raises UnsupportedModel when there are none, or one is absent."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UnsupportedModel(f"{index} is not a safetensors index", hint="Download the file again.") from None
        for shard in shards:
            if not (directory / shard).is_file():
                raise UnsupportedModel(
                    f"{directory} lacks {shard}, which {INDEX} lists", hint="Download the missing file."
                )
        return [directory / shard for shard in shards]
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
    if pickled:
        raise UnsupportedModel(
            f"{directory} holds pickled weights ({pickled[0].name}), which can run code when loaded",
            hint="Save the model again with transformers' save_pretrained, which writes safetensors.",
        )
    raise UnsupportedModel(
        f"{directory} holds no {SINGLE}", hint="Name a Hugging Face model directory or a .gguf file."
    )


def headers(directory: Path) -> dict[str, Header]:
    """Every tensor's header, by name in sorted order."""
    found: dict[str, Header] = {}
    for file in files(directory):
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(min(length, size))
        try:
            table = json.loads(text)
            table.pop("__metadata__", None)
            for name, entry in table.items():
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = Header(entry["dtype"], tuple(entry["shape"]), file, start, end)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UnsupportedModel(f"{file} is not a safetensors file", hint="Download the file again.") from None
        expected = max((found[name].end for name in table), default=8 + length)
        if size != expected:
            raise UnsupportedModel(
                f"{file} has {size} bytes, its header promises {expected}", hint="Download the file again."
            )
    return dict(sorted(found.items()))


_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Tensors(Mapping[str, "torch.Tensor"]):
    """All tensors by name. One is read when it is asked for, each time anew, and belongs to who asks: nothing is kept
    here, and nothing is mapped into memory."""

    def __init__(self, table: Mapping[str, Header]) -> None:
        self._table = table

    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises UnsupportedModel for a type of number that is not read."""
        import torch

        header = self._table[name]
        if header.dtype not in _TYPES:
            raise UnsupportedModel(
                f"tensor {name!r} is of type {header.dtype}, which is not supported",
                hint="Save the model again in bf16 or fp32.",
            )
        raw = torch.empty(header.end - header.start, dtype=torch.uint8)
        with header.file.open("rb") as stream:
            stream.seek(header.start)
            stream.readinto(raw.numpy().data)
        return raw.view(getattr(torch, _TYPES[header.dtype])).view(header.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def read(directory: Path) -> Tensors:
    return Tensors(headers(directory))


def parameters(table: dict[str, Header]) -> int:
    return sum(math.prod(header.shape) for header in table.values())


def digest(directory: Path, progress: Progress) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes) of all tensors: the same for any path and any shards."""
    table = headers(directory)
    total = sum(header.end - header.start for header in table.values())
    whole, done = hashlib.sha256(), 0
    for name, header in table.items():
        whole.update(json.dumps([name, header.dtype, header.shape]).encode())
        with header.file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for start in range(header.start, header.end, _PIECE):
                piece = mapped[start : min(start + _PIECE, header.end)]
                whole.update(piece)
                done += len(piece)
                progress("checksum", done, total)
    return whole.hexdigest()


def write(path: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write fp32 tensors one by one, so that a model larger than memory can be converted.

    shapes: every tensor in the order in which `tensors` yields them.
    """
    table: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    with path.open("wb") as stream:
        stream.write(_begun(table))
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (given, tensor.shape, tensor.dtype.name) == (name, shape, "float32")
            stream.write(tensor.data)
        stream.flush()
        os.fsync(stream.fileno())


def parts(tensors: Mapping[str, torch.Tensor]) -> list[bytes | memoryview]:
    """The file of these CPU tensors, piece by piece: its header, then the memory of each, which is not copied."""
    import torch

    names = {getattr(torch, kind): name for name, kind in _TYPES.items()}
    table: Json = {"__metadata__": {"format": "pt"}}
    memory: list[bytes | memoryview] = []
    offset = 0
    for name, tensor in tensors.items():
        memory.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        end = offset + tensor.nbytes
        table[name] = {"dtype": names[tensor.dtype], "shape": tuple(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return [_begun(table), *memory]


def _begun(table: Json) -> bytes:
    """A file up to its first tensor."""
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
