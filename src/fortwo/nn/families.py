"""The families of models whose network the decoder has, and what a config.json of each leaves unsaid. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fortwo.errors import UnsupportedModel


@dataclass(frozen=True)
class Family:
    """defaults: transformers' values for fields that a config.json may lack; traits: fields of DecoderConfig that no
    field of a config.json gives; attention_bias: which of the attention's projections it is for (Qwen2 has one without
    the field); sliding: which layers see a window alone, where layer_types does not say it; partial: whether it obeys
    partial_rotary_factor."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    traits: Mapping[str, Any] = field(default_factory=dict)
    attention_bias: Literal["qkvo", "none"] = "qkvo"
    sliding: Literal["none", "all", "last", "pattern", "without_rope"] = "none"
    partial: bool = False


_GEMMA = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_TRAITS = {"norm_offset": 1.0, "post_norm": True}
_OLMO_TRAITS = {"whole_qk_norm": True, "pre_norm": False, "post_norm": True}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(attention_bias="none", sliding="all"),
    "Qwen2ForCausalLM": Family({"max_window_layers": 28}, {"qkv_bias": True}, attention_bias="none", sliding="last"),
    "Qwen3ForCausalLM": Family({"head_dim": 128, "max_window_layers": 28}, {"qk_norm": True}, sliding="last"),
    "GemmaForCausalLM": Family(
        {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256}, {"norm_offset": 1.0}
    ),
    "Gemma2ForCausalLM": Family(
        {**_GEMMA, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _GEMMA_TRAITS,
        sliding="pattern",
    ),
    "Gemma3ForCausalLM": Family(
        {**_GEMMA, "sliding_window_pattern": 6, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        {**_GEMMA_TRAITS, "qk_norm": True},
        sliding="pattern",
    ),
    "SmolLM3ForCausalLM": Family(
        {"tie_word_embeddings": True, "rope_theta": 2_000_000.0, "no_rope_layer_interval": 4}, sliding="without_rope"
    ),
    "Phi3ForCausalLM": Family(
        {"rms_norm_eps": 1e-5},
        {"joined_projections": True},
        attention_bias="none",
        sliding="all",
        partial=True,
    ),
    "Olmo2ForCausalLM": Family({"rms_norm_eps": 1e-5}, _OLMO_TRAITS),
    "Olmo3ForCausalLM": Family(
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_local_base_freq": 500_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        _OLMO_TRAITS,
        sliding="pattern",
    ),
    "StableLmForCausalLM": Family(
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        {"layer_norm": True},
        attention_bias="none",
        partial=True,
    ),
    "GraniteForCausalLM": Family(
        {
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }
    ),
}

_TOWERS = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "speech_config")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
_HINT = f"Supported: {', '.join(FAMILIES)}."


def family_of(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The architecture that a config.json names, and its family. Raises UnsupportedModel for a model with a vision or
    audio tower, a mixture of experts, a model that is quantised already, and any other architecture."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list | tuple) and names else None
    if towers := [key for key in _TOWERS if config.get(key) is not None]:
        raise UnsupportedModel(
            f"the model has more than text: config.json has {towers[0]} (architecture {name!r})",
            param=towers[0],
            hint="Add a text-only model of the family, such as one that transformers' AutoModelForCausalLM saved.",
        )
    if experts := [key for key in EXPERTS if config.get(key)]:
        raise UnsupportedModel(
            f"the model is a mixture of experts: config.json has {experts[0]} = {config[experts[0]]!r} "
            f"(architecture {name!r})",
            param=experts[0],
            hint=f"Add a dense model. {_HINT}",
        )
    if not isinstance(name, str) or name not in FAMILIES:
        named = "names no architecture" if name is None else f"names the architecture {name!r}, which is not supported"
        raise UnsupportedModel(f"config.json {named}", param="architectures", hint=_HINT)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise UnsupportedModel(
            f"the weights are quantised already: config.json has quantization_config with quant_method {method!r}",
            param="quantization_config",
            hint="Add the unquantised model. FORTWO_WEIGHTS says how fortwo holds it.",
        )
    return name, FAMILIES[name]
