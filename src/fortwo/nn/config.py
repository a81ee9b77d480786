"""The network's shape, read from a transformers config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fortwo.errors import UnsupportedModel
from fortwo.nn.lora_config import GROUPS, module_name

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Shape(Protocol):
    """What the parts that serve and train ask of any network's shape.

    kv_heads, head_size: of the keys and values; context: the most tokens of a sequence.
    """

    @property
    def architecture(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The linear modules that each product computes together."""

    def module_name(self, layer: int, target: str, /) -> str:
        """PEFT's name of a linear module, such as model.layers.3.self_attn.q_proj."""

    def in_features(self, group: str, /) -> int:
        """The input width of a product."""

    def columns(self, name: str, /) -> tuple[int, int]:
        """First and past-last output column of a linear module within its product."""


@dataclass(frozen=True)
class DecoderConfig:
    architecture: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a transformers config.json. Raises UnsupportedModel naming what is not supported."""
        names = config.get("architectures") or ["?"]
        architecture = names[0]
        if architecture not in ARCHITECTURES:
            raise UnsupportedModel(
                f"architecture {architecture!r} is not supported",
                param="architectures",
                hint=f"Supported: {', '.join(ARCHITECTURES)}.",
            )
        family = architecture.removesuffix("ForCausalLM")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(
                f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'", param="hidden_act"
            )
        for flag in ("mlp_bias",):
            if config.get(flag):
                raise UnsupportedModel(f"{flag} = true is not supported", param=flag)
        if family != "Qwen2" and config.get("attention_bias"):
            raise UnsupportedModel(f"attention_bias = true is not supported for {family}", param="attention_bias")
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3", "linear"):
            raise UnsupportedModel(f"rope type {kind!r} is not supported", param="rope_scaling")
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        context = int(config["max_position_embeddings"])
        window = config.get("sliding_window")
        if window and (family == "Mistral" or config.get("use_sliding_window")):
            context = min(context, int(window))
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        return cls(
            architecture=architecture,
            vocabulary=int(config["vocab_size"]),
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            context=context,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(theta),
            rope_scaling=None if kind == "default" else rope,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "Qwen2",
            qk_norm=family == "Qwen3",
        )

    @property
    def parameters(self) -> int:
        """Of embedding, head and the projections; the rest is next to nothing."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        layer = self.hidden * (2 * q + 2 * kv + 3 * self.intermediate)
        return self.layers * layer + self.hidden * self.vocabulary * (1 if self.tied else 2)

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The projections of each fused product."""
        return GROUPS

    def module_name(self, layer: int, target: str) -> str:
        """PEFT's name of a projection, such as model.layers.3.self_attn.q_proj."""
        return module_name(layer, target)

    def in_features(self, group: str) -> int:
        """Input width of a fused product: qkv, o, gate_up or down."""
        return {
            "qkv": self.hidden,
            "o": self.heads * self.head_size,
            "gate_up": self.hidden,
            "down": self.intermediate,
        }[group]

    def columns(self, name: str) -> tuple[int, int]:
        """First and past-last output column of a projection within its fused product."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (0, q),
            "k_proj": (q, q + kv),
            "v_proj": (q + kv, q + 2 * kv),
            "o_proj": (0, self.hidden),
            "gate_proj": (0, self.intermediate),
            "up_proj": (self.intermediate, 2 * self.intermediate),
            "down_proj": (0, self.hidden),
        }[name]
