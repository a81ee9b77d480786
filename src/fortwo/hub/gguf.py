"""Converts a GGUF file into a Hugging Face model directory: config, fp32 weights, tokenizer, chat template,
and beside them the quantised weights as the file has them.

What llama.cpp stores how is in `gguf_networks`; where the file came from is not known here.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo.errors import UnsupportedModel
from fortwo.hub import gguf_files, gguf_networks, weights
from fortwo.hub.weights import ProgressCallback
from fortwo.records import Json

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor


def convert(file: Path, target: Path, progress: ProgressCallback) -> None:
    """Write the model in `file` into the directory `target`; transformers converts the tokenizer. Raises
    UnsupportedModel for a file that is damaged, incomplete or of an architecture that is not supported."""
    import numpy as np

    parts = gguf_files.parts_of(file)
    readers = [gguf_files.open_part(part) for part in parts]
    reader, file = readers[0], parts[0]
    gguf_files.check(reader, file, parts)
    tensors = gguf_files.all_tensors(readers, parts)
    architecture = gguf_files.field(reader, "general.architecture")
    gguf_networks.refuse_architecture(architecture, file)
    config = gguf_networks.model_config(functools.partial(gguf_files.field, reader), tensors, file)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    (target / "generation_config.json").write_text(json.dumps(_generation_config(reader), indent=2))
    named = {
        gguf_networks.hf_name(name, architecture, config["num_hidden_layers"], file): tensor
        for name, tensor in tensors.items()
    }
    tensors = {name: tensor for name, tensor in named.items() if name is not None}
    # ggml lists the innermost dimension first.
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    shapes = dict(sorted((shapes | gguf_networks.added_tensors(config, shapes)).items()))
    values = _dequantized(tensors, shapes, architecture, config, progress)
    weights.write_fp32(target / weights.SAFE_WEIGHTS_NAME, shapes, values)
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items() if _held_as_blocks(tensor)}
    if types:
        blocks = {
            name: np.ascontiguousarray(gguf_networks.as_transformers(tensors[name].data, name, architecture, config))
            for name in types
        }
        weights.write_blocks(target, types, blocks)
    progress("tokenizer", 0, 1)
    _convert_tokenizer(file, target)
    progress("tokenizer", 1, 1)


def _held_as_blocks(tensor: ReaderTensor) -> bool:
    from fortwo.quantization.blocks import TYPES

    return len(tensor.shape) == 2 and tensor.tensor_type.name in TYPES


def _generation_config(reader: GGUFReader) -> Json:
    """Every token that ends a reply: end of sequence, and end of turn and of message where the file has them."""
    ids = [gguf_files.field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {"eos_token_id": sorted({token for token in ids if token is not None})}


def _dequantized(
    tensors: dict[str, ReaderTensor],
    shapes: dict[str, tuple[int, ...]],
    architecture: str,
    config: Json,
    progress: ProgressCallback,
) -> Iterator[tuple[str, np.ndarray]]:
    """In the order of `shapes`; zeros for what is not in the file."""
    import numpy as np
    from gguf import dequantize

    total, done = sum(int(tensor.n_elements) for tensor in tensors.values()), 0
    for name, shape in shapes.items():
        if name not in tensors:
            yield name, np.zeros(shape, np.float32)
            continue
        tensor = tensors[name]
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        values = gguf_networks.as_transformers(values, name, architecture, config)
        yield name, np.ascontiguousarray(values, dtype=np.float32)
        done += int(tensor.n_elements)
        progress("convert", done, total)


def _convert_tokenizer(file: Path, target: Path) -> None:
    transformers = import_module("transformers")  # see data.tokenizer_files.load_tokenizer
    alone = target / ".gguf"  # transformers would also read tokenizer files that lie beside the GGUF file
    alone.mkdir()
    (alone / file.name).symlink_to(file.absolute())
    try:
        transformers.AutoTokenizer.from_pretrained(alone, gguf_file=file.name).save_pretrained(target)
    except Exception as error:  # transformers' converters raise whatever a tokenizer they do not know leads to
        raise UnsupportedModel(
            f"the tokenizer in {file} cannot be read: {error}", hint="Add the model's Hugging Face directory instead."
        ) from None
    shutil.rmtree(alone)
