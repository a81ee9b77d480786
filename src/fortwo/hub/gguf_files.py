"""The files of a GGUF model: opened, with all parts of one that is split, and refused if a tensor cannot be read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fortwo.errors import UnsupportedModel

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_ANOTHER = "Take another quantisation of the model: Q4_K_M, Q8_0, F16 or BF16, for example."


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def parts_of(file: Path) -> list[Path]:
    """All parts of the model that `file` is a part of, in order; a file that is not split alone. Raises
    UnsupportedModel naming the parts that are missing."""
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match["count"])
    names = [f"{match['name']}-{number:05}-of-{count:05}{match['suffix']}" for number in range(1, count + 1)]
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing or not names:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UnsupportedModel(
            f"{file} is a part of a model of {count} files; {file.parent} lacks {shown}",
            hint="Download all parts into this folder.",
        )
    return [file.parent / name for name in names]


def open_part(file: Path) -> GGUFReader:
    """The opened file. Raises UnsupportedModel for one that is missing or damaged, and for tensors of a type that
    cannot be dequantised, named with their type."""
    from gguf import GGMLQuantizationType, GGUFReader

    known = {int(kind): kind.name for kind in GGMLQuantizationType}
    kinds: dict[str, int] = {}

    class Reader(GGUFReader):  # type: ignore[misc]
        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            for one in fields:
                kinds[one.name] = int(one.parts[4][0])
            if known.keys() >= set(kinds.values()):
                super()._build_tensors(start_offs, fields)

    try:
        reader = Reader(file)
    except FileNotFoundError:
        raise UnsupportedModel(f"{file} does not exist", hint="Remove the model and add it again.") from None
    except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise UnsupportedModel(
            f"{file} ({_size(file)} bytes) is not a readable GGUF file: {error}", hint="Download it again."
        ) from None
    by_kind = defaultdict[int, list[str]](list)
    for name, kind in kinds.items():
        by_kind[kind].append(name)
    wrong = [
        (kind, names) for kind, names in sorted(by_kind.items()) if kind not in known or not _can_be_dequantised(kind)
    ]
    if wrong:
        each = [f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0] for _, names in wrong]
        types = [f"{known.get(kind, f'the unknown number {kind}')}" for kind, _ in wrong]
        found = "; ".join(f"{tensors} of type {type}" for tensors, type in zip(each, types, strict=True))
        raise UnsupportedModel(f"{file} has tensors of types that cannot be dequantised: {found}", hint=_ANOTHER)
    return reader


def check(reader: GGUFReader, file: Path, parts: Sequence[Path]) -> None:
    """Raises UnsupportedModel when the file is no model, or a part that was renamed."""
    kind = field(reader, "general.type")
    if kind not in (None, "model"):
        hint = "Name the model that it belongs to."
        if kind == "adapter":
            hint = "Add its base model instead. Adapters are loaded in PEFT's format (POST /v1/load_lora_adapter)."
        raise UnsupportedModel(f"{file} holds no model, its general.type is {kind!r}", hint=hint)
    count = field(reader, "split.count") or 1
    if count != len(parts):
        raise UnsupportedModel(
            f"{file} is one of {count} parts of a model, but its name does not say so",
            hint=f"Give the parts their names again, from NAME-00001-of-{count:05}.gguf on, in one folder.",
        )


def all_tensors(readers: Sequence[GGUFReader], parts: Sequence[Path]) -> dict[str, ReaderTensor]:
    """The tensors of all parts. Raises UnsupportedModel when parts of different models were put together."""
    found: dict[str, ReaderTensor] = {}
    for reader, part in zip(readers, parts, strict=True):
        for tensor in reader.tensors:
            if tensor.name in found:
                raise UnsupportedModel(
                    f"{part} has the tensor {tensor.name}, which another part has too", hint="Download all parts again."
                )
            found[tensor.name] = tensor
    expected = field(readers[0], "split.tensors.count")
    if expected is not None and expected != len(found):
        raise UnsupportedModel(
            f"{parts[0]} and its other parts have {len(found)} tensors; the model has {expected}",
            hint="Download all parts again.",
        )
    return found


def field(reader: GGUFReader, name: str) -> Any:
    """The value of a key of the metadata; None if it is not there."""
    found = reader.get_field(name)
    return None if found is None else found.contents()


def _can_be_dequantised(kind: int) -> bool:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    type: GGMLQuantizationType = GGMLQuantizationType(kind)
    _, size = GGML_QUANT_SIZES[type]
    try:
        dequantize(np.zeros((1, size), np.uint8), type)
    except NotImplementedError:
        return False
    return True


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
