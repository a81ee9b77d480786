"""A model directory of transformers with the update in its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo.data.chat_template import plain_template
from fortwo.data.tokenizer_files import load_tokenizer
from fortwo.export.source import Source
from fortwo.hub import prepared, weights
from fortwo.hub.template_files import JINJA, choose_template
from fortwo.records import Json

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json")


def write_merged(source: Source, folder: Path, progress: Progress) -> list[str]:
    """config, tokenizer and chat template of the base, and one safetensors file: the update is added in fp32 and the
    sum rounded to the type of the base's tensor."""
    for file in source.base.directory.iterdir():
        if file.name != prepared.FILE and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS):
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    (folder / JINJA).write_text(template_of(source), "utf-8")
    _write_safetensors(folder / weights.SAFE_WEIGHTS_NAME, source, progress)
    return ["Load it with transformers.AutoModelForCausalLM.from_pretrained(folder)."]


def template_of(source: Source) -> str:
    """The chat template with which the adapter was trained."""
    directory = source.base.directory
    chosen = choose_template(directory).text
    return plain_template(load_tokenizer(directory)) if chosen is None else chosen


def _write_safetensors(path: Path, source: Source, progress: Progress) -> None:
    header: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in source.infos.items():
        end = offset + info.nbytes
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, content in _contents(source):
            file.write(content)
            done += source.infos[name].nbytes
            progress("merge", done, offset)


def _contents(source: Source) -> Iterator[tuple[str, memoryview]]:
    """Each tensor's bytes, in the type of the base's file."""
    import torch

    types: dict[str, torch.dtype] = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    for name, tensor in source.merged():
        typed: Tensor = tensor.to(types.get(source.infos[name].dtype, tensor.dtype)).contiguous()
        yield name, typed.reshape(-1).view(torch.uint8).numpy().data
