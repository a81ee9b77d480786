"""Converts a GGUF file into a Hugging Face model directory: config, fp32 weights, tokenizer, chat template.

llama.cpp's tensor names and its row order of q and k are known here; where the file came from is not.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fortwo.errors import UnsupportedModel
from fortwo.hub import gguf_files, weights
from fortwo.hub.weights import ProgressCallback
from fortwo.records import Json

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor

# llama.cpp stores Mistral models as llama.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def convert(file: Path, target: Path, progress: ProgressCallback) -> None:
    """Write the model in `file` into the directory `target`; transformers converts the tokenizer. Raises
    UnsupportedModel for a file that is damaged, incomplete or of an architecture that is not supported."""
    parts = gguf_files.parts_of(file)
    readers = [gguf_files.open_part(part) for part in parts]
    reader, file = readers[0], parts[0]
    gguf_files.check(reader, file, parts)
    tensors = gguf_files.all_tensors(readers, parts)
    _check_architecture(reader, file)
    config = _model_config(reader, tensors, file)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    (target / "generation_config.json").write_text(json.dumps(_generation_config(reader), indent=2))
    tensors = {_hf_name(name, file): tensor for name, tensor in tensors.items() if name != _ROPE_FACTORS}
    tensors = dict(sorted(tensors.items()))
    # ggml lists the innermost dimension first.
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    weights.write_fp32(target / weights.SAFE_WEIGHTS_NAME, shapes, _dequantized(tensors, config, progress))
    progress("tokenizer", 0, 1)
    _convert_tokenizer(file, target)
    progress("tokenizer", 1, 1)


def _check_architecture(reader: GGUFReader, file: Path) -> None:
    architecture = gguf_files.field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file} has the architecture {architecture!r}",
            hint=f"Supported GGUF architectures: {', '.join(ARCHITECTURES)} (Mistral is stored as llama).",
        )


def _model_config(reader: GGUFReader, tensors: Mapping[str, ReaderTensor], file: Path) -> Json:
    architecture = gguf_files.field(reader, "general.architecture")

    def optional(name: str, default: Any = None) -> Any:
        value = gguf_files.field(reader, f"{architecture}.{name}")
        return default if value is None else value

    def required(name: str) -> Any:
        value = optional(name)
        if value is None:
            raise UnsupportedModel(f"{file} lacks the metadata {architecture}.{name}", hint="Convert the model again.")
        return value

    def number(name: str, default: Any = None) -> int:
        """A whole number above 0."""
        value = required(name) if default is None else optional(name, default)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModel(
                f"{file}: {architecture}.{name} is {str(value)[:80]}, not a whole number above 0",
                hint="Models whose layers differ are not supported. Take another model, or convert it again.",
            )
        return value

    if "token_embd.weight" not in tensors:
        raise UnsupportedModel(f"{file} lacks the tensor token_embd.weight", hint="Convert the model again.")
    heads, width = number("attention.head_count"), number("embedding_length")
    config: Json = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", optional("rope.dimension_count", width // heads)),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": required("attention.layer_norm_rms_epsilon"),
        "rope_theta": optional("rope.freq_base", 10000.0),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": gguf_files.field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf_files.field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf_files.field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    if window := optional("attention.sliding_window"):
        config |= {"sliding_window": window, "use_sliding_window": True}
    if scaling := _rope_scaling(reader, config, tensors.get(_ROPE_FACTORS), file):
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(reader: GGUFReader, config: Json, factors: ReaderTensor | None, file: Path) -> Json | None:
    """The file's rope_scaling, in transformers' terms.

    GGUF files of Llama 3.1 and later hold the divisors of the frequencies, not the four numbers that give them. Three
    of these are equal in all such models and the fourth is the largest divisor; the divisors are recomputed as a check.
    """
    if factors is None:
        kind = gguf_files.field(reader, f"{config['model_type']}.rope.scaling.type")
        if kind in (None, "none"):
            return None
        factor = gguf_files.field(reader, f"{config['model_type']}.rope.scaling.factor")
        if not isinstance(factor, int | float) or not factor > 0:
            raise UnsupportedModel(
                f"{file}: rope.scaling.type is {kind!r}, but rope.scaling.factor is {factor!r}",
                hint="Convert the model again, or add its Hugging Face directory instead.",
            )
        return {"rope_type": kind, "factor": factor}
    import numpy as np

    divisors = np.asarray(factors.data, dtype=np.float32)
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factor = float(divisors.max())
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    if divisors.shape != smooth.shape or not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModel(
            f"{file}: the tensor {_ROPE_FACTORS} does not hold Llama 3's RoPE scaling",
            hint="Add the model's Hugging Face directory instead.",
        )
    return {"rope_type": "llama3", "factor": factor, **scaling}


def _generation_config(reader: GGUFReader) -> Json:
    """Every token that ends a reply: end of sequence, and end of turn and of message where the file has them."""
    ids = [gguf_files.field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {"eos_token_id": sorted({token for token in ids if token is not None})}


def _hf_name(name: str, file: Path) -> str:
    if name in _MODEL_TENSORS:
        return _MODEL_TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_TENSORS:
        raise UnsupportedModel(
            f"{file} contains the tensor {name}, which is not supported for its architecture",
            hint="Mixtures of experts and other variants are not supported.",
        )
    return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"


def _dequantized(
    tensors: dict[str, ReaderTensor], config: Json, progress: ProgressCallback
) -> Iterator[tuple[str, np.ndarray]]:
    import numpy as np
    from gguf import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    total, done = sum(int(tensor.n_elements) for tensor in tensors.values()), 0
    for name, tensor in tensors.items():
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        projection = name.split(".")[-2]
        if config["model_type"] == "llama" and projection in heads:
            # llama.cpp interleaves the two halves of each head that RoPE rotates together.
            rows = values.reshape(heads[projection], -1, 2, *values.shape[1:])
            values = rows.swapaxes(1, 2).reshape(values.shape)
        yield name, np.ascontiguousarray(values)
        done += int(tensor.n_elements)
        progress("convert", done, total)


def _convert_tokenizer(file: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    alone = target / ".gguf"  # transformers would also read tokenizer files that lie beside the GGUF file
    alone.mkdir()
    (alone / file.name).symlink_to(file.absolute())
    try:
        AutoTokenizer.from_pretrained(alone, gguf_file=file.name).save_pretrained(target)
    except Exception as error:  # transformers' converters raise whatever a tokenizer they do not know leads to
        raise UnsupportedModel(
            f"the tokenizer in {file} cannot be read: {error}", hint="Add the model's Hugging Face directory instead."
        ) from None
    shutil.rmtree(alone)
