"""Tiny random models of every supported family, as transformers builds them, and as GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Extra = Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]]

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "smollm3": "SmolLM3",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "granite": "Granite",
    "stablelm": "StableLm",
}
SPECIALS = ["<unk>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = [*SPECIALS, *ALPHABET, "Ġt", "he", "Ġthe"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny_model(family: str, **options: Any) -> PreTrainedModel:
    """Random weights large enough that every part matters: biases and norms are random too."""
    model_class = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")
    config: PreTrainedConfig = model_class.config_class(
        **{
            "vocab_size": len(VOCABULARY),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            **options,
        }
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def generic_model(model_type: str, **options: Any) -> PreTrainedModel:
    """A tiny random model of any family that transformers has, made as large in effect as those of `tiny_model`."""
    size = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**size, **options})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer with a ChatML template."""
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(VOCABULARY)},
            merges=[(first, second) for first, second in (merge.split() for merge in MERGES)],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def save_directory(directory: Path, family: str = "llama", **options: Any) -> Path:
    """A complete model directory in Hugging Face's layout."""
    tiny_model(family, **options).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


_NORMS_BEHIND = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_OTHER_NAMES = {
    "gemma2": {**_NORMS_BEHIND, "pre_feedforward_layernorm": "ffn_norm"},
    "gemma3": {**_NORMS_BEHIND, "pre_feedforward_layernorm": "ffn_norm"},
    "phi3": {"gate_up_proj": "ffn_up"},
}


def _add_features(writer: gguf.GGUFWriter, config: PreTrainedConfig, rope: Mapping[str, Any]) -> None:
    """What an architecture has besides sizes."""

    def given(name: str) -> Any:
        return getattr(config, name, None)

    if given("sliding_window"):
        writer.add_sliding_window(config.sliding_window)
    if given("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if given("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for kind in ("short", "long"):
        if factors := rope.get(f"{kind}_factor"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(factors, np.float32))


def save_gguf(
    file: Path,
    model: PreTrainedModel,
    without: str = "",
    extra: Extra = MappingProxyType({}),
    types: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write `model` as llama.cpp's converter does. `without` leaves a tensor out, `extra` puts some in. types: by
    ggml's names within a layer (attn_q), in which weights are quantised."""
    config = model.config
    architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(head_size)
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    _add_features(writer, config, rope)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture.startswith("qwen") else "default")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(VOCABULARY) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    other = _OTHER_NAMES.get(architecture, {})
    for name, tensor in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        ggml = names.get_name(stem)
        for theirs, ours in other.items():
            if theirs in stem:
                ggml = f"blk.{stem.split('.')[2]}.{ours}"
        if ggml == without or (stem == "lm_head" and config.tie_word_embeddings):
            continue
        assert ggml is not None, stem
        array = tensor.numpy()
        if architecture.startswith("gemma") and stem.endswith("norm"):
            array = array + 1
        if architecture == "llama" and (part := ggml.split(".")[-1]) in heads:
            rows = array.reshape(heads[part], 2, array.shape[0] // heads[part] // 2, *array.shape[1:])
            array = rows.swapaxes(1, 2).reshape(array.shape)
        array = np.ascontiguousarray(array)
        kind = types.get(ggml.split(".")[-1]) if suffix == "weight" else None
        if kind is None:
            writer.add_tensor(f"{ggml}.{suffix}", array)
        else:
            type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{ggml}.{suffix}", gguf.quants.quantize(array, type), raw_dtype=type)
    for name, (array, kind) in extra.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
