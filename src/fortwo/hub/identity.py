"""The digest of a base: of everything that changes its replies, and of nothing else.

Weights alone do not tell two bases apart: the same tensors with other positions, another tokenizer or another chat
template are another model, on which an adapter has another effect.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fortwo.errors import UnsupportedModel
from fortwo.hub.template_files import choose_template
from fortwo.records import Json

# Keys of config.json that say how the model was stored or trained, or that the other files say better.
_NO_EFFECT = frozenset(
    "_name_or_path _attn_implementation transformers_version dtype torch_dtype use_cache model_type architectures "
    "initializer_range pretraining_tp attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop "
    "gradient_checkpointing return_dict output_attentions output_hidden_states chunk_size_feed_forward is_decoder "
    "is_encoder_decoder id2label label2id problem_type auto_map tie_word_embeddings vocab_size "
    "bos_token_id eos_token_id pad_token_id unsloth_version unsloth_fixed tokenizer_class".split()
)
_FALSE_BY_DEFAULT = frozenset(
    "attention_bias mlp_bias use_sliding_window add_cross_attention tie_encoder_decoder torchscript use_bfloat16 "
    "tf_legacy_loss remove_invalid_values".split()
)
_SPECIAL = ("bos_token", "eos_token", "add_bos_token")


def identity(directory: Path, weights_digest: str) -> str:
    """sha256 over the digest of the weights, the configuration of the network, the tokenizer, the tokens that end a
    reply, and the chat template."""
    config = read_json(directory / "config.json")
    content = {
        "weights": weights_digest,
        "architecture": config.get("architectures"),
        "network": network(config),
        "tokenizer": _tokenizer(directory),
        "eos_token_id": read_json(directory / "generation_config.json").get("eos_token_id"),
        "template": _template(directory),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def network(config: Json) -> Json:
    """What config.json says about the network, the same for every way in which transformers writes it: what says
    nothing is left out, and the two names of what concerns positions are one."""
    found = {key: value for key, value in config.items() if key not in _NO_EFFECT and not _says_nothing(key, value)}
    rope: Any = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = found.pop(key, {})
        rope = {**rope, **value} if isinstance(value, dict) else value
    if isinstance(rope, dict):
        kind = rope.pop("type", "default")
        rope = {"rope_type": kind, "rope_theta": found.pop("rope_theta", 10000.0), **rope}
    heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads:
        found = {"num_key_value_heads": heads, "head_dim": hidden // heads, **found}
    found = {"hidden_act": "silu", "rms_norm_eps": 1e-6, **found}
    if config.get("use_sliding_window") is False:
        found.pop("sliding_window", None)
    if set(map(str, found.get("layer_types") or ())) <= {"full_attention"}:
        found.pop("layer_types", None)
    return {**found, "rope": rope}


def _says_nothing(key: str, value: Any) -> bool:
    """Whether the key could as well be left out. A soft cap that is null is none, where the family's default is one."""
    if value is False:
        return key in _FALSE_BY_DEFAULT
    return value is None and not key.endswith("softcapping")


def read_json(file: Path) -> Json:
    """The JSON object in a file; an empty one where there is none. Whoever needs the file says what is wrong."""
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_config(directory: Path) -> Json:
    """config.json of a prepared base. Raises UnsupportedModel where it is missing or damaged."""
    file = directory / "config.json"
    if not (config := read_json(file)):
        raise UnsupportedModel(
            f"{file} is missing, or is no JSON object with keys",
            param="model",
            hint=f"Restore it, or delete the folder {directory}: the model is then prepared again when it is used.",
        )
    return config


def _tokenizer(directory: Path) -> Json:
    """tokenizer.json without what is switched off here, and the special tokens by name."""
    spec = {
        key: value
        for key, value in read_json(directory / "tokenizer.json").items()
        if key not in ("truncation", "padding", "version")
    }
    named = {**read_json(directory / "special_tokens_map.json"), **read_json(directory / "tokenizer_config.json")}
    special = {key: named.get(key) for key in _SPECIAL}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in special.items()}
    return {"file": hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest(), **texts}


def _template(directory: Path) -> str | None:
    try:
        return choose_template(directory).text
    except UnsupportedModel as error:  # such a base cannot be loaded
        return error.message
