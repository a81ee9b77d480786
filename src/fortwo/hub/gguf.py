"""One GGUF file turned into a Hugging Face model directory: config, fp32 weights, tokenizer, chat template.

Knows llama.cpp's names and its row order of q and k; knows nothing of where the file came from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fortwo.errors import UnsupportedModel
from fortwo.hub import weights
from fortwo.hub.weights import Progress
from fortwo.records import Json

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor

# llama.cpp stores Mistral as llama.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
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


def convert(file: Path, target: Path, progress: Progress) -> None:
    """Fill `target` from `file`. The tokenizer is transformers' reading of the same file."""
    reader = _open(file)
    config = _config(reader, file)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    (target / "generation_config.json").write_text(json.dumps(_generation(reader), indent=2))
    named = {_hf_name(tensor.name, file): tensor for tensor in reader.tensors if tensor.name != _ROPE_FACTORS}
    named = dict(sorted(named.items()))
    # ggml lists dimensions innermost first
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in named.items()}
    weights.write(target / weights.SINGLE, shapes, _dequantised(named, config, progress))
    progress("tokenizer", 0, 1)
    _tokenizer(file, target)
    progress("tokenizer", 1, 1)


def _open(file: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except FileNotFoundError:
        raise UnsupportedModel(f"{file} does not exist", hint="Remove the model and add it again.") from None
    except (ValueError, IndexError, OverflowError) as error:
        raise UnsupportedModel(f"{file} is not a readable GGUF file: {error}", hint="Download it again.") from None
    architecture = _field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file} has the architecture {architecture!r}",
            hint=f"Supported GGUF architectures: {', '.join(ARCHITECTURES)} (Mistral is stored as llama).",
        )
    return reader


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _config(reader: GGUFReader, file: Path) -> Json:
    architecture = _field(reader, "general.architecture")

    def own(name: str, default: Any = None) -> Any:
        value = _field(reader, f"{architecture}.{name}")
        return default if value is None else value

    def needed(name: str) -> Any:
        value = own(name)
        if value is None:
            raise UnsupportedModel(f"{file} lacks the metadata {architecture}.{name}", hint="Convert the model again.")
        return value

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise UnsupportedModel(f"{file} lacks the tensor token_embd.weight", hint="Convert the model again.")
    heads, width = needed("attention.head_count"), needed("embedding_length")
    config: Json = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": needed("feed_forward_length"),
        "num_hidden_layers": needed("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": own("attention.key_length", own("rope.dimension_count", width // heads)),
        "max_position_embeddings": needed("context_length"),
        "rms_norm_eps": needed("attention.layer_norm_rms_epsilon"),
        "rope_theta": own("rope.freq_base", 10000.0),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    if window := own("attention.sliding_window"):
        config |= {"sliding_window": window, "use_sliding_window": True}
    if scaling := _rope_scaling(reader, config, tensors.get(_ROPE_FACTORS), file):
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(reader: GGUFReader, config: Json, factors: ReaderTensor | None, file: Path) -> Json | None:
    """What the file says of stretched positions.

    Llama 3.1 and later carry the finished divisors of the frequencies instead of the four numbers they come from.
    All those models share three of the numbers and the fourth is the largest divisor; this is checked, not assumed.
    """
    if factors is None:
        kind = _field(reader, f"{config['model_type']}.rope.scaling.type")
        if kind in (None, "none"):
            return None
        return {"rope_type": kind, "factor": _field(reader, f"{config['model_type']}.rope.scaling.factor")}
    import numpy as np

    given = np.asarray(factors.data, dtype=np.float32)
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factor = float(given.max())
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    if given.shape != smooth.shape or not np.allclose(given, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModel(
            f"{file}: {_ROPE_FACTORS} is not Llama 3's scaling of positions",
            hint="Add the model's Hugging Face directory instead.",
        )
    return {"rope_type": "llama3", "factor": factor, **scaling}


def _generation(reader: GGUFReader) -> Json:
    """Every token that ends a reply: eos, and end of turn or message where the file tells them apart."""
    ids = [_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {"eos_token_id": sorted({token for token in ids if token is not None})}


def _hf_name(name: str, file: Path) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _INNER:
        raise UnsupportedModel(
            f"{file} holds the tensor {name}, which its architecture does not have here",
            hint="Mixtures of experts and other variants are not supported.",
        )
    return f"model.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"


def _dequantised(named: dict[str, ReaderTensor], config: Json, progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    import numpy as np
    from gguf import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    total, done = sum(int(tensor.n_elements) for tensor in named.values()), 0
    for name, tensor in named.items():
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        projection = name.split(".")[-2]
        if config["model_type"] == "llama" and projection in heads:
            # llama.cpp interleaves the two halves of each head that rotate together
            rows = values.reshape(heads[projection], -1, 2, *values.shape[1:])
            values = rows.swapaxes(1, 2).reshape(values.shape)
        yield name, np.ascontiguousarray(values)
        done += int(tensor.n_elements)
        progress("convert", done, total)


def _tokenizer(file: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    alone = target / ".gguf"  # transformers would mix in whatever tokenizer files lie beside the GGUF
    alone.mkdir()
    (alone / file.name).symlink_to(file.absolute())
    try:
        AutoTokenizer.from_pretrained(alone, gguf_file=file.name).save_pretrained(target)
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"the tokenizer in {file} cannot be read: {error}", hint="Add the model's Hugging Face directory instead."
        ) from None
    shutil.rmtree(alone)
