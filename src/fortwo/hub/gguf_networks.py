"""How llama.cpp stores each architecture in a GGUF file: names of tensors and of metadata, and what its converter does
to values. No file is opened here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fortwo.errors import UnsupportedModel
from fortwo.records import Json

if TYPE_CHECKING:
    import numpy as np
    from gguf import ReaderTensor

Metadata = Callable[[str], Any]  # the value of a key; None for one that is not there

_MODEL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LLAMA = {**_ATTENTION, **_MLP, **_PRE_NORMS}
_GEMMA = {**_ATTENTION, **_MLP, "attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_POST_NORMS}
_PHI3 = {
    **_PRE_NORMS,
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True)
class Stored:
    """architecture: transformers' name; layer: transformers' names of a layer's tensors by llama.cpp's; interleaved:
    whether rows of q and k that RoPE turns together lie side by side; norm_offset: what the converter added to weights
    of norms; metadata: fields of config.json by keys."""

    architecture: str
    layer: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0
    metadata: Mapping[str, str] = field(default_factory=dict)


_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
STORED = {
    "llama": Stored("LlamaForCausalLM", _LLAMA, interleaved=True),
    "qwen2": Stored("Qwen2ForCausalLM", _LLAMA),
    "qwen3": Stored("Qwen3ForCausalLM", {**_LLAMA, **_HEAD_NORMS}),
    "gemma2": Stored("Gemma2ForCausalLM", _GEMMA, norm_offset=1.0, metadata=_CAPS),
    "gemma3": Stored("Gemma3ForCausalLM", {**_GEMMA, **_HEAD_NORMS}, norm_offset=1.0, metadata=_CAPS),
    "phi3": Stored("Phi3ForCausalLM", _PHI3),
}
_MODEL_TYPES = {"gemma3": "gemma3_text"}
WIDE_QUERIES = {"gemma2": 46, "gemma3": 62}  # blocks of the 27B, whose queries are scaled by width, not by head


def refuse_architecture(name: Any, file: Path) -> None:
    """Raises UnsupportedModel for an architecture that is not in STORED."""
    if name in STORED:
        return
    kind = " (a mixture of experts)" if "moe" in str(name) else ""
    raise UnsupportedModel(
        f"{file} has the architecture {name!r}{kind}",
        hint=f"Supported GGUF architectures: {', '.join(STORED)} (Mistral is stored as llama).",
    )


def hf_name(name: str, architecture: str, layers: int, file: Path) -> str | None:
    """transformers' name of a tensor; None for one that becomes part of config.json. Raises UnsupportedModel for a
    tensor that the architecture has not."""
    if name in (_FREQUENCIES, _SHORT, _LONG):
        return None
    outer = re.fullmatch(r"(\w+)\.(weight)", name)
    if outer is not None and outer[1] in _MODEL_TENSORS:
        return f"{_MODEL_TENSORS[outer[1]]}.{outer[2]}"
    inner = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    known = STORED[architecture].layer
    if inner is None or inner[2] not in known or (inner[3] == "bias" and inner[2].endswith("norm")):
        raise UnsupportedModel(
            f"{file} contains the tensor {name}, which is not supported for its architecture {architecture!r}",
            hint="Mixtures of experts and other variants are not supported.",
        )
    if int(inner[1]) >= layers:
        raise UnsupportedModel(
            f"{file} contains the tensor {name}, but {architecture}.block_count is {layers}",
            hint="Convert the model again.",
        )
    return f"model.layers.{inner[1]}.{known[inner[2]]}.{inner[3]}"


def model_config(metadata: Metadata, tensors: Mapping[str, ReaderTensor], file: Path) -> Json:
    """The config.json of the file's model. tensors: by llama.cpp's names. Raises UnsupportedModel naming metadata and
    tensors that are missing."""
    architecture = metadata("general.architecture")
    stored = STORED[architecture]

    def optional(name: str, default: Any = None) -> Any:
        value = metadata(f"{architecture}.{name}")
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
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
    turned = optional("rope.dimension_count")
    head_size = number("attention.key_length", width // heads if stored.layer is _PHI3 else turned or width // heads)
    config: Json = {
        "architectures": [stored.architecture],
        "model_type": _MODEL_TYPES.get(architecture, architecture),
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": required("attention.layer_norm_rms_epsilon"),
        "rope_theta": optional("rope.freq_base", 10000.0),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    config |= {name: optional(key) for key, name in stored.metadata.items() if optional(key) is not None}
    if architecture in WIDE_QUERIES:
        wide = config["num_hidden_layers"] == WIDE_QUERIES[architecture]
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": width // heads if wide else head_size,
        }
        del config["hidden_act"]
    scaling = _rope_scaling(optional, config, tensors, file)
    _set_window(config, optional("attention.sliding_window"), architecture)
    _set_rope(config, scaling, architecture, optional)
    if stored.layer is _PHI3 and turned:
        config["partial_rotary_factor"] = turned / head_size
    _set_biases(config, tensors, architecture)
    return config


def added_tensors(config: Json, names: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the biases that are zero and that the file leaves out, since other layers or projections have some."""
    q, kv = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    width, inner = config["hidden_size"], config["intermediate_size"]
    sizes: dict[str, int] = {}
    if config.get("attention_bias"):
        sizes |= {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": width}
    if config.get("mlp_bias"):
        sizes |= {"mlp.gate_proj": inner, "mlp.up_proj": inner, "mlp.down_proj": width}
    wanted = {
        f"model.layers.{layer}.{name}.bias": (size,)
        for layer in range(config["num_hidden_layers"])
        for name, size in sizes.items()
    }
    return {name: shape for name, shape in wanted.items() if name not in names}


def as_transformers(values: np.ndarray, name: str, architecture: str, config: Json) -> np.ndarray:
    """A tensor's values as transformers has them. name: transformers'."""
    stored = STORED[architecture]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    projection = name.split(".")[-2]
    if stored.interleaved and projection in heads:
        rows = values.reshape(heads[projection], -1, 2, *values.shape[1:])
        return rows.swapaxes(1, 2).reshape(values.shape)
    return values - stored.norm_offset if stored.norm_offset and projection.endswith("norm") else values


def _set_biases(config: Json, tensors: Mapping[str, ReaderTensor], architecture: str) -> None:
    """Say which biases the file has, in a family that has them: Qwen2 with a bias of o or of the MLP is a Llama."""
    found = {name.split(".")[2] for name in tensors if name.startswith("blk.") and name.endswith(".bias")}
    mlp = bool(found & set(_MLP))
    attention = found & set(_ATTENTION)
    if mlp:
        config["mlp_bias"] = True
    if architecture == "qwen2" and (mlp or "attn_output" in attention):
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if attention and config["architectures"] != ["Qwen2ForCausalLM"]:
        config["attention_bias"] = True


def _set_window(config: Json, window: int | None, architecture: str) -> None:
    if not window:
        return
    config["sliding_window"] = window
    if architecture == "llama":
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    elif architecture in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": True, "max_window_layers": 0}


def _set_rope(config: Json, scaling: Json | None, architecture: str, optional: Callable[..., Any]) -> None:
    """Gemma 3's layers with a window are not stretched, and turn by a base of their own."""
    if architecture != "gemma3":
        if scaling is not None:
            config["rope_scaling"] = scaling
        return
    theta = config.pop("rope_theta")
    local = optional("rope.freq_base_swa", 10000.0)
    config["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _rope_scaling(
    optional: Callable[..., Any], config: Json, tensors: Mapping[str, ReaderTensor], file: Path
) -> Json | None:
    """The file's rope_scaling, in transformers' terms."""
    if _FREQUENCIES in tensors:
        return _llama3(config, _numbers(tensors[_FREQUENCIES]), file)
    original = optional("rope.scaling.original_context_length")
    if _SHORT in tensors and _LONG in tensors:
        config["original_max_position_embeddings"] = original or config["max_position_embeddings"]
        short, long = (_numbers(tensors[name]).tolist() for name in (_SHORT, _LONG))
        factor = optional("rope.scaling.attn_factor")
        given = {} if factor is None else {"attention_factor": factor}
        return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **given}
    kind = optional("rope.scaling.type")
    if kind in (None, "none"):
        return None
    factor = optional("rope.scaling.factor")
    if not isinstance(factor, int | float) or not factor > 0:
        raise UnsupportedModel(
            f"{file}: rope.scaling.type is {kind!r}, but rope.scaling.factor is {factor!r}",
            hint="Convert the model again, or add its Hugging Face directory instead.",
        )
    scaling: Json = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original or config["max_position_embeddings"]
        for name in ("beta_fast", "beta_slow"):
            if (value := optional(f"rope.scaling.yarn_{name}")) is not None:
                scaling[name] = value
    return scaling


def _numbers(tensor: ReaderTensor) -> np.ndarray:
    import numpy as np

    return np.asarray(tensor.data, dtype=np.float32)


def _llama3(config: Json, divisors: np.ndarray, file: Path) -> Json:
    """GGUF files of Llama 3.1 and later hold the divisors of the frequencies, not the four numbers that give them.
    Three of these are equal in all such models and the fourth is the largest divisor; the divisors are recomputed as a
    check."""
    import numpy as np

    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factor = float(divisors.max())
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    if divisors.shape != smooth.shape or not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModel(
            f"{file}: the tensor {_FREQUENCIES} does not hold Llama 3's RoPE scaling",
            hint="Add the model's Hugging Face directory instead.",
        )
    return {"rope_type": "llama3", "factor": factor, **scaling}
